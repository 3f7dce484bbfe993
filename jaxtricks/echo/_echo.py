"""Echo a source of elements: the public function."""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from jaxtricks._arguments import checked
from jaxtricks.echo import _checks
from jaxtricks.echo._iterables import EchoIterable, Factor, Recipe, most_copies
from jaxtricks.echo._schedules import rational

DEFAULT_DISTANCE = 512
MOST_APART = 10**9
BATCHES_APART = 4
SCHEDULES = ("spread", "adjacent", "pool")


@checked
def echo(
    source: Any,
    factor: Any,
    *,
    schedule: Literal["spread", "adjacent", "pool"] = "spread",
    distance: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    class_of: Callable[[Any], int] | None = None,
    max_factor: int = 6,
    tag: bool = False,
    guard: bool = True,
    seed: int = 0,
) -> Any:
    """Repeat each element of a data source, so that a slow reader feeds more steps.

    copies(i) = floor((i + 1) e) - floor(i e), exact in rationals: n elements make
    floor(n e).

    A Grain dataset gives a `grain.IterDataset`, to be mapped, batched and prefetched
    on. Any other iterable, a tf.data.Dataset, or a function that makes an iterable,
    gives an iterable whose iterators have `get_state()` and `set_state(state)`: exact
    at every position, a small dict of fixed shape, JSON if the source's state is.
    The source's state is used where its iterator, or the source itself, has
    get_state/set_state or state_dict/load_state_dict. Without one, `set_state` starts
    the source again and reads up to the position (the iterator's `fast_forwards` is
    True then).

    Args:
      source: grain.IterDataset (or MapDataset), any iterable, or a function that
        returns one.
      factor: e from 1 to 1000, mean copies per element; 2.5 gives 2, 3, 2, 3, ...
        Floats are taken to the nearest fraction with a denominator up to 1000. [C]
        factors, one for every class, with `class_of`. "auto" measures how much slower
        the source is than its consumer, and follows it in quarter steps: the same on
        all hosts of `jax.distributed`, which must read and resume alike. The `changes`
        of such an iterator, passed as the factor, replay its stream.
      schedule: "spread" keeps consecutive copies of an element `distance` outputs
        apart; "adjacent" puts them in a row; "pool" draws them from a shuffle buffer,
        as the paper does.
      distance: for "spread", the least difference of output indices between consecutive
        copies of one element, over the whole stream. A finite source that is too short
        for it gets less at its end, as does one whose factor is not constant;
        `min_distance` says how much: exact on an iterator that has reached the end, and
        beforehand where len(source) is known and the factor constant. For "pool", the
        copies that the buffer holds; nothing is promised then.
      batch_size: outputs per batch later on; the distance is then 4 batches unless
        passed. 1 if the elements are batches. Without either the distance is 512.
      max_bytes: budget for the elements that are held for later copies, by the size of
        the first one; the distance becomes as large as it allows, unless one is passed.
      class_of: element -> class 0 to C - 1; with [C] factors.
      max_factor: a limit for "auto", whole.
      tag: give `Echoed(element, ordinal, copy)` tuples: the key of an augmentation.
      guard: give read-only views of numpy arrays, each copy in dicts and lists of its
        own, so that an augmentation in place raises instead of changing the copies
        still to come. Raises too if the source changes its first array later on, or if
        a jax.Array was donated before its next copy.
      seed: of the draws of "pool"; "spread" and "adjacent" draw nothing.

    Returns:
      The echoed dataset or iterable. Both have `distance`, `min_distance` and `held`
      (the most elements that wait for later copies); their iterators have
      `distance`, `min_distance` and `changes`, ((element, factor), ...) unless factors
      are per class.

    Raises:
      ValueError: factor below 1, above 1000 or not a number, a distance or a batch size
        that is not a whole number, a distance below the batch size, a distance for
        "adjacent", a budget that is too small (when the first element is read), or a
        source that cannot be iterated.

    >>> list(echo("abcd", 2, distance=3))
    ['a', 'b', 'c', 'a', 'd', 'b', 'c', 'd']
    >>> list(echo("abc", 1.5, schedule="adjacent"))
    ['a', 'b', 'b', 'c']
    >>> list(echo("aBcD", [1, 2], class_of=str.isupper, distance=2))
    ['a', 'B', 'c', 'B', 'D', 'D']

    References:
      Choi et al., Faster neural network training with data echoing, arXiv 1907.05550.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"echo.echo: `schedule` is {schedule!r}: pass one of {', '.join(SCHEDULES)}"
        )
    auto = isinstance(factor, str) and factor == "auto"
    factors = ((0, Fraction(1)),) if auto else _factors(factor, class_of)
    if auto and class_of is not None:
        raise ValueError(
            'echo.echo: `class_of` needs a `factor` per class, not "auto"'
        )
    limit = _checks.whole(
        "echo.echo: `max_factor`", max_factor, 1, _checks.MOST_COPIES
    )
    batch = (
        None
        if batch_size is None
        else _checks.whole("echo.echo: `batch_size`", batch_size, 1, MOST_APART)
    )
    chosen, least = _distance(schedule, distance, batch)
    recipe = Recipe(
        schedule=schedule,
        factor=factors,
        auto=auto,
        most=most_copies(factors) if not auto else limit,
        distance=chosen,
        least=least,
        batch_size=batch or DEFAULT_DISTANCE // BATCHES_APART,
        max_bytes=_budget(max_bytes, schedule),
        class_of=class_of,
        tag=tag,
        guard=guard,
        seed=_checks.whole("echo.echo: `seed`", seed, 0),
    )
    dataset = _grain_dataset(source, recipe)
    if dataset is not None:
        return dataset
    if not isinstance(source, Iterable) and not callable(source):
        raise ValueError(
            "echo.echo needs an iterable `source`, or a function that makes one"
        )
    return EchoIterable(source, recipe)


def _grain_dataset(source: Any, recipe: Recipe) -> Any:
    """Return the source as a Grain dataset if it is one, else None."""
    # If Grain was never imported the source is not one of its datasets.
    if "grain" not in sys.modules:
        return None
    from jaxtricks.echo import _grain

    parent = _grain.as_iter_dataset(source)
    return None if parent is None else _grain.EchoIterDataset(parent, recipe)


def _factors(factor: Any, class_of: Any) -> Factor:
    if not isinstance(factor, Sequence) or isinstance(factor, str):
        factor = np.asarray(factor).tolist() if np.ndim(factor) else factor
    if not isinstance(factor, Sequence) or isinstance(factor, str):
        if class_of is not None:
            raise ValueError(
                "echo.echo: `class_of` needs a `factor` per class, [C], not one number"
            )
        return rational(factor)
    if not len(factor):
        raise ValueError(
            "echo.echo: `factor` is empty: give one number, or one per class"
        )
    if (
        all(isinstance(f, Sequence) and len(f) == 2 for f in factor)
        and class_of is None
    ):
        return _changes(factor)
    if class_of is None:
        raise ValueError(
            "echo.echo: a `factor` per class needs `class_of`: element -> class"
        )
    return tuple(rational(f) for f in factor)


def _changes(factor: Sequence[Any]) -> Factor:
    starts = [
        _checks.whole("echo.echo: an element in `factor`", i, 0)
        for i, _ in factor
    ]
    if starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(
            "echo.echo: (element, factor) pairs in `factor` must begin at "
            "element 0 and go up"
        )
    return tuple(
        (i, rational(f)) for i, (_, f) in zip(starts, factor, strict=True)
    )


def _budget(max_bytes: int | None, schedule: str) -> int | None:
    if max_bytes is None:
        return None
    if schedule == "adjacent":
        raise ValueError(
            'echo.echo: `max_bytes` is not for schedule="adjacent": leave it out'
        )
    return _checks.whole("echo.echo: `max_bytes`", max_bytes)


def _distance(
    schedule: str, distance: int | None, batch_size: int | None
) -> tuple[int, int]:
    """Return (the distance, its lower limit)."""
    if schedule == "adjacent":
        if distance is not None:
            raise ValueError(
                'echo.echo: `distance` is not for schedule="adjacent": leave it out'
            )
        return 1, 1
    if distance is None:
        distance = (
            DEFAULT_DISTANCE
            if batch_size is None
            else BATCHES_APART * batch_size
        )
        return (
            distance,
            1 if batch_size is None or schedule == "pool" else batch_size,
        )
    distance = _checks.whole("echo.echo: `distance`", distance, 1, MOST_APART)
    if (
        schedule == "spread"
        and batch_size is not None
        and distance < batch_size
    ):
        raise ValueError(
            f"echo.echo: `distance` {distance} is smaller than `batch_size` "
            f"{batch_size}, so that copies could share a batch: leave it out "
            "or make it larger"
        )
    return distance, distance
