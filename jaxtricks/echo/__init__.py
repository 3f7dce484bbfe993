"""Data echoing: repeat what a slow reader gives, the copies far apart, and resume exactly.

What. If reading and decoding take longer than a training step, the accelerator waits. An echo stage
gives every element e times, and everything before it is paid once. `spread`, the default, sends
each copy out when at least `distance` other outputs have passed, so that no batch holds two copies;
`adjacent` repeats in a row, as flat_map(repeat) does. Put the stage after decoding and before the
random augmentation.

Use.
    from jaxtricks import echo

    stage = echo.echo(range(1000), 2.5, batch_size=32)
    iterator = iter(stage)
    first = [next(iterator) for _ in range(100)]
    state = iterator.get_state()  # JSON
    resumed = iter(stage)
    resumed.set_state(state)
    assert next(resumed) == next(iterator)
    print(echo.num_steps(1000, 32, 2.5), stage.min_distance, stage.held)

Settings to start from. factor = the time to read a batch over the time of a step, at most 4;
batch_size = yours, which sets the distance to 4 batches; for an echo of whole batches batch_size=1.
Build learning-rate schedules from `num_steps`.

When it helps and when not. It pays only where the reader is the bottleneck: the speed-up of steps
per second is min(e, read time / step time), and a repeat is worth at most a fresh element. Where
reading keeps up, leave it out: it only replaces fresh data by copies. In one small CIFAR-10 run (e
= 4, 3 seeds) copies in a row gained half of what fresh data would, and spread ones all of it.
Batch normalization sees repeated batches under batch echo.

Cost. A few microseconds per output, no reads ahead: one read per output while it starts, one per e
outputs afterwards. It holds ceil(e) - 1 times distance - 1 elements (`held`). A resume reads those
again: (ceil(e) - 1)(distance - 1) + 1, and (distance - 1)/(e - 1) + 1 for 1 < e < 2, which is long
for factors just above 1. The state is the source's and three integers.

Composes with. Grain on both sides (map, batch, ThreadPrefetch, mp_prefetch, Orbax); any iterable.
Key augmentations by (seed, ordinal, copy) with tag=True: then they do not depend on the order. With
longtail: a class-balanced sampler repeats the tail already, and echo multiplies that. A source that
reuses one buffer for all its elements must copy them first: echo holds references.

Differences from the paper and from optax/flax. The paper shuffles the copies in a buffer; spread
bounds the distance instead, is deterministic and needs no buffer in its checkpoint. Fractional
factors are deterministic. The distance is counted in outputs and holds at the start and in the
drain of any source of at least `distance` elements; with f = e - floor(e) > 0 it takes (2 - f) times
as many, and 1 / f times for e < 2. A shorter one gets what `min_distance` says. For whole e and e <
2 no schedule that reads at most once per output could do better. Neither optax, flax nor Grain has an
echo stage.

References. Choi, Passos, Shallue, Dahl, Faster neural network training with data echoing, arXiv
1907.05550. Agarwal, Anil, Koren, Talwar, Zhang, Stochastic optimization with laggard data
pipelines, arXiv 2010.13639.
"""

from jaxtricks.echo.api import echo
from jaxtricks.echo.schedule import num_steps
from jaxtricks.echo.stream import Echoed

__all__ = ["Echoed", "echo", "num_steps"]
