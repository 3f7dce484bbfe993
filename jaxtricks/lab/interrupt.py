"""A request to stop that waits for the end of the step, the same one on all hosts."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxtricks.lab.hosts import Hosts


class StopError(BaseException):
    """SIGTERM before the first step. No Exception: what handles errors must not take it for one."""


class Interrupt:
    """Turns SIGTERM (a machine that is taken back) and Ctrl-C into a flag while it is entered.

    Before `wait` is called, while a run starts up, there is nothing to save, and compiling may take longer
    than a machine that is taken back has left: SIGTERM is then a `StopError` at once, and Ctrl-C, as always,
    a KeyboardInterrupt; so is a second Ctrl-C later. Outside the main thread signals can't be caught, and
    nothing changes. With several hosts jax.distributed catches SIGTERM, which Ctrl-C becomes too: one of
    them is enough to stop all after the same step.

    Args:
      hosts: that stop together.

    Attributes:
      signal: the name of the signal that came, "" before.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.signal = ""
        self._hosts, self._waits = hosts, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            alone = self._hosts.count == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._note if alone else _pass_on)
        return self

    def wait(self) -> None:
        """From now on a signal waits for the end of a step."""
        self._waits = True

    def due(self, step: int) -> bool:
        """Whether to stop after this step; called at every step."""
        if self._hosts.stop_at(step):
            self.signal = "SIGTERM"
        return bool(self.signal)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal == "SIGINT" or not self._waits
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if not self._waits:
            raise StopError


def _pass_on(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
