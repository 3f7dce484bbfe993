"""Pictures of long-tailed classifiers: which classes are learned, by how many examples they have."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxtricks.plot._runs import _bars, _group, _style

_GROUPS = ("many", "medium", "few")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def shots(
    m: Mapping[str, Any],
    counts: Sequence[int] | np.ndarray,
    *,
    intervals: Mapping[str, Any] | None = None,
) -> Any:
    """Accuracy of each class against its training examples, and the many-, medium- and few-shot means.

    Args:
      m: of `longtail.metrics.summary`, or {name: summary} of several methods.
      counts: [C] training examples per class; a class without any is drawn at 1/2.
      intervals: of `longtail.metrics.bootstrap`, or {name: intervals}, drawn on the bars.

    Returns:
      A matplotlib figure of two panels: a marker a class (a line through them where there are several
      methods, classes by falling count), and a bar a group and method, its value above it. A class
      without test examples is not drawn.

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
                f"plot.shots: `counts` is {counts.shape} and {name} has {np.shape(summary['per_class'])} "
                "classes: pass the training counts"
            )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    _classes(left, methods, counts)
    _means(right, methods, ends)
    if not single:
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _classes(axis: Any, methods: Mapping[str, Any], counts: np.ndarray) -> None:
    order = np.argsort(-counts, kind="stable")
    for i, (name, summary) in enumerate(methods.items()):
        style = _style(i, len(methods)) | {"ms": 5, "lw": 0.8 if len(methods) > 1 else 0}
        axis.plot(
            np.maximum(counts[order], 0.5),
            100 * np.asarray(summary["per_class"])[order],
            label=name,
            **style,
        )
    axis.set_xscale("log")
    axis.invert_xaxis()  # the tail to the right, as everywhere
    axis.set_xlabel("training examples of the class")
    axis.set_ylabel("accuracy of the class (%)")
    axis.set_ylim(-4, 104)
    axis.grid(alpha=0.3)


def _means(axis: Any, methods: Mapping[str, Any], ends: Mapping[str, Any]) -> None:
    width = 0.84 / max(len(methods), 1)
    for i, (name, summary) in enumerate(methods.items()):
        centres = [x + (i - (len(methods) - 1) / 2) * width for x in range(len(_GROUPS))]
        shares = [float(summary[group]) for group in _GROUPS]
        look = {"facecolor": _style(i, len(methods))["color"], "hatch": _HATCHES[i % len(_HATCHES)]}
        _bars(axis, centres, shares, 0.92 * width, alpha=0.55, **look)
        _intervals(axis, centres, ends.get(name, {}))
    axis.set_xticks(range(len(_GROUPS)), [_group(name, None) for name in _GROUPS])
    axis.set_xlim(-0.5, len(_GROUPS) - 0.5)
    axis.set_ylim(0, 108)
    axis.set_ylabel("mean accuracy of the classes (%)")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _intervals(axis: Any, centres: Sequence[float], ends: Mapping[str, Any]) -> None:
    """Lines through the tops of the bars, whose values move above them."""
    values = {text.xy[0]: text for text in axis.texts if hasattr(text, "xy")}
    for x, group in zip(centres, _GROUPS, strict=True):
        if group in ends and x in values:
            low, high = 100 * np.asarray(ends[group])
            axis.vlines(x, low, high, color="black", lw=1.6)
            values[x].xy = (x, max(high, values[x].xy[1]))
