"""From per-example losses to one number, with the denominator said out loud."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float, Real

from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.longtail._counts import floating, same_shape


@checked
def reduce(
    per_example: Float[Array, "*batch"],
    weights: Real[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    kind: Literal["mean", "weighted_mean", "sum"] = "mean",
) -> Float[Array, ""]:
    """Reduce per-example losses: sum w l over N, over sum w, or over 1.

    "mean" is sum(w l) / N (what Cui's TensorFlow code does), "weighted_mean" is sum(w l) / sum(w)
    (what torch does with class weights), "sum" is sum(w l). The weights are applied here, so give
    it the unweighted loss: `reduce(cross_entropy()(z, y), w[y], "weighted_mean")`; a loss that has
    class weights already needs none here.

    Args:
      per_example: [...] losses of any shape.
      weights: [...] weight of every example, a mask of the ones that count, or None for ones.
      kind: "mean", "weighted_mean" or "sum".

    Returns:
      A scalar in float32 or wider; 0 where there is nothing to average. An example of weight 0
      contributes nothing, whatever its loss.

    Raises:
      ValueError: for another kind.

    >>> reduce(jnp.array([1.0, 3.0]), jnp.array([3.0, 1.0]), "weighted_mean")
    Array(1.5, dtype=float32)
    """
    if kind not in ("mean", "weighted_mean", "sum"):
        raise ValueError(
            f'longtail.reduce: `kind` is {kind!r}: pass "mean", "weighted_mean" or "sum"'
        )
    losses = floating(jnp.asarray(per_example))
    w = jnp.ones_like(losses)
    if weights is not None:
        w = same_shape("weights", weights, losses.shape).astype(losses.dtype)
    total = jnp.sum(jnp.where(w != 0, w * losses, 0))
    if kind == "sum":
        return total
    over = jnp.sum(w) if kind == "weighted_mean" else jnp.asarray(losses.size, losses.dtype)
    return total / jnp.where(over != 0, over, 1)
