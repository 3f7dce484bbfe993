"""Search for a schedule whose compiled program meets a budget of bytes.

The model's schedules come first, from its guess towards the budget, then what people
write manually.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxtricks.remat._schedule import Rerun, Run, Steps
from jaxtricks.remat._solver import Frontier
from jaxtricks.remat._stages import Stage
from jaxtricks.remat._trial import Trial

_AIM = 0.99  # of the budget: the next guess should fall just below
_FULL = 0.98  # of the budget: used up
_ERROR = 1.15  # the model's bytes may be this much above the compiler's
_SMALLER = 0.85  # of the guess: the last compilation should fit
_LARGER = 1.1  # of the bytes of a schedule: another size
# Of the operations of the step: a gain not worth another compilation.
_CLOSE = 0.003


class Search:
    """Compiles schedules, most promising first.

    Attributes:
      trials: what was compiled, the unplanned program apart.
    """

    def __init__(
        self,
        frontier: Frontier,
        compiled: Callable[[Steps], Trial],
        unplanned: Trial,
        max_compiles: int,
        first: Trial | None = None,
    ):
        self._frontier = frontier
        self._compiled = compiled
        self._unplanned = unplanned
        self._max_compiles = max_compiles
        self.trials: list[Trial] = [] if first is None else [first]
        # {index of a schedule of the frontier: bytes that it took}
        self._measured: dict[int, int] = {}

    def best(self, temp: int) -> Trial:
        """Return the cheapest trial within these temporaries, else the smallest."""
        if self._unplanned.fits(temp):
            return self._unplanned
        self._bisect(temp)
        for steps in manual_schedules(self._frontier):
            # The last compilation is for a smaller schedule while nothing fits.
            reserved = 0 if self._fitting(temp) else 1
            if self._remaining > reserved and self._promises(steps, temp):
                self._try(steps)
        self._shrink(temp)
        fitting = self._fitting(temp)
        if fitting:
            return min(fitting, key=lambda t: t.report.flops)
        candidates = [*self.trials, self._unplanned]
        return min(candidates, key=lambda t: (t.is_refused, t.temp))

    @property
    def _remaining(self) -> int:
        return self._max_compiles - len(self.trials)

    def _fitting(self, temp: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.fits(temp)]

    def _try(self, steps: Steps) -> Trial:
        self.trials.append(self._compiled(steps))
        return self.trials[-1]

    def _bisect(self, temp: int) -> None:
        """Try schedules of the frontier, from the model's guess towards the budget."""
        while self._remaining:
            i = self._next(temp)
            if i is None:
                return
            trial = self._try(self._frontier.steps(i))
            fits = trial.fits(temp)
            self._measured[i] = (
                trial.temp if fits else max(trial.temp, temp + 1)
            )

    def _next(self, temp: int) -> int | None:
        """Return the schedule to compile next; None if nothing is to be gained."""
        memory = self._frontier.memory
        extra = self._frontier.extra
        measured = self._measured
        # The schedules between the largest that fits and the smallest that does not.
        fitting = [i for i, nbytes in measured.items() if nbytes <= temp]
        low = max(fitting, default=-1)
        too_large = [i for i in measured if i > low and i not in fitting]
        high = min(too_large, default=len(memory))
        has_low = low >= 0
        has_high = high < len(memory)
        if high - low <= 1:
            return None
        if has_low:
            gain = extra[low] - extra[high - 1]
            if gain < _CLOSE * self._frontier.step:
                return None
            if measured[low] > _FULL * temp:
                return None
        if has_low and has_high:
            # Interpolate between the two nearest measurements.
            rise = memory[high] - memory[low]
            slope = rise / (measured[high] - measured[low])
            aim = memory[low] + slope * (_AIM * temp - measured[low])
        elif measured:
            # Correct the model by the ratio of the one measurement.
            nearest = high if has_high else low
            aim = memory[nearest] * _AIM * temp / max(1, measured[nearest])
        else:
            aim = _AIM * temp
        if self._remaining == 1 and not has_low:
            aim *= _SMALLER
        guess = int(np.searchsorted(memory, aim, "right")) - 1
        return min(max(guess, low + 1), high - 1)

    def _promises(
        self,
        steps: Steps,
        temp: int,
    ) -> bool:
        """Return whether steps may fit and be cheaper than what fits.

        By the model and its usual error.
        """
        memory, extra = self._frontier.cost(steps)
        fitting = [t.steps for t in self._fitting(temp) if t.steps]
        cheapest = min(
            (self._frontier.cost(other)[1] for other in fitting),
            default=math.inf,
        )
        return bool(memory < _ERROR * temp and extra < cheapest)

    def _shrink(self, temp: int) -> None:
        """Try the smallest schedules while nothing fits."""
        # What is the smallest to the model need not be to the compiler.
        for i in self._smallest_first():
            if not self._remaining or self._fitting(temp):
                return
            if i not in self._measured:
                trial = self._try(self._frontier.steps(i))
                self._measured[i] = trial.temp

    def _smallest_first(self) -> Iterator[int]:
        """Yield indices by increasing model bytes, the cheapest of about each size."""
        memory = self._frontier.memory
        i = 0
        while i < len(memory):
            following = int(np.searchsorted(memory, _LARGER * memory[i]))
            yield max(i, following - 1)
            i = max(i + 1, following)


# What people write manually: candidates beside the model's.


def manual_schedules(frontier: Frontier) -> Iterator[Steps]:
    """Yield the schedules that people place: saved products, sqrt(n) groups, halves."""
    n = len(frontier.stages)
    yield _products_saved(frontier.stages)
    runs = tuple(map(Run, range(n)))
    size = math.isqrt(n - 1) + 1
    groups = [runs[start : start + size] for start in range(0, n, size)]
    # The backward pass of the last group starts at once.
    yield (*map(Rerun, groups[:-1]), *groups[-1])
    yield _halves(0, n)


def _products_saved(stages: Sequence[Stage]) -> Steps:
    """Save products and recompute the rest: drop what costs little to compute again.

    The cheap-operation rule of Chen et al., section 4.2.
    """
    runs = [_most_saved(i, stage) for i, stage in enumerate(stages)]
    steps: list[Run | Rerun] = []
    for saves_all, group in itertools.groupby(
        runs, key=lambda r: r.saved is None
    ):
        neighbours = tuple(group)
        # Collectives never run twice: their cost is infinite.
        forward = [stages[run.stage].forward for run in neighbours]
        may_rerun = all(map(math.isfinite, forward))
        if saves_all and may_rerun and len(neighbours) > 1:
            steps.append(Rerun(neighbours))
        else:
            steps += neighbours
    return tuple(steps)


def _most_saved(i: int, stage: Stage) -> Run:
    saving = [o for o in stage.options if o.saved and not o.outer]
    if not saving:
        return Run(i)
    option = max(saving, key=lambda o: len(o.saved or ()))
    return Run(i, option.saved)


def _halves(a: int, b: int) -> Steps:
    if b - a == 1:
        return (Run(a),)
    middle = (a + b) // 2
    return (Rerun(_halves(a, middle)), *_halves(middle, b))
