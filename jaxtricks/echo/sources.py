"""Sources that are not Grain's: any iterable, resumed by its own state or by counting."""

import base64
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxtricks.echo.recipe import Recipe
from jaxtricks.echo.stream import StreamIterator

_PAIRS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))


class IterableSource:
    """An iterator with a state: its own, its loader's, or the number of elements read so far."""

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]]):
        self._source = source
        self._iterator = start(source)
        self._read = 0
        self._of_iterator = _methods(self._iterator)
        self._of_source = None if self._of_iterator else _methods(source)

    @property
    def fast_forwards(self) -> bool:
        """Whether a resume reads and drops everything before the position."""
        return not (self._of_iterator or self._of_source)

    def read(self) -> tuple[Any, Any]:
        """(the state from which this can be repeated, the next element), or StopIteration."""
        snapshot = self.snapshot()
        element = next(self._iterator)
        self._read += 1
        return snapshot, element

    def snapshot(self) -> Any:
        """The state from which the next read can be repeated."""
        if self._of_iterator:
            return _encode(getattr(self._iterator, self._of_iterator[0])())
        if self._of_source:
            return _encode(getattr(self._source, self._of_source[0])())
        return self._read

    def rewind(self, snapshot: Any) -> None:
        """Go to a snapshot."""
        if self._of_iterator:
            getattr(self._iterator, self._of_iterator[1])(_decode(snapshot))
        elif self._of_source:
            getattr(self._source, self._of_source[1])(_decode(snapshot))
            self._iterator = start(self._source)
        else:
            self._fast_forward(snapshot)

    def _fast_forward(self, count: int) -> None:
        if self._read > 0:
            again = start(self._source)
            if again is self._iterator:
                raise ValueError(
                    "echo: `source` is an iterator that has been read already and cannot start "
                    "again: pass the function that makes it, or a list"
                )
            self._iterator, self._read = again, 0
        for _ in range(count):
            try:
                self.read()
            except StopIteration:
                raise ValueError(
                    f"echo: `source` ended before element {count} of the state: it must give the "
                    "same elements again"
                ) from None


class EchoIterator(StreamIterator, Iterator[Any]):
    """Iterator of an echoed source: next, get_state, set_state.

    Attributes:
      fast_forwards: whether set_state has to read and drop all elements before the position,
        because neither the source nor its iterator has a state of its own.
    """

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]], recipe: Recipe):
        adapter = IterableSource(source)
        self._stream = recipe.stream(adapter)
        self.fast_forwards = adapter.fast_forwards


class EchoIterable(Iterable[Any]):
    """An echoed source: each iter() starts it again.

    Attributes:
      distance: the promised least distance between consecutive copies, in outputs.
      held: the most elements that are held for later copies.
    """

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]], recipe: Recipe):
        self._source, self._recipe = source, recipe
        self.distance, self.held = recipe.distance, recipe.held

    def __iter__(self) -> EchoIterator:
        return EchoIterator(self._source, self._recipe)

    def __len__(self) -> int:
        total = self._recipe.total(len(self._source))  # pyrefly: ignore
        if total is None:
            raise TypeError("an echoed source has no length where its factor is not constant")
        return total

    @property
    def min_distance(self) -> int:
        """Least distance over the whole stream, drain included, if the source has a length."""
        try:
            return self._recipe.min_distance(len(self._source))  # pyrefly: ignore
        except TypeError:
            return 1 if self._recipe.schedule == "pool" else self.distance


def start(source: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """A new iterator over the source, which may be a function that makes one."""
    if hasattr(source, "as_numpy_iterator"):  # a tf.data.Dataset
        return iter(source.as_numpy_iterator())
    if isinstance(source, Iterable):
        return iter(source)
    return iter(source())


def _methods(x: Any) -> tuple[str, str] | None:
    for pair in _PAIRS:
        if all(callable(getattr(x, name, None)) for name in pair):
            return pair
    return None


def _encode(state: Any) -> Any:
    # grain.DataLoader's iterators give bytes, which JSON does not know; others keep changing theirs.
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode("ascii")}
    return copy.deepcopy(state)


def _decode(state: Any) -> Any:
    if isinstance(state, dict) and set(state) == {"base64"}:
        return base64.b64decode(state["base64"])
    return copy.deepcopy(state)
