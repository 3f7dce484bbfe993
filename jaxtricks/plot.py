"""Draw what the rooms return: the learning-rate range test, memory plans, accuracy by class.

Functions return a matplotlib figure; nothing is shown or saved. Figures read in
grayscale: position, marker, line style and hatching carry the meaning, colour only
helps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["lr_range", "plan", "shots"]


def lr_range(r: Any) -> Any:
    """Draw the loss against the rate of `cyclical.lr_range_test`, and the suggestion.

    Args:
      r: a RangeTest.

    Returns:
      A matplotlib figure of one panel: losses (thin), smoothed (thick), a dashed line
      at the suggestion unless it is NaN. Where the loss explodes it leaves the panel:
      the scale is that of its fall.

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
            float(r.suggestion),
            color="tab:blue",
            ls="--",
            label=f"steepest: {r.suggestion:.2g}",
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
    lowest = smoothed.index(min(smoothed))
    low, high = float(min(losses)), float(max(smoothed[: lowest + 1]))
    top = high + (high - low) / 2
    if low < high and max(losses) > top:
        axis.set_ylim(low - (high - low) / 10, top)


# Pictures of memory plans: what is alive when, and what was traded for it.


_MIB, _GIB = 2**20, 2**30
_UNPLANNED = {"color": "gray", "lw": 0.9}
_PLANNED = {"color": "black", "lw": 1.8}
_BUDGET = {"color": "tab:blue", "lw": 1.4, "ls": "--"}
_WHAT = {"peak": "arguments, results and temporaries", "temp": "temporaries"}


def plan(p: Any, *, policies: Mapping[str, Any] | None = None) -> Any:
    """Draw memory over the operations of a step, and bytes against operations run again, of a plan.

    Args:
      p: a `remat.Plan`; one that was read from JSON knows no timeline, which its panel
        says.
      policies: {label: `remat.Report`} of what you place manually, to compare with: each
        is a point in the right panel. `remat.memory_analysis` measures the step of a
        policy, jit(value_and_grad(loss)) or that of `within`. A policy may be one of
        `jax.checkpoint_policies`, or a set of names as MaxText has them: its
        save_dot_except_mlp is save_only_these_names("qkv_proj", "out_proj", ...).

    Returns:
      A matplotlib figure of two panels. Left: bytes alive at each operation, estimated
      from the traced step. Right: what each compiled program needed, the planned one
      marked, and as a thin line what the model expected of its best schedules. The
      budget is dashed in both.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import functools
      >>> import jax
      >>> from jaxtricks import remat
      >>> def loss(ws, x, wrap=lambda block: block):
      ...     for w in ws:
      ...         x = wrap(lambda w, x: jax.numpy.tanh(x @ w))(w, x)
      ...     return (x**2).mean()
      >>> ws, x = [np.eye(16)] * 8, np.ones((512, 16))
      >>> p = remat.plan(loss, ws, x, budget_bytes=0.6, wrt="temp")
      >>> manual = functools.partial(loss, wrap=jax.checkpoint)
      >>> report = remat.memory_analysis(jax.value_and_grad(manual), ws, x)
      >>> figure = plan(p, policies={"nothing saved": report})
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _timeline(left, p)
    _trade(right, p, policies or {})
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1),
                ncols=5,
                frameon=False,
                columnspacing=1,
            )
    return figure


def _timeline(axis: Any, p: Any) -> None:
    axis.set_xlabel("operations, as a share of the step's")
    if p.timeline is None:
        axis.set(xticks=(), yticks=())
        text = "no timeline: this plan was read,\nplan again to see it"
        axis.text(
            0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center"
        )
        return
    peaks = [max(alive, default=0) for alive in p.timeline]
    unit, name = _unit([p.budget, *peaks])
    styles = {"unplanned": _UNPLANNED, "planned": _PLANNED}
    for alive, label in zip(p.timeline, styles, strict=True):
        operations = np.linspace(0, 1, len(alive))
        axis.plot(operations, alive / unit, label=label, **styles[label])
    axis.axhline(p.budget / unit, label="budget", **_BUDGET)
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"alive, estimated ({name})")


def _trade(axis: Any, p: Any, policies: Mapping[str, Any]) -> None:
    # "peak" and "temp" are fields of a report.
    manual = {name: getattr(r, p.wrt) for name, r in policies.items()}
    unit, name = _unit(
        [
            p.budget,
            p.baseline,
            *(nbytes for nbytes, _ in p.tried),
            *manual.values(),
        ]
    )
    if len(p.frontier):
        nbytes, extra = np.asarray(p.frontier).T
        axis.plot(
            nbytes / unit,
            100 * extra,
            color="lightgray",
            lw=1,
            label="expected",
            zorder=1,
        )
    if p.tried:
        nbytes, extra = np.array(p.tried).T
        axis.scatter(
            nbytes / unit, 100 * extra, 40, "gray", label="tried", zorder=2
        )
    axis.scatter(
        p.baseline / unit,
        0,
        60,
        "black",
        marker="s",
        label="unplanned",
        zorder=2,
    )
    # Hollow and large: what lies below it stays visible.
    looks = {
        "facecolors": "none",
        "edgecolors": "black",
        "linewidths": 1.6,
        "zorder": 3,
    }
    axis.scatter(
        p.peak / unit,
        100 * p.extra_flops,
        190,
        marker="D",
        label="planned",
        **looks,
    )
    # A plan that was read has no report of the unplanned step.
    unplanned_flops = p.flops / (1 + p.extra_flops)
    for i, (policy, nbytes) in enumerate(manual.items()):
        extra = policies[policy].flops / unplanned_flops - 1
        look = line_style(i, len(manual))
        axis.scatter(
            nbytes / unit,
            100 * extra,
            60,
            color=look["color"],
            marker=look["marker"],
            label=policy,
            zorder=2,
        )
    axis.axvline(p.budget / unit, label="budget", **_BUDGET)
    axis.margins(0.12)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{_WHAT[p.wrt]} ({name})")
    axis.set_ylabel("operations run again (%)")


def _unit(sizes: Sequence[float]) -> tuple[int, str]:
    """Return what a panel counts in."""
    return (_GIB, "GiB") if max(sizes) >= _GIB else (_MIB, "MiB")


# Pictures of long-tailed classifiers: which classes are learned, by how many examples
# they have.


_GROUPS = ("many", "medium", "few")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def shots(
    m: Mapping[str, Any],
    counts: Sequence[int] | np.ndarray,
    *,
    intervals: Mapping[str, Any] | None = None,
) -> Any:
    """Draw each class's accuracy against its training examples, and the many-, medium- and few-shot means.

    Args:
      m: of `longtail.metrics.summary`, or {name: summary} of several methods.
      counts: [C] training examples per class; a class without any is drawn at 1/2.
      intervals: of `longtail.metrics.bootstrap`, or {name: intervals}, drawn on the
        bars.

    Returns:
      A matplotlib figure of two panels: a marker per class (a line through them where
      there are several methods, classes by falling count), and a bar per group and
      method, its value above it. A class without test examples is not drawn.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: counts has not one number per class.
    """
    from matplotlib.figure import Figure

    single = "per_class" in m
    methods = {"accuracy": m} if single else m
    ends = {"accuracy": intervals or {}} if single else intervals or {}
    counts = np.asarray(counts)
    for name, summary in methods.items():
        if np.shape(summary["per_class"]) != counts.shape:
            raise ValueError(
                f"plot.shots: `counts` is {counts.shape} and {name} has "
                f"{np.shape(summary['per_class'])} classes: pass the training "
                "counts"
            )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _classes(left, methods, counts)
    _means(right, methods, ends)
    if not single:
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=4,
        )
    return figure


def _classes(axis: Any, methods: Mapping[str, Any], counts: np.ndarray) -> None:
    order = np.argsort(-counts, kind="stable")
    for i, (name, summary) in enumerate(methods.items()):
        style = line_style(i, len(methods)) | {
            "ms": 5,
            "lw": 0.8 if len(methods) > 1 else 0,
        }
        accuracy = 100 * np.asarray(summary["per_class"])
        # Half an example where there is none: the axis is logarithmic.
        examples = np.maximum(counts, 0.5)
        axis.plot(examples[order], accuracy[order], label=name, **style)
    axis.set_xscale("log")
    axis.invert_xaxis()  # the tail to the right, as everywhere
    axis.set_xlabel("training examples of the class")
    axis.set_ylabel("accuracy of the class (%)")
    axis.set_ylim(-4, 104)
    axis.grid(alpha=0.3)


def _means(
    axis: Any, methods: Mapping[str, Any], ends: Mapping[str, Any]
) -> None:
    for i, (name, summary) in enumerate(methods.items()):
        centres, width = bar_positions(i, len(methods), len(_GROUPS))
        shares = [float(summary[group]) for group in _GROUPS]
        look = {
            "facecolor": line_style(i, len(methods))["color"],
            "hatch": _HATCHES[i % len(_HATCHES)],
        }
        labelled_bars(axis, centres, shares, width, alpha=0.55, **look)
        _intervals(axis, centres, ends.get(name, {}))
    label_groups(axis, [group_label(name, None) for name in _GROUPS])


def _intervals(
    axis: Any, centres: Sequence[float], ends: Mapping[str, Any]
) -> None:
    """Draw lines through the tops of the bars, whose values move above them."""
    values = {text.xy[0]: text for text in axis.texts if hasattr(text, "xy")}
    for x, group in zip(centres, _GROUPS, strict=True):
        if group in ends and x in values:
            low, high = 100 * np.asarray(ends[group])
            axis.vlines(x, low, high, color="black", lw=1.6)
            values[x].xy = (x, max(high, values[x].xy[1]))


# Parts that the pictures of runs are drawn with too.


_MARKERS = "os^DvPX*<>ph"
_STYLES = ("-", "--", "-.", ":")


def bar_positions(
    bar: int, bars: int, groups: int
) -> tuple[list[float], float]:
    """Return the centres of a bar, one per group, and its width."""
    width = 0.84 / max(bars, 1)
    offset = (bar - (bars - 1) / 2) * width
    return [x + offset for x in range(groups)], 0.92 * width


def label_groups(axis: Any, labels: Sequence[str]) -> None:
    """Label the groups of bars that show mean accuracies in percent."""
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_ylim(0, 108)
    axis.set_ylabel("mean accuracy of the classes (%)")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def labelled_bars(
    axis: Any,
    centres: Sequence[float],
    shares: Sequence[float],
    width: float,
    **style: Any,
) -> None:
    """Draw bars of shares in percent, the value above each, "none" where it is not finite."""
    points = [
        (x, 100 * y)
        for x, y in zip(centres, shares, strict=True)
        if math.isfinite(y)
    ]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axis.bar(xs, ys, width, edgecolor="black", **style)
    for x, y in points:
        axis.annotate(
            f"{y:.1f}",
            (x, y),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    for x in set(centres) - set(xs):
        axis.text(
            x, 2, "none", ha="center", va="bottom", color="dimgray", fontsize=9
        )


def group_label(name: str, counts: Mapping[str, int] | None) -> str:
    """Return the label of a group of classes, with its size if that is known."""
    if counts is None or name not in counts:
        return name
    n = counts[name]
    return f"{name}\n{n} class{'' if n == 1 else 'es'}"


def line_style(i: int, n: int) -> dict[str, Any]:
    """Return colour, marker and line style of curve i of n."""
    from matplotlib import colormaps

    return {
        "color": colormaps["viridis"](
            0.75 * i / max(n - 1, 1)
        ),  # dark to light, in grayscale too
        "marker": _MARKERS[i % len(_MARKERS)],
        "ls": _STYLES[i % len(_STYLES)],
    }
