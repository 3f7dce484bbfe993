"""Repeat what a slow reader yields, with the copies far apart, and resume exactly.

What. If reading takes longer than a training step, the accelerator waits. An echo stage
yields every element e times, and everything before it is paid once. "spread" (the
default) yields a copy only after `distance` other outputs, so that no batch holds two
copies; "adjacent" repeats in a row; "pool" draws from a shuffle buffer. `echo_step`
repeats a batch on the device; `report` says whether echoing pays, where and how often.

Use.

    from jaxtricks import echo

    stage = echo.echo(range(1000), 2.5, batch_size=32)
    iterator = iter(stage)
    first = [next(iterator) for _ in range(100)]
    state = iterator.get_state()  # JSON
    resumed = iter(stage)
    resumed.set_state(state)
    assert next(resumed) == next(iterator)
    print(echo.num_steps(1000, 32, 2.5), stage.min_distance)
    print(echo.report(range(1000), lambda batch: batch, batch_size=32))

Settings to start from. Echo after decoding and before random augmentation, with your
batch_size, and a factor of the time to read a batch over the time of a step (at most 4),
or "auto". Build learning-rate schedules from `num_steps`. Augment with
`augmentation_keys(key, ordinals, copies)` of tag=True.

When it helps and when not. Only where the reader is the bottleneck: steps per second
rise by min(e, read time / step time), and a copy is worth at most a fresh element.

Cost. One to two microseconds per output; (ceil(e) - 1)(distance - 1) elements in
memory. Figures: docs/techniques/echo.md.

Composes with. Grain on both sides, torch loaders, HF datasets, tf.data, any iterable;
Orbax for its state. Batch statistics of first copies alone: `ebn` with a mask.

Differences from the paper and from optax/flax. The paper shuffles copies in a buffer
("pool"); Grain repeats in a row.

References. Choi et al., arXiv 1907.05550. Agarwal et al., arXiv 2010.13639.
"""

from jaxtricks.echo._device import augmentation_keys, echo_step
from jaxtricks.echo._echo import echo
from jaxtricks.echo._report import Report, report
from jaxtricks.echo._schedules import num_steps
from jaxtricks.echo._streams import Echoed

__all__ = [
    "Echoed",
    "Report",
    "augmentation_keys",
    "echo",
    "echo_step",
    "num_steps",
    "report",
]
