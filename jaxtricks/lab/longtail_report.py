"""What `longtail-bench` says: a table of methods, and report.md."""

from typing import Any

import numpy as np

from jaxtricks import _table
from jaxtricks.lab import spread
from jaxtricks.lab.ablation_report import REPORT, counted, hardware
from jaxtricks.lab.longtail_config import LongtailBench
from jaxtricks.lab.rundir import RunDir

BASE = "cross_entropy"
FIGURES = ("balanced_accuracy", "many", "medium", "few")


def table(rows: list[dict[str, Any]]) -> _table.Table:
    """Means and sample deviations over the seeds; the difference to cross entropy is paired by seed."""
    base = {row["seed"]: row for row in rows if row["method"] == BASE}
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        cells = [_spread([100 * row[key] for row in mine]) for key in FIGURES]
        gains = [
            [100 * (r[key] - base[r["seed"]][key]) for r in mine]
            for key in ("balanced_accuracy", "few")
        ]
        lines.append(
            (name, len(mine), *cells, *("-" if name == BASE else _error(g) for g in gains))
        )
    headers = (
        "method",
        "n",
        "balanced %",
        "many",
        "medium",
        "few",
        "change",
        "change, few",
    )
    return _table.make(headers, lines)


def write(
    folder: RunDir, rows: list[dict[str, Any]], data: Any, cfg: LongtailBench, command: str
) -> None:
    """report.md."""
    counts = ", ".join(str(int(n)) for n in data.counts)
    height, width, _ = data.shape
    layers = 2 * len(cfg.widths) * cfg.blocks + 2
    lines = [
        f"# Long-tail methods on {data.name}",
        f"`{command}`" if command else "",
        f"{len(data.train)} images of {len(data.classes)} classes ({counts}) to train on, "
        f"{len(data.test)} to test on, {height} x {width}; ResNet of {layers} layers, widths "
        f"{cfg.widths}; {cfg.steps} steps of {cfg.batch}, SGD with Nesterov momentum 0.9, rate "
        f"{cfg.rate} for all methods, weight decay 5e-4, cosine. Many, medium and few are thirds of the "
        f"classes. {counted(cfg.seeds, 'seed')}: mean +- sample standard deviation. Changes are those "
        "from cross entropy, paired by seed, mean +- standard error.",
        table(rows).markdown(),
        f"{hardware()}.",
    ]
    folder.write_text(REPORT, "\n\n".join(line for line in lines if line) + "\n")


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} +- {spread.spell(spread.deviation(values), len(values))}"


def _error(values: list[float]) -> str:
    mean = round(float(np.mean(values)), 1) + 0.0  # no -0.0
    return f"{mean:+.1f} +- {spread.spell(spread.error(values), len(values))}"
