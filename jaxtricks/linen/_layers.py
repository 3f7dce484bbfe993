"""WSConv, ExtendedBatchNorm and the heads for long-tailed data as linen modules.

Each is a few lines around the functions that the layers of `jt.nnx` call too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import _dtypes, _layer_functions, _layers, reparam
from jaxtricks._layer_functions import Padding, RunningStatistics
from jaxtricks._layers import Initializer
from jaxtricks._typing import Array
from jaxtricks.longtail import decoupling, heads

Sizes = int | Sequence[int]
Variables = Mapping[str, Mapping[str, Any]]
"""{"params": ..., "batch_stats": ...} of one layer, without boxes."""


class WSConv(nn.Module):
    """Convolution whose kernel is standardized before every use; see `jt.nnx.WSConv`.

    Attributes:
      features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", an int or (low, high)
        pairs.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the epsilon of the preset.
      use_gain: whether one factor per output channel is learned.
      use_bias: whether a bias is added.
      kernel_init: initializer; None = normal with variance 1 / fan_in.
      dtype: of the computation; None = that of input and parameters together.
      param_dtype: of the parameters.
      precision: of the convolution, as in `jax.lax`.

    Example:
      >>> import jax
      >>> conv = WSConv(8, (3, 3), strides=2)
      >>> jax.eval_shape(conv.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]["kernel"].shape
      (3, 3, 3, 8)
    """

    features: int
    kernel_size: Sizes
    strides: Sizes | None = 1
    padding: Padding = "SAME"
    kernel_dilation: Sizes | None = 1
    feature_group_count: int = 1
    preset: str = "nfnet"
    eps: float | None = None
    use_gain: bool = True
    use_bias: bool = False
    kernel_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [..., *spatial, in_features] to [..., *spatial', features]."""
        shape = _layers.conv_kernel_shape(
            x.shape[-1],
            self.features,
            self.kernel_size,
            self.feature_group_count,
        )
        kernel_init = self.kernel_init or _layers.unit_variance_init()
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        per_channel = ((self.features,), self.param_dtype)
        gain = bias = None
        if self.use_gain:
            gain = self.param("gain", nn.initializers.ones, *per_channel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, *per_channel)
        return _layer_functions.convolution(
            x,
            _layer_functions.standardize_wide(
                kernel, gain, preset=self.preset, eps=self.eps
            ),
            bias,
            dtype=_dtypes.common_dtype(x, kernel, bias, override=self.dtype),
            strides=self.strides or 1,
            padding=self.padding,
            dilation=self.kernel_dilation or 1,
            groups=self.feature_group_count,
            precision=self.precision,
        )


class ExtendedBatchNorm(nn.Module):
    """Batch normalization with one variance for all channels; see `jt.nnx.ExtendedBatchNorm`.

    Attributes:
      use_running_average: True in evaluation.
      momentum: running = momentum * running + (1 - momentum) * batch.
      epsilon: added to the variance, inside the root.
      use_scale: whether a factor per channel is learned.
      use_bias: whether an offset per channel is learned.
      variance: "channel" or "grand".
      axis_name: mapped axes over which statistics are shared (not while initializing).
      scale_init: initializer of scale; None = ones.
      bias_init: initializer of bias; None = zeros.
      dtype: of the output; None = that of input and parameters together.
      param_dtype: of scale and bias.

    Example:
      >>> import jax
      >>> norm = ExtendedBatchNorm()
      >>> variables = norm.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> y, update = norm.apply(variables, jnp.ones((2, 4)), mutable=["batch_stats"])
      >>> update["batch_stats"]["mean"].shape, update["batch_stats"]["var"].shape
      ((4,), ())
    """

    use_running_average: bool | None = False
    momentum: float = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True
    variance: Literal["channel", "grand"] = "channel"
    axis_name: Any = None
    scale_init: Initializer | None = None
    bias_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Return x normalized; in training the collection "batch_stats" moves.

        Args:
          x: [..., C].
          use_running_average: overrides the setting of the module for this call.
          mask: which entries count, see `ebn.extended_moments`.
        """
        shape = x.shape[-1:]
        wide = _layers.statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, wide)
        var = self.variable("batch_stats", "var", jnp.ones, (), wide)
        scale = bias = None
        if self.use_scale:
            init = self.scale_init or nn.initializers.ones
            scale = self.param("scale", init, shape, self.param_dtype)
        if self.use_bias:
            init = self.bias_init or nn.initializers.zeros
            bias = self.param("bias", init, shape, self.param_dtype)
        statistics = RunningStatistics(mean.value, var.value)
        if not _layers.use_running_statistics(
            use_running_average, self.use_running_average, "ExtendedBatchNorm"
        ):
            # Mapped axes are not bound while the module is initialized.
            initializing = self.is_initializing()
            statistics, updated = _layer_functions.batch_statistics(
                x,
                statistics,
                momentum=self.momentum,
                mask=mask,
                axis_name=None if initializing else self.axis_name,
                variance=self.variance,
            )
            if not initializing:
                mean.value, var.value = map(jnp.asarray, updated)
        return _layer_functions.normalize_to(
            x, statistics, scale, bias, epsilon=self.epsilon, dtype=self.dtype
        )


# Classifier heads for long-tailed data.


class _Head(nn.Module):
    """A linear map of features: a kernel [D, C], and the dtype of the logits."""

    features: int

    def _kernel(
        self, x: Array, init: Initializer | None, param_dtype: Any
    ) -> Array:
        shape = (x.shape[-1], self.features)
        init = init or _layers.unit_variance_init()
        return self.param("kernel", init, shape, param_dtype)

    def _bias(self, param_dtype: Any) -> Array:
        return self._per_class("bias", nn.initializers.zeros, param_dtype)

    def _per_class(
        self, name: str, init: Initializer, param_dtype: Any
    ) -> Array:
        return self.param(name, init, (self.features,), param_dtype)


class CosineHead(_Head):
    """Squashed cosine head; see `jt.nnx.CosineHead`.

    Attributes:
      features: C.
      s: scale of the logits.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together.
      param_dtype: of the kernel.
    """

    s: float = 16.0
    kernel_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map features [..., D] to logits [..., C]."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        dtype = _dtypes.common_dtype(x, kernel, override=self.dtype)
        return heads.cosine(x, kernel, self.s).astype(dtype)


class NormedHead(_Head):
    """Cosine head, the one that `longtail.ldam` needs; see `jt.nnx.NormedHead`.

    Attributes:
      features: C.
      s: scale of the logits; 1 for LDAM, whose loss scales them.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together.
      param_dtype: of the kernel.

    Example:
      >>> import jax
      >>> head = NormedHead(3)
      >>> jax.eval_shape(head.init, jax.random.key(0), jnp.ones((1, 8)))["params"]["kernel"].shape
      (8, 3)
    """

    s: float = 1.0
    kernel_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map features [..., D] to logits [..., C] in [-s, s]."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        dtype = _dtypes.common_dtype(x, kernel, override=self.dtype)
        return heads.normed(x, kernel, self.s).astype(dtype)


class LWSHead(_Head):
    """Linear head with a learned factor per class; see `jt.nnx.LWSHead`.

    Attributes:
      features: C.
      use_bias: whether there is a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the products and the logits; None = that of input and parameters
        together.
      param_dtype: of the parameters.
    """

    use_bias: bool = True
    kernel_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map features [..., D] to logits [..., C]."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        bias = self._bias(self.param_dtype) if self.use_bias else None
        scale = self._per_class("scale", nn.initializers.ones, self.param_dtype)
        dtype = _dtypes.common_dtype(x, kernel, bias, override=self.dtype)
        logits = _layers.affine(x, kernel, bias, dtype)
        return heads.lws(logits, scale).astype(dtype)


class DisAlignHead(_Head):
    """Linear head with adaptive calibration; see `jt.nnx.DisAlignHead`.

    Attributes:
      features: C.
      use_bias: whether the linear head has a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      compat: None starts without calibration, "reference" with a = 1 and v = 0.1.
      dtype: of the products and the logits; None = that of input and parameters
        together.
      param_dtype: of the parameters.
    """

    use_bias: bool = True
    kernel_init: Initializer | None = None
    compat: decoupling.Compat = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map features [..., D] to logits [..., C]."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        bias = self._bias(self.param_dtype) if self.use_bias else None
        dtype = _dtypes.common_dtype(x, kernel, bias, override=self.dtype)
        start = decoupling.disalign_start(
            kernel.shape, self.param_dtype, self.compat
        )
        calibration = {
            name: self.param(name, lambda _, value=value: value)
            for name, value in start.items()
        }
        logits = _layers.affine(x, kernel, bias, dtype)
        return _layer_functions.calibrated(
            x, logits, calibration.__getitem__, dtype
        ).astype(dtype)


class CausalHead(_Head):
    """De-confounded head, which tracks the mean feature; see `jt.nnx.CausalHead`.

    Attributes:
      features: C.
      heads: K, which divides D.
      tau: scale of the logits.
      gamma: keeps large norms of w from being divided out in full.
      alpha: strength of the subtraction.
      momentum: mean = momentum mean + (1 - momentum) mean(x).
      axis_name: mapped axes over which the mean is shared (not while initializing).
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together.
      param_dtype: of the kernel.
      use_running_average: True in evaluation.
    """

    heads: int = 2
    tau: float = 16.0
    gamma: float = 1 / 32
    alpha: float = 3.0
    momentum: float = 0.9
    axis_name: Any = None
    kernel_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_running_average: bool | None = False

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None
    ) -> Array:
        """Map features [..., D] to logits [..., C]; in training the mean moves.

        Args:
          x: the features.
          use_running_average: overrides the setting of the module for this call.
        """
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        wide = _layers.statistics_dtype(self.param_dtype)
        mean = self.variable(
            "batch_stats", "mean", jnp.zeros, kernel.shape[:1], wide
        )
        direction = mean.value
        if not _layers.use_running_statistics(
            use_running_average, self.use_running_average, "CausalHead"
        ):
            direction = None
            if not self.is_initializing():
                moved = _layers.moving_mean(
                    mean.value, x, self.momentum, self.axis_name
                )
                mean.value = jnp.asarray(moved)
        logits = heads.tde(
            x,
            kernel,
            direction,
            heads=self.heads,
            tau=self.tau,
            gamma=self.gamma,
            alpha=self.alpha,
        )
        return logits.astype(
            _dtypes.common_dtype(x, kernel, override=self.dtype)
        )


# Layers as nodes of `reparam`.


def effective_kernel(
    conv: nn.Module, variables: Variables
) -> tuple[Array, Any]:
    """Return (kernel, bias or None) of the plain convolution that a layer computes.

    Args:
      conv: nn.Conv or WSConv.
      variables: of this layer.

    Raises:
      ValueError: its `conv_general_dilated` may compute anything.
    """
    params = variables["params"]
    kernel, bias = params["kernel"], params.get("bias")
    if isinstance(conv, WSConv):
        kernel = _layer_functions.standardize_wide(
            kernel, params.get("gain"), preset=conv.preset, eps=conv.eps
        )
        return kernel, bias
    mask = getattr(conv, "mask", None)
    return _layer_functions.hooked_kernel(conv, kernel, mask), bias


def conv_node(
    conv: nn.Module, variables: Variables, dilation: int = 1
) -> reparam.Conv:
    """Return the convolution that a layer computes as a node."""
    kernel, bias = effective_kernel(conv, variables)
    groups: Any = getattr(conv, "feature_group_count", 1)
    return reparam.Conv(kernel, bias, groups, dilation)


def frozen_norm(norm: nn.Module, variables: Variables) -> reparam.Norm:
    """Return a normalization with its running statistics as a node.

    Args:
      norm: nn.BatchNorm or ExtendedBatchNorm.
      variables: of this layer.

    Raises:
      ValueError: it has no running statistics.
    """
    statistics = variables.get("batch_stats", {})
    if "mean" not in statistics:
        raise ValueError(
            f"linen: {type(norm).__name__} has no running statistics and does "
            "not fuse; use nn.BatchNorm or ExtendedBatchNorm"
        )
    params = variables.get("params", {})
    mean, var = (jnp.asarray(statistics[name]) for name in ("mean", "var"))
    epsilon: Any = getattr(norm, "epsilon", 0.0)
    return reparam.Norm(
        mean, var, params.get("scale"), params.get("bias"), epsilon
    )


def is_standardized(conv: nn.Module) -> bool:
    """Return whether a convolution standardizes its kernel."""
    return isinstance(conv, WSConv) or _layer_functions.has_hook(conv)
