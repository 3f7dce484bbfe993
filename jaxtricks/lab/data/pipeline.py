"""Turn examples into batches: the Grain pipeline of training, and all of a split for evaluation."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtricks.lab.data.dataset import Example, Source, shuffled

_AHEAD = 16  # examples a reading thread may be ahead by
_BLOCK = 8  # most examples it reads at a time
_BATCHES_AHEAD = 2


def pipeline(
    source: Source,
    *,
    batch: int,
    seed: int,
    transform: Callable[[Any], Any] | None = None,
    to_device: Callable[[Any], Any] | None = None,
    readers: int = 0,
    order: Callable[[int], int] | None = None,
) -> Any:
    """Make endless batches: shuffle -> read -> transform (echo) -> batch -> device.

    Args:
      source: random access to examples.
      batch: examples per batch.
      seed: of the order.
      transform: IterDataset -> IterDataset of examples (dicts). None lets examples be
        read and stacked in blocks: with reading threads, Grain's work on a single one
        takes as long as decoding a small image.
      to_device: batch -> batch on its devices, run ahead in a thread; None stays in
        this thread and on the host.
      readers: threads that read and decode; 0 reads where the batches are asked for,
        and nothing that is not used.
      order: position in the stream -> index, in place of shuffled epochs
        (`dataset.sampled`).

    Returns:
      A grain.DatasetIterator. get_state() is JSON and that of the batches so far,
      whatever has been read ahead; set_state() on a new pipeline of the same arguments
      goes on from there.
    """
    import grain

    index = shuffled(len(source), seed) if order is None else order

    def stream(read: Callable[[int], Any], ahead: int) -> Any:
        # Over a range, not over a source: Grain weighs every element of a source, for
        # 20 us.
        options = grain.ReadOptions(
            num_threads=readers, prefetch_buffer_size=ahead * readers
        )
        return (
            grain.MapDataset.range(sys.maxsize)
            .map(read)
            .to_iter_dataset(options)
        )

    if transform is not None:
        examples = transform(stream(lambda i: source[index(i)], _AHEAD))
        batches = examples.batch(batch, drop_remainder=True, batch_fn=stack)
    else:
        # Threads share a batch, so that the first one does not wait for a whole one of
        # each thread.
        width = _largest_divisor(batch, _BLOCK) if readers else batch

        def block(k: int) -> Example:
            return stack(
                [source[index(i)] for i in range(k * width, (k + 1) * width)]
            )

        batches = stream(block, _AHEAD // width)
        if width < batch:
            batches = batches.batch(batch // width, batch_fn=_join)
    if to_device is not None:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches.map(to_device), prefetch_buffer_size=_BATCHES_AHEAD
        )
    return iter(batches)


def stack(examples: Sequence[Example]) -> Example:
    """Stack examples to a batch; np.array takes half the time of np.stack for small ones."""
    names = examples[0].keys()
    return {
        name: np.array([example[name] for example in examples])
        for name in names
    }


def _join(blocks: Sequence[Example]) -> Example:
    names = blocks[0].keys()
    return {
        name: np.concatenate([block[name] for block in blocks])
        for name in names
    }


def _largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if number % d == 0)


def eval_batches(
    source: Source,
    batch: int,
    limit: int | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield all examples once, the last batch padded; "where" (bool [batch]) marks the real ones.

    An example that is skipped, as it can't be read, is padding too.

    Args:
      source: random access to examples.
      batch: examples per batch.
      limit: that many examples, spread evenly over the source.
      rows: the rows of each batch to read, such as those of this host; None is all.
    """
    order = np.arange(len(source))
    if limit is not None and limit < len(order):
        positions = np.linspace(0, len(order) - 1, limit)
        order = order[positions.astype(int)]
    rows = np.arange(batch) if rows is None else rows
    for start in range(0, len(order), batch):
        indices = [order[start + i] for i in rows if start + i < len(order)]
        examples = [source.readable(index) for index in indices]
        examples += [None] * (len(rows) - len(examples))
        readable = [x for x in examples if x is not None]
        # A host whose rows are all padding needs an example to pad with.
        padding = readable[0] if readable else source[order[start]]
        stacked = stack([padding if x is None else x for x in examples])
        yield {**stacked, "where": np.array([x is not None for x in examples])}
