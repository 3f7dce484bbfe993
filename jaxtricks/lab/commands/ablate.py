"""The `ablate` command: baseline, each trick alone, all, all but one, and the best subset found."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtricks import _tree
from jaxtricks.lab import ablation_report, about, greedy, jsons, recorded, spread
from jaxtricks.lab import compose as compose_lib
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import step as loop_lib
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import KEYS, Ablate, Train, Tricks
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.evaluation import Evaluator
from jaxtricks.lab.rundir import RunDir, can_begin

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
    state: loop_lib.TrainState
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
    with RunDir(cfg.out, about.of_run(cfg, command, data[0]), resume=cfg.resume) as folder:
        if folder.note:
            say(folder.note)
        trained: list[Trained] = []
        try:
            trials, best = _train(cfg, data, folder, console, trained)
            for entry, milliseconds in zip(trained, interleaved_times(trained), strict=True):
                entry.row["step_ms"] = milliseconds
        except KeyboardInterrupt:
            rows = ablation_report.annotate([entry.row for entry in trained])
            ablation_report.write(folder, rows, [], data[0], cfg, command, complete=False)
            say(f"stopped after {ablation_report.counted(len(rows), 'row')}: go on with --resume")
            say(f"report: {folder.path / ablation_report.REPORT}")
            raise
        rows = [entry.row for entry in trained]
        if best and best.row["key"] != "best":  # an arrangement of the plan won
            rows.append({**best.row, "key": "best"})
        rows = ablation_report.annotate(rows)
        ablation_report.write(folder, rows, trials, data[0], cfg, command)
    say(ablation_report.for_terminal(rows))
    say(f"report: {folder.path / ablation_report.REPORT}")
    return rows


def _train(
    cfg: Ablate,
    data: list[data_lib.Data],
    folder: RunDir,
    console: Console,
    trained: list[Trained],
) -> tuple[list[greedy.Trial], Trained | None]:
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

            def tried(subset: greedy.Subset) -> None:
                progress.advance(task)
                if not console.is_terminal:
                    console.print(f"search {ablation_report.named(subset)}", highlight=False)

            trials, best = _search(cfg, trained, data, evaluators, tried)
            if best.row["key"] == "best":  # no arrangement of the plan
                trained.append(best)
    return trials, best


def finished(cfg: Ablate, folder: RunDir) -> dict[str, dict[str, Any]]:
    """Key -> row, of the rows that an interrupted comparison of the same settings has finished."""
    if not folder.resumed:
        return {}
    try:
        rows = jsons.parse((folder.path / RESULTS).read_bytes())
    except (OSError, ValueError):  # stopped before its first row, or damaged
        return {}
    wanted = {key: list(tricks.on) for key, tricks in arrangements(cfg.tricks)}
    done = {}
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, dict) or recorded.misfit(row, _ROW):
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
    tried: Callable[[greedy.Subset], None],
) -> tuple[list[greedy.Trial], Trained]:
    """Search for the best subset by validation scores; what the plan has measured is not run again."""
    measured = {tuple(entry.row["tricks"]): entry for entry in trained}

    def measure(subset: greedy.Subset) -> list[float]:
        if subset not in measured:
            prepared = prepare(cfg, Tricks.of(*subset), data[0])
            measured[subset] = train_row("best", cfg, prepared, data, evaluators)
        if len(subset) > 1:
            tried(subset)
        return measured[subset].validation

    best, trials = greedy.search([k for k in KEYS if k in cfg.tricks], measure)
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
    program: loop_lib.Program
    step: Callable[..., Any]
    batch: Any
    temp_bytes: int


def prepare(cfg: Ablate, tricks: Tricks, data: data_lib.Data) -> Prepared:
    """Compose and compile one arrangement."""
    run_cfg = cfg.train(tricks, 0)
    program = loop_lib.build(run_cfg, data)
    batch = loop_lib.example_batch(run_cfg, data, program.place)
    step, temp_bytes = loop_lib.compile_step(program, program.start(0, data.counts), batch)
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
    function = compose_lib.function_key(tricks)
    evaluate = evaluators.setdefault(function, Evaluator(program, data[0], cfg.batch))

    def run_seed(seed: int) -> tuple[loop_lib.TrainState, float, float, float]:
        run_cfg, dataset = cfg.train(tricks, seed), data[seed]
        source = dataset.train.subset(np.arange(len(dataset.train)))  # its own byte counter
        state = program.start(seed, dataset.counts)
        state = loop_lib.fit(step, state, _batches(run_cfg, source, program.place), cfg.steps)
        splits = filter(None, (dataset.test, dataset.validation))
        test, validation = (evaluate(state, split)["balanced_accuracy"] for split in splits)
        return state, test, validation, source.bytes_read / cfg.steps

    states, scores, validation, reads = zip(*map(run_seed, range(len(data))), strict=True)
    row = {
        "key": key,
        "tricks": list(tricks.on),
        "metric": float(np.mean(scores)),
        "std": spread.deviation(scores),
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
    reads = compose_lib.build_reads(cfg, cfg.batch)
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
