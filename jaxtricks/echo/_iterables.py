"""Check the arguments of `echo` and build streams over any iterable."""

import base64
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

from jaxtricks.echo import _checks
from jaxtricks.echo import _schedules as schedules
from jaxtricks.echo._auto_factor import Tuner
from jaxtricks.echo._schedules import (
    Calendar,
    Change,
    Changing,
    Constant,
    Copies,
    PerClass,
    VaryingCalendar,
)
from jaxtricks.echo._streams import (
    CalendarStream,
    PoolStream,
    ReadAhead,
    Source,
    Stream,
    StreamIterator,
)

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
      distance: outputs between copies, or the size of the pool; less if max_bytes asks
        for it.
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
        """Build a stream; `elements` is the length of the source where it is checked."""
        copies = self._copies()
        tuner = None
        if self.auto and isinstance(copies, Changing):
            source = ahead = ReadAhead(source)
            tuner = Tuner(
                copies, lambda: ahead.busy, batch_size=self.batch_size
            )
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
        """Build the calendar of "spread" or "adjacent"."""
        if not isinstance(self.factor, Fraction):
            return VaryingCalendar(self.most, distance)
        if self.schedule == "adjacent":
            return schedules.adjacent(self.factor)
        return schedules.spread(self.factor, distance)

    @property
    def held(self) -> int:
        """Return the largest number of elements that wait for later copies."""
        return self._held(self.distance)

    def total(self, n: int) -> int | None:
        """Return the number of outputs of n elements, if known beforehand."""
        return (
            schedules.total(self.factor, n)
            if isinstance(self.factor, Fraction)
            else None
        )

    def min_distance(self, n: int | None) -> int:
        """Return the least distance over n elements, as far as known beforehand.

        None stands for a source that is long enough.
        """
        if self.schedule == "pool":
            return 1
        if n is None:
            return self.distance
        calendar = self.calendar(self.distance)
        return (
            calendar.least_distance(n)
            if isinstance(calendar, Calendar)
            else self.distance
        )

    def _copies(self) -> Copies:
        if isinstance(self.factor, Fraction):
            return Constant(self.factor)
        if self.class_of is not None:
            return PerClass(
                [f for f in self.factor if isinstance(f, Fraction)],
                self.class_of,
            )
        return Changing(
            [f for f in self.factor if isinstance(f, tuple)], self.most
        )

    def _held(self, distance: int) -> int:
        return (
            distance
            if self.schedule == "pool"
            else self.calendar(distance).held
        )

    def _choose(self, nbytes: int) -> int:
        """Choose the distance for elements of this size, where 0 leaves it open."""
        if self.max_bytes is None or not nbytes:
            return self.distance
        room = self.max_bytes // nbytes
        pool = self.schedule == "pool"
        distance = min(
            self.distance, room if pool else 1 + room // max(self.most - 1, 1)
        )
        # A lag is rounded up, so the first guess may hold too many.
        while distance > 1 and self._held(distance) > room:
            distance -= 1
        if distance < self.least:
            need = self._held(self.least) * nbytes
            raise ValueError(
                f"echo.echo: `max_bytes` {self.max_bytes} is too little for "
                f"elements of {nbytes} bytes at a distance of {self.least}: "
                f"give {need}, or a smaller batch_size or distance"
            )
        return distance


def most_copies(factor: Factor) -> int:
    """Return the largest number of copies of an element."""
    if isinstance(factor, Fraction):
        return math.ceil(factor)
    return max(math.ceil(f[1] if isinstance(f, tuple) else f) for f in factor)


# Sources that are not Grain's: any iterable, resumed by its state or by counting.


_PAIRS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


class IterableSource:
    """An iterator with a state: its loader's or its own, else the number of reads.

    Attributes:
      fast_forwards: whether a resume reads and drops everything before the position.
    """

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]]):
        self._source = source
        self._iterator = start(source)
        self._read = 0
        # Where a generator ended in an error.
        self._broken: tuple[Any] | None = None
        self._of_iterator = _methods(self._iterator)
        self._of_source = None if self._of_iterator else _methods(source)
        self.fast_forwards = not (self._of_iterator or self._of_source)

    def read(self) -> tuple[Any, Any]:
        """Return (state to repeat the read from, next element), or raise StopIteration."""
        if self._broken is not None:
            self._mend(self._broken)
        snapshot = self._read if self.fast_forwards else self.snapshot()
        try:
            element = next(self._iterator)
        except StopIteration:
            raise
        except BaseException:
            if inspect.isgenerator(_bare(self._iterator)):
                self._broken = (snapshot,)
            raise
        self._read += 1
        return snapshot, element

    def _mend(self, broken: tuple[Any]) -> None:
        """Start again: a generator that raised would say that there is nothing left."""
        try:
            self.rewind(*broken)
        except BaseException:
            self._broken = broken
            raise

    def snapshot(self) -> Any:
        """Return the state from which the next read can be repeated."""
        if self._of_iterator:
            return _encode(getattr(self._iterator, self._of_iterator[0])())
        if self._of_source:
            return _encode(getattr(self._source, self._of_source[0])())
        return self._read

    def check(self, snapshot: Any, first: int) -> None:
        """Raise ValueError if the source can't go to a snapshot of element `first`."""
        if not self.fast_forwards:
            try:
                _decode(snapshot)
            except (TypeError, ValueError):
                raise _checks.damaged("source", snapshot) from None
            return
        if _checks.index(snapshot) != first:
            raise _checks.damaged("source", snapshot)
        if isinstance(self._iterator, OneShot) and (
            first < self._read or self._iterator.read_by_others(self._read)
        ):
            raise _read_already()

    def rewind(self, snapshot: Any) -> None:
        """Go to a snapshot."""
        broken, self._broken = self._broken, None
        if self._of_iterator:
            with _checks.states_of_others():
                getattr(self._iterator, self._of_iterator[1])(_decode(snapshot))
        elif self._of_source:
            with _checks.states_of_others():
                getattr(self._source, self._of_source[1])(_decode(snapshot))
            self._iterator = start(self._source)
        else:
            if self._read or broken:
                again = start(self._source)
                if again is not self._iterator:
                    self._iterator, self._read = again, 0
                elif broken or snapshot < self._read:
                    raise _read_already()
            self._fast_forward(snapshot)

    def _fast_forward(self, count: int) -> None:
        while self._read < count:
            try:
                self.read()
            except StopIteration:
                raise ValueError(
                    f"echo: `source` ended before element {count} of the "
                    "state: it must give the same elements again"
                ) from None


class OneShot(Iterator[Any]):
    """An iterator that cannot start again, shared by all who read it."""

    def __init__(self, iterator: Iterator[Any]):
        self.iterator = iterator
        self._begun = (
            inspect.isgenerator(iterator)
            and inspect.getgeneratorstate(iterator) != inspect.GEN_CREATED
        )
        self._read = 0

    def __next__(self) -> Any:
        element = next(self.iterator)
        self._read += 1
        return element

    def read_by_others(self, mine: int) -> bool:
        """Return whether another reader took elements, as far as can be known."""
        return self._begun or self._read > mine


class EchoIterator(StreamIterator, Iterator[Any]):
    """Iterator of an echoed source: next, get_state, set_state.

    Attributes:
      fast_forwards: whether set_state has to read and drop all elements before the
        position, because neither the source nor its iterator has a state.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        recipe: Recipe,
    ):
        adapter = IterableSource(source)
        self._stream = recipe.stream(adapter, _length(source))
        self.fast_forwards = adapter.fast_forwards


class EchoIterable(Iterable[Any]):
    """An echoed source: each iter() starts it again.

    Attributes:
      distance: the promised least distance between consecutive copies, in outputs.
      held: the most elements that are held for later copies.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        recipe: Recipe,
    ):
        once = isinstance(source, Iterator) and not _methods(source)
        self._source, self._recipe = OneShot(source) if once else source, recipe
        self.distance, self.held = recipe.distance, recipe.held

    def __iter__(self) -> EchoIterator:
        return EchoIterator(self._source, self._recipe)

    def __len__(self) -> int:
        total = self._recipe.total(len(self._source))  # pyrefly: ignore
        if total is None:
            raise TypeError(
                "an echoed source has no length where its factor is not constant"
            )
        return total

    @property
    def min_distance(self) -> int:
        """Return the least distance over the stream if the source has a length."""
        length = _length(self._source)
        return self._recipe.min_distance(None if length < 0 else length)


def start(source: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Return a new iterator over the source, or over what it makes if callable."""
    if hasattr(source, "as_numpy_iterator"):  # a tf.data.Dataset
        return iter(source.as_numpy_iterator())
    if isinstance(source, Iterable):
        return iter(source)
    return iter(source())


def _length(source: Any) -> int:
    """Return the number of elements, or -1 if the source does not say."""
    try:
        return len(source)
    except (TypeError, NotImplementedError, AttributeError):
        # Loaders raise each of them.
        return -1


def _read_already() -> ValueError:
    return ValueError(
        "echo: `source` is an iterator that has been read already and cannot "
        "start again: pass the function that makes it, or a list"
    )


def _bare(iterator: Iterator[Any]) -> Iterator[Any]:
    return iterator.iterator if isinstance(iterator, OneShot) else iterator


def _methods(x: Any) -> tuple[str, str] | None:
    for pair in _PAIRS:
        if all(callable(getattr(x, name, None)) for name in pair):
            return pair
    return None


def _encode(state: Any) -> Any:
    # grain.DataLoader's iterators give bytes, which JSON does not know; others keep
    # changing theirs.
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode("ascii")}
    return copy.deepcopy(state)


def _decode(state: Any) -> Any:
    if isinstance(state, dict) and set(state) == {"base64"}:
        return base64.b64decode(state["base64"])
    return copy.deepcopy(state)
