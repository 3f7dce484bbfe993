"""Schedule copies: how many per element, and at which outputs."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxtricks._arguments import checked
from jaxtricks.echo import _checks

CHANGES = 64
"""Number of changes of the factor in a state; a resume needs no older ones."""

Change = tuple[int, Fraction]  # (first element it holds for, factor)


@runtime_checkable
class Copies(Protocol):
    """A rule, and how far a stream has got with it.

    Attributes:
      most: the most copies that an element can make.
    """

    most: int

    def take(self, i: int, element: Any) -> int:
        """Return the copies of element i; called once per element, in order."""
        ...

    def forget(self) -> None:
        """Move the start of a resume one element later."""
        ...

    def state(self) -> Any:
        """Return what `take` needs where a resume begins; JSON of a fixed shape."""
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
        """Return the copies of element i."""
        if self._down == 1:
            return self._up
        return (i + 1) * self._up // self._down - i * self._up // self._down

    def forget(self) -> None:
        """Do nothing: nothing is counted."""

    def state(self) -> None:
        """Return None: nothing is counted."""

    def check(self, state: Any, first: int) -> None:
        """Raise ValueError unless the state is None."""
        if state is not None:
            raise _checks.damaged("copies", state)

    def restore(self, state: Any) -> None:
        """Do nothing: nothing is counted."""


class PerClass:
    """The same rule within each class: element number j of class c makes copies_c(j)."""

    def __init__(
        self, factors: Sequence[Fraction], class_of: Callable[[Any], int]
    ):
        self._rules = [Constant(factor) for factor in factors]
        self._class_of = class_of
        self.most = max(rule.most for rule in self._rules)
        self.restore([0] * len(factors))

    def __str__(self) -> str:
        return f"factors {', '.join(str(rule.factor) for rule in self._rules)}"

    def take(self, i: int, element: Any) -> int:
        """Return the copies of the element, of class class_of(element)."""
        c = self._class_of(element)
        if not 0 <= c < len(self._rules):
            raise ValueError(
                f"echo.echo: `class_of` gives {c} for element {i}, and "
                f"`factor` has {len(self._rules)} classes: it must give 0 to "
                f"{len(self._rules) - 1}"
            )
        j = self._seen[c]
        self._seen[c] = j + 1
        self._classes.append(c)
        return self._rules[c].take(j)

    def forget(self) -> None:
        """Count the oldest element as gone."""
        self._gone[self._classes.popleft()] += 1

    def state(self) -> list[int]:
        """Return the elements per class before the one where a resume begins."""
        return list(self._gone)

    def check(self, state: Any, first: int) -> None:
        """Check a count per class, of all elements before the first one."""
        counts = _checks.numbers(
            {"copies": state}, "copies", lambda count: count >= 0
        )
        if len(counts) != len(self._rules) or sum(counts) != first:
            raise _checks.damaged("copies", state)

    def restore(self, state: Sequence[int]) -> None:
        """Go back to these counts."""
        self._gone, self._seen = list(state), list(state)
        self._classes: collections.deque[int] = collections.deque()


class Changing:
    """A factor that changes at given elements, by which `factor="auto"` is replayed."""

    def __init__(self, changes: Sequence[Change], most: int):
        self.changes = tuple(changes)
        self.most = most
        self._enter(0)

    def __str__(self) -> str:
        return f"changing factor, at most {self.most}"

    @property
    def factor(self) -> Fraction:
        """Return the newest factor."""
        return self.changes[-1][1]

    def take(self, i: int, element: Any = None) -> int:
        """Return the copies of element i."""
        while (
            self._at + 1 < len(self.changes)
            and i >= self.changes[self._at + 1][0]
        ):
            self._enter(self._at + 1)
        return self._rule.take(i - self._since)

    def change(self, i: int, factor: Fraction) -> None:
        """Let the factor be another one from element i on."""
        self.changes = (*self.changes, (i, factor))

    def forget(self) -> None:
        """Do nothing: changes stay until there are too many."""

    def state(self) -> list[list[int]]:
        """Return the newest changes as [element, numerator, denominator], padded with -1."""
        rows = [
            [i, f.numerator, f.denominator] for i, f in self.changes[-CHANGES:]
        ]
        return rows + [[-1, -1, -1]] * (CHANGES - len(rows))

    def check(self, state: Any, first: int) -> None:
        """Check rows as `state` returns them: rising elements, factors in range."""
        rows = (
            state
            if isinstance(state, Sequence) and len(state) == CHANGES
            else [state]
        )
        before = -1
        for row in rows:
            numbers = _checks.numbers(
                {"copies": row}, "copies", lambda number: number >= -1
            )
            if numbers == [-1, -1, -1] and before >= 0:
                continue
            if len(numbers) != 3 or numbers[0] <= before or numbers[2] < 1:
                raise _checks.damaged("copies", state)
            if not numbers[2] <= numbers[1] <= self.most * numbers[2]:
                raise _checks.damaged("copies", state)
            before = numbers[0]

    def restore(self, state: Sequence[Sequence[int]]) -> None:
        """Take over the changes of a state."""
        self.changes = tuple(
            (i, Fraction(up, down)) for i, up, down in state if i >= 0
        )
        self._enter(0)

    def _enter(self, at: int) -> None:
        self._at = at
        self._since, factor = self.changes[at]
        self._rule = Constant(factor)


def rational(factor: object) -> Fraction:
    """Return the factor as an exact fraction; a float is read to 1/1000."""
    if isinstance(factor, float | np.floating):
        if not math.isfinite(factor):
            raise ValueError(
                f"echo.echo needs a finite `factor`, got {factor}: 2 is a good start"
            )
        factor = Fraction(float(factor)).limit_denominator(1000)
    if not isinstance(factor, Fraction):
        number = _checks.index(factor)
        if number is None:
            said = _checks.spell(factor)
            raise ValueError(
                f'echo.echo: `factor` is {said}: pass a number >= 1, or "auto"'
            )
        factor = Fraction(number)
    if factor < 1:
        raise ValueError(
            f"echo.echo needs `factor` >= 1, got {factor}: it cannot drop elements"
        )
    if factor > _checks.MOST_COPIES:
        raise ValueError(
            f"echo.echo needs `factor` <= {_checks.MOST_COPIES}, got "
            f"{float(min(factor, 10**300)):.6g}: repeat less, or clip the "
            "factors of the rarest classes"
        )
    return factor


# When each copy goes out: pure integer arithmetic, the same for every kind of source.
#
# Time is counted in ticks; tick t reads element t. An element goes out once in each of
# its rounds: round r of element i is in tick i + lag_r, and within a tick the freshest
# element comes first. With e = whole + f an element has whole + 1 copies or, where f
# says so, whole: then it sits out one round.
#
# `adjacent` has lag 0 throughout. `spread` with distance D has lag_r = r (D - 1). The
# round that some elements sit out is the last but one, so that the first round is full,
# which carries the start of the stream, and the last one is, which carries the drain.
# Below e = 2 there is no round between: the second one is thin, and comes (D - 1) / f
# ticks after the first instead, rounded up.
#
# Why that keeps the distance: between two rounds of element i there are at least the
# elements that follow it in the full round before, or where the source has ended, the
# elements that precede it in the full round after; D - 1 of either. In a thin last
# round (D - 1) / f consecutive elements hold D - 1 that take part. The tests prove it
# by brute force.
#
# A source that is too short for D gets less: an engine that reads at most once per
# output cannot do better than spread the floor(n e) - 1 - i outputs that are left after
# reading element i.


@dataclasses.dataclass(frozen=True)
class Calendar:
    """The ticks of all copies.

    Attributes:
      factor: mean number of copies e >= 1, exact.
      distance: least difference of output indices between consecutive copies of one
        element.
      lags: ticks from the reading of an element to each of its rounds; lags[0] is 0.
      thin: the round that elements with fewer copies sit out (none does if e is whole).
    """

    factor: Fraction
    distance: int
    lags: tuple[int, ...]
    thin: int

    def lags_of(self, copies: int) -> tuple[int, ...]:
        """Return the ticks from reading an element to each of its copies."""
        if copies == len(self.lags):
            return self.lags
        return self.lags[: self.thin] + self.lags[self.thin + 1 :]

    @property
    def age(self) -> int:
        """Return the ticks from reading an element to its last round, which a resume reads."""
        return self.lags[-1]

    @property
    def held(self) -> int:
        """Return the largest number of elements that wait for a copy."""
        thin_last = self.factor < 2
        return (
            math.ceil(self.lags[-1] * (self.factor - 1))
            if thin_last
            else self.lags[-1]
        )

    def least_distance(self, n: int) -> int:
        """Return the least distance over a source of n elements, drain included.

        Equal to `distance`, or smaller where the source is too short for it; `distance`
        itself where no element has a second copy.
        """
        # Away from the ends every distance is the same or more: look at those that
        # touch the drain.
        i = np.arange(max(0, n - 2 * self.age - 2), n)
        full = self._takers(i + 1, self.thin) > self._takers(i, self.thin)
        rounds = range(len(self.lags))
        least = min(
            (self._gap(i[full], r - 1, r, n) for r in rounds[1:]),
            default=self.distance,
        )
        if 0 < self.thin < len(self.lags) - 1:
            least = min(
                least, self._gap(i[~full], self.thin - 1, self.thin + 1, n)
            )
            others = [
                r for r in rounds[1:] if r not in (self.thin, self.thin + 1)
            ]
            least = min(
                [least, *(self._gap(i[~full], r - 1, r, n) for r in others)]
            )
        return least

    def _gap(self, i: np.ndarray, before: int, after: int, n: int) -> int:
        gaps = self._position(i, after, n) - self._position(i, before, n)
        return int(min(gaps.min(initial=self.distance), self.distance))

    def _position(self, i: np.ndarray, r: int, n: int) -> np.ndarray:
        """Return the output index of element i in round r."""
        tick = i + self.lags[r]
        out = np.zeros_like(i)
        for other, lag in enumerate(self.lags):
            # In the same tick, lower rounds come first.
            until = tick - lag + (other < r)
            out += self._takers(np.clip(until, 0, n), other)
        return out

    def _takers(self, n: np.ndarray, r: int) -> np.ndarray:
        """Return how many of the first n elements take part in round r."""
        if r != self.thin:
            return n
        short = len(self.lags) - 1
        return n * self.factor.numerator // self.factor.denominator - short * n


@dataclasses.dataclass(frozen=True)
class VaryingCalendar:
    """The ticks of copies whose number is not known before an element is read.

    Copy k comes k (D - 1) ticks after the first one. While the source lasts every tick
    has a first copy, so that the distance holds; the drain is planned when it begins,
    see `_streams.drain`.

    Attributes:
      most: the most copies of an element.
      distance: least difference of output indices between consecutive copies of one
        element.
    """

    most: int
    distance: int

    def lags_of(self, copies: int) -> tuple[int, ...]:
        """Return the ticks from reading an element to each of its copies."""
        return tuple(k * (self.distance - 1) for k in range(copies))

    @property
    def age(self) -> int:
        """Return the ticks from reading an element to its last possible copy."""
        return (self.most - 1) * (self.distance - 1)

    @property
    def held(self) -> int:
        """Return the largest number of elements that wait for a copy."""
        return self.age


def adjacent(factor: Fraction) -> Calendar:
    """Repeat every element in a row, as flat_map(repeat) does."""
    rounds = math.ceil(factor)
    return Calendar(factor, 1, (0,) * rounds, thin=rounds - 1)


def spread(factor: Fraction, distance: int) -> Calendar:
    """Place consecutive copies of an element at least `distance` outputs apart."""
    rounds = math.ceil(factor)
    if 1 < factor < 2:
        lags = (0, math.ceil((distance - 1) / (factor - 1)))
    else:
        lags = tuple(r * (distance - 1) for r in range(rounds))
    return Calendar(
        factor, distance, lags, thin=max(rounds - 2, 1) if rounds > 1 else 0
    )


def total(factor: Fraction, n: int) -> int:
    """Return the number of outputs of n elements: floor(n e)."""
    return n * factor.numerator // factor.denominator


@checked
def num_steps(fresh: int, batch: int, factor: float | Fraction) -> int:
    """Return the full batches of an echoed epoch: floor(fresh e) // batch.

    Build learning-rate schedules from this, not from the size of the data set.

    Args:
      fresh: elements of the source before echoing.
      batch: elements per batch after echoing (1 for an echo of whole batches).
      factor: the echo factor e.

    Returns:
      The number of steps.

    Raises:
      ValueError: if batch < 1, fresh < 0 or factor < 1, or if one of the first two is
        not whole.

    >>> num_steps(1000, 32, 2.5)
    78
    """
    batch = _checks.whole("echo.num_steps: `batch`", batch)
    return (
        total(
            rational(factor), _checks.whole("echo.num_steps: `fresh`", fresh, 0)
        )
        // batch
    )
