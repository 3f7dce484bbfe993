"""Run the command line: train, compare, lr-find, fuse, ablate, plan and explain.

Options come from the dataclasses of `config`. explain, --help and --version need
nothing but the core; the other commands need jaxtricks[lab], and say so. Parsing
imports no jax.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import reprlib
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import jaxtricks
from jaxtricks.lab import config
from jaxtricks.lab.config import HostLostError, UserError

__all__ = ["card", "main", "parse"]

COMMANDS = {
    "train": config.Train,
    "compare": config.Compare,
    "lr-find": config.LrFind,
    "fuse": config.Fuse,
    "ablate": config.Ablate,
    "plan": config.Plan,
    "explain": config.Explain,
}
USER_ERROR, TRY_AGAIN, INTERRUPTED, BROKEN_PIPE = 2, 75, 130, 141
"""Exit codes."""
# Packages of the extra `lab`, by the names that are imported.
_LAB_PACKAGES = {
    "PIL",
    "flatbuffers",
    "google",
    "grain",
    "matplotlib",
    "msgspec",
    "orbax",
    "rich",
    "safetensors",
    "simplejpeg",
    "sklearn",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 and one sentence on a user's mistake."""
    words = list(sys.argv[1:] if args is None else args)
    guarded(lambda: _main(words), words[0] if words else "")


def guarded(action: Callable[[], None], name: str) -> None:
    """Call the action of a command; turn what the user can mend into one sentence and an exit code."""
    try:
        action()
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _LAB_PACKAGES:
            raise
        _exit(
            USER_ERROR,
            f"{name} needs {error.name}: pip install 'jaxtricks[lab]'",
        )
    except UserError as error:
        _exit(USER_ERROR, str(error))
    except HostLostError as error:
        _exit(TRY_AGAIN, str(error))
    except KeyboardInterrupt:
        _exit(INTERRUPTED)
    except BrokenPipeError:
        # Python flushes once more at its end: that must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(BROKEN_PIPE)
    except Exception as error:
        if not (
            isinstance(error, MemoryError)
            or str(error).startswith("RESOURCE_EXHAUSTED")
        ):
            raise
        cure = "lower --batch, or the size of the model or of the images"
        _exit(USER_ERROR, f"out of memory: {cure}")


def _exit(code: int, sentence: str = "") -> NoReturn:
    if sentence:
        print(f"jaxtricks: {sentence}", file=sys.stderr)
    if "jax" in sys.modules:
        # One of several processes must not leave the others waiting for it.
        from jaxtricks.lab import distributed

        distributed.leave(code)
    sys.exit(code)


def _main(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] == "--version":
        print(versions())
    else:
        run(parse(words), "jaxtricks " + shlex.join(words))


def parse(args: Sequence[str]) -> Any:
    """Return the checked settings of a command line; a dataclass of `config`.

    Raises:
      UserError: unknown command, option or trick, or a value out of range.
    """
    name, *rest = args
    if name not in COMMANDS:
        meanings = {command: command for command in COMMANDS}
        meanings |= {"help": "--help", "version": "--version", "v": "--version"}
        similar = difflib.get_close_matches(
            name.lower().strip("-"), meanings, n=1
        )
        hint = (
            f"did you mean {meanings[similar[0]]}? The commands are"
            if similar
            else "use"
        )
        raise UserError(
            f"unknown command {name[:60]!r}: {hint} {', '.join(COMMANDS)}"
        )
    cfg = read(COMMANDS[name], f"jaxtricks {name}", rest)
    cfg.check()
    return cfg


def run(cfg: Any, command: str) -> None:
    """Run the command of these settings; import only what it needs."""
    match cfg:
        case config.Explain():
            print(card(cfg.key))
        case config.Compare():
            from jaxtricks.lab.commands import compare

            compare.main(cfg)
        case config.LrFind():
            from jaxtricks.lab.commands import lr_find

            lr_find.main(cfg, command)
        case config.Fuse():
            from jaxtricks.lab.commands import fuse

            fuse.main(cfg, command)
        case config.Ablate():
            from jaxtricks.lab.commands import ablate

            ablate.main(cfg, command)
        case config.Plan():
            from jaxtricks.lab.commands import plan

            plan.main(cfg, command)
        case config.Train():  # the last: LrFind and Plan are settings of a run too
            from jaxtricks.lab.commands import train

            train.main(cfg, command)


def card(key: str) -> str:
    """Return the module docstring of a room, without importing the room.

    Raises:
      UserError: not one of the ten.
    """
    config.Explain(key).check()
    spec = importlib.util.find_spec(f"jaxtricks.{key.lower()}")
    assert spec is not None and spec.origin is not None
    return (
        ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text()))
        or ""
    )


def usage() -> str:
    """Return what `jaxtricks --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: jaxtricks COMMAND [OPTIONS]",
        "",
        "Ten training techniques for JAX.",
        "",
    ]
    lines += [
        f"  {name:<{width}} {cls.__doc__}" for name, cls in COMMANDS.items()
    ]
    lines += ["", "jaxtricks COMMAND --help lists the options of a command."]
    return "\n".join(
        [*lines, "jaxtricks --version prints what a bug report needs."]
    )


def versions() -> str:
    """Return what `jaxtricks --version` prints: the library, Python, and the packages below."""
    lines = [
        f"jaxtricks {jaxtricks.__version__}",
        f"python {platform.python_version()}",
    ]
    for name in ("jax", "jaxlib", "flax", "optax"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return "\n".join(lines)


# Options from dataclasses.


_REPR = reprlib.Repr()
_REPR.maxstring = 60
_FORMS = {int: "a whole number", float: "a number"}


def read(cls: type, prog: str, args: Sequence[str]) -> Any:
    """Return an instance of a command's settings.

    Args:
      cls: a frozen dataclass of `config.option` fields; fields that are dataclasses are
        groups of options. The options in `cls.UNUSED` are read, but absent from the
        help.
      prog: how the command is called, such as "jaxtricks train".
      args: the words after it.

    Raises:
      UserError: an unknown option, or a value that can't be read.
    """
    parser = _parser(cls, prog)
    namespace, unknown = parser.parse_known_args(_normalized(args))
    if unknown:
        parser.refuse(unknown[0])
    values = vars(namespace)
    groups = {
        name: group(**_values(group, values))
        for name, group in _groups(cls).items()
    }
    return cls(**groups, **_values(cls, values))


@functools.cache
def _parser(cls: type, prog: str) -> "_Parser":
    positionals = [
        f.name.upper() for f, _ in _fields(cls) if f.metadata.get("positional")
    ]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *positionals, "[OPTIONS]"]),
        description=cls.__doc__,
        allow_abbrev=False,
        add_help=False,
    )
    unused = getattr(cls, "UNUSED", frozenset())
    sections = [("options", cls), *_groups(cls).items()]
    for title, owner in sections:
        section = parser.add_argument_group(
            title, None if owner is cls else owner.__doc__
        )
        for field, kind in _fields(owner):
            _add_option(section, field, kind, hidden=field.name in unused)
    section = parser.add_argument_group("help")
    section.add_argument("-h", "--help", action="help", help="Print this.")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the usage and exit by."""
        message = re.sub(
            "^argument ([^:]+): expected .*",
            r"argument \1: needs a value",
            message,
        )
        message = re.sub(
            "^argument ([^:]+): ignored .*",
            r"argument \1: takes no value",
            message,
        )
        message = re.sub("^argument ([^:]+): ", r"\1 ", message)
        raise UserError(message)

    def refuse(self, word: str) -> NoReturn:
        """Raise UserError for a word that is not an option; name the option that may be meant."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            positionals = [
                a.metavar for a in self._actions if not a.option_strings
            ]
            if positionals:
                command = self.prog.split()[-1]
                raise UserError(
                    f"{command} takes one {positionals[0]}: drop {_REPR.repr(word)}"
                )
            raise UserError(
                f"{_REPR.repr(word)} is not an option: see {self.prog} --help"
            )
        options = [
            text for action in self._actions for text in action.option_strings
        ]
        # Compared without the dashes, in which all are alike.
        bare = {text.lstrip("-"): text for text in options}
        similar = difflib.get_close_matches(
            name.lstrip("-"), bare, n=1, cutoff=0.7
        )
        hint = (
            f"did you mean {bare[similar[0]]}?"
            if similar
            else f"see {self.prog} --help"
        )
        raise UserError(f"unknown option {_REPR.repr(name)}: {hint}")


def _normalized(args: Sequence[str]) -> list[str]:
    """Write options with dashes, and join negative numbers to theirs: argparse takes -1 for an option."""
    words: list[str] = []
    for word in args:
        after_option = (
            bool(words) and re.match("--[^=]+$", words[-1]) is not None
        )
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words.append(name.replace("_", "-") + equals + value)
        elif after_option and re.match(r"-(\d|\.|inf|nan)", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


@functools.cache
def _groups(cls: type) -> dict[str, Any]:
    """Return name -> dataclass, of the fields that are groups of options."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return {
        name: hints[name]
        for name in names
        if dataclasses.is_dataclass(hints[name])
    }


@functools.cache
def _fields(cls: type) -> list[tuple[Any, Any]]:
    """Return (field, type) of the other fields."""
    hints, groups = typing.get_type_hints(cls), _groups(cls)
    return [
        (f, hints[f.name])
        for f in dataclasses.fields(cls)
        if f.name not in groups
    ]


def _values(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Select the parsed values of a dataclass's fields; absent ones have their defaults."""
    names = [field.name for field, _ in _fields(cls) if field.name in values]
    return {
        n: tuple(values[n]) if isinstance(values[n], list) else values[n]
        for n in names
    }


def _add_option(section: Any, field: Any, kind: Any, *, hidden: bool) -> None:
    is_list = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if is_list else kind
    arguments: dict[str, Any] = {
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    if not hidden:
        text = field.metadata["help"] + _default(field.default)
        arguments["help"] = text.replace("%", "%%")  # argparse formats it
    if kind is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    else:
        arguments |= {"type": _reader(kind), "metavar": _metavar(kind)}
    if field.metadata.get("positional"):
        arguments |= {
            "nargs": "*" if is_list else "?",
            "metavar": field.name.upper(),
        }
        section.add_argument(field.name, **arguments)
        return
    if is_list:
        arguments["nargs"] = "*"
    name = field.metadata.get("name", field.name)
    section.add_argument(config.flag(name), dest=field.name, **arguments)


def _kinds_and_words(kind: Any) -> tuple[list[Any], list[str]]:
    """Split a type, a Literal or a union of them into types and literal words."""
    is_literal = typing.get_origin(kind) is Literal
    members = (kind,) if is_literal else typing.get_args(kind) or (kind,)
    kinds, words = [], []
    for member in members:
        if typing.get_origin(member) is Literal:
            words += typing.get_args(member)
        else:
            kinds.append(member)
    return kinds, words


def _reader(kind: Any) -> Callable[[str], Any]:
    """Return the function from an option's text to its value."""
    kinds, words = _kinds_and_words(kind)
    numbers = [k for k in kinds if k in _FORMS]

    def value(text: str) -> Any:
        if str in kinds or text in words:
            if "\0" in text:
                raise argparse.ArgumentTypeError(
                    f"is {_REPR.repr(text)}: drop the null character"
                )
            return text
        for number in numbers:
            try:
                return number(text)
            except ValueError:
                continue
        *first, last = [_FORMS[number] for number in numbers] + words
        use = f"{', '.join(first)} or {last}" if first else last
        raise argparse.ArgumentTypeError(f"is {_REPR.repr(text)}: give {use}")

    return value


def _metavar(kind: Any) -> str:
    kinds, words = _kinds_and_words(kind)
    letters = {int: "N", float: "X", str: "TEXT"}
    return "|".join([letters[k] for k in kinds if k in letters] + words)


def _default(value: Any) -> str:
    """Return the default as the help shows it; "" where that says nothing."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    if shown is False or shown in (None, "", dataclasses.MISSING):
        return ""
    return f" (default: {shown})"
