"""A Grain dataset that calls a function for 0, 1, 2, ...: what is left of a MapDataset without threads."""

import functools
from collections.abc import Callable
from typing import Any


def walk(read: Callable[[int], Any]) -> Any:
    """A grain.IterDataset of read(0), read(1), ..., without an end.

    Its states are those of grain.MapDataset.range(...).map(read).to_iter_dataset(), which takes 20 us
    or more an element to measure itself: as long as it takes to decode a small image.
    """
    return _dataset_class()(read)


@functools.cache
def _dataset_class() -> type:
    import grain

    class WalkIterator(grain.DatasetIterator):
        """Iterator of `WalkIterDataset`."""

        def __init__(self, read: Callable[[int], Any]):
            super().__init__()
            self._read, self._next_index = read, 0

        def __next__(self) -> Any:
            element = self._read(self._next_index)
            self._next_index += 1  # only now: after an error the same element is tried again
            return element

        def get_state(self) -> dict[str, int]:
            return {"next_index": self._next_index}

        def set_state(self, state: dict[str, int]) -> None:
            self._next_index = state["next_index"]

    class WalkIterDataset(grain.IterDataset):
        """Calls of a function."""

        def __init__(self, read: Callable[[int], Any]):
            super().__init__()
            self._read = read

        def __iter__(self) -> WalkIterator:
            return WalkIterator(self._read)

        def __str__(self) -> str:
            return "WalkIterDataset"

    return WalkIterDataset
