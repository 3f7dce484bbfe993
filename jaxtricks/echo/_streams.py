"""Stream echoed elements: reading, the source's state, schedules, exact resume."""

import collections
import heapq
import queue
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxtricks.echo import _checks
from jaxtricks.echo._auto_factor import Tuner
from jaxtricks.echo._schedules import (
    Calendar,
    Changing,
    Constant,
    Copies,
    VaryingCalendar,
)


class Echoed(NamedTuple):
    """An output with its origin (tag=True).

    Attributes:
      element: what the source gave.
      ordinal: which element of the source it is, from 0.
      copy: which of its copies, 0 is the first. (seed, ordinal, copy) is the key of an
        augmentation.
    """

    element: Any
    ordinal: int
    copy: int


@runtime_checkable
class Source(Protocol):
    """Interface of a source, as a stream uses it."""

    def read(self) -> tuple[Any, Any]:
        """Return (state to repeat the read from, next element), or raise StopIteration."""
        ...

    def snapshot(self) -> Any:
        """Return the state from which the next read can be repeated."""
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

    The state is a snapshot of the source before the oldest element that is still
    needed, and a few integers: never the data. A resume reads again from there, when
    the next output is asked for; where that reading fails, the next request begins it
    anew.

    Threads may share a stream. All that decides or looks holds the lock; what is
    decided, `_ready`, is taken without it, by a pop, which is atomic: the lock would
    cost a tenth of an output's time.

    A subclass decides what goes out: `_decide`, `_position`, `_check_position`,
    `_replay_to`, `_clear`, `min_distance`.

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
        # Whether the source stands where the pending state begins.
        self._rewound = False
        # Read, and not yet counted.
        self._unplanned: tuple[Any, Any] | None = None
        self._start(first=0)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name != "_lock"
        }

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)
        self._lock = threading.RLock()

    # What a schedule adds.

    @property
    def min_distance(self) -> int:
        """Return the least distance of this stream, drain included."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Discard all positions."""
        raise NotImplementedError

    def _decide(self) -> list[Output]:
        """Return the next outputs, last first, or raise StopIteration."""
        raise NotImplementedError

    def _position(self) -> dict[str, Any]:
        """Return the integers of the state."""
        raise NotImplementedError

    def _check_position(self, state: Mapping[str, Any], first: int) -> None:
        """Raise ValueError unless `_position` may have returned this."""
        raise NotImplementedError

    def _replay_to(self, position: Mapping[str, Any]) -> list[Output]:
        """Read on from the first element, up to a position; return what is ready there."""
        raise NotImplementedError

    def _use(self, distance: int) -> None:
        """Take this distance."""
        self.distance = distance

    # What all schedules share.

    def _start(self, first: int) -> None:
        self._first = first
        self._read = first  # elements read, those before the first one included
        self._end: int | None = None
        self._snapshots: collections.deque[Any] = collections.deque()
        self._watch: Watch | None = None
        self._watching = self._guard
        self._unplanned = None
        self._ready: list[Output] = []  # last first
        self._clear()

    def next(self) -> Any:
        """Return the next output, or raise StopIteration."""
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
            element = fresh(element)
        return Echoed(element, i, k) if self._tag else element

    def state(self) -> dict[str, Any]:
        """Return the position: of fixed shape, and JSON if the source's state is."""
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
          ValueError: if the state is damaged or of another stage, and this one stays
            where it was; or what the source raises on its way, and the next output
            tries again.
        """
        with self._lock:
            self._check(state)
            self._pending, self._rewound, self._ready = dict(state), False, []
            if self._tuner is not None:
                self._tuner.restart()
            self._rewind()

    def close(self) -> None:
        """Stop the thread of the source, if it has one."""
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
        """Return (element, factor) pairs: the factor from which element on."""
        self.settle()
        if isinstance(self._copies, Changing):
            return self._copies.changes
        return (
            ((0, self._copies.factor),)
            if isinstance(self._copies, Constant)
            else ()
        )

    def _snapshot(self) -> Any:
        """Return the source's state before the oldest element that is still needed."""
        if self._snapshots:
            return self._snapshots[0]
        return (
            self._source.snapshot()
            if self._unplanned is None
            else self._unplanned[0]
        )

    def _check(self, state: Any) -> None:
        """Raise ValueError unless `state` may have returned this, in any process."""
        if not isinstance(state, Mapping):
            raise ValueError(
                f"echo: the state is {_checks.spell(state)}: pass the dict "
                "that get_state() returned"
            )
        saved = state.get("schedule", self._name)
        if not isinstance(saved, str):
            raise _checks.damaged("schedule", saved)
        if saved != self._name:
            raise ValueError(
                f"echo: the state was saved by ({repr(saved)[1:-1]:.200}), "
                f"this is ({self._name}): use the same factor, schedule and "
                "distance"
            )
        for name in (
            "source",
            "first",
            "copies",
            *self._position(),
            "elements",
            "schedule",
        ):
            if name not in state:
                raise ValueError(
                    f"echo: the state has no `{name}`: pass the dict that "
                    "get_state() returned"
                )
        elements = _checks.field(state, "elements", least=-1)
        if min(elements, self._elements) >= 0 and elements != self._elements:
            raise ValueError(
                f"echo: the state was saved over {elements} elements, this "
                f"source has {self._elements}: use the same data, and in Grain "
                "the same number of workers"
            )
        first = _checks.field(
            state,
            "first",
            most=elements if elements >= 0 else _checks.MOST_READ,
        )
        self._copies.check(state["copies"], first)
        largest = self._choose(0)
        _checks.field(
            state, "distance", least=largest if self._fixed else 0, most=largest
        )
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
                "echo: `source` ended before the position of the state: it "
                "must give the same elements again"
            ) from None
        if self._first != state["first"]:
            raise _checks.damaged("first", state["first"])
        self._pending, self._ready = None, ready

    def _pull(self) -> tuple[int, int, Any] | None:
        """Return (ordinal, copies, element) of the next element, or None at the end."""
        if self._end is not None:
            return None
        try:
            snapshot, element = unplanned = (
                self._unplanned or self._source.read()
            )
        except StopIteration:
            self._end = self._read
            return None
        i = self._read
        self._unplanned = unplanned  # if `class_of` fails, it is asked again about the same element
        if not self.distance:
            self._use(self._choose(nbytes(element)))
        if self._guard:
            element = freeze(element)
            if self._watch is None:
                self._watch = Watch(i, element)
        copies = self._copies.take(i, element)
        self._snapshots.append(snapshot)
        self._read = i + 1
        self._unplanned = None
        # What is read again after a resume is decided already.
        if self._tuner is not None and self._pending is None:
            self._tuner(self._read, self._outputs)
        return i, copies, element

    def _forget_until(self, first: int) -> None:
        """Drop states before this element, which no resume needs."""
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
    """Base of iterators over echoed sources; `_stream` does the work."""

    _stream: Stream

    def __next__(self) -> Any:
        return self._stream.next()

    def get_state(self) -> dict[str, Any]:
        """Return the position as a small dict, JSON if the source's state is."""
        return self._stream.state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Return to a position, in this process or another.

        Raises:
          ValueError: if the state is of another schedule, or the source cannot start
            again.
        """
        self._stream.restore(state)

    @property
    def distance(self) -> int:
        """Return the distance; 0 while `max_bytes` waits for the first element."""
        return self._stream.distance

    @property
    def min_distance(self) -> int:
        """Return the least distance; the promised one until the source ends."""
        return self._stream.min_distance

    @property
    def changes(self) -> tuple[tuple[int, Fraction], ...]:
        """Return ((element, factor), ...): the factor from which element on."""
        return self._stream.changes


# How copies of an element stay equal: read-only leaves, containers of their own, and a
# check of what cannot be made read-only.


_CONTAINERS = (dict, list, tuple)
_ATOMS = frozenset((int, float, complex, bool, str, bytes, type(None)))


def freeze(x: Any) -> Any:
    """Return the element with read-only views of its NumPy leaves.

    A change in place would reach later copies.
    """
    kind = type(x)
    if kind in _ATOMS:
        return x
    if kind is np.ndarray:
        return _freeze_leaf(x)
    if kind is dict:
        return {k: v if type(v) in _ATOMS else freeze(v) for k, v in x.items()}
    return jax.tree.map(_freeze_leaf, x)


def fresh(x: Any) -> Any:
    """Copy dicts and lists, not leaves, so that each copy can be refilled."""
    kind = type(x)
    if kind is np.ndarray or kind in _ATOMS:
        return x
    if kind is dict:
        for value in x.values():
            if type(value) in _CONTAINERS:
                return {k: fresh(v) for k, v in x.items()}
        return x.copy()
    if kind is list or kind is tuple:
        return kind([fresh(v) for v in x])
    if isinstance(x, tuple) and hasattr(kind, "_fields"):
        return kind(*(fresh(v) for v in x))
    return x


def nbytes(x: Any) -> int:
    """Return the bytes of an element's leaves."""
    leaves = jax.tree.leaves(x)
    return sum(
        leaf.nbytes if hasattr(leaf, "nbytes") else sys.getsizeof(leaf)
        for leaf in leaves
    )


class Watch:
    """Looks at one element when it is read, and again when its second copy goes out."""

    def __init__(self, ordinal: int, element: Any):
        leaves = jax.tree.leaves(element)
        self._on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        self._ordinal = ordinal
        self._seen = _fingerprint(leaves)

    def check(self, ordinal: int, copy: int, element: Any) -> bool:
        """Raise if a later copy is not what was read; whether it has to be asked again."""
        if self._on_device and any(
            isinstance(leaf, jax.Array) and leaf.is_deleted()
            for leaf in jax.tree.leaves(element)
        ):
            raise ValueError(
                f"echo: the arrays of element {ordinal} were deleted before "
                f"copy {copy} went out: don't donate the batch "
                "(donate_argnums) where the same one comes again"
            )
        if (
            ordinal == self._ordinal
            and _fingerprint(jax.tree.leaves(element)) != self._seen
        ):
            raise ValueError(
                f"echo: `source` has changed the arrays of element {ordinal} "
                "after giving them, as one that reuses a buffer does: let it "
                "give copies, by x.copy()"
            )
        return self._on_device or ordinal < self._ordinal


def _fingerprint(leaves: list[Any]) -> list[int]:
    return [
        zlib.crc32(x.tobytes())
        for x in leaves
        if isinstance(x, np.ndarray) and not x.dtype.hasobject
    ]


def _freeze_leaf(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.flags.writeable:
        x = x.view()
        x.flags.writeable = False
    return x


# Reading in a thread, by which `factor="auto"` measures how busy the source is.


_DEPTH = 2  # elements ahead: enough to overlap, few enough to measure
_PATIENCE = 0.1  # seconds after which a thread that cannot put looks whether it should stop


class ReadAhead:
    """A source that is read by a thread; the state of each element comes with it."""

    def __init__(self, source: Source):
        self._source = source
        self._begin = source.snapshot()
        self._thread: _Thread | None = None
        self._busy = 0.0  # of threads that have ended

    def read(self) -> tuple[Any, Any]:
        """Return (state, element), or raise what the source raised."""
        if self._thread is None:
            self._thread = _Thread(self._source)
        item = self._thread.items.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def snapshot(self) -> Any:
        """Return the state before the first element."""
        return self._begin

    def check(self, snapshot: Any, first: int) -> None:
        """Raise ValueError if the source can't go there; what has been read ahead stays."""
        self._source.check(snapshot, first)

    def rewind(self, snapshot: Any) -> None:
        """Go to a snapshot; what has been read ahead is dropped."""
        self.close()
        self._source.rewind(snapshot)
        self._begin = snapshot

    @property
    def busy(self) -> float:
        """Return the seconds in which the source was at work so far."""
        return self._busy + (self._thread.busy if self._thread else 0.0)

    def close(self) -> None:
        """Stop the thread after its current read."""
        if self._thread is not None:
            self._busy = self.busy
            self._thread.end()
            self._thread = None

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.stopped.set()  # without waiting: the source may take long


class _Thread:
    """The thread and what it shares; it holds no reference to the ReadAhead, whose end ends it."""

    def __init__(self, source: Source):
        self.items: queue.Queue[Any] = queue.Queue(_DEPTH)
        self.stopped = threading.Event()
        self._source = source
        self._done = 0.0
        self._since: float | None = None
        self._thread = threading.Thread(
            target=self._run, name="jaxtricks-echo", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> float:
        since = self._since
        return self._done + (
            0.0 if since is None else time.perf_counter() - since
        )

    def end(self) -> None:
        self.stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.stopped.is_set():
            self._since = time.perf_counter()
            try:
                item: Any = self._source.read()
            except BaseException as error:  # the consumer raises it
                item = error
            self._done, self._since = self.busy, None
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: Any) -> None:
        while not self.stopped.is_set():
            try:
                return self.items.put(item, timeout=_PATIENCE)
            except queue.Full:
                continue


# The schedule of the paper: copies in a shuffle buffer, with a bound on how long one
# stays.


_DRAWS = 1024  # random numbers per block
_AGE = 4  # an element is drawn at the latest when so many times the pool's size have been read after it


class PoolStream(Stream):
    """Random draws from a pool of copies.

    While the pool fills, what is read goes out at once and leaves its other copies
    there: the first outputs wait for nothing and are all different. Then each draw is
    compensated by reading.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        """Make a stream; seed: of the draws, the rest as Stream has it."""
        self._seed = seed
        super().__init__(*args, **kwargs)

    @property
    def min_distance(self) -> int:
        """Return 0: nothing is promised."""
        return 1

    def _clear(self) -> None:
        self._drawn = 0
        self._filling = True
        self._waiting: list[
            tuple[int, int]
        ] = []  # (ordinal, copy), in no order
        self._left: collections.Counter[int] = collections.Counter()
        self._live: dict[int, Any] = {}
        self._numbers: list[float] = []

    def _decide(self) -> list[Output]:
        if self._filling:
            pulled = self._pull()
            if pulled is not None:
                i, _, element = pulled
                self._keep(*pulled, begin=1)
                self._filling = len(self._waiting) < self.distance
                return [(i, 0, element)]
            self._filling = False
        while (
            len(self._waiting) < self.distance
            and (pulled := self._pull()) is not None
        ):
            self._keep(*pulled, begin=0)
        if not self._waiting:
            raise StopIteration
        return [self._draw()]

    def _keep(self, i: int, copies: int, element: Any, begin: int) -> None:
        if copies > begin:
            self._live[i] = element
            self._left[i] = copies - begin
            self._waiting += [(i, k) for k in range(begin, copies)]
        if self._first not in self._live:
            self._forget()

    def _draw(self) -> Output:
        waiting = self._waiting
        if not self._numbers:
            self._numbers = self._draw_numbers()
        self._drawn += 1
        at = int(self._numbers.pop() * len(waiting))
        if self._read - self._first > _AGE * self.distance:
            at = min(range(len(waiting)), key=waiting.__getitem__)
        i, k = waiting[at]
        waiting[at] = waiting[-1]
        waiting.pop()
        element = self._live[i]
        self._left[i] -= 1
        if not self._left[i]:
            del self._left[i], self._live[i]
            if i == self._first:
                self._forget()
        return i, k, element

    def _forget(self) -> None:
        first = self._first
        while first < self._read - 1 and first not in self._live:
            first += 1
        self._forget_until(first)

    def _draw_numbers(self) -> list[float]:
        """Return the random numbers left in this block of draws, last first."""
        block, at = divmod(self._drawn, _DRAWS)
        # A step of the counter makes four numbers: blocks must lie further apart than
        # that.
        bits = np.random.Philox(key=self._seed, counter=block * _DRAWS)
        return np.random.Generator(bits).random(_DRAWS)[at:][::-1].tolist()

    def _position(self) -> dict[str, Any]:
        most = self._copies.most
        codes = [i * most + k for i, k in self._waiting]
        room = self._choose(0) + most
        return {
            "read": self._read,
            "drawn": self._drawn,
            "filling": self._filling,
            "waiting": codes + [-1] * (room - len(codes)),
            "distance": self.distance,
        }

    def _check_position(self, state: Mapping[str, Any], first: int) -> None:
        most = self._copies.most
        room = self._choose(0) + self._copies.most
        length = self._elements if self._elements >= 0 else _checks.MOST_READ
        read = _checks.field(state, "read", least=first, most=length)
        _checks.field(state, "drawn")
        if not isinstance(state["filling"], bool):
            raise _checks.damaged("filling", state["filling"])
        codes = _checks.numbers(
            state, "waiting", lambda code: -1 <= code < read * most
        )
        waiting = [code for code in codes if code >= 0]
        oldest = min([*(code // most for code in waiting), max(read - 1, 0)])
        if (
            len(codes) != room
            or len(set(waiting)) != len(waiting)
            or oldest != first
        ):
            raise _checks.damaged("waiting", state["waiting"])

    def _replay_to(self, position: Mapping[str, Any]) -> list[Output]:
        most = self._copies.most
        self.distance, self._filling = position["distance"], position["filling"]
        self._waiting = [
            divmod(code, most) for code in position["waiting"] if code >= 0
        ]
        left = collections.Counter(i for i, _ in self._waiting)
        while self._read < position["read"]:
            pulled = self._pull()
            if pulled is None:
                raise StopIteration
            i, copies, element = pulled
            if left[i] > copies:
                raise _checks.damaged("waiting", position["waiting"])
            if left[i]:
                self._live[i], self._left[i] = element, left[i]
        self._drawn = position["drawn"]
        return []


# The schedules with a calendar: spread and adjacent.


Due = dict[int, list[Output]]  # tick -> what goes out in it, last first


class CalendarStream(Stream):
    """Every copy goes out in a tick that is known when its element is read; tick t reads element t."""

    def __init__(
        self,
        *args: Any,
        calendar: Callable[[int], Calendar | VaryingCalendar],
        **kwargs: Any,
    ):
        """Make a stream; calendar: distance -> calendar, the rest as Stream has it."""
        self._calendar_of = calendar
        self._least: int | None = None
        super().__init__(*args, **kwargs)

    @property
    def min_distance(self) -> int:
        """Return the least distance, drain included; the promised one until the end."""
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
        self._lags: dict[
            int, list[tuple[int, int]]
        ] = {}  # copies -> (copy, lag)

    def _decide(self) -> list[Output]:
        pulled = self._pull()
        if pulled is None:
            self._tick = self._next_of_drain()
        else:
            i, copies, element = pulled
            due = self._due
            # What comes in last goes out first: the freshest element, its earliest
            # copy.
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
        """Return the next tick with outputs; a source too short leaves gaps."""
        if not self._due:
            raise StopIteration
        if self._tick == self._read - 1 and isinstance(
            self._calendar, VaryingCalendar
        ):
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
        # From the oldest element to the newest, to its last copy; one output a tick if
        # copies vary.
        ticks = 2 * calendar.age + (calendar.age + 1) * self._copies.most
        tick = _checks.field(state, "tick", least=first - 1, most=first + ticks)
        # Every tick but the one before the first is known by its first output, which
        # went out.
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

    Of the elements whose next copy is far enough from the one before, that with the
    most copies left goes first; if there is none, the one that comes nearest. This is
    the greedy rule that is optimal for jobs with a cool-down.

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
    ready: list[
        tuple[int, int, int]
    ] = []  # (minus copies left, that tick, ordinal)
    plan = {}
    least = distance
    now = end
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
