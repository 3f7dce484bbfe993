"""The command line: train | compare | lr-find | fuse | ablate | longtail-bench | plan | explain.

Parsing imports no jax.
"""

import ast
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from jaxtricks import KEYS
from jaxtricks.lab.config import Ablate, Compare, Explain, Fuse, LrFind, Train, UserError
from jaxtricks.lab.errors import HostLostError
from jaxtricks.lab.longtail_config import LongtailBench
from jaxtricks.lab.plan_config import Plan

USER_ERROR, TRY_AGAIN = 2, 75
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


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 and one sentence on a user's mistake."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return
    try:
        run(parse(args), "jaxtricks " + shlex.join(args))
    except UserError as error:
        print(f"jaxtricks: {error}", file=sys.stderr)
        _leave(USER_ERROR)
    except HostLostError as error:
        print(f"jaxtricks: {error}", file=sys.stderr)
        _leave(TRY_AGAIN)
    except KeyboardInterrupt:
        _leave(130)


def _leave(code: int) -> None:
    """Exit; one of several processes has to see to it that the others don't wait for it."""
    if "jax" in sys.modules:
        from jaxtricks.lab import hosts

        hosts.leave(code)
    sys.exit(code)


def parse(args: Sequence[str]) -> Command:
    """Checked settings from the command line.

    Raises:
      UserError: unknown command, option or trick, or a value out of range.
    """
    name, *rest = args
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: use {', '.join(COMMANDS)}")
    cfg, unknown = tyro.cli(
        COMMANDS[name],
        prog=f"jaxtricks {name}",
        args=rest,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if unknown:
        raise UserError(f"unknown option {unknown[0]!r}: see --help; the tricks are {_tricks()}")
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
            from jaxtricks.lab import longtail_bench

            longtail_bench.run(cfg, command)
        case Plan():
            _plan(cfg, command)
        case Train():
            _train(cfg, command)


def _train(cfg: Train, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import run_report, runs, train

    if cfg.check_data:
        train.check_data(cfg)
    elif train.run(cfg, command) is not None:
        made = runs.read(cfg.out)
        unit = "nats per character" if made.is_text else "nats"
        pictures = {"curves.png": plot.curves(made.rows, unit=unit)}
        if not made.is_text:
            sizes = run_report.group_sizes(made.about["data"]["counts"])
            pictures["groups.png"] = plot.groups(made.result, sizes)
        for name, figure in pictures.items():
            _draw(figure, made.path / name)
        run_report.write(made, tuple(pictures))


def _compare(cfg: Compare) -> None:
    from jaxtricks.lab import compare, runs

    found = [runs.read(path) for path in cfg.runs]
    print(compare.for_terminal(found))
    if cfg.picture:
        from jaxtricks import plot

        _draw(plot.compare(compare.points(found)), pathlib.Path(cfg.picture))


def _lr_find(cfg: LrFind, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import find_lr

    found = find_lr.run(cfg, command)
    _draw(plot.lr_range(found), pathlib.Path(cfg.out) / find_lr.PICTURE)


def _fuse(cfg: Fuse, command: str) -> None:
    from jaxtricks.lab import deploy

    deploy.run(cfg, command)


def _ablate(cfg: Ablate, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import ablate, report

    rows = ablate.run(cfg, command)
    _draw(plot.ablation(rows), pathlib.Path(cfg.out) / report.PICTURE)


def _plan(cfg: Plan, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import plan

    found = plan.run(cfg, command)
    if cfg.out:
        _draw(plot.plan(found), pathlib.Path(cfg.out) / plan.PICTURE)


def _draw(figure: Any, path: pathlib.Path) -> None:
    from jaxtricks.lab.rundir import writing

    with writing(path):
        figure.savefig(path, dpi=110)


def card(key: str) -> str:
    """A room's card: its module docstring, read without importing it."""
    spec = importlib.util.find_spec(f"jaxtricks.{key}")
    if spec is None or spec.origin is None:
        raise UserError(f"unknown trick {key!r}: use one of {_tricks()}")
    return ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""


def _help() -> str:
    # By hand: tyro would read every field of every command first, which takes longer than its import.
    lines = ["usage: jaxtricks COMMAND [OPTIONS]", "", "Ten training techniques for JAX.", ""]
    lines += [f"  {name:<8} {cls.__doc__}" for name, cls in COMMANDS.items()]
    return "\n".join([*lines, "", "jaxtricks COMMAND --help lists the options of a command."])


def _tricks() -> str:
    return ", ".join(KEYS)


if __name__ == "__main__":
    main()
