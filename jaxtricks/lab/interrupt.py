"""A request to stop that waits for the end of the step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Turns SIGTERM (a machine that is taken back) and Ctrl-C into a flag while it is entered.

    A second Ctrl-C is a KeyboardInterrupt at once. Outside the main thread signals can't be caught, and
    nothing changes.

    Attributes:
      signal: the name of the signal that came, "" before.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
