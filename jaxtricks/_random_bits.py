"""A random permutation of any length, one place at a time: nothing is sorted and nothing stored."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from jaxtricks._typing import Array

_ROUNDS = 32
_GOLDEN = np.uint32(0x9E3779B9)


def permuted(
    place: UInt32[Array, "*n"], size: UInt32[Array, "*_"], seed: UInt32[Array, "*_"]
) -> UInt32[Array, "*n"]:
    """Where a place goes under the permutation of `size` places that the seed names (swap-or-not).

    Each round pairs every place x with k - x and swaps the pair by a bit that both agree on, so every
    round is a permutation, whatever the size.

    Args:
      place: [n] below size.
      size: [n] or [], at least 1, below 2^31.
      seed: [n] or []; equal seeds and sizes are the same permutation.

    Returns:
      [n] places below size.

    References:
      Hoang, Morris, Rogaway, An enciphering scheme based on a card shuffle, arXiv 1208.1176.
    """

    def swap_or_not(i: Array, x: Array) -> Array:
        i = 2 * i.astype(jnp.uint32)
        partner = (mixed(seed, i) % size + (size - x)) % size
        bit = mixed(mixed(seed, i + 1), jnp.maximum(x, partner)) & 1
        return jnp.where(bit == 1, partner, x)

    return jax.lax.fori_loop(0, _ROUNDS, swap_or_not, place)


def mixed(a: UInt32[Array, "*_"], b: UInt32[Array, "*_"]) -> UInt32[Array, "*_"]:
    """A hash of two words in which every bit depends on all of both (MurmurHash3's finalizer, twice)."""
    return _finalized(a ^ _finalized(b + _GOLDEN))


def _finalized(x: Array) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
