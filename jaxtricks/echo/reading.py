"""Reading in a thread of its own, which is how `factor="auto"` sees how busy the source is."""

import queue
import threading
import time
from typing import Any

from jaxtricks.echo._streams import Source

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
        """(state, element), or what the source raised."""
        if self._thread is None:
            self._thread = _Thread(self._source)
        item = self._thread.items.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def snapshot(self) -> Any:
        """The state before the first element."""
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
        """Seconds in which the source was at work, so far."""
        return self._busy + (self._thread.busy if self._thread else 0.0)

    def close(self) -> None:
        """End the thread, after the read it is in."""
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
        self._thread = threading.Thread(target=self._run, name="jaxtricks-echo", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> float:
        since = self._since
        return self._done + (0.0 if since is None else time.perf_counter() - since)

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
