"""Store the moving averages of Adafactor and SM3 in a floating dtype or in 8 bits."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _random_bits, _sharding
from jaxtricks import roles as roles_lib
from jaxtricks._typing import Array, Params, Roles
from jaxtricks.memopt import _block_codes, _leaves


class Int8(NamedTuple):
    """An average in 8 bits an entry, as `low_bit` stores first moments.

    Attributes:
      codes: uint8, shaped as the leaf: a sign, and a magnitude k for (k / 126)^2 of the
        block's scale.
      scale: bfloat16, shaped as the leaf but for one axis, where up to 64 neighbours
        share a number.
    """

    codes: Any
    scale: Any


def checked_dtype(name: str, dtype: Any) -> Any:
    """Return the dtype that `momentum_dtype` names, or None; int8 is allowed."""
    if dtype is None:
        return None
    try:
        parsed = jnp.dtype(dtype)
    except (TypeError, ValueError):
        parsed = None
    if parsed is not None and (
        jnp.issubdtype(parsed, jnp.floating) or parsed == jnp.int8
    ):
        return parsed
    description = parsed or f"a {type(dtype).__name__}"
    if isinstance(dtype, str):
        description = repr(dtype)
    raise ValueError(
        f"memopt.{name}: `momentum_dtype` is {description}: give 'float32', "
        "'bfloat16', 'int8' or None"
    )


def init(
    name: str,
    params: Params,
    dtype: Any,
    leaf_roles: dict[str, Roles | None],
) -> Any:
    """Create the tree of averages, all zero."""
    leaves = _leaves.checked(name, params).items()
    averages = [zeros(x, dtype, leaf_roles[path]) for path, x in leaves]
    return _leaves.tree_like(averages, params)


def zeros(leaf: Any, dtype: Any, roles: Roles | None = None) -> Array | Int8:
    """Create a zero average, sharded as the leaf; dtype None = float32 or better."""
    if dtype != jnp.int8:
        return _leaves.zeros(leaf, dtype=dtype)
    batch = roles_lib.positions(roles or (), "batch")
    entries = math.prod(n for i, n in enumerate(leaf.shape) if i not in batch)
    if entries < 2:
        # A scale for each entry: three bytes of float32's four, and less exact.
        return _leaves.zeros(leaf)
    axis = _block_codes.block_axis(leaf.shape, _block_codes.BLOCK, batch)
    empty = _block_codes.zeros(leaf, _layout(leaf.shape, axis, jnp.float32))
    return Int8(empty.codes, empty.scale)


def is_int8(x: Any) -> bool:
    """Return whether x is the average of one leaf in 8 bits."""
    return isinstance(x, Int8)


def seeds(table: dict[str, Any], count: Any) -> dict[str, Array]:
    """Return {path: seed} of the averages in 8 bits, a function of (step, path)."""
    paths = [path for path, x in table.items() if is_int8(x)]
    if not paths:
        return {}
    at_step = _random_bits.of_step(jax.random.key(0), count)
    return {path: _random_bits.of_leaf(at_step, path) for path in paths}


def step(m: Any, x: Array, beta: Any, seed: Any) -> tuple[Array, Any]:
    """Return beta m + (1 - beta) x as an array and as stored."""
    average = beta * read(m, x.dtype) + (1 - beta) * x
    if is_int8(m):
        # It is read three times: for scales, for codes and for the update. XLA's CPU
        # backend would decode for each.
        (average,) = _leaves.opaque_copies(average)
    return average, write(average, m, seed)


def read(m: Any, dtype: Any) -> Array:
    """Decode an average to an array of the dtype."""
    if not isinstance(m, Int8):
        return m.astype(dtype)
    return _block_codes.decode(_block_coded(m, dtype))


def write(x: Array, like: Any, seed: Any) -> Any:
    """Encode x in the form of `like`; 8 bits are rounded at random, without bias."""
    if not isinstance(like, Int8):
        return x.astype(like.dtype)
    old = _block_coded(like, x.dtype)
    new = _block_codes.encode_at_random(x, old, seed)
    return Int8(new.codes, new.scale)


def sharded_like(new: Any, old: Any) -> Any:
    """Return `new` sharded as `old`; else the compiler may reshard the scales.

    It is called outside the jitted step, because leaves of one shape share that step
    wherever they lie.
    """
    if not isinstance(new, Int8):
        return new
    return _sharding.tree_placed_like(new, old)


def _block_coded(m: Int8, dtype: Any) -> _block_codes.BlockCodes:
    # The layout is not part of the state: a slice of stacked averages says itself how
    # it is stored, and equal shapes share a trace.
    shape = m.codes.shape
    pairs = zip(shape, m.scale.shape, strict=True)
    axis = next(i for i, (n, blocks) in enumerate(pairs) if n != blocks)
    layout = _layout(shape, axis - len(shape), dtype)
    return _block_codes.BlockCodes(m.codes, m.scale, layout)


def _layout(
    shape: tuple[int, ...], axis: int, dtype: Any
) -> _block_codes.Layout:
    # Without a seed: it is an argument of `write`.
    return _block_codes.Layout(8, True, axis, shape[axis], jnp.dtype(dtype))
