"""Convolution with standardized kernels as a layer, for the gain that it learns."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _dtypes, _integers, weightstd
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat
from jaxtricks.reparam import _nodes

Initializer = Callable[..., Any]

_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def default_kernel_init() -> Initializer:
    """Normal with variance 1 / fan_in, as in normalizer-free networks."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class WSConv(nnx.Module):
    """Convolution whose kernel is standardized before every use, in training and evaluation alike.

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
      eps: replaces the preset's epsilon.
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
        padding: _nodes.Padding = "SAME",
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
        size = kernel_shape(in_features, out_features, kernel_size, feature_group_count)
        init = default_kernel_init() if kernel_init is None else kernel_init
        self.kernel = nnx.Param(init(rngs.params(), size, param_dtype))
        out = (out_features,)
        self.gain = (
            nnx.Param(jnp.ones(out, param_dtype)) if use_gain else nnx.data(None)
        )
        self.bias = (
            nnx.Param(jnp.zeros(out, param_dtype)) if use_bias else nnx.data(None)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = size[:-2]
        self.strides = _integers.plain(1 if strides is None else strides)
        self.padding = hashable_padding(padding)
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
        """The kernel that the convolution uses, in the parameter's dtype but float32 at least."""
        return self._standardize(self.kernel[...], _compat.read(self.gain))

    def _standardize(self, kernel: Array, gain: Array | None) -> Array:
        return standardize_wide(kernel, gain, preset=self.preset, eps=self.eps)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """[..., *spatial, in_features] -> [..., *spatial', out_features]."""
        bias = _compat.read(self.bias)
        return convolution(
            x,
            self.standardized_kernel(),
            bias,
            dtype=_dtypes.common_dtype(x, self.kernel[...], bias, given=self.dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
            precision=self.precision,
        )


def kernel_shape(
    in_features: int, out_features: int, kernel_size: int | Sequence[int], groups: int
) -> tuple[int, ...]:
    """[*kernel_size, in / groups, out]."""
    size = _integers.listed(kernel_size)
    if in_features % groups or out_features % groups:
        raise ValueError(
            f"nnx.WSConv: `feature_group_count` {groups} divides not both {in_features} and "
            f"{out_features} features"
        )
    return (*size, in_features // groups, out_features)


def standardize_wide(
    kernel: Array, gain: Array | None, *, preset: str, eps: float | None
) -> Array:
    """`weightstd.standardize` with a result of float32 or better."""
    wide = jnp.asarray(kernel, _dtypes.wide_dtype(kernel))
    return weightstd.standardize(wide, gain, preset=preset, eps=eps)


def convolution(
    x: Array,
    kernel: Array,
    bias: Array | None,
    *,
    dtype: Any,
    strides: int | Sequence[int],
    padding: _nodes.Padding,
    dilation: int | Sequence[int],
    groups: int,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """conv(x, kernel) + bias in `dtype`, with flax's padding modes."""
    rank = kernel.ndim - 2
    if x.ndim < rank + 1:
        raise ValueError(
            f"WSConv: x of shape {x.shape} has fewer than {rank} spatial axes"
        )
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    size = kernel.shape[:-2]
    strides = _nodes.per_axis("strides", strides, rank)
    dilation = _nodes.per_axis("dilation", dilation, rank)
    x, padding = pad_by_mode(x, padding, size, dilation)
    pads = _nodes.resolve(
        padding, x.shape[x.ndim - rank - 1 : -1], size, strides, dilation
    )
    y = _nodes.convolve(
        x,
        kernel,
        strides=strides,
        pads=pads,
        dilation=dilation,
        groups=groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return (
        y
        if bias is None
        else y + jnp.asarray(bias, y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    )


def pad_by_mode(
    x: Array, padding: _nodes.Padding, size: Sequence[int], dilation: Sequence[int]
) -> tuple[Array, _nodes.Padding]:
    """(x, padding) for a convolution that pads with zeros: "CIRCULAR" and "REFLECT" are done here."""
    if not isinstance(padding, str) or padding.upper() not in _PAD_MODES:
        return x, padding
    totals = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    pads = [(t // 2, t - t // 2) for t in totals]
    lead = [(0, 0)] * (x.ndim - len(pads) - 1)
    return jnp.pad(x, [*lead, *pads, (0, 0)], mode=_PAD_MODES[padding.upper()]), "VALID"


def hashable_padding(padding: _nodes.Padding) -> Any:
    """Padding as a module's static attribute."""
    if isinstance(padding, str):
        return padding
    if _integers.is_integer(padding):
        return _integers.plain(padding)
    return tuple(map(_integers.plain, padding))
