"""Draw runs: one over its steps, its groups of classes, several side by side, an ablation.

Functions return a matplotlib figure; nothing is shown or saved. Figures read in
grayscale: position, marker, line style and hatching carry the meaning, colour only
helps.
"""

import itertools
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtricks.lab.rundir import writing
from jaxtricks.plot import (
    bar_positions,
    group_label,
    label_groups,
    labelled_bars,
    line_style,
)

__all__ = ["ablation", "compare", "curves", "groups", "save"]


_THIN = {"color": "gray", "lw": 0.9}
_THICK = {"color": "black", "lw": 2, "marker": "o", "ms": 6}
# Balanced data makes both curves one: an open square around the dot shows both.
_DASHED = {
    "color": "tab:blue",
    "lw": 2,
    "marker": "s",
    "ms": 10,
    "ls": "--",
    "mfc": "none",
}
_BARS = {
    "train": {"facecolor": "white", "hatch": "..."},
    "validation": {"facecolor": "lightsteelblue", "hatch": "///"},
    "test": {"facecolor": "tab:blue", "hatch": ""},
}
_HOLLOW = "hollow: not finished, the newest point of its curve"


def save(figure: Any, path: pathlib.Path, cure: str = "") -> None:
    """Save a figure as PNG.

    Raises:
      UserError: it can't be written; it names the cure.
    """
    with writing(path, cure=cure):
        figure.savefig(path, dpi=110)


def curves(rows: Sequence[Mapping[str, Any]], *, unit: str = "") -> Any:
    """Draw loss and accuracy of one run against its steps.

    Args:
      rows: as in metrics.jsonl: dicts with step, loss, accuracy and, at evaluations,
        val_loss, val_accuracy and val_balanced_accuracy, in [0, 1]. What is missing is
        not drawn, None and NaN leave a gap.
      unit: of the loss, such as "nats per character".

    Returns:
      A matplotlib figure of two panels: training thin, validation thick with markers.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure, (left, right) = _panels(11, 4.2)
    values = [
        *_line(left, _series(rows, "loss"), "training", **_THIN),
        *_line(left, _series(rows, "val_loss"), "validation", **_THICK),
    ]
    if (
        values
        and min(values) > 0
        and max(values) > 50 * statistics.median(values)
    ):
        left.set_yscale("log")  # one outburst would flatten all the rest
    left.set_ylabel(f"loss ({unit})" if unit else "loss")
    _line(right, _series(rows, "accuracy", 100), "training", **_THIN)
    _line(right, _series(rows, "val_accuracy", 100), "validation", **_THICK)
    balanced = _series(rows, "val_balanced_accuracy", 100)
    _line(right, balanced, "validation, balanced", **_DASHED)
    right.set_ylabel("accuracy (%)")
    for axis in (left, right):
        _finish_steps(axis)
        if axis.get_lines():
            axis.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1),
                ncols=3,
                frameon=False,
            )
    return figure


def groups(
    result: Mapping[str, Any], counts: Mapping[str, int] | None = None
) -> Any:
    """Draw the accuracy of the many-, medium- and few-shot classes of each split.

    Args:
      result: as in result.json: summaries with many, medium and few in [0, 1], by
        split; None or NaN for a group without classes.
      counts: {"many", "medium", "few": classes in the group}, if known.

    Returns:
      A matplotlib figure of one panel, a bar per group and split, its value above it.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    names = ("many", "medium", "few")
    splits = [
        split for split in _BARS if isinstance(result.get(split), Mapping)
    ]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.add_subplot()
    for i, split in enumerate(splits):
        centres, width = bar_positions(i, len(splits), len(names))
        shares = [_number(result[split].get(name)) for name in names]
        labelled_bars(axis, centres, shares, width, label=split, **_BARS[split])
    label_groups(axis, [group_label(name, counts) for name in names])
    if splits:
        axis.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False
        )
    return figure


def compare(runs: Sequence[Mapping[str, Any]]) -> Any:
    """Draw several runs: how each learned, and what it reached at what cost.

    Args:
      runs: dicts with name; text, whether it modelled text; rows, as in metrics.jsonl;
        test, a summary with accuracy, balanced_accuracy or loss, {} while unfinished;
        step_ms, the time of a step or None.

    Returns:
      A matplotlib figure of two panels: the validation figure (where a run has none,
      the training figure) against the steps; the test figure (while unfinished, hollow,
      the newest of the curve) against the time of a step. Balanced accuracy of images,
      nats per character of text, accuracy if both occur.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure, (left, right) = _panels(13, 5.4)
    measure = _measure(runs)
    points, texts, missing = [], [], []
    for i, run in enumerate(runs):
        history, origin = _history(run["rows"], measure)
        style, name = line_style(i, len(runs)), run["name"]
        _line(
            left,
            history,
            f"{name}{origin}",
            **style,
            lw=1.6,
            ms=6,
            markevery=_every(history),
        )
        final = measure.scale * _number(run["test"].get(measure.metric))
        y = final if math.isfinite(final) else _last(history)
        x = _number(run["step_ms"])
        if not math.isfinite(x + y):
            missing.append(name)
            continue
        fill = (
            {}
            if math.isfinite(final)
            else {"mfc": "white", "mew": 1.5, "label": _HOLLOW}
        )
        right.plot(x, y, **{**style, "ls": ""}, **fill, ms=9)
        points.append((x, y))
        texts.append(name)
    _finish_steps(left)
    left.set_ylabel(f"validation: {measure.label}")
    right.set_ylabel(f"test: {measure.label}")
    _finish_costs(right, missing)
    name_points(right, texts, points, width=0.012, height=0.036, fontsize=8)
    _legend(figure, left)
    return figure


class _Measure(NamedTuple):
    metric: str  # of the test summary
    curves: tuple[str, ...]  # of the rows, the first that a run has
    scale: float
    label: str


_NATS = _Measure("loss", ("val_loss", "loss"), 1, "nats per character")
_ACCURACY = _Measure(
    "accuracy", ("val_accuracy", "accuracy"), 100, "accuracy (%)"
)
_BALANCED = _Measure(
    "balanced_accuracy",
    ("val_balanced_accuracy", "accuracy"),
    100,
    "balanced accuracy (%)",
)


def _measure(runs: Sequence[Mapping[str, Any]]) -> _Measure:
    text = [run["text"] for run in runs]
    if not any(text):
        return _BALANCED
    return _NATS if all(text) else _ACCURACY


def _history(
    rows: Sequence[Mapping[str, Any]], measure: _Measure
) -> tuple[list[tuple[int, float]], str]:
    for name in measure.curves:
        history = _series(rows, name, measure.scale)
        if math.isfinite(_last(history)):
            return history, "" if name.startswith("val_") else " (training)"
    return [], ""


def _series(
    rows: Sequence[Mapping[str, Any]], name: str, scale: float = 1
) -> list[tuple[int, float]]:
    return [
        (row["step"], scale * _number(row[name])) for row in rows if name in row
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _last(history: Sequence[tuple[int, float]]) -> float:
    finite = [y for _, y in history if math.isfinite(y)]
    return finite[-1] if finite else math.nan


def _line(
    axis: Any, points: Sequence[tuple[int, float]], label: str, **style: Any
) -> list[float]:
    """Draw a series, say in its label how much of it is no number, and return the rest."""
    if not points:
        return []
    values = [y for _, y in points if math.isfinite(y)]
    lost = len(points) - len(values)
    # A point between two gaps has no line to show it.
    if len(points) < 3 or lost:
        style = {"marker": ".", "ms": 7, **style}
    steps, ys = zip(*points, strict=True)
    finite = [y if math.isfinite(y) else math.nan for y in ys]
    axis.plot(
        steps,
        finite,
        label=f"{label} ({lost} not finite)" if lost else label,
        **style,
    )
    return values


def _every(history: Sequence[Any]) -> int:
    return max(1, len(history) // 12)


def _listed(names: Sequence[str], most: int = 3) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join([*names[:most], f"{len(names) - most} more"])


def _panels(width: float, height: float) -> tuple[Any, tuple[Any, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, (figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2))


def _legend(figure: Any, axis: Any) -> None:
    """Put the names of a panel's curves above the figure, which grows by what they need."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        ncols = max(1, min(4, 140 // (max(map(len, labels)) + 8)))
        figure.set_figheight(
            figure.get_figheight() + 0.22 * math.ceil(len(labels) / ncols)
        )
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=ncols,
            frameon=False,
        )


def _finish_steps(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    _say_if_empty(axis)


def _finish_costs(axis: Any, missing: Sequence[str]) -> None:
    notes = ["step time (ms)"]
    if axis.get_legend_handles_labels()[0]:
        notes.append(_HOLLOW)
    if missing:
        notes.append(f"not measured yet: {_listed(missing)}")
    axis.set_xlabel("\n".join(notes))
    axis.margins(0.16)
    axis.grid(alpha=0.3)
    _say_if_empty(axis)


def _say_if_empty(axis: Any) -> None:
    if not axis.get_lines():
        axis.set(xticks=(), yticks=())
        axis.text(
            0.5,
            0.5,
            "nothing to show yet",
            transform=axis.transAxes,
            ha="center",
        )


def ablation(rows: Sequence[dict[str, Any]]) -> Any:
    """Draw balanced accuracy against cost, one marker per row of `jaxtricks ablate`.

    Args:
      rows: dicts with key, metric, std, step_ms, temp_bytes and state_bytes, as in
        results.json.

    Returns:
      A matplotlib figure of three panels: step time, compiled temporaries, optimizer
        state.

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
        name_points(
            axis, [row["key"].removeprefix("all ") for row in rows], points
        )
    figure.axes[0].set_ylabel("balanced accuracy, test")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside upper center",
        ncols=len(unique),
    )
    return figure


_KINDS = {
    "baseline": ("*", "black", 160),
    "all": ("D", "black", 60),
    "one trick": ("o", "tab:blue", 45),
    "all but one": ("^", "tab:orange", 40),
    "best": ("P", "tab:green", 90),
}


def _mark(axis: Any, row: dict[str, Any], x: float) -> None:
    key = row["key"]
    kind = (
        "all but one"
        if key.startswith("all - ")
        else key
        if key in _KINDS
        else "one trick"
    )
    marker, colour, size = _KINDS[kind]
    axis.errorbar(
        x, row["metric"], yerr=row["std"], color=colour, alpha=0.35, zorder=1
    )
    axis.scatter(
        x,
        row["metric"],
        s=size,
        color=colour,
        marker=marker,
        label=kind,
        zorder=2,
    )


# Names beside points, moved until none covers another.


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
    shares = [
        ((x - left) / (right - left), (y - low) / (high - low))
        for x, y in points
    ]
    taken = [(u - _GAP / 2, u + _GAP / 2, v) for u, v in shares]
    order = sorted(
        zip(texts, points, shares, strict=True), key=lambda item: item[2][::-1]
    )
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
    start: float,
    end: float,
    v: float,
    height: float,
    taken: Sequence[tuple[float, float, float]],
) -> float:
    """Return the height nearest to v, above or below, at which nothing is taken between start and end."""
    beside = [w for a, b, w in taken if start < b and a < end]
    for shift in itertools.count():
        for w in (v + shift * height / 5, v - shift * height / 5):
            if height / 2 < w < 1 - height / 2 and all(
                abs(w - b) >= height for b in beside
            ):
                return w
        # No room at all: better over another name than outside.
        if shift * height / 5 > 1:
            return v
    raise AssertionError("unreachable")
