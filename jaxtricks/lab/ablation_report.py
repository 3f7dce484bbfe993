"""What an ablation says: verdicts, the table, report.md and results.json."""

from collections.abc import Sequence
from typing import Any

from jaxtricks import _table
from jaxtricks.lab import about, greedy, spread
from jaxtricks.lab import compose as compose_lib
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.config import Ablate
from jaxtricks.lab.rundir import RunDir

PICTURE, REPORT = "ablation.png", "report.md"
_COSTS = {
    "step_ms": "step time",
    "temp_bytes": "temporaries",
    "state_bytes": "state",
    "reads": "reads",
}
_NOTABLE = {"step_ms": 0.15, "temp_bytes": 0.05, "state_bytes": 0.05, "reads": 0.05}


def annotate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row a "note": what the trick changed here, in one clause, from the figures alone.

    A trick alone is compared with the baseline, "all - x" with all. A difference in accuracy counts if
    it exceeds the two rows' standard deviations added in quadrature.
    """
    by_key = {row["key"]: row for row in rows}
    for row in rows:
        key = row["key"]
        if key == "baseline":
            row["note"] = "none of the tricks"
            continue
        reference = by_key["all" if key.startswith("all - ") else "baseline"]
        row["note"] = verdict(row, reference)
        if key == "best":
            row["note"] = f"{named(row['tricks'])}: {row['note']}"
    return rows


def named(subset: Sequence[str]) -> str:
    """The tricks of a subset in words."""
    return " + ".join(subset) or "none of the tricks"


def verdict(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """One clause: the change in accuracy, and the costs that changed notably."""
    points = 100 * (row["metric"] - reference["metric"])
    spread = 100 * (row["std"] ** 2 + reference["std"] ** 2) ** 0.5
    if row["n"] < 2:
        accuracy = f"{points:+.1f} points, one seed"
    elif abs(points) > spread:
        accuracy = f"{points:+.1f} points"
    else:
        accuracy = f"no difference beyond the seeds' spread ({points:+.1f} points)"
    clauses = [accuracy, *_changes(row, reference)]
    if points <= spread and row["key"] in compose_lib.PURPOSE:
        clauses.append(f"does not help accuracy here; {compose_lib.PURPOSE[row['key']]}")
    return "; ".join(clauses)


def table(rows: list[dict[str, Any]]) -> _table.Table:
    """The rows as people read them."""
    headers = (
        "tricks",
        "bal. acc. %",
        "std",
        "step ms",
        "temp KiB",
        "state KiB",
        "read B/step",
        "note",
    )
    body = [
        (
            row["key"],
            f"{100 * row['metric']:.1f}",
            spread.spell(100 * row["std"], row["n"]),
            *(_shown(row, name) for name in _COSTS),
            row["note"],
        )
        for row in rows
    ]
    return _table.make(headers, body)


def for_terminal(rows: list[dict[str, Any]]) -> str:
    """The figures as a table of 80 columns, the notes below it."""
    headers, body, _ = table(rows)
    figures = _table.make(headers[:-1], [row[:-1] for row in body])
    notes = _table.make(("tricks", "what changed here"), [(row[0], row[-1]) for row in body])
    return f"{figures}\n\n{notes}"


def write(
    folder: RunDir,
    rows: list[dict[str, Any]],
    trials: list[greedy.Trial],
    data: data_lib.Data,
    cfg: Ablate,
    command: str,
    *,
    complete: bool = True,
) -> None:
    """results.json and report.md; that of all rows shows PICTURE, drawn by the command line."""
    folder.write("results.json", rows)
    text = markdown(rows, trials, data, cfg, command, complete=complete)
    folder.write_text(REPORT, text)


def markdown(
    rows: list[dict[str, Any]],
    trials: list[greedy.Trial],
    data: data_lib.Data,
    cfg: Ablate,
    command: str,
    *,
    complete: bool = True,
) -> str:
    """The report."""
    counts = ", ".join(str(int((data.train.labels == c).sum())) for c in range(len(data.classes)))
    stopped = (
        f"**Not finished:** it was stopped after {counted(len(rows), 'row')}, before any step was timed; the "
        "same command with --resume goes on.\n\n"
    )
    return f"""# What each trick costs and gains on {data.name}

Command: `{command or "jaxtricks ablate"}`

{"" if complete else stopped}{len(data.train)} training images ({counts} by class), {len(data.test)} test \
images, {cfg.steps} steps of {cfg.batch}, {counted(cfg.seeds, "seed")}. {hardware()}.

{table(rows).markdown()}

- bal. acc.: mean over the classes of the test accuracy, and its standard deviation, over the seeds
  (a seed changes the split, the kept images, the order, the weights and the augmentation).
- step: median of single steps, all rows in turn in one process. Compare rows, not machines.
- temp: bytes of temporaries in the compiled step, from XLA's buffer assignment; exact.
- state: bytes of the optimizer state; exact.
- read: bytes read from the data set a step, measured.

{f"![Balanced accuracy against cost]({PICTURE})" if complete else ""}
{searched(trials)}"""


def counted(number: int, noun: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def searched(trials: list[greedy.Trial]) -> str:
    """The section on the search; nothing where there was none."""
    if not trials:
        return ""
    body = [
        (
            named(trial.subset),
            f"{100 * trial.gain:+.1f} +- {spread.spell(100 * trial.error, trial.n)}",
            trial.offered if trial.kept else "",
        )
        for trial in trials
    ]
    return f"""
## The best subset that a greedy search finds

Each trick is offered once, the best alone first, and kept where it raises the balanced accuracy of the
validation split by more than the standard error over the seeds (differences paired by seed). The table above
has the winner's test accuracy, which the search never saw. It is blind to tricks that help only together,
and what it keeps is no better known than the standard errors say.

{_table.make(("tried", "points, validation", "kept"), body).markdown()}
"""


def hardware() -> str:
    """This machine and its versions in one line."""
    return machine_line(about.hardware(), about.versions())


def machine_line(machine: dict[str, Any], have: dict[str, str]) -> str:
    """What `about.hardware` and `about.versions` gave, in one line."""
    packages = ", ".join(f"{name} {have[name]}" for name in ("jax", "flax", "optax", "numpy"))
    return (
        f"{machine['kind']}, {machine['cores']} cores, {machine['machine']}, "
        f"Python {have['python']}, {packages}"
    )


def _shown(row: dict[str, Any], name: str) -> str:
    """A cost as the table has it."""
    unit = 1024 if name.endswith("_bytes") else 1
    digits = 0 if name in ("temp_bytes", "reads") else 1
    return f"{row[name] / unit:.{digits}f}" if name in row else "-"


def _changes(row: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    clauses = []
    for name, label in _COSTS.items():
        change = row[name] / reference[name] - 1 if name in row and reference.get(name) else 0.0
        # No change of figures that look the same in the table.
        if abs(change) >= _NOTABLE[name] and _shown(row, name) != _shown(reference, name):
            clauses.append(f"{label} {100 * change:+.0f} %")
    return clauses
