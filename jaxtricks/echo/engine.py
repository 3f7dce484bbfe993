"""The schedules with a calendar: spread and adjacent."""

import heapq
from collections.abc import Callable, Mapping
from typing import Any

from jaxtricks.echo import _checks
from jaxtricks.echo._streams import Output, Stream
from jaxtricks.echo.schedule import Calendar, VaryingCalendar

Due = dict[int, list[Output]]  # tick -> what goes out in it, last first


class CalendarStream(Stream):
    """Every copy goes out in a tick that is known when its element is read; tick t reads element t."""

    def __init__(
        self, *args: Any, calendar: Callable[[int], Calendar | VaryingCalendar], **kwargs: Any
    ):
        """Make a stream; calendar: distance -> calendar, the rest as Stream has it."""
        self._calendar_of = calendar
        self._least: int | None = None
        super().__init__(*args, **kwargs)

    @property
    def min_distance(self) -> int:
        """The least distance of this stream, drain included; the promised one until its end is seen."""
        self.settle()
        if self._end is None or not self.distance:
            return self.distance
        if isinstance(self._calendar, Calendar):
            return self._calendar.least_distance(self._end)
        return self.distance if self._least is None else self._least

    def _clear(self) -> None:
        self._tick = self._first - 1
        self._due: Due = {}
        self._left: list[int] = []  # ticks of the drain, last first
        self._planned = 0  # outputs of this tick
        if self.distance:
            self._use(self.distance)

    def _use(self, distance: int) -> None:
        super()._use(distance)
        self._calendar = self._calendar_of(distance)
        self._age = self._calendar.age
        self._lags: dict[int, list[tuple[int, int]]] = {}  # copies -> (copy, lag)

    def _decide(self) -> list[Output]:
        pulled = self._pull()
        if pulled is None:
            self._tick = self._next_of_drain()
        else:
            i, copies, element = pulled
            due = self._due
            # What comes in last goes out first: the freshest element, its earliest copy.
            for k, lag in self._lags.get(copies) or self._lags_of(copies):
                if i + lag in due:
                    due[i + lag].append((i, k, element))
                else:
                    due[i + lag] = [(i, k, element)]
            if self._first < i - self._age:
                self._forget_until(i - self._age)
            self._tick += 1
        ready = self._due.pop(self._tick)
        self._planned = len(ready)
        return ready

    def _next_of_drain(self) -> int:
        """The next tick that has outputs: a source that is too short leaves gaps."""
        if not self._due:
            raise StopIteration
        if self._tick == self._read - 1 and isinstance(self._calendar, VaryingCalendar):
            self._due, self._least = drain(self._due, self._read, self.distance)
        if not self._left:
            self._left = sorted(self._due, reverse=True)
        return self._left.pop()

    def _lags_of(self, copies: int) -> list[tuple[int, int]]:
        lags = list(enumerate(self._calendar.lags_of(copies)))[::-1]
        self._lags[copies] = lags
        return lags

    def _check_position(self, state: Mapping[str, Any], first: int) -> None:
        calendar = self._calendar_of(state["distance"] or self._choose(0))
        # From the oldest element to the newest, to its last copy; one output a tick if copies vary.
        ticks = 2 * calendar.age + (calendar.age + 1) * self._copies.most
        tick = _checks.field(state, "tick", least=first - 1, most=first + ticks)
        # Every tick but the one before the first is known by its first output, which went out.
        _checks.field(state, "position", least=int(tick >= 0))

    def _position(self) -> dict[str, Any]:
        gone = self._planned - len(self._ready)
        return {"tick": self._tick, "position": gone, "distance": self.distance}

    def _replay_to(self, position: Mapping[str, Any]) -> list[Output]:
        if position["distance"]:
            self._use(position["distance"])
        ready = []
        while self._tick < position["tick"]:
            ready = self._decide()
        if self._tick != position["tick"]:
            raise _checks.damaged("tick", position["tick"])
        left = len(ready) - position["position"]
        if left < 0:
            raise _checks.damaged("position", position["position"])
        return ready[:left]


def drain(due: Due, end: int, distance: int) -> tuple[Due, int]:
    """Plan the outputs that are left when the source has ended, one a tick, for varying copies.

    Of the elements whose next copy is far enough from the one before, that with the most copies left
    goes first; if there is none, the one that comes nearest. This is the greedy rule that is optimal
    for jobs with a cool-down.

    Args:
      due: the calendar.
      end: the first tick without an element.
      distance: the distance to keep.

    Returns:
      (the new calendar, the least distance in it, `distance` at most).
    """
    left: dict[int, list[Output]] = {}
    waiting = []  # (first tick that keeps the distance, ordinal)
    for tick in sorted(due):
        for output in due[tick]:
            if output[0] not in left:
                waiting.append((tick + 1, output[0]))
            left.setdefault(output[0], []).append(output)
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # (minus copies left, that tick, ordinal)
    plan, least, now = {}, distance, end
    while waiting or ready:
        while waiting and waiting[0][0] <= now:
            when, i = heapq.heappop(waiting)
            heapq.heappush(ready, (-len(left[i]), when, i))
        if ready:
            *_, i = heapq.heappop(ready)
        else:
            when, i = heapq.heappop(waiting)
            least = min(least, distance - (when - now))
        plan[now] = [left[i].pop(0)]
        if left[i]:
            heapq.heappush(waiting, (now + distance, i))
        now += 1
    return plan, least
