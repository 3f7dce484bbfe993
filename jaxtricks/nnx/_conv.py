"""Convolutions: WSConv, and what a convolution layer of nnx is in the branch algebra."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _dtypes, _integers, _layer_functions, _layers, reparam
from jaxtricks._layer_functions import Padding
from jaxtricks._layers import Initializer
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat


class WSConv(nnx.Module):
    """Convolution whose kernel is standardized before every use, in both modes alike.

    y = conv(x, standardize(kernel, gain)) + bias; see `weightstd.standardize`. The
    statistics are those of the parameter, in float32 or better, whatever `dtype` is.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (one axis), an int or
        (low, high) pairs.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the epsilon of the preset.
      use_gain: whether one factor per output channel is learned (initially 1).
      use_bias: whether a bias is added (NFNets have one).
      kernel_init: initializer of the kernel; None = normal with variance 1 / fan_in.
      dtype: of the computation; None = that of input and parameters together.
      param_dtype: of the parameters.
      precision: of the convolution, as in `jax.lax`.
      rngs: keys; "params" is used.

    Variables: kernel [*kernel_size, in / groups, out], gain [out], bias [out], all
      nnx.Param.

    Raises:
      ValueError: a depthwise 1x1 kernel, which has nothing to standardize.

    Example:
      >>> conv = WSConv(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> conv(jnp.ones((1, 8, 8, 3))).shape
      (1, 4, 4, 8)

    References:
      Brock, De, Smith, Simonyan, arXiv 2102.06171, section 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        preset: str = "nfnet",
        eps: float | None = None,
        use_gain: bool = True,
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        shape = _layers.conv_kernel_shape(
            in_features, out_features, kernel_size, feature_group_count
        )
        init = (
            _layers.unit_variance_init() if kernel_init is None else kernel_init
        )
        # Absent parameters are data too, so that the structure can change later.
        ones = jnp.ones(out_features, param_dtype)
        zeros = jnp.zeros(out_features, param_dtype)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.gain = nnx.Param(ones) if use_gain else nnx.data(None)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = shape[:-2]
        self.strides = _integers.plain(1 if strides is None else strides)
        self.padding = _layers.hashable_padding(padding)
        self.kernel_dilation = _integers.plain(
            1 if kernel_dilation is None else kernel_dilation
        )
        self.feature_group_count = feature_group_count
        self.preset = preset
        self.eps = eps
        self.use_gain = use_gain
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        # A kernel that cannot be standardized fails here, not in the first step.
        jax.eval_shape(self._standardize, self.kernel[...], None)

    def standardized_kernel(self) -> Array:
        """Return the kernel that the convolution uses, in float32 or wider."""
        return self._standardize(self.kernel[...], _compat.read(self.gain))

    def _standardize(self, kernel: Array, gain: Array | None) -> Array:
        return _layer_functions.standardize_wide(
            kernel, gain, preset=self.preset, eps=self.eps
        )

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Map [..., *spatial, in_features] to [..., *spatial', out_features]."""
        bias = _compat.read(self.bias)
        return _layer_functions.convolution(
            x,
            self.standardized_kernel(),
            bias,
            dtype=_dtypes.common_dtype(
                x, self.kernel[...], bias, override=self.dtype
            ),
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
            precision=self.precision,
        )


def effective_kernel(conv: Any) -> tuple[Array, Array | None]:
    """Return (kernel, bias) of the plain convolution that a layer computes.

    Args:
      conv: nnx.Conv or WSConv.

    Raises:
      ValueError: its `conv_general_dilated` may compute anything.
    """
    bias = _compat.read(conv.bias)
    # What is convolved, not what is trained.
    if isinstance(conv, WSConv):
        return conv.standardized_kernel(), bias
    mask = getattr(conv, "mask", None)
    return _layer_functions.hooked_kernel(conv, conv.kernel[...], mask), bias


def conv_node(conv: Any, dilation: int = 1) -> reparam.Conv:
    """Return the convolution that a layer computes as a node of `reparam`."""
    kernel, bias = effective_kernel(conv)
    return reparam.Conv(kernel, bias, conv.feature_group_count, dilation)


def is_standardized(conv: Any) -> bool:
    """Return whether a convolution standardizes its kernel."""
    return isinstance(conv, WSConv) or _layer_functions.has_hook(conv)


def plain_conv(
    template: Any, layer: Any, merged: reparam.Conv, output_dtype: Any = None
) -> nnx.Conv:
    """Return an nnx.Conv with the kernel and bias of `merged`.

    Args:
      template: the convolution whose dtypes and precision it gets.
      layer: the convolution or block whose geometry it gets.
      merged: its kernel and bias.
      output_dtype: of its output; None = that of the template.
    """
    # A block has the dtypes of its parts; the largest kernel stands for all.
    param_dtype = template.kernel[...].dtype
    conv: Any = nnx.Conv(
        layer.in_features,
        layer.out_features,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=merged.groups,
        dtype=template.dtype,
        param_dtype=param_dtype,
        precision=template.precision,
        # The default initializer takes seconds to compile for each shape.
        kernel_init=nnx.initializers.zeros,
        rngs=nnx.Rngs(0),
    )
    element_type = output_dtype or getattr(
        template, "preferred_element_type", None
    )
    if element_type is not None:
        # Not an argument in older releases of Flax.
        conv.preferred_element_type = element_type
    conv.kernel[...] = merged.kernel.astype(param_dtype)
    # A plain convolution always has a bias: nearly every normalization leaves one.
    bias = merged.bias
    bias = jnp.zeros(layer.out_features) if bias is None else bias
    conv.bias[...] = bias.astype(param_dtype)
    return conv
