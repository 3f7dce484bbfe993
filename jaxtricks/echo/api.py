"""The public function."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from jaxtricks.echo import grain_dataset
from jaxtricks.echo import schedule as schedules
from jaxtricks.echo.sources import EchoIterable

DEFAULT_DISTANCE = 512
BATCHES_APART = 4


def echo(
    source: Any,
    factor: Any,
    *,
    schedule: Literal["spread", "adjacent", "pool"] = "spread",
    distance: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    class_of: Callable[[Any], int] | None = None,
    tag: bool = False,
    guard: bool = True,
    seed: int = 0,
) -> Any:
    """Repeat each element of a data source, so that a slow reader feeds more steps.

    copies(i) = floor((i + 1) e) - floor(i e), exact in rationals: n elements make floor(n e).

    A Grain dataset gives a `grain.IterDataset`, to be mapped, batched and prefetched on. Any other
    iterable, or a function that makes one, gives an iterable whose iterators have `get_state()` and
    `set_state(state)`: exact at every position, a small dict of fixed shape, JSON if the source's
    own state is. The source's state is used where its iterator, or the source itself, has
    get_state/set_state or state_dict/load_state_dict. Without one, `set_state` starts the source
    again and reads up to the position (the iterator's `fast_forwards` is True then).

    Args:
      source: grain.IterDataset (or MapDataset), any iterable, or a function that returns one.
      factor: e >= 1, mean copies per element; 2.5 gives 2, 3, 2, 3, ... Floats are taken to the
        nearest fraction with a denominator up to 1000.
      schedule: "spread" keeps consecutive copies of an element `distance` outputs apart;
        "adjacent" puts them in a row.
      distance: for "spread", the least difference of output indices between consecutive copies of
        one element, over the whole stream. A finite source that is too short for it gets less at
        its end, and `min_distance` says how much: exact on an iterator that has seen the end, and
        beforehand where len(source) is known.
      batch_size: outputs per batch later on; the distance is then 4 batches unless given. 1 if the
        elements are batches. Without either the distance is 512.
      max_bytes: not built yet.
      class_of: not built yet.
      tag: give `Echoed(element, ordinal, copy)` tuples: the key of an augmentation.
      guard: give read-only views of numpy arrays, so that an augmentation in place raises instead
        of changing the copies still to come.
      seed: of the random schedules; "spread" and "adjacent" draw nothing.

    Returns:
      The echoed dataset or iterable. Both have `distance`, `min_distance` and `held` (elements that
      are kept for later copies, at most); their iterators have `min_distance`.

    Raises:
      ValueError: factor below 1 or not a number, a distance below the batch size, a distance for
        "adjacent", or a source that cannot be iterated.
      NotImplementedError: for an argument that is not built yet, naming it.

    >>> list(echo("abcd", 2, distance=3))
    ['a', 'b', 'c', 'a', 'd', 'b', 'c', 'd']
    >>> list(echo("abc", 1.5, schedule="adjacent"))
    ['a', 'b', 'b', 'c']

    References:
      Choi et al., Faster neural network training with data echoing, arXiv 1907.05550.
    """
    _refuse_unbuilt(factor, schedule, max_bytes, class_of)
    e = schedules.rational(factor)
    if schedule == "adjacent":
        if distance is not None:
            raise ValueError('echo.echo: `distance` is for schedule="spread": leave it out')
        calendar = schedules.adjacent(e)
    else:
        calendar = schedules.spread(e, _distance(distance, batch_size))
    parent = grain_dataset.as_iter_dataset(source)
    if parent is not None:
        return grain_dataset.echo_dataset(parent, calendar, tag=tag, guard=guard)
    if not isinstance(source, Iterable) and not callable(source):
        raise ValueError("echo.echo needs an iterable `source`, or a function that makes one")
    return EchoIterable(source, calendar, tag, guard)


def _refuse_unbuilt(factor: Any, schedule: str, max_bytes: Any, class_of: Any) -> None:
    if schedule not in ("spread", "adjacent", "pool"):
        raise ValueError(f'echo.echo: `schedule` is {schedule!r}: pass "spread" or "adjacent"')
    unbuilt = {
        '`schedule="pool"`': schedule == "pool",
        "`max_bytes`": max_bytes is not None,
        "`class_of`": class_of is not None,
        '`factor="auto"`': isinstance(factor, str) and factor == "auto",
        "a `factor` per class": isinstance(factor, list | tuple) or np.ndim(factor) > 0,
    }
    for name, asked in unbuilt.items():
        if asked:
            raise NotImplementedError(f"echo.echo: {name} is not built yet")


def _distance(distance: int | None, batch_size: int | None) -> int:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"echo.echo needs `batch_size` >= 1, got {batch_size}")
    if distance is None:
        return DEFAULT_DISTANCE if batch_size is None else BATCHES_APART * batch_size
    if batch_size is not None and distance < batch_size:
        raise ValueError(
            f"echo.echo: `distance` {distance} is smaller than `batch_size` {batch_size}, so that "
            "copies could share a batch: leave it out or make it larger"
        )
    if distance < 1:
        raise ValueError(f"echo.echo needs `distance` >= 1, got {distance}")
    return distance
