"""From a batch on the device to what the model takes: (inputs, labels), augmented in training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

import jaxtricks as jt
from jaxtricks import _tree, remat
from jaxtricks._typing import Array, Key
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import models
from jaxtricks.lab.config import Plan, Train, Tricks, UserError
from jaxtricks.lab.distributed import Placement
from jaxtricks.remat import _memory
from jaxtricks.remat._planner import Wrt

Examples = Callable[[Any, Key | None], tuple[Array, Array]]
"""(batch, key) -> (inputs, labels); augmented if there is a key."""


def examples_of(data: data_lib.Data) -> Examples:
    """How batches of this data set become inputs and labels."""
    return text_examples if data.kind == "text" else image_examples(data)


def text_examples(batch: Any, key: Key | None) -> tuple[Array, Array]:
    """{"text" [N, T + 1]} -> (characters [N, T], the next ones [N, T])."""
    return batch["text"][:, :-1], batch["text"][:, 1:]


def image_examples(data: data_lib.Data) -> Examples:
    """({"image" uint8, "label"}, key) -> (float images in [-1, 1], labels); augmented if there is a key."""
    pad = max(1, data.shape[0] // 8)

    def examples(batch: Any, key: Key | None) -> tuple[Array, Array]:
        images = batch["image"]
        if key is not None:
            images = augment(key, images, pad=pad, flip=data.flip)
        return to_float(images), batch["label"]

    return examples


def to_float(images: Array) -> Array:
    """uint8 [0, 255] -> float32 [-1, 1]; float64 where jax has it on."""
    return jnp.asarray(images).astype(float) / 127.5 - 1


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


# --------------------------------------------------------------------------------------------------
# The one place that knows all ten tricks: a line each, in the order in which they compose.
#
# model (weightstd, ebn, reparam, remat) -> loss (longtail) -> gradients (amp) -> optimizer (agc, memopt,
# cyclical, amp) -> reads (longtail, echo).
# --------------------------------------------------------------------------------------------------


BFLOAT16 = "p=f32,c=bf16,o=f32"

# What each trick is for, said where an ablation finds no gain in accuracy.
PURPOSE = {
    "echo": "it pays where reading is slower than the step",
    "amp": "it pays on accelerators; on CPU a bfloat16 product is slower than a float32 one",
    "memopt": "it pays in optimizer memory",
    "weightstd": "it pays without batch statistics or with tiny batches",
    "agc": "it pays with large batches and rates",
    "remat": "it pays in activation memory, with the same function",
    "ebn": "it pays with tiny batches",
    "cyclical": "it pays in the search for a rate",
    "reparam": "its branches fuse into one convolution after training",
    "longtail": "it pays where classes are imbalanced",
}


def build_model(cfg: Train, inputs: int, num_classes: int, key: Key) -> nnx.Module:
    """The network with the tricks that change it.

    Args:
      cfg: the settings.
      inputs: channels of the images; the transformer needs none, its inputs are classes.
      num_classes: outputs: classes of the images, or characters.
      key: of the initial weights.
    """
    # remat: keep only each block's input for the backward pass; with a budget the whole loss is planned.
    recompute = cfg.tricks.remat and not cfg.remat_budget
    common: dict[str, Any] = {"recompute": recompute, "rngs": nnx.Rngs(key)}
    if cfg.model == "transformer":
        return models.Transformer(num_classes, **dataclasses.asdict(cfg.text), **common)
    common |= {"widths": cfg.widths, "blocks": cfg.blocks}
    conv, norm = _parts(cfg.tricks)
    if cfg.model == "nfnet":
        return models.NFNet(inputs, num_classes, **common)
    if cfg.model == "repvgg":
        block = functools.partial(jt.nnx.RepVGGBlock, conv=conv, norm=norm)
        return models.RepVGG(inputs, num_classes, block=block, **common)
    unit = pointwise = functools.partial(models.ConvNorm, conv=conv, norm=norm)
    # reparam: 3x3 + 3x1 + 1x3 branches in training; one 3x3 convolution after `fuse`.
    if cfg.tricks.reparam:
        unit = functools.partial(jt.nnx.ACBlock, conv=conv, norm=norm)
    return models.ResNet(inputs, num_classes, unit=unit, pointwise=pointwise, **common)


def _parts(on: Tricks) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(convolution, normalization) of the networks that have both."""
    # ebn: one variance for the whole layer instead of one a channel.
    norm = jt.nnx.ExtendedBatchNorm if on.ebn else nnx.BatchNorm
    norm = functools.partial(norm, momentum=0.9)  # runs here are too short for 0.99
    # weightstd: kernels standardized per output channel before every use.
    conv = functools.partial(jt.nnx.WSConv, use_gain=True) if on.weightstd else nnx.Conv
    return conv, norm


def build_optimizer(
    cfg: Train, roles: Any, rate: Callable[[Any], Any] | float | None = None
) -> optax.GradientTransformation:
    """The optimizer chain.

    Args:
      cfg: the settings.
      roles: of the model's own layers (`jt.nnx.roles`).
      rate: learning rate or schedule; None is `build_schedule`.
    """
    on, links = cfg.tricks, []
    rate = build_schedule(cfg) if rate is None else rate
    # agc: first in the chain, on raw gradients; the classifier's kernel is left alone.
    if on.agc:
        where = jt.agc.exclude("head/kernel")
        links.append(jt.agc.adaptive_grad_clip(0.02, axes=roles, where=where))
    # memopt: row and column moments instead of two full buffers; the rate stays absolute.
    if on.memopt:
        links.append(
            jt.memopt.adafactor(
                rate,
                multiply_by_parameter_scale=False,
                min_dim_size_to_factor=16,
                axes=roles,
                weight_decay=cfg.weight_decay,
                weight_decay_mask=kernels,
            )
        )
    else:
        links.append(optax.adamw(rate, weight_decay=cfg.weight_decay, mask=kernels))
    if cfg.ema:
        links.append(averaging(cfg.ema))
    tx = optax.chain(*links)
    if cfg.accumulate > 1:
        tx = optax.MultiSteps(tx, cfg.accumulate).gradient_transformation()
    # amp: outermost, so that clipping, moments and accumulation see unscaled gradients.
    return jt.amp.dynamic_loss_scale(tx) if on.amp else tx


def averaging(decay: float) -> optax.GradientTransformation:
    """`optax.ema` of the parameters after each update; the updates pass as they are.

    As the last link of the chain it also counts right inside MultiSteps and under skipped steps.
    """
    ema = optax.ema(decay)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, ema.update(optax.apply_updates(params, updates), state)[1]

    return optax.GradientTransformation(ema.init, update)


def averaged(cfg: Train, params: Any, opt_state: Any) -> Any:
    """The parameters to evaluate: their bias-corrected moving average if `ema` is on."""
    if not cfg.ema:
        return params
    state = next(filter(_is_ema, jax.tree.leaves(opt_state, is_leaf=_is_ema)))
    corrected = optax.tree.bias_correction(state.ema, cfg.ema, state.count)
    # Nothing is averaged before the first update.
    return jax.tree.map(lambda new, old: jnp.where(state.count > 0, new, old), corrected, params)


def _is_ema(x: Any) -> bool:
    return isinstance(x, optax.EmaState)


def build_schedule(cfg: Train) -> Callable[[Any], Any]:
    """Learning rate by step."""
    peak, steps = cfg.learning_rate, cfg.steps
    # cyclical: two triangles from a tenth of the peak, ending low; else warm-up and cosine.
    if cfg.tricks.cyclical:
        return jt.cyclical.cyclical(peak / 10, peak, max(1, steps // 4))
    # (a run of one step ends in its warm-up)
    return optax.warmup_cosine_decay_schedule(peak / 10, peak, max(1, steps // 10), max(2, steps))


def build_loss(cfg: Train, counts: Array) -> Callable[..., Array]:
    """loss(logits [..., C], labels [...]) -> [...]; counts [C] may be traced."""
    # longtail: the class prior goes into the logits in training, and nowhere at test time.
    loss = (
        jt.longtail.logit_adjusted(counts) if cfg.tricks.longtail else jt.longtail.cross_entropy()
    )
    if not cfg.label_smoothing:
        return loss

    def smoothed(logits: Array, labels: Array) -> Array:
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        return loss(logits, optax.smooth_labels(one_hot, cfg.label_smoothing))

    return smoothed


def cast(cfg: Train, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss in the precision that it trains in."""
    # amp: products in bfloat16.
    return jt.amp.autocast(loss_fn, BFLOAT16) if cfg.tricks.amp else loss_fn


def differentiate(cfg: Train, loss_fn: Callable[..., Any], opt_state: Any) -> Callable[..., Any]:
    """(params, *args) -> ((loss, aux), gradients as the optimizer wants them)."""
    if not cfg.tricks.amp:
        return jax.value_and_grad(loss_fn, has_aux=True)
    # amp: gradients leave multiplied by the scale that the optimizer divides by.
    return jt.amp.value_and_grad(loss_fn, scale=jt.amp.loss_scale(opt_state), has_aux=True)


def kept(cfg: Train, before: Any, after: Any, old: Any, new: Any) -> Any:
    """The model's state after a step.

    Args:
      cfg: the settings.
      before, after: optimizer states around the step.
      old, new: the model's statistics and RNG counts.
    """
    # amp: a skipped step leaves statistics of its batch behind no more than it does parameters.
    return jt.amp.select_tree(jt.amp.applied(before, after), new, old) if cfg.tricks.amp else new


def build_reads(cfg: Train, batch: int) -> Callable[[Any], Any]:
    """IterDataset -> IterDataset between reading and batching; a step takes `batch` examples here."""
    # echo: each image read goes out echo_factor times, whole batches apart, augmented anew on device.
    if cfg.tricks.echo:
        return lambda ds: jt.echo.echo(ds, cfg.echo_factor, batch_size=batch, seed=cfg.seed)
    return lambda ds: ds


def build_order(cfg: Train, data: data_lib.Data) -> Callable[[int], int] | None:
    """Position in the stream of examples read -> index; None is shuffled epochs."""
    if cfg.sampling == "instance":
        return None
    # longtail: classes by the root of their counts, or evenly; progressive goes from the data to evenly.
    sampling = jt.longtail.sampling
    powers = {"square-root": 0.5, "balanced": 0.0, "progressive": 1.0}
    probabilities = np.asarray(sampling.class_probabilities(data.counts, powers[cfg.sampling]))
    if cfg.sampling != "progressive":
        return data_lib.drawn(data.train.labels, probabilities, cfg.seed)
    even = np.asarray(sampling.class_probabilities(data.counts, 0.0))
    uses = cfg.echo_factor if cfg.tricks.echo and cfg.echo_factor != "auto" else 1
    reads = max(1, round(cfg.steps * cfg.batch / uses))
    return data_lib.drawn(data.train.labels, probabilities, cfg.seed, after=even, over=reads)


def function_key(tricks: Tricks) -> tuple[bool, ...]:
    """Equal for tricks whose models compute the same function of the same parameters."""
    return (tricks.weightstd, tricks.ebn, tricks.reparam)


def kernels(params: Any) -> Any:
    """Mask of the parameters that weight decay applies to."""
    return _tree.map_with_path(lambda path, p: jt.roles.is_kernel(path, p.shape), params)


# --------------------------------------------------------------------------------------------------
# One jitted, donated, sharding-ready step, and the loop around it.
# --------------------------------------------------------------------------------------------------


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
        return build_model(cfg, data.shape[-1], len(data.classes), key)

    # Shapes only: initializers run in `init` alone.
    model = nnx.eval_shape(init_model, jax.random.key(0))
    apply, shapes, _ = jt.nnx.functional(model)
    roles = jt.nnx.roles(model)
    tx = build_optimizer(cfg, roles, rate)
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
        loss = build_loss(cfg, counts)(logits, labels)
        correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return loss.mean(), (model_state, correct.mean())

    def inputs(state: TrainState, batch: Any) -> tuple[Any, ...]:
        key = jax.random.fold_in(state.key, state.step)
        return state.params, state.model_state, *examples(batch, key), state.counts

    def step_of(loss: Callable[..., Any]) -> Callable[..., Any]:
        def step(
            state: TrainState, batch: Any, rate: Any = None
        ) -> tuple[TrainState, dict[str, Array]]:
            grad_fn = differentiate(cfg, loss, state.opt_state)
            (value, (model_state, accuracy)), grads = grad_fn(*inputs(state, batch))
            grads = constrained(grads, stored)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            if rate is not None:
                updates = optax.tree.scale(rate, updates)
            params = optax.apply_updates(state.params, updates)
            model_state = kept(cfg, state.opt_state, opt_state, state.model_state, model_state)
            new = TrainState(
                params, model_state, opt_state, state.step + 1, state.key, state.counts
            )
            return new, {"loss": value, "accuracy": accuracy, **jt.metrics(opt_state)}

        return step

    def evaluated(state: TrainState) -> Any:
        return averaged(cfg, state.params, state.opt_state)

    def predict(params: Any, model_state: Any, batch: Any) -> tuple[Array, Array]:
        # In float32 whatever the training used: evaluation is what is compared.
        inputs, labels = examples(batch, None)
        params = constrained(params, used)
        return apply(params, model_state, inputs, train=False)[0], labels

    loss = cast(cfg, loss_fn)
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


# --------------------------------------------------------------------------------------------------
# The plan of a run with a budget: what its training step recomputes.
# --------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a run trains.

    Attributes:
      program: its functions, the step within the budget if there is one.
      plan: the plan of the step; None without a budget.
    """

    program: Program
    plan: remat.Plan | None


def prepare(cfg: Train, data: data_lib.Data, rate: float | None = None) -> Prepared:
    """`step_lib.build`, planned if the settings have a budget; the same settings give the same plan.

    Raises:
      UserError: the budget can't be met.
    """
    program = build(cfg, data, rate)
    if not cfg.remat_budget:
        return Prepared(program, None)
    found = plan(cfg, data, program)
    return Prepared(program._replace(step=program.step_of(found.fn)), found)


def plan(
    cfg: Train,
    data: data_lib.Data,
    program: Program,
    *,
    wrt: Wrt = "peak",
    max_compiles: int = 6,
    topology: str | None = None,
) -> remat.Plan:
    """The loss of a run's step, planned within that step: jitted, donated, on its devices.

    Args:
      cfg: the settings; their budget is met.
      data: what the program was built for.
      program: of the settings.
      wrt, max_compiles, topology: of `remat.plan`.

    Raises:
      UserError: the budget can't be met or read, or the topology is unknown.
    """
    state, batch = program.shapes, batch_shapes(cfg, data, program.place)
    if topology is not None:  # its chip is not one of those at hand
        state, batch = jax.tree.map(_memory.shape, (state, batch))

    def within(loss: Any) -> tuple[Any, Any]:
        step = program.step_of(loss)
        compiled = jitted(program, step) if topology is None else jax.jit(step, donate_argnums=0)
        return compiled, (state, batch)

    try:
        return remat.plan(
            program.loss,
            *jax.eval_shape(program.inputs, state, batch),
            budget_bytes=_budget(cfg.remat_budget or ""),
            has_aux=True,
            within=within,
            wrt=wrt,
            max_compiles=max_compiles,
            topology=topology,
        )
    except ValueError as error:
        flag = "--budget" if isinstance(cfg, Plan) else "--remat-budget"
        raise UserError(str(error).replace("budget_bytes", flag)) from error


def figures(found: remat.Plan) -> dict[str, Any]:
    """What result.json says of a plan."""
    return {
        "peak_bytes": found.peak,
        "unplanned_peak_bytes": found.baseline,
        "budget_bytes": found.budget,
        "extra_flops": found.extra_flops,
    }


def _budget(text: str) -> str | float:
    """The budget as the planner takes it: a number with a point, up to 1, is a fraction."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if "." in text and value <= 1 else text
