"""Bound from below what any schedule of a chain recomputes within some memory."""

import itertools

import numpy as np

from jaxtricks.remat._schedule import Steps
from jaxtricks.remat._solver import Frontier


def gap(
    frontier: Frontier,
    steps: Steps | None,
) -> float:
    """Return how far a schedule is above the bound, as a fraction of the whole step.

    Both count with the model's bytes and operations.
    """
    if steps is None:
        return 0.0
    memory, extra = frontier.cost(steps)
    least = least_extra(frontier, memory)
    return max(0.0, (extra - least) / (frontier.step + least))


def least_extra(
    frontier: Frontier,
    memory: float,
) -> float:
    """Return operations that every schedule runs twice within these bytes.

    When the forward pass ends, the result of each stage is in memory, with what one of
    its options saves, and then its derivative computes the rest again; or nothing is,
    and the whole stage runs again. All of these together fit into the memory. Fractions
    of a stage may be chosen here, which makes it a bound, and the bound a sort by what a
    byte spares.
    """
    total = 0.0
    slopes: list[tuple[float, float]] = []
    stages = frontier.stages
    for i, stage in enumerate(stages):
        result = float(frontier.carries[i, i])
        points = [(result + o.residual_bytes, o.extra) for o in stage.options]
        # The last stage needs no bytes: its backward pass starts at once.
        if i == len(stages) - 1:
            points = [(0.0, min(o.extra for o in stage.options))]
        elif np.isfinite(stage.forward):
            points.append((0.0, stage.forward))
        start, pieces = _envelope(points)
        memory -= start[0]
        total += start[1]
        slopes += pieces
    for slope, nbytes in sorted(slopes):
        taken = min(nbytes, max(0.0, memory))
        total += slope * taken
        memory -= taken
    return max(0.0, total)


def _envelope(
    points: list[tuple[float, float]],
) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """Return the first point of the lower convex hull, and (slope, bytes) of its edges."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points):
        # Of the points of equal bytes the cheapest comes first.
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(
            hull[-2], (x, y)
        ):
            hull.pop()
        hull.append((x, y))
    edges = [(_slope(a, b), b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    return hull[0], edges


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
