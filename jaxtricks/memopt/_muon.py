"""Optimize matrices with optax's Muon, told by roles what is a matrix."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers

from jaxtricks import _dtypes, _sharding, _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params, ScalarOrSchedule
from jaxtricks.memopt import _leaves


@checked
def muon(
    learning_rate: ScalarOrSchedule,
    *,
    roles: Any,
    path_filter: Callable[[str], bool] | None = None,
    **kwargs: Any,
) -> optax.GradientTransformation:
    """Optimize matrices with Muon and everything else with AdamW, both optax's.

    m = beta m + (1 - beta) g
    p <- p - learning_rate sqrt(max(1, n_out / n_in)) orthogonal(m)

    orthogonal(m) = U V^T of m = U S V^T, roughly, by five steps of Newton-Schulz. This
    is `optax.contrib.muon` with its `muon_weight_dimension_numbers` taken from the
    roles: a kernel is the matrix [prod(in), prod(out)], and every index of its other
    axes (stacked layers, experts) is a matrix of its own. Optax's own rule is that
    whatever has two axes is a matrix. The state is float32, float64 for float64
    parameters, unless `mu_dtype` is given.

    Muon's authors leave embeddings and the last layer to AdamW, which `path_filter`
    does. The two steps differ in size: give `adam_learning_rate`, or
    `consistent_rms=0.2`, with which Adam's rates and weight decay fit both.

    Args:
      learning_rate: a number, array [] or schedule.
      roles: which axes make a matrix: a function (path, shape) -> roles or None, a rule
        of `roles.by_path`, a model's roles (`jt.nnx.roles`, `jt.linen.roles`) or a tree
        of roles. Leaves without roles go to AdamW.
      path_filter: path -> bool, False = AdamW; `roles.exclude(...)` makes one.
      **kwargs: every other argument of `optax.contrib.muon`, by its name there: beta,
        nesterov, ns_steps, weight_decay, consistent_rms, adam_learning_rate, adam_b1,
        ...

    Returns:
      A GradientTransformation whose update needs `params`. Under
      optax.inject_hyperparams pass static_args=("roles", "path_filter").

    Raises:
      ValueError: no roles; in `init`, a rule or a path_filter that does not fit the
        parameters, a tree of which no matrix is left to Muon, a parameter that is not
        floating, or `adaptive` for stacked matrices, which optax sums over all of them.

    Example:
      >>> roles = roles_lib.by_path({r".*/kernel": ("in", "out"), ".*": ("in", "out")})
      >>> tx = muon(0.02, roles=roles, path_filter=roles_lib.exclude("embed"))
      >>> params = {"embed": jnp.ones((50, 8)), "layers": {"kernel": jnp.ones((3, 8, 4))}}
      >>> state = tx.init(params)
      >>> sorted(x.shape for x in jax.tree.leaves(state) if x.ndim > 1)
      [(3, 8, 4), (50, 8), (50, 8)]

    References:
      Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024,
      kellerjordan.github.io/posts/muon. Liu et al., "Muon is Scalable for LLM
      Training", arXiv 2502.16982.
    """
    _leaves.check_number("muon", "learning_rate", learning_rate, 0)
    if roles is None:
        raise ValueError(
            "memopt.muon: `roles` is None: give the model's (jt.nnx.roles, "
            "jt.linen.roles) or a rule (roles.by_path)"
        )
    if "muon_weight_dimension_numbers" in kwargs:
        raise ValueError(
            "memopt.muon: `muon_weight_dimension_numbers` is made from `roles`: "
            "leave it out"
        )
    adaptive = bool(kwargs.get("adaptive"))

    def dimension_numbers(params: Params) -> Any:
        views = roles_lib.matrix_view(params, roles)

        def place(path: str, _: Any, view: Any) -> MuonDimensionNumbers | None:
            if view is None or not (path_filter is None or path_filter(path)):
                return None
            if adaptive and view.batch:
                raise ValueError(
                    "memopt.muon: `adaptive` is True, but optax sums its norm "
                    f"over all matrices of {path!r}: leave it out"
                )
            return MuonDimensionNumbers(view.in_axes, view.out_axes)

        return _tree.map_with_path(place, params, views)

    # Also a NumPy number, which optax takes and its annotation lacks.
    rate: Any = learning_rate
    tx = optax.contrib.muon(
        rate, muon_weight_dimension_numbers=dimension_numbers, **kwargs
    )

    def init_fn(params: Params) -> Any:
        weights = _leaves.checked("muon", params)
        if isinstance(path_filter, roles_lib.Exclude):
            path_filter.check(params)
        _check_matrices(params, dimension_numbers(params))
        state = _placed(tx.init(_leaves.wide(params)), weights)
        return _leaves.without_empty_variables(state)

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "memopt.muon needs `params`: call tx.update(grads, state, params)"
            )
        # optax keeps the state in the dtype of what it is given: float16 would be NaN
        # for a zero gradient, and bfloat16 would lose Adam's second moment.
        plain = [
            _leaves.without_variables(tree)
            for tree in (_leaves.wide(updates), state, _leaves.wide(params))
        ]
        with _leaves.promotion_of_optax():
            steps, new_state = _on_any_mesh(tx.update, *plain)
        narrow = lambda u, g, p: u.astype(_dtypes.common_dtype(g, p))  # noqa: E731
        steps = jax.tree.map(narrow, _like(updates, steps), updates, params)
        return steps, _like(state, new_state)

    return optax.GradientTransformation(init_fn, update_fn)


def _check_matrices(params: Params, dimension_numbers: Any) -> None:
    """Raise if there are arrays of two axes or more and Muon has none of them."""
    if jax.tree.leaves(dimension_numbers) or _tree.has_masked(params):
        return
    for path, x in _tree.leaves_with_paths(params):
        if jnp.ndim(x) > 1 and jnp.size(x):
            raise ValueError(
                "memopt.muon: `roles` and `path_filter` leave no matrix to Muon, "
                f"not even {path!r}: print roles.describe(params, roles)"
            )


def _placed(state: Any, weights: dict[str, Array]) -> Any:
    """Return the first state with its zeros sharded as their parameters, also in jit."""

    def place(path: str, x: Any) -> Any:
        keys = path.split("/")
        averages = [i for i, key in enumerate(keys) if key in ("mu", "nu")]
        if not averages:
            return x
        owner = weights["/".join(keys[averages[0] + 1 :])]
        return _leaves.zeros(owner, dtype=x.dtype)

    return _tree.map_with_path(place, state)


def _on_any_mesh(update: Callable[..., Any], *trees: Any) -> Any:
    """Return update(updates, state, params), which may multiply sharded matrices.

    A product over Explicit axes needs the sharding of its result, which optax does not
    give, so it runs with Auto axes.
    """
    sharded = [x for x in jax.tree.leaves(trees) if _sharding.is_explicit(x)]
    if not sharded:
        return update(*trees)
    mesh = jax.typeof(sharded[0]).sharding.mesh

    def place(x: Any) -> NamedSharding:
        return NamedSharding(mesh, jax.typeof(x).sharding.spec)

    places = jax.tree.map(place, trees[:2])
    return jax.sharding.auto_axes(update, out_sharding=places)(*trees)


def _like(tree: Any, leaves: Any) -> Any:
    """Return the leaves in the structure of the tree."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(leaves))


def _signature() -> inspect.Signature:
    """Return the signature of `muon` with optax's arguments in place of **kwargs."""
    own = inspect.signature(muon).parameters
    theirs = inspect.signature(optax.contrib.muon).parameters
    merged = [p for p in own.values() if p.kind is not p.VAR_KEYWORD]
    for name, p in theirs.items():
        if name not in own and name != "muon_weight_dimension_numbers":
            merged.append(p.replace(kind=p.KEYWORD_ONLY))
    return inspect.Signature(merged)


# optax.inject_hyperparams reads it to find the arguments and their defaults.
muon.__signature__ = _signature()  # pyrefly: ignore
