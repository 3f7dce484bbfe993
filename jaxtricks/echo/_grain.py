"""Serve the same stream as a Grain dataset; imported once Grain has been."""

from collections.abc import Iterator
from typing import Any

import grain

from jaxtricks.echo import _checks
from jaxtricks.echo._iterables import Recipe
from jaxtricks.echo._streams import StreamIterator


class _GrainSource:
    """A Grain iterator as a stream wants it."""

    def __init__(self, iterator: Any):
        self._iterator = iterator
        self._workers = sorted(_workers(iterator.get_state()))

    def read(self) -> tuple[Any, Any]:
        snapshot = self._iterator.get_state()
        return snapshot, next(self._iterator)

    def snapshot(self) -> Any:
        return self._iterator.get_state()

    def check(self, snapshot: Any, first: int) -> None:
        # Grain takes a state of fewer workers as it is, and loses what the others were
        # to read.
        saved = sorted(_workers(snapshot))
        current = self._workers
        if saved != current:
            raise ValueError(
                f"echo: the state was saved with {_spell(saved)}, this "
                f"pipeline has {_spell(current)}: use the same number of "
                "workers (mp_prefetch) and the same steps"
            )

    def rewind(self, snapshot: Any) -> None:
        with _checks.states_of_others():
            self._iterator.set_state(snapshot)


def _workers(state: Any) -> Iterator[int]:
    """Return how many iterators run side by side."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "iterators_in_use_indices":
                yield len(value)
            else:
                yield from _workers(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _workers(value)


def _spell(workers: list[int]) -> str:
    return (
        f"{workers[0]} workers"
        if len(workers) == 1
        else f"workers {workers or 'none'}"
    )


def as_iter_dataset(source: Any) -> Any | None:
    """Return the source as a grain.IterDataset if it is a Grain dataset, else None."""
    if isinstance(source, grain.MapDataset):
        return source.to_iter_dataset()
    return source if isinstance(source, grain.IterDataset) else None


class EchoDatasetIterator(StreamIterator, grain.DatasetIterator):
    """Iterator of `EchoIterDataset`."""

    def __init__(self, parent: Any, recipe: Recipe, elements: int):
        super().__init__(parent)
        self._stream = recipe.stream(_GrainSource(parent), elements)

    def close(self) -> None:
        """Stop the threads and workers of the pipeline."""
        # Grain also closes an iterator whose constructor raised.
        if hasattr(self, "_stream"):
            self._stream.close()
        super().close()


class EchoIterDataset(grain.IterDataset):
    """A Grain dataset whose elements are echoed."""

    def __init__(self, parent: Any, recipe: Recipe):
        super().__init__(parent)
        self._recipe = recipe
        self.distance, self.held = recipe.distance, recipe.held
        # Without a length, which not every dataset has.
        self.min_distance = recipe.min_distance(None)

    def __iter__(self) -> EchoDatasetIterator:
        parent = self.parents[0]
        # Inside a worker of mp_prefetch this is the length of the worker's share.
        return EchoDatasetIterator(iter(parent), self._recipe, _length(parent))

    def __str__(self) -> str:
        return f"EchoIterDataset({self._recipe})"


def _length(dataset: Any) -> int:
    """Return the length of the first MapDataset below, or -1."""
    while not isinstance(dataset, grain.MapDataset):
        if not dataset.parents:
            return -1
        dataset = dataset.parents[0]
    return len(dataset)
