"""What `networks` trains on and how: small images held in memory, one compiled step per arm."""

import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from benchmarks.text_task import TAIL, in_float32, schedule
from jaxtricks.lab.data import folders

EVALUATED = 500  # images of one call in evaluation
LOOK = 10  # steps between two looks at the validation accuracy, or at whether the loss is finite
SHIFT = 2  # pixels


class Split(NamedTuple):
    """Images uint8 [N, H, W, 3] and labels int32 [N]."""

    images: Any
    labels: Any


class Task(NamedTuple):
    """The data; mean and deviation [1, 1, 1, 3] are those of the training images, on the scale 0 to 255."""

    train: Split
    validation: Split
    test: Split
    classes: int
    mean: Any
    deviation: Any


class Arm(NamedTuple):
    """A way to train.

    Attributes:
      name: for the table.
      build: (rngs) -> network.
      batch: images a step.
      images: how many are seen in all.
      rates: peak learning rates; of several, the best on the tuning seed is taken.
      like: (key of another arm, factor): the rate is that arm's times the factor.
      tx: rate -> optimizer; its state does not depend on the rate.
      target: validation accuracy whose first step is looked for.
      fuse: whether the trained network is compared with its fused form.
      differentiate: (loss, optimizer state, has_aux) -> (params, images) -> ((loss, aux), grads).
      start: initial parameters -> those to start from.
      share: (step, steps) -> share of the peak rate.
      counts: images of each class to train on, the first of each; None for all.
      loss: (logits [N, classes], labels [N]) -> per image.
    """

    name: str
    build: Callable[[nnx.Rngs], Any]
    batch: int
    images: int
    rates: tuple[float, ...] = ()
    like: tuple[str, float] | None = None
    tx: Callable[[Any], Any] = functools.partial(
        optax.sgd, momentum=0.9, nesterov=True
    )
    target: float | None = None
    fuse: bool = False
    differentiate: Callable[..., Any] = in_float32
    start: Callable[[Any], Any] = lambda params: params
    share: Callable[[int, int], float] = schedule
    counts: tuple[int, ...] | None = None
    loss: Callable[..., Any] = optax.softmax_cross_entropy_with_integer_labels

    @property
    def steps(self) -> int:
        """Of one run."""
        return max(1, self.images // self.batch)


def make_task(path: pathlib.Path, per_class: dict[str, int]) -> Task:
    """Class-balanced subsets of class folders train/CLASS and test/CLASS, at half their resolution.

    Args:
      path: a zip or a directory.
      per_class: images of each class for "train", "validation" (also from train/) and "test".
    """
    stored = folders.stored(path)
    chosen: dict[str, list[int]] = {name: [] for name in per_class}
    for label in range(len(stored.classes)):
        mine = stored.labels == label
        train, test = (
            np.flatnonzero(mine & (stored.split == w))
            for w in ("train", "test")
        )
        cut = per_class["validation"]
        chosen["validation"] += [*train[:cut]]
        chosen["train"] += [*train[cut : cut + per_class["train"]]]
        chosen["test"] += [*test[: per_class["test"]]]
    splits = {}
    for name, index in chosen.items():
        images = np.stack([halved(stored.read(int(i))[0]) for i in index])
        splits[name] = Split(images, stored.labels[index])
    pixels = splits["train"].images.astype(np.float32)
    mean, deviation = (
        f((0, 1, 2), keepdims=True) for f in (pixels.mean, pixels.std)
    )
    return Task(
        **splits, classes=len(stored.classes), mean=mean, deviation=deviation
    )


def halved(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 [H / 2, W / 2, C]: means of 2 x 2 pixels."""
    height, width, channels = image.shape
    blocks = image.reshape(height // 2, 2, width // 2, 2, channels)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def augmented(key: Any, x: Any) -> Any:
    """Random mirror images, shifted by up to SHIFT pixels over a border of zeros."""
    flip_key, shift_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(x.shape[0], 1, 1, 1))
    x = jnp.where(flip, x[:, :, ::-1], x)
    wide = jnp.pad(x, [(0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)])
    starts = jax.random.randint(shift_key, (x.shape[0], 2), 0, 2 * SHIFT + 1)

    def cut(image: Any, start: Any) -> Any:
        return jax.lax.dynamic_slice(
            image, (start[0], start[1], 0), x.shape[1:]
        )

    return jax.vmap(cut)(wide, starts)


def order(count: int, needed: int, seed: int) -> np.ndarray:
    """Indices of the images seen: every epoch once through, the same for every arm and batch size."""
    epochs = math.ceil(needed / count)
    lists = [
        np.random.default_rng((seed, e)).permutation(count)
        for e in range(epochs)
    ]
    return np.concatenate(lists)[:needed]


def thinned(split: Split, counts: tuple[int, ...]) -> Split:
    """The first `counts[c]` images of every class c."""
    index = np.concatenate(
        [np.flatnonzero(split.labels == c)[:n] for c, n in enumerate(counts)]
    )
    return Split(split.images[index], split.labels[index])


def trainer(task: Task, arm: Arm) -> Callable[[int, float], dict[str, Any]]:
    """(seed, peak rate) -> figures of one run; seed and rate are data, so compiled code serves all runs.

    Steps are called one by one: XLA's convolutions on CPU are 10 to 30 times slower inside a loop that
    is compiled, and a call costs less than a millisecond.
    """
    apply, *_ = jt.nnx.functional(arm.build(nnx.Rngs(0)))
    chosen = (
        task.train if arm.counts is None else thinned(task.train, arm.counts)
    )
    train = Split(*map(jnp.asarray, chosen))

    def scaled(images: Any) -> Any:
        return (images.astype(jnp.float32) - task.mean) / task.deviation

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, index: Any, seed: Any, count: Any, rate: Any) -> Any:
        params, state, moments = carry
        key = jax.random.fold_in(jax.random.key(seed), count)
        x, labels = (
            augmented(key, scaled(train.images[index])),
            train.labels[index],
        )

        def loss_fn(params: Any, x: Any) -> Any:
            logits, after = apply(params, state, x, train=True)
            logits = logits.astype(jnp.float32)
            return arm.loss(logits, labels).mean(), after

        differentiated = arm.differentiate(loss_fn, moments, has_aux=True)
        (loss, state), grads = differentiated(params, x)
        updates, moments = arm.tx(rate).update(grads, moments, params)
        return (optax.apply_updates(params, updates), state, moments), loss

    @jax.jit
    def judged(params: Any, state: Any, images: Any, labels: Any) -> Any:
        logits, _ = apply(params, state, scaled(images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), labels
        )
        return jnp.sum(jnp.argmax(logits, -1) == labels), jnp.sum(losses)

    def quality(carry: Any, split: Split) -> tuple[float, float]:
        """Accuracy and mean cross entropy."""
        sums = [
            judged(*carry[:2], images, labels)
            for images, labels in _parts(split)
        ]
        right, loss = np.sum(np.asarray(sums, np.float64), 0)
        return float(right / len(split.labels)), float(loss / len(split.labels))

    def accuracy(carry: Any, split: Split) -> float:
        return quality(carry, split)[0]

    def run(seed: int, rate: float) -> dict[str, Any]:
        start, losses, reached = time.perf_counter(), [], None
        _, params, state = jt.nnx.functional(arm.build(nnx.Rngs(seed)))
        params = arm.start(params)
        carry = (params, state, arm.tx(0.0).init(params))
        index = order(len(train.labels), arm.steps * arm.batch, seed).reshape(
            arm.steps, -1
        )
        for i in range(arm.steps):
            now = np.float32(rate * arm.share(i, arm.steps))
            carry, loss = step(carry, index[i], seed, i, now)
            losses.append(loss)
            if (i + 1) % LOOK:
                continue
            if not np.isfinite(loss):
                break
            if arm.target is not None and reached is None:
                reached = (
                    i + 1
                    if accuracy(carry, task.validation) >= arm.target
                    else None
                )
        last = float(np.mean(losses[-max(1, round(TAIL * arm.steps)) :]))
        validation, validation_loss = quality(carry, task.validation)
        test, test_loss = quality(carry, task.test)
        found = {
            "seed": seed,
            "rate": rate,
            "loss": last if np.isfinite(last) else None,
            "diverged": not last <= math.log(task.classes),
            "validation": validation,
            "validation_loss": validation_loss,
            "test": test,
            "test_loss": test_loss,
        }
        found |= {name: float(x) for name, x in jt.metrics(carry[2]).items()}
        if arm.target is not None:
            found["reached"] = reached
        if arm.fuse:
            found |= fused(arm, carry[0], carry[1], task.test, scaled)
        found["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{arm.name}, batch {arm.batch}: {found}", flush=True)
        return found

    return run


def fused(
    arm: Arm, params: Any, state: Any, split: Split, scaled: Any
) -> dict[str, Any]:
    """How far the fused network's logits are from those of the network that was trained."""
    model = jt.nnx.with_variables(arm.build(nnx.Rngs(0)), params, state)
    model.eval()
    deployed, _ = jt.nnx.fuse(model)
    parts = [scaled(images) for images, _ in _parts(split)]
    branches, plain = (
        np.concatenate([nnx.jit(m)(x) for x in parts])
        for m in (model, deployed)
    )
    return {
        "difference": float(np.abs(branches - plain).max()),
        "largest": float(np.abs(branches).max()),
        "other_predictions": int(
            np.sum(branches.argmax(-1) != plain.argmax(-1))
        ),
    }


def _parts(split: Split) -> list[tuple[Any, Any]]:
    stops = range(EVALUATED, len(split.labels), EVALUATED)
    return list(zip(*(np.split(x, list(stops)) for x in split), strict=True))
