"""What an echo stage gains and costs: steps per second behind a slow reader, CPU time per output.

The reader decodes real JPEGs (patches of scikit-learn's sample photographs) and sleeps, as one that
waits for a network does; one thread reads. The step is a jitted update of a small network, padded
by sleeping to the same time, with two batches prefetched. R is measured: the time of a batch without
echo over that of a step alone. Stages are timed behind Grain's cheapest reader and behind a
generator, by the CPU time of the process; the parent's own is subtracted once per element.
"""

import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from jaxtricks import _table, echo
from jaxtricks.lab.data import images
from jaxtricks.lab.report import hardware

BATCH = 32
FACTORS = (1.5, 2, 4, 6, "auto")
RATIOS = (0.5, 1, 2, 4, 6)
STEP = 0.02  # seconds
AFTER_ELEMENTS = 20_000
WINDOW = 256


def main() -> None:
    """Print both tables."""
    command, args = common.arguments(
        "benchmarks.echo_speed", steps=60, rounds=3, settle=100
    )
    heading = f"{hardware()}; `{command}`"
    tables = [
        overhead(args.rounds),
        speed_ups(args.steps, args.rounds, args.settle),
    ]
    common.publish(tables, heading, args.out)


# --- steps per second ----------------------------------------------------------------------------


def speed_ups(steps: int, rounds: int, settle: int) -> _table.Table:
    """Steps per second with echo over those without, for every R and factor."""
    files, step = jpegs(), training_step()
    alone = rate_alone(step, steps)
    rows = []
    for ratio in RATIOS:
        seconds = ratio * STEP / BATCH
        gains: dict[Any, list[float]] = {factor: [] for factor in FACTORS}
        measured = []
        for _ in range(rounds):
            base = rate(files, seconds, step, 1, steps, 4)
            measured.append(alone / base)
            for factor in FACTORS:
                # Past the start, in which each output is read, and past the tuning.
                first = settle if factor == "auto" else 4 * 6
                gains[factor].append(
                    rate(files, seconds, step, factor, steps, first) / base
                )
        r = statistics.median(measured)
        rows += [row(r, factor, gains[factor]) for factor in FACTORS]
    notes = (
        f"{steps} steps of {1e3 / alone:.1f} ms, batch {BATCH}, medians of {rounds} rounds; bound: "
        "min(factor, R), 1 at least; auto after "
        f"{settle} batches, its bound R or 6",
    )
    return _table.make(
        ("R", "factor", "speed-up", "least", "bound", "of the bound"),
        rows,
        notes,
    )


def row(ratio: float, factor: Any, gains: list[float]) -> tuple[Any, ...]:
    """One line of the table."""
    limit = 6 if factor == "auto" else factor
    bound = max(1.0, min(limit, ratio))
    gain = statistics.median(gains)
    return (
        round(ratio, 2),
        factor,
        round(gain, 2),
        round(min(gains), 2),
        bound,
        gain / bound,
    )


def rate(
    files: list[bytes],
    seconds: float,
    step: Callable[[Any], None],
    factor: Any,
    steps: int,
    first: int,
) -> float:
    """Steps per second of a loop, after its first steps."""

    def read(raw: bytes) -> np.ndarray:
        time.sleep(seconds)
        return images.decode(raw, "a patch")

    dataset = grain.MapDataset.source(files).repeat().map(read)
    stage = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if factor != 1:
        stage = echo.echo(stage, factor, batch_size=BATCH, distance=BATCH)
    batches = stage.batch(BATCH)
    iterator = iter(
        grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=2
        )
    )
    for _ in range(first):
        step(next(iterator))
    begin = time.perf_counter()
    for _ in range(steps):
        step(next(iterator))
    passed = time.perf_counter() - begin
    iterator.close()
    return steps / passed


def rate_alone(step: Callable[[Any], None], steps: int) -> float:
    """Steps per second when the batch is there."""
    batch = np.zeros((BATCH, 32, 32, 3), np.uint8)
    step(batch)
    begin = time.perf_counter()
    for _ in range(steps):
        step(batch)
    return steps / (time.perf_counter() - begin)


def training_step() -> Callable[[Any], None]:
    """A jitted update that takes STEP seconds."""

    @jax.jit
    def update(params: jax.Array, batch: jax.Array) -> jax.Array:
        def loss(w: jax.Array) -> jax.Array:
            return jnp.mean((batch.reshape(len(batch), -1) / 255 @ w) ** 2)

        return params - 0.1 * jax.grad(loss)(params)

    params = [jnp.ones((3072, 64)) / 64]

    def step(batch: Any) -> None:
        begin = time.perf_counter()
        params[0] = jax.block_until_ready(update(params[0], batch))
        time.sleep(max(0.0, STEP - (time.perf_counter() - begin)))

    return step


def jpegs(n: int = 2048, size: int = 32) -> list[bytes]:
    """Patches of two photographs as JPEG files."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, rng, files = (
        load_sample_images().images,
        np.random.default_rng(0),
        [],
    )
    for i in range(n):
        photo = photos[i % len(photos)]
        y, x = (int(rng.integers(0, side - size)) for side in photo.shape[:2])
        file = io.BytesIO()
        Image.fromarray(photo[y : y + size, x : x + size]).save(
            file, "JPEG", quality=90
        )
        files.append(file.getvalue())
    return files


# --- CPU time of a stage -------------------------------------------------------------------------


def overhead(rounds: int) -> _table.Table:
    """CPU microseconds per output of each stage, beyond the parent's."""
    rows = []
    for factor in (2, 4):
        for name, make in stages(factor).items():
            times = [in_parents(make, factor) for _ in range(rounds)]
            best = [round(min(t[i] for t in times), 2) for i in range(2)]
            rows.append((factor, name, *best))
    notes = (
        f"least of {rounds} rounds of {AFTER_ELEMENTS} outputs; elements are dicts of an array and a number",
    )
    return _table.make(
        ("factor", "stage", "behind Grain, us", "behind a generator, us"),
        rows,
        notes,
    )


def stages(factor: int) -> dict[str, Callable[[Any], Any]]:
    """Parent -> dataset or iterable; Grain's own work on Grain datasets alone."""
    out: dict[str, Callable[[Any], Any]] = {}
    for schedule in ("adjacent", "spread", "pool"):
        for guard in (True, False):
            name = schedule if guard else f"{schedule}, guard=False"
            out[name] = lambda parent, s=schedule, g=guard: echo.echo(
                parent, factor, schedule=s, guard=g
            )
    flat = lambda parent: grain.experimental.FlatMapIterDataset(
        parent, Repeat(factor)
    )
    out["grain FlatMap"] = flat
    out[f"grain FlatMap + WindowShuffle({WINDOW})"] = lambda parent: (
        grain.experimental.WindowShuffleIterDataset(
            flat(parent), window_size=WINDOW, seed=0
        )
    )
    return out


class Repeat(grain.experimental.FlatMapTransform):
    """What a user of Grain would write."""

    def __init__(self, factor: int):
        self.max_fan_out = factor
        self._factor = factor

    def flat_map(self, element: Any) -> list[Any]:
        """The copies of an element."""
        return [element] * self._factor


def in_parents(
    make: Callable[[Any], Any], factor: int
) -> tuple[float, float | None]:
    """Microseconds behind each kind of parent."""
    behind_grain = (
        spent(make(grain_parent()), factor) - spent(grain_parent(), 1) / factor
    )
    try:
        behind_generator = (
            spent(make(generator), factor) - spent(generator(), 1) / factor
        )
    except (AttributeError, TypeError):  # Grain's own stages take no generators
        return behind_grain, float("nan")
    return behind_grain, behind_generator


def spent(dataset: Any, factor: int) -> float:
    """CPU microseconds per output, past the start."""
    iterator = iter(dataset)
    for _ in range(512 * factor):
        next(iterator)
    begin = time.process_time()
    for _ in range(AFTER_ELEMENTS):
        next(iterator)
    return 1e6 * (time.process_time() - begin) / AFTER_ELEMENTS


def grain_parent() -> Any:
    """Grain's cheapest reader."""
    shared = np.zeros((32, 32, 3), np.uint8)
    dataset = grain.MapDataset.range(10**7).map(
        lambda i: {"image": shared, "label": i}
    )
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )


def generator() -> Iterator[Any]:
    """The same without Grain."""
    shared = np.zeros((32, 32, 3), np.uint8)
    for i in itertools.count():
        yield {"image": shared, "label": i}


if __name__ == "__main__":
    main()
