"""From the model's schedules to one whose compiled bytes meet the budget."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.extend.core import Var

from jaxtricks import _jaxpr
from jaxtricks.remat import _memory, _stages, chain, cost, flat, hand
from jaxtricks.remat._plan import Recipe
from jaxtricks.remat._solver import Schedule, Solution

_AIM = 0.98  # of the budget: the next guess should fall just below
_FULL = 0.96  # of the budget: used up
_ERROR = 1.3  # the model's bytes may be this much above the compiler's
_CLOSE = 0.005  # of the step's operations: a gain not worth another compilation


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A program as a chain of priced stages.

    Attributes:
      ends, stages: the chain.
      prints: fingerprints of the stages.
      solution: the best schedules by the model.
    """

    ends: tuple[int, ...]
    stages: list[chain.Stage]
    prints: tuple[str, ...]
    solution: Solution

    @classmethod
    def of(cls, program: _jaxpr.Jaxpr, varied: Sequence[bool], platform: str) -> "Problem":
        """The problem of an inlined program.

        Args:
          program: the forward pass.
          varied: which of its invars are differentiated.
          platform: "cpu", "gpu" or "tpu".
        """
        ends = chain.cut(program)
        stages = chain.stages(program, ends)
        prints = tuple(flat.fingerprint(stage.jaxpr) for stage in stages)
        moving = {v for v, moves in zip(program.invars, varied, strict=True) if moves}
        for eqn in program.eqns:
            if any(isinstance(v, Var) and v in moving for v in eqn.invars):
                moving.update(eqn.outvars)
        known: dict[object, _stages.Priced] = {}
        prices = []
        for stage, name in zip(stages, prints, strict=True):
            moves = tuple(v in moving for v in (*stage.jaxpr.constvars, *stage.jaxpr.invars))
            if (name, moves) not in known:
                known[name, moves] = _stages.price(stage, moves, cost.FLOPS_PER_BYTE[platform])
            prices.append(known[name, moves])
        return cls(tuple(ends), stages, prints, Solution(prices, chain.carries(program, ends)))

    def recipe(self, schedule: Schedule | None) -> Recipe:
        """The schedule with what it is for."""
        return Recipe(self.ends, self.prints, schedule)


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """A compiled program: its report and its jaxpr; `refused` if the machine has no room for it."""

    report: _memory.Report
    jaxpr: _jaxpr.ClosedJaxpr
    refused: bool = False

    def alive(self) -> np.ndarray:
        """Bytes alive at each operation, as `cost.live_bytes` estimates them."""
        return cost.live_bytes(flat.live(self.jaxpr))


@dataclasses.dataclass(frozen=True, eq=False)
class Tried:
    """A schedule (None: unplanned) and what the compiler made of it."""

    schedule: Schedule | None
    figures: Figures

    @property
    def temp(self) -> int:
        """Bytes of temporaries."""
        return self.figures.report.temp

    def fits(self, temp: int) -> bool:
        """Whether it compiled, and within these bytes of temporaries."""
        return not self.figures.refused and self.temp <= temp


class Search:
    """Compiles schedules, most promising first.

    Attributes:
      tried: what was compiled, the unplanned program apart.
    """

    def __init__(
        self,
        solution: Solution,
        compiled: Callable[[Schedule], Figures],
        unplanned: Figures,
        max_compiles: int,
    ):
        self._solution, self._compiled = solution, compiled
        self._unplanned, self._left = Tried(None, unplanned), max_compiles
        self.tried: list[Tried] = []
        # {index of a schedule of the solution: bytes that it took}
        self._seen: dict[int, int] = {}

    def best(self, temp: int) -> Tried:
        """The cheapest schedule found within these bytes of temporaries, else the smallest one."""
        if self._unplanned.fits(temp):
            return self._unplanned
        # The last one is for the smallest: what is called infeasible has been tried.
        while self._left > (not self._fitting(temp)) and (i := self._next(temp)) is not None:
            tried = self._try(self._solution.schedule(i))
            self._seen[i] = tried.temp if tried.fits(temp) else max(tried.temp, temp + 1)
        for schedule in hand.schedules(self._solution):
            if self._left and self._promises(schedule, temp):
                self._try(schedule)
        if self._left and not self._fitting(temp) and 0 not in self._seen:
            self._seen[0] = self._try(self._solution.schedule(0)).temp
        # What is the smallest to the model need not be to the compiler.
        for i in self._smallest():
            if not self._left or self._fitting(temp):
                break
            if i not in self._seen:
                self._seen[i] = self._try(self._solution.schedule(i)).temp
        cheapest = min(self._fitting(temp), key=lambda t: t.figures.report.flops, default=None)
        every = [*self.tried, self._unplanned]
        return cheapest or min(every, key=lambda t: (t.figures.refused, t.temp))

    def _smallest(self) -> Iterator[int]:
        """Indices of schedules from the smallest on by the model, of each size the cheapest."""
        size = lambda i: self._solution.priced(self._solution.schedule(i))[0]  # noqa: E731
        for _, same in itertools.groupby(range(len(self._solution.memory)), key=size):
            *_, cheapest = same
            yield cheapest

    def _fitting(self, temp: int) -> list[Tried]:
        return [t for t in self.tried if t.fits(temp)]

    def _try(self, schedule: Schedule) -> Tried:
        self._left -= 1
        self.tried.append(Tried(schedule, self._compiled(schedule)))
        return self.tried[-1]

    def _next(self, temp: int) -> int | None:
        """The schedule to compile next; None if nothing is to be gained."""
        memory, extra = self._solution.memory, self._solution.extra
        low = max((i for i, n in self._seen.items() if n <= temp), default=-1)
        high = min((i for i, n in self._seen.items() if n > temp and i > low), default=len(memory))
        if high - low <= 1:
            return None
        if low >= 0 and self._seen[low] > _FULL * temp:
            return None
        if low >= 0 and extra[low] - extra[high - 1] < _CLOSE * self._solution.step:
            return None
        if low >= 0 and high < len(memory):
            slope = (memory[high] - memory[low]) / (self._seen[high] - self._seen[low])
            aim = memory[low] + slope * (_AIM * temp - self._seen[low])
        elif self._seen:
            known = high if high < len(memory) else low
            aim = memory[known] * _AIM * temp / max(1, self._seen[known])
        else:
            aim = _AIM * temp
        guess = int(np.searchsorted(memory, aim, "right")) - 1
        return min(max(guess, low + 1), high - 1)

    def _promises(self, schedule: Schedule, temp: int) -> bool:
        """Whether a schedule may fit and be cheaper than what fits, by the model and its usual error."""
        memory, extra = self._solution.priced(schedule)
        found = [self._solution.priced(t.schedule)[1] for t in self._fitting(temp) if t.schedule]
        return bool(memory < _ERROR * temp and extra < min(found, default=math.inf))
