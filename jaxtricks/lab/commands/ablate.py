"""How far repetitions over seeds differ; one repetition has no spread: 0."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtricks import _table, _tree
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import rundir, trainer
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import KEYS, Ablate, Train, Tricks
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.rundir import RunDir, can_begin
from jaxtricks.lab.trainer import Evaluator


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Sample standard deviation."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean."""
    return deviation(values) / len(values) ** 0.5


def spell(spread: float, n: int) -> str:
    """A deviation or an error of n repetitions; "-" of one, which has none."""
    return f"{spread:.1f}" if n > 1 else "-"


# --------------------------------------------------------------------------------------------------
# A greedy search for the best subset of tricks.
# --------------------------------------------------------------------------------------------------


Subset = tuple[str, ...]


class Trial(NamedTuple):
    """One trick offered to the subset found so far.

    Attributes:
      subset: the tricks that are on, the offered one among them.
      offered: its key.
      gain: mean over the seeds of the score's difference, paired by seed.
      error: standard error of that mean; 0 with one seed.
      kept: whether the gain exceeds the error.
      n: seeds.
    """

    subset: Subset
    offered: str
    gain: float
    error: float
    kept: bool
    n: int


def search(
    keys: Sequence[str], measure: Callable[[Subset], Sequence[float]]
) -> tuple[Subset, list[Trial]]:
    """Offer every trick once, the best alone first; keep it where it helps beyond the seeds' spread.

    Linear in the number of tricks, and blind to two that help only together.

    Args:
      keys: the tricks, in the order in which a subset names them.
      measure: subset -> a score for each seed, higher is better; on images that nothing else is said of.

    Returns:
      The subset that was kept, and every trial in order.
    """
    alone = {key: float(np.mean(measure((key,)))) for key in keys}
    best, scores, trials = (), np.asarray(measure(())), []
    for key in sorted(keys, key=alone.__getitem__, reverse=True):
        subset = tuple(k for k in keys if k in (*best, key))
        found = np.asarray(measure(subset))
        gain, error = float(np.mean(found - scores)), standard_error(found - scores)
        trials.append(Trial(subset, key, gain, error, gain > error, len(found)))
        if trials[-1].kept:
            best, scores = subset, found
    return best, trials


# --------------------------------------------------------------------------------------------------
# What an ablation says: verdicts, the table, report.md and results.json.
# --------------------------------------------------------------------------------------------------


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
    if points <= spread and row["key"] in step_lib.PURPOSE:
        clauses.append(f"does not help accuracy here; {step_lib.PURPOSE[row['key']]}")
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
            spell(100 * row["std"], row["n"]),
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
    trials: list[Trial],
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
    trials: list[Trial],
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


def searched(trials: list[Trial]) -> str:
    """The section on the search; nothing where there was none."""
    if not trials:
        return ""
    body = [
        (
            named(trial.subset),
            f"{100 * trial.gain:+.1f} +- {spell(100 * trial.error, trial.n)}",
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
    return machine_line(rundir.hardware(), rundir.versions())


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


# --------------------------------------------------------------------------------------------------
# The `ablate` command: baseline, each trick alone, all, all but one, and the best subset found.
# --------------------------------------------------------------------------------------------------


_HELD_OUT = 0.1  # of the training images, for the search
RESULTS = "results.json"
_ROW: dict[str, Any] = {
    "key": str,
    "tricks": list[str],
    **dict.fromkeys(("metric", "std", "validation", "reads"), float),
    **dict.fromkeys(("n", "temp_bytes", "state_bytes"), int),
    "by_seed": {"test": list[float], "validation": list[float]},
}
_ROUNDS = 15  # interleaved timing rounds; the median of each row's steps is reported


class Trained(NamedTuple):
    """A row of the table, and what its timing needs.

    Attributes:
      row: key, tricks, metric, std, n, validation, by_seed, temp_bytes, state_bytes, reads.
      validation: the metric of each seed on the validation split, which the search goes by.
      step: the compiled step; it donates its state.
      state, batch: arguments to time it with.
    """

    row: dict[str, Any]
    validation: list[float]
    step: Callable[..., Any]
    state: step_lib.TrainState
    batch: Any


def run(cfg: Ablate, command: str = "") -> list[dict[str, Any]]:
    """Run the comparison, print the table, write results.json and report.md.

    Args:
      cfg: checked settings.
      command: the command line, for the report.

    Returns:
      The rows of results.json.

    Raises:
      UserError: something that the person can mend.
      KeyboardInterrupt: Ctrl-C, after the report of the finished rows was written.
    """
    console = Console()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    can_begin(cfg.out, resume=cfg.resume)
    train.refuse_text(cfg.data, cfg.root)
    data = [
        data_lib.load(
            cfg.data,
            root=cfg.root,
            imbalance=cfg.imbalance,
            seed=seed,
            size=cfg.size,
            validation=_HELD_OUT,
        )
        for seed in range(cfg.seeds)
    ]
    with RunDir(cfg.out, rundir.of_run(cfg, command, data[0]), resume=cfg.resume) as folder:
        if folder.note:
            say(folder.note)
        trained: list[Trained] = []
        try:
            trials, best = _train(cfg, data, folder, console, trained)
            for entry, milliseconds in zip(trained, interleaved_times(trained), strict=True):
                entry.row["step_ms"] = milliseconds
        except KeyboardInterrupt:
            rows = annotate([entry.row for entry in trained])
            write(folder, rows, [], data[0], cfg, command, complete=False)
            say(f"stopped after {counted(len(rows), 'row')}: go on with --resume")
            say(f"report: {folder.path / REPORT}")
            raise
        rows = [entry.row for entry in trained]
        if best and best.row["key"] != "best":  # an arrangement of the plan won
            rows.append({**best.row, "key": "best"})
        rows = annotate(rows)
        write(folder, rows, trials, data[0], cfg, command)
    say(for_terminal(rows))
    say(f"report: {folder.path / REPORT}")
    return rows


def _train(
    cfg: Ablate,
    data: list[data_lib.Data],
    folder: RunDir,
    console: Console,
    trained: list[Trained],
) -> tuple[list[Trial], Trained | None]:
    """(the search's trials, what it found: None without a search); adds every row to `trained`."""
    plan = list(arrangements(cfg.tricks))
    evaluators: dict[Any, Evaluator] = {}
    trials, best, done = [], None, finished(cfg, folder)
    with contextlib.ExitStack() as stack:
        ahead = ThreadPoolExecutor(1)
        # Whoever stops it need not wait for the next arrangement's compilation.
        stack.callback(ahead.shutdown, wait=False, cancel_futures=True)
        progress = stack.enter_context(_progress(console))
        # XLA compiles the next arrangement while this one trains; times are taken at the end, alone.
        prepared = [ahead.submit(prepare, cfg, tricks, data[0]) for _, tricks in plan]
        task = progress.add_task("", total=len(plan))
        for (key, _), program in zip(plan, prepared, strict=True):
            progress.update(task, description=f"{key:<16}")
            if key in done:
                trained.append(ready(done[key], program.result(), data[0]))
            else:
                trained.append(train_row(key, cfg, program.result(), data, evaluators))
            folder.write(RESULTS, [entry.row for entry in trained])  # what is done is kept
            progress.advance(task)
            if not console.is_terminal:  # which shows a bar
                accuracy = 100 * trained[-1].row["metric"]
                console.print(
                    f"{len(trained)}/{len(plan)} {key:<16} {accuracy:.1f} %", highlight=False
                )
        if cfg.search and len(cfg.tricks) > 1:
            progress.update(task, description="search", total=len(plan) + len(cfg.tricks) - 1)

            def tried(subset: Subset) -> None:
                progress.advance(task)
                if not console.is_terminal:
                    console.print(f"search {named(subset)}", highlight=False)

            trials, best = _search(cfg, trained, data, evaluators, tried)
            if best.row["key"] == "best":  # no arrangement of the plan
                trained.append(best)
    return trials, best


def finished(cfg: Ablate, folder: RunDir) -> dict[str, dict[str, Any]]:
    """Key -> row, of the rows that an interrupted comparison of the same settings has finished."""
    if not folder.resumed:
        return {}
    try:
        rows = rundir.parse((folder.path / RESULTS).read_bytes())
    except (OSError, ValueError):  # stopped before its first row, or damaged
        return {}
    wanted = {key: list(tricks.on) for key, tricks in arrangements(cfg.tricks)}
    done = {}
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or rundir.misfit(row, _ROW):
            continue
        if any(row.get(name) is None for name in _ROW):
            continue
        by_seed = row["by_seed"].get("validation") or ()
        if wanted.get(row["key"]) == row["tricks"] and len(by_seed) == cfg.seeds:
            done[row["key"]] = {name: row[name] for name in _ROW}
    return done


def arrangements(keys: tuple[str, ...]) -> Iterator[tuple[str, Tricks]]:
    """(name of the row, its tricks)."""
    yield "baseline", Tricks()
    for key in keys:
        yield key, Tricks.of(key)
    if len(keys) > 1:
        yield "all", Tricks.of(*keys)
        for key in keys:
            yield f"all - {key}", Tricks.of(*(k for k in keys if k != key))


def _search(
    cfg: Ablate,
    trained: list[Trained],
    data: list[data_lib.Data],
    evaluators: dict[Any, Evaluator],
    tried: Callable[[Subset], None],
) -> tuple[list[Trial], Trained]:
    """Search for the best subset by validation scores; what the plan has measured is not run again."""
    measured = {tuple(entry.row["tricks"]): entry for entry in trained}

    def measure(subset: Subset) -> list[float]:
        if subset not in measured:
            prepared = prepare(cfg, Tricks.of(*subset), data[0])
            measured[subset] = train_row("best", cfg, prepared, data, evaluators)
        if len(subset) > 1:
            tried(subset)
        return measured[subset].validation

    best, trials = search([k for k in KEYS if k in cfg.tricks], measure)
    return trials, measured[best]


class Prepared(NamedTuple):
    """A compiled arrangement, ready for every seed.

    Attributes:
      tricks: which tricks are on.
      program: the functions.
      step: (state, batch) -> (state, metrics), compiled; it donates its state.
      batch: a batch of the right shape, to time the step with.
      temp_bytes: temporaries of the compiled step.
    """

    tricks: Tricks
    program: step_lib.Program
    step: Callable[..., Any]
    batch: Any
    temp_bytes: int


def prepare(cfg: Ablate, tricks: Tricks, data: data_lib.Data) -> Prepared:
    """Compose and compile one arrangement."""
    run_cfg = cfg.train(tricks, 0)
    program = step_lib.build(run_cfg, data)
    batch = step_lib.example_batch(run_cfg, data, program.place)
    step, temp_bytes = step_lib.compile_step(program, program.start(0, data.counts), batch)
    return Prepared(tricks, program, step, batch, temp_bytes)


def train_row(
    key: str,
    cfg: Ablate,
    prepared: Prepared,
    data: list[data_lib.Data],
    evaluators: dict[Any, Evaluator],
) -> Trained:
    """Train one arrangement over all seeds with one executable, and evaluate it."""
    tricks, program, step, batch, temp_bytes = prepared
    # Arrangements that evaluate the same function share its executable.
    function = step_lib.function_key(tricks)
    evaluate = evaluators.setdefault(function, Evaluator(program, data[0], cfg.batch))

    def run_seed(seed: int) -> tuple[step_lib.TrainState, float, float, float]:
        run_cfg, dataset = cfg.train(tricks, seed), data[seed]
        source = dataset.train.subset(np.arange(len(dataset.train)))  # its own byte counter
        state = program.start(seed, dataset.counts)
        state = trainer.fit(step, state, _batches(run_cfg, source, program.place), cfg.steps)
        splits = filter(None, (dataset.test, dataset.validation))
        test, validation = (evaluate(state, split)["balanced_accuracy"] for split in splits)
        return state, test, validation, source.bytes_read / cfg.steps

    states, scores, validation, reads = zip(*map(run_seed, range(len(data))), strict=True)
    row = {
        "key": key,
        "tricks": list(tricks.on),
        "metric": float(np.mean(scores)),
        "std": deviation(scores),
        "n": len(scores),
        "validation": float(np.mean(validation)),
        "by_seed": {"test": list(scores), "validation": list(validation)},
        "temp_bytes": temp_bytes,
        "state_bytes": _tree.nbytes(states[-1].opt_state),
        "reads": float(np.mean(reads)),
    }
    return Trained(row, list(validation), step, states[-1], batch)


def ready(row: dict[str, Any], prepared: Prepared, data: data_lib.Data) -> Trained:
    """A row that is finished, ready to be timed."""
    state = prepared.program.start(0, data.counts)
    return Trained(row, row["by_seed"]["validation"], prepared.step, state, prepared.batch)


def interleaved_times(trained: list[Trained]) -> list[float]:
    """Median step time of each row in ms; all rows in turn, so that drift hits them alike."""
    states = [entry.state for entry in trained]
    times: list[list[float]] = [[] for _ in trained]
    for _ in range(_ROUNDS):
        for i, entry in enumerate(trained):
            for _ in range(2):  # the first step finds the caches full of the row before
                start = time.perf_counter()
                states[i], metrics = entry.step(states[i], entry.batch)
                jax.block_until_ready((states[i].params, metrics))
                elapsed = time.perf_counter() - start
            times[i].append(1e3 * elapsed)
    return [float(np.median(t)) for t in times]


def _batches(cfg: Train, source: data_lib.Source, place: Placement) -> Iterator[Any]:
    # No prefetch thread: what is read is then exactly what the steps used.
    reads = step_lib.build_reads(cfg, cfg.batch)
    batches = data_lib.pipeline(source, batch=cfg.batch, seed=cfg.seed, transform=reads)
    return map(place.put, batches)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
