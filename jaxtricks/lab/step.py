"""One jitted, donated, sharding-ready step, and the loop around it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

import jaxtricks as jt
from jaxtricks import _tree
from jaxtricks._typing import Array, Key
from jaxtricks.lab import compose as compose_lib
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.config import Train
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.examples import examples_of
from jaxtricks.remat import _memory


@_tree.node
class TrainState:
    """Everything that a step changes or needs, so that one executable serves every seed.

    Attributes:
      params: nested dict of arrays.
      model_state: statistics and RNG counts of the model.
      opt_state: of the optax chain.
      step: int32 [], calls of the step so far (micro-batches).
      key: PRNG key of the run; call i uses fold_in(key, i).
      counts: training examples of each class, float32 [C].
    """

    params: Any
    model_state: Any
    opt_state: Any
    step: Array
    key: Key
    counts: jax.Array


class Program(NamedTuple):
    """A composed model: what it takes to train and evaluate it.

    Attributes:
      init: (seed, counts) -> TrainState.
      step: (state, batch, rate=None) -> (state, metrics); not jitted. A rate multiplies the updates.
      loss: (params, model_state, inputs, labels, counts) -> (loss, (model_state, accuracy)), in the
        precision of the run; what the step differentiates.
      inputs: (state, batch) -> the arguments that the step gives the loss.
      step_of: the step with another loss of the same arguments and results.
      averaged: state -> the parameters to evaluate.
      predict: (params, model_state, batch) -> (logits float32, labels); not jitted.
      place: the mesh, and where batches lie.
      shapes: of the TrainState, in place.
    """

    init: Callable[[int, np.ndarray], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    loss: Callable[..., Any]
    inputs: Callable[[TrainState, Any], tuple[Any, ...]]
    step_of: Callable[[Callable[..., Any]], Callable[..., tuple[TrainState, dict[str, Array]]]]
    averaged: Callable[[TrainState], Any]
    predict: Callable[[Any, Any, Any], tuple[Array, Array]]
    place: Placement
    shapes: TrainState

    @property
    def shardings(self) -> TrainState:
        """NamedShardings of the TrainState."""
        return jax.tree.map(lambda x: x.sharding, self.shapes)

    def start(self, seed: int, counts: np.ndarray) -> TrainState:
        """`init`, in place; on several devices no one of them ever holds it whole."""
        if self.place.mesh.size == 1:
            return jax.device_put(self.init(seed, counts), self.shardings)
        init = functools.partial(self.init, seed, counts)
        return jax.jit(init, out_shardings=self.shardings)()


def build(
    cfg: Train,
    data: data_lib.Data,
    rate: float | None = None,
    place: Placement | None = None,
) -> Program:
    """Compose model, loss and optimizer for a run.

    Args:
      cfg: the settings.
      data: what the model is for.
      rate: a constant learning rate in place of the schedule.
      place: where its arrays lie; None is as the settings say, on the devices at hand.
    """

    def init_model(key: Key) -> nnx.Module:
        return compose_lib.build_model(cfg, data.shape[-1], len(data.classes), key)

    # Shapes only: initializers run in `init` alone.
    model = nnx.eval_shape(init_model, jax.random.key(0))
    apply, shapes, _ = jt.nnx.functional(model)
    roles = jt.nnx.roles(model)
    tx = compose_lib.build_optimizer(cfg, roles, rate)
    place = place or Placement.of(cfg.parallel)
    place.check(cfg.micro_batch)
    stored, used = place.stored(shapes, roles), place.used(shapes, roles)
    constrained = jax.lax.with_sharding_constraint if place.mesh.size > 1 else lambda x, _: x
    examples = examples_of(data)

    # Not jitted: the arrangements of an ablation share the compiled initializers.
    def init(seed: int, counts: np.ndarray) -> TrainState:
        key = jax.random.key(seed)
        _, params, model_state = jt.nnx.functional(init_model(key))
        return TrainState(
            params,
            model_state,
            tx.init(params),
            jnp.int32(0),
            key,
            jnp.asarray(counts, jnp.float32),
        )

    def loss_fn(params: Any, model_state: Any, inputs: Array, labels: Array, counts: Array) -> Any:
        # Under fsdp each parameter is gathered here, and its gradient is summed and split on the way back.
        params = constrained(params, used)
        logits, model_state = apply(params, model_state, inputs, train=True)
        logits = constrained(logits, place.batch)
        loss = compose_lib.build_loss(cfg, counts)(logits, labels)
        correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return loss.mean(), (model_state, correct.mean())

    def inputs(state: TrainState, batch: Any) -> tuple[Any, ...]:
        key = jax.random.fold_in(state.key, state.step)
        return state.params, state.model_state, *examples(batch, key), state.counts

    def step_of(loss: Callable[..., Any]) -> Callable[..., Any]:
        def step(
            state: TrainState, batch: Any, rate: Any = None
        ) -> tuple[TrainState, dict[str, Array]]:
            grad_fn = compose_lib.differentiate(cfg, loss, state.opt_state)
            (value, (model_state, accuracy)), grads = grad_fn(*inputs(state, batch))
            grads = constrained(grads, stored)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            if rate is not None:
                updates = optax.tree.scale(rate, updates)
            params = optax.apply_updates(state.params, updates)
            model_state = compose_lib.kept(
                cfg, state.opt_state, opt_state, state.model_state, model_state
            )
            new = TrainState(
                params, model_state, opt_state, state.step + 1, state.key, state.counts
            )
            return new, {"loss": value, "accuracy": accuracy, **jt.metrics(opt_state)}

        return step

    def evaluated(state: TrainState) -> Any:
        return compose_lib.averaged(cfg, state.params, state.opt_state)

    def predict(params: Any, model_state: Any, batch: Any) -> tuple[Array, Array]:
        # In float32 whatever the training used: evaluation is what is compared.
        inputs, labels = examples(batch, None)
        params = constrained(params, used)
        return apply(params, model_state, inputs, train=False)[0], labels

    loss = compose_lib.cast(cfg, loss_fn)
    return Program(
        init=init,
        step=step_of(loss),
        loss=loss,
        inputs=inputs,
        step_of=step_of,
        averaged=evaluated,
        predict=predict,
        place=place,
        shapes=placed(jax.eval_shape(functools.partial(init, 0, data.counts)), tx, stored, place),
    )


def placed(
    state: TrainState, tx: optax.GradientTransformation, stored: Any, place: Placement
) -> TrainState:
    """The shapes of a state where it lies: optimizer state like the parameters, the rest everywhere.

    Args:
      state: shapes.
      tx: its optimizer.
      stored: NamedShardings of the parameters.
      place: the mesh.
    """
    specs = jt.memopt.state_specs(tx, state.params, stored)
    opt_state = jax.tree.map(lambda spec: NamedSharding(place.mesh, spec), specs)
    rest = state.model_state, (state.step, state.key, state.counts)
    model_state, last = jax.tree.map(lambda _: place.everywhere, rest)
    shardings = jax.tree.leaves((stored, model_state, opt_state, last))
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(_memory.shape, leaves, shardings))


def batch_shapes(cfg: Train, data: data_lib.Data, place: Placement) -> dict[str, Any]:
    """Shapes of a micro-batch, in place."""
    shape = cfg.micro_batch, *data.shape
    if data.kind == "text":
        return {"text": jax.ShapeDtypeStruct(shape, np.int32, sharding=place.batch)}
    label = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=place.batch)
    return {"image": jax.ShapeDtypeStruct(shape, np.uint8, sharding=place.batch), "label": label}


def example_batch(cfg: Train, data: data_lib.Data, place: Placement) -> Any:
    """A micro-batch of zeros, in place."""
    shapes = batch_shapes(cfg, data, place)
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)


class Compiled(NamedTuple):
    """A step ready to run.

    Attributes:
      step: (state, batch) -> (state, metrics); it donates its state.
      temp_bytes: temporaries of the executable.
    """

    step: Callable[..., Any]
    temp_bytes: int


def jitted(program: Program, step: Callable[..., Any]) -> Any:
    """A step of the program, jitted; it donates its state and leaves it where it lies."""
    out = program.shardings, program.place.everywhere
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def compile_step(program: Program, state: TrainState, batch: Any) -> Compiled:
    """Compile the step for arguments like these."""
    traced = jitted(program, program.step).trace(state, batch)
    step = traced.lower().compile()
    return Compiled(step, _memory.report(step, traced.jaxpr).temp)


class Meter:
    """Means over a window of steps; the device is read once a window, or when a checkpoint asks.

    Args:
      rows: the window so far, of an earlier `rows()`.
    """

    def __init__(self, rows: Iterable[dict[str, float]] = ()):
        self._rows: list[dict[str, Any]] = list(rows)

    def add(self, metrics: dict[str, Array]) -> None:
        """Another step's metrics, still on the device."""
        self._rows.append(metrics)

    def rows(self) -> list[dict[str, float]]:
        """The window so far as Python numbers."""
        rows = jax.device_get(self._rows)
        # float64 from here on: a mean must not depend on whether a checkpoint cut the window in two.
        self._rows = [{name: float(value) for name, value in row.items()} for row in rows]
        return list(self._rows)

    def mean(self) -> dict[str, float]:
        """The means, and an empty window."""
        rows, self._rows = self.rows(), []
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def fit(
    step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
    *,
    start: int = 0,
    accumulate: int = 1,
    log_every: int = 10,
    meter: Meter | None = None,
    after: Callable[[int, TrainState, dict[str, float] | None], bool] = lambda *_: False,
) -> TrainState:
    """Run steps start + 1 ... steps; the device is read only every log_every steps.

    Args:
      step: (state, batch) -> (state, metrics), jitted or compiled.
      state: after `start` steps; donated.
      batches: of one micro-batch each.
      steps: the number of the last step.
      start: steps done before.
      accumulate: micro-batches a step.
      log_every: steps a window.
      meter: the window that an interrupted run left behind.
      after: called after every step with its number, the state, and the means since the last window at
        the window's end, else None; True stops.
    """
    meter = meter or Meter()
    for done in range(start + 1, steps + 1):
        for _ in range(accumulate):
            state, metrics = step(state, next(batches))
            meter.add(metrics)
        ends = done % log_every == 0 or done == steps
        if after(done, state, meter.mean() if ends else None):
            break
    return state
