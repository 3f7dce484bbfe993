"""Data echoing: repeat what a slow reader gives, the copies far apart, and resume exactly.

What. If reading and decoding take longer than a training step, the accelerator waits.
An echo stage gives every element e times, and everything before it is paid once.
`spread`, the default, sends each copy out when at least `distance` other outputs have
passed, so that no batch holds two copies; `adjacent` repeats in a row, `pool` draws
from a shuffle buffer. `factor="auto"` measures how much slower the source is than the
steps, and follows it. `echo_step` repeats a batch on the device, in one transfer;
`report` times a source and a step and says whether echoing pays, where and how often.

Use.
    from jaxtricks import echo

    stage = echo.echo(range(1000), 2.5, batch_size=32)
    # in a row, as flat_map(repeat) does: echo.echo(range(1000), 2, schedule="adjacent")
    iterator = iter(stage)
    first = [next(iterator) for _ in range(100)]
    state = iterator.get_state()  # JSON
    resumed = iter(stage)
    resumed.set_state(state)
    assert next(resumed) == next(iterator)
    print(echo.num_steps(1000, 32, 2.5), stage.min_distance, stage.held)
    print(echo.report(range(1000), lambda batch: batch, batch_size=32))

Settings to start from. Put it after decoding and before the random augmentation. factor
= the time to read a batch over the time of a step, at most 4, or "auto"; batch_size =
yours, which sets the distance to 4 batches; for an echo of whole batches batch_size=1.
Build learning-rate schedules from `num_steps`. Augment with
`echo.augmentation_keys(key, ordinals, copies)` of tag=True: the order, the schedule and
the workers do not matter then. A long tail: factor=n_max / counts with class_of.

When it helps and when not. It pays only where the reader is the bottleneck: the
speed-up of steps per second is min(e, read time / step time), and a repeat is worth at
most a fresh element. Where reading keeps up, leave it out: it only replaces fresh data
by copies. Test accuracy on CIFAR-10 images of 16 x 16, factor 4, ResNet-8 with batch
normalization, equal steps, mean +- std of 5 seeds (2 CPU cores, jax 0.10.2, `python -m
benchmarks.echo_quality`); fresh images give 57.2 +- 1.5, a quarter of the steps 44.6
+- 0.8:
    copies                        augmented each     augmented once
    in a row                      46.4 +- 0.6        44.0 +- 0.5
    pool of 512 copies            52.9 +- 0.5        51.3 +- 2.1
    spread, 4 batches apart       56.8 +- 1.2        49.5 +- 1.0
    spread, 32 batches apart      56.8 +- 1.4        56.2 +- 1.0
    whole batches, in a row       47.8 +- 0.5        46.2 +- 0.1
    whole batches, spread         56.8 +- 1.5        48.6 +- 1.1
So with new augmentation of each copy, spread is worth fresh data (-0.4 +- 0.3 points)
for a quarter of the reads; below 4 batches it is worth less, above no more. Behind the
augmentation copies are worth little unless they are far apart. Copies in a row lose
most of the gain.

Cost. One to two microseconds per output (a pool: three to five), no reads ahead: one
read per output while it starts, one per e outputs afterwards. It holds ceil(e) - 1
times distance - 1 elements (`held`, limited by max_bytes). A resume reads those again:
(ceil(e) - 1)(distance - 1) + 1, and (distance - 1)/(e - 1) + 1 for 1 < e < 2, which is
long for factors just above 1. The state is the source's and a few integers; "auto" adds
its last 64 changes, "pool" the numbers of what it holds. "auto" reads in a thread of
its own and decides every 16 batches; the first climb to 4 takes some 200 steps.

Composes with. Grain on both sides (map, batch, ThreadPrefetch, mp_prefetch, Orbax);
torch loaders, HF datasets, tf.data, any iterable. After mp_prefetch it sends each
element between processes once; inside the workers e times, and "auto" must then not be
used by several hosts. Threads may share an iterator. A read that fails can be asked
again, after a resume too: nothing is lost or repeated. A killed worker ends iteration
in Grain's RuntimeError, and a new pipeline given the last state goes on exactly. Batch
statistics of first copies alone: ebn.extended_moments(x, mask=copy == 0). With
longtail: counts are those of what is read; a class-balanced sampler repeats the tail
already, and echo multiplies that. Mixup partners are never copies of each other under
spread.

Differences from the paper and from optax/flax. The paper shuffles the copies in a
buffer ("pool", here with a bound on how long one stays, and without a wait while it
fills); spread bounds the distance instead, is deterministic and needs no buffer in its
checkpoint. Fractional factors are deterministic. The distance is counted in outputs and
holds at the start and in the drain of any source of at least `distance` elements; with
f = e - floor(e) > 0 it takes (2 - f) times as many, and
1 / f times for e < 2. A shorter one, or the drain where factors vary, gets what
`min_distance` says. For whole e and e < 2 no schedule that reads at most once per
output could do better. Neither optax, flax nor Grain has an echo stage; Grain's FlatMap
repeats in a row, whole numbers of times.

References. Choi, Passos, Shallue, Dahl, Faster neural network training with data
echoing, arXiv 1907.05550. Agarwal, Anil, Koren, Talwar, Zhang, Stochastic optimization
with laggard data pipelines, arXiv 2010.13639.
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
