"""What `training` and `rounding` share: the task, one compiled step per arm, and the results file."""

import json
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
from jaxtricks.lab.data.text import topics
from jaxtricks.lab.models.transformer import Transformer
from jaxtricks.lab.rundir import hardware, versions

RESULTS = pathlib.Path(__file__).parent / "results" / "memopt_training.json"
CONTEXT, FEATURES, LAYERS, HEADS = 64, 256, 1, 4
WARMUP = 0.1  # share of the steps
TAIL = 0.1  # share of the steps whose mean is the final training loss
POINTS = 60  # of a curve
Batches = Callable[[int, int], np.ndarray]


class Task(NamedTuple):
    """The model and the text.

    Attributes:
      init: seed -> parameters in float32.
      loss: (params, windows int [N, CONTEXT + 1]) -> nats per character, computed in the dtype of the
        parameters up to the logits.
      roles: of the parameters' axes.
      train, validation: characters as codes; validation is the last tenth.
    """

    init: Callable[[int], Any]
    loss: Callable[[Any, Any], Any]
    roles: Any
    train: np.ndarray
    validation: np.ndarray


def in_float32(
    loss: Callable[..., Any], state: Any, **options: Any
) -> Callable[..., Any]:
    """Loss and gradients, computed in float32 whatever the parameters are stored in."""
    del state
    return jax.value_and_grad(
        lambda params, *rest: loss(_wide(params), *rest), **options
    )


class Arm(NamedTuple):
    """A way to train.

    Attributes:
      name: for the table.
      tx: rate -> optimizer; its state does not depend on the rate.
      dtype: the parameters'.
      differentiate: (loss, optimizer state) -> (params, windows) -> (loss, grads).
      start: initial parameters -> those to start from.
    """

    name: str
    tx: Callable[[Any], optax.GradientTransformation]
    dtype: Any = jnp.float32
    differentiate: Callable[..., Any] = in_float32
    start: Callable[[Any], Any] = lambda params: params


class Run(NamedTuple):
    """One finished run.

    Attributes:
      losses: the training loss of every step.
      validation: the final validation loss.
      metrics: what the optimizer reports at the end.
    """

    losses: np.ndarray
    validation: float
    metrics: dict[str, float]


def characters() -> tuple[np.ndarray, int]:
    """Python's help topics as codes int32 [N], and how many characters differ."""
    text = np.frombuffer(topics().encode("utf-32-le"), np.uint32)
    points, codes = np.unique(text, return_inverse=True)
    return codes.astype(np.int32), len(points)


def make_task(**sizes: int) -> Task:
    """The lab's transformer on Python's help topics, by character.

    Args:
      sizes: in place of those of `model_settings`.
    """
    codes, vocabulary = characters()
    cut = len(codes) * 9 // 10

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return Transformer(vocabulary, **model_settings() | sizes, rngs=rngs)

    model = build(nnx.Rngs(0))
    apply, _, state = jt.nnx.functional(model)

    def loss(params: Any, windows: Any) -> Any:
        logits, _ = apply(params, state, windows[:, :-1], train=True)
        logits, labels = logits.astype(jnp.float32), windows[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean()

    def init(seed: int) -> Any:
        return jt.nnx.functional(build(nnx.Rngs(seed)))[1]

    return Task(init, loss, jt.nnx.roles(model), codes[:cut], codes[cut:])


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / (steps - warmup))))


def batches(codes: np.ndarray, batch: int) -> Batches:
    """(seed, step) -> windows [batch, CONTEXT + 1]: the same for every arm."""

    def at(seed: int, step: int) -> np.ndarray:
        starts = np.random.default_rng((seed, step)).integers(
            len(codes) - CONTEXT, size=batch
        )
        return codes[starts[:, None] + np.arange(CONTEXT + 1)]

    return at


def trainer(
    task: Task, arm: Arm, *, steps: int, batch: int
) -> Callable[[int, float], Run]:
    """(seed, peak rate) -> Run; seed and rate are data, so one compiled step serves every run."""
    draw = batches(task.train, batch)
    stop = (len(task.validation) - 1) // CONTEXT
    held = task.validation[
        np.arange(stop)[:, None] * CONTEXT + np.arange(CONTEXT + 1)
    ]

    @jax.jit
    def step(params: Any, state: Any, windows: Any, rate: Any) -> Any:
        loss, grads = arm.differentiate(task.loss, state)(params, windows)
        updates, state = arm.tx(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(
        lambda params, windows: task.loss(_wide(params), windows)
    )

    def run(seed: int, rate: float) -> Run:
        start = time.perf_counter()
        params = jax.tree.map(
            lambda p: p.astype(arm.dtype), arm.start(task.init(seed))
        )
        state, losses = arm.tx(0.0).init(params), []
        for i in range(steps):
            now = np.float32(rate * schedule(i, steps))
            params, state, loss = step(params, state, draw(seed, i), now)
            losses.append(loss)
        found = [float(evaluate(params, w)) for w in np.array_split(held, 8)]
        weights = [len(w) for w in np.array_split(held, 8)]
        metrics = {name: float(x) for name, x in jt.metrics(state).items()}
        held_loss = float(np.average(found, weights=weights))
        done = Run(np.asarray(losses, np.float64), held_loss, metrics)
        took = time.perf_counter() - start
        print(
            f"{arm.name}, rate {rate:g}, seed {seed}: {tail(done):.4f} training, "
            f"{done.validation:.4f} validation, {took:.0f} s",
            flush=True,
        )
        return done

    return run


def tail(run: Run) -> float:
    """The final training loss: the mean over the last steps, on the same batches for every arm."""
    return float(run.losses[-max(1, round(TAIL * len(run.losses))) :].mean())


def summary(runs: list[Run]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, and the mean curve."""
    train, held = [tail(r) for r in runs], [r.validation for r in runs]
    curve = np.mean([r.losses for r in runs], axis=0)
    chunks = np.array_split(np.arange(len(curve)), min(POINTS, len(curve)))
    return {
        "n": len(runs),
        "train": {
            "mean": float(np.mean(train)),
            "std": float(np.std(train, ddof=1)),
        },
        "validation": {
            "mean": float(np.mean(held)),
            "std": float(np.std(held, ddof=1)),
        },
        "curve": {
            "step": [float(c.mean()) + 1 for c in chunks],
            "loss": [round(float(curve[c].mean()), 4) for c in chunks],
        },
    }


def about(command: str) -> dict[str, Any]:
    """Command, versions and hardware."""
    return {"command": command, "versions": versions(), "hardware": hardware()}


def load(section: str) -> dict[str, Any]:
    """One section of the results file."""
    return json.loads(RESULTS.read_text())[section]


def save(section: str, found: dict[str, Any]) -> None:
    """Write one section of the results file and leave the others."""
    RESULTS.parent.mkdir(exist_ok=True)
    sections = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(
        json.dumps({**sections, section: found}, indent=1) + "\n"
    )


def spread(figure: dict[str, float]) -> str:
    """Mean +- standard deviation as text."""
    return f"{figure['mean']:.4f} +- {figure['std']:.4f}"


def model_settings() -> dict[str, int]:
    """The size of the model."""
    return {
        "context": CONTEXT,
        "features": FEATURES,
        "layers": LAYERS,
        "heads": HEADS,
    }


def _wide(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)
