"""Classifier heads for long-tailed data as layers, around the functions of `longtail.heads`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _dtypes, _layer_functions, _layers
from jaxtricks._layers import Initializer
from jaxtricks._typing import Array
from jaxtricks.longtail import decoupling, heads
from jaxtricks.longtail.heads import tde
from jaxtricks.nnx import _compat


class Head(nnx.Module):
    """A linear map of features: a kernel [D, C], and the dtype of the logits."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_init: Initializer | None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = (
            _layers.unit_variance_init() if kernel_init is None else kernel_init
        )
        self.kernel = nnx.Param(
            init(rngs.params(), (in_features, out_features), param_dtype)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype

    def _dtype(self, x: Array, *others: Array | None) -> Any:
        return _dtypes.common_dtype(
            x, self.kernel[...], *others, override=self.dtype
        )


class CosineHead(Head):
    """Squashed cosine head: s ||x|| / (1 + ||x||) cos(x, w_c); see `longtail.heads.cosine`.

    Args:
      in_features: D.
      out_features: C.
      s: scale of the logits.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together. The arithmetic
        is in float32 or wider.
      param_dtype: of the kernel.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], nnx.Param.

    Example:
      >>> CosineHead(8, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 3)

    References:
      Liu et al., "Large-scale long-tailed recognition in an open world", arXiv
      1904.05160.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        s: float = 16.0,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, out_features, kernel_init, dtype, param_dtype, rngs
        )
        self.s = s

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """Map features [..., D] to logits [..., C]."""
        return heads.cosine(x, self.kernel[...], self.s).astype(self._dtype(x))


class NormedHead(Head):
    """Cosine head: s cos(x, w_c), the one that `longtail.ldam` needs; see `longtail.heads.normed`.

    Args:
      in_features: D.
      out_features: C.
      s: scale of the logits; 1 for LDAM, whose loss scales them.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together. The arithmetic
        is in float32 or wider.
      param_dtype: of the kernel.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], nnx.Param.

    Example:
      >>> z = NormedHead(8, 3, rngs=nnx.Rngs(0))(100 * jnp.ones((2, 8)))
      >>> bool(jnp.max(jnp.abs(z)) <= 1)
      True

    References:
      Cao et al., "Learning imbalanced datasets with label-distribution-aware margin
      loss", arXiv 1906.07413.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        s: float = 1.0,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, out_features, kernel_init, dtype, param_dtype, rngs
        )
        self.s = s

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """Map features [..., D] to logits [..., C] in [-s, s]."""
        return heads.normed(x, self.kernel[...], self.s).astype(self._dtype(x))


class LWSHead(Head):
    """Linear head with a learned factor per class: f_c (w_c . x + b_c); see `longtail.decoupling.lws`.

    Args:
      in_features: D.
      out_features: C.
      use_bias: whether there is a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the products and the logits; None = that of input and parameters
        together.
      param_dtype: of the parameters.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], bias [C], scale [C] (initially 1), all nnx.Param. The
    second stage trains scale alone, by the mask of `longtail.decoupling.lws`.

    Example:
      >>> LWSHead(8, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 3)

    References:
      Kang et al., "Decoupling representation and classifier", arXiv 1910.09217, section
      4.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, out_features, kernel_init, dtype, param_dtype, rngs
        )
        zeros = jnp.zeros(out_features, param_dtype)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)
        self.scale = nnx.Param(jnp.ones(out_features, param_dtype))
        self.use_bias = use_bias

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """Map features [..., D] to logits [..., C]."""
        # Scaled before it is rounded: the factors of rare classes may be large.
        bias = _compat.read(self.bias)
        dtype = self._dtype(x, bias)
        logits = _layers.affine(x, self.kernel[...], bias, dtype)
        return heads.lws(logits, self.scale[...]).astype(dtype)


class DisAlignHead(Head):
    """Linear head with adaptive calibration: (1 + sigma a_c) z_c + sigma b_c; see `longtail.heads.disalign`.

    sigma = sigmoid(x . v + v_0) says how far this example is calibrated.

    Args:
      in_features: D.
      out_features: C.
      use_bias: whether the linear head has a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      compat: as in `longtail.decoupling.disalign`: None starts without calibration,
        "reference" with a = 1 and v = 0.1.
      dtype: of the products and the logits; None = that of input and parameters
        together.
      param_dtype: of the parameters.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], bias [C], logit_scale [C], logit_bias [C],
    confidence_kernel [D, 1] and confidence_bias [1], all nnx.Param. The second stage
    trains the last four, by the mask of `longtail.decoupling.disalign`.

    Example:
      >>> DisAlignHead(8, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 3)

    References:
      Zhang et al., "Distribution alignment", arXiv 2103.16370, section 3.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Initializer | None = None,
        compat: decoupling.Compat = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, out_features, kernel_init, dtype, param_dtype, rngs
        )
        zeros = jnp.zeros(out_features, param_dtype)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)
        # The same start as that of the second stage on bare parameters.
        start = decoupling.disalign_start(
            (in_features, out_features), param_dtype, compat
        )
        self.logit_scale = nnx.Param(start["logit_scale"])
        self.logit_bias = nnx.Param(start["logit_bias"])
        self.confidence_kernel = nnx.Param(start["confidence_kernel"])
        self.confidence_bias = nnx.Param(start["confidence_bias"])
        self.use_bias = use_bias

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """Map features [..., D] to logits [..., C]."""
        bias = _compat.read(self.bias)
        dtype = self._dtype(x, bias)
        logits = _layers.affine(x, self.kernel[...], bias, dtype)
        return _layer_functions.calibrated(
            x, logits, lambda name: getattr(self, name)[...], dtype
        ).astype(dtype)


class CausalHead(Head):
    """De-confounded head: it knows the mean feature and subtracts it in evaluation; `longtail.heads.tde`.

    In training the logits are plain multi-head cosines, and the mean moves. The
    reference sums, m <- mu m + mean(x); this is (1 - mu) times that, and only the
    direction is used.

    Args:
      in_features: D.
      out_features: C.
      heads: K, which divides D.
      tau: scale of the logits.
      gamma: keeps large norms of w from being divided out in full.
      alpha: strength of the subtraction; 3 on ImageNet-LT, 1.5 on CIFAR-100-LT.
      momentum: mu, that of the optimizer: mean = mu mean + (1 - mu) mean(x).
      axis_name: mapped axes (shard_map, pmap, vmap) over which the mean is shared.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together. The arithmetic
        is in float32 or wider.
      param_dtype: of the kernel.
      use_running_average: True in evaluation; `model.train()` and `model.eval()` set
        it.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], nnx.Param; mean [D], nnx.BatchStat, float32 or wider,
    initially 0 (which subtracts nothing).

    Raises:
      ValueError: if `heads` does not divide D.

    Example:
      >>> head = CausalHead(8, 3, rngs=nnx.Rngs(0))
      >>> _ = head(jnp.ones((2, 8)))
      >>> round(float(head.mean[...][0]), 4)
      0.1

    References:
      Tang et al., "Long-tailed classification by keeping the good and removing the bad
      momentum causal effect", arXiv 2009.12991.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        heads: int = 2,
        tau: float = 16.0,
        gamma: float = 1 / 32,
        alpha: float = 3.0,
        momentum: float = 0.9,
        axis_name: Any = None,
        kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_running_average: bool | None = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features, out_features, kernel_init, dtype, param_dtype, rngs
        )
        self.mean = nnx.BatchStat(
            jnp.zeros(in_features, _layers.statistics_dtype(param_dtype))
        )
        self.heads = heads
        self.tau = tau
        self.gamma = gamma
        self.alpha = alpha
        self.momentum = momentum
        self.axis_name = axis_name
        self.use_running_average = use_running_average
        # Heads that do not divide the features fail here, not in the first step.
        jax.eval_shape(self._logits, jnp.zeros((1, in_features)), None)

    def _logits(self, x: Array, direction: Array | None) -> Array:
        settings = {
            name: getattr(self, name)
            for name in ("heads", "tau", "gamma", "alpha")
        }
        return tde(x, self.kernel[...], direction, **settings)

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        use_running_average: bool | None = None,
    ) -> Float[Array, "*batch C"]:
        """Map features [..., D] to logits [..., C]; in training the mean moves.

        Args:
          x: the features.
          use_running_average: overrides the setting of the module for this call.

        Raises:
          ValueError: neither the call nor the module says whether this is training.
        """
        evaluates = _layers.use_running_statistics(
            use_running_average, self.use_running_average, "CausalHead"
        )
        mean = self.mean[...]
        if not evaluates:
            self.mean[...] = _layers.moving_mean(
                mean, x, self.momentum, self.axis_name
            )
        return self._logits(x, mean if evaluates else None).astype(
            self._dtype(x)
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode, as `nnx.view(model, use_running_average=...)` asks."""
        if use_running_average is not None:
            self.use_running_average = use_running_average
