"""Names beside points, moved until none covers another."""

import itertools
from collections.abc import Sequence
from typing import Any

_GAP = 0.026  # between a point and its name, as a share of the panel


def name_points(
    axis: Any,
    texts: Sequence[str],
    points: Sequence[tuple[float, float]],
    *,
    width: float = 0.014,
    height: float = 0.021,
    fontsize: float = 7,
) -> None:
    """Write each text beside its point, with a thin line to it.

    Args:
      axis: with its limits settled.
      texts: a name a point.
      points: (x, y) in data coordinates.
      width: of a character, as a share of the axis.
      height: of a line, as a share of the axis.
      fontsize: in points.
    """
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    # A point is taken too: a name over another's marker can't be told from that one's.
    shares = [((x - left) / (right - left), (y - low) / (high - low)) for x, y in points]
    taken = [(u - _GAP / 2, u + _GAP / 2, v) for u, v in shares]
    order = sorted(zip(texts, points, shares, strict=True), key=lambda item: item[2][::-1])
    for text, point, (u, v) in order:
        length = width * len(text)
        to_left = u + _GAP + length > 1
        start = max(u - _GAP - length, 0) if to_left else u + _GAP
        v = _free(start, start + length, v, height, taken)
        taken.append((start, start + length, v))
        axis.annotate(
            text,
            point,
            (start + length if to_left else start, v),
            textcoords="axes fraction",
            fontsize=fontsize,
            ha="right" if to_left else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": "gray"},
        )


def _free(
    start: float, end: float, v: float, height: float, taken: Sequence[tuple[float, float, float]]
) -> float:
    """The height nearest to v, above or below, at which nothing is taken between start and end."""
    beside = [w for a, b, w in taken if start < b and a < end]
    for shift in itertools.count():
        for w in (v + shift * height / 5, v - shift * height / 5):
            if height / 2 < w < 1 - height / 2 and all(abs(w - b) >= height for b in beside):
                return w
        if shift * height / 5 > 1:  # no room at all: better over another name than outside
            return v
    raise AssertionError("unreachable")
