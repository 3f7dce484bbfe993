"""WSConv and ExtendedBatchNorm as linen modules: a few lines around what their nnx twins call."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import _dtypes
from jaxtricks._typing import Array
from jaxtricks.longtail import decoupling
from jaxtricks.longtail import heads as functions
from jaxtricks.nnx import _conv, _heads, _norm
from jaxtricks.reparam import _nodes

Sizes = int | Sequence[int]


class WSConv(nn.Module):
    """Convolution whose kernel is standardized before every use; see `jt.nnx.WSConv`.

    Attributes:
      in_features: channels of the input; None = those of the input it is called on.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", an int or (low, high)
        pairs.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the preset's epsilon.
      use_gain: whether one factor per output channel is learned.
      use_bias: whether a bias is added.
      kernel_init: initializer; None = normal with variance 1 / fan_in.
      dtype: of the computation; None = that of input and parameters together.
      param_dtype: of the parameters.
      precision: of the convolution, as in `jax.lax`.

    Example:
      >>> import jax
      >>> conv = WSConv(None, 8, (3, 3), strides=2)
      >>> jax.eval_shape(conv.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]["kernel"].shape
      (3, 3, 3, 8)
    """

    in_features: int | None
    out_features: int
    kernel_size: Sizes
    strides: Sizes | None = 1
    padding: _nodes.Padding = "SAME"
    kernel_dilation: Sizes | None = 1
    feature_group_count: int = 1
    preset: str = "nfnet"
    eps: float | None = None
    use_gain: bool = True
    use_bias: bool = False
    kernel_init: Callable[..., Any] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., *spatial, in_features] -> [..., *spatial', out_features]."""
        features = in_features("WSConv", self.in_features, x)
        out = (self.out_features,)
        shape = _conv.kernel_shape(
            features, self.out_features, self.kernel_size, self.feature_group_count
        )
        kernel_init = self.kernel_init or _conv.default_kernel_init()
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        gain = (
            self.param("gain", ones, out, self.param_dtype) if self.use_gain else None
        )
        bias = (
            self.param("bias", zeros, out, self.param_dtype) if self.use_bias else None
        )
        return _conv.convolution(
            x,
            _conv.standardize_wide(kernel, gain, preset=self.preset, eps=self.eps),
            bias,
            dtype=_dtypes.common_dtype(x, kernel, bias, given=self.dtype),
            strides=self.strides or 1,
            padding=self.padding,
            dilation=self.kernel_dilation or 1,
            groups=self.feature_group_count,
            precision=self.precision,
        )


class ExtendedBatchNorm(nn.Module):
    """Batch normalization with one variance for all channels; see `jt.nnx.ExtendedBatchNorm`.

    Attributes:
      num_features: channels; None = those of the input it is called on.
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
      use_running_average: True in evaluation.

    Example:
      >>> import jax
      >>> norm = ExtendedBatchNorm()
      >>> variables = norm.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> y, update = norm.apply(variables, jnp.ones((2, 4)), mutable=["batch_stats"])
      >>> update["batch_stats"]["mean"].shape, update["batch_stats"]["var"].shape
      ((4,), ())
    """

    num_features: int | None = None
    momentum: float = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    use_bias: bool = True
    variance: Literal["channel", "grand"] = "channel"
    axis_name: Any = None
    scale_init: Callable[..., Any] | None = None
    bias_init: Callable[..., Any] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_running_average: bool | None = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalized x; in training the collection "batch_stats" moves.

        Args:
          x: [..., C].
          use_running_average: overrides the module's own setting for this call.
          mask: which entries count, see `ebn.extended_moments`.
        """
        shape = (in_features("ExtendedBatchNorm", self.num_features, x),)
        wide = _norm.statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, wide)
        var = self.variable("batch_stats", "var", jnp.ones, (), wide)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = bias = None
        if self.use_scale:
            scale = self.param(
                "scale", self.scale_init or ones, shape, self.param_dtype
            )
        if self.use_bias:
            bias = self.param("bias", self.bias_init or zeros, shape, self.param_dtype)
        stats = _norm.Running(mean.value, var.value)
        if not _norm.choose(use_running_average, self.use_running_average):
            initializing = self.is_initializing()
            stats, updated = _norm.batch_statistics(
                x,
                stats,
                momentum=self.momentum,
                mask=mask,
                axis_name=None if initializing else self.axis_name,
                variance=self.variance,
            )
            if not initializing:
                mean.value, var.value = map(jnp.asarray, updated)
        return _norm.normalize_to(
            x, stats, scale, bias, epsilon=self.epsilon, dtype=self.dtype
        )


def in_features(name: str, given: int | None, x: Array) -> int:
    """Channels of x, or an error if others were given."""
    if given is not None and given != x.shape[-1]:
        raise ValueError(
            f"linen.{name} was made for {given} features but is given {x.shape[-1]}"
        )
    return x.shape[-1]


# Classifier heads for long-tailed data as linen modules: a few lines around what their
# nnx twins call.


Initializer = Callable[..., Any]


class _Head(nn.Module):
    """What the heads share: a kernel [D, C], and the dtype of the logits."""

    in_features: int | None
    out_features: int

    def _kernel(self, x: Array, init: Initializer | None, param_dtype: Any) -> Array:
        shape = (
            in_features(type(self).__name__, self.in_features, x),
            self.out_features,
        )
        return self.param("kernel", init or _heads.unit_columns(), shape, param_dtype)

    def _per_class(self, name: str, init: Initializer, param_dtype: Any) -> Array:
        return self.param(name, init, (self.out_features,), param_dtype)


class CosineHead(_Head):
    """Squashed cosine head; see `jt.nnx.CosineHead`.

    Attributes:
      in_features: D; None = those of the input it is called on.
      out_features: C.
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
        """[..., D] features -> [..., C] logits."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        dtype = _dtypes.common_dtype(x, kernel, given=self.dtype)
        return functions.cosine(x, kernel, self.s).astype(dtype)


class NormedHead(_Head):
    """Cosine head, the one that `longtail.ldam` needs; see `jt.nnx.NormedHead`.

    Attributes:
      in_features: D; None = those of the input it is called on.
      out_features: C.
      s: scale of the logits; 1 for LDAM, whose loss has its own.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together.
      param_dtype: of the kernel.

    Example:
      >>> import jax
      >>> head = NormedHead(None, 3)
      >>> jax.eval_shape(head.init, jax.random.key(0), jnp.ones((1, 8)))["params"]["kernel"].shape
      (8, 3)
    """

    s: float = 1.0
    kernel_init: Initializer | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] features -> [..., C] logits in [-s, s]."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        dtype = _dtypes.common_dtype(x, kernel, given=self.dtype)
        return functions.normed(x, kernel, self.s).astype(dtype)


class LWSHead(_Head):
    """Linear head with a learned factor per class; see `jt.nnx.LWSHead`.

    Attributes:
      in_features: D; None = those of the input it is called on.
      out_features: C.
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
        """[..., D] features -> [..., C] logits."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        bias = (
            self._per_class("bias", zeros, self.param_dtype) if self.use_bias else None
        )
        dtype = _dtypes.common_dtype(x, kernel, bias, given=self.dtype)
        scale = self._per_class("scale", ones, self.param_dtype)
        return functions.lws(_heads.affine(x, kernel, bias, dtype), scale).astype(dtype)


class DisAlignHead(_Head):
    """Linear head with adaptive calibration; see `jt.nnx.DisAlignHead`.

    Attributes:
      in_features: D; None = those of the input it is called on.
      out_features: C.
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
        """[..., D] features -> [..., C] logits."""
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        zeros = nn.initializers.zeros
        bias = (
            self._per_class("bias", zeros, self.param_dtype) if self.use_bias else None
        )
        dtype = _dtypes.common_dtype(x, kernel, bias, given=self.dtype)
        start = decoupling.disalign_start(kernel.shape, self.param_dtype, self.compat)
        own = {
            name: self.param(name, lambda _, value=value: value)
            for name, value in start.items()
        }
        logits = _heads.affine(x, kernel, bias, dtype)
        return _heads.calibrated(x, logits, own.__getitem__, dtype).astype(dtype)


class CausalHead(_Head):
    """De-confounded head, which knows the mean feature; see `jt.nnx.CausalHead`.

    Attributes:
      in_features: D; None = those of the input it is called on.
      out_features: C.
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
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """[..., D] features -> [..., C] logits; in training the collection "batch_stats" moves.

        Args:
          x: the features.
          use_running_average: overrides the module's own setting for this call.
        """
        kernel = self._kernel(x, self.kernel_init, self.param_dtype)
        wide = _norm.statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, kernel.shape[:1], wide)
        direction = mean.value
        if not _norm.choose(
            use_running_average, self.use_running_average, "CausalHead"
        ):
            direction = None
            if not self.is_initializing():
                moved = _heads.moving_mean(mean.value, x, self.momentum, self.axis_name)
                mean.value = jnp.asarray(moved)
        settings = {
            name: getattr(self, name) for name in ("heads", "tau", "gamma", "alpha")
        }
        logits = functions.tde(x, kernel, direction, **settings)
        return logits.astype(_dtypes.common_dtype(x, kernel, given=self.dtype))
