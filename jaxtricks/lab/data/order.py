"""The order of examples: epoch after epoch of shuffled indices, by position."""

from collections.abc import Callable

_SMALL = 2**16


def shuffled(length: int, seed: int) -> Callable[[int], int]:
    """Position in an endless stream -> index; each epoch of `length` positions is a permutation.

    Needs no memory, whatever the length: grain.MapDataset.shuffle(seed=seed).repeat() gives the same
    order, but loses one index and doubles another where the length is 2^k + 1 with an even k from 16
    on (65,537 or 262,145), as its blocks are a bit too short. There one index more is shuffled, and
    what falls on it goes where that index went.

    The first epoch of a seed is the second one of the seed below. A position costs
    about 5 us, and an epoch at least 25 ms, however short.

    Args:
      length: N, at least 1.
      seed: 0 to 2^32 - 1.

    Raises:
      ValueError: a seed outside of that.
    """
    from grain.experimental import index_shuffle

    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must be from 0 to 2^32 - 1")
    last = length - 1
    padded = last >= _SMALL and last.bit_count() == 1
    top = last + padded

    def index(position: int) -> int:
        epoch, i = divmod(position, length)
        key = (seed + epoch) % 2**32
        i = index_shuffle(i, max_index=top, seed=key, rounds=4)
        return i if i <= last else index_shuffle(i, max_index=top, seed=key, rounds=4)

    return index
