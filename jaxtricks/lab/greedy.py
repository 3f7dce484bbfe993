"""A greedy search for the best subset of tricks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtricks.lab import spread

Subset = tuple[str, ...]


class Trial(NamedTuple):
    """One trick offered to the subset found so far.

    Attributes:
      subset: the tricks that are on, the offered one among them.
      offered: its key.
      gain: mean over the seeds of the score's difference, paired by seed.
      error: standard error of that mean; 0 with one seed.
      kept: whether the gain exceeds the error.
      n: seeds.
    """

    subset: Subset
    offered: str
    gain: float
    error: float
    kept: bool
    n: int


def search(
    keys: Sequence[str], measure: Callable[[Subset], Sequence[float]]
) -> tuple[Subset, list[Trial]]:
    """Offer every trick once, the best alone first; keep it where it helps beyond the seeds' spread.

    Linear in the number of tricks, and blind to two that help only together.

    Args:
      keys: the tricks, in the order in which a subset names them.
      measure: subset -> a score for each seed, higher is better; on images that nothing else is said of.

    Returns:
      The subset that was kept, and every trial in order.
    """
    alone = {key: float(np.mean(measure((key,)))) for key in keys}
    best, scores, trials = (), np.asarray(measure(())), []
    for key in sorted(keys, key=alone.__getitem__, reverse=True):
        subset = tuple(k for k in keys if k in (*best, key))
        found = np.asarray(measure(subset))
        gain, error = float(np.mean(found - scores)), spread.error(found - scores)
        trials.append(Trial(subset, key, gain, error, gain > error, len(found)))
        if trials[-1].kept:
            best, scores = subset, found
    return best, trials
