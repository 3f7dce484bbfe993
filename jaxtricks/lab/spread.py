"""How far repetitions over seeds differ; one repetition has no spread: 0."""

from collections.abc import Sequence

import numpy as np


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Sample standard deviation."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean."""
    return deviation(values) / len(values) ** 0.5


def spell(spread: float, n: int) -> str:
    """A deviation or an error of n repetitions; "-" of one, which has none."""
    return f"{spread:.1f}" if n > 1 else "-"
