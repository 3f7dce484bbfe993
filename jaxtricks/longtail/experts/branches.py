"""BBN: two branches, one on examples as they come and one on reversed sampling, mixed by a schedule."""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail import weights
from jaxtricks.longtail.distill import Loss
from jaxtricks.longtail.presets import cross_entropy


@node
class Bbn:
    """The loss of `bbn` and its mixer: a pytree where its base is one, and callable.

    Attributes:
      total: steps of the schedule.
      base: the loss of each branch.
    """

    total: Scalar
    base: Loss

    def share(self, step: Scalar) -> Float[Array, ""]:
        """a = 1 - (step / total)^2 of the conventional branch, 0 from `total` on; step from 0."""
        return weights.bbn(step, self.total)

    @checked
    def mix(
        self,
        conventional: Float[Array, "*batch D"],
        reversed_: Float[Array, "*batch D"],
        step: Scalar | None = None,
    ) -> Float[Array, "*batch F"]:
        """What the classifier sees: 2 [a f_c, (1 - a) f_r], one after the other.

        A linear head on it is the sum of two heads, 2 a W_c f_c + 2 (1 - a) W_r f_r.

        Args:
          conventional: [..., D] features of that branch.
          reversed_: [..., D] features of the other one.
          step: current step, counted from 0; None at test time, where a = 1/2.

        Returns:
          [..., 2 D] in the dtype of the features.
        """
        a = jnp.asarray(0.5) if step is None else self.share(step)
        parts = [
            2 * a.astype(conventional.dtype) * conventional,
            2 * (1 - a).astype(reversed_.dtype) * reversed_,
        ]
        return jnp.concatenate(parts, axis=-1)

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        reversed_labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        step: Scalar,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """a base(z, y_c) + (1 - a) base(z, y_r) of every pair of examples.

        Args:
          logits: [..., C] of the mixed features.
          labels: [...] or [..., C], of the examples that the conventional branch saw.
          reversed_labels: the same for the other branch.
          step: current step, counted from 0; may be traced.
          where: [...] booleans; a masked pair costs 0.

        Returns:
          [...] losses in float32 or wider.
        """
        first, second = (self.base(logits, y, where=where) for y in (labels, reversed_labels))
        a = self.share(step).astype(first.dtype)
        return a * first + (1 - a) * second


@checked
def bbn(total: Scalar, base: Loss | None = None) -> Bbn:
    """Bilateral-branch network: the mixer of two branches and their loss, a = 1 - (t / total)^2.

    One branch sees examples as they come, the other as a sampler with class probabilities ~ 1 / n_c
    draws them. Training goes from the first to the second. The branches share the trunk but for
    their last block.

    Args:
      total: steps of the run, counted as `step` is (steps or epochs). The reference stretches 90
        and 180 epochs to 100 and 200, so that the last ones are not the reversed branch's alone.
        May be traced.
      base: loss(logits [..., C], labels, where=) of each branch; None is cross entropy.

    Returns:
      A pytree: `.mix(f_c, f_r, step)`, `.share(step)`, and loss(logits, labels, reversed_labels,
      step=, where=None) -> per-example [...].

    >>> branch = bbn(200)
    >>> branch.mix(jnp.ones(1), jnp.ones(1), step=100)
    Array([1.5, 0.5], dtype=float32)
    >>> branch(jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([1]), step=200).round(3)
    Array([2.127], dtype=float32)

    References:
      Zhou et al., BBN, arXiv 1912.02413.
    """
    return Bbn(total, cross_entropy() if base is None else base)
