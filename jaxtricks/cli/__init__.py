"""The command line: train | compare | lr-find | fuse | ablate | longtail-bench | plan | explain.

explain, --help and --version need nothing but the core; the others need jaxtricks[lab], and say so.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from jaxtricks.cli.cards import card
from jaxtricks.lab.errors import HostLostError, UserError

__all__ = ["card", "main", "parse"]

USER_ERROR, TRY_AGAIN = 2, 75
# What the extra brings, by the names that are imported.
_LAB = {"PIL", "flatbuffers", "grain", "matplotlib", "orbax", "rich", "safetensors", "simplejpeg"}
_LAB |= {"sklearn"}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 and one sentence on a user's mistake."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        _main(args)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _LAB:
            raise
        print(
            f"jaxtricks: {args[0]} needs {error.name}: pip install 'jaxtricks[lab]'",
            file=sys.stderr,
        )
        _leave(USER_ERROR)
    except UserError as error:
        print(f"jaxtricks: {error}", file=sys.stderr)
        _leave(USER_ERROR)
    except HostLostError as error:
        print(f"jaxtricks: {error}", file=sys.stderr)
        _leave(TRY_AGAIN)
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:
        # Whoever reads has seen enough; what is left in the buffer must not raise again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(141)
    except Exception as error:
        if not (isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")):
            raise
        cure = "lower --batch, or the size of the model or of the images"
        print(f"jaxtricks: out of memory: {cure}", file=sys.stderr)
        _leave(USER_ERROR)


def parse(args: Sequence[str]) -> Any:
    """Checked settings from the command line; a dataclass of the command.

    Raises:
      UserError: unknown command, option or trick, or a value out of range.
    """
    from jaxtricks.cli import commands

    return commands.parse(args)


def _main(args: Sequence[str]) -> None:
    from jaxtricks.cli import commands

    if not args or args[0] in ("-h", "--help"):
        print(commands.usage())
        return
    if args[0] == "--version":
        print(commands.versions())
        return
    commands.run(parse(args), "jaxtricks " + shlex.join(args))


def _leave(code: int) -> None:
    """Exit; one of several processes has to see to it that the others don't wait for it."""
    if "jax" in sys.modules:
        from jaxtricks.lab import hosts

        hosts.leave(code)
    sys.exit(code)
