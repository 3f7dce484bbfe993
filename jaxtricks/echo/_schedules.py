"""How many copies each element makes: a mean factor, one for every class, or one that changes."""

import collections
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxtricks.echo import _checks

CHANGES = 64
"""Changes of the factor that a state keeps; older ones are no longer needed to go on."""

Change = tuple[int, Fraction]  # (first element it holds for, factor)


@runtime_checkable
class Copies(Protocol):
    """A rule, and how far a stream has got with it.

    Attributes:
      most: the most copies that an element can make.
    """

    most: int

    def take(self, i: int, element: Any) -> int:
        """Copies of the element read as number i; asked once each, in order."""
        ...

    def forget(self) -> None:
        """A resume will begin one element later than before."""
        ...

    def state(self) -> Any:
        """What `take` needs to know where a resume begins; JSON of a fixed shape."""
        ...

    def check(self, state: Any, first: int) -> None:
        """Raise ValueError unless it is a state of this rule at element `first`."""
        ...

    def restore(self, state: Any) -> None:
        """Go back to that."""
        ...


class Constant:
    """copies(i) = floor((i + 1) e) - floor(i e)."""

    def __init__(self, factor: Fraction):
        self.factor = factor
        self.most = math.ceil(factor)
        self._up, self._down = factor.numerator, factor.denominator

    def __str__(self) -> str:
        return f"factor {self.factor}"

    def take(self, i: int, element: Any = None) -> int:
        """Copies of element i."""
        if self._down == 1:
            return self._up
        return (i + 1) * self._up // self._down - i * self._up // self._down

    def forget(self) -> None:
        """Nothing is counted."""

    def state(self) -> None:
        """Nothing is counted."""

    def check(self, state: Any, first: int) -> None:
        """Nothing is counted."""
        if state is not None:
            raise _checks.damaged("copies", state)

    def restore(self, state: Any) -> None:
        """Nothing is counted."""


class PerClass:
    """The same rule within each class: element number j of class c makes copies_c(j)."""

    def __init__(self, factors: Sequence[Fraction], class_of: Callable[[Any], int]):
        self._rules = [Constant(factor) for factor in factors]
        self._class_of = class_of
        self.most = max(rule.most for rule in self._rules)
        self.restore([0] * len(factors))

    def __str__(self) -> str:
        return f"factors {', '.join(str(rule.factor) for rule in self._rules)}"

    def take(self, i: int, element: Any) -> int:
        """Copies of the element, which is of class class_of(element)."""
        c = self._class_of(element)
        if not 0 <= c < len(self._rules):
            raise ValueError(
                f"echo.echo: `class_of` gives {c} for element {i}, and `factor` has "
                f"{len(self._rules)} classes: it must give 0 to {len(self._rules) - 1}"
            )
        j = self._seen[c]
        self._seen[c] = j + 1
        self._classes.append(c)
        return self._rules[c].take(j)

    def forget(self) -> None:
        """Count the oldest element as gone."""
        self._gone[self._classes.popleft()] += 1

    def state(self) -> list[int]:
        """Elements of each class before the one where a resume begins."""
        return list(self._gone)

    def check(self, state: Any, first: int) -> None:
        """A count for each class, of all elements before the first one."""
        counts = _checks.numbers({"copies": state}, "copies", lambda count: count >= 0)
        if len(counts) != len(self._rules) or sum(counts) != first:
            raise _checks.damaged("copies", state)

    def restore(self, state: Sequence[int]) -> None:
        """Go back to these counts."""
        self._gone, self._seen = list(state), list(state)
        self._classes: collections.deque[int] = collections.deque()


class Changing:
    """A factor that holds from one element on, until the next: how `factor="auto"` is replayed."""

    def __init__(self, changes: Sequence[Change], most: int):
        self.changes = tuple(changes)
        self.most = most
        self._enter(0)

    def __str__(self) -> str:
        return f"changing factor, at most {self.most}"

    @property
    def factor(self) -> Fraction:
        """The newest factor."""
        return self.changes[-1][1]

    def take(self, i: int, element: Any = None) -> int:
        """Copies of element i."""
        while self._at + 1 < len(self.changes) and i >= self.changes[self._at + 1][0]:
            self._enter(self._at + 1)
        return self._rule.take(i - self._since)

    def change(self, i: int, factor: Fraction) -> None:
        """Let the factor be another one from element i on."""
        self.changes = (*self.changes, (i, factor))

    def forget(self) -> None:
        """All changes are kept until there are too many."""

    def state(self) -> list[list[int]]:
        """The newest changes as [element, numerator, denominator], filled up with -1."""
        rows = [[i, f.numerator, f.denominator] for i, f in self.changes[-CHANGES:]]
        return rows + [[-1, -1, -1]] * (CHANGES - len(rows))

    def check(self, state: Any, first: int) -> None:
        """Rows as `state` gives them: elements that go up, factors from 1 to the most."""
        rows = state if isinstance(state, Sequence) and len(state) == CHANGES else [state]
        before = -1
        for row in rows:
            numbers = _checks.numbers({"copies": row}, "copies", lambda number: number >= -1)
            if numbers == [-1, -1, -1] and before >= 0:
                continue
            if len(numbers) != 3 or numbers[0] <= before or numbers[2] < 1:
                raise _checks.damaged("copies", state)
            if not numbers[2] <= numbers[1] <= self.most * numbers[2]:
                raise _checks.damaged("copies", state)
            before = numbers[0]

    def restore(self, state: Sequence[Sequence[int]]) -> None:
        """Take over the changes of a state."""
        self.changes = tuple((i, Fraction(up, down)) for i, up, down in state if i >= 0)
        self._enter(0)

    def _enter(self, at: int) -> None:
        self._at = at
        self._since, factor = self.changes[at]
        self._rule = Constant(factor)


def rational(factor: object) -> Fraction:
    """The factor as an exact fraction: 2.5 is 5/2, and a float like 1.1 the nearest of 1/1000 parts."""
    if isinstance(factor, float | np.floating):
        if not math.isfinite(factor):
            raise ValueError(f"echo.echo needs a finite `factor`, got {factor}: 2 is a good start")
        factor = Fraction(float(factor)).limit_denominator(1000)
    if not isinstance(factor, Fraction):
        number = _checks.index(factor)
        if number is None:
            said = _checks.spell(factor)
            raise ValueError(f'echo.echo: `factor` is {said}: pass a number >= 1, or "auto"')
        factor = Fraction(number)
    if factor < 1:
        raise ValueError(f"echo.echo needs `factor` >= 1, got {factor}: it cannot drop elements")
    if factor > _checks.MOST_COPIES:
        raise ValueError(
            f"echo.echo needs `factor` <= {_checks.MOST_COPIES}, got {float(min(factor, 10**300)):.6g}: "
            "repeat less, or clip the factors of the rarest classes"
        )
    return factor
