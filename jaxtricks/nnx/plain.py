"""The plain convolution that a layer or a block becomes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxtricks import reparam


def plain_conv(layer: Any, merged: reparam.Conv) -> nnx.Conv:
    """An nnx.Conv of this kernel and bias with the geometry of `layer`, in its dtypes."""
    dtype = layer_dtypes(layer)
    conv: Any = nnx.Conv(
        layer.in_features,
        layer.out_features,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=merged.groups,
        dtype=dtype.compute,
        param_dtype=dtype.param,
        precision=largest_conv(layer).precision,
        kernel_init=nnx.initializers.zeros,  # the default takes seconds to compile, for each shape
        rngs=nnx.Rngs(0),
    )
    if (element := getattr(largest_conv(layer), "preferred_element_type", None)) is not None:
        conv.preferred_element_type = element  # no argument in older releases of flax
    conv.kernel[...] = merged.kernel.astype(dtype.param)
    bias = jnp.zeros(layer.out_features) if merged.bias is None else merged.bias
    conv.bias[...] = bias.astype(dtype.param)
    return conv


class _Dtypes(NamedTuple):
    compute: Any
    param: Any


def largest_conv(layer: Any) -> Any:
    """The layer itself, or a block's convolution with the largest kernel."""
    return layer.parts()[0][1].conv if hasattr(layer, "parts") else layer


def layer_dtypes(layer: Any) -> _Dtypes:
    """(dtype of the computation or None, dtype of the kernel) of a convolution or a block."""
    conv = largest_conv(layer)
    return _Dtypes(conv.dtype, conv.kernel[...].dtype)
