"""Hash random bits for rounding from seed, step, path and position.

`jax.random.bits` writes its counters and results to memory: several times the leaf, for
bits that are read once. A hash of the entry's index is fused into the rounding, and
every shard makes its own.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from jaxtricks._typing import Array, Key

_GOLDEN = np.uint32(0x9E3779B9)


def of_step(key: Key, count: Any) -> Array:
    """Return the seed of a step, uint32 [2]."""
    return jax.random.bits(jax.random.fold_in(key, count), (2,), jnp.uint32)


def of_leaf(seed: Array, path: str) -> Array:
    """Return a leaf's seed, a function of its path and so independent of other leaves."""
    return of_number(seed, zlib.crc32(path.encode()))


def of_number(seed: Array, number: int) -> Array:
    """Return the seed that belongs to a number below 2^32."""
    own = seed ^ jnp.uint32(number)
    # XLA's CPU backend compiles equal kernels once. Behind the barrier a seed is an
    # operand; without it, a constant in the leaf's kernel, which no other leaf has.
    return jax.lax.platform_dependent(
        own, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )


def words(seed: Array, shape: tuple[int, ...]) -> Array:
    """Return 32 random bits, uint32, for every entry of a leaf."""
    return _finalized(_finalized(_places(shape) ^ seed[0]) + seed[1])


def quick_words(seed: Array, shape: tuple[int, ...]) -> Array:
    """Return `words` of a third of the work: random in the upper 16 bits only.

    For several arrays a leaf, where hashing would be most of the step and of its
    compilation.
    """
    x = _places(shape) * _GOLDEN + seed[0]
    x = ((x ^ (x >> 16)) + seed[1]) * np.uint32(0x85EBCA6B)
    return x ^ (x >> 13)


def _places(shape: tuple[int, ...]) -> Array:
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(
            stride
        )
    return index


def uniform(seed: Array, shape: tuple[int, ...]) -> Array:
    """Return multiples of 2^-16 in [0, 1), float32, for every entry of a leaf."""
    return (words(seed, shape) >> 16).astype(jnp.float32) / 2**16


# A random permutation of any length, one place at a time: nothing is sorted and nothing
# stored.


_ROUNDS = 32


def permuted(
    place: UInt32[Array, "*n"],
    size: UInt32[Array, "*_"],
    seed: UInt32[Array, "*_"],
) -> UInt32[Array, "*n"]:
    """Permute `size` places by a seed (swap-or-not): return where a place goes.

    Each round pairs every place x with k - x and swaps the pair by a bit that both
    agree on, so every round is a permutation, whatever the size.

    Args:
      place: [n] below size.
      size: [n] or [], at least 1, below 2^31.
      seed: [n] or []; equal seeds and sizes are the same permutation.

    Returns:
      [n] places below size.

    References:
      Hoang, Morris, Rogaway, An enciphering scheme based on a card shuffle, arXiv
      1208.1176.
    """

    def swap_or_not(i: Array, x: Array) -> Array:
        i = 2 * i.astype(jnp.uint32)
        partner = (mixed(seed, i) % size + (size - x)) % size
        bit = mixed(mixed(seed, i + 1), jnp.maximum(x, partner)) & 1
        return jnp.where(bit == 1, partner, x)

    return jax.lax.fori_loop(0, _ROUNDS, swap_or_not, place)


def mixed(
    a: UInt32[Array, "*_"], b: UInt32[Array, "*_"]
) -> UInt32[Array, "*_"]:
    """Hash two words so that every bit depends on both (MurmurHash3 twice)."""
    return _finalized(a ^ _finalized(b + _GOLDEN))


def _finalized(x: Array) -> Array:
    # The finalizer of MurmurHash3 (Appleby, public domain): every bit of the input
    # changes half the output.
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
