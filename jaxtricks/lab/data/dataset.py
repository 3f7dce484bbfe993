"""Hold examples by index, which every kind of data becomes, and say in which order they are read."""

import bisect
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names that a split may have -> the split."""

Example = dict[str, Any]
Size = tuple[int, int]  # height, width
Shape = tuple[int, ...]


class UnreadableError(UserError):
    """One example that can't be read.

    Attributes:
      name: of the file.
      reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"{name} can't be read ({reason}): remove it, or pass "
            "--skip-unreadable (--check-data lists all such files)"
        )
        self.name, self.reason = printable(name), printable(reason)


_TRIES = 100  # records of a class that are tried in place of one that broke


class Source:
    """Random access to examples, from any thread.

    An example is {"image": uint8 [H, W, C], "label": int32 []} or {"text": int32
    [context + 1]}.

    Args:
      read: index -> (example, bytes read); raises UnreadableError.
      length: N.
      labels: int [N], of images.
      skips: give another example of the class in place of one that can't be read;
        always the same one, so that a run can be repeated and resumed.

    Attributes:
      skipped: name -> reason, of the examples that could not be read.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Example, int]],
        length: int,
        labels: np.ndarray | None = None,
        *,
        skips: bool = False,
    ):
        self._read, self._length, self._labels = read, length, labels
        self._bytes_read = 0
        self._lock = threading.Lock()
        self._skips = skips and labels is not None
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | np.integer) -> Example:
        example = self.readable(index)
        return (
            self._instead(int(index) % self._length)
            if example is None
            else example
        )

    def readable(self, index: int | np.integer) -> Example | None:
        """Return the example; None for one that is to be skipped."""
        if not -self._length <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        try:
            example, nbytes = self._read(int(index) % self._length)
        except UnreadableError as error:
            if not self._skips:
                raise
            # Threads only add names, which dicts take without a lock.
            self.skipped[error.name] = error.reason
            return None
        with self._lock:
            self._bytes_read += nbytes
        return example

    def _instead(self, index: int) -> Example:
        """Return the next example of the class that can be read."""
        # From the next one on, around the end: the same in every run.
        members = np.flatnonzero(self.labels == self.labels[index])
        following = np.roll(
            members, -int(np.searchsorted(members, index, side="right"))
        )
        for other in following[:_TRIES]:
            if (example := self.readable(other)) is not None:
                return example
        name, reason = next(reversed(self.skipped.items()))
        raise UserError(
            f"{name} can't be read ({reason}), nor can the "
            f"{min(_TRIES, len(members))} images of its class after it: see to "
            "the disk"
        )

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], of images."""
        if self._labels is None:
            raise AttributeError("text has no labels")
        return self._labels

    @property
    def bytes_read(self) -> int:
        """Bytes fetched so far, as stored (files before they are decoded)."""
        return self._bytes_read

    def subset(self, indices: np.ndarray) -> "Source":
        """Return the examples at these indices, in this order, with another counter of bytes."""
        read = self._read
        labels = None if self._labels is None else self._labels[indices]
        return Source(
            lambda i: read(int(indices[i])),
            len(indices),
            labels,
            skips=self._skips,
        )


class Data(NamedTuple):
    """A data set, ready to train on.

    Attributes:
      name: what the user called it.
      kind: "image" or "text".
      train, validation, test: the splits; validation may be None.
      classes: names in label order; the characters, for text.
      shape: (H, W, C) of every image, (context + 1,) of every window of text.
      flip: whether a mirrored image keeps its class.
      counts: int [C] training examples of each class (occurrences of each character as
        a target).
      notes: sentences that the user should read.
      left_out: names of the images that could not be read at the start.
    """

    name: str
    kind: str
    train: Source
    validation: Source | None
    test: Source
    classes: tuple[str, ...]
    shape: Shape
    flip: bool
    counts: np.ndarray
    notes: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def splits(self) -> list[tuple[str, Source]]:
        """Return (name, source) of the splits that there are."""
        sources = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return [
            (name, source)
            for name, source in sources.items()
            if source is not None
        ]

    def description(self) -> dict[str, Any]:
        """Return as JSON what the data set is; a run that goes on compares it."""
        sizes = {name: len(source) for name, source in self.splits()}
        return {
            "name": self.name,
            "kind": self.kind,
            "train": sizes["train"],
            "validation": sizes.get("validation", 0),
            "test": sizes["test"],
            "classes": list(self.classes),
            "counts": [int(n) for n in self.counts],
            "shape": list(self.shape),
            "notes": list(self.notes),
            "left_out": list(self.left_out),
        }


class Stored(NamedTuple):
    """Images as they are stored: before they are split and brought to one size.

    Attributes:
      name: what the user called it.
      names: of the images, N of them, for messages.
      read: index -> (uint8 [H, W, 1 or 3], stored bytes); raises UnreadableError.
      labels: int32 [N].
      split: [N] "train", "validation" or "test".
      classes: names in label order.
      shape: (H, W, C) if it is known to be that of all; None: unknown.
      flip: whether a mirrored image keeps its class; None: if it is a colour image.
      notes: sentences that the user should read.
    """

    name: str
    names: Sequence[str]
    read: Callable[[int], tuple[np.ndarray, int]]
    labels: np.ndarray
    split: np.ndarray
    classes: tuple[str, ...]
    shape: Shape | None = None
    flip: bool | None = None
    notes: tuple[str, ...] = ()

    def subset(self, indices: np.ndarray) -> "Stored":
        """Return the images at these indices."""
        return self._replace(
            names=[self.names[i] for i in indices],
            read=lambda i: self.read(int(indices[i])),
            labels=self.labels[indices],
            split=self.split[indices],
        )


def check_classes(
    labels: np.ndarray, name: str, classes: int | None = None
) -> int:
    """Return the number of classes C if the labels are 0 to C-1, or raise UserError.

    Args:
      labels: integers [N].
      name: of the data.
      classes: C, if the data says so; a class without an example is left to the check
        of the splits.
    """
    have = np.unique(labels).tolist()
    num_classes = len(have) if classes is None else classes
    strange = [x for x in have if not 0 <= x < num_classes]
    absent = [] if classes else sorted(set(range(num_classes)) - set(have))
    if strange or absent:
        parts = []
        if strange:
            parts.append(f"{_few(strange)} occur{'s' * (len(strange) == 1)}")
        if absent:
            parts.append(f"{_few(absent)} do{'es' * (len(absent) == 1)} not")
        raise UserError(
            f"labels of {name} must be 0 to {num_classes - 1}, but "
            f"{' and '.join(parts)}: number the classes anew, by "
            "np.unique(labels, return_inverse=True)[1]"
        )
    return num_classes


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values[:5])) + ", ..." * (len(values) > 5)


# Orders: functions from a position in an endless stream to an index. Nothing is stored.


_SHORT = 2**16


def shuffled(length: int, seed: int) -> Callable[[int], int]:
    """Return position -> index; each epoch of `length` positions is a permutation.

    Needs no memory, whatever the length: grain.MapDataset.shuffle(seed=seed).repeat()
    gives the same order, but loses one index and doubles another where the length is
    2^k + 1 with an even k from 16 on (65,537 or 262,145), as its blocks are a bit too
    short. There one index more is shuffled, and what falls on it goes where that index
    went.

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
    padded = last >= _SHORT and last.bit_count() == 1
    top = last + padded

    def index(position: int) -> int:
        epoch, i = divmod(position, length)
        key = (seed + epoch) % 2**32
        i = index_shuffle(i, max_index=top, seed=key, rounds=4)
        return (
            i
            if i <= last
            else index_shuffle(i, max_index=top, seed=key, rounds=4)
        )

    return index


_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_WORDS = 3  # random words per position: for the probabilities, the class, the example


def sampled(
    labels: np.ndarray,
    probabilities: Sequence[float] | np.ndarray,
    seed: int,
    *,
    after: Sequence[float] | np.ndarray | None = None,
    over: int = 1,
) -> Callable[[int], int]:
    """Return position -> index: a class by its probability, then any of its examples.

    A function of (seed, position), with replacement, and no slower than `shuffled`. The
    state of a pipeline that reads in this order is an index, as with the other.

    Args:
      labels: int [N], the class of each example.
      probabilities: [C] of each class, such as `longtail.sampling.class_probabilities`;
        they are normalized over the classes that have examples.
      seed: of the draws.
      after: [C] that the probabilities turn into, linearly over the first `over`
        positions.
      over: number of those positions.

    Raises:
      ValueError: a label that has no probability, or no class that can be sampled.
    """
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(
        probabilities
    ):
        raise ValueError(
            f"labels go from {labels.min()} to {labels.max()}: give "
            "`probabilities` of each class"
        )
    counts = np.bincount(labels, minlength=len(probabilities))
    ends = np.cumsum(counts).tolist()
    examples = np.argsort(labels, kind="stable")
    first = _cumulative(probabilities, counts)
    last = first if after is None else _cumulative(after, counts)
    start = _mixed(seed)

    def index(position: int) -> int:
        word = start + _WORDS * position * _GOLDEN
        # A mixture: with probability position / over this sample is one of `after`.
        is_after = _mixed(word) * over < position * 2**64
        share = _mixed(word + _GOLDEN) / 2**64
        c = bisect.bisect_right(last if is_after else first, share)
        c = min(c, len(ends) - 1)
        from_the_end = _mixed(word + 2 * _GOLDEN) % int(counts[c])
        return int(examples[ends[c] - 1 - from_the_end])

    return index


def _cumulative(
    probabilities: Sequence[float] | np.ndarray, counts: np.ndarray
) -> list[float]:
    p = np.where(counts > 0, np.asarray(probabilities, np.float64), 0)
    if np.any(p < 0) or not p.sum() > 0:
        raise ValueError(
            "`probabilities` must be positive for a class that has examples"
        )
    ends = np.cumsum(p)
    # Exactly 1 from the last class that has examples on: no share lies beyond it.
    return (ends / ends[-1]).tolist()


def _mixed(x: int) -> int:
    """Return 64 bits that depend on every bit of x (SplitMix64)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
