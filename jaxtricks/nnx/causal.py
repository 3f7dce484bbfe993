"""The classifier head that keeps a running mean of its features, around `longtail.heads.tde`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _tree
from jaxtricks._typing import Array
from jaxtricks.longtail.heads import tde
from jaxtricks.nnx._heads import Head, Initializer
from jaxtricks.nnx._norm import choose, statistics_dtype


def moving_mean(mean: Array, x: Array, momentum: float, axis_name: Any) -> Array:
    """momentum mean + (1 - momentum) (mean of x over all but its last axis and the mapped axes)."""
    x = jax.lax.stop_gradient(x).astype(_tree.wide_dtype(x)).reshape(-1, x.shape[-1])
    batch = jnp.mean(x, axis=0)
    batch = batch if axis_name is None else jax.lax.pmean(batch, axis_name)
    return momentum * mean + (1 - momentum) * batch.astype(mean.dtype)


class CausalHead(Head):
    """De-confounded head: it knows the mean feature and subtracts it in evaluation; `longtail.heads.tde`.

    In training the logits are plain multi-head cosines, and the mean moves. The reference sums, m <-
    mu m + mean(x); this is (1 - mu) times that, and only the direction is used.

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
      dtype: of the logits; None = that of input and parameters together. The arithmetic is in float32
        or wider.
      param_dtype: of the kernel.
      use_running_average: True in evaluation; `model.train()` and `model.eval()` set it.
      rngs: keys; "params" is used.

    Variables: kernel [D, C], nnx.Param; mean [D], nnx.BatchStat, float32 or wider, initially 0 (which
    subtracts nothing).

    Raises:
      ValueError: if `heads` does not divide D.

    Example:
      >>> head = CausalHead(8, 3, rngs=nnx.Rngs(0))
      >>> _ = head(jnp.ones((2, 8)))
      >>> round(float(head.mean[...][0]), 4)
      0.1

    References:
      Tang et al., "Long-tailed classification by keeping the good and removing the bad momentum causal
      effect", arXiv 2009.12991.
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
        super().__init__(in_features, out_features, kernel_init, dtype, param_dtype, rngs)
        self.mean = nnx.BatchStat(jnp.zeros(in_features, statistics_dtype(param_dtype)))
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
        settings = {name: getattr(self, name) for name in ("heads", "tau", "gamma", "alpha")}
        return tde(x, self.kernel[...], direction, **settings)

    def __call__(
        self, x: Float[Array, "*batch D"], use_running_average: bool | None = None
    ) -> Float[Array, "*batch C"]:
        """[..., D] features -> [..., C] logits; in training the mean moves.

        Args:
          x: the features.
          use_running_average: overrides the module's own setting for this call.

        Raises:
          ValueError: neither the call nor the module says whether this is training.
        """
        evaluates = choose(use_running_average, self.use_running_average, "CausalHead")
        mean = self.mean[...]
        if not evaluates:
            self.mean[...] = moving_mean(mean, x, self.momentum, self.axis_name)
        return self._logits(x, mean if evaluates else None).astype(self._dtype(x))

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view(model, use_running_average=...)` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average
