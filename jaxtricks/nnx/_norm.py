"""Normalizations: ExtendedBatchNorm, and one of nnx with its statistics frozen."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _layer_functions, _layers, reparam
from jaxtricks._layer_functions import RunningStatistics
from jaxtricks._layers import Initializer
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat


class ExtendedBatchNorm(nnx.Module):
    """Batch normalization with one variance for all channels, in place of nnx.BatchNorm.

    y = (x - mean_c) / sqrt(var + epsilon) * scale_c + bias_c; see
    `ebn.extended_moments`. In training, mean and var are those of the batch and move
    the running ones; in evaluation they are the running ones.

    Args:
      num_features: channels C, the last axis of the input.
      momentum: running = momentum * running + (1 - momentum) * batch.
      epsilon: added to the variance, inside the root.
      use_scale: whether a factor per channel is learned.
      use_bias: whether an offset per channel is learned.
      variance: "channel" (about the means of the channels) or "grand" (about the grand
        mean).
      axis_name: mapped axes (shard_map, pmap, vmap) over which statistics are shared.
      scale_init: initializer of scale; None = ones.
      bias_init: initializer of bias; None = zeros.
      dtype: of the output; None = that of input and parameters together. Statistics are
        float32 or better.
      param_dtype: of scale and bias.
      use_running_average: True in evaluation; `model.train()` and `model.eval()` set it.
      rngs: keys; "params" is used.

    Variables: scale [C] and bias [C], nnx.Param; mean [C] and var [], nnx.BatchStat,
      float32 (float64 for float64 parameters).

    Example:
      >>> norm = ExtendedBatchNorm(4, rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 5, 5, 4))).shape, norm.var.shape
      ((2, 5, 5, 4), ())

    References:
      Luo, Peng, "Extended Batch Normalization", arXiv 2003.05569.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        use_scale: bool = True,
        use_bias: bool = True,
        variance: Literal["channel", "grand"] = "channel",
        axis_name: Any = None,
        scale_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_running_average: bool | None = False,
        rngs: nnx.Rngs,
    ):
        shape = (num_features,)
        scale_init = scale_init or jax.nn.initializers.ones
        bias_init = bias_init or jax.nn.initializers.zeros
        # Sixteen bits would stop a running mean with momentum 0.99 from moving.
        wide = _layers.statistics_dtype(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(shape, wide))
        self.var = nnx.BatchStat(jnp.ones((), wide))
        scale = bias = nnx.data(None)
        if use_scale:
            scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        if use_bias:
            bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype))
        self.scale = scale
        self.bias = bias
        self.num_features = num_features
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_scale = use_scale
        self.use_bias = use_bias
        self.variance = variance
        self.axis_name = axis_name
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_running_average = use_running_average

    def __call__(
        self,
        x: Float[Array, "*batch C"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Float[Array, "*batch C"]:
        """Return x normalized; in training the running statistics move.

        Args:
          x: [..., C].
          use_running_average: overrides the setting of the module for this call.
          mask: which entries count, see `ebn.extended_moments`; all of x is normalized.

        Raises:
          ValueError: neither the call nor the module says which statistics to use.
        """
        # Read before they move: the update needs the old values.
        running = RunningStatistics(self.mean[...], self.var[...])
        if _layers.use_running_statistics(
            use_running_average, self.use_running_average, "ExtendedBatchNorm"
        ):
            statistics = running
        else:
            statistics, updated = _layer_functions.batch_statistics(
                x,
                running,
                momentum=self.momentum,
                mask=mask,
                axis_name=self.axis_name,
                variance=self.variance,
            )
            self.mean[...] = updated.mean
            self.var[...] = updated.var
        return _layer_functions.normalize_to(
            x,
            statistics,
            _compat.read(self.scale),
            _compat.read(self.bias),
            epsilon=self.epsilon,
            dtype=self.dtype,
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode, as `nnx.view(model, use_running_average=...)` asks."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def frozen_norm(norm: Any) -> reparam.Norm:
    """Return a normalization with its running statistics as a node of `reparam`.

    Raises:
      ValueError: it has no running statistics.
    """
    # Layer and group normalization have the statistics of each example instead.
    if not (hasattr(norm, "mean") and hasattr(norm, "var")):
        raise ValueError(
            f"nnx: {type(norm).__name__} has no running statistics and does "
            "not fuse; use nnx.BatchNorm or ExtendedBatchNorm"
        )
    scale, bias = _compat.read(norm.scale), _compat.read(norm.bias)
    return reparam.Norm(
        norm.mean[...], norm.var[...], scale, bias, norm.epsilon
    )
