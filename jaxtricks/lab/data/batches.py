"""Examples in, batches out: the Grain pipeline of training, and all of a split for evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxtricks.lab.data.source import Source

_AHEAD = 8  # examples a reading thread may be ahead by
_BATCHES_AHEAD = 2


def pipeline(
    source: Source,
    *,
    batch: int,
    seed: int,
    transform: Callable[[Any], Any],
    to_device: Callable[[Any], Any] | None = None,
    readers: int = 0,
) -> Any:
    """Endless batches: shuffle -> read -> transform (echo) -> batch -> device.

    Args:
      source: random access to examples.
      batch: examples a batch.
      seed: of the order.
      transform: IterDataset -> IterDataset, applied to single examples.
      to_device: batch -> batch on its devices, run ahead in a thread; None stays in this thread and on
        the host.
      readers: threads that read and decode; 0 reads where the batches are asked for, and nothing
        that is not used.

    Returns:
      A grain.DatasetIterator. get_state() is JSON and that of the batches given out, whatever has
      been read ahead; set_state() on a new pipeline of the same arguments goes on from there.
    """
    import grain

    shuffled = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    ahead = grain.ReadOptions(num_threads=readers, prefetch_buffer_size=_AHEAD * readers)
    batches = transform(shuffled.to_iter_dataset(ahead)).batch(batch, drop_remainder=True)
    if to_device is not None:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches.map(to_device), prefetch_buffer_size=_BATCHES_AHEAD
        )
    return iter(batches)


def eval_batches(source: Source, batch: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """All examples once, the last batch padded; "where" (bool [batch]) marks the real ones.

    With a limit, that many examples spread evenly over the source.
    """
    order = np.arange(len(source))
    if limit is not None and limit < len(order):
        order = order[np.linspace(0, len(order) - 1, limit).astype(int)]
    for start in range(0, len(order), batch):
        examples = [source[i] for i in order[start : start + batch]]
        padded = examples + [examples[0]] * (batch - len(examples))
        stacked = {key: np.stack([e[key] for e in padded]) for key in examples[0]}
        yield {**stacked, "where": np.arange(batch) < len(examples)}
