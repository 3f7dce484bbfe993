"""What `echo` was asked for, checked, and the streams it makes."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from jaxtricks.echo import schedule as schedules
from jaxtricks.echo._auto_factor import Tuner
from jaxtricks.echo._schedules import Change, Changing, Constant, Copies, PerClass
from jaxtricks.echo._streams import Source, Stream
from jaxtricks.echo.engine import CalendarStream
from jaxtricks.echo.pool import PoolStream
from jaxtricks.echo.reading import ReadAhead
from jaxtricks.echo.schedule import Calendar, VaryingCalendar

Factor = Fraction | tuple[Fraction, ...] | tuple[Change, ...]
"""Of all elements, of each class, or from one element on until the next."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a stage.

    Attributes:
      schedule: "spread", "adjacent" or "pool".
      factor: of all elements, of each class, or (element, factor) pairs.
      auto: whether the pairs go on by measuring.
      most: the most copies of an element.
      distance: outputs between copies, or the size of the pool; less if max_bytes asks for it.
      least: what the distance may not be less than.
      batch_size: outputs in a batch, as far as is known.
      max_bytes, class_of, tag, guard, seed: as `echo` has them.
    """

    schedule: str
    factor: Factor
    auto: bool
    most: int
    distance: int
    least: int
    batch_size: int
    max_bytes: int | None
    class_of: Callable[[Any], int] | None
    tag: bool
    guard: bool
    seed: int

    def __str__(self) -> str:
        parts = [self.schedule, str(self._copies())]
        if self.schedule != "adjacent":
            parts.append(f"distance {self.distance}")
        if self.max_bytes is not None:
            parts.append(f"max_bytes {self.max_bytes}")
        if self.schedule == "pool":
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    def stream(self, source: Source, elements: int = -1) -> Stream:
        """A stream of its outputs; elements is the length of the source, where that is to be checked."""
        copies, tuner = self._copies(), None
        if self.auto and isinstance(copies, Changing):
            source = ahead = ReadAhead(source)
            tuner = Tuner(copies, lambda: ahead.busy, batch_size=self.batch_size)
        shared = {
            "name": str(self),
            "elements": elements,
            "tag": self.tag,
            "guard": self.guard,
            "tuner": tuner,
            "choose": self._choose,
            "fixed": self.max_bytes is None,
        }
        if self.schedule == "pool":
            return PoolStream(source, copies, seed=self.seed, **shared)
        return CalendarStream(source, copies, calendar=self.calendar, **shared)

    def calendar(self, distance: int) -> Calendar | VaryingCalendar:
        """The calendar of "spread" or "adjacent"."""
        if not isinstance(self.factor, Fraction):
            return VaryingCalendar(self.most, distance)
        if self.schedule == "adjacent":
            return schedules.adjacent(self.factor)
        return schedules.spread(self.factor, distance)

    @property
    def held(self) -> int:
        """The most elements that are kept for later copies."""
        return self._held(self.distance)

    def total(self, n: int) -> int | None:
        """Outputs of a source of n elements, if that is known beforehand."""
        return schedules.total(self.factor, n) if isinstance(self.factor, Fraction) else None

    def min_distance(self, n: int | None) -> int:
        """Least distance of a source of n elements, as far as it is known beforehand.

        None stands for a source that is long enough.
        """
        if self.schedule == "pool":
            return 1
        if n is None:
            return self.distance
        calendar = self.calendar(self.distance)
        return calendar.least_distance(n) if isinstance(calendar, Calendar) else self.distance

    def _copies(self) -> Copies:
        if isinstance(self.factor, Fraction):
            return Constant(self.factor)
        if self.class_of is not None:
            return PerClass([f for f in self.factor if isinstance(f, Fraction)], self.class_of)
        return Changing([f for f in self.factor if isinstance(f, tuple)], self.most)

    def _held(self, distance: int) -> int:
        return distance if self.schedule == "pool" else self.calendar(distance).held

    def _choose(self, nbytes: int) -> int:
        """The distance for elements of this size, which 0 leaves open."""
        if self.max_bytes is None or not nbytes:
            return self.distance
        room = self.max_bytes // nbytes
        pool = self.schedule == "pool"
        distance = min(self.distance, room if pool else 1 + room // max(self.most - 1, 1))
        while distance > 1 and self._held(distance) > room:  # a lag is rounded up
            distance -= 1
        if distance < self.least:
            need = self._held(self.least) * nbytes
            raise ValueError(
                f"echo.echo: `max_bytes` {self.max_bytes} is too little for elements of {nbytes} bytes at "
                f"a distance of {self.least}: give {need}, or a smaller batch_size or distance"
            )
        return distance


def most_copies(factor: Factor) -> int:
    """The most copies of an element."""
    if isinstance(factor, Fraction):
        return math.ceil(factor)
    return max(math.ceil(f[1] if isinstance(f, tuple) else f) for f in factor)
