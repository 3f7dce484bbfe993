"""What copies are worth: a small ResNet trained on CIFAR-10 with a quarter of the reads.

Every arm takes equally many steps, but for "none", which sees each image once. A seed sets the weights and
the order of the images, so that all arms read the same images first and differ only in what follows. The
augmentation is keyed by (seed, ordinal, copy), or without the copy where it stands before the echo. The
results are saved after every run; a run that is stopped goes on where it was.

The data are class folders train/CLASS and test/CLASS of 32 x 32 images, in a zip or a directory.
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from benchmarks import echo_arms, image_task, network_arms, networks, text_task
from benchmarks.echo_arms import BATCH, FACTOR, POOL, Arm, Batch
from benchmarks.image_task import Task
from jaxtricks import _table

COMMAND = "python -m benchmarks.echo_quality --data cifar10.zip"
RESULTS = pathlib.Path(__file__).parent / "results" / "echo_quality.json"
PER_CLASS = {"train": 4900, "validation": 100, "test": 1000}
RATE = 0.1  # the same ResNet's best in `networks`; tuned for no arm
EVALUATED = 500  # images of one call
BASE, LEAST = (
    "fresh",
    "none",
)  # the arm all are compared with, and the one whose gain is 0


def augmented(seed: Any, batch: Batch) -> Any:
    """Every image shifted and mirrored by a key of its own."""

    def one(image: Any, ordinal: Any, copy: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), ordinal)
        return image_task.augmented(jax.random.fold_in(key, copy), image[None])[
            0
        ]

    return jax.vmap(one)(batch.images, batch.ordinals, batch.copies)


def trainer(task: Task) -> Callable[[Arm, int, int], dict[str, Any]]:
    """(arm, seed, images an echoed arm reads) -> figures; all arms share one compiled step."""
    build = network_arms.resnet(network_arms.batch_norm(BATCH))
    apply, *_ = jt.nnx.functional(build(nnx.Rngs(0)))
    optimizer = functools.partial(optax.sgd, momentum=0.9, nesterov=True)

    def scaled(images: Any) -> Any:
        return (images.astype(jnp.float32) - task.mean) / task.deviation

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, batch: Batch, seed: Any, rate: Any) -> Any:
        params, state, moments = carry
        x = augmented(seed, batch._replace(images=scaled(batch.images)))

        def loss_fn(params: Any) -> Any:
            logits, after = apply(params, state, x, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.labels
            )
            return losses.mean(), after

        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, moments = optimizer(rate).update(grads, moments, params)
        return (optax.apply_updates(params, updates), state, moments), loss

    @jax.jit
    def right(params: Any, state: Any, images: Any, labels: Any) -> Any:
        logits, _ = apply(params, state, scaled(images), train=False)
        return jnp.sum(jnp.argmax(logits, -1) == labels)

    def accuracy(carry: Any) -> float:
        images, labels = task.test
        starts = range(0, len(labels), EVALUATED)
        parts = [
            (images[i : i + EVALUATED], labels[i : i + EVALUATED])
            for i in starts
        ]
        return sum(int(right(*carry[:2], *part)) for part in parts) / len(
            labels
        )

    def run(arm: Arm, seed: int, reads: int) -> dict[str, Any]:
        start, losses, origins = time.perf_counter(), [], []
        order = echo_arms.order(arm, len(task.train.labels), reads, seed)
        reader = echo_arms.Reader(
            task.train, order, BATCH if arm.batches else None
        )
        _, params, state = jt.nnx.functional(build(nnx.Rngs(seed)))
        carry = (params, state, optimizer(0.0).init(params))
        steps = jt.echo.num_steps(len(order), BATCH, arm.factor)
        for i, batch in enumerate(echo_arms.stream(arm, reader)):
            origins.append(batch.ordinals)
            if arm.augmented == "once":
                batch = batch._replace(copies=np.zeros_like(batch.copies))
            rate = np.float32(RATE * text_task.schedule(i, steps))
            carry, loss = step(carry, batch, seed, rate)
            losses.append(loss)
        return {
            "seed": seed,
            "steps": len(losses),
            "test": accuracy(carry),
            "loss": float(
                np.mean(losses[-max(1, round(text_task.TAIL * steps)) :])
            ),
            "reads": len(reader.given),
            "distinct": len(set(reader.given)),
            "shared": echo_arms.shared(np.array(origins)),
            "apart": echo_arms.apart(np.array(origins)),
            "held": echo_arms.held(arm),
            "seconds": round(time.perf_counter() - start, 1),
        }

    return run


def measure(
    task: Task,
    rows: dict[str, list[Any]],
    save: Any,
    *,
    seeds: int,
    reads: int,
    only: Any = None,
) -> None:
    """Train every arm, or `only` some, with every seed that has no figures yet, seed by seed."""
    run = trainer(task)
    for seed, (key, arm) in itertools.product(
        range(seeds), echo_arms.arms().items()
    ):
        done = any(r["seed"] == seed for r in rows.get(key, []))
        if done or key not in (only or echo_arms.arms()):
            continue
        rows.setdefault(key, []).append(run(arm, seed, reads))
        print(f"{key}: {rows[key][-1]}", flush=True)
        save()


def difference(runs: list[Any], base: list[Any]) -> np.ndarray:
    """Percentage points of test accuracy over the base arm's, of every seed that both have."""
    other = {r["seed"]: r["test"] for r in base}
    return np.array(
        [
            100 * (r["test"] - other[r["seed"]])
            for r in runs
            if r["seed"] in other
        ]
    )


def standard_error(values: np.ndarray) -> float:
    """Of their mean."""
    return (
        float(np.std(values, ddof=1) / np.sqrt(len(values)))
        if len(values) > 1
        else float("nan")
    )


def table(rows: dict[str, list[Any]]) -> _table.Table:
    """One row an arm."""
    lines = [cells(key, rows) for key in echo_arms.arms() if key in rows]
    body = [tuple(line.values()) for line in lines]
    verdicts = [verdict(key, rows) for key in rows if key.startswith("spread,")]
    return _table.make(list(lines[0]), body, verdicts)


def cells(key: str, rows: dict[str, list[Any]]) -> dict[str, Any]:
    """What the table says of one arm; None where it does not apply."""
    arm, runs = echo_arms.arms()[key], rows[key]
    over, gain = (difference(rows[k], rows[BASE]) for k in (key, LEAST))
    echoed = arm.factor > 1
    return {
        "echoed": arm.name,
        "augmented": arm.augmented if echoed else None,
        "read": f"{runs[0]['distinct']:,}",
        "twice in a batch": f"{100 * np.mean([r['shared'] for r in runs]):.1f} %"
        if echoed
        else None,
        "apart": min(r["apart"] for r in runs) if echoed else None,
        "held": runs[0]["held"] if echoed else None,
        "n": len(runs),
        "test %": networks.spread([100 * r["test"] for r in runs]),
        "minus fresh": None if key == BASE else points(over),
        "of the gain": None
        if key in (BASE, LEAST)
        else f"{100 - 100 * over.mean() / gain.mean():.0f} %",
        "training loss": networks.spread([r["loss"] for r in runs], 3),
    }


def verdict(key: str, rows: dict[str, list[Any]]) -> str:
    """Whether an arm is as good as fresh data, as far as these seeds can tell."""
    arm, over = echo_arms.arms()[key], difference(rows[key], rows[BASE])
    met = "met" if abs(over.mean()) <= 2 * standard_error(over) else "MISSED"
    reads = f"{rows[key][0]['reads']:,} reads for {rows[BASE][0]['reads']:,}"
    same = difference(rows[key], rows["epochs"]) if "epochs" in rows else None
    return (
        f"{arm.name}, augmented {arm.augmented}: within two standard errors of fresh data: {met} "
        f"({points(over)} points, {reads})"
        + (
            f"; {points(same)} to reading the same images again."
            if same is not None
            else "."
        )
    )


def points(values: np.ndarray) -> str:
    """Mean +- its standard error."""
    return f"{values.mean():+.2f} +- {standard_error(values):.2f}"


def settings(reads: int) -> dict[str, Any]:
    """What all arms share; results of other settings are never mixed."""
    return {
        "images": {f"{name} per class": n for name, n in PER_CLASS.items()},
        "size": "16 x 16, means of 2 x 2 pixels",
        "augmentation": f"mirror images, shifts of up to {image_task.SHIFT} pixels",
        "network": "ResNet of 8 layers, batch normalization, 16, 32 and 64 channels",
        "optimizer": f"SGD, Nesterov momentum 0.9, rate {RATE}; warm-up over a tenth, then a cosine",
        "batch": BATCH,
        "factor": FACTOR,
        "reads": reads,
        "pool": POOL,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table and what it takes to read it."""
    about, given, rows = found["about"], found["settings"], found["rows"]
    steps = jt.echo.num_steps(given["reads"], BATCH, FACTOR)
    text = (
        f"Mean +- sample standard deviation of n seeds. {given['reads']:,} images are read once and given "
        f"{FACTOR} times, in {steps:,} steps of {BATCH}. Fresh takes as many steps on "
        f"{rows[BASE][0]['distinct']:,} distinct images, and none {steps // FACTOR} steps; read again: "
        f"{FACTOR} passes over the images that the echoed arms read, in new orders. Augmented: each copy "
        "anew (the echo stands before the augmentation) or once for all (after it). Read: distinct "
        "images, counted by the source. Twice in a batch: places of a batch that hold another copy of an "
        "image in it. Apart: the least number of images from one copy to the next, counted. Held: images "
        "that wait for a later copy, at most. Minus fresh: percentage points, paired by seed, mean +- "
        "standard error. Of the gain: what is kept of the difference from none to fresh. Training loss: "
        "mean over the last tenth of the steps. The rate is the same for all arms and tuned for none; a "
        "small network and a short run, so this compares the arms and is no record."
    )
    head = [
        f"Data echoing: `{about['command']}`",
        f"{about['hardware']}; {about['versions']}",
    ]
    return "\n\n".join([*head, text, str(given), table(rows).markdown()]) + "\n"


def kept(out: pathlib.Path, given: dict[str, Any]) -> dict[str, list[Any]]:
    """The runs that are finished, if they are of the same settings."""
    if not out.exists():
        return {}
    saved = json.loads(out.read_text())
    if saved["settings"] != given:
        raise SystemExit(
            f"{out} has results of {saved['settings']}: remove it, or give another --out"
        )
    return saved["rows"]


def main() -> None:
    """Train what is missing, print the table, save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument(
        "--only", choices=echo_arms.arms(), nargs="+", help="these arms"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--reads", type=int, default=16_000, help="images an echoed arm reads"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args()
    shared_settings = settings(given.reads)
    rows = kept(given.out, shared_settings)
    found = {
        "about": text_task.about(COMMAND),
        "settings": shared_settings,
        "rows": rows,
    }

    def save() -> None:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        if BASE in rows and LEAST in rows:
            given.out.with_suffix(".md").write_text(markdown(found))

    task = image_task.make_task(given.data, PER_CLASS)
    measure(
        task, rows, save, seeds=given.seeds, reads=given.reads, only=given.only
    )
    save()
    print(markdown(found))


if __name__ == "__main__":
    main()
