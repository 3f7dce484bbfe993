"""Time a source and a step, and report what echoing would gain."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from jaxtricks import _table
from jaxtricks._arguments import checked
from jaxtricks.echo import _checks, _echo
from jaxtricks.echo._iterables import start
from jaxtricks.echo._streams import ReadAhead

_STORED_BATCHES = 4  # batches that the step is timed on
_WARM = 2  # steps before the clock: compilation

Placement = Literal[
    "before augmentation", "after augmentation", "batch", "none"
]


@dataclasses.dataclass(frozen=True)
class Report:
    """Seconds per batch, and what follows; str() is a table.

    Attributes:
      upstream: to make a batch up to where the stage would be.
      after: of work on the host behind the stage, 0 if there is none.
      collate: to stack elements to a batch, 0 if they are batches.
      step: of the training step.
      ratio: R = upstream / step.
      placement: where the stage pays most, the earliest place that can feed the step.
      factor: the suggestion, in quarters.
      expected: how many times as many steps per second, with reading beside the step.
      measured: the same, by running both; None if nothing is to be gained.
    """

    upstream: float
    after: float
    collate: float
    step: float
    ratio: float
    placement: Placement
    factor: float
    expected: float
    measured: float | None

    def __str__(self) -> str:
        rows = [
            ("upstream, ms a batch", 1e3 * self.upstream),
            (
                "host work after it, ms a batch",
                1e3 * (self.after + self.collate),
            ),
            ("step, ms", 1e3 * self.step),
            ("R = upstream / step", self.ratio),
            ("place the stage", self.placement),
            ("factor", self.factor),
            ("expected speed-up of steps/s", self.expected),
            ("measured speed-up", self.measured),
        ]
        return str(_table.make(("echo", "value"), rows))


@checked
def report(
    source: Any,
    step: Callable[[Any], Any],
    *,
    batch_size: int | None = None,
    after: Callable[[Any], Any] | None = None,
    steps: int = 32,
    max_factor: float = 6,
) -> Report:
    """Time a source and a training step, and say whether echoing pays, where, and how often.

    With reading beside the step, a step takes max(upstream / e + after, step) seconds,
    so that the best factor is upstream / (step - after), if the host work after the
    stage leaves time for it; else the stage belongs behind that work. The suggestion is
    tried out, on `steps` batches.

    Args:
      source: an iterable, or a function that makes one, up to where the stage would be.
        It is iterated several times, from the start where it can be.
      step: batch -> anything, for example a jitted update with the transfer; it is
        waited for.
      batch_size: elements that are stacked to a batch; None if the elements are
        batches.
      after: element -> element, work on the host that would follow the stage:
        augmentation.
      steps: batches that are timed.
      max_factor: a limit for the suggestion.

    Returns:
      A Report; print it.

    Raises:
      ValueError: an empty source, steps < 1, batch_size < 1, or max_factor not from 1
        to 1000.

    >>> str(report(range(100), lambda batch: None, batch_size=4, steps=2)).startswith("echo")
    True
    """
    steps = _checks.whole("echo.report: `steps`", steps)
    if batch_size is not None:
        batch_size = _checks.whole("echo.report: `batch_size`", batch_size)
    if (
        isinstance(max_factor, bool)
        or not 1 <= max_factor <= _checks.MOST_COPIES
    ):
        raise ValueError(
            f"echo.report: `max_factor` is {_checks.spell(max_factor)}: pass a "
            f"number from 1 to {_checks.MOST_COPIES}"
        )
    work = after or _same
    upstream, groups = _time_reading(source, batch_size or 1, steps)
    (done, host) = _timed(
        lambda: [[work(x) for x in group] for group in groups]
    )
    (batches, stack) = _timed(
        lambda: [_collate(group, batch_size) for group in done]
    )
    host, stack = (
        t / len(groups) if used else 0.0
        for t, used in ((host, after), (stack, batch_size))
    )
    device = _time_step(step, batches, steps)
    placement, factor = _suggest(upstream, host, stack, device, max_factor)
    measured = None
    if factor > 1:
        rates = [
            _rate(source, step, batch_size, work, steps, e, placement)
            for e in (1, factor)
        ]
        measured = rates[1] / rates[0]
    behind = {"after augmentation": stack, "batch": 0.0}.get(
        placement, host + stack
    )
    ahead = upstream + host + stack - behind
    return Report(
        upstream=upstream,
        after=host,
        collate=stack,
        step=device,
        ratio=upstream / device,
        placement=placement,
        factor=factor,
        expected=max(ahead + behind, device)
        / max(ahead / factor + behind, device),
        measured=measured,
    )


def _suggest(
    upstream: float, host: float, stack: float, step: float, limit: float
) -> tuple[Placement, float]:
    """Suggest the earliest stage behind which the host keeps up, and its factor."""
    places: list[tuple[Placement, float, float]] = [
        ("before augmentation", upstream, host + stack),
        ("after augmentation", upstream + host, stack),
        ("batch", upstream + host + stack, 0.0),
    ]
    if upstream + host + stack <= step:
        return "none", 1.0
    place, ahead, behind = next(p for p in places if p[-1] < step)
    ratio = ahead / (step - behind)
    factor = min(math.ceil(4 * ratio) / 4, limit)
    return place, max(factor, 1.0)


def _elements(source: Any) -> Iterator[Any]:
    """Iterate without end: a source that ends starts again."""
    while True:
        empty = True
        for element in start(source):
            empty = False
            yield element
        if empty:
            raise ValueError(
                "echo.report: `source` is empty: give one that can be iterated again"
            )


def _time_reading(
    source: Any, size: int, steps: int
) -> tuple[float, list[list[Any]]]:
    elements = _elements(source)
    next(elements)  # what is opened, is opened once
    batches = [
        list(itertools.islice(elements, size))
        for _ in range(min(_STORED_BATCHES, steps))
    ]
    _, seconds = _timed(
        lambda: [next(elements) for _ in range(size * steps)] and None
    )
    return seconds / steps, batches


def _time_step(
    step: Callable[[Any], Any], batches: list[Any], steps: int
) -> float:
    turns = itertools.cycle(batches)
    for _ in range(_WARM):
        jax.block_until_ready(step(next(turns)))
    _, seconds = _timed(
        lambda: [jax.block_until_ready(step(next(turns))) for _ in range(steps)]
    )
    return max(seconds / steps, 1e-9)


def _rate(
    source: Any,
    step: Callable[[Any], Any],
    batch_size: int | None,
    work: Callable[[Any], Any],
    steps: int,
    factor: float,
    placement: Placement,
) -> float:
    """Compute steps per second of a loop that reads in parallel."""
    ahead = ReadAhead(_Batches(source, batch_size, work, factor, placement))
    for _ in range(_WARM):
        jax.block_until_ready(step(ahead.read()[1]))
    _, seconds = _timed(
        lambda: [
            jax.block_until_ready(step(ahead.read()[1])) for _ in range(steps)
        ]
    )
    return steps / seconds


class _Batches:
    """The batches of a pipeline, with a stage in it. Copies in a row need as many reads as any."""

    def __init__(
        self,
        source: Any,
        batch_size: int | None,
        work: Callable[[Any], Any],
        factor: float,
        placement: Placement,
    ):
        def repeat(x: Any) -> Any:
            return _echo.echo(x, factor, schedule="adjacent")

        stream: Any = lambda: _elements(source)  # noqa: E731
        if placement == "before augmentation":
            stream = repeat(stream)
        stream = map(work, start(stream))
        if placement == "after augmentation":
            stream = repeat(stream)
        stream = _grouped(iter(stream), batch_size)
        self._stream = iter(repeat(stream) if placement == "batch" else stream)

    def read(self) -> tuple[Any, Any]:
        return None, next(self._stream)

    def snapshot(self) -> Any:
        return None

    def check(self, snapshot: Any, first: int) -> None:
        raise NotImplementedError

    def rewind(self, snapshot: Any) -> None:
        raise NotImplementedError


def _grouped(elements: Iterator[Any], batch_size: int | None) -> Iterator[Any]:
    while True:
        yield _collate(
            list(itertools.islice(elements, batch_size or 1)), batch_size
        )


def _collate(group: list[Any], batch_size: int | None) -> Any:
    return (
        group[0]
        if batch_size is None
        else jax.tree.map(lambda *x: np.stack(x), *group)
    )


def _same(x: Any) -> Any:
    return x


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin
