"""The `train` command: one run with a progress bar, logs, checkpoints and a final table."""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxtricks import _table
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import distributed, rundir, writers
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.checkpoint import Checkpoints
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.distributed import Interrupt, Placement, StopError
from jaxtricks.lab.rundir import CONFIG, RESULT, RunDir
from jaxtricks.lab.trainer import Trainer

_SUMMARY = {
    "image": ("loss", "accuracy", "balanced_accuracy", "many", "medium", "few"),
    "text": ("loss", "accuracy"),
}


def run(cfg: Train, command: str = "") -> dict[str, Any] | None:
    """Train, evaluate, print a table, and leave a run directory behind.

    Args:
      cfg: checked settings.
      command: the command line, for config.json.

    Returns:
      What result.json says; None if the run was told to stop before its end, and on all hosts but the
      first, which does all the writing.

    Raises:
      UserError: something that the person can mend.
      HostLostError: another host did not answer.
      KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    distributed.start(cfg.parallel)
    together = distributed.Hosts()
    console = Console(quiet=not distributed.first())
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    try:
        with Interrupt(together) as interrupt:
            return _run(cfg, command, together, interrupt, console, say)
    except StopError:
        say("stopped on SIGTERM before a step was done, nothing to save: go on with --resume")
        return None


def _run(
    cfg: Train,
    command: str,
    together: distributed.Hosts,
    interrupt: Interrupt,
    console: Console,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    # Of the first host, which writes: said before anything is read or computed.
    together.on_first(lambda: _check_outputs(cfg))
    Placement.of(cfg.parallel).check(cfg.micro_batch)
    data = load(cfg)
    # A mistake here must leave no directory behind.
    prepared = step_lib.prepare(cfg, data)
    with open_folder(cfg, rundir.of_run(cfg, command, data), together) as folder:
        introduce(data, say)
        if together.count > 1:
            say(
                f"{together.count} processes, {jax.device_count()} devices; should one be lost, the others "
                f"end within {distributed.HEARTBEAT} s: start all of them again with --resume"
            )
        if prepared.plan:
            say(f"recomputation planned: {prepared.plan.describe().notes[0]}")
        if folder.note:
            say(folder.note)
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(folder.path / "checkpoints", cfg.keep, together)
            stack.callback(checkpoints.close)
            trainer = Trainer(cfg, data, prepared, folder, checkpoints, together)
            start = trainer.restore(say, rundir.session(command)) if folder.resumed else 0
            outputs = writers.open_writers(cfg, folder.path, start) if distributed.first() else []
            for writer in outputs:
                stack.callback(writer.close)
            with _progress(console) as progress:
                trainer.fit(start, interrupt, outputs, progress)
            result = None if interrupt.signal else trainer.result()
        if result is not None and distributed.first():
            folder.write(RESULT, result)
    if result is None:
        say(f"stopped on {interrupt.signal}, saved: go on with --resume")
        if interrupt.signal == "SIGINT":
            raise KeyboardInterrupt
        return None
    if not distributed.first():
        return None
    say(str(summary_table(result)))
    say(f"run directory: {folder.path}")
    return result


def _check_outputs(cfg: Train) -> None:
    rundir.can_begin(cfg.out, resume=cfg.resume)
    writers.check(cfg)


def open_folder(cfg: Train, about: dict[str, Any], together: distributed.Hosts) -> RunDir:
    """The run directory, made by the first host.

    Raises:
      UserError: of the first host, on all.
    """
    opened: list[RunDir] = []

    def make() -> bool:
        opened.append(RunDir(cfg.out, about, resume=cfg.resume))
        return opened[0].resumed

    resumed = together.on_first(make)
    folder = opened[0] if opened else RunDir(cfg.out, about, resume=True, lock=False)
    folder.resumed = resumed
    return folder


def load(cfg: Train) -> data_lib.Data:
    """The data set of a run.

    Raises:
      UserError: it can't be used, or not by this model.
    """
    if cfg.model != "transformer":
        refuse_text(
            cfg.source, cfg.root, f"--model {cfg.model} can't read it: use --model transformer, "
        )
    elif not data_lib.is_text(cfg.source, cfg.root):
        raise UserError(
            f"--data {cfg.source} is no text, and --model transformer reads nothing else: give a .txt "
            "file or topics, or use another model"
        )
    return data_lib.load(
        cfg.source, imbalance=cfg.imbalance, left_out=_left_out_before(cfg), **where(cfg)
    )


def _left_out_before(cfg: Train) -> list[str] | None:
    """What the run that goes on has left out; None if there is none, or it says nothing of it."""
    out = pathlib.Path(cfg.out)
    if not (cfg.resume and cfg.skip_unreadable and (out / CONFIG).is_file()):
        return None
    return rundir.begun_with(out).get("data", {}).get("left_out")


def refuse_text(name: str, root: str, why: str = "") -> None:
    """Raise UserError for text where images are needed."""
    if data_lib.is_text(name, root):
        cure = "give images, or --root DIR if it is a list of images"
        raise UserError(f"--data {name} is text, but {why or 'this needs images: '}{cure}")


def check_data(cfg: Train) -> None:
    """Read every file once and print what was found.

    Raises:
      UserError: files that can't be read (they are printed first), or data that can't be used at all.
    """
    report = data_lib.check(cfg.source, **where(cfg))
    print(report)
    if report.unreadable:
        raise UserError(
            f"{len(report.unreadable)} of {report.files} files of {cfg.source} can't be read (listed above): "
            "remove or replace them, or train with --skip-unreadable"
        )


def where(cfg: Train) -> dict[str, Any]:
    """How the data set is read, split and shaped."""
    return {
        "root": cfg.root,
        "skip_unreadable": cfg.skip_unreadable,
        "seed": cfg.seed,
        "validation": cfg.validation,
        "test": cfg.test,
        "size": cfg.size,
        "context": cfg.text.context,
    }


def introduce(data: data_lib.Data, say: Callable[[str], None]) -> None:
    """Say what was found."""
    held = f"{len(data.validation)} validation, " if data.validation else ""
    what = "windows of text" if data.kind == "text" else "images"
    lines = [f"{data.name}: {len(data.train)} training, {held}{len(data.test)} test {what}"]
    if data.kind == "image":
        lines[0] += f", {len(data.classes)} classes, counts {', '.join(map(str, data.counts))}"
    for line in [*lines, *data.notes]:
        say(line)


def summary_table(result: dict[str, Any]) -> _table.Table:
    """The splits' metrics; images by class groups, text in nats per character."""
    names = _SUMMARY[result["kind"]]
    rows = [
        (split, *(result[split][name] for name in names))
        for split in ("train", "validation", "test")
        if split in result
    ]
    return _table.make(("split", *(name.replace("_", " ") for name in names)), rows)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
