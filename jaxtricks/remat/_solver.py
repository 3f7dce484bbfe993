"""Decide how each stage runs and which to run again: a dynamic programme over memory.

A schedule of a chain is a list of steps: run one stage by some option, or run a group
of stages, save only its input, and run the group again when the cotangent arrives, by a
schedule of its own. With a the carries, r_o, extra_o, back_o the costs of option o, and
m bytes for stages s..t,

    cost(s, t, m) = min(
        min_o extra_o + cost(s+1, t, m - r_o - a_ss)   where r_o + back_o <= m,
        min_k forward(s..k) + cost(s, k, m) + cost(k+1, t, m - a_sk) )

after Herrmann, Beaumont et al., Optimal checkpointing for heterogeneous chains, arXiv
1911.13214, with options of every stage and their transients. What stages s..k add to
the carry, a_sk, is less than what is alive there: the input of a residual block passes
through.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxtricks.remat._schedule import Rerun, Run, Steps, stages_of
from jaxtricks.remat._stages import Option, Stage

# Steps of memory: too few round small carries up, and each costs time for every pair of
# stages and every place between them.
_MIN_SLOTS, _MAX_SLOTS = 800, 4000
_MAX_CELLS = 1e8
_TOLERANCE = 1e-9


class Frontier:
    """All schedules that are the cheapest for some memory.

    Args:
      stages: with their costs; see `_costs.with_costs`.
      carries: see `_stages.carries`.
      slots: number of steps in which memory is counted; None takes as many as are quick.

    Attributes:
      memory: model bytes of each distinct schedule, increasing: float64 [schedules].
      extra: operations that it runs twice: float64 [schedules].
      step: operations of both passes, roughly.
      stages, carries: the arguments.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        carries: np.ndarray,
        slots: int | None = None,
    ):
        self.stages = stages
        self.carries = carries
        if slots is None:
            fitting = int(_MAX_CELLS / len(stages) ** 3)
            slots = min(max(fitting, _MIN_SLOTS), _MAX_SLOTS)
        self._slots = slots
        most_residuals = 0.0
        most_transient = 0.0
        for stage in stages:
            most_residuals += max(
                option.residual_bytes for option in stage.options
            )
            backward = max(option.backward_bytes for option in stage.options)
            most_transient = max(most_transient, backward + stage.forward_bytes)
        # No schedule needs more.
        most = most_residuals + carries.diagonal().sum() + most_transient
        self._slot_bytes = max(1.0, most / slots)
        self._carry_slots = np.ceil(
            carries / self._slot_bytes - _TOLERANCE
        ).astype(int)
        # A backward pass costs about two forward ones.
        forward = [s.forward for s in stages if math.isfinite(s.forward)]
        self.step = 3 * sum(forward)
        self._solve()
        # The frontier is where one more slot of memory makes the chain cheaper.
        cost = self._cost[0, -1]
        one_slot_less = np.append(math.inf, cost[:-1])
        is_cheaper = np.isfinite(cost) & (cost < one_slot_less - _TOLERANCE)
        self._slots_of = np.flatnonzero(is_cheaper)
        self.memory = self._slots_of * self._slot_bytes
        self.extra = cost[self._slots_of]

    def steps(self, i: int) -> Steps:
        """Return the steps of the i-th schedule."""
        last = len(self.stages) - 1
        return tuple(self._backtrack(0, last, int(self._slots_of[i])))

    def cost(
        self,
        steps: Steps,
        held: float = 0.0,
    ) -> tuple[float, float]:
        """Return (model bytes, operations run twice) of any steps.

        Args:
          steps: they need not be on the frontier.
          held: bytes that are alive before them.
        """
        peak = held
        extra = 0.0
        for step in steps:
            indices = stages_of((step,))
            if isinstance(step, Run):
                stage = self.stages[step.stage]
                option = _option_of(stage, step)
                residual_bytes = option.residual_bytes
                backward = residual_bytes + option.backward_bytes
                peak = max(peak, held + max(backward, stage.forward_bytes))
                extra += option.extra
            else:
                inner_peak, inner_extra = self.cost(step.steps, held)
                peak = max(peak, inner_peak)
                again = sum(self.stages[i].forward for i in indices)
                extra += inner_extra + again
                residual_bytes = 0.0
            held += residual_bytes + self.carries[indices[0], indices[-1]]
        return peak, extra

    def _in_slots(self, nbytes: float) -> int:
        return math.ceil(nbytes / self._slot_bytes - _TOLERANCE)

    def _solve(self) -> None:
        """Fill the tables of least cost and best decision: [first, last, slots]."""
        n = len(self.stages)
        shape = (n, n, self._slots + 1)
        self._cost = np.full(shape, math.inf)
        # An option, or the number of options + where the first group ends.
        self._best = np.full(shape, -1, np.int16)
        # From the last stage: the rest of the chain is solved before its first stage.
        for s in reversed(range(n)):
            for t in range(s, n):
                self._run_first(s, t)
                if t > s:
                    self._rerun_first(s, t)

    def _run_first(self, s: int, t: int) -> None:
        """Take the costs of running stage s once, by each of its options."""
        stage = self.stages[s]
        width = self._slots + 1
        forward = self._in_slots(stage.forward_bytes)
        for i, option in enumerate(stage.options):
            rest = np.zeros(width)
            if t > s:
                residuals = self._in_slots(option.residual_bytes)
                held = residuals + self._carry_slots[s, s]
                (rest,) = _shifted(self._cost[s + 1, t][None], np.array([held]))
            backward = option.residual_bytes + option.backward_bytes
            needed = max(self._in_slots(backward), forward)
            cost = option.extra + rest
            cost[np.arange(width) < needed] = math.inf
            self._take_cheaper(s, t, cost, np.full(width, i))

    def _rerun_first(self, s: int, t: int) -> None:
        """Take the costs of running a first group s..k twice, for every k < t."""
        # One row per k. Its carry is alive during the rest.
        carry = self._carry_slots[s, s:t]
        rest = _shifted(self._cost[s + 1 : t + 1, t], carry)
        group = self.stages[s:t]
        forward = np.cumsum([stage.forward for stage in group])
        total = forward[:, None] + self._cost[s, s:t] + rest
        # Numbers below are options of the first stage.
        options = len(self.stages[s].options)
        decision = total.argmin(0) + options
        self._take_cheaper(s, t, total.min(0), decision)

    def _take_cheaper(
        self,
        s: int,
        t: int,
        cost: np.ndarray,
        decision: np.ndarray,
    ) -> None:
        best_cost = self._cost[s, t]
        best = self._best[s, t]
        # Views of the tables, changed in place.
        is_cheaper = cost < best_cost - _TOLERANCE
        best_cost[is_cheaper] = cost[is_cheaper]
        best[is_cheaper] = decision[is_cheaper]

    def _backtrack(
        self,
        s: int,
        t: int,
        slots: int,
    ) -> Iterator[Run | Rerun]:
        while s <= t:
            options = self.stages[s].options
            best = int(self._best[s, t, slots])
            if best < len(options):
                option = options[best]
                yield run_of(s, option)
                slots -= self._in_slots(option.residual_bytes)
                slots -= int(self._carry_slots[s, s])
                s += 1
            else:
                last = s + best - len(options)
                yield Rerun(tuple(self._backtrack(s, last, slots)))
                slots -= int(self._carry_slots[s, last])
                s = last + 1


def run_of(stage: int, option: Option) -> Run:
    """Return the step that runs a stage by an option."""
    return Run(
        stage, option.saved, option.outer, option.in_parts, option.offload
    )


def _option_of(stage: Stage, run: Run) -> Option:
    """Return the option that a run chooses, the cheapest if another one beats it."""
    for option in stage.options:
        if run_of(run.stage, option) == run:
            return option
    return min(stage.options, key=lambda option: option.extra)


def _shifted(cost: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Move each row to the right by its number; infinite where nothing is left."""
    columns = np.arange(cost.shape[1])[None] - by[:, None]
    moved = np.take_along_axis(cost, np.maximum(columns, 0), 1)
    return np.where(columns < 0, math.inf, moved)
