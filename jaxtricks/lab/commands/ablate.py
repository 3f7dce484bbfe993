"""Ablate: baseline, each trick alone, all, all but one, and the best subset that a search finds."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from jaxtricks import _table, _tree
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import plots, rundir, trainer
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import KEYS, Ablate, Train, Tricks
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.report import counted, hardware
from jaxtricks.lab.rundir import RunDir, can_begin
from jaxtricks.lab.trainer import Evaluator

RESULTS, REPORT, PICTURE = "results.json", "report.md", "ablation.png"
_HELD_OUT = 0.1  # of the training images, for the search
# Interleaved timing rounds; the median of each row's steps is reported.
_ROUNDS = 15
_COSTS = {
    "step_ms": "step time",
    "temp_bytes": "temporaries",
    "state_bytes": "state",
    "reads": "reads",
}
_NOTABLE = {
    "step_ms": 0.15,
    "temp_bytes": 0.05,
    "state_bytes": 0.05,
    "reads": 0.05,
}
# Of a row before its step is timed.
_FIELDS: dict[str, Any] = {
    "key": str,
    "tricks": list[str],
    **dict.fromkeys(("metric", "std", "validation", "reads"), float),
    **dict.fromkeys(("n", "temp_bytes", "state_bytes"), int),
}

Subset = tuple[str, ...]
Row = dict[str, Any]


def main(cfg: Ablate, command: str) -> None:
    """Run the comparison and draw it: what the command line calls."""
    rows = run(cfg, command)
    plots.save(plots.ablation(rows), pathlib.Path(cfg.out) / PICTURE)


def run(cfg: Ablate, command: str = "") -> list[Row]:
    """Run the comparison, print the table, write results.json and report.md.

    Args:
      cfg: checked settings.
      command: the command line, for the report.

    Returns:
      The rows of results.json.

    Raises:
      UserError: something that the user can mend.
      KeyboardInterrupt: Ctrl-C, after the report of the finished rows was written.
    """
    console = Console()
    say = functools.partial(
        console.print, highlight=False, markup=False, soft_wrap=True
    )
    can_begin(cfg.out, resume=cfg.resume)
    train.refuse_text(cfg.data, cfg.root)
    data = [_load(cfg, seed) for seed in range(cfg.seeds)]
    about = rundir.describe(cfg, command, data[0])
    with RunDir(cfg.out, about, resume=cfg.resume) as folder:
        if folder.note:
            say(folder.note)
        ablation = Ablation(cfg, data, folder, console)
        try:
            ablation.train_all()
            ablation.time_steps()
        except KeyboardInterrupt:
            rows = annotate(ablation.rows())
            write(folder, rows, [], data[0], cfg, command, complete=False)
            say(
                f"stopped after {counted(len(rows), 'row')}: go on with --resume"
            )
            say(f"report: {folder.path / REPORT}")
            raise
        rows = annotate(ablation.rows())
        write(folder, rows, ablation.trials, data[0], cfg, command)
    say(for_terminal(rows))
    say(f"report: {folder.path / REPORT}")
    return rows


def _load(cfg: Ablate, seed: int) -> data_lib.Data:
    return data_lib.load(
        cfg.data,
        root=cfg.root,
        imbalance=cfg.imbalance,
        seed=seed,
        size=cfg.size,
        validation=_HELD_OUT,
    )


def arrangements(keys: tuple[str, ...]) -> Iterator[tuple[str, Tricks]]:
    """Yield (name of the row, its tricks)."""
    yield "baseline", Tricks()
    for key in keys:
        yield key, Tricks.of(key)
    if len(keys) > 1:
        yield "all", Tricks.of(*keys)
        for key in keys:
            yield f"all - {key}", Tricks.of(*(k for k in keys if k != key))


# Training.


class Compiled(NamedTuple):
    """A compiled arrangement, ready for every seed.

    Attributes:
      tricks: which tricks are on.
      step: what initializes, evaluates and compiles.
      executable: the compiled step; it donates its state.
      batch: a batch of the right shape, to time the step with.
      temp_bytes: temporaries of the compiled step.
    """

    tricks: Tricks
    step: step_lib.TrainStep
    executable: Callable[..., Any]
    batch: Any
    temp_bytes: int


class Trained(NamedTuple):
    """A row of the table, and what its timing needs.

    Attributes:
      row: key, tricks, metric, std, n, validation, by_seed, temp_bytes, state_bytes,
        reads.
      compiled: its arrangement.
      state: to time the step with.
    """

    row: Row
    compiled: Compiled
    state: step_lib.TrainState


class Ablation:
    """A comparison under way.

    Args:
      cfg: the settings.
      data: the data set of each seed.
      folder: where rows are written as they are done.
      console: where they are printed.

    Attributes:
      trained: the rows so far, in the order of the table.
      best: what the search chose; None before, or without a search.
      trials: of the search.
    """

    def __init__(
        self,
        cfg: Ablate,
        data: list[data_lib.Data],
        folder: RunDir,
        console: Console,
    ):
        self.trained: list[Trained] = []
        self.best: Trained | None = None
        self.trials: list[Trial] = []
        self._cfg, self._data, self._folder, self._console = (
            cfg,
            data,
            folder,
            console,
        )
        self._evaluators: dict[Any, Evaluator] = {}

    def rows(self) -> list[Row]:
        """Return the rows of the table; "best" is the last."""
        rows = [entry.row for entry in self.trained]
        # An arrangement that won has its row under its own name too.
        if self.best and self.best.row["key"] != "best":
            rows.append({**self.best.row, "key": "best"})
        return rows

    def train_all(self) -> None:
        """Train every arrangement that is not finished, then search."""
        cfg, plan = self._cfg, list(arrangements(self._cfg.tricks))
        rows_before = finished(cfg, self._folder)
        with contextlib.ExitStack() as stack:
            compiler = ThreadPoolExecutor(1)
            # Whoever stops it need not wait for the next arrangement's compilation.
            stack.callback(compiler.shutdown, wait=False, cancel_futures=True)
            progress = stack.enter_context(_progress(self._console))
            # XLA compiles the next arrangement while this one trains; times are taken
            # at the end, alone.
            futures = [
                compiler.submit(compile_row, cfg, on, self._data[0])
                for _, on in plan
            ]
            task = progress.add_task("", total=len(plan))
            for (key, _), future in zip(plan, futures, strict=True):
                progress.update(task, description=f"{key:<16}")
                self._add(key, future.result(), rows_before)
                progress.advance(task)
                accuracy = 100 * self.trained[-1].row["metric"]
                self._print(
                    f"{len(self.trained)}/{len(plan)} {key:<16} {accuracy:.1f} %"
                )
            if cfg.search and len(cfg.tricks) > 1:
                total = len(plan) + len(cfg.tricks) - 1
                progress.update(task, description="search", total=total)
                self._search(lambda: progress.advance(task))

    def time_steps(self) -> None:
        """Time the steps of all rows."""
        for entry, milliseconds in zip(
            self.trained, interleaved_times(self.trained), strict=True
        ):
            entry.row["step_ms"] = milliseconds

    def _add(
        self, key: str, compiled: Compiled, rows_before: dict[str, Row]
    ) -> None:
        if key in rows_before:
            state = compiled.step.start(0, self._data[0].counts)
            entry = Trained(rows_before[key], compiled, state)
        else:
            entry = train_row(
                key, self._cfg, compiled, self._data, self._evaluators
            )
        self.trained.append(entry)
        self._folder.write(RESULTS, [entry.row for entry in self.trained])

    def _search(self, advance: Callable[[], None]) -> None:
        """Search the best subset by validation scores; what has been measured is not run again."""
        cfg = self._cfg
        by_tricks = {
            tuple(entry.row["tricks"]): entry for entry in self.trained
        }

        def measure(subset: Subset) -> list[float]:
            if subset not in by_tricks:
                compiled = compile_row(cfg, Tricks.of(*subset), self._data[0])
                entry = train_row(
                    "best", cfg, compiled, self._data, self._evaluators
                )
                by_tricks[subset] = entry
            if len(subset) > 1:
                advance()
                self._print(f"search {joined(subset)}")
            return by_tricks[subset].row["by_seed"]["validation"]

        best, self.trials = search(
            [k for k in KEYS if k in cfg.tricks], measure
        )
        self.best = by_tricks[best]
        if self.best.row["key"] == "best":  # not one of the arrangements
            self.trained.append(self.best)

    def _print(self, line: str) -> None:
        if not self._console.is_terminal:  # which shows a bar
            self._console.print(line, highlight=False)


def finished(cfg: Ablate, folder: RunDir) -> dict[str, Row]:
    """Return key -> row, of the rows that an interrupted comparison of the same settings has finished."""
    if not folder.resumed:
        return {}
    try:
        rows = rundir.parse((folder.path / RESULTS).read_bytes())
    except (OSError, ValueError):  # stopped before its first row, or damaged
        return {}
    by_seed = rundir.schema(
        "BySeed", dict.fromkeys(("test", "validation"), list[float])
    )
    fields = {**_FIELDS, "by_seed": by_seed}
    row_schema = rundir.schema("Row", fields)
    expected = {
        key: list(tricks.on) for key, tricks in arrangements(cfg.tricks)
    }
    by_key = {}
    for row in rows if isinstance(rows, list) else ():
        if rundir.misfit(row, row_schema) or any(
            row.get(name) is None for name in fields
        ):
            continue
        scores = row["by_seed"].get("validation") or ()
        if (
            expected.get(row["key"]) == row["tricks"]
            and len(scores) == cfg.seeds
        ):
            by_key[row["key"]] = {name: row[name] for name in fields}
    return by_key


def compile_row(cfg: Ablate, tricks: Tricks, data: data_lib.Data) -> Compiled:
    """Compose and compile one arrangement."""
    step = step_lib.TrainStep(cfg.train(tricks, 0), data)
    batch = step.example_batch()
    executable, temp_bytes = step.compile(step.start(0, data.counts), batch)
    return Compiled(tricks, step, executable, batch, temp_bytes)


def train_row(
    key: str,
    cfg: Ablate,
    compiled: Compiled,
    data: list[data_lib.Data],
    evaluators: dict[Any, Evaluator],
) -> Trained:
    """Train one arrangement over all seeds with one executable, and evaluate it."""
    # Arrangements that evaluate the same function share its executable.
    function = step_lib.function_key(compiled.tricks)
    if function not in evaluators:
        evaluators[function] = Evaluator(compiled.step, data[0], cfg.batch)
    evaluate = evaluators[function]
    seeds = [
        _train_seed(seed, cfg, compiled, data[seed], evaluate)
        for seed in range(len(data))
    ]
    test_scores = [scores["test"] for scores, _, _ in seeds]
    validation_scores = [scores["validation"] for scores, _, _ in seeds]
    reads = [nbytes / cfg.steps for _, nbytes, _ in seeds]
    _, _, state = seeds[-1]
    row = {
        "key": key,
        "tricks": list(compiled.tricks.on),
        "metric": float(np.mean(test_scores)),
        "std": deviation(test_scores),
        "n": len(test_scores),
        "validation": float(np.mean(validation_scores)),
        "by_seed": {"test": test_scores, "validation": validation_scores},
        "temp_bytes": compiled.temp_bytes,
        "state_bytes": _tree.nbytes(state.opt_state),
        "reads": float(np.mean(reads)),
    }
    return Trained(row, compiled, state)


def _train_seed(
    seed: int,
    cfg: Ablate,
    compiled: Compiled,
    data: data_lib.Data,
    evaluate: Evaluator,
) -> tuple[dict[str, float], int, step_lib.TrainState]:
    """Train one seed; return the scores by split, the bytes read and the state."""
    run_cfg = cfg.train(compiled.tricks, seed)
    # A copy, whose counter of bytes is of this run alone.
    source = data.train.subset(np.arange(len(data.train)))
    batches = _batches(run_cfg, source, compiled.step.placement)
    state = compiled.step.start(seed, data.counts)
    state = trainer.fit(compiled.executable, state, batches, cfg.steps)
    scores = {}
    for name, split in data.splits():
        if name != "train":
            scores[name] = evaluate(state, split)["balanced_accuracy"]
    return scores, source.bytes_read, state


def interleaved_times(trained: list[Trained]) -> list[float]:
    """Return the median step time of each row in ms; all rows in turn, so that drift hits them alike."""
    states = [entry.state for entry in trained]
    times: list[list[float]] = [[] for _ in trained]
    for _ in range(_ROUNDS):
        for i, entry in enumerate(trained):
            elapsed = 0.0
            # The first step finds the caches full of the row before.
            for _ in range(2):
                start = time.perf_counter()
                states[i], metrics = entry.compiled.executable(
                    states[i], entry.compiled.batch
                )
                jax.block_until_ready((states[i].params, metrics))
                elapsed = time.perf_counter() - start
            times[i].append(1e3 * elapsed)
    return [float(np.median(t)) for t in times]


def _batches(
    cfg: Train, source: data_lib.Source, placement: Placement
) -> Iterator[Any]:
    # No prefetch thread: what is read is then exactly what the steps used.
    echo = step_lib.build_echo(cfg, cfg.batch)
    batches = data_lib.pipeline(
        source, batch=cfg.batch, seed=cfg.seed, transform=echo
    )
    return map(placement.put, batches)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


# The greedy search for the best subset.


class Trial(NamedTuple):
    """One trick offered to the best subset so far.

    Attributes:
      subset: the tricks that are on, the offered one among them.
      offered: its key.
      gain: mean over the seeds of the score's difference, paired by seed.
      error: standard error of that mean; 0 with one seed.
      accepted: whether the gain exceeds the error.
      n: seeds.
    """

    subset: Subset
    offered: str
    gain: float
    error: float
    accepted: bool
    n: int


def search(
    keys: Sequence[str], measure: Callable[[Subset], Sequence[float]]
) -> tuple[Subset, list[Trial]]:
    """Offer every trick once, the best alone first; accept it where it helps beyond the seeds' spread.

    Linear in the number of tricks, and blind to two that help only together.

    Args:
      keys: the tricks, in the order in which a subset names them.
      measure: subset -> a score for each seed, higher is better; on images of no other
        use.

    Returns:
      The best subset, and every trial in order.
    """
    alone = {key: float(np.mean(measure((key,)))) for key in keys}
    best, scores, trials = (), np.asarray(measure(())), []
    for key in sorted(keys, key=alone.__getitem__, reverse=True):
        subset = tuple(k for k in keys if k in (*best, key))
        new_scores = np.asarray(measure(subset))
        differences = new_scores - scores
        gain, error = float(np.mean(differences)), standard_error(differences)
        trials.append(
            Trial(subset, key, gain, error, gain > error, len(differences))
        )
        if trials[-1].accepted:
            best, scores = subset, new_scores
    return best, trials


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Return the sample standard deviation; one repetition has none: 0."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard error of the mean."""
    return deviation(values) / len(values) ** 0.5


def spell(spread: float, n: int) -> str:
    """Write a deviation or an error of n repetitions; "-" of one, which has none."""
    return f"{spread:.1f}" if n > 1 else "-"


# The report.


def annotate(rows: list[Row]) -> list[Row]:
    """Add to each row a "note": what the trick changed here, in one clause, from the figures alone.

    A trick alone is compared with the baseline, "all - x" with all. A difference in
    accuracy counts if it exceeds the two rows' standard deviations added in quadrature.
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
            row["note"] = f"{joined(row['tricks'])}: {row['note']}"
    return rows


def joined(subset: Sequence[str]) -> str:
    """Name the tricks of a subset."""
    return " + ".join(subset) or "none of the tricks"


def verdict(row: Row, reference: Row) -> str:
    """Return one clause: the change in accuracy, and the costs that changed notably."""
    points = 100 * (row["metric"] - reference["metric"])
    spread = 100 * (row["std"] ** 2 + reference["std"] ** 2) ** 0.5
    if row["n"] < 2:
        accuracy = f"{points:+.1f} points, one seed"
    elif abs(points) > spread:
        accuracy = f"{points:+.1f} points"
    else:
        accuracy = (
            f"no difference beyond the seeds' spread ({points:+.1f} points)"
        )
    clauses = [accuracy, *_changes(row, reference)]
    if points <= spread and row["key"] in step_lib.PURPOSE:
        clauses.append(
            f"does not help accuracy here; {step_lib.PURPOSE[row['key']]}"
        )
    return "; ".join(clauses)


def _changes(row: Row, reference: Row) -> list[str]:
    clauses = []
    for name, label in _COSTS.items():
        if name not in row or not reference.get(name):
            continue
        change = row[name] / reference[name] - 1
        # No change of figures that look the same in the table.
        if abs(change) >= _NOTABLE[name] and _cost(row, name) != _cost(
            reference, name
        ):
            clauses.append(f"{label} {100 * change:+.0f} %")
    return clauses


def _cost(row: Row, name: str) -> str:
    """Write a cost as in the table."""
    unit = 1024 if name.endswith("_bytes") else 1
    digits = 0 if name in ("temp_bytes", "reads") else 1
    return f"{row[name] / unit:.{digits}f}" if name in row else "-"


def table(rows: list[Row]) -> _table.Table:
    """Make the table of the rows."""
    costs = ("step ms", "temp KiB", "state KiB", "read B/step")
    headers = ("tricks", "bal. acc. %", "std", *costs, "note")
    body = []
    for row in rows:
        std = spell(100 * row["std"], row["n"])
        costs = [_cost(row, name) for name in _COSTS]
        body.append(
            (row["key"], f"{100 * row['metric']:.1f}", std, *costs, row["note"])
        )
    return _table.make(headers, body)


def for_terminal(rows: list[Row]) -> str:
    """Write the figures as a table of 80 columns, the notes below it."""
    headers, body, _ = table(rows)
    figures = _table.make(headers[:-1], [row[:-1] for row in body])
    notes = _table.make(
        ("tricks", "what changed here"), [(row[0], row[-1]) for row in body]
    )
    return f"{figures}\n\n{notes}"


def write(
    folder: RunDir,
    rows: list[Row],
    trials: list[Trial],
    data: data_lib.Data,
    cfg: Ablate,
    command: str,
    *,
    complete: bool = True,
) -> None:
    """Write results.json and report.md; that of all rows shows PICTURE, which `main` draws."""
    folder.write(RESULTS, rows)
    counts = ", ".join(
        str(int((data.train.labels == c).sum()))
        for c in range(len(data.classes))
    )
    stopped, picture = "", f"![Balanced accuracy against cost]({PICTURE})"
    if not complete:
        stopped = (
            "**Not finished:** it was stopped after "
            f"{counted(len(rows), 'row')}, before any step was "
            "timed; the same command with --resume goes on.\n\n"
        )
        picture = ""
    text = f"""# What each trick costs and gains on {data.name}

Command: `{command or "jaxtricks ablate"}`

{stopped}{len(data.train)} training images ({counts} by class), {len(data.test)} test \
images, {cfg.steps} steps of {cfg.batch}, {counted(cfg.seeds, "seed")}. {hardware()}.

{table(rows).markdown()}

- bal. acc.: mean over the classes of the test accuracy, and its standard deviation, over the seeds
  (a seed changes the split, the images of the long tail, the order, the weights and the augmentation).
- step: median of single steps, all rows in turn in one process. Compare rows, not machines.
- temp: bytes of temporaries in the compiled step, from XLA's buffer assignment; exact.
- state: bytes of the optimizer state; exact.
- read: bytes read from the data set per step, measured.

{picture}
{search_section(trials)}"""
    folder.write_text(REPORT, text)


def search_section(trials: list[Trial]) -> str:
    """Write the section on the search; nothing where there was none."""
    if not trials:
        return ""
    body = []
    for trial in trials:
        gain = f"{100 * trial.gain:+.1f} +- {spell(100 * trial.error, trial.n)}"
        body.append(
            (
                joined(trial.subset),
                gain,
                trial.offered if trial.accepted else "",
            )
        )
    return f"""
## The best subset that a greedy search finds

Each trick is offered once, the best alone first, and accepted where it raises the balanced accuracy of the
validation split by more than the standard error over the seeds (differences paired by seed). The table above
has the winner's test accuracy, which the search never used. It is blind to tricks that help only together,
and what it accepts is no surer than the standard errors say.

{_table.make(("tried", "points, validation", "accepted"), body).markdown()}
"""
