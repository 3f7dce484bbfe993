"""The moving average of the step: in a floating dtype, or in int8 with a scale for every 128 entries."""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _tree
from jaxtricks._types import Array, Key
from jaxtricks.memopt import leaves

BLOCK = 128
_LARGEST = 127


class Int8(NamedTuple):
    """A block-scaled array: entry = values * scale of its block.

    Attributes:
      values: int8, shaped as the leaf.
      scale: float32 [*leading, blocks]: a block is 128 neighbours along the last axis, or along as many
        of the last axes as it takes to have 128.
    """

    values: Any
    scale: Any


def checked_dtype(name: str, dtype: Any) -> Any:
    """The dtype that an argument `momentum_dtype` names, int8 included; None stays None."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not (jnp.issubdtype(found, jnp.floating) or found == jnp.int8):
        raise ValueError(
            f"memopt.{name}: `momentum_dtype` is {dtype!r}: give 'float32', 'bfloat16', 'int8' or None"
        )
    return found


def zeros(leaf: Any, dtype: Any) -> Array | Int8:
    """An empty average for one leaf, placed as the leaf is; None = float32 or better."""
    if dtype != jnp.int8:
        return leaves.zeros(leaf, dtype=dtype)
    merged, (*leading, width) = _blocked(leaf.shape)
    scale = jnp.zeros((*leading, math.ceil(width / BLOCK)), jnp.float32)
    if merged == 1 and width % BLOCK == 0:
        scale = leaves.place(scale, leaf, range(leaf.ndim))
    return Int8(leaves.zeros(leaf, dtype=jnp.int8), scale)


def keys(m: Any, count: Any) -> Any:
    """{path: key} for the averages that are rounded at random; the same at the same (step, path)."""
    at_step = jax.random.fold_in(jax.random.key(0), count)
    return {
        path: leaf_key(at_step, path) for path, x in (m or {}).items() if isinstance(x, Int8)
    }


def leaf_key(key: Key, path: str) -> Key:
    """A leaf's own key: of its path, so that hiding other leaves does not change it."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def read(m: Any, dtype: Any) -> Array:
    """The average as an array of the dtype."""
    if not isinstance(m, Int8):
        return m.astype(dtype)
    blocks = _split(m.values.astype(dtype)) * m.scale.astype(dtype)[..., None]
    return _join(blocks, m.values.shape)


def write(x: Array, like: Any, key: Key | None) -> Any:
    """x in the form of `like`; int8 is rounded up with the probability of the remainder (unbiased)."""
    if not isinstance(like, Int8):
        return x.astype(like.dtype)
    blocks = _split(x)
    scale = jnp.max(jnp.abs(blocks), axis=-1) / _LARGEST
    steps = blocks / jnp.where(scale > 0, scale, jnp.ones_like(scale))[..., None]
    # Below 128 a sum with 16 random bits is exact to half a bit.
    noise = jax.random.bits(key, blocks.shape, jnp.uint16).astype(x.dtype) / 2**16
    rounded = jnp.clip(jnp.floor(steps + noise), -_LARGEST, _LARGEST)
    return Int8(_join(rounded, x.shape).astype(jnp.int8), scale.astype(jnp.float32))


def _blocked(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How many of the last axes a block spans, and the shape with these merged into one."""
    merged = min(1, len(shape))
    while merged < len(shape) and math.prod(shape[len(shape) - merged :]) < BLOCK:
        merged += 1
    cut = len(shape) - merged
    return merged, (*shape[:cut], math.prod(shape[cut:]))


def _split(x: Array) -> Array:
    _, (*leading, width) = _blocked(x.shape)
    count = math.ceil(width / BLOCK)
    flat = x.reshape(*leading, width)
    padded = jnp.pad(flat, [(0, 0)] * len(leading) + [(0, count * BLOCK - width)])
    return padded.reshape(*leading, count, BLOCK)


def _join(blocks: Array, shape: tuple[int, ...]) -> Array:
    _, (*leading, width) = _blocked(shape)
    return blocks.reshape(*leading, -1)[..., :width].reshape(shape)
