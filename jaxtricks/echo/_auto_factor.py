"""Follow how much slower the source is than its consumer (`factor="auto"`).

A thread reads the source. While it is at work all the time, it is what everything waits
for, and the factor goes up. While it has to pause, the share of time in which it is at
work times the outputs per read is how far the factor could go down: the time of a read
over the time of an output, R. Both hold however much runs in parallel before and after
the stage.
"""

import math
import time
from collections.abc import Callable
from fractions import Fraction

from jaxtricks import _host_exchange
from jaxtricks.echo._schedules import Changing

QUARTER = Fraction(1, 4)
SATURATED = 0.97
"""Share of time at work from which a source counts as what everything waits for."""
SETTLED = 0.95
"""Share of the factor's outputs that must have come before it is raised again."""
DEAD_BAND = Fraction(1, 2)
"""The factor goes down only if it is more than this above R: rounding alone is up to a quarter."""
WINDOW = 16
"""Batches of outputs between two decisions."""
PATIENCE = 4, 64
"""Least and most windows that must contradict the factor; buffers run dry in them."""
AGREES = 0.8
"""Share of a factor that was too small which R must reach, or it cannot be measured."""
TRUSTED = 3
"""The same where R can be measured: only noise contradicts it."""
_TIMEOUT = 600.0  # seconds that another host may be late for a decision

Clock = Callable[[], float]


class Tuner:
    """Decides on the factor, at elements that are the same on all hosts.

    A move is a quarter, or twice the move before if that went the same way, and never
    below R. A source with a buffer looks idle wherever it isn't the bottleneck; it is
    known by an R that contradicts a factor that was too small just before. Then a move
    to such a factor waits for `_patience` windows that ask for it, which doubles
    whenever the move had to be mended.
    """

    def __init__(
        self,
        copies: Changing,
        busy: Clock,
        *,
        batch_size: int,
        clock: Clock = time.perf_counter,
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
        self._meeting: _host_exchange.Meeting | None = None
        self.restart()

    def restart(self) -> None:
        """Discard all measurements, as after a jump to another position."""
        self._next: int | None = None
        self._warm = False
        self._run = 0  # moves in the same direction so far, negative for down
        # A quarter above the last factor that was too small.
        self._enough = Fraction(1)
        self._below = 0  # moves to below that, in a row
        self._trusted = False  # whether R has agreed with it
        self._ratio = 0.0  # R when the factor went below it
        self._patience = PATIENCE[0]  # windows that must ask for that, in a row
        self._low = 0  # windows that have

    def __call__(self, read: int, outputs: int) -> None:
        """Count elements read and outputs; decide when it is time to."""
        if self._next is None:
            self._begin(read, outputs)
        elif read >= self._next:
            if self._warm:
                self._decide(read, outputs)
            self._warm = True
            self._begin(read, outputs)

    def _begin(self, read: int, outputs: int) -> None:
        self._next = read + max(
            8, math.ceil(WINDOW * self._batch / self._copies.factor)
        )
        self._start = read, outputs, self._clock(), self._busy()

    def _decide(self, read: int, outputs: int) -> None:
        before = self._copies.factor
        after = max(self._exchange(self._propose(read, outputs)))
        if after == before:
            return
        self._copies.change(read, after)
        self._low = 0
        if after > before:
            self._trusted &= not self._below or self._ratio >= AGREES * before
            self._run, self._enough = max(self._run, 0) + 1, before + QUARTER
            self._patience = min(
                self._patience * (2 if self._below else 1), PATIENCE[1]
            )
            self._below = 0
            return
        self._run = min(self._run, 0) - 1
        if after < self._enough:
            self._enough = after
            self._patience = max(
                self._patience // (2 if self._below else 1), PATIENCE[0]
            )
            self._below += 1

    def _propose(self, read: int, outputs: int) -> Fraction:
        reads, outs, clock, busy = self._start
        share = (self._busy() - busy) / max(self._clock() - clock, 1e-9)
        gain = (outputs - outs) / (read - reads)
        factor = self._copies.factor
        step = QUARTER * 2 ** abs(self._run)
        if share >= SATURATED:
            self._low = 0
            if gain < SETTLED * factor:
                return factor  # copies of the last move up are still to come
            return min(
                factor + (step if self._run > 0 else QUARTER),
                Fraction(self._copies.most),
            )
        if share * gain >= factor - DEAD_BAND:
            self._low = 0
            return factor
        if self._run > 0 and gain >= SETTLED * factor:
            self._trusted = share * gain >= AGREES * (self._enough - QUARTER)
        ratio = max(Fraction(math.ceil(4 * share * gain), 4), Fraction(1))
        if factor > self._enough:
            return max(
                factor - (step if self._run < 0 else QUARTER),
                ratio,
                self._enough,
            )
        # Above it, copies of a larger factor are still to go out.
        self._low += gain <= factor / SETTLED
        if self._low < (TRUSTED if self._trusted else self._patience):
            return factor
        self._ratio = share * gain
        return max(factor - QUARTER * 2**self._below, ratio)

    def _exchange(self, factor: Fraction) -> list[Fraction]:
        if self._meeting is None:
            self._meeting = _host_exchange.Meeting("echo")
        return [
            Fraction(text)
            for text in self._meeting.exchange(str(factor), _TIMEOUT)
        ]
