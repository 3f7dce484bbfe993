"""The `train` command: one run with a progress bar, logs, checkpoints and a final table."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

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
from jaxtricks.lab import about, loop, planning, writers
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.checkpoint import Checkpoints
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.interrupt import Interrupt
from jaxtricks.lab.rundir import RESULT, RunDir
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
      What result.json says, or None if the run was told to stop before its end.

    Raises:
      UserError: something that the person can mend.
      KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    console = Console()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    data = load(cfg)
    # A mistake here must leave no directory behind.
    place = loop.Placement.over(cfg.devices)
    prepared = planning.prepare(cfg, data)
    folder = RunDir(cfg.out, about.of_run(cfg, command, data), resume=cfg.resume)
    introduce(data, say)
    if prepared.plan:
        say(f"recomputation planned: {prepared.plan.describe().notes[0]}")
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        checkpoints = Checkpoints(folder.path / "checkpoints", cfg.keep)
        stack.callback(checkpoints.close)
        trainer = Trainer(cfg, data, prepared, place, folder, checkpoints)
        start = trainer.restore(say, about.session(command)) if folder.resumed else 0
        for writer in (outputs := writers.open_writers(cfg, folder.path, start)):
            stack.callback(writer.close)
        with _progress(console) as progress:
            trainer.fit(start, interrupt, outputs, progress)
        result = None if interrupt.signal else trainer.result()
    if result is None:
        say(f"stopped on {interrupt.signal}, saved: go on with --resume")
        if interrupt.signal == "SIGINT":
            raise KeyboardInterrupt
        return None
    folder.write(RESULT, result)
    say(str(summary_table(result)))
    say(f"run directory: {folder.path}")
    return result


def load(cfg: Train) -> data_lib.Data:
    """The data set of a run.

    Raises:
      UserError: it can't be used, or not by this model.
    """
    data = data_lib.load(
        cfg.source, imbalance=cfg.imbalance, skip_unreadable=cfg.skip_unreadable, **where(cfg)
    )
    if (data.kind == "text") != (cfg.model == "transformer"):
        fits = "a .txt file or topics" if cfg.model == "transformer" else "images"
        raise UserError(f"--model {cfg.model} can't read --data {data.name}: give {fits}")
    return data


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
    """How the data set is split and shaped."""
    return {
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
