"""Store moving averages in a floating dtype, or in int8 with a scale per 128 entries."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtricks import _random_bits, _sharding
from jaxtricks._typing import Array
from jaxtricks.memopt import _leaves

BLOCK = 128
_LARGEST = 127


class Int8(NamedTuple):
    """A block-scaled array: entry = values * scale of its block.

    Attributes:
      values: int8, shaped as the leaf.
      scale: float32 [*leading, blocks]: a block is 128 neighbours along the last axis,
        or along as many of the last axes as it takes to have 128.
    """

    values: Any
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


def zeros(leaf: Any, dtype: Any) -> Array | Int8:
    """Create a zero average, sharded as the leaf; dtype None = float32 or better."""
    if dtype != jnp.int8:
        return _leaves.zeros(leaf, dtype=dtype)
    if _leaves.on_one_device(leaf):
        *leading, width = _merged(leaf.shape)
        scale = jnp.zeros((*leading, math.ceil(width / BLOCK)), jnp.float32)
    else:
        scale = _zero_scale(leaf)
    return Int8(_leaves.zeros(leaf, dtype=jnp.int8), scale)


def is_int8(x: Any) -> bool:
    """Return whether x is the int8 average of one leaf."""
    return isinstance(x, Int8)


def seeds(table: dict[str, Any], count: Any) -> dict[str, Array]:
    """Return {path: seed} of the int8 averages, a function of (step, path)."""
    paths = [path for path, x in table.items() if is_int8(x)]
    if not paths:
        return {}
    at_step = _random_bits.of_step(jax.random.key(0), count)
    return {path: _random_bits.of_leaf(at_step, path) for path in paths}


def read(m: Any, dtype: Any) -> Array:
    """Decode an average to an array of the dtype."""
    if not isinstance(m, Int8):
        return m.astype(dtype)

    def decode(values: Array, scale: Array) -> Array:
        blocks = _split(values.astype(dtype)) * scale.astype(dtype)[..., None]
        return _join(blocks, values.shape)

    return _regrouped(decode, lambda whole, scale: whole, *m)


def write(x: Array, like: Any, seed: Any) -> Any:
    """Encode x in the form of `like`; int8 rounds at random, without bias."""
    if not isinstance(like, Int8):
        return x.astype(like.dtype)
    return Int8(
        *_regrouped(_encode, lambda whole, scale: (whole, scale), x, seed)
    )


def sharded_like(new: Any, old: Any) -> Any:
    """Return `new` sharded as `old`; else the compiler may reshard the scales.

    It is called outside the jitted step, because leaves of one shape share that step
    wherever they lie.
    """
    if not isinstance(new, Int8):
        return new
    return _sharding.tree_placed_like(new, old)


def _encode(x: Array, seed: Array) -> tuple[Array, Array]:
    blocks = _split(x)
    scale = jnp.max(jnp.abs(blocks), axis=-1) / _LARGEST
    steps = (
        blocks / jnp.where(scale > 0, scale, jnp.ones_like(scale))[..., None]
    )
    lower = jnp.floor(steps)
    # Up with the probability of the remainder: the expectation is x.
    up = (
        _split(_random_bits.uniform(seed, x.shape)).astype(x.dtype)
        < steps - lower
    )
    rounded = jnp.clip(lower + up.astype(x.dtype), -_LARGEST, _LARGEST)
    return _join(rounded, x.shape).astype(jnp.int8), scale.astype(jnp.float32)


@functools.partial(jax.jit, inline=True)
def _zero_scale(leaf: Any) -> Array:
    zeros = _sharding.zeros_like(leaf, jnp.float32)
    return _regrouped(
        lambda x: jnp.sum(_split(x), axis=-1), lambda whole, scale: scale, zeros
    )


def _merged(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape with as many last axes merged as it takes to fill a block."""
    cut = max(0, len(shape) - 1)
    while cut and math.prod(shape[cut:]) < BLOCK:
        cut -= 1
    return (*shape[:cut], math.prod(shape[cut:]))


def _split(x: Array) -> Array:
    *leading, width = _merged(x.shape)
    count = math.ceil(width / BLOCK)
    flat = x.reshape(*leading, width)
    padded = jnp.pad(
        flat, [(0, 0)] * len(leading) + [(0, count * BLOCK - width)]
    )
    return padded.reshape(*leading, count, BLOCK)


def _join(blocks: Array, shape: tuple[int, ...]) -> Array:
    *leading, width = _merged(shape)
    return blocks.reshape(*leading, -1)[..., :width].reshape(shape)


def _regrouped(
    fn: Callable[..., Any], out: Callable[..., Any], x: Array, *rest: Array
) -> Any:
    """Run fn(x, *rest), which reshapes x into blocks, on any kind of mesh.

    A reshape on Explicit axes needs the sharding of its result, so fn runs with Auto
    axes, and out(sharding of x, sharding of its scales) gives that of the results.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(x, *rest)
    *leading, width = _merged(x.shape)
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    # The first of the merged axes may stay sharded if every shard holds whole blocks.
    last = spec[len(leading)] if x.ndim else None
    last = (
        None
        if width % (BLOCK * _sharding.num_shards(sharding.mesh, last))
        else last
    )
    scale = NamedSharding(
        sharding.mesh, PartitionSpec(*spec[: len(leading)], last)
    )
    return jax.sharding.auto_axes(fn, out_sharding=out(sharding, scale))(
        x, *rest
    )
