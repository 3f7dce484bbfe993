"""A request to stop that waits for the end of the step, the same one on all hosts."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxtricks.lab.hosts import Hosts


class Interrupt:
    """Turns SIGTERM (a machine that is taken back) and Ctrl-C into a flag while it is entered.

    A second Ctrl-C is a KeyboardInterrupt at once. Outside the main thread signals can't be caught, and
    nothing changes. With several hosts jax.distributed catches SIGTERM, which Ctrl-C becomes too: one of
    them is enough to stop all after the same step.

    Args:
      hosts: that stop together.

    Attributes:
      signal: the name of the signal that came, "" before.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.signal = ""
        self._hosts = hosts
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            alone = self._hosts.count == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._note if alone else _pass_on)
        return self

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
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


def _pass_on(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
