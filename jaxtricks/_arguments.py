"""Check the types of arguments by their annotations where a call enters the library.

Without a check a wrong type ends where it first does harm: "'str' object is not
callable" names neither the function nor the argument. Values are checked by the
functions themselves.
"""

import collections.abc
import functools
import inspect
import itertools
import numbers
import re
import types
import typing
from collections.abc import Callable, Container
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import AbstractArray

Function = TypeVar("Function", bound=Callable[..., Any])


class ArgumentTypeError(TypeError, ValueError):
    """An argument of a wrong type; a ValueError too, as are all other mistakes in arguments."""


class _EveryType:
    """Stands for the set of all types."""

    def __contains__(self, kind: object) -> bool:
        return True


_EVERY_TYPE = _EveryType()
_PLAIN = (int, float, str, type(None))
"""Types of which either all values are right for an argument or none."""
_LOOKED_AT = 64
"""Items of a list that are looked at: a million labels would take longer than the loss."""


class _Kind(NamedTuple):
    """One of the types that an argument may have.

    Attributes:
      words: what it is called in an error.
      holds: whether a value is one.
      by_type: whether the type alone decides, so that the next value of it need not be
        looked at.
    """

    words: str
    holds: Callable[[Any], bool]
    by_type: bool = True


def checked(function: Function) -> Function:
    """Decorate a public function to raise a sentence for an argument of a wrong type.

    Annotations are read at the first call. What they leave open (Any, type variables,
    pytrees) is not checked, and a wrong number of arguments stays Python's own error.

    Raises:
      ArgumentTypeError: (from the decorated function) with the function's name, the
        argument's, the type that it has, never its contents, and the types that it may
        have.
    """
    parameters = list(inspect.signature(function).parameters.values())
    positional = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    rest = next(
        (p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None
    )
    kinds: dict[str, list[_Kind]] = {}
    # Types that were right for an argument before: the usual call is a look into a set
    # per argument.
    known: dict[str, Any] = {p.name: set() for p in parameters}
    read = False

    def check(name: str, value: Any) -> None:
        for kind in kinds[name]:
            if kind.holds(value):
                if kind.by_type or type(value) in _PLAIN:
                    known[name].add(type(value))
                return
        raise ArgumentTypeError(
            f"{_name(function)}: `{name}` is {described(value)}: give "
            f"{_listed(kinds[name])}"
        )

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal read
        if not read:
            kinds.update(_read(function))
            known.update(
                dict.fromkeys(known.keys() - kinds.keys(), _EVERY_TYPE)
            )
            read = True
        for name, value in zip(positional, args, strict=False):
            if type(value) not in known[name]:
                check(name, value)
        if rest is not None:
            for value in args[len(positional) :]:
                if type(value) not in known[rest]:
                    check(rest, value)
        for name, value in kwargs.items():
            if name in known and type(value) not in known[name]:
                check(name, value)
        return function(*args, **kwargs)

    return call  # pyrefly: ignore


def check_regex(subject: str, pattern: str) -> None:
    """Raise a ValueError that begins with the subject unless the pattern compiles."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{subject} {pattern!r} is not a regular expression: {error}"
        ) from None


def known_number(x: Any) -> float | None:
    """Return the value of a number or array []; None if traced, elsewhere or neither."""
    if isinstance(x, bool | jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return float(x) if _is_number(x) else None


def _read(function: Callable[..., Any]) -> dict[str, list[_Kind]]:
    """Return {argument: allowed kinds} where the annotations say so."""
    hints = typing.get_type_hints(function)
    kinds = {
        name: _kinds(hint) for name, hint in hints.items() if name != "return"
    }
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _kinds(hint: Any) -> list[_Kind] | None:
    """Return the kinds of values that an annotation names; None for anything."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments)
    if hint in _SIMPLE:
        return [_SIMPLE[hint]]
    if origin is typing.Literal:
        words = "one of " + ", ".join(repr(x) for x in arguments)
        return [_Kind(words, _instance(*{type(x) for x in arguments}))]
    if origin is collections.abc.Sequence:
        return [_sequence_of(arguments[0])]
    if origin in _GENERIC:
        return [_GENERIC[origin]]
    if not isinstance(hint, type) or hint in (Any, object):
        return None
    if issubclass(hint, AbstractArray):
        return [_array_of(hint)]
    if issubclass(hint, tuple) and hasattr(hint, "_fields"):
        # A NamedTuple such as optax.GradientTransformation is known by what it has.
        return [
            _Kind(
                f"a {hint.__name__}",
                lambda x: all(hasattr(x, f) for f in hint._fields),
                False,
            )
        ]
    return [_Kind(f"a {hint.__name__}", _instance(hint))]


def _union(hints: tuple[Any, ...]) -> list[_Kind] | None:
    if {jax.Array, np.ndarray} <= set(hints):
        # Beside numbers it is a scalar: a number, or an array from one.
        array = [] if float in hints else [np.ndarray]
        hints = (
            *(
                h
                for h in hints
                if h not in (int, np.generic, jax.Array, np.ndarray)
            ),
            *array,
        )
    if any(isinstance(h, type) and issubclass(h, AbstractArray) for h in hints):
        # Lists are checked as arrays.
        hints = tuple(h for h in hints if h != collections.abc.Sequence[Any])
    unique: list[_Kind] = []
    for hint in hints:
        kinds = _kinds(hint)
        if kinds is None:
            return None
        unique += [
            kind
            for kind in kinds
            if kind.words not in [other.words for other in unique]
        ]
    return unique


def _instance(*classes: type) -> Callable[[Any], bool]:
    def holds(x: Any) -> bool:
        return isinstance(x, classes) and (
            bool in classes or not isinstance(x, bool)
        )

    return holds


def _is_number(x: Any) -> bool:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return _dtype_kind(x.dtype) in "if" and len(x.shape) == 0
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _is_integer(x: Any) -> bool:
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return _dtype_kind(x.dtype) == "i" and len(x.shape) == 0
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_key(x: Any) -> bool:
    """Return whether it is a PRNG key, typed or legacy."""
    return hasattr(x, "dtype") and (
        _dtype_kind(x.dtype) == "k" or x.dtype == np.uint32
    )


def _is_array(
    x: Any, letters: Container[str] = "ifcbk", ranks: Container[int] = range(99)
) -> bool:
    """Return whether it is an array, or a shape, of these kinds and ranks."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return _dtype_kind(x.dtype) in letters and len(x.shape) in ranks
    if _is_sequence(x):
        parts = itertools.islice(x, _LOOKED_AT)
        return (
            _rank(x) in ranks
            and len(x) > 0
            and all(_is_array(p, letters) for p in parts)
        )
    if hasattr(x, "__jax_array__"):
        return True
    if 0 not in ranks:
        return False
    if isinstance(x, bool):
        return "b" in letters
    if isinstance(x, numbers.Real):
        return "f" in letters or (
            isinstance(x, numbers.Integral) and "i" in letters
        )
    return isinstance(x, complex) and "c" in letters


def _is_sequence(x: Any) -> bool:
    return isinstance(x, collections.abc.Sequence) and not isinstance(
        x, str | bytes
    )


def _rank(x: Any) -> int:
    """Return the rank of an array, or of a list by its first items."""
    if _is_sequence(x):
        return 1 + (_rank(x[0]) if len(x) else 0)
    return len(getattr(x, "shape", ()))


def _array_of(hint: Any) -> _Kind:
    """Return the kind of a jaxtyping annotation: dtypes and rank."""
    listed = isinstance(hint.dtypes, list | tuple)
    letters = (
        {_letter(name) for name in hint.dtypes} if listed else set("ifcbk")
    )
    if letters == {"b"}:
        letters = {"b", "i"}  # masks of 0 and 1
    of = {
        "b": "booleans", "i": "integers", "f": "floating numbers", "fi": "real numbers",
        "bi": "booleans",
    }.get("".join(sorted(letters)), "numbers")  # fmt: skip
    axes = hint.dim_str.split()
    fixed = [axis for axis in axes if not axis.startswith(("*", "..."))]
    ranks = range(len(fixed), 99 if len(fixed) < len(axes) else len(fixed) + 1)
    holds = functools.partial(_is_array, letters=letters, ranks=ranks)
    return _Kind(f"an array [{', '.join(axes)}] of {of}", holds, False)


def _sequence_of(hint: Any) -> _Kind:
    """Return the kind of a sequence whose items follow an annotation."""
    items = _kinds(hint)

    def holds(x: Any) -> bool:
        if not _is_sequence(x) and not (
            isinstance(x, np.ndarray | jax.Array) and x.ndim
        ):
            return False
        if items is None:
            return True
        return all(
            any(kind.holds(item) for kind in items)
            for item in itertools.islice(x, _LOOKED_AT)
        )

    of = "" if items is None else f" of {_plural(items[0].words)}"
    return _Kind(f"a sequence{of}", holds, False)


def _plural(words: str) -> str:
    return f"{words.removeprefix('an ').removeprefix('a ')}s"


def _letter(dtype: str) -> str:
    for prefix, letter in (
        ("bool", "b"),
        ("complex", "c"),
        ("float", "f"),
        ("bfloat", "f"),
    ):
        if dtype.startswith(prefix):
            return letter
    if dtype.startswith(("int", "uint")):
        return "i"
    return "k" if dtype.startswith("key") else "?"


@functools.cache
def _dtype_kind(dtype: Any) -> str:
    """Return a letter: integer, floating, complex, bool, key, or ? for the rest."""
    return _letter(str(dtype))


_NUMBER = _Kind("a number", _is_number, False)
_INTEGER = _Kind("a whole number", _is_integer, False)
_MAPPING = _Kind("a dict", _instance(collections.abc.Mapping))
_FUNCTION = _Kind("a function", callable)
_SIMPLE = {
    type(None): _Kind("None", lambda x: x is None),
    bool: _Kind("True or False", _instance(bool, np.bool_)),
    int: _INTEGER,
    np.integer: _INTEGER,
    float: _NUMBER,
    np.generic: _NUMBER,
    np.number: _NUMBER,
    str: _Kind("a string", _instance(str)),
    jax.Array: _Kind("a key (jax.random.key)", _is_key, False),
    np.ndarray: _Kind("an array", _is_array, False),
}
_GENERIC = {
    collections.abc.Callable: _FUNCTION,
    collections.abc.Iterable: _Kind(
        "an iterable",
        lambda x: (
            hasattr(x, "__iter__")
            and not isinstance(x, str | bytes | np.ndarray | jax.Array)
        ),
    ),
    collections.abc.Mapping: _MAPPING,
    dict: _MAPPING,
    tuple: _Kind("a tuple", _instance(tuple, list)),
    list: _Kind("a list", _instance(list, tuple)),
    type: _Kind("a class", _instance(type)),
}


def _name(function: Callable[..., Any]) -> str:
    """Return the room and the function: "longtail.balanced_softmax"."""
    room = function.__module__.removeprefix("jaxtricks.").split(".")[0]
    return (
        f"{room}.{function.__qualname__.removesuffix('.__call__').lstrip('_')}"
    )


def described(x: Any) -> str:
    """Describe a value by its type, dtype and shape, never by its contents."""
    if x is None:
        return "None"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"an array of {x.dtype} {list(x.shape)}"
    name = type(x).__name__
    if isinstance(x, list | tuple):
        items = sorted({type(item).__name__ for item in x[:_LOOKED_AT]})
        return (
            f"a {name} of {' and '.join(items)}"
            if items
            else f"an empty {name}"
        )
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _listed(kinds: list[_Kind]) -> str:
    words = [kind.words for kind in kinds]
    return (
        words[0]
        if len(words) == 1
        else f"{', '.join(words[:-1])} or {words[-1]}"
    )
