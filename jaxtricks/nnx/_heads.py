"""Classifier heads for long-tailed data as layers, around the functions of `longtail.heads`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _tree
from jaxtricks._typing import Array
from jaxtricks.longtail import decoupling, heads
from jaxtricks.nnx import _compat

Initializer = Callable[..., Any]


def unit_columns() -> Initializer:
    """Normal with variance 1 / fan_in: a head's columns have norms near 1."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def affine(x: Array, kernel: Array, bias: Array | None, dtype: Any) -> Array:
    """x @ kernel + bias, multiplied in `dtype` and summed in float32 or wider."""
    wide = _tree.wide_dtype(jax.ShapeDtypeStruct((), dtype))
    y = jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=wide)
    return y if bias is None else y + bias.astype(wide).reshape((1,) * (y.ndim - 1) + (-1,))


def calibrated(
    x: Array, logits: Array, own: Callable[[str], Array], dtype: Any
) -> Float[Array, "*batch C"]:
    """`heads.disalign` with the parameters own(name)."""
    confidence = affine(x, own("confidence_kernel"), own("confidence_bias"), dtype)[..., 0]
    return heads.disalign(logits, confidence, own("logit_scale"), own("logit_bias"))


class Head(nnx.Module):
    """What the heads share: a kernel [D, C], and the dtype of the logits."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_init: Initializer | None,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = unit_columns() if kernel_init is None else kernel_init
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), param_dtype))
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype

    def _dtype(self, x: Array, *others: Array | None) -> Any:
        return _tree.common_dtype(x, self.kernel[...], *others, given=self.dtype)


class CosineHead(Head):
    """Squashed cosine head: s ||x|| / (1 + ||x||) cos(x, w_c); see `longtail.heads.cosine`.

    Args:
      in_features: D.
      out_features: C.
      s: scale of the logits.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together. The arithmetic is in float32
        or wider.
      param_dtype: of the kernel.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], nnx.Param.

    Example:
      >>> CosineHead(8, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 3)

    References:
      Liu et al., "Large-scale long-tailed recognition in an open world", arXiv 1904.05160.
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
        super().__init__(in_features, out_features, kernel_init, dtype, param_dtype, rngs)
        self.s = s

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """[..., D] features -> [..., C] logits."""
        return heads.cosine(x, self.kernel[...], self.s).astype(self._dtype(x))


class NormedHead(Head):
    """Cosine head: s cos(x, w_c), the one that `longtail.ldam` needs; see `longtail.heads.normed`.

    Args:
      in_features: D.
      out_features: C.
      s: scale of the logits; 1 for LDAM, whose loss has its own.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the logits; None = that of input and parameters together. The arithmetic is in float32
        or wider.
      param_dtype: of the kernel.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], nnx.Param.

    Example:
      >>> z = NormedHead(8, 3, rngs=nnx.Rngs(0))(100 * jnp.ones((2, 8)))
      >>> bool(jnp.max(jnp.abs(z)) <= 1)
      True

    References:
      Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", arXiv 1906.07413.
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
        super().__init__(in_features, out_features, kernel_init, dtype, param_dtype, rngs)
        self.s = s

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """[..., D] features -> [..., C] logits in [-s, s]."""
        return heads.normed(x, self.kernel[...], self.s).astype(self._dtype(x))


class LWSHead(Head):
    """Linear head with a learned factor per class: f_c (w_c . x + b_c); see `longtail.decoupling.lws`.

    Args:
      in_features: D.
      out_features: C.
      use_bias: whether there is a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      dtype: of the products and the logits; None = that of input and parameters together.
      param_dtype: of the parameters.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], bias [C], scale [C] (initially 1), all nnx.Param. The second stage trains
    scale alone, by the mask of `longtail.decoupling.lws`.

    Example:
      >>> LWSHead(8, 3, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
      (2, 3)

    References:
      Kang et al., "Decoupling representation and classifier", arXiv 1910.09217, section 4.2.
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
        super().__init__(in_features, out_features, kernel_init, dtype, param_dtype, rngs)
        zeros = jnp.zeros(out_features, param_dtype)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)
        self.scale = nnx.Param(jnp.ones(out_features, param_dtype))
        self.use_bias = use_bias

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """[..., D] features -> [..., C] logits."""
        bias = _compat.read(self.bias)
        dtype = self._dtype(x, bias)
        logits = affine(x, self.kernel[...], bias, dtype)
        return heads.lws(logits, self.scale[...]).astype(dtype)


class DisAlignHead(Head):
    """Linear head with adaptive calibration: (1 + sigma a_c) z_c + sigma b_c; see `longtail.heads.disalign`.

    sigma = sigmoid(x . v + v_0) says how far this example is calibrated.

    Args:
      in_features: D.
      out_features: C.
      use_bias: whether the linear head has a bias.
      kernel_init: initializer; None = normal with variance 1 / D.
      compat: as in `longtail.decoupling.disalign`: None starts without calibration, "reference" with a
        = 1 and v = 0.1.
      dtype: of the products and the logits; None = that of input and parameters together.
      param_dtype: of the parameters.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], bias [C], logit_scale [C], logit_bias [C], confidence_kernel [D, 1] and
    confidence_bias [1], all nnx.Param. The second stage trains the last four, by the mask of
    `longtail.decoupling.disalign`.

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
        super().__init__(in_features, out_features, kernel_init, dtype, param_dtype, rngs)
        zeros = jnp.zeros(out_features, param_dtype)
        self.bias = nnx.Param(zeros) if use_bias else nnx.data(None)
        start = decoupling.disalign_start((in_features, out_features), param_dtype, compat)
        self.logit_scale = nnx.Param(start["logit_scale"])
        self.logit_bias = nnx.Param(start["logit_bias"])
        self.confidence_kernel = nnx.Param(start["confidence_kernel"])
        self.confidence_bias = nnx.Param(start["confidence_bias"])
        self.use_bias = use_bias

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch C"]:
        """[..., D] features -> [..., C] logits."""
        bias = _compat.read(self.bias)
        dtype = self._dtype(x, bias)
        logits = affine(x, self.kernel[...], bias, dtype)
        return calibrated(x, logits, lambda name: getattr(self, name)[...], dtype).astype(dtype)
