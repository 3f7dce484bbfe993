"""What all schedules share: reading, the state of the source at every element, and exact resume."""

import collections
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtricks.echo import _checks
from jaxtricks.echo import guard as guards
from jaxtricks.echo._auto_factor import Tuner
from jaxtricks.echo._schedules import Changing, Constant, Copies


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
    """What a stream needs to know of a source."""

    def read(self) -> tuple[Any, Any]:
        """(the state from which this can be repeated, the next element), or StopIteration."""
        ...

    def snapshot(self) -> Any:
        """The state from which the next read can be repeated."""
        ...

    def check(self, snapshot: Any, first: int) -> None:
        """Raise ValueError if it can't go to a snapshot of element `first`; move nothing."""
        ...

    def rewind(self, snapshot: Any) -> None:
        """Go back, or forward, to a snapshot."""
        ...


Output = tuple[int, int, Any]  # (ordinal, copy, element)


class Stream:
    """Outputs one by one, with an exact state at every position.

    The state is a snapshot of the source before the oldest element that is still needed, and a few
    integers: never the data. A resume reads again from there, when the next output is asked for;
    where that reading fails, the next request begins it anew.

    Threads may share a stream. All that decides or looks holds the lock; what is decided, `_ready`,
    is taken without it, by a pop, which is atomic: the lock would cost a tenth of an output's time.

    A subclass decides what goes out: `_decide`, `_position`, `_check_position`, `_replay_to`,
    `_clear`, `min_distance`.

    Attributes:
      distance: outputs between copies, or the size of the pool; 0 until it is known.
    """

    def __init__(
        self,
        source: Source,
        copies: Copies,
        *,
        name: str,
        elements: int,
        tag: bool,
        guard: bool,
        choose: Callable[[int], int],
        fixed: bool,
        tuner: Tuner | None = None,
    ):
        """Make a stream.

        Args:
          source: what is echoed.
          copies: how often each element goes out.
          name: of the settings; a state of another name is refused.
          elements: length of the source, -1 if that is not to be checked.
          tag, guard: as `echo` has them.
          choose: bytes of an element -> distance; of 0 bytes, the largest.
          fixed: whether that does not depend on the bytes.
          tuner: what changes the copies, or None.
        """
        self._lock = threading.RLock()
        self._choose, self._fixed = choose, fixed
        self.distance = choose(0) if fixed else 0
        self._source = source
        self._copies = copies
        self._name = name
        self._elements = elements
        self._tag = tag
        self._guard = guard
        self._tuner = tuner
        self._outputs = 0  # decided so far
        self._pending: Mapping[str, Any] | None = None
        self._rewound = False  # whether the source stands where the pending state begins
        self._unplanned: tuple[Any, Any] | None = None  # read, and not yet counted
        self._start(first=0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)
        self._lock = threading.RLock()

    # --- what a schedule adds

    @property
    def min_distance(self) -> int:
        """The least distance of this stream, drain included."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Forget all positions."""
        raise NotImplementedError

    def _decide(self) -> list[Output]:
        """What goes out next, one or more, last first; or StopIteration."""
        raise NotImplementedError

    def _position(self) -> dict[str, Any]:
        """The integers of the state."""
        raise NotImplementedError

    def _check_position(self, state: Mapping[str, Any], first: int) -> None:
        """Raise ValueError unless `_position` may have given this."""
        raise NotImplementedError

    def _replay_to(self, position: Mapping[str, Any]) -> list[Output]:
        """Read on from the first element, up to a position; return what is ready there."""
        raise NotImplementedError

    def _use(self, distance: int) -> None:
        """Take this distance."""
        self.distance = distance

    # --- what they share

    def _start(self, first: int) -> None:
        self._first = first
        self._read = first  # elements read, those before the first one included
        self._end: int | None = None
        self._snapshots: collections.deque[Any] = collections.deque()
        self._watch: guards.Watch | None = None
        self._watching = self._guard
        self._unplanned = None
        self._ready: list[Output] = []  # last first
        self._clear()

    def next(self) -> Any:
        """The next output, or StopIteration."""
        try:
            output = self._ready.pop() if self._ready else None
        except IndexError:  # another thread was faster
            output = None
        if output is None:
            self._lock.acquire()
            try:  # takes two thirds of the time of `with`
                if self._pending is not None:
                    self._replay(self._pending)
                output = _take(self._ready) if self._ready else None
                if output is None:
                    ready = self._decide()
                    if self._tuner is not None:
                        self._outputs += len(ready)
                    output = ready.pop()
                    self._ready = ready
            finally:
                self._lock.release()
        i, k, element = output
        if self._guard:
            if self._watching and k and self._watch is not None:
                self._watching = self._watch.check(i, k, element)
            element = guards.fresh(element)
        return Echoed(element, i, k) if self._tag else element

    def state(self) -> dict[str, Any]:
        """The position, fixed in shape and JSON if the source's own state is."""
        with self._lock:
            if self._pending is not None:
                return dict(self._pending)
            return {
                "source": self._snapshot(),
                "first": self._first,
                "copies": self._copies.state(),
                **self._position(),
                "elements": self._elements,
                "schedule": self._name,
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a position; elements are read again when the next output is asked for.

        Raises:
          ValueError: if the state is damaged or of another stage, and this one stays where it was; or
            what the source raises on its way, and the next output tries again.
        """
        with self._lock:
            self._check(state)
            self._pending, self._rewound, self._ready = dict(state), False, []
            if self._tuner is not None:
                self._tuner.restart()
            self._rewind()

    def close(self) -> None:
        """End the thread of the source, if it has one."""
        end = getattr(self._source, "close", None)
        if end is not None:
            with self._lock:
                end()

    def settle(self) -> None:
        """Read again what a state that was set asks for."""
        with self._lock:
            if self._pending is not None:
                self._replay(self._pending)

    @property
    def changes(self) -> tuple[tuple[int, Fraction], ...]:
        """(element, factor) pairs: from which element on which factor holds; empty if per class."""
        self.settle()
        if isinstance(self._copies, Changing):
            return self._copies.changes
        return ((0, self._copies.factor),) if isinstance(self._copies, Constant) else ()

    def _snapshot(self) -> Any:
        """Of the source, before the oldest element that is still needed."""
        if self._snapshots:
            return self._snapshots[0]
        return self._source.snapshot() if self._unplanned is None else self._unplanned[0]

    def _check(self, state: Any) -> None:
        """Raise ValueError unless `state` may have given this, in another process."""
        if not isinstance(state, Mapping):
            raise ValueError(
                f"echo: the state is {_checks.spell(state)}: pass the dict that get_state() returned"
            )
        made = state.get("schedule", self._name)
        if not isinstance(made, str):
            raise _checks.damaged("schedule", made)
        if made != self._name:
            raise ValueError(
                f"echo: the state was made by ({repr(made)[1:-1]:.200}), this is ({self._name}): "
                "use the same factor, schedule and distance"
            )
        for name in ("source", "first", "copies", *self._position(), "elements", "schedule"):
            if name not in state:
                raise ValueError(
                    f"echo: the state has no `{name}`: pass the dict that get_state() returned"
                )
        elements = _checks.field(state, "elements", least=-1)
        if min(elements, self._elements) >= 0 and elements != self._elements:
            raise ValueError(
                f"echo: the state was made over {elements} elements, this source has "
                f"{self._elements}: use the same data, and in Grain the same number of workers"
            )
        first = _checks.field(state, "first", most=elements if elements >= 0 else _checks.MOST_READ)
        self._copies.check(state["copies"], first)
        largest = self._choose(0)
        _checks.field(state, "distance", least=largest if self._fixed else 0, most=largest)
        self._check_position(state, first)
        self._source.check(state["source"], first)

    def _rewind(self) -> None:
        """Move the source to where the pending state begins."""
        if self._pending is not None and not self._rewound:
            self._source.rewind(self._pending["source"])
            self._rewound = True

    def _replay(self, state: Mapping[str, Any]) -> None:
        self._rewind()
        self._rewound = False  # whatever happens from here on, the source moves
        self._start(first=state["first"])
        self._copies.restore(state["copies"])
        try:
            ready = self._replay_to(state)
        except StopIteration:
            raise ValueError(
                "echo: `source` ended before the position of the state: it must give the same elements "
                "again"
            ) from None
        if self._first != state["first"]:
            raise _checks.damaged("first", state["first"])
        self._pending, self._ready = None, ready

    def _pull(self) -> tuple[int, int, Any] | None:
        """(ordinal, copies, element) of the next element, or None at the end of the source."""
        if self._end is not None:
            return None
        try:
            snapshot, element = unplanned = self._unplanned or self._source.read()
        except StopIteration:
            self._end = self._read
            return None
        i = self._read
        self._unplanned = unplanned  # if `class_of` fails, it is asked again about the same element
        if not self.distance:
            self._use(self._choose(guards.nbytes(element)))
        if self._guard:
            element = guards.freeze(element)
            if self._watch is None:
                self._watch = guards.Watch(i, element)
        copies = self._copies.take(i, element)
        self._snapshots.append(snapshot)
        self._read = i + 1
        self._unplanned = None
        if self._tuner is not None and self._pending is None:  # what is read again is decided
            self._tuner(self._read, self._outputs)
        return i, copies, element

    def _forget_until(self, first: int) -> None:
        """A resume no longer needs what comes before this element."""
        while self._first < first:
            self._snapshots.popleft()
            self._copies.forget()
            self._first += 1


def _take(ready: list[Output]) -> Output | None:
    try:
        return ready.pop()
    except IndexError:  # another thread was faster
        return None


class StreamIterator:
    """What iterators of echoed sources of every kind have; `_stream` does the work."""

    _stream: Stream

    def __next__(self) -> Any:
        return self._stream.next()

    def get_state(self) -> dict[str, Any]:
        """The position as a small dict; JSON if the source's own state is."""
        return self._stream.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Return to a position, in this process or another.

        Raises:
          ValueError: if the state is of another schedule, or the source cannot start again.
        """
        self._stream.restore(state)

    @property
    def distance(self) -> int:
        """The distance of this stream; 0 while `max_bytes` waits for the first element."""
        return self._stream.distance

    @property
    def min_distance(self) -> int:
        """Least distance of this stream; the promised one until the end of the source is seen."""
        return self._stream.min_distance

    @property
    def changes(self) -> tuple[tuple[int, Fraction], ...]:
        """((element, factor), ...): from which element on which factor holds; empty if per class."""
        return self._stream.changes
