"""What the claims are judged by: figures from the recorded results, and the rules."""

import ast
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtricks.lab import report
from jaxtricks.lab.commands import ablate as seeds

RESULTS = pathlib.Path(__file__).parent / "results"
HELD, NOT_HELD, NOT_TESTABLE = "held", "not held", "not testable here"


class Figures(NamedTuple):
    """What one claim is judged by.

    Attributes:
      ours, base: with the technique, and without; as the table prints them.
      change: the mean difference to the baseline, or the ratio to it.
      error: standard error of the difference; None for a ratio.
      n: seeds, rounds, or 1 for what is exact.
    """

    ours: str
    base: str
    change: float
    error: float | None
    n: int

    def __str__(self) -> str:
        if self.error is None:
            return f"x {self.change:.3g}"
        return f"{self.change:+.2f} +- {self.error:.2f}"


class Rule(NamedTuple):
    """How a verdict is decided; `by_error` where it asks for a standard error."""

    text: str
    holds: Callable[[Figures], bool]
    by_error: bool = False


MORE = Rule(
    "more, beyond 2 standard errors", lambda f: f.change > 2 * _error(f), True
)
FEWER = Rule(
    "fewer, beyond 2 standard errors", lambda f: f.change < -2 * _error(f), True
)


def no_loss(margin: float) -> Rule:
    """At most `margin` below, and not below by more than two standard errors."""
    text = f"at most {margin:g} less, and within 2 standard errors or above"
    return Rule(text, lambda f: f.change >= -min(margin, 2 * _error(f)), True)


def at_most(limit: float) -> Rule:
    """For ratios."""
    return Rule(f"ratio at most {limit:g}", lambda f: f.change <= limit)


def at_least(limit: float) -> Rule:
    """For ratios."""
    return Rule(f"ratio at least {limit:g}", lambda f: f.change >= limit)


def verdict(figures: Figures | None, rule: Rule) -> str:
    """One of the three words; without figures, or without the error a rule needs, nothing is decided."""
    if figures is None or not math.isfinite(figures.change):
        return NOT_TESTABLE
    if rule.by_error and (
        figures.error is None or not math.isfinite(figures.error)
    ):
        return NOT_TESTABLE
    return HELD if rule.holds(figures) else NOT_HELD


def _error(figures: Figures) -> float:
    return math.nan if figures.error is None else figures.error


# --- figures -------------------------------------------------------------------------------------


def paired(
    ours: Sequence[float], base: Sequence[float], digits: int = 2
) -> Figures:
    """Runs of the same seeds, in the same order: the mean difference and its standard error."""
    difference = np.asarray(ours, np.float64) - np.asarray(base, np.float64)
    n = len(difference)
    error = seeds.standard_error(difference) if n > 1 else math.nan
    return Figures(
        spread(ours, digits),
        spread(base, digits),
        float(difference.mean()),
        error,
        n,
    )


def ratio(
    ours: float, base: float, text: str = "{:.4g}", n: int = 1
) -> Figures:
    """Two numbers."""
    return Figures(text.format(ours), text.format(base), ours / base, None, n)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean +- sample standard deviation."""
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f}"
    return (
        f"{np.mean(values):.{digits}f} +- {seeds.deviation(values):.{digits}f}"
    )


# --- recorded results ----------------------------------------------------------------------------


@functools.cache
def recorded(name: str) -> Any:
    """A results file: JSON as it is, Markdown as its tables, {first header: (headers, rows)}."""
    text = (RESULTS / name).read_text()
    return json.loads(text) if name.endswith(".json") else tables(text)


def tables(text: str) -> dict[str, tuple[list[str], list[list[str]]]]:
    """All Markdown tables of a text; of several with the same first header the n-th gets " #n"."""
    found: dict[str, tuple[list[str], list[list[str]]]] = {}
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        headers, _, *rows = (
            [c.strip() for c in line[1:-1].split("|")]
            for line in block.split("\n")
            if line
        )
        count = sum(key.split(" #")[0] == headers[0] for key in found)
        found[headers[0] + (f" #{count + 1}" if count else "")] = (
            headers,
            rows,
        )
    return found


def cells(name: str, table: str, column: str, *labels: str) -> str:
    """The cell of a recorded Markdown table in the row that begins with the labels."""
    headers, rows = recorded(name)[table]
    (row,) = (r for r in rows if tuple(r[: len(labels)]) == labels)
    return row[headers.index(column)]


def number(name: str, table: str, column: str, *labels: str) -> float:
    """The same as a number; of "a +- b" the first."""
    return float(cells(name, table, column, *labels).split()[0])


def quotient(
    name: str, table: str, column: str, ours: str, base: str, n: int = 1
) -> Figures:
    """Two rows of one column."""
    return ratio(
        *(number(name, table, column, label) for label in (ours, base)), n=n
    )


def networks(
    experiment: str, ours: str, base: str, figure: str = "test"
) -> Figures:
    """Two arms of `networks`: "test" in percent, or "reached" in steps.

    A run that never reaches the target counts as if it had in its last step.
    """
    rows = recorded("networks.json")["experiments"][experiment]
    if figure == "test":
        return paired(
            *(
                [100 * r["test"] for r in rows[key]["runs"]]
                for key in (ours, base)
            )
        )
    found = paired(
        *(
            [r["reached"] or rows[k]["steps"] for r in rows[k]["runs"]]
            for k in (ours, base)
        ),
        0,
    )
    missed = [
        sum(not r["reached"] for r in rows[key]["runs"]) for key in (ours, base)
    ]
    texts = (
        t + f" ({m} never)" * bool(m)
        for t, m in zip(found[:2], missed, strict=True)
    )
    return Figures(*texts, *found[2:])


def best(experiment: str, ours: str, base: str) -> Figures:
    """Test accuracy of arms `ours RATE` and `base RATE`, each at its best rate on the validation images."""
    rows = recorded("networks.json")["experiments"][experiment]

    def chosen(kind: str) -> str:
        mine = [key for key in rows if key.split()[0] == kind]
        return max(
            mine,
            key=lambda k: np.mean([r["validation"] for r in rows[k]["runs"]]),
        )

    return networks(experiment, chosen(ours), chosen(base))


def stable(experiment: str, ours: str, base: str) -> Figures:
    """The largest rate at which no run diverges."""
    rows = recorded("networks.json")["experiments"][experiment]

    def largest(kind: str) -> float:
        mine = [row for key, row in rows.items() if key.split()[0] == kind]
        return max(
            row["rate"]
            for row in mine
            if not any(r["diverged"] for r in row["runs"])
        )

    return ratio(
        largest(ours), largest(base), n=len(next(iter(rows.values()))["runs"])
    )


def fused(experiment: str, arm: str) -> Figures:
    """The largest difference of a logit after fusing, to the largest logit."""
    runs = recorded("networks.json")["experiments"][experiment][arm]["runs"]
    return ratio(
        max(r["difference"] for r in runs),
        max(r["largest"] for r in runs),
        n=len(runs),
    )


def echoed(ours: str, base: str) -> Figures:
    """Test accuracy of two arms of `echo_quality`, percent."""
    rows = recorded("echo_quality.json")["rows"]
    return paired(
        *([100 * r["test"] for r in rows[key]] for key in (ours, base))
    )


def sped_up() -> Figures:
    """The least speed-up, as a share of min(factor, R), where reading is slower than the step."""
    headers, rows = recorded("echo_speed.md")["R"]
    at = [headers.index(name) for name in ("speed-up", "bound")]
    found = [
        [float(row[i]) for i in at]
        for row in rows
        if float(row[0]) > 1.2 and row[1] != "auto"
    ]
    return ratio(*min(found, key=lambda pair: pair[0] / pair[1]), n=3)


def optimizer(ours: str) -> Figures:
    """Validation loss beside AdamW's, nats."""
    rows = recorded("memopt_training.json")["training"]["rows"]
    ours_, base = (rows[key]["validation"] for key in (ours, "adamw"))
    text = [f"{x['mean']:.3f} +- {x['std']:.3f}" for x in (ours_, base)]
    return Figures(*text, ours_["mean"] / base["mean"], None, rows[ours]["n"])


def cast(task: str, arm: str) -> Figures:
    """Training loss beside float32's; the ratio is the mean of the seeds'."""
    name = "amp_training.md"
    ours, base = (
        cells(name, task, "training loss", key) for key in (arm, "float32")
    )
    return Figures(ours, base, number(name, task, "mean", arm), None, 3)


def tail(
    method: str, column: str = "balanced %", change: str = "to cross entropy"
) -> Figures:
    """A method of the long-tail bench beside cross entropy, in points."""
    name, table = "longtail_methods.md", "method"
    ours, base = (
        cells(name, table, column, key) for key in (method, "cross_entropy")
    )
    difference, _, error = cells(name, table, change, method).split()
    n = int(cells(name, table, "n", method))
    return Figures(ours, base, float(difference), float(error), n)


def flops(model: str, way: str) -> Figures:
    """FLOPs of a step with recomputation, as a ratio to one without."""
    extra = cells("remat_plan.md", model, "extra FLOPs", way)
    return Figures(extra, "+0.0%", 1 + float(extra.strip("+%")) / 100, None, 1)


def made(name: str) -> tuple[str, str]:
    """(command, hardware and versions) that a results file names."""
    if name.endswith(".json"):
        about = recorded(name)
        about = about.get("about") or about["training"]
        return about["command"], report.machine_line(
            about["hardware"], about["versions"]
        )
    text = (RESULTS / name).read_text()
    command = re.findall(r"`((?:python|jaxtricks) [^`]*)`", text)[0]
    line = next(x for x in text.split("\n") if re.search(r"cores|libtpu \d", x))
    if line.startswith("{"):
        return command, report.machine_line(
            *map(ast.literal_eval, line.split("; "))
        )
    return command, line.split("; `")[0].rstrip(".")
