"""Examples a second of the lab's pipeline over a zip of small JPEGs, beside other ways to read it.

`python -m benchmarks.decoding --data FILE.zip [--out FILE.md]`.
"""

import argparse
import importlib.metadata
import io
import itertools
import os
import pathlib
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import grain
import numpy as np
from PIL import Image

import jaxtricks as jt
from benchmarks import common
from jaxtricks import _table
from jaxtricks.lab import data
from jaxtricks.lab.data import images
from jaxtricks.lab.data.dataset import shuffled
from jaxtricks.lab.report import hardware

BATCH, BATCHES, ROUNDS = 256, 20, 12
OURS = "pipeline"
HEADERS = (
    "loader",
    "examples/s",
    "+-",
    "CPU us/example",
    "+-",
    "time / ours",
    "+-",
    "CPU / ours",
    "+-",
)
LIBRARIES = ("grain", "simplejpeg", "pillow")


class Cost(NamedTuple):
    """Seconds of a run: on the clock, and of all threads' work."""

    wall: float
    cpu: float


def loaders(
    d: data.Data, path: pathlib.Path
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Name -> a function that starts it; each gives batches of the same images in the same order."""
    pipeline = lambda **options: data.pipeline(
        d.train, **{"batch": BATCH, "seed": 0, "transform": None} | options
    )
    in_grain = lambda *options: iter(
        grain.MapDataset.source(d.train)
        .shuffle(seed=0)
        .repeat()
        .to_iter_dataset(*options)
        .batch(BATCH, drop_remainder=True)
    )
    return {
        OURS: pipeline,
        "pipeline, in a thread": lambda: pipeline(
            to_device=lambda batch: batch
        ),
        "pipeline, 2 readers": lambda: pipeline(readers=2),
        "pipeline, echo 2": lambda: pipeline(
            transform=lambda ds: jt.echo.echo(ds, 2, batch_size=BATCH)
        ),
        "pipeline, Pillow": pipeline,
        "Grain by examples, no threads": lambda: in_grain(
            grain.ReadOptions(0, 0)
        ),
        "Grain's defaults: 16 threads, buffer 500": in_grain,
        "generator": lambda: generator(d),
        "zipfile and Pillow, a list": lambda: by_pillow(d, path),
    }


def generator(d: data.Data) -> Iterator[Any]:
    """Nothing but a loop over our source; it can't be resumed."""
    order = shuffled(len(d.train), 0)
    for k in itertools.count():
        examples = [
            d.train[order(i)] for i in range(k * BATCH, (k + 1) * BATCH)
        ]
        yield {
            key: np.stack([e[key] for e in examples])
            for key in ("image", "label")
        }


def by_pillow(d: data.Data, path: pathlib.Path) -> Iterator[Any]:
    """What one writes in ten lines: entries of the zip, decoded by Pillow, stacked."""
    archive, classes = (
        zipfile.ZipFile(path),
        {name: i for i, name in enumerate(d.classes)},
    )
    names = [
        n
        for n in sorted(archive.namelist())
        if n.startswith("train/") and "." in n
    ]
    order = shuffled(len(names), 0)
    for k in itertools.count():
        chosen = [names[order(i)] for i in range(k * BATCH, (k + 1) * BATCH)]
        images = [
            np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB"))
            for n in chosen
        ]
        labels = [classes[n.split("/")[1]] for n in chosen]
        yield {"image": np.stack(images), "label": np.array(labels, np.int32)}


def measure(name: str, start: Callable[[], Iterator[Any]]) -> Cost:
    """One run, after a batch that does not count."""
    library = images._simplejpeg()
    with mock.patch.object(
        images, "_simplejpeg", lambda: None if "Pillow" in name else library
    ):
        batches = start()
        next(batches)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(BATCHES):
            next(batches)
        cost = Cost(time.perf_counter() - wall, time.process_time() - cpu)
        batches.close()  # its threads must not work in the next one's time
    return cost


def same(starts: dict[str, Callable[[], Iterator[Any]]]) -> None:
    """Raise unless the first batches are equal, but for the echoed one's."""
    first = {
        name: next(start())
        for name, start in starts.items()
        if "echo" not in name
    }
    for name, batch in first.items():
        np.testing.assert_array_equal(
            batch["image"], first[OURS]["image"], err_msg=name
        )
        np.testing.assert_array_equal(
            batch["label"], first[OURS]["label"], err_msg=name
        )


def table(path: pathlib.Path, rounds: int) -> _table.Table:
    """One row a loader, means and standard deviations over rounds taken in turn."""
    d = data.load(str(path))
    starts = loaders(d, path)
    same(starts)
    costs: dict[str, list[Cost]] = {name: [] for name in starts}
    for _ in range(rounds):
        for name, start in starts.items():
            costs[name].append(measure(name, start))
    base = np.array(costs[OURS])
    return _table.make(
        HEADERS, [row(name, np.array(c), base) for name, c in costs.items()]
    )


def row(name: str, costs: np.ndarray, base: np.ndarray) -> tuple[Any, ...]:
    """Costs [rounds, 2] -> a row; the ratios are those of single rounds."""
    examples = BATCH * BATCHES
    rate, work = examples / costs[:, 0], 1e6 * costs[:, 1] / examples
    slower, dearer = (costs / base).T
    parts = [(rate, 0), (work, 1), (slower, 2), (dearer, 2)]
    numbers = (
        f"{f(x):.{n}f}"
        for x, n in parts
        for f in (np.mean, lambda x: np.std(x, ddof=1))
    )
    return name, *numbers


def heading(command: str, rounds: int, loads: tuple[float, float]) -> str:
    """What was run, on what, how often, and what else the machine did."""
    before, after = loads
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES
    )
    return (
        f"Decoding: `{command}`\n\n{hardware()}; {versions}.\n\n"
        f"{BATCHES} batches of {BATCH} images a run, {rounds} rounds in turn in one process: mean and\n"
        "standard deviation over the rounds; ratios are to the first row in the same round. CPU: of all\n"
        f"threads. Load average (1 minute) before {before:.1f}, after {after:.1f}, this process's included.\n"
        "All give the same images in the same order, but for the echoed one."
    )


def main() -> None:
    """Measure and print; `--out FILE` writes the same as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help="a zip with train/CLASS/*.jpg",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="write the table here too, as Markdown"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    before = os.getloadavg()[0]
    found = table(args.data, args.rounds)
    shown = [args.data.name if x == str(args.data) else x for x in sys.argv[1:]]
    command = " ".join([parser.prog, *shown])
    common.publish(
        [found],
        heading(command, args.rounds, (before, os.getloadavg()[0])),
        args.out,
    )


if __name__ == "__main__":
    main()
