"""What ends a command in one sentence, and the checks that find it. Imports no jax."""

import math
import os
import re
import reprlib

from jaxtricks._table import printable

_UNITS = {"b": 1} | {
    f"{letter}{b}": base**power
    for power, letter in enumerate("kmgt", 1)
    for b, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(rf"\s*(?P<number>(\d+\.?|\d*\.\d+)(e\d+)?)\s*(?P<unit>{'|'.join(_UNITS)})?\s*")


class UserError(Exception):
    """One sentence for the person at the command line: what is wrong and what to do; exit code 2."""

    def __init__(self, sentence: str):
        # It may quote names and values from files of others, line breaks and terminal codes included.
        super().__init__(re.sub(r"\S{200,}", _shortened, printable(sentence)))


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][:80]}...{word[0][-20:]}"


class HostLostError(Exception):
    """Another process of the run is gone; exit code 75: the same command with --resume goes on."""


def at_least(value: float, least: float, name: str, hint: str) -> None:
    """Raise UserError if value < least, or is infinite or no number."""
    if not least <= value < math.inf:
        finite = "" if math.isfinite(value) else "a finite number of "
        raise UserError(f"{name} must be {finite}at least {least}, not {value}: {hint}")


def positive(value: float, name: str) -> None:
    """Raise UserError unless 0 < value < infinity."""
    if not 0 < value < math.inf:
        finite = "positive" if math.isfinite(value) else "a finite positive number"
        raise UserError(f"{name} must be {finite}, not {value}")


def at_most(value: float, most: float, name: str) -> None:
    """Raise UserError if value > most."""
    if value > most:
        raise UserError(f"{name} must be at most {most}, not {value}")


def share(value: float, name: str) -> None:
    """Raise UserError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise UserError(f"{name} must be at least 0 and less than 1, not {value}")


def budget(text: str, name: str) -> None:
    """Raise UserError unless it is a size, or a fraction, that `remat.plan` can read too."""
    match = _SIZE.fullmatch(text.lower())
    size = float(match["number"]) * _UNITS[match["unit"] or "b"] if match else math.nan
    if not 0 <= size < 2**63:
        raise UserError(
            f"{name} is {reprlib.repr(text)}: give a size such as 4GiB, or a fraction such as 0.5"
        )
    if not size:
        raise UserError(f"{name} must be above 0, not {text}")


def named(path: str, name: str) -> None:
    """Raise UserError if there is no path."""
    if not path.strip():
        raise UserError(f"{name} is empty: give a path, or leave it out")


def outside(out: str, **folders: str) -> None:
    """Raise UserError if a directory to create would lie in a folder of data, where it would be data.

    Args:
      out: the directory.
      folders: option -> what it says, a folder or something else.
    """
    for name, folder in folders.items():
        if out and os.path.isdir(folder):
            inside, around = os.path.realpath(out), os.path.realpath(folder)
            if inside == around or inside.startswith(os.path.join(around, "")):
                raise UserError(
                    f"--out {out} lies in --{name} {folder}, where it would be taken for a class of "
                    "images: give an --out outside of it"
                )


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")
