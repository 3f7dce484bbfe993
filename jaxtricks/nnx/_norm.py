"""Extended batch normalization as a layer: it owns scale, bias and running statistics."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _dtypes, ebn
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat

Initializer = Callable[..., Any]


class Running(NamedTuple):
    """Running statistics.

    Attributes:
      mean: [C].
      var: [].
    """

    mean: Array
    var: Array


def statistics_dtype(param_dtype: Any) -> Any:
    """Of running statistics: float32, or float64 where the parameters are."""
    return _dtypes.wide_dtype(jax.ShapeDtypeStruct((), param_dtype))


def batch_statistics(
    x: Array,
    running: Running,
    *,
    momentum: float,
    mask: Array | None,
    axis_name: Any,
    variance: Literal["channel", "grand"],
) -> tuple[Running, Running]:
    """(statistics of this batch, updated running statistics).

    running = momentum * running + (1 - momentum) * batch; a batch whose mask is empty
    changes nothing.
    """
    found = ebn.moments(x, mask=mask, axis_name=axis_name, variance=variance)

    def step(old: Array, new: Array) -> Array:
        moved = momentum * old + (1 - momentum) * jax.lax.stop_gradient(new).astype(
            old.dtype
        )
        return jnp.where(found.count > 0, moved, old)

    updated = Running(step(running.mean, found.mean), step(running.var, found.var))
    return Running(found.mean, found.var), updated


def normalize_to(
    x: Array,
    stats: Running,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: float,
    dtype: Any,
) -> Array:
    """`ebn.normalize` whose result has `dtype` (None: that of x, scale and bias together)."""
    out = _dtypes.common_dtype(x, scale, bias, given=dtype)
    wide = jnp.asarray(x, _dtypes.wide_dtype(x))
    return ebn.normalize(
        wide, stats.mean, stats.var, scale, bias, epsilon=epsilon
    ).astype(out)


class ExtendedBatchNorm(nnx.Module):
    """Batch normalization with one variance for all channels; stands where nnx.BatchNorm stands.

    y = (x - mean_c) / sqrt(var + epsilon) * scale_c + bias_c; see
    `ebn.extended_moments`. In training, mean and var are the batch's and move the
    running ones; in evaluation they are the running ones.

    Args:
      num_features: channels C, the last axis of the input.
      momentum: running = momentum * running + (1 - momentum) * batch.
      epsilon: added to the variance, inside the root.
      use_scale: whether a factor per channel is learned.
      use_bias: whether an offset per channel is learned.
      variance: "channel" (about the channels' means) or "grand" (about the grand mean).
      axis_name: mapped axes (shard_map, pmap, vmap) over which statistics are shared.
      scale_init: initializer of scale; None = ones.
      bias_init: initializer of bias; None = zeros.
      dtype: of the output; None = that of input and parameters together. Statistics are
        float32 or better.
      param_dtype: of scale and bias.
      use_running_average: True in evaluation; `model.train()` and `model.eval()` set
        it.
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
        wide = statistics_dtype(param_dtype)
        self.mean = nnx.BatchStat(jnp.zeros(shape, wide))
        self.var = nnx.BatchStat(jnp.ones((), wide))
        self.scale = (
            nnx.Param(scale_init(rngs.params(), shape, param_dtype))
            if use_scale
            else nnx.data(None)
        )
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape, param_dtype))
            if use_bias
            else nnx.data(None)
        )
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
        """Normalized x; in training the running statistics move.

        Args:
          x: [..., C].
          use_running_average: overrides the module's own setting for this call.
          mask: which entries count, see `ebn.extended_moments`; all of x is normalized.

        Raises:
          ValueError: neither the call nor the module says which statistics to use.
        """
        running = Running(self.mean[...], self.var[...])
        if choose(use_running_average, self.use_running_average):
            stats = running
        else:
            stats, updated = batch_statistics(
                x,
                running,
                momentum=self.momentum,
                mask=mask,
                axis_name=self.axis_name,
                variance=self.variance,
            )
            self.mean[...] = updated.mean
            self.var[...] = updated.var
        scale, bias = _compat.read(self.scale), _compat.read(self.bias)
        return normalize_to(
            x, stats, scale, bias, epsilon=self.epsilon, dtype=self.dtype
        )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view(model, use_running_average=...)` calls."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def choose(
    call: bool | None, module: bool | None, name: str = "ExtendedBatchNorm"
) -> bool:
    """The call's setting, else the module's."""
    chosen = module if call is None else call
    if chosen is None:
        raise ValueError(
            f"{name} needs `use_running_average`: give it in the call or the constructor, or use "
            "model.train() / model.eval()"
        )
    return chosen
