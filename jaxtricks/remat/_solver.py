"""Which stages to keep, which to run again, and how to nest: a dynamic programme over memory.

A schedule of a chain is a list of steps: run one stage as some option says, or run a
group of stages keeping only its input, and, when the cotangent arrives, run the group
by a schedule of its own. With a the carries, kept_o, extra_o, back_o the prices of
option o, and m bytes for stages s..t,

    cost(s, t, m) = min( min_o extra_o + cost(s+1, t, m - kept_o - a_ss)           if kept_o + back_o <= m
                         min_k forward(s..k) + cost(s, k, m) + cost(k+1, t, m - a_sk) )

after Herrmann, Beaumont et al., Optimal checkpointing for heterogeneous chains, arXiv
1911.13214, with options of every stage and their transients. What stages s..k add to
the carry, a_sk, is less than what is alive there: the input of a residual block passes
through.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtricks.remat._stages import Choice, Priced

SLOTS = 1000  # steps of memory; too few round small carries up


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a stage as chosen."""

    stage: int
    choice: Choice


@dataclasses.dataclass(frozen=True)
class Again:
    """Run these steps keeping their input only, and once more in the backward pass."""

    steps: "Schedule"


Schedule = tuple[Run | Again, ...]


def runs_of(schedule: Schedule) -> Iterator[Run]:
    """The runs of stages in order."""
    for step in schedule:
        if isinstance(step, Run):
            yield step
        else:
            yield from runs_of(step.steps)


def stages_of(schedule: Schedule) -> Iterator[int]:
    """The stages in order."""
    return (step.stage for step in runs_of(schedule))


class Solution:
    """All schedules that are the cheapest for some memory.

    Attributes:
      memory: model bytes of each distinct schedule, increasing: float64 [schedules].
      extra: operations that it runs twice: float64 [schedules].
      step: operations of both passes, roughly.
      prices, carries: of the stages; see `chain.carries`.
    """

    def __init__(
        self, prices: Sequence[Priced], carries: np.ndarray, slots: int = SLOTS
    ):
        self.prices, self._slots = prices, slots
        kept = (
            sum(max(o.kept for o in p.options) for p in prices)
            + carries.diagonal().sum()
        )
        transient = max(
            max(o.backward for o in p.options) + p.forward_bytes for p in prices
        )
        self._unit = max(1.0, (kept + transient) / slots)
        self._carry = np.ceil(carries / self._unit - 1e-9).astype(int)
        self.carries = carries
        self.step = 3 * sum(p.forward for p in prices if math.isfinite(p.forward))
        self._solve()
        cost = self._cost[0, -1]
        falls = np.flatnonzero(
            np.isfinite(cost) & (cost < np.append(math.inf, cost[:-1]) - 1e-9)
        )
        self._at, self.memory, self.extra = falls, falls * self._unit, cost[falls]

    def schedule(self, i: int) -> Schedule:
        """The i-th schedule."""
        return tuple(self._steps(0, len(self.prices) - 1, int(self._at[i])))

    def priced(self, schedule: Schedule, held: float = 0.0) -> tuple[float, float]:
        """(model bytes, operations run twice) of any schedule, on top of the bytes held."""
        peak, extra = held, 0.0
        for step in schedule:
            stages = list(stages_of((step,)))
            if isinstance(step, Run):
                price = self.prices[step.stage]
                option = next(
                    (o for o in price.options if o.choice == step.choice),
                    min(price.options, key=lambda o: o.extra),
                )
                most, again = (
                    max(option.kept + option.backward, price.forward_bytes),
                    option.extra,
                )
                peak, kept = max(peak, held + most), option.kept
            else:
                inner, again = self.priced(step.steps, held)
                again += sum(self.prices[i].forward for i in stages)
                peak, kept = max(peak, inner), 0.0
            held += kept + self.carries[stages[0], stages[-1]]
            extra += again
        return peak, extra

    def _up(self, n: float) -> int:
        return math.ceil(n / self._unit - 1e-9)

    def _solve(self) -> None:
        n, width = len(self.prices), self._slots + 1
        self._cost = np.full((n, n, width), math.inf)
        self._best = np.full(
            (n, n, width), -1, np.int16
        )  # option, or number of options + split
        forward = [p.forward for p in self.prices]
        for s in reversed(range(n)):
            for t in range(s, n):
                self._keep(s, t)
                if t > s:
                    # One row a split k: the first group ends with k, its carry is held
                    # by the rest.
                    later = _shifted(self._cost[s + 1 : t + 1, t], self._carry[s, s:t])
                    again = (
                        np.cumsum(forward[s:t])[:, None] + self._cost[s, s:t] + later
                    )
                    self._take(
                        s,
                        t,
                        again.min(0),
                        again.argmin(0) + len(self.prices[s].options),
                    )

    def _keep(self, s: int, t: int) -> None:
        """Stage s first, by each of its options."""
        m = np.arange(self._slots + 1)
        for i, o in enumerate(self.prices[s].options):
            need = max(
                self._up(o.kept + o.backward), self._up(self.prices[s].forward_bytes)
            )
            rest = np.zeros(len(m))
            if t > s:
                held = self._up(o.kept) + self._carry[s, s]
                rest = _shifted(self._cost[s + 1, t][None], np.array([held]))[0]
            self._take(
                s, t, np.where(m >= need, o.extra + rest, math.inf), np.full(len(m), i)
            )

    def _take(self, s: int, t: int, cost: np.ndarray, choice: np.ndarray) -> None:
        better = cost < self._cost[s, t] - 1e-9
        self._cost[s, t] = np.where(better, cost, self._cost[s, t])
        self._best[s, t] = np.where(better, choice, self._best[s, t])

    def _steps(self, s: int, t: int, m: int) -> Iterator[Run | Again]:
        while s <= t:
            options, best = self.prices[s].options, int(self._best[s, t, m])
            if best < len(options):
                yield Run(s, options[best].choice)
                m -= self._up(options[best].kept) + int(self._carry[s, s])
                s += 1
            else:
                k = s + best - len(options)
                yield Again(tuple(self._steps(s, k, m)))
                m -= int(self._carry[s, k])
                s = k + 1


def _shifted(cost: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Rows moved to the right, each by its own number; infinite where nothing is left."""
    at = np.arange(cost.shape[1])[None] - by[:, None]
    return np.where(at < 0, math.inf, np.take_along_axis(cost, np.maximum(at, 0), 1))
