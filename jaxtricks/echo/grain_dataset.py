"""The same as a Grain dataset. Grain is imported inside functions only, and only if it is used."""

import functools
import sys
from typing import Any

from jaxtricks.echo.engine import Engine
from jaxtricks.echo.schedule import Calendar


class _GrainSource:
    """A Grain iterator as the engine wants it."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def pull(self) -> Any:
        return next(self._iterator)

    def snapshot(self) -> Any:
        return self._iterator.get_state()

    def rewind(self, snapshot: Any) -> None:
        self._iterator.set_state(snapshot)


def as_iter_dataset(source: Any) -> Any | None:
    """The source as a grain.IterDataset if it is a Grain dataset, else None."""
    if "grain" not in sys.modules:  # then it cannot be one, and the import would be for nothing
        return None
    import grain

    if isinstance(source, grain.MapDataset):
        return source.to_iter_dataset()
    return source if isinstance(source, grain.IterDataset) else None


def echo_dataset(parent: Any, calendar: Calendar, *, tag: bool, guard: bool) -> Any:
    """A grain.IterDataset that echoes its parent."""
    return _dataset_class()(parent, calendar, tag, guard)


@functools.cache
def _dataset_class() -> type:
    import grain

    class EchoDatasetIterator(grain.DatasetIterator):
        """Iterator of `EchoIterDataset`."""

        def __init__(self, parent: Any, calendar: Calendar, tag: bool, guard: bool):
            super().__init__(parent)
            self._engine = Engine(_GrainSource(parent), calendar, tag=tag, guard=guard)

        def __next__(self) -> Any:
            return self._engine.next()

        def get_state(self) -> dict[str, Any]:
            return self._engine.state()

        def set_state(self, state: dict[str, Any]) -> None:
            self._engine.restore(state)

        @property
        def min_distance(self) -> int:
            """Least distance of this stream; the promised one until the source's end is seen."""
            return self._engine.min_distance

    class EchoIterDataset(grain.IterDataset):
        """A Grain dataset whose elements are echoed."""

        def __init__(self, parent: Any, calendar: Calendar, tag: bool, guard: bool):
            super().__init__(parent)
            self._calendar, self._tag, self._guard = calendar, tag, guard
            self.distance = self.min_distance = calendar.distance
            self.held = calendar.held

        def __iter__(self) -> EchoDatasetIterator:
            parent = self.parents[0].__iter__()
            return EchoDatasetIterator(parent, self._calendar, self._tag, self._guard)

        def __str__(self) -> str:
            return f"EchoIterDataset(factor={self._calendar.factor}, distance={self.distance})"

    return EchoIterDataset
