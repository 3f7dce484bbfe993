"""The moving average of the step: in a floating dtype, or in int8 with a scale for every 128 entries."""

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
    """The dtype that an argument `momentum_dtype` names, int8 included; None stays None."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or not (jnp.issubdtype(found, jnp.floating) or found == jnp.int8):
        given = (
            repr(dtype)
            if isinstance(dtype, str)
            else found or f"a {type(dtype).__name__}"
        )
        raise ValueError(
            f"memopt.{name}: `momentum_dtype` is {given}: give 'float32', 'bfloat16', 'int8' or None"
        )
    return found


def zeros(leaf: Any, dtype: Any) -> Array | Int8:
    """An empty average for one leaf, placed as the leaf is; None = float32 or better."""
    if dtype != jnp.int8:
        return _leaves.zeros(leaf, dtype=dtype)
    if _leaves.on_one_device(leaf):
        *leading, width = _merged(leaf.shape)
        scale = jnp.zeros((*leading, math.ceil(width / BLOCK)), jnp.float32)
    else:
        scale = _no_scale(leaf)
    return Int8(_leaves.zeros(leaf, dtype=jnp.int8), scale)


def is_int8(x: Any) -> bool:
    """Whether x is the average of one leaf, in int8."""
    return isinstance(x, Int8)


def seeds(table: dict[str, Any], count: Any) -> dict[str, Array]:
    """{path: seed} for the averages that are rounded at random; the same at the same (step, path)."""
    paths = [path for path, x in table.items() if is_int8(x)]
    if not paths:
        return {}
    at_step = _random_bits.of_step(jax.random.key(0), count)
    return {path: _random_bits.of_leaf(at_step, path) for path in paths}


def read(m: Any, dtype: Any) -> Array:
    """The average as an array of the dtype."""
    if not isinstance(m, Int8):
        return m.astype(dtype)

    def decode(values: Array, scale: Array) -> Array:
        return _join(
            _split(values.astype(dtype)) * scale.astype(dtype)[..., None], values.shape
        )

    return _regrouped(decode, lambda whole, scale: whole, *m)


def write(x: Array, like: Any, seed: Any) -> Any:
    """x in the form of `like`; int8 is rounded up with the probability of the remainder (unbiased)."""
    if not isinstance(like, Int8):
        return x.astype(like.dtype)
    return Int8(*_regrouped(_encode, lambda whole, scale: (whole, scale), x, seed))


def kept(new: Any, old: Any) -> Any:
    """`new` in the shards where `old` is: left alone, the compiler may find another place for a scale.

    Called outside of the jitted step, which leaves of one shape share wherever they
    lie.
    """
    if not isinstance(new, Int8):
        return new
    if isinstance(new.values, jax.core.Tracer):
        return jax.tree.map(_sharding.placed_like, new, old)
    if not all(isinstance(x, jax.Array) for x in old):  # from a checkpoint, say
        return new
    return jax.device_put(new, jax.tree.map(lambda x: x.sharding, old))


def _encode(x: Array, seed: Array) -> tuple[Array, Array]:
    blocks = _split(x)
    scale = jnp.max(jnp.abs(blocks), axis=-1) / _LARGEST
    steps = blocks / jnp.where(scale > 0, scale, jnp.ones_like(scale))[..., None]
    lower = jnp.floor(steps)
    up = _split(_random_bits.uniform(seed, x.shape)).astype(x.dtype) < steps - lower
    rounded = jnp.clip(lower + up.astype(x.dtype), -_LARGEST, _LARGEST)
    return _join(rounded, x.shape).astype(jnp.int8), scale.astype(jnp.float32)


@functools.partial(jax.jit, inline=True)
def _no_scale(leaf: Any) -> Array:
    zeros = _sharding.zeros_like(leaf, jnp.float32)
    return _regrouped(
        lambda x: jnp.sum(_split(x), axis=-1), lambda whole, scale: scale, zeros
    )


def _merged(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its last axes merged into one, as many as a block needs to be full."""
    cut = max(0, len(shape) - 1)
    while cut and math.prod(shape[cut:]) < BLOCK:
        cut -= 1
    return (*shape[:cut], math.prod(shape[cut:]))


def _split(x: Array) -> Array:
    *leading, width = _merged(x.shape)
    count = math.ceil(width / BLOCK)
    flat = x.reshape(*leading, width)
    padded = jnp.pad(flat, [(0, 0)] * len(leading) + [(0, count * BLOCK - width)])
    return padded.reshape(*leading, count, BLOCK)


def _join(blocks: Array, shape: tuple[int, ...]) -> Array:
    *leading, width = _merged(shape)
    return blocks.reshape(*leading, -1)[..., :width].reshape(shape)


def _regrouped(
    fn: Callable[..., Any], out: Callable[..., Any], x: Array, *rest: Array
) -> Any:
    """fn(x, *rest), which reshapes; out(sharding of x, that of its scales) says how the results lie.

    On a mesh of Explicit axes a reshape asks how its result lies, so fn runs with them
    Auto.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(x, *rest)
    *leading, width = _merged(x.shape)
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    # Of axes that are merged the first may stay split, if every part of it holds whole
    # blocks.
    last = spec[len(leading)] if x.ndim else None
    last = None if width % (BLOCK * _shards(sharding.mesh, last)) else last
    scale = NamedSharding(sharding.mesh, PartitionSpec(*spec[: len(leading)], last))
    return jax.sharding.auto_axes(fn, out_sharding=out(sharding, scale))(x, *rest)


def _shards(mesh: Any, names: Any) -> int:
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name is not None)
