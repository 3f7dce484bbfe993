"""The arms of `echo_quality`: what is echoed and how, the batches that come out, and what is in them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import jaxtricks as jt
from benchmarks import image_task
from benchmarks.image_task import Split

FACTOR, BATCH = 4, 64
POOL = 512  # copies in the shuffle buffer


class Arm(NamedTuple):
    """A way to fill the steps.

    Attributes:
      name: for the table.
      augmented: "each" copy anew, or "once" for all copies.
      options: of `echo.echo`.
      factor: of `echo.echo`.
      reads: images from the source, as a multiple of what the echoed arms read.
      batches: whether the elements that are echoed are batches.
      again: whether the reads are passes over the images of the echoed arms, in new orders.
    """

    name: str
    augmented: str
    options: Mapping[str, Any]
    factor: int = FACTOR
    reads: int = 1
    batches: bool = False
    again: bool = False


class Batch(NamedTuple):
    """Images uint8 [B, H, W, 3], their labels [B], and where they come from: [B] each."""

    images: np.ndarray
    labels: np.ndarray
    ordinals: np.ndarray
    copies: np.ndarray


def arms() -> dict[str, Arm]:
    """The arms by their keys."""
    row = {"schedule": "adjacent"}
    both = {
        "adjacent": Arm("images, in a row", "each", row),
        "pool": Arm(
            f"images, pool {POOL}",
            "each",
            {"schedule": "pool", "distance": POOL},
        ),
        "spread": Arm(
            "images, spread, the default", "each", {"batch_size": BATCH}
        ),
        "batch": Arm("batches, in a row", "each", row, batches=True),
        "batch spread": Arm(
            "batches, spread, the default",
            "each",
            {"batch_size": 1},
            batches=True,
        ),
    }
    found = {
        "none": Arm("none: a quarter of the steps", "each", row, factor=1),
        "fresh": Arm("fresh images only", "each", row, factor=1, reads=FACTOR),
        "epochs": Arm(
            "none: read again", "each", row, factor=1, reads=FACTOR, again=True
        ),
    }
    for key, arm in both.items():
        found[f"{key}, each"] = arm
        found[f"{key}, once"] = arm._replace(augmented="once")
    for distance in (64, 512, 2048):
        options = {"batch_size": BATCH, "distance": distance}
        found[f"spread {distance}, each"] = Arm(
            f"images, spread {distance}", "each", options
        )
    wide = found["spread 2048, each"]
    found["spread 2048, once"] = wide._replace(augmented="once")
    large = {"schedule": "pool", "distance": 4 * POOL}
    found["pool 2048, each"] = Arm(f"images, pool {4 * POOL}", "each", large)
    return found


def order(arm: Arm, count: int, reads: int, seed: int) -> np.ndarray:
    """The images that the source reads, of `count`: all arms begin alike."""
    if not arm.again:
        return image_task.order(count, reads * arm.reads, seed)
    first = image_task.order(count, reads, seed)
    return np.concatenate(
        [first, first[image_task.order(reads, reads * (arm.reads - 1), seed)]]
    )


class Reader:
    """Images in a given order, one at a time or in batches; it counts what it gives.

    Attributes:
      given: the index of every image read so far.
    """

    def __init__(
        self, split: Split, order: np.ndarray, batch: int | None = None
    ):
        self._split, self.given = split, []
        self._order = (
            order if batch is None else order[: len(order) // batch * batch]
        )
        self._parts = (
            self._order if batch is None else self._order.reshape(-1, batch)
        )

    def __iter__(self) -> Iterator[Split]:
        for index in self._parts:
            self.given += np.atleast_1d(index).tolist()
            yield Split(self._split.images[index], self._split.labels[index])


def stream(
    arm: Arm, source: Iterable[Any], batch: int = BATCH
) -> Iterator[Batch]:
    """The batches of an arm; a rest that does not fill one is dropped."""
    stage = iter(jt.echo.echo(source, arm.factor, tag=True, **arm.options))
    if arm.batches:
        for (images, labels), ordinal, copy in stage:
            where = ordinal * batch + np.arange(batch)
            yield Batch(images, labels, where, np.full(batch, copy))
        return
    while len(chunk := list(itertools.islice(stage, batch))) == batch:
        images, labels = map(
            np.stack, zip(*(e.element for e in chunk), strict=True)
        )
        ordinals, copies = np.array([(e.ordinal, e.copy) for e in chunk]).T
        yield Batch(images, labels, ordinals, copies)


def shared(ordinals: np.ndarray) -> float:
    """Share of the places in a batch that hold another copy of what the batch holds: [steps, B] -> []."""
    return float(
        np.mean([1 - len(np.unique(row)) / len(row) for row in ordinals])
    )


def apart(ordinals: np.ndarray) -> int | None:
    """The least number of images from one copy to the next: [steps, B] -> []; None without copies."""
    by_image = np.argsort(ordinals.ravel(), kind="stable")
    same = np.diff(ordinals.ravel()[by_image]) == 0
    return int(np.diff(by_image)[same].min()) if same.any() else None


def held(arm: Arm) -> int:
    """The most images that wait for a later copy."""
    return jt.echo.echo([], arm.factor, **arm.options).held * (
        BATCH if arm.batches else 1
    )
