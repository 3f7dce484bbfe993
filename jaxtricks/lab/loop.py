"""One jitted, donated, sharding-ready step; evaluation; the training loop and its log."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxtricks as jt
from jaxtricks import _tree
from jaxtricks._types import Array, Key
from jaxtricks.lab import compose
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.config import Train, UserError


@_tree.node
class TrainState:
    """Everything that a step changes or needs, so that one executable serves every seed.

    Attributes:
      params: nested dict of arrays.
      model_state: statistics and RNG counts of the model.
      opt_state: of the optax chain.
      step: int32 [].
      key: PRNG key of the run; step i uses fold_in(key, i).
      counts: training images of each class, float32 [C].
    """

    params: Any
    model_state: Any
    opt_state: Any
    step: Array
    key: Key
    counts: Array


class Program(NamedTuple):
    """A composed model: what it takes to train and evaluate it.

    Attributes:
      init: (seed, counts) -> TrainState.
      step: (state, batch) -> (state, metrics); not jitted.
      predict: (params, model_state, images uint8) -> logits float32; not jitted.
    """

    init: Callable[[int, np.ndarray], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
    predict: Callable[[Any, Any, Array], Array]


def build(cfg: Train, data: data_lib.Data) -> Program:
    """Compose model, loss and optimizer for a run."""
    channels, num_classes = data.shape[-1], len(data.classes)
    model = compose.build_model(cfg, channels, num_classes, cfg.seed)
    apply, _, _ = jt.nnx.functional(model)
    tx = compose.build_optimizer(cfg, jt.nnx.roles(model))
    pad = max(1, data.shape[0] // 8)

    def init(seed: int, counts: np.ndarray) -> TrainState:
        model = compose.build_model(cfg, channels, num_classes, seed)
        _, params, model_state = jt.nnx.functional(model)
        return TrainState(
            params,
            model_state,
            tx.init(params),
            jnp.int32(0),
            jax.random.key(seed),
            jnp.asarray(counts, jnp.float32),
        )

    def loss_fn(params: Any, model_state: Any, images: Array, labels: Array, counts: Array) -> Any:
        params, images = compose.cast_inputs(cfg, params, images)
        logits, model_state = apply(params, model_state, images, train=True)
        loss = compose.build_loss(cfg, counts)(logits, labels)
        correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return loss.mean(), (model_state, correct.mean())

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        images = augment(key, batch["image"], pad=pad, flip=data.flip)
        grad_fn = compose.differentiate(cfg, loss_fn, state.opt_state)
        (loss, (model_state, accuracy)), grads = grad_fn(
            state.params, state.model_state, to_float(images), batch["label"], state.counts
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(params, model_state, opt_state, state.step + 1, state.key, state.counts)
        return new, {"loss": loss, "accuracy": accuracy, **jt.metrics(opt_state)}

    def predict(params: Any, model_state: Any, images: Array) -> Array:
        # In float32 whatever the training used: evaluation is what is compared.
        return apply(params, model_state, to_float(images), train=False)[0]

    return Program(init, step, predict)


def to_float(images: Array) -> Array:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def augment(key: Key, images: Array, *, pad: int, flip: bool) -> Array:
    """Random shift by up to `pad` pixels and, if flip, mirror: uint8 [N, H, W, C], on device."""
    n, height, width, channels = images.shape
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")

    def crop(image: Array, shift: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*shift, 0), (height, width, channels))

    images = jax.vmap(crop)(padded, shifts)
    if not flip:
        return images
    mirror = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


class Placement(NamedTuple):
    """Where things live: state on every device, batches split over them."""

    state: NamedSharding
    batch: NamedSharding

    @classmethod
    def over(cls, devices: int) -> "Placement":
        """A one-axis mesh over the first devices.

        Raises:
          UserError: fewer devices than asked for.
        """
        have = jax.devices()
        if devices > len(have):
            raise UserError(f"--devices {devices}, but there are {len(have)}: lower it")
        mesh = jax.sharding.Mesh(np.array(have[:devices]), ("data",))
        return cls(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))


class Evaluator:
    """Confusion metrics of a split; the compiled function is kept between calls."""

    def __init__(self, program: Program, num_classes: int, batch: int = 256):
        self._num_classes, self._batch = num_classes, batch

        def update(metrics: Any, params: Any, model_state: Any, batch: Any) -> Any:
            logits = program.predict(params, model_state, batch["image"])
            return jt.longtail.metrics.update(metrics, logits, batch["label"], batch["where"])

        self._update = jax.jit(update)

    def __call__(
        self, state: TrainState, source: data_lib.Source, limit: int | None = None
    ) -> dict[str, Any]:
        """Summary over the source (or `limit` examples spread over it); host values."""
        metrics = jt.longtail.metrics.init(self._num_classes)
        size = min(self._batch, len(source) if limit is None else min(limit, len(source)))
        for batch in data_lib.eval_batches(source, size, limit):
            metrics = self._update(metrics, state.params, state.model_state, batch)
        # The usual thresholds (100 and 20 images) leave groups empty where classes are few.
        split = "rank" if self._num_classes < 100 else "threshold"
        summary = jt.longtail.metrics.summary(metrics, state.counts, split=split)
        return {name: np.asarray(value).tolist() for name, value in summary.items()}


def fit(
    step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
    *,
    log_every: int = 10,
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> TrainState:
    """Run `step` for `steps` batches; the device is read only every log_every steps.

    Args:
      step: (state, batch) -> (state, metrics), jitted or compiled.
      log: called with the number of steps done and the means since the last call.
    """
    pending = []
    for i in range(steps):
        state, metrics = step(state, next(batches))
        pending.append(metrics)
        if len(pending) == log_every or i == steps - 1:
            rows = jax.device_get(pending)
            log(i + 1, {k: float(np.mean([r[k] for r in rows])) for k in rows[0]})
            pending = []
    return state


class RunDir:
    """A run directory that explains itself and is never overwritten."""

    def __init__(self, path: str, cfg: Any, command: str):
        self.path = pathlib.Path(path)
        if self.path.is_file():
            raise UserError(f"--out {path} is a file: give a directory to create")
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"--out {path} already holds a run: give another or remove it")
        self.path.mkdir(parents=True, exist_ok=True)
        about = {
            "command": command,
            "config": dataclasses.asdict(cfg),
            "jaxtricks": jt.__version__,
            "jax": jax.__version__,
            "devices": [str(d) for d in jax.devices()],
        }
        self.write("config.json", about)
        self._start = time.perf_counter()

    def write(self, name: str, value: Any) -> None:
        """A JSON file."""
        (self.path / name).write_text(json.dumps(finite(value), indent=1) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl, and one of timing.jsonl (times live only there)."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        elapsed = round(time.perf_counter() - self._start, 3)
        self._append("timing.jsonl", {"step": step, "seconds": elapsed})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(finite(row)) + "\n")


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
