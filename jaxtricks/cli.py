"""The command line: train | ablate | explain. Parsing imports no jax."""

import ast
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Sequence

import tyro

from jaxtricks import KEYS
from jaxtricks.lab.config import Ablate, Explain, Train, UserError

USER_ERROR = 2
COMMANDS = {"train": Train, "ablate": Ablate, "explain": Explain}


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
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(args: Sequence[str]) -> Train | Ablate | Explain:
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


def run(cfg: Train | Ablate | Explain, command: str) -> None:
    """Do what was asked; imports what that needs."""
    if isinstance(cfg, Explain):
        print(card(cfg.key))
    elif isinstance(cfg, Train):
        from jaxtricks.lab import train

        train.run(cfg, command)
    else:
        from jaxtricks import plot
        from jaxtricks.lab import ablate, report

        rows = ablate.run(cfg, command)
        plot.ablation(rows).savefig(pathlib.Path(cfg.out) / report.PICTURE, dpi=110)


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
