"""Pictures of memory plans: what is alive when, and what was traded for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_MIB, _GIB = 2**20, 2**30
_UNPLANNED = {"color": "gray", "lw": 0.9}
_PLANNED = {"color": "black", "lw": 1.8}
_BUDGET = {"color": "tab:blue", "lw": 1.4, "ls": "--"}
_WHAT = {"peak": "arguments, results and temporaries", "temp": "temporaries"}


def plan(p: Any) -> Any:
    """Memory over the operations of a step with and without its plan, and bytes against operations run again.

    Args:
      p: a `remat.Plan`; one that was read from JSON knows no timeline, which its panel says.

    Returns:
      A matplotlib figure of two panels. Left: bytes alive at each operation, estimated from the traced
      step. Right: what each compiled program needed, the planned one marked, and as a thin line what
      the model expected of its best schedules. The budget is dashed in both.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _timeline(left, p)
    _trade(right, p)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False, columnspacing=1
            )
    return figure


def _timeline(axis: Any, p: Any) -> None:
    axis.set_xlabel("operations, as a share of the step's")
    if p.timeline is None:
        axis.set(xticks=(), yticks=())
        text = "no timeline: this plan was read,\nplan again to see it"
        axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center")
        return
    unit, name = _unit([p.budget, *(max(alive, default=0) for alive in p.timeline)])
    looks = (("unplanned", _UNPLANNED), ("planned", _PLANNED))
    for alive, (label, style) in zip(p.timeline, looks, strict=True):
        axis.plot(np.linspace(0, 1, len(alive)), alive / unit, label=label, **style)
    axis.axhline(p.budget / unit, label="budget", **_BUDGET)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"alive, estimated ({name})")


def _trade(axis: Any, p: Any) -> None:
    unit, name = _unit([p.budget, p.baseline, *(nbytes for nbytes, _ in p.tried)])
    if len(p.frontier):
        nbytes, extra = np.asarray(p.frontier).T
        axis.plot(nbytes / unit, 100 * extra, color="lightgray", lw=1, label="expected", zorder=1)
    if p.tried:
        nbytes, extra = np.array(p.tried).T
        axis.scatter(nbytes / unit, 100 * extra, 40, "gray", label="tried", zorder=2)
    axis.scatter(p.baseline / unit, 0, 60, "black", marker="s", label="unplanned", zorder=2)
    # Hollow and large: what lies below it stays to be seen.
    looks = {"facecolors": "none", "edgecolors": "black", "linewidths": 1.6, "zorder": 3}
    axis.scatter(p.peak / unit, 100 * p.extra_flops, 190, marker="D", label="planned", **looks)
    axis.axvline(p.budget / unit, label="budget", **_BUDGET)
    axis.margins(0.12)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{_WHAT[p.wrt]} ({name})")
    axis.set_ylabel("operations run again (%)")


def _unit(sizes: Sequence[float]) -> tuple[int, str]:
    """What a panel counts in."""
    return (_GIB, "GiB") if max(sizes) >= _GIB else (_MIB, "MiB")
