"""Train one run, with a progress bar, logs, checkpoints and a final table."""

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
from jaxtricks.lab import distributed, plots, report, rundir, writers
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
Say = Callable[[str], None]


def main(cfg: Train, command: str) -> None:
    """Check the data, or train, draw and report: what the command line calls."""
    if cfg.check_data:
        check_data(cfg)
        return
    if run(cfg, command) is None:
        return
    finished = rundir.read(cfg.out)
    unit = "nats per character" if finished.is_text else "nats"
    pictures = {"curves.png": plots.curves(finished.rows, unit=unit)}
    if not finished.is_text:
        sizes = report.group_sizes(finished.about["data"]["counts"])
        pictures["groups.png"] = plots.groups(finished.result, sizes)
    for name, figure in pictures.items():
        plots.save(figure, finished.path / name)
    report.write(finished, tuple(pictures))


def run(cfg: Train, command: str = "") -> dict[str, Any] | None:
    """Train, evaluate, print a table, and leave a run directory behind.

    Args:
      cfg: checked settings.
      command: the command line, for config.json.

    Returns:
      What result.json says; None if the run was told to stop before its end, and on all
      hosts but the first, which does all the writing.

    Raises:
      UserError: something that the user can mend.
      HostLostError: another host did not answer.
      KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    distributed.start(cfg.parallel)
    hosts = distributed.Hosts()
    console = Console(quiet=not distributed.is_first())
    say = functools.partial(
        console.print, highlight=False, markup=False, soft_wrap=True
    )
    try:
        with Interrupt(hosts) as interrupt:
            result = _run(cfg, command, hosts, interrupt, console, say)
    except StopError:
        say(
            "stopped on SIGTERM before a step was done, nothing to save: go on "
            "with --resume"
        )
        return None
    # Only now: the handlers of signals are those of before again.
    if interrupt.signal == "SIGINT":
        raise KeyboardInterrupt
    return result


def _run(
    cfg: Train,
    command: str,
    hosts: distributed.Hosts,
    interrupt: Interrupt,
    console: Console,
    say: Say,
) -> dict[str, Any] | None:
    # Of the first host, which writes: checked before anything is read or computed.
    hosts.on_first(lambda: _check_outputs(cfg))
    Placement.of(cfg.parallel).check(cfg.micro_batch)
    data = load(cfg)
    # A mistake here must leave no directory behind.
    step, plan = step_lib.prepare(cfg, data)
    with open_folder(cfg, rundir.describe(cfg, command, data), hosts) as folder:
        introduce(data, say)
        if hosts.count > 1:
            say(
                f"{hosts.count} processes, {jax.device_count()} devices; "
                "should one be lost, the others end within "
                f"{distributed.HEARTBEAT} s: start all of them again with "
                "--resume"
            )
        if plan:
            say(f"recomputation planned: {plan.describe().notes[0]}")
        if folder.note:
            say(folder.note)
        with contextlib.ExitStack() as stack:
            checkpoints = Checkpoints(
                folder.path / "checkpoints", cfg.keep, hosts
            )
            stack.callback(checkpoints.close)
            trainer = Trainer(cfg, data, step, plan, folder, checkpoints, hosts)
            start = (
                trainer.restore(say, rundir.session(command))
                if folder.resumed
                else 0
            )
            is_first = distributed.is_first()
            # One host writes, and all others compute the same metrics.
            outputs = (
                writers.open_writers(cfg, folder.path, start)
                if is_first
                else []
            )
            for writer in outputs:
                stack.callback(writer.close)
            with _progress(console) as progress:
                trainer.fit(start, interrupt, outputs, progress)
            result = None if interrupt.signal else trainer.result()
        if result is not None and is_first:
            folder.write(RESULT, result)
    if result is None:
        say(f"stopped on {interrupt.signal}, saved: go on with --resume")
        return None
    say(str(summary_table(result)))
    say(f"run directory: {folder.path}")
    return result if is_first else None


def _check_outputs(cfg: Train) -> None:
    rundir.can_begin(cfg.out, resume=cfg.resume)
    writers.check(cfg)


def open_folder(
    cfg: Train, about: dict[str, Any], hosts: distributed.Hosts
) -> RunDir:
    """Open the run directory, which the first host creates.

    Raises:
      UserError: of the first host, on all.
    """
    folder: RunDir | None = None

    def create() -> bool:
        nonlocal folder
        folder = RunDir(cfg.out, about, resume=cfg.resume)
        return folder.resumed

    resumed = hosts.on_first(create)
    if folder is None:  # another host
        folder = RunDir(cfg.out, about, resume=True, lock=False)
    folder.resumed = resumed
    return folder


def load(cfg: Train) -> data_lib.Data:
    """Return the data set of a run.

    Raises:
      UserError: it can't be used, or not by this model.
    """
    if cfg.model != "transformer":
        why = f"--model {cfg.model} can't read it: use --model transformer, "
        refuse_text(cfg.source, cfg.root, why)
    elif not data_lib.is_text(cfg.source, cfg.root):
        raise UserError(
            f"--data {cfg.source} is no text, and --model transformer reads "
            "nothing else: give a .txt file or topics, or use another model"
        )
    # A run that goes on must leave out what it left out before, or its order would
    # change.
    left_out = _left_out_before(cfg)
    options = _data_options(cfg)
    return data_lib.load(
        cfg.source, imbalance=cfg.imbalance, left_out=left_out, **options
    )


def _left_out_before(cfg: Train) -> list[str] | None:
    """Return what the run that goes on has left out; None if there is none, or it says nothing of it."""
    out = pathlib.Path(cfg.out)
    if not (cfg.resume and cfg.skip_unreadable and (out / CONFIG).is_file()):
        return None
    return rundir.begun_with(out).get("data", {}).get("left_out")


def refuse_text(name: str, root: str, why: str = "") -> None:
    """Raise UserError for text where images are needed."""
    if data_lib.is_text(name, root):
        cure = "give images, or --root DIR if it is a list of images"
        raise UserError(
            f"--data {name} is text, but {why or 'this needs images: '}{cure}"
        )


def check_data(cfg: Train) -> None:
    """Read every file once and print what there is.

    Raises:
      UserError: files that can't be read (they are printed first), or data that can't
        be used at all.
    """
    contents = data_lib.check(cfg.source, **_data_options(cfg))
    print(contents)
    if contents.unreadable:
        raise UserError(
            f"{len(contents.unreadable)} of {contents.files} files of "
            f"{cfg.source} can't be read (listed above): remove or replace "
            "them, or train with --skip-unreadable"
        )


def _data_options(cfg: Train) -> dict[str, Any]:
    """Return how the data set is read, split and shaped."""
    names = ("root", "skip_unreadable", "seed", "validation", "test", "size")
    return {
        "context": cfg.text.context,
        **{name: getattr(cfg, name) for name in names},
    }


def introduce(data: data_lib.Data, say: Say) -> None:
    """Say what the data set holds."""
    held = f"{len(data.validation)} validation, " if data.validation else ""
    what = "windows of text" if data.kind == "text" else "images"
    lines = [
        f"{data.name}: {len(data.train)} training, {held}{len(data.test)} test {what}"
    ]
    if data.kind == "image":
        lines[0] += (
            f", {len(data.classes)} classes, counts {', '.join(map(str, data.counts))}"
        )
    for line in [*lines, *data.notes]:
        say(line)


def summary_table(result: dict[str, Any]) -> _table.Table:
    """Make the table of the splits' metrics; images by class groups, text in nats per character."""
    names = _SUMMARY[result["kind"]]
    rows = []
    for split in ("train", "validation", "test"):
        if split in result:
            rows.append((split, *(result[split][name] for name in names)))
    return _table.make(
        ("split", *(name.replace("_", " ") for name in names)), rows
    )


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )
