"""Adaptive gradient clipping: clip gradients relative to the weights that they move.

What. For every unit i (the weights into one output), a gradient with
||G_i|| > clipping * max(||W_i||, eps) is scaled down to that bound. This lets networks
without normalization train with large batches and high learning rates.

Use.

    import jaxtricks as jt, optax
    clip = jt.agc.adaptive_grad_clip(
        0.01,
        roles=jt.nnx.roles(model),
        path_filter=jt.agc.exclude("head/kernel"),
    )
    tx = optax.chain(clip, optax.sgd(0.1, momentum=0.9, nesterov=True))
    updates, state = tx.update(grads, tx.init(params), params)
    jt.metrics(state)  # {"agc/clipped_fraction": ..., "agc/max_ratio": ...}

Settings to start from. clipping 0.01 for batches of thousands, 0.02 to 0.16 for smaller
ones; eps 1e-3, without which gains that start at zero could never move. Leave out the
classifier's kernel. If `agc/clipped_fraction` stays near 0 or near 1, the bound is too
large or too small.

When it helps and when not. It widens the range of learning rates of networks without
normalization. With batch normalization and moderate rates it rarely does anything.

Cost. Two norms per leaf; the state is two scalars. Figures: docs/techniques/agc.md.

Composes with. Put it first in the chain, on the raw gradient: agc -> weight decay ->
momentum, and inside `amp.dynamic_loss_scale`. Without `roles=` the units follow the
reference code's rule by rank, which is wrong for stacked layers and attention outputs.

Differences from the paper and from optax/flax. With `roles=None` the units are the
reference code's, by rank alone. Norms are float32 or better, and the state reports what
was clipped.

References. Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition
Without Normalization", arXiv 2102.06171, eq. 3. Reference code:
deepmind-research/nfnets/agc_optax.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxtricks import _dtypes, _sharding, _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked, known_number
from jaxtricks._typing import Array, Params, Roles, ScalarOrSchedule

__all__ = ["AgcState", "adaptive_grad_clip", "exclude", "unitwise_norm"]

exclude = roles_lib.exclude

_GRADIENT_FLOOR = 1e-6


class AgcState(NamedTuple):
    """State of `adaptive_grad_clip`: what the last update did.

    Attributes:
      clipped_fraction: clipped units / eligible units, float32 []; 0 if no unit is
        eligible.
      max_ratio: max ||G|| / max(||W||, eps) over the eligible units, float32 []; inf if
        a gradient norm is not finite.
      count: updates so far, int32 []; None unless `clipping` or `eps` is a schedule.
    """

    clipped_fraction: Any
    max_ratio: Any
    count: Any = None

    def metrics(self) -> dict[str, Any]:
        """Return what `jaxtricks.metrics` collects."""
        return {
            "agc/clipped_fraction": self.clipped_fraction,
            "agc/max_ratio": self.max_ratio,
        }


@checked
def unitwise_norm(
    x: Float[Array, "*shape"], roles: Roles | None = None
) -> Float[Array, "*units"]:
    """Compute the Euclidean norm of every unit, in float32 or better.

    ||x_i|| = sqrt(sum x^2) over the unit. float16 entries cannot overflow it; float32
    entries above 1e19 do.

    Args:
      x: [*shape], any floating dtype.
      roles: one word per axis; a unit is one ("batch", "out") index, all other axes are
        reduced. None = the reference's rule: an array that squeezes to rank <= 1 is one
        unit; rank 2 and 3 reduce axis 0, rank 4 (0, 1, 2), rank 5 (0, 1, 2, 3).

    Returns:
      The norms, float32 (float64 for float64), with 1 for every reduced axis.

    Raises:
      ValueError: roles is None and the rank is above 5.

    Example:
      >>> unitwise_norm(jnp.full((4, 3), 2.0), ("in", "out")).tolist()
      [[4.0, 4.0, 4.0]]
    """
    x = jnp.asarray(x)
    return _norm(x, _unit_axes("unitwise_norm", x.shape, roles))


@checked
def adaptive_grad_clip(
    clipping: ScalarOrSchedule = 0.01,
    *,
    eps: ScalarOrSchedule = 1e-3,
    roles: Any = None,
    path_filter: Callable[[str], bool] | None = None,
) -> optax.GradientTransformation:
    """Clip every unit's gradient to a fraction of its weights' norm.

    G_i <- G_i * clipping * max(||W_i||, eps) / max(||G_i||, 1e-6)
    if ||G_i|| > clipping * max(||W_i||, eps).

    Under optax.inject_hyperparams pass static_args=("roles", "path_filter") if you give
    them.

    Args:
      clipping: largest allowed ||G|| / ||W||; a number, array [] or schedule.
      eps: floor of the parameter norm; a number, array [] or schedule.
      roles: which axes make up a unit: None = the reference's rule by rank, a function
        (path, shape) -> roles or None, a rule of `roles.by_path`, or a tree of roles.
      path_filter: path -> bool, True = clip; `exclude(...)` makes one. None = clip
        everything.

    Returns:
      A GradientTransformation whose update needs `params`.

    Raises:
      ValueError: a negative number; in `init`, a rule that does not fit the parameters,
        or a parameter that is clipped and not floating.

    Example:
      >>> tx = adaptive_grad_clip(0.1)
      >>> params = {"w": jnp.ones((4, 2))}
      >>> grads = {"w": jnp.array([[1.0, 0.01]] * 4)}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> float(state.clipped_fraction), round(float(updates["w"][0, 0]), 6)
      (0.5, 0.1)

    References:
      Brock et al., "High-Performance Large-Scale Image Recognition Without
      Normalization", arXiv 2102.06171, eq. 3.
    """
    for name, x in (("clipping", clipping), ("eps", eps)):
        number = known_number(x)
        if number is not None and not number >= 0:
            raise ValueError(
                f"agc.adaptive_grad_clip: `{name}` is {x}: give a number >= 0"
            )
    scheduled = callable(clipping) or callable(eps)

    def init_fn(params: Params) -> AgcState:
        leaves = _tree.by_path(params)
        if isinstance(path_filter, roles_lib.Exclude):
            path_filter.check(params)
        leaf_roles = roles_lib.leaf_roles(roles, params)
        for (path, leaf), axis_roles in zip(
            leaves.items(), leaf_roles, strict=True
        ):
            _unit_axes(path, tuple(jnp.shape(leaf)), axis_roles)
            _check_dtype(path, leaf, path_filter)
        # Two arrays, because a donated state must not hold one buffer twice.
        fraction = jnp.zeros([], jnp.float32)
        ratio = jnp.zeros([], jnp.float32)
        return AgcState(
            fraction, ratio, jnp.zeros([], jnp.int32) if scheduled else None
        )

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "agc.adaptive_grad_clip needs `params`: call tx.update(grads, "
                "state, params)"
            )
        weights = _tree.by_path(params)
        leaf_roles = dict(
            zip(weights, roles_lib.leaf_roles(roles, params), strict=True)
        )
        clip = clipping(state.count) if callable(clipping) else clipping
        floor = eps(state.count) if callable(eps) else eps
        grads = _tree.by_path(updates)
        reports: list[_Units] = []
        for path, g in grads.items():
            if jnp.size(g) == 0 or (
                path_filter is not None and not path_filter(path)
            ):
                continue
            if path not in weights:
                raise ValueError(
                    f"agc: {path!r} has a gradient but is not among `params`"
                )
            unit = _unit_axes(path, tuple(jnp.shape(g)), leaf_roles[path])
            grads[path], units = _clip_leaf(
                g, weights[path], clip, floor, axes=unit
            )
            reports.append(units)
        clipped = jax.tree.unflatten(
            jax.tree.structure(updates), list(grads.values())
        )
        count = optax.safe_increment(state.count) if scheduled else None
        return clipped, AgcState(*_summary(reports, clip, floor), count)

    return optax.GradientTransformation(init_fn, update_fn)


class _Units(NamedTuple):
    """Norms of every unit of the gradient and of the weights, in one dtype."""

    g: Any
    w: Any


def _check_dtype(
    path: str, leaf: Any, path_filter: Callable[[str], bool] | None
) -> None:
    is_clipped = path_filter is None or path_filter(path)
    if not is_clipped or _dtypes.is_floating(jnp.asarray(leaf)):
        return
    raise ValueError(
        f"agc: the parameter {path!r} is {leaf.dtype}, not floating: leave it "
        "out by `path_filter`, or hide it with optax.masked"
    )


def _unit_axes(
    name: str, shape: tuple[int, ...], roles: Roles | None
) -> tuple[int, ...]:
    if roles is not None:
        return roles_lib.positions(roles, "in", "none")
    # The reference squeezes first: (1, n), (n, 1) and (1, 1, 1, C) are one unit.
    rank = len(shape)
    if sum(n != 1 for n in shape) <= 1:
        return tuple(range(rank))
    if rank > 5:
        raise ValueError(
            f"agc: {name!r} has rank {rank} and the reference has no rule "
            "above 5: pass `roles=`"
        )
    return tuple(range(rank - 1)) if rank > 3 else (0,)


def _norm(x: Any, axes: tuple[int, ...]) -> Array:
    x = jnp.asarray(x)
    squares = jnp.square(x.astype(_dtypes.wide_dtype(x)))
    return jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))


def _floored(units: _Units, clipping: Any, eps: Any) -> tuple[Array, Array]:
    """Return (the weights' norm or eps, the bound on the gradient's norm)."""
    dtype = units.w.dtype
    size = jnp.maximum(units.w, jnp.asarray(eps).astype(dtype))
    return size, jnp.asarray(clipping).astype(dtype) * size


@functools.partial(jax.jit, static_argnames="axes")
def _clip_leaf(
    g: Any, w: Any, clipping: Any, eps: Any, *, axes: tuple[int, ...]
) -> Any:
    g = jnp.asarray(g)
    g_norm = _norm(g, axes)
    w_norm = _norm(w, axes)
    dtype = _dtypes.wide_dtype(g_norm, w_norm)
    units = _Units(g_norm.astype(dtype), w_norm.astype(dtype))
    _, bound = _floored(units, clipping, eps)
    factor = bound / jnp.maximum(units.g, _GRADIENT_FLOOR)
    # Strictly greater, as in the reference: a norm at the bound is left alone.
    factor = jnp.where(units.g > bound, factor, jnp.ones_like(factor))
    return (g.astype(dtype) * factor).astype(g.dtype), units


def _summary(
    leaves: list[_Units], clipping: Any, eps: Any
) -> tuple[Array, Array]:
    """Return (fraction of units clipped, largest ratio) of all leaves, float32 []."""
    if not leaves:
        return jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
    total = sum(units.g.size for units in leaves)
    # One reduction over the units of all leaves: one per leaf would dominate the compile
    # time of large trees. Sharded units stay apart, because joining would gather them.
    if not _sharding.on_mesh(*(x for units in leaves for x in units)):
        leaves = [_joined(leaves)]
    per_leaf = [_count_clipped(units, clipping, eps) for units in leaves]
    counts = jnp.stack([count for count, _ in per_leaf])
    ratios = jnp.stack([ratio for _, ratio in per_leaf])
    return jnp.sum(counts) / total, jnp.max(ratios)


def _joined(leaves: list[_Units]) -> _Units:
    dtype = _dtypes.common_dtype(*(units.g for units in leaves))
    gradients = [units.g.astype(dtype).ravel() for units in leaves]
    weights = [units.w.astype(dtype).ravel() for units in leaves]
    return _Units(jnp.concatenate(gradients), jnp.concatenate(weights))


@jax.jit
def _count_clipped(
    units: _Units, clipping: Any, eps: Any
) -> tuple[Array, Array]:
    """Return (number of clipped units, largest ratio), float32 []."""
    size, bound = _floored(units, clipping, eps)
    ratio = units.g / jnp.maximum(size, jnp.finfo(units.g.dtype).tiny)
    # A gradient that is not finite must show, also where a maximum would drop NaN.
    ratio = jnp.where(jnp.isnan(ratio), jnp.full_like(ratio, jnp.inf), ratio)
    clipped = jnp.sum(units.g > bound, dtype=jnp.float32)
    return clipped, jnp.max(ratio).astype(jnp.float32)
