"""Store the state of any optimizer in 8 or 4 bits an entry."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtricks import _dtypes, _jaxpr, _random_bits, _sharding, _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import (
    ArgumentTypeError,
    check_regex,
    checked,
    described,
)
from jaxtricks._typing import Params
from jaxtricks.memopt import _block_codes, _leaves, _owners

SECOND_MOMENTS = (
    "nu",
    "nu_max",
    "e_g",
    "e_x",
    "sum_of_squares",
    "exp_avg_sq",
    "grad_sum_sq",
    "step_sizes",
    "AdafactorState.v",
    "FactoredState.v",
    "ScaleByAdanState.n",
    "ScaleBySimplifiedAdEMAMixState.n",
    "Sm3State.v",
)
"""Fields of the states of optax and jaxtricks whose arrays are never negative."""
# The momentum of optax's SM3, and the estimate of a Hessian.
_SIGNED = {"ScaleBySM3State.nu", "SophiaState.nu"}


class LowBitState(NamedTuple):
    """State of `low_bit`.

    Attributes:
      steps: updates so far, int32 []; every rounding is a function of it and the path.
      inner: the state of the inner transformation, with codes and scales in place of
        its large arrays.
    """

    steps: Any
    inner: Any


@checked
def low_bit(
    inner: Any,
    *,
    bits: int = 8,
    block: int = _block_codes.BLOCK,
    roles: Any = None,
    min_size: int = 4096,
    keep: Sequence[str] = (),
    second_moments: Sequence[str] = SECOND_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Store the state of any optimizer in 8 or 4 bits an entry.

    Arrays of the state that are shaped as their parameter become codes of 8 or 4 bits
    and a bfloat16 scale per block; `update` decodes them, runs the inner
    transformation, and encodes what it returns. A code is a root of the entry, square or
    fourth, so that codes lie closer together near zero: with 8 bits the error is at most
    1/63 of the largest entry of a block, 1/20 of one a tenth as large; with 4 bits a
    quarter of the largest, or most of a smaller one (see `_block_codes`).

    Rounding is random, without bias, and a function of step, path and place. NaN and
    infinities come back as they are and do not touch their neighbours. A second moment
    above zero stays above zero, so that no step grows.

    The inner transformation sees float32 where gradients and parameters have 16 bits,
    and its updates are float32.

    Numbers beyond the range of float32 become infinite, also in float64. Derivatives do
    not pass through what is stored. `optax.apply_if_finite` asks for updates in the dtype
    of 16-bit gradients: use `amp.skip_nonfinite`.

    Copies of the parameters (those of schedule_free, say) stay as they are, and so do
    means over axes (Adafactor's) and small arrays.

    Args:
      inner: an optax transformation or chain.
      bits: 8 or 4.
      block: entries that share a scale; they are neighbours along the
        axis before the last where it is long enough, else along the longest.
      roles: as for `adafactor`; blocks never lie along a "batch" axis.
      min_size: smaller arrays stay as they are.
      keep: regular expressions; an array whose path in the state one of them finds
        stays as it is: "embedding", "^0/mu".
      second_moments: names of state fields whose arrays are never negative, "nu" or
        "ScaleByAdamState.nu"; they are stored without a sign, and a negative entry comes
        back as NaN. Add to `SECOND_MOMENTS`: (*SECOND_MOMENTS, "my_v").

    Returns:
      A GradientTransformation that passes extra arguments on. Under
      optax.inject_hyperparams, every argument but those of `inner` is static.

    Raises:
      ValueError: bits other than 8 and 4; a block below 2; in `init`, a
        regular expression that finds nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.memopt import state_bytes
      >>> params = {"w": jnp.ones((512, 512))}
      >>> tx = low_bit(optax.adam(1e-3))
      >>> round(state_bytes(tx, params) / state_bytes(optax.adam(1e-3), params), 3)
      0.258

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
      Quantization", arXiv 2110.02861. Li, Chen, Zhu, "Memory Efficient Optimizers with
      4-bit States", arXiv 2309.01507, on why a second moment must not become zero.
    """
    if bits not in (8, 4):
        raise ValueError(f"memopt.low_bit: `bits` is {bits}: give 8 or 4")
    if block < 2:
        raise ValueError(
            f"memopt.low_bit: `block` is {block}: give 2 entries or more"
        )
    if min_size < 0:
        raise ValueError(
            f"memopt.low_bit: `min_size` is {min_size}: give a number of entries"
        )
    for pattern in keep:
        check_regex("memopt.low_bit: `keep` has", pattern)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ArgumentTypeError(
            f"memopt.low_bit: `inner` is {described(inner)}: give a transformation, "
            "optax.adam(1e-3) for example"
        )
    tx = optax.with_extra_args_support(inner)
    settings = _Settings(
        bits, block, roles, min_size, keep, frozenset(second_moments)
    )

    def init_fn(params: Params) -> LowBitState:
        params = _leaves.wide(params)
        with _leaves.promotion_of_optax():
            state = tx.init(params)
        places = _places(tx, state, params, settings)
        nodes = [
            _stored(x, place, block)
            for x, place in zip(jax.tree.leaves(state), places, strict=True)
        ]
        steps = jnp.zeros([], jnp.int32)
        return LowBitState(steps, _leaves.tree_like(nodes, state))

    def update_fn(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        updates, params = _leaves.wide(updates), _leaves.wide(params)
        stored, structure = jax.tree.flatten(
            state.inner, is_leaf=_block_codes.is_codes
        )
        arrays = [
            _block_codes.decode(x) if _block_codes.is_codes(x) else x
            for x in stored
        ]
        inner = jax.tree.unflatten(_structure(tx, structure, updates), arrays)
        with _leaves.promotion_of_optax():
            updates, new = tx.update(updates, inner, params, **extra)
        at_step = _random_bits.of_step(jax.random.key(0), state.steps)
        nodes = [
            _block_codes.encode_like(x, like, at_step)
            if _block_codes.is_codes(like)
            else x
            for x, like in zip(jax.tree.leaves(new), stored, strict=True)
        ]
        steps = optax.safe_increment(state.steps)
        return updates, LowBitState(steps, jax.tree.unflatten(structure, nodes))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Settings(NamedTuple):
    """The arguments of `low_bit`."""

    bits: int
    block: int
    roles: Any
    min_size: int
    keep: Sequence[str]
    second_moments: frozenset[str]


class _Place(NamedTuple):
    """What an array of the state belongs to, and how it is stored.

    Attributes:
      param: the parameter, if the array has its shape, else None.
      layout: of the codes; None where the array stays as it is.
    """

    param: Any
    layout: _block_codes.Layout | None


def _stored(x: Any, place: _Place, block: int) -> Any:
    if place.param is not None and isinstance(x, jax.core.Tracer):
        # The zeros of an init depend on nothing: the compiler would put all of them on
        # every device, and encode them itself, slowly.
        x = _sharding.placed_like(x, place.param)
    if place.layout is None:
        return x
    return _block_codes.encode(x, place.layout, block)


def _structure(tx: Any, structure: Any, updates: Any) -> Any:
    """Return the structure of the inner state; the stored one where nothing differs.

    Codes replace a Variable of flax.nnx, which older versions don't let hold a tuple.
    """
    leaves = jax.tree.leaves(updates, is_leaf=_leaves.is_variable)
    if any(map(_leaves.is_variable, leaves)):
        return jax.tree.structure(jax.eval_shape(tx.init, updates))
    return structure


def _places(
    tx: Any, state: Any, params: Params, settings: _Settings
) -> list[_Place]:
    """Return the place of each leaf of the state."""
    table = _tree.by_path(params)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    paths = [_tree.path_str(key_path) for key_path, _ in leaves]
    unchanged = _matches(settings.keep, paths, params)
    owners = _owners.owners(tx, state, table)
    copies = _depend_on_params(tx, params)
    apart = _batch_axes(settings.roles, params)
    parts: dict[str, int] = {}
    places = []
    for (key_path, x), path, owner, copy in zip(
        leaves, paths, owners, copies, strict=True
    ):
        if (
            owner is None
            or copy
            or not _dtypes.is_floating(x)
            or x.shape != np.shape(table[owner])
        ):
            places.append(_Place(None, None))
            continue
        if (
            x.size < max(settings.min_size, 1)
            or not x.ndim
            or path in unchanged
        ):
            places.append(_Place(table[owner], None))
            continue
        part = parts[owner] = parts.get(owner, -1) + 1
        fields = _fields(state, key_path, owner)
        layout = _block_codes.layout(
            x,
            owner,
            bits=settings.bits,
            signed=settings.second_moments.isdisjoint(fields)
            or not _SIGNED.isdisjoint(fields),
            axis=_block_codes.block_axis(x.shape, settings.block, apart[owner]),
            part=part,
        )
        places.append(_Place(table[owner], layout))
    return places


def _fields(state: Any, key_path: Any, owner: str) -> set[str]:
    """Return the fields on the way to a parameter's array: "nu", "ScaleByAdamState.nu"."""
    fields = set()
    node = state
    for i, key in enumerate(key_path):
        # Named tuples of the parameters have other fields.
        below = _tree.path_str(key_path[i:])
        if f"{below}/".startswith(f"{owner}/"):
            break
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            name = node._fields[key.idx] if hasattr(key, "idx") else key.name
            fields |= {name, f"{type(node).__name__}.{name}"}
            node = getattr(node, name)
        elif hasattr(key, "key") and isinstance(node, dict):
            node = node[key.key]
        elif hasattr(key, "idx"):
            node = node[key.idx]
        else:
            break
    return fields


def _matches(keep: Sequence[str], paths: list[str], params: Params) -> set[str]:
    """Return the paths that a pattern finds; raise if one finds none.

    Under optax.masked the array may be hidden, and optax locates the parameters in a
    state with an empty tree.
    """
    judged = jax.tree.leaves(params) and not _tree.has_masked(params)
    union: set[str] = set()
    for pattern in keep:
        matches = {path for path in paths if re.search(pattern, path)}
        if judged and not matches:
            raise ValueError(
                f"memopt.low_bit: `keep` has {pattern!r}, which finds no array of "
                f"the state: its paths are like {paths[-1]!r}"
            )
        union |= matches
    return union


def _depend_on_params(tx: Any, params: Params) -> list[bool]:
    """Return for each leaf of the state whether it is made of the parameters' values."""
    traced = jax.make_jaxpr(tx.init)(_owners.shapes(params))
    jaxpr = _jaxpr.inline(traced).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        # Our own zeros depend on the parameters only to lie where they do.
        if _jaxpr.primitive(eqn) == "population_count":
            continue
        if not reached.isdisjoint(_jaxpr.variables_of(eqn.invars)):
            reached.update(eqn.outvars)
    return [not _jaxpr.is_literal(v) and v in reached for v in jaxpr.outvars]


def _batch_axes(roles: Any, params: Params) -> dict[str, tuple[int, ...]]:
    """Return {path: axes of stacked layers}."""
    return {
        path: roles_lib.positions(leaf_roles or (), "batch")
        for path, leaf_roles in _leaves.roles_by_path(roles, params).items()
    }
