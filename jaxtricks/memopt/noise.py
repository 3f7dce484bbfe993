"""Random bits for rounding: a hash of seed, step, path and place, made where it is used.

`jax.random.bits` writes its counters and results to memory: several times the leaf, for bits that are
read once. A hash of the entry's index is fused into the rounding, and every shard makes its own.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks._typing import Array, Key

# The finalizer of MurmurHash3 (Appleby, public domain): every bit of the input changes half the output.
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)


def of_step(key: Key, count: Any) -> Array:
    """The seed of a step, uint32 [2]."""
    return jax.random.bits(jax.random.fold_in(key, count), (2,), jnp.uint32)


def of_leaf(seed: Array, path: str) -> Array:
    """A leaf's own seed: of its path, so that hiding other leaves does not change it."""
    return seed ^ jnp.uint32(zlib.crc32(path.encode()))


def uniform(seed: Array, shape: tuple[int, ...]) -> Array:
    """Multiples of 2^-16 in [0, 1), float32, for every entry of a leaf."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    bits = _mix(_mix(index ^ seed[0]) + seed[1]) >> jnp.uint32(16)
    return bits.astype(jnp.float32) / 2**16


def _mix(x: Array) -> Array:
    for shift, multiplier in zip((16, 13), _MULTIPLIERS, strict=True):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(multiplier)
    return x ^ (x >> jnp.uint32(16))
