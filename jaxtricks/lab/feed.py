"""What this host reads: its rows of every batch of one stream that all hosts share."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtricks.lab import compose as compose_lib
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.config import Train
from jaxtricks.lab.distributed import Placement

_READERS = 4  # threads that decode large images; small ones are faster decoded without
_SMALL = 64 * 64  # pixels


class Feed:
    """Endless micro-batches of the training split, on their devices.

    Batch k is made of positions k * batch, ..., k * batch + batch - 1 of the stream, whatever the number of
    hosts: each of them reads the rows that lie on its devices. Echoing is a host's own: the copies of an
    example stay with the host that read it.

    Args:
      cfg: the settings.
      data: what to read.
      place: where batches lie.

    Attributes:
      rows: the first of its rows and how many there are.
    """

    def __init__(self, cfg: Train, data: data_lib.Data, place: Placement):
        rows = place.rows(cfg.micro_batch).tolist()
        order = compose_lib.build_order(cfg, data) or data_lib.shuffled(len(data.train), cfg.seed)
        self._cfg, self._reads = cfg, Reads(order, rows, cfg.micro_batch)
        self.rows = [rows[0], len(rows)]
        self._batches = data_lib.pipeline(
            data.train,
            batch=len(rows),
            seed=cfg.seed,
            transform=compose_lib.build_reads(cfg, len(rows) * cfg.accumulate),
            to_device=place.put,
            order=self._reads,
            readers=_READERS if math.prod(data.shape[:2]) > _SMALL else 0,
        )

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """JSON: the state of the batches given out, and what of the stream has been read."""
        return {
            "rows": self.rows,
            "first": self._reads.first,
            "read": self._reads.read,
            "batches": self._batches.get_state(),
        }

    def resume(self, step: int, states: list[dict[str, Any]], rows: list[list[int]]) -> str:
        """Go on after a step, before anything is read here.

        Args:
          step: steps done.
          states: of `get_state`, of all hosts that read until then.
          rows: those of all hosts that read now.

        Returns:
          A sentence, if other hosts read until then.
        """
        self._reads.begin_at(states[0]["first"])
        if rows == [state["rows"] for state in states]:
            self._batches.set_state(states[jax.process_index()]["batches"])
            return ""
        said = f"{len(states)} hosts read before, {len(rows)} now: reading goes on "
        if self._cfg.tricks.echo:
            first = max(state["read"] for state in states)
            how = "after example {} of the stream, without the copies still to come of those before"
        else:
            first = step * self._cfg.batch
            how = "exactly where it was, after example {} of the stream"
        self._reads.begin_at(first)
        return said + how.format(first)


class Reads:
    """Position in this host's stream -> index of the example.

    Args:
      order: position in the stream of all hosts -> index.
      rows: of each batch, those that this host reads.
      batch: examples of a batch of all hosts.

    Attributes:
      first: position in the stream of all hosts where this one begins.
      read: position in the stream of all hosts behind the last batch that was begun to be read.
    """

    def __init__(self, order: Callable[[int], int], rows: Sequence[int], batch: int):
        self._order, self._rows, self._batch = order, rows, batch
        self.begin_at(0)

    def begin_at(self, first: int) -> None:
        """Let position 0 of this host be there in the stream of all hosts."""
        self.first = self.read = first

    def __call__(self, position: int) -> int:
        """The index of the example at a position of this host's stream."""
        k, j = divmod(position, len(self._rows))
        start = self.first + k * self._batch
        self.read = max(self.read, start + self._batch)
        return self._order(start + self._rows[j])
