"""Blocks and clipping on real images: five experiments with small networks, seeds and tuned rates.

The data are class folders train/CLASS and test/CLASS of 32 x 32 images (CIFAR-10, say), in a zip or a
directory. Every arm that has several candidate rates is tried with each on a seed that is not among those
reported; the best validation accuracy wins. Results are saved after every arm.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from jaxtricks import _table
from jaxtricks.lab.models import ConvNorm, NFNet, RepVGG, ResNet
from tests.bench import image_task, text_task
from tests.bench.image_task import Arm

COMMAND = "python -m tests.bench.networks --data cifar10.zip"
RESULTS = pathlib.Path(__file__).parent / "results" / "networks.json"
PER_CLASS = {"train": 2000, "validation": 100, "test": 300}
TUNING_SEED, SEEDS = 100, 3
CLIPPING = 0.08  # of gradient norms, as a share of the weights' norms
TARGET = 0.35  # validation accuracy, of the experiment that counts steps
EPSILON = 1e-3  # of batch normalizations, of one variance or many
REMEMBERED = 1024  # images in the running statistics, but at least 10 steps


class Experiment(NamedTuple):
    """Arms by their keys, what is compared, and what the comparison does not show."""

    title: str
    arms: dict[str, Arm]
    notes: tuple[str, ...] = ()


def batch_norm(batch: int, norm: Any = nnx.BatchNorm) -> Any:
    """Factory of normalizations whose running statistics remember the same number of images."""
    momentum = 1 - 1 / max(10, REMEMBERED / batch)
    return functools.partial(norm, momentum=momentum, epsilon=EPSILON)


def resnet(norm: Any, conv: Any = nnx.Conv) -> Callable[[nnx.Rngs], Any]:
    """A ResNet of 8 layers and 16, 32 and 64 channels."""
    unit = functools.partial(ConvNorm, conv=conv, norm=norm)
    return lambda rngs: ResNet(3, 10, unit=unit, pointwise=unit, rngs=rngs)


def nfnet(rngs: nnx.Rngs) -> NFNet:
    """The network of the same size without normalization."""
    return NFNet(3, 10, rngs=rngs)


def clipped_sgd(*left_out: str) -> Callable[[Any], optax.GradientTransformation]:
    """Adaptive clipping before the momentum, of all but the classifier's kernel and what is named."""
    where = jt.agc.exclude("head/kernel", *left_out)
    clip = jt.agc.adaptive_grad_clip(CLIPPING, where=where)
    return lambda rate: optax.chain(clip, optax.sgd(rate, momentum=0.9, nesterov=True))


def large_batch(size: int = 24_576) -> Experiment:
    """Without normalization, against batch normalization."""
    arms = {}
    for batch in (256, 1024):
        arms[f"bn {batch}"] = Arm(
            "ResNet, batch norm", resnet(batch_norm(batch)), batch, size, rates=(0.1, 0.3)
        )
        tx = clipped_sgd(".*/skip_gain")
        arms[f"nf {batch}"] = Arm("NFNet, AGC", nfnet, batch, size, rates=(0.3, 1.0), tx=tx)
    note = (
        "The branches' gains, which start at 0, are not clipped: with them clipped, and in so few steps, "
        "branches hardly open (tried on the tuning seed)."
    )
    return Experiment("NFNet with AGC against a batch-norm ResNet", arms, (note,))


def standardization(size: int = 25_600, batch: int = 128) -> Experiment:
    """Steps to a target with standardized kernels, and with plain ones."""
    group = functools.partial(nnx.GroupNorm, num_groups=8)
    ws = functools.partial(jt.nnx.WSConv, preset="qiao", use_gain=False)
    common = {"batch": batch, "images": size, "rates": (0.1, 0.3, 0.9), "target": TARGET}
    arms = {
        kind: Arm(f"ResNet, group norm, {kind} convolution", resnet(group, conv), **common)
        for kind, conv in (("plain", nnx.Conv), ("standardized", ws))
    }
    note = (
        f"Steps: until the accuracy on the validation images, looked at every {image_task.LOOK} steps, "
        f"is first {TARGET}."
    )
    return Experiment("Weight standardization: steps to a target", arms, (note,))


def clipping(size: int = 12_288, batch: int = 512) -> Experiment:
    """Rates from harmless to absurd, with and without clipping."""
    arms = {}
    for rate in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        arms[f"off {rate}"] = Arm("NFNet, no clipping", nfnet, batch, size, rates=(rate,))
        arms[f"on {rate}"] = Arm(
            "NFNet, AGC", nfnet, batch, size, rates=(rate,), tx=clipped_sgd()
        )
    return Experiment("AGC over learning rates", arms)


def small_batches(size: int = 10_240) -> Experiment:
    """One variance for all channels, at batches down to 2."""
    arms = {}
    norms = {"BatchNorm": nnx.BatchNorm, "ExtendedBatchNorm": jt.nnx.ExtendedBatchNorm}
    for batch in (32, 8, 4, 2):
        for name, norm in norms.items():
            tuned = {"rates": (0.03, 0.1)}
            scaled = {"like": (f"{name} 32", batch / 32)}
            arms[f"{name} {batch}"] = Arm(
                f"ResNet, {name}",
                resnet(batch_norm(batch, norm)),
                batch,
                size,
                **(tuned if batch == 32 else scaled),
            )
    note = "Rates are tuned at batch 32 and scaled with the batch."
    return Experiment("ExtendedBatchNorm against BatchNorm at small batches", arms, (note,))


def branches(size: int = 15_360, batch: int = 128) -> Experiment:
    """Training forms of several branches against one convolution, in a network without shortcuts."""
    norm = batch_norm(batch)

    def stack(block: Any, size: tuple[tuple[int, int], ...]) -> Callable[[nnx.Rngs], RepVGG]:
        def make(i: int, o: int, *, strides: int, rngs: nnx.Rngs) -> Any:
            return block(i, o, *size, strides=strides, norm=norm, rngs=rngs)

        return lambda rngs: RepVGG(3, 10, blocks=2, block=make, rngs=rngs)

    square = ((3, 3),)
    common = {"batch": batch, "images": size, "rates": (0.1, 0.3)}
    arms = {
        "plain": Arm("convolution, batch norm", stack(ConvNorm, square), **common),
        "acblock": Arm("ACBlock", stack(jt.nnx.ACBlock, square), fuse=True, **common),
        "repvgg": Arm("RepVGGBlock", stack(jt.nnx.RepVGGBlock, square), fuse=True, **common),
    }
    note = (
        "Fused: the largest difference of a logit between the trained and the fused network, the largest "
        "logit, and how many predictions change, over all runs and test images."
    )
    return Experiment("Training forms of several branches", arms, (note,))


EXPERIMENTS = {
    "standardization": standardization,
    "clipping": clipping,
    "branches": branches,
    "large_batch": large_batch,
    "small_batches": small_batches,
}


def measure(
    task: image_task.Task, arms: dict[str, Arm], rows: Any, save: Callable[[], None], *, seeds: int
) -> None:
    """Tune and train every arm that has no row yet."""
    for key, arm in arms.items():
        if key in rows:
            continue
        run = image_task.trainer(task, arm)
        tried = [run(TUNING_SEED, rate) for rate in arm.rates] if len(arm.rates) > 1 else []
        if arm.like is not None:
            rate = rows[arm.like[0]]["rate"] * arm.like[1]
        else:
            best = max(tried, key=lambda r: (not r["diverged"], r["validation"]), default=None)
            rate = arm.rates[0] if best is None else best["rate"]
        runs = [run(seed, rate) for seed in range(seeds)]
        about = {"name": arm.name, "batch": arm.batch, "steps": arm.steps, "rate": rate}
        rows[key] = {**about, "runs": runs, "tried": tried}
        save()


def spread(values: list[Any], digits: int = 2) -> str | None:
    """Mean +- sample standard deviation of those that are not None."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    deviation = np.std(known, ddof=1) if len(known) > 1 else float("nan")
    return f"{np.mean(known):.{digits}f} +- {deviation:.{digits}f}"


def table(rows: dict[str, Any], experiment: Experiment) -> _table.Table:
    """One row an arm; columns that no arm fills are left out."""
    headers = ("arm", "batch", "steps", "rate", "loss", "test %", "diverged", "steps to target")
    headers += ("difference", "largest logit", "changed")
    lines = []
    for row in rows.values():
        runs = row["runs"]
        of = {name: [r.get(name) for r in runs] for name in ("loss", "reached", "difference")}
        line = [row["name"], row["batch"], row["steps"], f"{row['rate']:.3g}", spread(of["loss"], 3)]
        line += [spread([100 * r["test"] for r in runs])]
        line += [f"{sum(r['diverged'] for r in runs)} of {len(runs)}"]
        hits = [x for x in of["reached"] if x is not None]
        line += [f"{spread(hits, 0)} ({len(hits)} of {len(runs)})" if hits else None]
        fused = [r for r in runs if "difference" in r]
        line += [max((r["difference"] for r in fused), default=None)]
        line += [max((r["largest"] for r in fused), default=None)]
        line += [sum(r["other_predictions"] for r in fused) if fused else None]
        lines.append(line)
    kept = [i for i in range(len(headers)) if any(line[i] is not None for line in lines)]
    body = [[line[i] for i in kept] for line in lines]
    return _table.make([headers[i] for i in kept], body, (*experiment.notes, *edges(rows)))


def edges(rows: dict[str, Any]) -> list[str]:
    """Which candidates there were, and where the best was the first or last of them."""
    notes = []
    for row in rows.values():
        rates = [r["rate"] for r in row["tried"]]
        if rates:
            where = {rates[0]: ", the smallest", rates[-1]: ", the largest"}.get(row["rate"], "")
            tried = ", ".join(f"{r:g}" for r in rates)
            notes.append(
                f"{row['name']}, batch {row['batch']}: best rate {row['rate']:g} of {tried}{where}."
            )
    return notes


def settings(seeds: int) -> dict[str, Any]:
    """What all experiments share."""
    return {
        "images": {f"{name} per class": n for name, n in PER_CLASS.items()},
        "size": "16 x 16, means of 2 x 2 pixels",
        "augmentation": f"mirror images, shifts of up to {image_task.SHIFT} pixels",
        "optimizer": "SGD, Nesterov momentum 0.9, no weight decay; warm-up over a tenth, then a cosine",
        "clipping": CLIPPING,
        "epsilon": EPSILON,
        "remembered": REMEMBERED,
        "seeds": seeds,
        "tuning_seed": TUNING_SEED,
    }


def markdown(found: dict[str, Any]) -> str:
    """All tables."""
    about, given = found["about"], found["settings"]
    lines = [f"Networks: `{about['command']}`", f"{about['hardware']}; {about['versions']}"]
    lines.append(
        f"Mean +- sample standard deviation of {given['seeds']} seeds; rates tried on another one. Few "
        f"images and few steps: differences between arms, not records.\n{given}"
    )
    for name, rows in found["experiments"].items():
        experiment = EXPERIMENTS[name]()
        lines += [f"## {experiment.title} (`--only {name}`)", table(rows, experiment).markdown()]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Train, print the tables, save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--only", choices=EXPERIMENTS, help="run this one again, keep the others")
    parser.add_argument("--resume", action="store_true", help="keep the arms that are finished")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--images", type=int, help="seen in every run, to try the script")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args()
    old = json.loads(given.out.read_text())["experiments"] if given.out.exists() else {}
    if not given.resume:
        old = {k: v for k, v in old.items() if given.only not in (None, k)}
    found = {
        "about": text_task.about(COMMAND),
        "settings": settings(given.seeds),
        "experiments": old,
    }

    def save() -> None:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(markdown(found))

    task = image_task.make_task(given.data, PER_CLASS)
    size = {"size": given.images} if given.images else {}
    for name, make in EXPERIMENTS.items():
        if given.only in (None, name):
            rows = found["experiments"].setdefault(name, {})
            measure(task, make(**size).arms, rows, save, seeds=given.seeds)
    print(markdown(found))


if __name__ == "__main__":
    main()
