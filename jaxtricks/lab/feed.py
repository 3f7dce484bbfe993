"""What this host reads: its rows of every batch of one stream that all hosts share."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtricks.lab import compose
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.config import Train
from jaxtricks.lab.hosts import Hosts
from jaxtricks.lab.placement import Placement

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
      first: position of the stream to begin at.

    Attributes:
      rows: the first of its rows and how many there are.
    """

    def __init__(self, cfg: Train, data: data_lib.Data, place: Placement, first: int = 0):
        rows = place.rows(cfg.micro_batch).tolist()
        order = compose.build_order(cfg, data) or data_lib.shuffled(len(data.train), cfg.seed)
        self._order = Reads(order, rows, cfg.micro_batch, first)
        self.rows = [rows[0], len(rows)]
        self._batches = data_lib.pipeline(
            data.train,
            batch=len(rows),
            seed=cfg.seed,
            transform=compose.build_reads(cfg, len(rows) * cfg.accumulate),
            to_device=place.put,
            order=self._order,
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
            "first": self._order.first,
            "read": self._order.read,
            "batches": self._batches.get_state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state that a feed of the same rows and the same `first` gave."""
        self._batches.set_state(state["batches"])


def resumed(
    cfg: Train,
    data: data_lib.Data,
    place: Placement,
    step: int,
    states: list[dict[str, Any]],
    hosts: Hosts,
) -> tuple[Feed, str]:
    """The feed after `step`, and a sentence about it if other hosts read before.

    Args:
      cfg, data, place: as for `Feed`.
      step: steps done.
      states: of all hosts that read before.
      hosts: that read now.
    """
    feed = Feed(cfg, data, place, first=states[0]["first"])
    if hosts.gather(feed.rows) == [state["rows"] for state in states]:
        feed.resume(states[jax.process_index()])
        return feed, ""
    said = f"{len(states)} hosts read before, {hosts.count} now: reading goes on "
    if cfg.tricks.echo:
        first = max(state["read"] for state in states)
        said += (
            f"after example {first} of the stream, without the copies still to come of those before"
        )
    else:
        first = step * cfg.batch
        said += f"exactly where it was, after example {first} of the stream"
    return Feed(cfg, data, place, first), said


class Reads:
    """Position in this host's stream -> index of the example.

    Args:
      order: position in the stream of all hosts -> index.
      rows: of each batch, those that this host reads.
      batch: examples of a batch of all hosts.
      first: position in the stream of all hosts to begin at.

    Attributes:
      first: as given.
      read: position in the stream of all hosts behind the last batch that was begun to be read.
    """

    def __init__(self, order: Callable[[int], int], rows: Sequence[int], batch: int, first: int):
        self._order, self._rows, self._batch = order, rows, batch
        self.first = self.read = first

    def __call__(self, position: int) -> int:
        """The index of the example at a position of this host's stream."""
        k, j = divmod(position, len(self._rows))
        start = self.first + k * self._batch
        self.read = max(self.read, start + self._batch)
        return self._order(start + self._rows[j])
