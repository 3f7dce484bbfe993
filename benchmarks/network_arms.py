"""The arms of `networks`: which network, normalization, optimizer, batch and rates."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from benchmarks import image_task, text_task
from benchmarks.image_task import Arm
from jaxtricks.lab.models import ConvNorm, NFNet, RepVGG, ResNet

CLIPPING = 0.08  # of gradient norms, as a share of the weights' norms
TARGET = 0.35  # validation accuracy, of the experiment that counts steps
CYCLES_TARGET, TAIL_TARGET = 0.45, 0.25  # the same of two more
EPSILON = 1e-3  # of batch normalizations, of one variance or many
REMEMBERED = 1024  # images in the running statistics, but at least 10 steps
group_norm = functools.partial(nnx.GroupNorm, num_groups=8)
standardized = functools.partial(jt.nnx.WSConv, preset="qiao", use_gain=False)


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


def clipped_sgd(
    *left_out: str,
) -> Callable[[Any], optax.GradientTransformation]:
    """Adaptive clipping before the momentum, of all but the classifier's kernel and what is named."""
    where = jt.agc.exclude("head/kernel", *left_out)
    clip = jt.agc.adaptive_grad_clip(CLIPPING, path_filter=where)
    return lambda rate: optax.chain(
        clip, optax.sgd(rate, momentum=0.9, nesterov=True)
    )


def large_batch(size: int = 24_576) -> Experiment:
    """Without normalization, against batch normalization."""
    arms = {}
    for batch in (256, 1024):
        arms[f"bn {batch}"] = Arm(
            "ResNet, batch norm",
            resnet(batch_norm(batch)),
            batch,
            size,
            rates=(0.1, 0.3),
        )
        tx = clipped_sgd(".*/skip_gain")
        arms[f"nf {batch}"] = Arm(
            "NFNet, AGC", nfnet, batch, size, rates=(0.3, 1.0), tx=tx
        )
    note = (
        "The branches' gains, which start at 0, are not clipped here: a first try on the tuning seed was "
        "better so. In `clipping` all but the classifier's kernel is clipped."
    )
    return Experiment(
        "NFNet with AGC against a batch-norm ResNet", arms, (note,)
    )


def standardization(size: int = 25_600, batch: int = 128) -> Experiment:
    """Steps to a target with standardized kernels, and with plain ones."""
    common = {"batch": batch, "images": size, "target": TARGET}
    # Plain convolutions were best with the smallest of three rates, so they have one more below it.
    rates = {"plain": (0.03, 0.1, 0.3, 0.9), "standardized": (0.1, 0.3, 0.9)}
    arms = {
        kind: Arm(
            f"ResNet, group norm, {kind} convolution",
            resnet(group_norm, conv),
            rates=rates[kind],
            **common,
        )
        for kind, conv in (("plain", nnx.Conv), ("standardized", standardized))
    }
    note = (
        f"Steps: until the accuracy on the validation images, looked at every {image_task.LOOK} steps, "
        f"is first {TARGET}."
    )
    return Experiment(
        "Weight standardization: steps to a target", arms, (note,)
    )


def clipping(size: int = 12_288, batch: int = 512) -> Experiment:
    """Rates from harmless to absurd, with and without clipping."""
    arms = {}
    for rate in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        arms[f"off {rate}"] = Arm(
            "NFNet, no clipping", nfnet, batch, size, rates=(rate,)
        )
        arms[f"on {rate}"] = Arm(
            "NFNet, AGC", nfnet, batch, size, rates=(rate,), tx=clipped_sgd()
        )
    return Experiment("AGC over learning rates", arms)


def small_batches(size: int = 8_192) -> Experiment:
    """One variance for all channels, at batches down to 2; GroupNorm knows no batch."""
    arms = {}
    names = (
        "BatchNorm",
        "ExtendedBatchNorm",
        "GroupNorm",
        "GroupNorm, standardized",
    )
    for batch in (32, 8, 4, 2):
        norms = {
            "BatchNorm": batch_norm(batch),
            "ExtendedBatchNorm": batch_norm(batch, jt.nnx.ExtendedBatchNorm),
            "GroupNorm": group_norm,
            "GroupNorm, standardized": group_norm,
        }
        for name in names:
            tuned = {"rates": (0.01, 0.03, 0.1, 0.3)}
            scaled = {"like": (f"{name} 32", batch / 32)}
            arms[f"{name} {batch}"] = Arm(
                f"ResNet, {name}",
                resnet(
                    norms[name],
                    standardized if "standardized" in name else nnx.Conv,
                ),
                batch,
                size,
                **(tuned if batch == 32 else scaled),
            )
    note = "Rates are tuned at batch 32 and scaled with the batch."
    return Experiment(
        "ExtendedBatchNorm at small batches, against BatchNorm and GroupNorm",
        arms,
        (note,),
    )


def branches(size: int = 15_360, batch: int = 128) -> Experiment:
    """Training forms of several branches against one convolution, in a network without shortcuts."""
    norm = batch_norm(batch)

    def stack(
        block: Any, size: tuple[tuple[int, int], ...]
    ) -> Callable[[nnx.Rngs], RepVGG]:
        def make(i: int, o: int, *, strides: int, rngs: nnx.Rngs) -> Any:
            return block(i, o, *size, strides=strides, norm=norm, rngs=rngs)

        return lambda rngs: RepVGG(3, 10, blocks=2, block=make, rngs=rngs)

    square = ((3, 3),)
    common = {"batch": batch, "images": size, "rates": (0.1, 0.3)}
    arms = {
        "plain": Arm(
            "convolution, batch norm", stack(ConvNorm, square), **common
        ),
        "acblock": Arm(
            "ACBlock", stack(jt.nnx.ACBlock, square), fuse=True, **common
        ),
        "repvgg": Arm(
            "RepVGGBlock",
            stack(jt.nnx.RepVGGBlock, square),
            fuse=True,
            **common,
        ),
    }
    note = (
        "Fused: the largest difference of a logit between the trained and the fused network, the largest "
        "logit, and how many predictions change, over all runs and test images."
    )
    return Experiment("Training forms of several branches", arms, (note,))


def constant(step: int, steps: int) -> float:
    """The peak rate throughout."""
    del step, steps
    return 1.0


def triangles(cycles: int) -> Callable[[int, int], float]:
    """Whole cycles from a quarter of the peak to the peak and back."""

    @functools.cache
    def rates(steps: int) -> Any:
        rate = jt.cyclical.cyclical(0.25, 1.0, steps / (2 * cycles))
        return np.asarray(jax.vmap(rate)(jnp.arange(steps)))

    return lambda step, steps: float(rates(steps)[step])


def cycles(size: int = 40_000, batch: int = 100) -> Experiment:
    """Steps to a target under cyclical rates, a constant one and a cosine."""
    shares = {
        "constant": ("constant rate", constant),
        "one": ("triangular, 1 cycle", triangles(1)),
        "cosine": ("warm-up and cosine", text_task.schedule),
        "two": ("triangular, 2 cycles", triangles(2)),
    }
    common = {
        "rates": (0.03, 0.1, 0.3),
        "target": CYCLES_TARGET,
        "counts": (1000,) * 10,
    }
    build = resnet(batch_norm(batch))
    arms = {
        k: Arm(n, build, batch, size, share=s, **common)
        for k, (n, s) in shares.items()
    }
    note = (
        f"Steps: as above, to {CYCLES_TARGET}. 400 steps are 4 epochs of 1,000 images a class: the legs of "
        "1 cycle are of 2 epochs, the shortest that the paper advises. Rates are peaks; a triangle begins at "
        "a quarter of it."
    )
    return Experiment("Cyclical rates: steps to a target", arms, (note,))


def long_tail(size: int = 38_400, batch: int = 128) -> Experiment:
    """Steps to a balanced accuracy, trained on a long tail."""
    counts = tuple(
        map(int, jt.longtail.data.exponential_counts(2000, 10, 100.0))
    )
    losses = {"cross entropy": jt.longtail.cross_entropy()}
    losses["balanced softmax"] = jt.longtail.balanced_softmax(
        jnp.asarray(counts, jnp.float32)
    )
    common = {
        "rates": (0.03, 0.1, 0.3),
        "target": TAIL_TARGET,
        "counts": counts,
    }
    build = resnet(batch_norm(batch))
    arms = {
        name: Arm(name, build, batch, size, loss=f, **common)
        for name, f in losses.items()
    }
    note = (
        f"Trained on {counts} images of the ten classes, tested on equally many of each. Steps: as above, to "
        f"{TAIL_TARGET}. Training losses of different kinds can't be compared."
    )
    return Experiment(
        "A long tail: steps to a balanced accuracy", arms, (note,)
    )


EXPERIMENTS = {
    "standardization": standardization,
    "clipping": clipping,
    "branches": branches,
    "large_batch": large_batch,
    "small_batches": small_batches,
    "cycles": cycles,
    "long_tail": long_tail,
}
