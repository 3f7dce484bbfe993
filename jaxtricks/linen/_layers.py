"""Classifier heads for long-tailed data as linen modules: a few lines around what their nnx twins call."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import _tree
from jaxtricks._typing import Array
from jaxtricks.linen.layers import in_features
from jaxtricks.longtail import decoupling
from jaxtricks.longtail import heads as functions
from jaxtricks.nnx import _heads, _norm, causal

Initializer = Callable[..., Any]


class _Head(nn.Module):
    """What the heads share: a kernel [D, C], and the dtype of the logits."""

    in_features: int | None
    out_features: int

    def _kernel(self, x: Array, init: Initializer | None, param_dtype: Any) -> Array:
        shape = (in_features(type(self).__name__, self.in_features, x), self.out_features)
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
        dtype = _tree.common_dtype(x, kernel, given=self.dtype)
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
        dtype = _tree.common_dtype(x, kernel, given=self.dtype)
        return functions.normed(x, kernel, self.s).astype(dtype)


class LWSHead(_Head):
    """Linear head with a learned factor per class; see `jt.nnx.LWSHead`.

    Attributes:
      in_features: D; None = those of the input it is called on.
      out_features: C.
      use_bias: whether there is a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the products and the logits; None = that of input and parameters together.
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
        bias = self._per_class("bias", zeros, self.param_dtype) if self.use_bias else None
        dtype = _tree.common_dtype(x, kernel, bias, given=self.dtype)
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
      dtype: of the products and the logits; None = that of input and parameters together.
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
        bias = self._per_class("bias", zeros, self.param_dtype) if self.use_bias else None
        dtype = _tree.common_dtype(x, kernel, bias, given=self.dtype)
        start = decoupling.disalign_start(kernel.shape, self.param_dtype, self.compat)
        own = {
            name: self.param(name, lambda _, value=value: value) for name, value in start.items()
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
        if not _norm.choose(use_running_average, self.use_running_average, "CausalHead"):
            direction = None
            if not self.is_initializing():
                moved = causal.moving_mean(mean.value, x, self.momentum, self.axis_name)
                mean.value = jnp.asarray(moved)
        settings = {name: getattr(self, name) for name in ("heads", "tau", "gamma", "alpha")}
        logits = functions.tde(x, kernel, direction, **settings)
        return logits.astype(_tree.common_dtype(x, kernel, given=self.dtype))
