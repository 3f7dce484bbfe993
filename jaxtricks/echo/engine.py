"""The iteration itself: one engine for every schedule and every kind of source."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxtricks.echo.schedule import Calendar


class Echoed(NamedTuple):
    """An output with its origin (tag=True).

    Attributes:
      element: what the source gave.
      ordinal: which element of the source it is, from 0.
      copy: which of its copies, 0 is the first. (seed, ordinal, copy) is the key of an augmentation.
    """

    element: Any
    ordinal: int
    copy: int


@runtime_checkable
class Source(Protocol):
    """What the engine needs to know of a source."""

    def pull(self) -> Any:
        """Return the next element, or raise StopIteration."""
        ...

    def snapshot(self) -> Any:
        """The state from which the next pull can be repeated."""
        ...

    def rewind(self, snapshot: Any) -> None:
        """Go back, or forward, to a snapshot."""
        ...


class Engine:
    """Iterate over a source by a calendar, with an exact state at every position.

    The state is a snapshot of the source before the oldest element that is still needed, and three
    integers: never the data. A resume re-reads from there.
    """

    def __init__(self, source: Source, calendar: Calendar, *, tag: bool, guard: bool):
        self._source = source
        self._calendar = calendar
        self._tag = tag
        self._guard = guard
        self._pending: dict[str, Any] | None = None
        self._reset(first=0)

    def _reset(self, first: int) -> None:
        self._tick = first - 1
        self._now: list[tuple[int, int]] = []  # (element, copy) that go out in this tick
        self._position = 0
        self._live: dict[int, Any] = {}
        self._snapshots: collections.deque[Any] = collections.deque()
        self._first = first
        self._end: int | None = None

    def next(self) -> Any:
        """The next output, or StopIteration."""
        self._replay()
        while self._position >= len(self._now):
            if self._end is not None and self._tick >= self._end + self._calendar.age:
                raise StopIteration
            self._advance()
        i, k = self._now[self._position]
        self._position += 1
        element = self._live[i]
        if k == self._calendar.copies(i) - 1:
            del self._live[i]
        return Echoed(element, i, k) if self._tag else element

    def state(self) -> dict[str, Any]:
        """The position, fixed in shape and JSON if the source's own state is."""
        if self._pending is not None:
            return self._pending
        return {
            "source": self._snapshots[0] if self._snapshots else self._source.snapshot(),
            "first": self._first,
            "tick": self._tick,
            "position": self._position,
            "schedule": str(self._calendar),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a position; elements are read again when the next output is asked for."""
        if state["schedule"] != str(self._calendar):
            raise ValueError(
                f"echo: the state was made by ({state['schedule']}), this is ({self._calendar}): "
                "use the same factor, schedule and distance"
            )
        self._source.rewind(state["source"])
        self._pending = dict(state)

    @property
    def min_distance(self) -> int:
        """The least distance of this stream, drain included; the promised one until its end is seen."""
        self._replay()
        if self._end is None:
            return self._calendar.distance
        return self._calendar.least_distance(self._end)

    def _advance(self) -> None:
        self._tick += 1
        self._position = 0
        if self._end is None:
            self._read()
        while len(self._snapshots) > 1 and self._first < self._tick - self._calendar.age:
            self._snapshots.popleft()
            self._first += 1
        end = self._tick + 1 if self._end is None else self._end
        self._now = self._calendar.due(self._tick, end)

    def _read(self) -> None:
        # Once per element: asking a long pipeline for its state costs more than an echo does.
        self._snapshots.append(self._source.snapshot())
        try:
            element = self._source.pull()
        except StopIteration:
            self._end = self._tick
        else:
            self._live[self._tick] = freeze(element) if self._guard else element

    def _replay(self) -> None:
        state, self._pending = self._pending, None
        if state is None:
            return
        self._reset(first=state["first"])
        while self._tick < state["tick"]:
            self._advance()
        self._position = state["position"]
        self._forget()

    def _forget(self) -> None:
        """Release what a replay has read and no later output needs."""
        to_come = set(self._now[self._position :])
        for i in list(self._live):
            final = (i, self._calendar.copies(i) - 1)
            if self._calendar.last_tick(i) <= self._tick and final not in to_come:
                del self._live[i]


def freeze(element: Any) -> Any:
    """Read-only views of the numpy leaves: an in-place change would reach the later copies."""
    return jax.tree.map(_freeze_leaf, element)


def _freeze_leaf(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.flags.writeable:
        x = x.view()
        x.flags.writeable = False
    return x
