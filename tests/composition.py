"""All ten tricks on one small network, in the reader's own step: `python -m tests.composition`.

Each is one line below, in the order in which they compose: model (weightstd, ebn, reparam), loss
(longtail), remat, gradients (amp), optimizer (agc, memopt, cyclical, amp), reads (echo). The command
trains every pair and writes the matrix of the README; tests/laws/test_composition.py asserts on the same
runs.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
from benchmarks import readme
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtricks import KEYS, _table
from jaxtricks.lab.models import ConvNorm

CLASSES, BATCH, STEPS = 4, 16, 12
COUNTS = np.array([40, 20, 10, 5])
RATE = 0.02


class Model(NamedTuple):
    """A network as functions of plain trees.

    Attributes:
      apply: (params, state, images, train=) -> (logits, state).
      params: nested dict.
      state: all other variables.
      roles: of the axes of the parameters.
    """

    apply: Callable[..., Any]
    params: Any
    state: Any
    roles: Any


class Run(NamedTuple):
    """Losses of a training, the trained variables, and what the optimizer reported last."""

    losses: np.ndarray
    params: Any
    state: Any
    metrics: dict[str, float]

    @property
    def ratio(self) -> float:
        """Mean loss of the last quarter over that of the first."""
        n = len(self.losses) // 4
        return float(np.mean(self.losses[-n:]) / np.mean(self.losses[:n]))


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise with a bright bar, whose place is the class; float32 [count, 8, 8, 2] and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, count, p=COUNTS / COUNTS.sum()).astype(np.int32)
    x = rng.normal(size=(count, 8, 8, 2)).astype(np.float32)
    x[np.arange(count), 2 * labels] += 2.0
    return {"image": x, "label": labels}


class Net(nnx.Module):
    """Two units and a linear head."""

    def __init__(self, on: frozenset[str], rngs: nnx.Rngs):
        conv = jt.nnx.WSConv if "weightstd" in on else nnx.Conv
        norm = jt.nnx.ExtendedBatchNorm if "ebn" in on else nnx.BatchNorm
        unit = jt.nnx.ACBlock if "reparam" in on else ConvNorm
        unit = functools.partial(unit, conv=conv, norm=norm, rngs=rngs)
        self.first, self.second = unit(2, 8, (3, 3)), unit(8, 8, (3, 3))
        self.head = nnx.Linear(8 * 8, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.head(x.mean(2).reshape(len(x), -1))


class LinenConvNorm(linen.Module):
    """Convolution, then normalization."""

    outputs: int
    kernel: Any
    conv: Any
    norm: Any

    @linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = self.conv(self.outputs, self.kernel, name="conv")(x)
        return self.norm(use_running_average=not train, name="norm")(x)


class LinenNet(linen.Module):
    """The same for linen."""

    on: frozenset[str]

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        for name in ("first", "second"):
            x = linen.relu(self._unit(name, x, train))
        return linen.Dense(CLASSES, name="head")(x.mean(2).reshape(len(x), -1))

    def _unit(self, name: str, x: Any, train: bool) -> Any:
        ws, ebn = "weightstd" in self.on, "ebn" in self.on
        norm = jt.linen.ExtendedBatchNorm if ebn else linen.BatchNorm
        if "reparam" in self.on:
            conv = jt.linen.WSConv if ws else functools.partial(linen.Conv, use_bias=False)
            block = jt.linen.ACBlock(8, (3, 3), conv=conv, norm=norm, name=name)
            return block(x, use_running_average=not train)
        conv = jt.linen.WSConv if ws else functools.partial(linen.Conv, use_bias=False)
        return LinenConvNorm(8, (3, 3), conv, norm, name=name)(x, train)


def nnx_model(on: frozenset[str]) -> Model:
    """The network in nnx, with the tricks that change it."""
    net = Net(on, nnx.Rngs(0))
    return Model(*jt.nnx.functional(net), jt.nnx.roles(net))


def linen_model(on: frozenset[str]) -> Model:
    """The network in linen."""
    net, x = LinenNet(on), jnp.zeros((1, 8, 8, 2))
    variables = net.init(jax.random.key(0), x)
    return Model(*jt.linen.functional(net, variables), jt.linen.roles(net, x))


MODELS = {"nnx": nnx_model, "linen": linen_model}


def optimizer(on: frozenset[str], roles: Any) -> optax.GradientTransformation:
    """The chain."""
    rate = jt.cyclical.cyclical(RATE / 4, RATE, 4) if "cyclical" in on else RATE
    links = [jt.agc.adaptive_grad_clip(0.1, roles=roles)] if "agc" in on else []
    own = jt.memopt.adafactor(
        rate, multiply_by_parameter_scale=False, min_dim_size_to_factor=4, roles=roles
    )
    tx = optax.chain(*links, own if "memopt" in on else optax.adam(rate))
    return jt.amp.dynamic_loss_scale(tx) if "amp" in on else tx


def batches(on: frozenset[str], factor: int = 2) -> list[dict[str, np.ndarray]]:
    """The batches of a run; echoed, half as many are read."""
    count = STEPS * BATCH
    data = images(count)
    examples: Any = [{name: x[i] for name, x in data.items()} for i in range(count)]
    if "echo" in on:
        examples = list(jt.echo.echo(examples[: count // factor], factor, batch_size=BATCH))
    stack = [examples[i : i + BATCH] for i in range(0, count, BATCH)]
    return [{name: np.stack([e[name] for e in batch]) for name in batch[0]} for batch in stack]


def train(keys: Any, *, form: str = "nnx", devices: int = 1, **changed: Any) -> Run:
    """Train with these tricks.

    Args:
      keys: of the tricks.
      form: "nnx" or "linen".
      devices: to split each batch over.
      changed: other `model`, `loss`, `tx`, `policy` or `data`, for settings that change nothing.
    """
    on = frozenset(keys)
    model = changed.get("model") or MODELS[form](on)
    tx = changed.get("tx") or optimizer(on, model.roles)
    of_counts = jt.longtail.logit_adjusted(COUNTS)
    loss = changed.get("loss") or (of_counts if "longtail" in on else jt.longtail.cross_entropy())

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        logits, state = model.apply(params, state, batch["image"], train=True)
        return loss(logits, batch["label"]).mean(), state

    # Recomputed as a whole: with a real network, block by block.
    fn = jt.remat.recompute_grad(loss_fn) if "remat" in on else loss_fn
    policy = changed.get("policy", "p=f32,c=bf16,o=f32" if "amp" in on else None)
    fn = fn if policy is None else jt.amp.autocast(fn, policy)

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any, batch: Any) -> Any:
        scale = jt.amp.loss_scale(opt_state) if "amp" in on else None
        grad_fn = jt.amp.value_and_grad(fn, scale=scale, has_aux=True)
        (value, state), grads = grad_fn(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    params, state = jax.device_put(model[1:3], NamedSharding(mesh, PartitionSpec()))
    opt_state, losses = tx.init(params), []
    for batch in changed.get("data") or batches(on):
        out = step(params, state, opt_state, jax.device_put(batch, split))
        params, state, opt_state, value = out
        losses.append(float(value))
    metrics = {name: float(x) for name, x in jt.metrics(opt_state).items()}
    return Run(np.array(losses), params, state, metrics)


def matrix(ratio: Callable[[frozenset[str]], float]) -> _table.Table:
    """One row and one column a trick: `ratio` of each pair, of each alone on the diagonal."""
    rows = [
        (
            a,
            *(f"{ratio(frozenset((a, b))):.2f}" if j <= i else "" for j, b in enumerate(KEYS)),
        )
        for i, a in enumerate(KEYS)
    ]
    return _table.make(("", *KEYS), rows)


def pairs() -> list[frozenset[str]]:
    """All 45."""
    return [frozenset(pair) for pair in itertools.combinations(KEYS, 2)]


def main() -> None:
    """Train every pair, and write the matrix into the README."""
    ratio = functools.cache(lambda on: train(on).ratio)
    everything, none = ratio(frozenset(KEYS)), ratio(frozenset())
    text = f"{matrix(ratio).markdown()}\n\nAll ten together: {everything:.2f}; none: {none:.2f}."
    readme.replace("composition", text)
    print(text)


if __name__ == "__main__":
    main()
