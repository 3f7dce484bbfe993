"""The one place that knows all ten tricks: a line each, in the order in which they compose.

model (weightstd, ebn, reparam, remat) -> loss (longtail) -> gradients (amp) -> optimizer (agc, memopt,
cyclical, amp) -> reads (longtail, echo).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from jaxtricks import _tree
from jaxtricks._typing import Array, Key
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import models
from jaxtricks.lab.config import Train, Tricks

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
        links.append(jt.agc.adaptive_grad_clip(0.02, roles=roles, path_filter=where))
    # memopt: row and column moments instead of two full buffers; the rate stays absolute.
    if on.memopt:
        links.append(
            jt.memopt.adafactor(
                rate,
                multiply_by_parameter_scale=False,
                min_dim_size_to_factor=16,
                roles=roles,
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
    return (
        jt.amp.select_tree(jt.amp.step_applied(before, after), new, old) if cfg.tricks.amp else new
    )


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
