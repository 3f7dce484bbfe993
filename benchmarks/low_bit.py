"""AdamW with its state in 32, 8 and 4 bits, and in 7 bytes a parameter: losses of two small models.

A transformer by character; with `--data`, a convolutional network on CIFAR-10 instead. The batches are the
same for every arm, and the products are float32 in every arm. The rate is one that suits AdamW in float32:
that which `training` found for text, and the best of three on another seed for images. Nothing is tuned for
the narrow states.

Training is chaotic: a rounding error grows until two runs differ as much as two of float32 would. On images
the arm "float32, nudged" shows how much that is: float32 whose initial weights are rounded to bfloat16 once.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from benchmarks import image_task, network_arms, text_task
from jaxtricks import _table, _tree

COMMAND = "python -m benchmarks.low_bit"
LIMITS = {"8 bits": 1.005, "4 bits": 1.01, "adamw7": 1.005}  # of float32's
IMAGE_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
PER_CLASS = {"train": 2000, "validation": 1000, "test": 100}
UNITS = {"text": "nats per character", "images": "nats"}


class Way(NamedTuple):
    """How an arm trains: its optimizer for a rate, the parameters' dtype, and whether they start rounded."""

    name: str
    tx: Callable[[Any], optax.GradientTransformation]
    dtype: Any = jnp.float32
    nudged: bool = False

    def start(self, params: Any) -> Any:
        """The parameters to start from."""
        if self.nudged:
            params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
            return jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return jax.tree.map(lambda p: p.astype(self.dtype), params)


def ways() -> dict[str, Way]:
    """AdamW in float32, its state in 8 and in 4 bits, and adamw7."""

    def low_bit(bits: int) -> Any:
        return lambda rate: jt.memopt.low_bit(optax.adamw(rate), bits=bits)

    return {
        "float32": Way("AdamW, float32", optax.adamw),
        "8 bits": Way("low_bit(AdamW), 8 bits", low_bit(8)),
        "4 bits": Way("low_bit(AdamW), 4 bits", low_bit(4)),
        "adamw7": Way(
            "adamw7, bfloat16 parameters", jt.memopt.adamw7, jnp.bfloat16
        ),
    }


def text_rows(
    rate: float, *, steps: int, batch: int, seeds: int
) -> dict[str, Any]:
    """Figures of every arm on text."""
    task, found = text_task.make_task(), {}
    for key, way in ways().items():
        arm = text_task.Arm(way.name, way.tx, way.dtype)
        run = text_task.trainer(task, arm, steps=steps, batch=batch)
        runs = [run(seed, rate) for seed in range(seeds)]
        found[key] = row(
            way,
            lambda: task.init(0),
            [text_task.tail(r) for r in runs],
            [r.validation for r in runs],
        )
    return found


def image_rows(
    data: pathlib.Path, *, steps: int, batch: int, seeds: int
) -> tuple[float, dict[str, Any]]:
    """The rate, and figures of every arm on images."""
    task = image_task.make_task(data, PER_CLASS)
    build = network_arms.resnet(network_arms.batch_norm(batch))

    def trainer(way: Way) -> Callable[[int, float], dict[str, Any]]:
        arm = image_task.Arm(
            way.name, build, batch, steps * batch, tx=way.tx, start=way.start
        )
        return image_task.trainer(task, arm)

    compared = ways()
    compared["nudged"] = Way("AdamW, float32, nudged", optax.adamw, nudged=True)
    run = trainer(compared["float32"])
    tried = {
        rate: run(TUNING_SEED, rate)["validation_loss"] for rate in IMAGE_RATES
    }
    rate, found = min(tried, key=tried.__getitem__), {}
    for key, way in compared.items():
        run = trainer(way)
        runs = [run(seed, rate) for seed in range(seeds)]
        found[key] = row(
            way,
            lambda: jt.nnx.functional(build(nnx.Rngs(0)))[1],
            # A run that diverged has no loss: it stays in the table, as infinite.
            [np.inf if r["loss"] is None else r["loss"] for r in runs],
            [r["validation_loss"] for r in runs],
        )
    return rate, found


def row(
    way: Way, init: Callable[[], Any], train: list[float], held: list[float]
) -> dict[str, Any]:
    """Figures of one arm: its bytes a parameter, and the losses of every seed."""
    params = jax.eval_shape(lambda: way.start(init()))
    count = sum(p.size for p in jax.tree.leaves(params))
    stored = _tree.nbytes(params) + jt.memopt.state_bytes(way.tx(0.0), params)
    return {
        "name": way.name,
        "bytes": stored / count,
        "train": np.array(train),
        "held": np.array(held),
    }


def table(found: dict[str, Any]) -> _table.Table:
    """One row an arm."""
    base = found["float32"]
    headers = ("optimizer", "bytes/param", "training", "of float32's")
    body, notes = [], []
    for key, figures in found.items():
        train, held = figures["train"], figures["held"]
        each = held / base["held"]  # of the same seed
        of = held.mean() / base["held"].mean()
        body.append(
            (
                figures["name"],
                figures["bytes"],
                spread(train),
                train.mean() / base["train"].mean(),
                spread(held),
                of,
            )
        )
        if key in LIMITS:
            met = "met" if of <= LIMITS[key] else "MISSED"
            notes.append(
                f"{figures['name']}: validation loss at most {LIMITS[key]} of float32's: "
                f"{met} ({of:.4f}; each seed {', '.join(f'{x:.4f}' for x in each)})"
            )
        elif key == "nudged":
            notes.append(
                f"{figures['name']}: by chance alone {of:.4f} "
                f"(each seed {', '.join(f'{x:.4f}' for x in each)})"
            )
    return _table.make((*headers, "validation", "of float32's"), body, notes)


def spread(values: np.ndarray) -> str:
    """Mean +- sample standard deviation over seeds as text."""
    mean, std = float(values.mean()), float(values.std(ddof=1))
    return text_task.spread({"mean": mean, "std": std})


def main() -> None:
    """Train, print the table, write it with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=pathlib.Path, help="CIFAR-10, as `networks`"
    )
    parser.add_argument("--steps", type=int, help="200; with --data 600")
    parser.add_argument("--batch", type=int, help="16; with --data 64")
    parser.add_argument("--seeds", type=int, help="3; with --data 5")
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    steps = given.steps or (600 if given.data else 200)
    batch = given.batch or (64 if given.data else 16)
    seeds = given.seeds or (5 if given.data else 3)
    if given.data:
        command = f"{COMMAND} --data {given.data.name}"
        rate, found = image_rows(
            given.data, steps=steps, batch=batch, seeds=seeds
        )
        what = (
            "A ResNet of 8 layers with batch normalization on CIFAR-10 at 16 x 16, "
            f"{PER_CLASS['train']} training and {PER_CLASS['validation']} validation images a class.\n"
            f"{steps} steps of {batch} images at a peak rate of {rate:g} (the best of "
            f"{', '.join(f'{r:g}' for r in IMAGE_RATES)} for AdamW in float32, on another seed)"
        )
        unit = UNITS["images"]
    else:
        command = COMMAND
        rate = text_task.load("training")["rows"]["adamw"]["rate"]
        found = text_rows(rate, steps=steps, batch=batch, seeds=seeds)
        what = f"{steps} steps of {batch} x {text_task.CONTEXT} characters at a peak rate of {rate:g}"
        unit = UNITS["text"]
    about = text_task.about(command)
    text = (
        f"{about['hardware']}\n{about['versions']}\n\n"
        f"{what}, n = {seeds} seeds, mean +- std; {unit}. "
        "Bytes are those of parameter and state, without the gradient.\n\n"
        f"{table(found)}\n"
    )
    print(text)
    if given.out:
        given.out.write_text(f"`{command}`\n\n```\n{text}```\n")


if __name__ == "__main__":
    main()
