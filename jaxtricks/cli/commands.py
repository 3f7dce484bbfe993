"""What the commands of the lab are and what each does. Parsing imports no jax."""

import difflib
import importlib.metadata
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jaxtricks
from jaxtricks.cli.cards import card
from jaxtricks.lab import cli
from jaxtricks.lab.config import Ablate, Compare, Explain, Fuse, LrFind, Train, UserError
from jaxtricks.lab.longtail_config import LongtailBench
from jaxtricks.lab.plan_config import Plan

COMMANDS = {
    "train": Train,
    "compare": Compare,
    "lr-find": LrFind,
    "fuse": Fuse,
    "ablate": Ablate,
    "longtail-bench": LongtailBench,
    "plan": Plan,
    "explain": Explain,
}
Command = Train | Compare | LrFind | Fuse | Ablate | LongtailBench | Plan | Explain


def parse(args: Sequence[str]) -> Command:
    """Checked settings from the command line.

    Raises:
      UserError: unknown command, option or trick, or a value out of range.
    """
    name, *rest = args
    if name not in COMMANDS:
        known = {command: command for command in COMMANDS}
        known |= {"help": "--help", "version": "--version", "v": "--version"}
        meant = difflib.get_close_matches(name.lower().strip("-"), known, n=1)
        hint = f"did you mean {known[meant[0]]}? The commands are" if meant else "use"
        raise UserError(f"unknown command {name[:60]!r}: {hint} {', '.join(COMMANDS)}")
    cfg = cli.read(COMMANDS[name], name, rest)
    cfg.check()
    return cfg


def run(cfg: Command, command: str) -> None:
    """Do what was asked; imports what that needs."""
    match cfg:
        case Explain():
            print(card(cfg.key))
        case Compare():
            _compare(cfg)
        case LrFind():
            _lr_find(cfg, command)
        case Fuse():
            _fuse(cfg, command)
        case Ablate():
            _ablate(cfg, command)
        case LongtailBench():
            from benchmarks.longtail import bench

            bench.run(cfg, command)
        case Plan():
            _plan(cfg, command)
        case Train():
            _train(cfg, command)


def _train(cfg: Train, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import report, runs
    from jaxtricks.lab.commands import train

    if cfg.check_data:
        train.check_data(cfg)
    elif train.run(cfg, command) is not None:
        made = runs.read(cfg.out)
        unit = "nats per character" if made.is_text else "nats"
        pictures = {"curves.png": plot.curves(made.rows, unit=unit)}
        if not made.is_text:
            sizes = report.group_sizes(made.about["data"]["counts"])
            pictures["groups.png"] = plot.groups(made.result, sizes)
        for name, figure in pictures.items():
            _draw(figure, made.path / name)
        report.write(made, tuple(pictures))


def _compare(cfg: Compare) -> None:
    from jaxtricks.lab import runs
    from jaxtricks.lab.commands import compare

    found = [runs.read(path) for path in cfg.runs]
    print(compare.for_terminal(found))
    if cfg.picture:
        from jaxtricks import plot

        cure = "give a --picture that ends in .png, in a folder that can be written to"
        _draw(plot.compare(compare.points(found)), pathlib.Path(cfg.picture), cure)


def _lr_find(cfg: LrFind, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab.commands import lr_find

    found = lr_find.run(cfg, command)
    _draw(plot.lr_range(found), pathlib.Path(cfg.out) / lr_find.PICTURE)


def _fuse(cfg: Fuse, command: str) -> None:
    from jaxtricks.lab.commands import fuse

    fuse.run(cfg, command)


def _ablate(cfg: Ablate, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import ablation_report
    from jaxtricks.lab.commands import ablate

    rows = ablate.run(cfg, command)
    _draw(plot.ablation(rows), pathlib.Path(cfg.out) / ablation_report.PICTURE)


def _plan(cfg: Plan, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab.commands import plan

    found = plan.run(cfg, command)
    if cfg.out:
        _draw(plot.plan(found), pathlib.Path(cfg.out) / plan.PICTURE)


def _draw(figure: Any, path: pathlib.Path, cure: str = "") -> None:
    from jaxtricks.lab.rundir import writing

    with writing(path, cure=cure):
        figure.savefig(path, dpi=110)


def usage() -> str:
    """What `jaxtricks --help` prints."""
    width = max(map(len, COMMANDS))
    lines = ["usage: jaxtricks COMMAND [OPTIONS]", "", "Ten training techniques for JAX.", ""]
    lines += [f"  {name:<{width}} {cls.__doc__}" for name, cls in COMMANDS.items()]
    lines += ["", "jaxtricks COMMAND --help lists the options of a command."]
    return "\n".join([*lines, "jaxtricks --version prints what a bug report needs."])


def versions() -> str:
    """What `jaxtricks --version` prints: of this library, Python, and what it stands on."""
    lines = [f"jaxtricks {jaxtricks.__version__}", f"python {platform.python_version()}"]
    for name in ("jax", "jaxlib", "flax", "optax"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)
