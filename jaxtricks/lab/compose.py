"""The one place that knows all ten tricks: a line each, in the order in which they compose.

model (weightstd, ebn, reparam, remat) -> loss (longtail) -> gradients (amp) -> optimizer (agc, memopt,
cyclical, amp) -> reads (echo).
"""

import functools
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

import jaxtricks as jt
from jaxtricks import _tree
from jaxtricks._types import Array
from jaxtricks.lab import models
from jaxtricks.lab.config import Train, Tricks

BFLOAT16 = "p=f32,c=bf16,o=f32"

# What each trick is for, said where an ablation finds no gain in accuracy.
PURPOSE = {
    "echo": "it pays where reading is slower than the step",
    "amp": "it pays on accelerators; XLA's CPU backend has no bfloat16 product",
    "memopt": "it pays in optimizer memory",
    "weightstd": "it pays without batch statistics or with tiny batches",
    "agc": "it pays with large batches and rates",
    "remat": "it pays in activation memory, with the same function",
    "ebn": "it pays with tiny batches",
    "cyclical": "it pays in the search for a rate",
    "reparam": "its branches fuse into one convolution after training",
    "longtail": "it pays where classes are imbalanced",
}


def build_model(cfg: Train, channels: int, num_classes: int, seed: int) -> nnx.Module:
    """The network with the tricks that change it."""
    on = cfg.tricks
    # ebn: one variance for the whole layer instead of one a channel.
    norm = jt.nnx.ExtendedBatchNorm if on.ebn else nnx.BatchNorm
    norm = functools.partial(norm, momentum=0.9)  # runs here are too short for 0.99
    # weightstd: kernels standardized per output channel before every use.
    conv = functools.partial(jt.nnx.WSConv, use_gain=True) if on.weightstd else nnx.Conv
    unit = pointwise = functools.partial(models.ConvNorm, conv=conv, norm=norm)
    # reparam: 3x3 + 3x1 + 1x3 branches in training; one 3x3 convolution after `fuse`.
    if on.reparam:
        unit = functools.partial(jt.nnx.ACBlock, conv=conv, norm=norm)
    return models.ResNet(
        channels,
        num_classes,
        widths=cfg.widths,
        blocks=cfg.blocks,
        unit=unit,
        pointwise=pointwise,
        # remat: keep only each block's input for the backward pass.
        recompute=on.remat,
        rngs=nnx.Rngs(seed),
    )


def build_optimizer(cfg: Train, roles: Any) -> optax.GradientTransformation:
    """The optimizer chain; `roles` are those of the model's own layers (`jt.nnx.roles`)."""
    on, links = cfg.tricks, []
    # agc: first in the chain, on raw gradients; the classifier's kernel is left alone.
    if on.agc:
        where = jt.agc.exclude("head/kernel")
        links.append(jt.agc.adaptive_grad_clip(0.02, axes=roles, where=where))
    # memopt: row and column moments instead of two full buffers; the rate stays absolute.
    if on.memopt:
        links.append(
            jt.memopt.adafactor(
                build_schedule(cfg),
                multiply_by_parameter_scale=False,
                min_dim_size_to_factor=16,
                axes=roles,
                weight_decay=cfg.weight_decay,
                weight_decay_mask=kernels,
            )
        )
    else:
        decay = cfg.weight_decay
        links.append(optax.adamw(build_schedule(cfg), weight_decay=decay, mask=kernels))
    tx = optax.chain(*links)
    # amp: outermost, so that clipping and moments see unscaled gradients.
    return jt.amp.dynamic_loss_scale(tx) if on.amp else tx


def build_schedule(cfg: Train) -> Callable[[Any], Any]:
    """Learning rate by step."""
    peak, steps = cfg.learning_rate, cfg.steps
    # cyclical: two triangles from a tenth of the peak, ending low; else warm-up and cosine.
    if cfg.tricks.cyclical:
        return jt.cyclical.cyclical(peak / 10, peak, max(1, steps // 4))
    return optax.warmup_cosine_decay_schedule(peak / 10, peak, max(1, steps // 10), steps)


def build_loss(cfg: Train, counts: Array) -> Callable[..., Array]:
    """loss(logits [N, C], labels [N]) -> [N]; counts [C] may be traced."""
    # longtail: the class prior goes into the logits in training, and nowhere at test time.
    if cfg.tricks.longtail:
        return jt.longtail.logit_adjusted(counts)
    return jt.longtail.cross_entropy()


def differentiate(cfg: Train, loss_fn: Callable[..., Any], opt_state: Any) -> Callable[..., Any]:
    """(params, *args) -> ((loss, aux), gradients as the optimizer wants them)."""
    # amp: gradients leave multiplied by the scale that the optimizer divides by.
    scale = jt.amp.loss_scale(opt_state) if cfg.tricks.amp else None
    return jt.amp.value_and_grad(loss_fn, scale=scale, has_aux=True)


def cast_inputs(cfg: Train, params: Any, images: Array) -> tuple[Any, Array]:
    """Parameters and images in the dtype of the computation (statistics stay in float32)."""
    # amp: convolutions and products in bfloat16; the loss casts its logits back.
    if cfg.tricks.amp:
        return jt.amp.Policy.parse(BFLOAT16).cast_to_compute((params, images))
    return params, images


def build_reads(cfg: Train) -> Callable[[Any], Any]:
    """IterDataset -> IterDataset between reading and batching."""
    # echo: each image read goes out echo_factor times, whole batches apart, augmented anew on device.
    if cfg.tricks.echo:
        return lambda ds: jt.echo.echo(ds, cfg.echo_factor, batch_size=cfg.batch, seed=cfg.seed)
    return lambda ds: ds


def function_key(tricks: Tricks) -> tuple[bool, ...]:
    """Equal for tricks whose models compute the same function of the same parameters."""
    return (tricks.weightstd, tricks.ebn, tricks.reparam)


def kernels(params: Any) -> Any:
    """Mask of the parameters that weight decay applies to."""
    return _tree.map_with_path(lambda path, p: jt.axes.is_kernel(path, p.shape), params)
