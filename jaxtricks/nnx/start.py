"""Blocks that start as a given convolution."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxtricks import _tree, reparam, weightstd
from jaxtricks._typing import Array
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx.parts import frozen_norm


def start_from(block: Any, kernel: Array, bias: Array | None) -> None:
    """See `Branched.start_from`."""
    (_, free), *others = block.parts()
    _check(block, free)
    wide = _tree.wide_dtype(kernel)
    target = reparam.Conv(jnp.asarray(kernel, wide), None, block.feature_group_count)
    spread = jnp.sqrt(_power(target.kernel))
    if block.norm is not None:
        _adjust(block.norm, spread**2, None)
        _write(
            free.conv.kernel,
            reparam.unfuse(target, block.branches().nodes[0]).nodes[0].nodes[0].kernel,
        )
        _write(block.norm.bias, 0.0 if bias is None else bias)
        return
    for _, branch in others:
        if branch.first is not None:
            _adjust(branch.first.norm, _variance(branch.first.nodes()[:1], block), 1.0)
        _adjust(branch.norm, _variance(branch.linear(), block), spread / (1 + len(others)))
    # A factor of 1 behind the free kernel: then it is what is missing, whose variance is known after.
    _adjust(free.norm, jnp.ones_like(spread), None)
    rest = jnp.zeros_like(spread) if bias is None else jnp.asarray(bias, wide)
    made = reparam.unfuse(reparam.Conv(target.kernel, rest, target.groups), block.branches())
    conv, norm = made.nodes[0].nodes
    _write(free.conv.kernel, conv.kernel)
    _write(free.norm.bias, norm.bias)
    _adjust(free.norm, _power(conv.kernel), None, keep_bias=True)


def _variance(nodes: list[Any], block: Any) -> Array:
    """Of each output channel for white input of unit variance."""
    features = reparam.Identity(block.in_features)
    return _power(reparam.fuse(reparam.Sequential(features, *nodes), block.kernel_size).kernel)


def _power(kernel: Array) -> Array:
    return jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)))


def _adjust(norm: Any, var: Array, scale: Array | float | None, keep_bias: bool = False) -> None:
    """Mean 0, this variance (its mean where the normalization has one) and scale; None = a factor of 1."""
    _write(norm.mean, 0.0)
    _write(norm.var, var if norm.var[...].ndim else jnp.mean(var))
    if scale is None:
        scale = jnp.sqrt(frozen_norm(norm).var + norm.epsilon)
    _write(norm.scale, scale)
    if not keep_bias:
        _write(norm.bias, 0.0)


def _write(variable: nnx.Variable, value: Any) -> None:
    old = variable[...]
    variable[...] = jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)


def _check(block: Any, free: Any) -> None:
    hook = getattr(free.conv, "conv_general_dilated", None)
    if isinstance(free.conv, WSConv) or isinstance(hook, weightstd.Hook):
        raise ValueError(
            f"{type(block).__name__}.start_from: the branches have standardized kernels, whose filters have "
            "mean 0, so not every convolution can be written with them; use conv=nnx.Conv"
        )
    norms = [block.norm] if block.norm is not None else [b.norm for _, b in block.parts()]
    for norm in norms:
        if frozen_norm(norm).scale is None or frozen_norm(norm).bias is None:
            raise ValueError(
                f"{type(block).__name__}.start_from: a {type(norm).__name__} has no scale or no bias to "
                "set; make it with both"
            )
