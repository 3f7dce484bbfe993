"""Linear layers and transposed convolutions that take up the normalization behind them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtricks import _tree, reparam
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat
from jaxtricks.reparam._apply import norm_factor
from jaxtricks.reparam.bound import FACTOR

LAYERS: tuple[type, ...] = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.ConvTranspose)


def channel_axis(layer: Any) -> int:
    """The axis of the kernel, from the end, that is the last axis of the layer's output.

    Raises:
      ValueError: there is none, or the layer is stacked (nnx.vmap).
    """
    rank = layer.kernel[...].ndim
    match layer:
        case nnx.Linear():
            expected, axis = 2, -1
        case nnx.ConvTranspose():
            expected = len(layer.kernel_size) + 2
            axis = -2 if layer.transpose_kernel else -1
        case nnx.LinearGeneral():
            sizes = (layer.batch_axis, layer.in_features, layer.out_features)
            expected, axis = sum(map(len, sizes)), -1
        case _:
            expected, axis = len(layer.kernel_shape), _einsum_axis(layer.einsum_str)
    if rank != expected:
        raise ValueError("is stacked (nnx.vmap): fuse one layer")
    return axis


def _einsum_axis(equation: str) -> int:
    _, kernel, outputs = equation.replace("->", ",").split(",")
    if not outputs or "." in kernel or outputs[-1] not in kernel:
        raise ValueError(f"has an output whose last axis is not an axis of its kernel ({equation})")
    return kernel.index(outputs[-1]) - len(kernel)


def with_norm(layer: Any, norm: reparam.Norm) -> Any:
    """A copy of the layer whose output is the normalized one: y = kernel t x + (bias - mean) t + b."""
    kernel = jnp.asarray(layer.kernel[...], _tree.wide_dtype(layer.kernel[...]))
    norm = jax.tree.map(lambda leaf: jnp.asarray(leaf, _tree.wide_dtype(kernel, leaf)), norm)
    factor, offset = norm_factor(norm)
    bias = _compat.read(layer.bias)
    shift = (-norm.mean if bias is None else bias - _row(norm.mean, bias)) * (
        factor if bias is None else _row(factor, bias)
    )
    if offset is not None:
        shift = shift + _row(offset, shift)
    return _with_variables(layer, kernel * _along(factor, channel_axis(layer), kernel.ndim), shift)


def rounding_bound(layer: Any, norm: reparam.Norm, fused: Any, x: Array, dtype: Any) -> float:
    """How far apart rounding in `dtype` may put layer and normalization from the fused layer on x.

    `reparam.error_bound` for layers that are no node of its algebra: 16 u (S_fused + S_branch).
    """
    wide = _tree.wide_dtype(x)
    x = jnp.abs(jnp.asarray(x, wide))
    norm = jax.tree.map(lambda leaf: jnp.abs(jnp.asarray(leaf, wide)), norm)
    factor, offset = norm_factor(norm)
    y = _magnitude(layer, wide)(x)
    y = (y + _row(norm.mean, y)) * _row(factor, y)
    y = y if offset is None else y + _row(offset, y)
    total = jnp.max(y) + jnp.max(_magnitude(fused, wide)(x))
    return FACTOR * float(jnp.finfo(dtype).eps) / 2 * float(total)


def _magnitude(layer: Any, dtype: Any) -> Any:
    """The layer with the absolute values of its parameters, computed in `dtype`."""
    bias = _compat.read(layer.bias)
    copy = _with_variables(
        layer, jnp.abs(layer.kernel[...]), None if bias is None else jnp.abs(bias), dtype
    )
    copy.dtype = dtype
    if getattr(copy, "preferred_element_type", None) is not None:
        copy.preferred_element_type = dtype
    return copy


def _with_variables(layer: Any, kernel: Array, bias: Array | None, dtype: Any = None) -> Any:
    """A copy of the layer with this kernel and bias, in `dtype` or that of its kernel."""
    copy = nnx.clone(layer)
    dtype = dtype or layer.kernel[...].dtype
    copy.kernel = layer.kernel.replace(kernel.astype(dtype))  # not [...] =, which would cast
    if bias is None:
        return copy
    shape = _bias_shape(layer)
    values = jnp.broadcast_to(bias, shape).astype(dtype)
    copy.bias = nnx.Param(values) if layer.bias is None else layer.bias.replace(values)
    if isinstance(layer, nnx.Einsum):
        copy.bias_shape = shape
    else:
        copy.use_bias = True
    return copy


def _bias_shape(layer: Any) -> tuple[int, ...]:
    match layer:
        case nnx.LinearGeneral():
            return (*layer.batch_axis.values(), *layer.out_features)
        case nnx.Einsum():
            _, kernel, outputs = layer.einsum_str.replace("->", ",").split(",")
            sizes = dict(zip(kernel, layer.kernel_shape, strict=True))
            return tuple(sizes[letter] for letter in outputs if letter in sizes)
    return (layer.out_features,)


def _along(values: Array, axis: int, rank: int) -> Array:
    shape = [1] * rank
    shape[axis] = values.shape[-1]
    return values.reshape(shape)


def _row(values: Array, like: Array) -> Array:
    return _along(values, -1, like.ndim)
