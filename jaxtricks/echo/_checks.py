"""Check callers' numbers and restored states; name what is wrong in one sentence."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

MOST_COPIES = 1000
"""The largest factor: the calendar of an element has a row for every copy."""

MOST_READ = 2**63 - 1
"""More elements than a stream ever reads; Grain's longest range, which the lab reads over, has as many."""

_SHOWN = (bool, int, float, complex, str, bytes, type(None), np.generic)


def whole(
    name: str, value: Any, least: int = 1, most: int | None = None
) -> int:
    """Return the argument as an int from `least` to `most`.

    Args:
      name: the function and its argument, as in "echo.echo: `distance`".
      value: what the caller passed.
      least: the smallest number allowed.
      most: the largest one, or None.

    Raises:
      ValueError: naming the argument, if it is anything else.
    """
    number = index(value)
    if number is None or number < least or (most is not None and number > most):
        allowed = (
            f"a whole number >= {least}"
            if most is None
            else f"a whole {least} to {most}"
        )
        raise ValueError(f"{name} is {spell(value)}: pass {allowed}")
    return number


def index(value: Any) -> int | None:
    """Return the value as an int if it is a whole number of an integer type."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def spell(value: Any) -> str:
    """Spell a scalar, and the type of anything else: errors never print an array."""
    if not isinstance(value, _SHOWN):
        return f"of type {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def field(
    state: Mapping[str, Any], name: str, least: int = 0, most: int = MOST_READ
) -> int:
    """Return a whole number of a state.

    Raises:
      ValueError: if it is not there, or not from `least` to `most`.
    """
    number = index(state[name])
    if number is None or not least <= number <= most:
        raise damaged(name, state[name])
    return number


def numbers(
    state: Mapping[str, Any], name: str, allowed: Callable[[int], bool]
) -> list[int]:
    """Return a list of whole numbers of a state; raise ValueError for anything else."""
    values = state[name]
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise damaged(name, values)
    whole_numbers = []
    for value in values:
        number = index(value)
        if number is None or not allowed(number):
            raise damaged(name, value)
        whole_numbers.append(number)
    return whole_numbers


def damaged(name: str, value: Any) -> ValueError:
    """Build the error for a value that `get_state` never writes."""
    return ValueError(
        f"echo: the state is damaged, its `{name}` is {spell(value)}: pass one "
        "that get_state() returned"
    )


@contextlib.contextmanager
def states_of_others() -> Iterator[None]:
    """Name the state where the source's `set_state` fails over its contents."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            "echo: `source` cannot return to its state "
            f"({type(error).__name__}: {error}): pass a state that get_state() "
            "returned for this source"
        ) from error
