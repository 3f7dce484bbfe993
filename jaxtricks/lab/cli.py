"""The options of a command from its dataclass of settings, and sentences on those that can't be read."""

import argparse
import dataclasses
import difflib
import functools
import re
import reprlib
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from jaxtricks.lab.config import docs
from jaxtricks.lab.errors import UserError, flag

_REPR = reprlib.Repr()
_REPR.maxstring = 60
_FORMS = {int: "a whole number", float: "a number"}


def read(cls: type, name: str, args: Sequence[str]) -> Any:
    """An instance of a command's settings.

    Args:
      cls: a frozen dataclass; fields that are dataclasses are groups of options. A field's metadata may
        say "positional", or the "option" that it is called; `cls.UNUSED` are options that are read, and
        left out of the help.
      name: of the command.
      args: the words after it.

    Raises:
      UserError: an unknown option, or a value that can't be read.
    """
    parser = _parser(cls, name, helping=not {"-h", "--help"}.isdisjoint(args))
    given, unknown = parser.parse_known_args(_joined(args))
    if unknown:
        parser.refuse(unknown[0])
    values = vars(given)
    groups = {n: group(**_of(group, values)) for n, group in _groups(cls).items()}
    return cls(**groups, **_of(cls, values))


@functools.cache
def _parser(cls: type, name: str, *, helping: bool) -> "_Parser":
    """The parser of a command; reading the texts of its help takes longer than parsing."""
    prog = f"jaxtricks {name}"
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {_positionals(cls)}[OPTIONS]",
        description=cls.__doc__,
        allow_abbrev=False,
        add_help=False,
    )
    unused = getattr(cls, "UNUSED", frozenset())
    for group, section in ((cls, "options"), *((t, n) for n, t in _groups(cls).items())):
        texts = docs(group) if helping else {}
        options = parser.add_argument_group(section, None if group is cls else group.__doc__)
        for field, kind in _fields(group):
            text = None if field.name in unused else texts.get(field.name, "")
            _add(options, field, kind, text)
    parser.add_argument_group("help").add_argument(
        "-h", "--help", action="help", help="Print this."
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the usage and exit by."""
        message = re.sub("^argument ([^:]+): expected .*", r"argument \1: needs a value", message)
        message = re.sub("^argument ([^:]+): ignored .*", r"argument \1: takes no value", message)
        message = re.sub("^argument ([^:]+): ", r"\1 ", message)
        raise UserError(message)

    def refuse(self, word: str) -> NoReturn:
        """Raise UserError for a word that is no option; names the option that may be meant."""
        option = word.partition("=")[0]
        if not option.startswith("-"):
            for action in self._actions:
                if not action.option_strings:
                    raise UserError(
                        f"{self.prog.split()[-1]} takes one {action.metavar}: drop {_REPR.repr(word)}"
                    )
            raise UserError(f"{_REPR.repr(word)} is not an option: see {self.prog} --help")
        known = [x for action in self._actions for x in action.option_strings]
        # Without the dashes, in which all are alike.
        bare = {x.lstrip("-"): x for x in known}
        near = difflib.get_close_matches(option.lstrip("-"), bare, n=1, cutoff=0.7)
        meant = [bare[x] for x in near]
        hint = f"did you mean {meant[0]}?" if meant else f"see {self.prog} --help"
        raise UserError(f"unknown option {_REPR.repr(option)}: {hint}")


def _joined(args: Sequence[str]) -> list[str]:
    """With - for _ in options, and negative numbers joined to theirs: argparse takes -1e5 for an option."""
    words: list[str] = []
    for word in args:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            words.append(option.replace("_", "-") + equals + value)
        elif re.match(r"-(\d|\.|inf|nan)", word) and re.match(
            "--[^=]+$", words[-1] if words else ""
        ):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _positionals(cls: type) -> str:
    names = (field.name.upper() for field, _ in _fields(cls) if field.metadata.get("positional"))
    return "".join(f"{name} " for name in names)


@functools.cache
def _groups(cls: type) -> dict[str, Any]:
    """Name -> dataclass, of the fields that are groups of options."""
    hints = typing.get_type_hints(cls)
    names = (field.name for field in dataclasses.fields(cls))
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


@functools.cache
def _fields(cls: type) -> list[tuple[Any, Any]]:
    """(field, type), of the others."""
    hints, groups = typing.get_type_hints(cls), _groups(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls) if f.name not in groups]


def _of(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """What was given of a dataclass's own fields; the others have their defaults."""
    names = (field.name for field, _ in _fields(cls))
    given = {name: values[name] for name in names if name in values}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _add(options: Any, field: Any, kind: Any, text: str | None) -> None:
    """Add the option, or the positional argument, of a field; without a text it is not in the help."""
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    about: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if text is not None:
        about["help"] = (text + _default(field)).replace("%", "%%")
    if kind is bool:
        about["action"] = argparse.BooleanOptionalAction
    else:
        about |= {"type": _reader(kind), "metavar": _metavar(kind)}
    if field.metadata.get("positional"):
        about |= {"nargs": "*" if many else "?", "metavar": field.name.upper()}
        options.add_argument(field.name, **about)
    else:
        if many:
            about["nargs"] = "*"
        name = flag(field.metadata.get("option", field.name))
        options.add_argument(name, dest=field.name, **about)


def _reader(kind: Any) -> Callable[[str], Any]:
    """Text -> value, for a type, a Literal or a union of them."""
    kinds = (kind,) if typing.get_origin(kind) is Literal else typing.get_args(kind) or (kind,)
    words = [word for k in kinds if typing.get_origin(k) is Literal for word in typing.get_args(k)]
    numbers = [k for k in kinds if k in _FORMS]

    def value(text: str) -> Any:
        if str in kinds or text in words:
            if "\0" in text:
                raise argparse.ArgumentTypeError(f"is {_REPR.repr(text)}: drop the null character")
            return text
        for number in numbers:
            try:
                return number(text)
            except ValueError:
                continue
        wanted = [_FORMS[number] for number in numbers] + words
        *first, last = wanted
        use = f"{', '.join(first)} or {last}" if first else last
        raise argparse.ArgumentTypeError(f"is {_REPR.repr(text)}: give {use}")

    return value


def _metavar(kind: Any) -> str:
    parts = (kind,) if typing.get_origin(kind) is Literal else typing.get_args(kind) or (kind,)
    names = []
    for part in parts:
        if typing.get_origin(part) is Literal:
            names += typing.get_args(part)
        elif part is not type(None):
            names.append({int: "N", float: "X", str: "TEXT"}[part])
    return "|".join(names)


def _default(field: Any) -> str:
    """The default as the help says it; "" where that says nothing."""
    value = field.default
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    unsaid = shown is False or shown in (None, "", dataclasses.MISSING)
    return "" if unsaid else f" (default: {shown})"
