"""The options of a command from its dataclass of settings, and sentences on those that can't be read."""

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
from jaxtricks.lab.config import (
    Ablate,
    Compare,
    Explain,
    Fuse,
    HostLostError,
    LrFind,
    Plan,
    Train,
    UserError,
    docs,
    flag,
)

_REPR = reprlib.Repr()
_REPR.maxstring = 60
_FORMS = {int: "a whole number", float: "a number"}


def read(cls: type, prog: str, args: Sequence[str]) -> Any:
    """An instance of a command's settings.

    Args:
      cls: a frozen dataclass; fields that are dataclasses are groups of options. A field's metadata may
        say "positional", or the "option" that it is called; `cls.UNUSED` are options that are read, and
        left out of the help.
      prog: how the command is called, such as jaxtricks train.
      args: the words after it.

    Raises:
      UserError: an unknown option, or a value that can't be read.
    """
    parser = _parser(cls, prog, helping=not {"-h", "--help"}.isdisjoint(args))
    given, unknown = parser.parse_known_args(_joined(args))
    if unknown:
        parser.refuse(unknown[0])
    values = vars(given)
    groups = {n: group(**_of(group, values)) for n, group in _groups(cls).items()}
    return cls(**groups, **_of(cls, values))


@functools.cache
def _parser(cls: type, prog: str, *, helping: bool) -> "_Parser":
    """The parser of a command; reading the texts of its help takes longer than parsing."""
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


# --------------------------------------------------------------------------------------------------
# The cards of the rooms, read without importing them.
# --------------------------------------------------------------------------------------------------


def card(key: str) -> str:
    """A room's card: its module docstring, read without importing it.

    Raises:
      UserError: not one of the ten.
    """
    Explain(key).check()
    spec = importlib.util.find_spec(f"jaxtricks.{key.lower()}")
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""


# --------------------------------------------------------------------------------------------------
# What the commands of the lab are and what each does. Parsing imports no jax.
# --------------------------------------------------------------------------------------------------


COMMANDS = {
    "train": Train,
    "compare": Compare,
    "lr-find": LrFind,
    "fuse": Fuse,
    "ablate": Ablate,
    "plan": Plan,
    "explain": Explain,
}
Command = Train | Compare | LrFind | Fuse | Ablate | Plan | Explain


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
    cfg = read(COMMANDS[name], f"jaxtricks {name}", rest)
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
        case Plan():
            _plan(cfg, command)
        case Train():
            _train(cfg, command)


def _train(cfg: Train, command: str) -> None:
    from jaxtricks import plot
    from jaxtricks.lab import report, rundir
    from jaxtricks.lab.commands import train

    if cfg.check_data:
        train.check_data(cfg)
    elif train.run(cfg, command) is not None:
        made = rundir.read(cfg.out)
        unit = "nats per character" if made.is_text else "nats"
        pictures = {"curves.png": plot.curves(made.rows, unit=unit)}
        if not made.is_text:
            sizes = report.group_sizes(made.about["data"]["counts"])
            pictures["groups.png"] = plot.groups(made.result, sizes)
        for name, figure in pictures.items():
            _draw(figure, made.path / name)
        report.write(made, tuple(pictures))


def _compare(cfg: Compare) -> None:
    from jaxtricks.lab import rundir
    from jaxtricks.lab.commands import compare

    found = [rundir.read(path) for path in cfg.runs]
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
    from jaxtricks.lab.commands import ablate

    rows = ablate.run(cfg, command)
    _draw(plot.ablation(rows), pathlib.Path(cfg.out) / ablate.PICTURE)


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


# --------------------------------------------------------------------------------------------------
# The command line: train | compare | lr-find | fuse | ablate | plan | explain.
#
# explain, --help and --version need nothing but the core; the others need jaxtricks[lab], and say so.
# --------------------------------------------------------------------------------------------------


__all__ = ["card", "main", "parse"]

USER_ERROR, TRY_AGAIN = 2, 75
# What the extra brings, by the names that are imported.
_LAB = {"PIL", "flatbuffers", "grain", "matplotlib", "orbax", "rich", "safetensors", "simplejpeg"}
_LAB |= {"sklearn"}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; exits with 2 and one sentence on a user's mistake."""
    args = list(sys.argv[1:] if args is None else args)
    guarded(lambda: _main(args), args[0] if args else "")


def guarded(action: Callable[[], None], name: str) -> None:
    """Call a command; on a user's mistake exit with 2 and one sentence."""
    try:
        action()
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _LAB:
            raise
        print(
            f"jaxtricks: {name} needs {error.name}: pip install 'jaxtricks[lab]'",
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


def _main(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    if args[0] == "--version":
        print(versions())
        return
    run(parse(args), "jaxtricks " + shlex.join(args))


def _leave(code: int) -> None:
    """Exit; one of several processes has to see to it that the others don't wait for it."""
    if "jax" in sys.modules:
        from jaxtricks.lab import distributed

        distributed.leave(code)
    sys.exit(code)
