"""`factor="auto"`: follow how much slower the source is than what consumes its outputs.

The source is read by a thread of its own. While it is at work all the time, it is what everything
waits for, and the factor goes up. While it has to pause, the share of time in which it is at work
times the outputs per read is how far the factor could go down: the time of a read over the time of
an output, R. Both hold however much runs in parallel before and after the stage.
"""

import math
import time
from collections.abc import Callable
from fractions import Fraction

from jaxtricks import _compat
from jaxtricks.echo.copies import Changing

QUARTER = Fraction(1, 4)
SATURATED = 0.97
"""Share of time at work from which a source counts as what everything waits for."""
SETTLED = 0.95
"""Share of the factor's outputs that must have come before it is raised again."""
DEAD_BAND = Fraction(3, 8)
"""The factor goes down only if it is more than this above R: rounding alone is up to a quarter."""
WINDOW = 16
"""Batches of outputs between two decisions."""
MOST_PATIENT = 32
_TIMEOUT = 600.0  # seconds that another host may be late for a decision

Clock = Callable[[], float]


class Tuner:
    """Decides on the factor, at elements that are the same on all hosts.

    A decision moves the factor by a quarter, or by twice as much as the move before if that went the
    same way, and never below R. A move down that a move up had to mend makes the next one wait for
    twice as many windows that ask for it: a source with a buffer of its own looks idle wherever it
    isn't the bottleneck, and its R is found by trying.
    """

    def __init__(
        self, copies: Changing, busy: Clock, *, batch_size: int, clock: Clock = time.perf_counter
    ):
        """Make a tuner.

        Args:
          copies: whose factor it changes.
          busy: seconds in which the source has been at work.
          batch_size: outputs in a batch.
          clock: seconds that have passed.
        """
        self._copies, self._busy, self._clock = copies, busy, clock
        self._batch = batch_size
        self._meeting: _compat.Meeting | None = None
        self.restart()

    def restart(self) -> None:
        """Forget all measurements, as after a jump to another position."""
        self._next: int | None = None
        self._warm = False
        self._run = 0  # moves in the same direction so far, negative for down
        self._patience, self._low = 1, 0  # windows that must ask for less; that have, in a row

    def __call__(self, read: int, outputs: int) -> None:
        """Note that so many elements have been read and outputs made; decide if it is time to."""
        if self._next is None:
            self._begin(read, outputs)
        elif read >= self._next:
            if self._warm:
                self._decide(read, outputs)
            self._warm = True
            self._begin(read, outputs)

    def _begin(self, read: int, outputs: int) -> None:
        self._next = read + max(8, math.ceil(WINDOW * self._batch / self._copies.factor))
        self._start = read, outputs, self._clock(), self._busy()

    def _decide(self, read: int, outputs: int) -> None:
        before = self._copies.factor
        after = max(self._exchange(self._propose(read, outputs)))
        if after == before:
            return
        self._copies.change(read, after)
        direction = 1 if after > before else -1
        if self._run < 0:
            mended = direction > 0
            self._patience = (
                min(2 * self._patience, MOST_PATIENT) if mended else self._patience // 2 or 1
            )
        self._run = self._run + direction if self._run * direction >= 0 else direction
        self._low = 0

    def _propose(self, read: int, outputs: int) -> Fraction:
        reads, outs, clock, busy = self._start
        share = (self._busy() - busy) / max(self._clock() - clock, 1e-9)
        gain = (outputs - outs) / (read - reads)
        factor = self._copies.factor
        saturated = share >= SATURATED
        self._low = 0 if saturated or share * gain >= factor - DEAD_BAND else self._low + 1
        step = QUARTER * 2 ** abs(self._run)
        if saturated and gain >= SETTLED * factor:
            return min(factor + (step if self._run > 0 else QUARTER), Fraction(self._copies.most))
        if self._low >= self._patience:
            ratio = Fraction(math.ceil(4 * share * gain), 4)
            return max(factor - (step if self._run < 0 else QUARTER), ratio, Fraction(1))
        return factor

    def _exchange(self, factor: Fraction) -> list[Fraction]:
        if self._meeting is None:
            self._meeting = _compat.Meeting("echo")
        return [Fraction(text) for text in self._meeting.exchange(str(factor), _TIMEOUT)]
