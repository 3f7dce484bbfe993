"""Convert integers of every type, NumPy's and arrays [], to Python's."""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def plain(value: int | Sequence[int]) -> int | tuple[int, ...]:
    """Return an integer as a Python int, a sequence of them as a tuple.

    Raises:
      TypeError: an item that is not an integer.
    """
    return (
        operator.index(value)
        if is_integer(value)
        else tuple(map(operator.index, value))
    )


def listed(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return integers as a tuple, also a single one."""
    numbers = plain(value)
    return (numbers,) if isinstance(numbers, int) else numbers


def positions(
    argnums: int | Sequence[int], count: int, name: str = "argnums"
) -> tuple[int, ...]:
    """Return the positions of differentiated arguments; negative ones count back.

    Args:
      argnums: the positions.
      count: of the arguments.
      name: what the positions are called in an error.

    Raises:
      ValueError: a position of no argument.
    """
    numbers = listed(argnums)
    if any(not -count <= i < count for i in numbers):
        raise ValueError(
            f"{name}={argnums} is of no argument: give positions among the "
            f"{count} that fn takes here"
        )
    return tuple(i % count for i in numbers)


def is_integer(value: object) -> "TypeIs[int]":
    """Return whether it can serve as an index; arrays with axes cannot."""
    try:
        operator.index(value)  # pyrefly: ignore
    except TypeError:
        return False
    return True
