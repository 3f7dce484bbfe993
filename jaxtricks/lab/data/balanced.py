"""The order of examples that are drawn by class probability, by position: nothing is stored."""

import bisect
from collections.abc import Callable, Sequence

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DRAWS = 3  # random words a position: which probabilities, which class, which example


def drawn(
    labels: np.ndarray,
    probabilities: Sequence[float] | np.ndarray,
    seed: int,
    *,
    after: Sequence[float] | np.ndarray | None = None,
    over: int = 1,
) -> Callable[[int], int]:
    """Position in an endless stream -> index: a class by its probability, then any of its examples.

    A function of (seed, position), with replacement, and no slower than `order.shuffled`. The state of a
    pipeline that reads in this order is Grain's own index, as with the other.

    Args:
      labels: int [N], the class of each example.
      probabilities: [C] of each class, such as `longtail.sampling.class_probabilities`; they are
        normalized over the classes that have examples.
      seed: of the draws.
      after: [C] that the probabilities turn into, linearly over the first `over` positions.
      over: that many.

    Raises:
      ValueError: a label that has no probability, or no class that can be drawn.
    """
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(probabilities):
        raise ValueError(
            f"labels go from {labels.min()} to {labels.max()}: give `probabilities` of each class"
        )
    counts = np.bincount(labels, minlength=len(probabilities))
    ends = np.cumsum(counts).tolist()
    examples = np.argsort(labels, kind="stable")
    first = _cumulative(probabilities, counts)
    last = first if after is None else _cumulative(after, counts)
    start = _mixed(seed)

    def index(position: int) -> int:
        word = start + _DRAWS * position * _GOLDEN
        # A mixture: with probability position / over this draw is one of `after`.
        turned = _mixed(word) * over < position * 2**64
        share = _mixed(word + _GOLDEN) / 2**64
        c = bisect.bisect_right(last if turned else first, share)
        c = min(c, len(ends) - 1)
        return int(examples[ends[c] - 1 - _mixed(word + 2 * _GOLDEN) % int(counts[c])])

    return index


def _cumulative(probabilities: Sequence[float] | np.ndarray, counts: np.ndarray) -> list[float]:
    p = np.where(counts > 0, np.asarray(probabilities, np.float64), 0)
    if np.any(p < 0) or not p.sum() > 0:
        raise ValueError("`probabilities` must be positive for a class that has examples")
    ends = np.cumsum(p)
    # Exactly 1 from the last class that can be drawn on: no share lies beyond it.
    return (ends / ends[-1]).tolist()


def _mixed(x: int) -> int:
    """64 bits that depend on every bit of x (SplitMix64)."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
