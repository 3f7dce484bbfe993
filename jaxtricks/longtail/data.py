"""Make long-tailed splits of balanced data on the host, as the literature does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from jaxtricks._arguments import checked
from jaxtricks._typing import Array

__all__ = [
    "balanced_counterpart",
    "exponential_counts",
    "longtail_indices",
    "pareto_counts",
    "step_counts",
]

Real = float | int | np.number
Whole = int | np.integer


@checked
def exponential_counts(
    n_max: Real, num_classes: Whole, imbalance: Real
) -> Integer[np.ndarray, "C"]:
    """Return the exponential profile.

    n_c = int(n_max imbalance^(-c / (C-1))), at least 1

    Args:
      n_max: examples of the largest class.
      num_classes: C.
      imbalance: n_max / n_min, >= 1.

    Returns:
      [C] int64 counts, largest first; reverse with [::-1].

    Raises:
      ValueError: if imbalance < 1 or there are no classes or examples.

    >>> exponential_counts(5000, 10, 100).tolist()
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

    References:
      Cao et al., arXiv 1906.07413 (the CIFAR-LT splits).
    """
    _check("exponential_counts", n_max, num_classes, imbalance)
    # The reference raises the reciprocal; imbalance ** -x rounds differently.
    factor = 1 / imbalance
    steps = max(num_classes - 1, 1)
    return _whole(n_max * factor ** (c / steps) for c in range(num_classes))


@checked
def step_counts(
    n_max: Real, num_classes: Whole, imbalance: Real
) -> Integer[np.ndarray, "C"]:
    """Return the step profile: n_max for the first C // 2 classes, then n_max / imbalance.

    Args:
      n_max: examples of a large class.
      num_classes: C; where it is odd the smaller half is the large classes.
      imbalance: n_max / n_min, >= 1.

    Returns:
      [C] int64 counts, at least 1.

    Raises:
      ValueError: if imbalance < 1 or there are no classes or examples.

    >>> step_counts(100, 5, 10).tolist()
    [100, 100, 10, 10, 10]
    """
    _check("step_counts", n_max, num_classes, imbalance)
    large = num_classes // 2
    small = n_max * (1 / imbalance)
    return _whole([n_max] * large + [small] * (num_classes - large))


@checked
def pareto_counts(
    n_max: Real, num_classes: Whole, imbalance: Real, *, alpha: Real = 6.0
) -> Integer[np.ndarray, "C"]:
    """Return the Pareto profile: quantiles from n_max to n_max / imbalance.

    q_c = ((c + 1/2) / C)^(-1/alpha)
    n_c = n_min + (n_max - n_min) (q_c - q_last) / (q_0 - q_last)

    Deterministic, unlike the draws behind ImageNet-LT and Places-LT, which are file
    lists: for the ends of ImageNet-LT (1280, 1000, 256) it gives 104,345 examples, the
    list has 115,846.

    Args:
      n_max: examples of the largest class.
      num_classes: C.
      imbalance: n_max / n_min, >= 1.
      alpha: index of the law, > 0; smaller is heavier in the head.

    Returns:
      [C] int64 counts, largest first, at least 1.

    Raises:
      ValueError: if imbalance < 1, alpha <= 0, or there are no classes or examples.

    >>> pareto_counts(1280, 5, 256).tolist()
    [1280, 584, 301, 128, 5]

    References:
      Liu et al., Large-scale long-tailed recognition in an open world, arXiv
      1904.05160.
    """
    _check("pareto_counts", n_max, num_classes, imbalance)
    if not alpha > 0:
        raise ValueError(
            f"longtail.data.pareto_counts needs `alpha` > 0, got {alpha}: 6 is common"
        )
    q = ((np.arange(num_classes) + 0.5) / num_classes) ** (-1 / alpha)
    share = (q - q[-1]) / (q[0] - q[-1]) if num_classes > 1 else np.ones(1)
    n_min = n_max * (1 / imbalance)
    # Ends that are whole numbers must not fall to the integer below by rounding.
    return _whole(n_min + (n_max - n_min) * share + 1e-9)


@checked
def balanced_counterpart(
    counts: Integer[Array, "C"] | Sequence[Any],
) -> Integer[np.ndarray, "C"]:
    """Return equal counts with the same total, behind the upper reference A_u.

    Args:
      counts: [C] of a long-tailed training set.

    Returns:
      [C] int64 with the same sum, which differ by at most 1; the largest classes have
      the one more.

    Raises:
      ValueError: if a count is negative.

    >>> balanced_counterpart([50, 9, 3]).tolist()
    [21, 21, 20]

    References:
      Zhang et al., Deep long-tailed learning: a survey, arXiv 2110.04596, section 4.1.
    """
    counts = np.asarray(counts).reshape(-1).astype(np.int64)
    if np.any(counts < 0):
        raise ValueError(
            "longtail.data.balanced_counterpart: `counts` must not be negative"
        )
    each, more = divmod(int(counts.sum()), max(len(counts), 1))
    result = np.full(len(counts), each, np.int64)
    result[np.argsort(-counts, kind="stable")[:more]] += 1
    return result


@checked
def longtail_indices(
    labels: Integer[Array, "N"] | Sequence[Any],
    counts: Integer[Array, "C"] | Sequence[Any],
    seed: int,
) -> Integer[np.ndarray, "M"]:
    """Choose examples of a balanced set for a long-tailed one, as LDAM-DRW does.

    For each class in turn the indices are shuffled by NumPy's legacy generator and the
    first n_c remain; the same seed gives the same split as the published code, byte
    for byte.

    Args:
      labels: [N] integers in [0, C).
      counts: [C] how many to keep of each class.
      seed: of the legacy generator (0 in the published splits).

    Returns:
      [sum counts] int64 indices into labels, class after class.

    Raises:
      ValueError: if a class has fewer examples than asked for.

    >>> longtail_indices([0, 0, 0, 1, 1, 1], [3, 1], seed=0).tolist()
    [2, 1, 0, 5]

    References:
      Cao et al., arXiv 1906.07413.
    """
    labels = np.asarray(labels).reshape(-1)
    random = np.random.RandomState(seed)
    subset = []
    for c, n in enumerate(np.asarray(counts).tolist()):
        indices = np.flatnonzero(labels == c)
        if len(indices) < n:
            raise ValueError(
                f"longtail.data.longtail_indices: `counts` asks for {n} "
                f"examples of class {c}, which has {len(indices)}: lower n_max"
            )
        random.shuffle(indices)
        subset.append(indices[:n])
    return np.concatenate(subset) if subset else np.zeros(0, np.int64)


def _check(name: str, n_max: Real, num_classes: Whole, imbalance: Real) -> None:
    if num_classes < 1 or n_max < 1:
        raise ValueError(
            f"longtail.data.{name} needs `n_max` and `num_classes` >= 1"
        )
    if not imbalance >= 1:
        raise ValueError(
            f"longtail.data.{name}: `imbalance` is n_max / n_min >= 1, got "
            f"{imbalance}: pass its reciprocal"
        )


def _whole(values: object) -> Integer[np.ndarray, "C"]:
    return np.array([max(int(v), 1) for v in values], np.int64)  # pyrefly: ignore
