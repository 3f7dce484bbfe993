"""What ends a command in one sentence, and the checks that find it. Imports no jax."""

from jaxtricks._table import printable


class UserError(Exception):
    """One sentence for the person at the command line: what is wrong and what to do; exit code 2."""

    def __init__(self, sentence: str):
        # It may quote names and values from files of others, line breaks and terminal codes included.
        super().__init__(printable(sentence))


class HostLostError(Exception):
    """Another process of the run is gone; exit code 75: the same command with --resume goes on."""


def at_least(value: float, least: float, name: str, hint: str) -> None:
    """Raise UserError if value < least (or is no number)."""
    if not value >= least:
        raise UserError(f"{name} must be at least {least}, not {value}: {hint}")


def share(value: float, name: str) -> None:
    """Raise UserError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise UserError(f"{name} must be at least 0 and less than 1, not {value}")


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")
