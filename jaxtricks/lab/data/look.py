"""A look at the images before training: which can't be read, and how large and gray they are."""

import collections
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data.dataset import Shape, Size, Stored, UnreadableError

ALL_UP_TO = 10_000
"""Larger sets are looked at in a sample of SAMPLE, spread evenly."""
SAMPLE = 2_000
MAX_SIDE = 128  # of the square that images of many sizes become

_BLOCK = 4096  # images handed to the threads at once


class Look(NamedTuple):
    """What was seen.

    Attributes:
      total: images there are.
      sizes: (height, width) -> images of it.
      gray: images stored with one channel.
      unreadable: index -> why.
    """

    total: int
    sizes: collections.Counter[Size]
    gray: int
    unreadable: dict[int, UnreadableError]

    @property
    def readable(self) -> int:
        """Images that were looked at and could be read."""
        return self.sizes.total()

    @property
    def looked(self) -> str:
        """How many were looked at, as text."""
        n = self.readable + len(self.unreadable)
        return f"{n} images" + f" looked at (of {self.total})" * (n < self.total)


def look(stored: Stored, *, everything: bool = False) -> Look:
    """Decode all images, or a sample of more than 10,000 unless `everything` is to be looked at."""
    total = len(stored.names)
    if stored.shape is not None:
        height, width, channels = stored.shape
        sizes = collections.Counter({(height, width): total})
        return Look(total, sizes, total * (channels == 1), {})
    chosen = np.arange(total)
    if total > ALL_UP_TO and not everything:
        chosen = np.linspace(0, total - 1, SAMPLE).astype(int)
    sizes: collections.Counter[Size] = collections.Counter()
    gray, unreadable = 0, {}
    for i, seen in zip(chosen.tolist(), _see(stored, chosen), strict=True):
        if isinstance(seen, UnreadableError):
            unreadable[i] = seen
        else:
            height, width, channels = seen
            sizes[height, width] += 1
            gray += channels == 1
    return Look(total, sizes, gray, unreadable)


def refuse_unreadable(seen: Look) -> None:
    """Raise UserError that names the first image that can't be read and counts the others."""
    if not seen.unreadable:
        return
    first, *others = seen.unreadable.values()
    if not others:
        raise first
    raise UserError(
        f"{first.name} can't be read ({first.reason}), nor can {len(others)} more of the {seen.looked}: "
        "remove them, or pass --skip-unreadable (--check-data lists all such files)"
    )


def aim(seen: Look, size: int, name: str) -> tuple[Shape, tuple[str, ...]]:
    """The shape that all images get, and sentences on what that changes.

    Args:
      seen: the look.
      size: side of a square; 0 takes the size that at least half of the images have, else the square
        of the median short side, at most 128.
      name: of the data.

    Raises:
      UserError: there is nothing that can be read.
    """
    if not seen.readable:
        raise UserError(f"no image of {name} can be read: --check-data says why")
    channels = 1 if seen.gray == seen.readable else 3
    shape = (*_size(seen.sizes, size), channels)
    notes = []
    if other := {s: n for s, n in seen.sizes.items() if s != shape[:2]}:
        ends = f"{spell(smallest(other))} to {spell(largest(other))}"
        ends = spell(smallest(other)) if len(other) == 1 else f"sizes from {ends}"
        notes.append(
            f"resized to {spell(shape)}, scaled to cover and cut to the middle: {sum(other.values())} "
            f"of the {seen.looked}, {ends}"
        )
    if channels == 3 and seen.gray:
        notes.append(f"gray made colour: {seen.gray} of the {seen.looked}")
    if channels == 1:
        notes.append("all images are gray: 1 channel, and no mirroring")
    return shape, tuple(notes)


def smallest(sizes: dict[Size, int]) -> Size:
    """By area."""
    return min(sizes, key=lambda s: (s[0] * s[1], s))


def largest(sizes: dict[Size, int]) -> Size:
    """By area."""
    return max(sizes, key=lambda s: (s[0] * s[1], s))


def spell(size: Shape) -> str:
    """(height, width) -> "WxH", as image viewers say it."""
    return f"{size[1]}x{size[0]}"


def _size(sizes: collections.Counter[Size], side: int) -> Size:
    if side:
        return side, side
    [(common, n)] = sizes.most_common(1)
    if 2 * n >= sizes.total():
        return common
    short = np.repeat([min(s) for s in sizes], list(sizes.values()))
    side = min(MAX_SIDE, int(np.median(short)))
    return side, side


def _see(stored: Stored, chosen: np.ndarray) -> Iterator[Shape | UnreadableError]:
    def see(i: int) -> Shape | UnreadableError:
        try:
            return stored.read(i)[0].shape
        except UnreadableError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(chosen), _BLOCK):
            yield from pool.map(see, chosen[start : start + _BLOCK].tolist())
