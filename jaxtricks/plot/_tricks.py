"""Pictures of what tricks do: the ablation, the learning-rate range test."""

from collections.abc import Sequence
from typing import Any

from jaxtricks.plot._labels import name_points


def ablation(rows: Sequence[dict[str, Any]]) -> Any:
    """Balanced accuracy against cost, one marker a row of `jaxtricks ablate`.

    Args:
      rows: dicts with key, metric, std, step_ms, temp_bytes and state_bytes, as in results.json.

    Returns:
      A matplotlib figure of three panels: step time, compiled temporaries, optimizer state.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    costs = (
        ("step_ms", "step time (ms)", 1.0),
        ("temp_bytes", "compiled temporaries (MiB)", 2.0**20),
        ("state_bytes", "optimizer state (KiB)", 2.0**10),
    )
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    for i, (name, label, unit) in enumerate(costs):
        axis = figure.add_subplot(1, 3, i + 1)
        points = [(row[name] / unit, row["metric"]) for row in rows]
        for row, (x, _) in zip(rows, points, strict=True):
            _mark(axis, row, x)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.margins(0.16)
        name_points(axis, [row["key"].removeprefix("all ") for row in rows], points)
    figure.axes[0].set_ylabel("balanced accuracy, test")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=len(unique))
    return figure


def lr_range(r: Any) -> Any:
    """The loss against the rate of `cyclical.lr_range_test`, and the suggestion.

    Args:
      r: a RangeTest.

    Returns:
      A matplotlib figure of one panel: losses (thin), smoothed (thick), a dashed line at the suggestion
      unless it is NaN. Where the loss explodes it leaves the panel: the scale is that of its fall.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(r.lrs, r.losses, color="gray", lw=0.8, label="loss")
    axis.plot(r.lrs, r.smoothed, color="black", lw=2, label="smoothed")
    if r.suggestion > 0:
        axis.axvline(
            float(r.suggestion), color="tab:blue", ls="--", label=f"steepest: {r.suggestion:.2g}"
        )
    _scale_to_fall(axis, list(r.losses), list(r.smoothed))
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _scale_to_fall(axis: Any, losses: list[Any], smoothed: list[Any]) -> None:
    if not losses:
        return
    low, high = float(min(losses)), float(max(smoothed[: smoothed.index(min(smoothed)) + 1]))
    top = high + (high - low) / 2
    if low < high and max(losses) > top:
        axis.set_ylim(low - (high - low) / 10, top)


_KINDS = {
    "baseline": ("*", "black", 160),
    "all": ("D", "black", 60),
    "one trick": ("o", "tab:blue", 45),
    "all but one": ("^", "tab:orange", 40),
    "best": ("P", "tab:green", 90),
}


def _mark(axis: Any, row: dict[str, Any], x: float) -> None:
    key = row["key"]
    kind = "all but one" if key.startswith("all - ") else key if key in _KINDS else "one trick"
    marker, colour, size = _KINDS[kind]
    axis.errorbar(x, row["metric"], yerr=row["std"], color=colour, alpha=0.35, zorder=1)
    axis.scatter(x, row["metric"], s=size, color=colour, marker=marker, label=kind, zorder=2)
