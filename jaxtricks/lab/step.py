"""Compose model, loss and optimizer into one jitted, donated, sharding-ready training step.

This is the one place that knows all ten tricks: a line each, in the order in which they
compose. model (weightstd, ebn, reparam, remat) -> loss (longtail) -> gradients (amp) ->
optimizer (agc, memopt, cyclical, amp) -> reads (longtail, echo).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

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
from jaxtricks.lab.config import Plan, Train, Tricks, UserError, budget
from jaxtricks.lab.distributed import Placement
from jaxtricks.remat import _memory

BFLOAT16 = "p=f32,c=bf16,o=f32"
_CYCLES = 2  # of the cyclical schedule in a run
_EXAMPLES = 2, 3  # the arguments of the loss that begin with the batch

# What each trick is for: printed where an ablation finds no gain in accuracy.
PURPOSE = {
    "echo": "it pays where reading is slower than the step",
    "amp": "it pays on accelerators; on CPU a step in bfloat16 is slower than in float32",
    "memopt": "it pays in optimizer memory",
    "weightstd": "it pays without batch statistics or with tiny batches",
    "agc": "it pays with large batches and rates",
    "remat": "it pays in activation memory, with the same function",
    "ebn": "it pays with tiny batches",
    "cyclical": "it pays in the search for a rate",
    "reparam": "its branches fuse into one convolution after training",
    "longtail": "it pays where classes are imbalanced",
}


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


class TrainStep:
    """The training step of a run, with the functions that initialize, evaluate and compile it.

    Args:
      cfg: the settings.
      data: what the model is for.
      rate: a constant learning rate in place of the schedule.
      placement: where arrays lie; None is as the settings say, on the devices at hand.

    Attributes:
      loss: (params, model_state, inputs, labels, counts) -> (loss, (model_state,
        accuracy)), in the precision of the run; what the step differentiates.
      placement: the mesh.
      shapes: of the TrainState, with its shardings.
    """

    def __init__(
        self,
        cfg: Train,
        data: data_lib.Data,
        rate: float | None = None,
        placement: Placement | None = None,
    ):
        self.placement = placement or Placement.of(cfg.parallel)
        self.placement.check(cfg.micro_batch)
        self._cfg, self._data, self._rate = cfg, data, rate
        self._examples = examples_of(data)
        # Shapes only: initializers run in `init` alone.
        model = nnx.eval_shape(self._model, jax.random.key(0))
        self._apply, params, _ = jt.nnx.functional(model)
        roles = jt.nnx.roles(model)
        classifiers = models.declared_paths(model, "unsplit")
        self._tx = build_optimizer(cfg, roles, rate, classifiers=classifiers)
        split_axes = models.split_axes(model, roles)
        # Between steps, and while a step computes with them.
        fsdp = self.placement.fsdp
        self._stored = self.placement.parameters(params, split_axes, fsdp=fsdp)
        self._used = self.placement.parameters(params, split_axes, fsdp=False)
        # amp: products in bfloat16.
        self.loss = (
            jt.amp.autocast(self._loss, BFLOAT16)
            if cfg.tricks.amp
            else self._loss
        )
        self.shapes = self._placed_shapes()

    @property
    def shardings(self) -> TrainState:
        """NamedShardings of the TrainState."""
        return jax.tree.map(lambda x: x.sharding, self.shapes)

    def init(self, seed: int, counts: np.ndarray) -> TrainState:
        """Return the state before the first step, where jax puts it.

        Not jitted: the arrangements of an ablation share the compiled initializers.
        """
        key = jax.random.key(seed)
        _, params, model_state = jt.nnx.functional(self._model(key))
        return TrainState(
            params,
            model_state,
            self._tx.init(params),
            jnp.int32(0),
            key,
            jnp.asarray(counts, jnp.float32),
        )

    def start(self, seed: int, counts: np.ndarray) -> TrainState:
        """Return `init`, sharded; of several devices none ever holds it whole."""
        if self.placement.mesh.size == 1:
            return jax.device_put(self.init(seed, counts), self.shardings)
        init = functools.partial(self.init, seed, counts)
        return jax.jit(init, out_shardings=self.shardings)()

    def step(
        self, state: TrainState, batch: Any, rate: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        """Return (state, metrics) after one micro-batch; not jitted. A rate multiplies the updates."""
        grad_fn = self._differentiated(state.opt_state)
        (value, (model_state, accuracy)), grads = grad_fn(
            *self.inputs(state, batch)
        )
        grads = self._constrained(grads, self._stored)
        updates, opt_state = self._tx.update(
            grads, state.opt_state, state.params
        )
        if rate is not None:
            updates = optax.tree.scale(rate, updates)
        params = optax.apply_updates(state.params, updates)
        if self._cfg.tricks.amp:
            # amp: a skipped step leaves no statistics of its batch behind, as it leaves
            # no parameters.
            applied = jt.amp.step_applied(state.opt_state, opt_state)
            model_state = jt.amp.select_tree(
                applied, model_state, state.model_state
            )
        metrics = {"loss": value, "accuracy": accuracy, **jt.metrics(opt_state)}
        step = state.step + 1
        return TrainState(
            params, model_state, opt_state, step, state.key, state.counts
        ), metrics

    def inputs(self, state: TrainState, batch: Any) -> tuple[Any, ...]:
        """Return the arguments that the step passes to the loss."""
        key = jax.random.fold_in(state.key, state.step)
        inputs, labels = self._examples(batch, key)
        return state.params, state.model_state, inputs, labels, state.counts

    def averaged(self, state: TrainState) -> Any:
        """Return the parameters to evaluate: their bias-corrected moving average if `ema` is on."""
        if not self._cfg.ema:
            return state.params
        leaves = jax.tree.leaves(state.opt_state, is_leaf=_is_ema)
        ema = next(filter(_is_ema, leaves))
        corrected = optax.tree.bias_correction(
            ema.ema, self._cfg.ema, ema.count
        )
        # Nothing is averaged before the first update.
        started = ema.count > 0
        return jax.tree.map(
            lambda x, p: jnp.where(started, x, p), corrected, state.params
        )

    def predict(
        self, params: Any, model_state: Any, batch: Any
    ) -> tuple[Array, Array]:
        """Return (logits float32, labels) of a batch, in evaluation mode.

        In float32 whatever the training used: evaluation is what is compared.
        """
        inputs, labels = self._examples(batch, None)
        params = self._constrained(params, self._used)
        logits, _ = self._apply(params, model_state, inputs, train=False)
        return logits, labels

    def with_loss(self, loss: Callable[..., Any]) -> "TrainStep":
        """Return the step with another loss of the same arguments and results."""
        step = copy.copy(self)
        step.loss = loss
        return step

    def with_micro_batch(self, micro_batch: int) -> "TrainStep":
        """Return the step of the same settings with another batch."""
        batch = micro_batch * self._cfg.accumulate
        cfg = dataclasses.replace(self._cfg, batch=batch)
        return TrainStep(cfg, self._data, self._rate, self.placement)

    def jitted(self) -> Any:
        """Return the step jitted; it donates its state and leaves it where it lies."""
        out = self.shardings, self.placement.replicated
        return jax.jit(self.step, donate_argnums=0, out_shardings=out)

    def compile(
        self, state: TrainState, batch: Any
    ) -> tuple[Callable[..., Any], int]:
        """Return (the step compiled for arguments like these, bytes of its temporaries)."""
        traced = self.jitted().trace(state, batch)
        executable = traced.lower().compile()
        return executable, _memory.report(executable, traced.jaxpr).temp

    def batch_shapes(self) -> dict[str, Any]:
        """Return the shapes of a micro-batch, with their shardings."""
        shape = self._cfg.micro_batch, *self._data.shape
        array = functools.partial(
            jax.ShapeDtypeStruct, sharding=self.placement.batch
        )
        if self._data.kind == "text":
            return {"text": array(shape, np.int32)}
        return {
            "image": array(shape, np.uint8),
            "label": array(shape[:1], np.int32),
        }

    def example_batch(self) -> Any:
        """Return a micro-batch of zeros on its devices."""
        return jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
            self.batch_shapes(),
        )

    def plan(
        self,
        *,
        wrt: Literal["peak", "temp"] = "peak",
        max_compiles: int = 6,
        topology: str | None = None,
        **settings: Any,
    ) -> remat.Plan:
        """Plan what the loss recomputes, within the step: jitted, donated, on its devices.

        Args:
          wrt, max_compiles, topology, **settings: as in `remat.plan`, whose batch is a
            micro-batch here.

        Raises:
          UserError: the budget can't be met or read, or the topology is unknown.
        """

        def arguments(step: TrainStep) -> tuple[Any, Any]:
            shapes = step.shapes, step.batch_shapes()
            if topology is None:
                return shapes
            # Its chip is not one of those at hand.
            return jax.tree.map(_memory.shape, shapes)

        sized = functools.cache(self.with_micro_batch)

        def within(loss: Any, batch: int | None = None) -> tuple[Any, Any]:
            step = self if batch is None else sized(batch)
            step = step.with_loss(loss)
            jitted = (
                step.jitted()
                if topology is None
                else jax.jit(step.step, donate_argnums=0)
            )
            return jitted, arguments(step)

        try:
            return remat.plan(
                self.loss,
                *jax.eval_shape(self.inputs, *arguments(self)),
                budget_bytes=budget(self._cfg.remat_budget or ""),
                has_aux=True,
                within=within,
                wrt=wrt,
                max_compiles=max_compiles,
                topology=topology,
                batch_argnums=_EXAMPLES,
                **settings,
            )
        except ValueError as error:
            option = (
                "--budget" if isinstance(self._cfg, Plan) else "--remat-budget"
            )
            raise UserError(
                str(error).replace("budget_bytes", option)
            ) from error

    def _model(self, key: Key) -> nnx.Module:
        return build_model(
            self._cfg, self._data.shape[-1], len(self._data.classes), key
        )

    def _loss(
        self,
        params: Any,
        model_state: Any,
        inputs: Array,
        labels: Array,
        counts: Array,
    ) -> Any:
        # Under fsdp each parameter is gathered here; its gradient is summed and split
        # on the way back.
        params = self._constrained(params, self._used)
        logits, model_state = self._apply(
            params, model_state, inputs, train=True
        )
        logits = self._constrained(logits, self.placement.batch)
        loss = build_loss(self._cfg, counts)(logits, labels)
        correct = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return loss.mean(), (model_state, correct.mean())

    def _differentiated(self, opt_state: Any) -> Callable[..., Any]:
        if not self._cfg.tricks.amp:
            return jax.value_and_grad(self.loss, has_aux=True)
        # amp: gradients leave multiplied by the scale that the optimizer divides by.
        scale = jt.amp.loss_scale(opt_state)
        return jt.amp.value_and_grad(self.loss, scale=scale, has_aux=True)

    def _constrained(self, x: Any, sharding: Any) -> Any:
        if self.placement.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, sharding)

    def _placed_shapes(self) -> TrainState:
        """Return the shapes of the state: the optimizer's lie like the parameters, the rest is replicated."""
        shapes = jax.eval_shape(
            functools.partial(self.init, 0, self._data.counts)
        )
        specs = jt.memopt.state_specs(self._tx, shapes.params, self._stored)
        opt_state = jax.tree.map(
            lambda s: NamedSharding(self.placement.mesh, s), specs
        )
        others = shapes.model_state, (shapes.step, shapes.key, shapes.counts)
        model_state, rest = jax.tree.map(
            lambda _: self.placement.replicated, others
        )
        # In the order of the fields of the state.
        shardings = jax.tree.leaves(
            (self._stored, model_state, opt_state, rest)
        )
        leaves, structure = jax.tree.flatten(shapes)
        return jax.tree.unflatten(
            structure, map(_memory.shape, leaves, shardings)
        )


def prepare(
    cfg: Train, data: data_lib.Data, rate: float | None = None
) -> tuple[TrainStep, remat.Plan | None]:
    """Return the step of a run, and its plan if the settings have a budget.

    Raises:
      UserError: the budget can't be met.
    """
    step = TrainStep(cfg, data, rate)
    if not cfg.remat_budget:
        return step, None
    plan = step.plan()
    return step.with_loss(plan.fn), plan


# The model.


def build_model(
    cfg: Train, inputs: int, num_classes: int, key: Key
) -> nnx.Module:
    """Make the network with the tricks that change it.

    Args:
      cfg: the settings.
      inputs: channels of the images; the transformer needs none, its inputs are
        classes.
      num_classes: outputs: classes of the images, or characters.
      key: of the initial weights.
    """
    # remat: only each block's input is saved; with a budget the whole loss is planned
    # instead.
    recompute = cfg.tricks.remat and not cfg.remat_budget
    common: dict[str, Any] = {"recompute": recompute, "rngs": nnx.Rngs(key)}
    if cfg.model == "transformer":
        return models.Transformer(
            num_classes, **dataclasses.asdict(cfg.text), **common
        )
    common |= {"widths": cfg.widths, "blocks": cfg.blocks}
    if cfg.model == "nfnet":
        return models.NFNet(inputs, num_classes, **common)
    layers = _layers(cfg.tricks)
    if cfg.model == "repvgg":
        block = functools.partial(jt.nnx.RepVGGBlock, **layers)
        return models.RepVGG(inputs, num_classes, block=block, **common)
    unit = pointwise = functools.partial(models.ConvNorm, **layers)
    # reparam: 3x3 + 3x1 + 1x3 branches in training; one 3x3 convolution after `fuse`.
    if cfg.tricks.reparam:
        unit = functools.partial(jt.nnx.ACBlock, **layers)
    return models.ResNet(
        inputs, num_classes, unit=unit, pointwise=pointwise, **common
    )


def _layers(tricks: Tricks) -> dict[str, Callable[..., Any]]:
    """Return the convolution and the normalization of the networks that have both."""
    # ebn: one variance for the whole layer instead of one per channel.
    norm = jt.nnx.ExtendedBatchNorm if tricks.ebn else nnx.BatchNorm
    # weightstd: kernels standardized per output channel before every use.
    conv = (
        functools.partial(jt.nnx.WSConv, use_gain=True)
        if tricks.weightstd
        else nnx.Conv
    )
    # Runs here are too short for a momentum of 0.99.
    return {"conv": conv, "norm": functools.partial(norm, momentum=0.9)}


def function_key(tricks: Tricks) -> tuple[bool, ...]:
    """Return what is equal for tricks whose models compute the same function of the same parameters."""
    return (tricks.weightstd, tricks.ebn, tricks.reparam)


# The optimizer.


def build_optimizer(
    cfg: Train,
    roles: Any,
    rate: Callable[[Any], Any] | float | None = None,
    *,
    classifiers: tuple[str, ...] = ("head",),
) -> optax.GradientTransformation:
    """Make the optimizer chain.

    Args:
      cfg: the settings.
      roles: of the model's layers (`jt.nnx.roles`).
      rate: learning rate or schedule; None is `build_schedule`.
      classifiers: paths of the modules that agc leaves alone.
    """
    tricks, links = cfg.tricks, []
    rate = build_schedule(cfg) if rate is None else rate
    # agc: first in the chain, on raw gradients; the classifier's kernel is left alone.
    if tricks.agc:
        clipped = jt.agc.exclude(*(f"{path}/kernel" for path in classifiers))
        links.append(
            jt.agc.adaptive_grad_clip(0.02, roles=roles, path_filter=clipped)
        )
    # memopt: row and column moments instead of two full buffers; the rate stays
    # absolute.
    if tricks.memopt:
        links.append(
            jt.memopt.adafactor(
                rate,
                multiply_by_parameter_scale=False,
                min_dim_size_to_factor=16,
                roles=roles,
                weight_decay=cfg.weight_decay,
                weight_decay_mask=kernel_mask,
            )
        )
    else:
        links.append(
            optax.adamw(rate, weight_decay=cfg.weight_decay, mask=kernel_mask)
        )
    if cfg.ema:
        links.append(averaging(cfg.ema))
    tx = optax.chain(*links)
    if cfg.accumulate > 1:
        tx = optax.MultiSteps(tx, cfg.accumulate).gradient_transformation()
    # amp: outermost, so that clipping, moments and accumulation see unscaled gradients.
    return jt.amp.dynamic_loss_scale(tx) if tricks.amp else tx


def averaging(decay: float) -> optax.GradientTransformation:
    """Apply `optax.ema` to the parameters after each update; the updates pass as they are.

    As the last link of the chain it also counts right inside MultiSteps and under
    skipped steps.
    """
    ema = optax.ema(decay)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, ema.update(optax.apply_updates(params, updates), state)[
            1
        ]

    return optax.GradientTransformation(ema.init, update)


def _is_ema(x: Any) -> bool:
    return isinstance(x, optax.EmaState)


def kernel_mask(params: Any) -> Any:
    """Return the mask of the parameters that weight decay applies to."""
    return _tree.map_with_path(
        lambda path, p: jt.roles.is_kernel(path, p.shape), params
    )


def build_schedule(cfg: Train) -> Callable[[Any], Any]:
    """Return the learning rate by step."""
    peak, steps = cfg.learning_rate, cfg.steps
    # cyclical: two triangles from a tenth of the peak, ending low; else warm-up and
    # cosine.
    if cfg.tricks.cyclical:
        return jt.cyclical.cyclical(
            peak / 10, peak, max(1, steps // (2 * _CYCLES))
        )
    # (a run of one step ends in its warm-up)
    return optax.warmup_cosine_decay_schedule(
        peak / 10, peak, max(1, steps // 10), max(2, steps)
    )


# The loss.


def build_loss(cfg: Train, counts: Array) -> Callable[..., Array]:
    """Return loss(logits [..., C], labels [...]) -> [...]; counts [C] may be traced."""
    # longtail: the class prior goes into the logits in training, and nowhere at test
    # time.
    loss = jt.longtail.cross_entropy()
    if cfg.tricks.longtail:
        loss = jt.longtail.logit_adjusted(counts)
    if not cfg.label_smoothing:
        return loss

    def smoothed(logits: Array, labels: Array) -> Array:
        one_hot = jax.nn.one_hot(labels, logits.shape[-1])
        return loss(logits, optax.smooth_labels(one_hot, cfg.label_smoothing))

    return smoothed


# Inputs and labels.


Examples = Callable[[Any, Key | None], tuple[Array, Array]]
"""(batch, key) -> (inputs, labels); augmented if there is a key."""


def examples_of(data: data_lib.Data) -> Examples:
    """Return how batches of this data set become inputs and labels."""
    return text_examples if data.kind == "text" else image_examples(data)


def text_examples(batch: Any, key: Key | None) -> tuple[Array, Array]:
    """Split {"text" [N, T + 1]} into (characters [N, T], the next ones [N, T])."""
    return batch["text"][:, :-1], batch["text"][:, 1:]


def image_examples(data: data_lib.Data) -> Examples:
    """Return ({"image" uint8, "label"}, key) -> (float images in [-1, 1], labels)."""
    pad = max(1, data.shape[0] // 8)

    def examples(batch: Any, key: Key | None) -> tuple[Array, Array]:
        images = batch["image"]
        if key is not None:
            images = augment(key, images, pad=pad, flip=data.flip)
        return to_float(images), batch["label"]

    return examples


def to_float(images: Array) -> Array:
    """Map uint8 [0, 255] to float32 [-1, 1]; float64 where jax has it on."""
    return jnp.asarray(images).astype(float) / 127.5 - 1


def augment(key: Key, images: Array, *, pad: int, flip: bool) -> Array:
    """Shift by up to `pad` pixels and, if flip, mirror at random: uint8 [N, H, W, C], on device."""
    n, height, width, channels = images.shape
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1)
    padded = jnp.pad(
        images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge"
    )

    def crop(image: Array, shift: Array) -> Array:
        return jax.lax.dynamic_slice(
            image, (*shift, 0), (height, width, channels)
        )

    images = jax.vmap(crop)(padded, shifts)
    if not flip:
        return images
    mirror = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


# Reading.


def build_echo(cfg: Train, batch: int) -> Callable[[Any], Any] | None:
    """Return the transform between reading and batching; a step takes `batch` examples here."""
    if not cfg.tricks.echo:
        return None
    # echo: each image read goes out echo_factor times, whole batches apart, augmented
    # anew on device.
    return lambda dataset: jt.echo.echo(
        dataset, cfg.echo_factor, batch_size=batch, seed=cfg.seed
    )


def build_order(cfg: Train, data: data_lib.Data) -> Callable[[int], int]:
    """Return position in the stream of examples read -> index of the example."""
    if cfg.sampling == "instance":
        return data_lib.shuffled(len(data.train), cfg.seed)
    # longtail: classes by the root of their counts, or evenly; progressive goes from
    # the data to evenly.
    sampling = jt.longtail.sampling
    powers = {"square-root": 0.5, "balanced": 0.0, "progressive": 1.0}
    probabilities = np.asarray(
        sampling.class_probabilities(data.counts, powers[cfg.sampling])
    )
    if cfg.sampling != "progressive":
        return data_lib.sampled(data.train.labels, probabilities, cfg.seed)
    even = np.asarray(sampling.class_probabilities(data.counts, 0.0))
    uses = (
        cfg.echo_factor if cfg.tricks.echo and cfg.echo_factor != "auto" else 1
    )
    reads = max(1, round(cfg.steps * cfg.batch / uses))
    return data_lib.sampled(
        data.train.labels, probabilities, cfg.seed, after=even, over=reads
    )
