"""Find the largest batch whose step meets a budget, and plan for sizes of a batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxtricks import _dtypes, _integers
from jaxtricks.remat import _memory
from jaxtricks.remat._program import Program
from jaxtricks.remat._trial import Trial

Batch = int | Sequence[int] | Literal["max"]
"""A size, several, or "max"."""

MAX_COMPILES = 8
# Compilations that stay for the unplanned step at the largest batch and for a schedule
# that recomputes less there.
_RESERVED = 2
_CLOSE = 0.004  # of the budget: a gain not worth another compilation
# Schedules that are tried: within these factors of the least memory by the model, since
# what is the smallest to the model need not be to the compiler.
_KINDS = 1.0, 1.12, 1.4
_REFUSED = 1.15  # of the budget: what a program takes that the compiler refused
# Of the budget: where the first guess aims, which only the model knows, and the others.
_FIRST_AIM, _AIM = 0.97, 0.998
_MAX_BATCH = 2**31 - 1


class Size(NamedTuple):
    """One size of the batch that was compiled.

    Attributes:
      batch: examples.
      figure: bytes, as `wrt` counts them.
      extra_flops: of its schedule, a fraction of the unplanned step's operations.
      flops_per_example: operations of the planned step per example.
      fits: whether it meets the budget.
    """

    batch: int
    figure: int
    extra_flops: float
    flops_per_example: float
    fits: bool


def sizes(batch: Batch, batch_step: int) -> tuple[int, ...] | None:
    """Return the sizes in order; None for "max".

    Raises:
      ValueError: a size or the step is not a positive integer.
    """
    if not _are_positive(batch_step) or not _integers.is_integer(batch_step):
        raise ValueError(
            f"batch_step is {batch_step!r:.40}: give a positive integer"
        )
    if isinstance(batch, str | bytes):
        if batch == "max":
            return None
    elif _are_positive(batch):
        return _integers.listed(batch)
    raise ValueError(
        f'batch is {batch!r:.40}: give a positive integer, several, or "max"'
    )


def _are_positive(batch: Any) -> bool:
    try:
        numbers = _integers.listed(batch)
    except TypeError:
        return False
    return bool(numbers) and all(0 < n < _MAX_BATCH for n in numbers)


def resized(
    args: Sequence[Any],
    positions: Sequence[int],
    batch: int,
) -> list[Any]:
    """Return the shapes of the arguments at another batch.

    Args:
      args: arrays or shapes.
      positions: of those arguments whose leaves begin with the axis of the batch;
        scalars and keys stay.
      batch: size of that axis.
    """

    def resize(x: Any) -> Any:
        if not _has_batch(x):
            return x
        shape = _memory.shape(x, _sharding(x))
        return shape.update(shape=(batch, *shape.shape[1:]))

    return [
        jax.tree.map(resize, arg) if i in positions else arg
        for i, arg in enumerate(args)
    ]


def _sharding(x: Any) -> Any:
    """Return the sharding of an array or a shape; None where the user asked for none."""
    sharding = getattr(x, "sharding", None)
    # An array is on some device, which is not that of a topology.
    is_anywhere = isinstance(sharding, SingleDeviceSharding)
    if is_anywhere and not isinstance(x, jax.ShapeDtypeStruct):
        return None
    return sharding


def size_of(
    args: Sequence[Any],
    positions: Sequence[int],
) -> int:
    """Return the batch of the arguments.

    Raises:
      ValueError: they have none, or several.
    """
    lengths = {
        jax.typeof(x).shape[0]
        for i in positions
        for x in jax.tree.leaves(args[i])
        if _has_batch(x)
    }
    if len(lengths) != 1:
        what = f"axes of {sorted(lengths)}" if lengths else "no array"
        raise ValueError(
            f"batch: the arguments that are not differentiated begin with {what}, "
            "not with one axis of the batch: name those that do by batch_argnums"
        )
    return lengths.pop()


def multiple(batch: int, step: int) -> int:
    """Return the largest multiple of the step up to the batch, at least the step."""
    return max(step, min(batch, _MAX_BATCH) // step * step)


def _has_batch(x: Any) -> bool:
    # A number of Python has neither shape nor dtype.
    aval = jax.typeof(x)
    return bool(aval.shape) and not _dtypes.is_key(aval)


@dataclasses.dataclass
class Largest:
    """A search for the largest batch.

    Attributes:
      programs: batch -> program.
      budget: bytes.
      wrt: "peak" or "temp".
      step: the batch is a multiple of it.
      max_extra: the most operations to run twice, as a fraction.
      tried: what was compiled.
    """

    programs: Callable[[int], Program]
    budget: int
    wrt: str
    step: int
    max_extra: float
    tried: list[Size] = dataclasses.field(default_factory=list)
    _kinds: list[float] = dataclasses.field(default_factory=list)

    def search(self, start: int) -> tuple[int, Trial | None]:
        """Return the largest batch that fits, and its trial.

        Args:
          start: about the size to start from.

        Returns:
          (0, None) if not even the smallest fits.
        """
        model = self._line(multiple(start, self.step))
        best: Trial | None = None
        while len(self.tried) < MAX_COMPILES - _RESERVED:
            low, high = self._bracket()
            smallest = (low.batch if low else 0) + self.step
            largest = (high.batch if high else _MAX_BATCH) - self.step
            guess = min(max(self._guess(model, low, high), smallest), largest)
            if guess < smallest:
                break
            trial = self._compile(guess)
            latest = self.tried[-1]
            if latest.fits:
                best = trial
                if latest.figure > (1 - _CLOSE) * self.budget:
                    break
        low, _ = self._bracket()
        return (low.batch, best) if low else (0, None)

    def _bracket(self) -> tuple[Size | None, Size | None]:
        """Return the largest size that fits, and the smallest that does not."""
        fitting = [size for size in self.tried if size.fits]
        low = max(fitting, default=None)
        # What another kind of schedule needs says nothing of this one.
        kind = self._kind()
        too_large = [
            size
            for size, other in zip(self.tried, self._kinds, strict=True)
            if other == kind and not size.fits and (not low or size > low)
        ]
        return low, min(too_large, default=None)

    def _kind(self) -> float:
        """Return the kind of schedule to compile next: a factor of `_KINDS`."""
        if len(self.tried) < len(_KINDS):
            return _KINDS[len(self.tried)]
        # Each was tried once: the one that needed least for an example.
        first = self.tried[: len(_KINDS)]
        least = min(
            range(len(_KINDS)), key=lambda i: first[i].figure / first[i].batch
        )
        return _KINDS[least]

    def _compile(self, batch: int) -> Trial:
        program = self.programs(batch)
        kind = self._kind()
        trial = program.compile(
            program.frontier.steps(self._index(program, kind))
        )
        self._add(batch, trial, program)
        self._kinds.append(kind)
        return trial

    def least(self) -> int:
        """Return the smallest figure that was compiled."""
        return min(size.figure for size in self.tried)

    def sizes(self) -> list[Size]:
        """Return what was compiled, by size: of each the smallest."""
        smallest: dict[int, Size] = {}
        for size in sorted(self.tried, key=lambda s: -s.figure):
            smallest[size.batch] = size
        return sorted(smallest.values())

    def _add(self, batch: int, trial: Trial, program: Program) -> None:
        """Note a trial."""
        figure = trial.report.peak if self.wrt == "peak" else trial.temp
        fits = not trial.is_refused and figure <= self.budget
        if trial.is_refused:
            # The machine has less than the budget: how much less is not said.
            figure = max(figure, int(_REFUSED * self.budget))
        flops = trial.report.flops
        self.tried.append(
            Size(batch, figure, flops / program.flops - 1, flops / batch, fits)
        )

    def _index(self, program: Program, kind: float) -> int:
        """Return the cheapest schedule within this factor of the least memory allowed.

        Memory increases over the schedules, and what runs twice decreases.
        """
        frontier = program.frontier
        allowed = frontier.extra <= self.max_extra * frontier.step
        least = frontier.memory[int(np.argmax(allowed))]
        within = np.searchsorted(frontier.memory, kind * least, "right")
        return int(within) - 1

    def _line(self, batch: int) -> tuple[float, float]:
        """Return the figure of the model as a straight line: (at 0, per example)."""
        other = 4 * batch
        first, second = self._model(batch), self._model(other)
        slope = (second - first) / (other - batch)
        return first - slope * batch, slope

    def _model(self, batch: int) -> float:
        program = self.programs(batch)
        memory = float(program.frontier.memory[self._index(program, 1.0)])
        return memory + (program.arguments() if self.wrt == "peak" else 0)

    def _guess(
        self,
        model: tuple[float, float],
        low: Size | None,
        high: Size | None,
    ) -> int:
        """Return the batch that should use up the budget."""
        constant, slope = model
        aim = (_AIM if self.tried else _FIRST_AIM) * self.budget
        if low and high:
            # What the compiler said is nearer than the model.
            slope = (high.figure - low.figure) / (high.batch - low.batch)
            constant = low.figure - slope * low.batch
        elif nearest := low or high or next(iter(self.tried), None):
            # The model, by the factor that it is wrong by here.
            ratio = nearest.figure / (constant + slope * nearest.batch)
            constant, slope = ratio * constant, ratio * slope
        return multiple(int((aim - constant) / max(slope, 1e-9)), self.step)
