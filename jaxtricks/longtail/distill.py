"""Distillation for long-tailed data: the targets of a teacher, flattened towards the tail."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import are_classes, as_mask, floating, same_shape
from jaxtricks.longtail._softmax import floor

__all__ = [
    "Dive",
    "dive",
    "kd",
    "kl_divergence",
]

Loss = Callable[..., Array]
"""loss(logits [..., C], labels, where=None) -> per-example [...]: any loss of the room."""


@checked
def kd(
    logits: Float[Array, "*batch C"],
    teacher: Float[Array, "*batch C"],
    temperature: Scalar = 3.0,
    power: Scalar = 1.0,
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Distillation loss: T^2 KL(t || softmax(z / T)), t ~ softmax(teacher / T)^power.

    Args:
      logits: [..., C] of the student.
      teacher: [..., C] logits of the teacher; no gradient goes to it.
      temperature: T > 0. May be traced.
      power: below 1 it flattens the targets, beyond what T does to both. May be traced.
      where: [...] booleans; a masked example costs 0, whatever it holds.

    Returns:
      [...] losses in float32 or wider.

    >>> kd(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]))
    Array([0.], dtype=float32)

    References:
      Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531.
    """
    z = floating(jnp.asarray(logits))
    t = jax.lax.stop_gradient(same_shape("teacher", teacher, z.shape)).astype(z.dtype)
    if (
        where is not None
    ):  # before the arithmetic: 0 times the gradient of a NaN is a NaN
        keep = as_mask(where, z.shape[:-1])[..., None]
        z, t = jnp.where(keep, z, 0), jnp.where(keep, t, 0)
    temperature, power = (jnp.asarray(x).astype(z.dtype) for x in (temperature, power))
    return temperature**2 * kl_divergence(power * t / temperature, z / temperature)


@checked
def kl_divergence(
    p: Float[Array, "*batch C"], q: Float[Array, "*batch C"]
) -> Float[Array, "*batch"]:
    """KL(softmax(p) || softmax(q)) of logits, finite where both say -inf."""
    p, q = (jnp.maximum(x, floor(x)) for x in (p, q))
    log_p, log_q = jax.nn.log_softmax(p, axis=-1), jax.nn.log_softmax(q, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@node
class Dive:
    """The loss of `dive`: a pytree, and callable with a teacher.

    Attributes:
      base: the loss on the labels.
      alpha: share of the distillation loss.
      temperature: of student and teacher.
      power: that flattens the teacher's probabilities.
    """

    base: Loss
    alpha: Scalar
    temperature: Scalar
    power: Scalar

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        teacher: Float[Array, "*batch C"],
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example; as `SoftmaxLoss`, and `teacher` [..., C] the teacher's logits."""
        own = self.base(logits, labels, where=where)
        other = kd(logits, teacher, self.temperature, self.power, where=where)
        other = jnp.where(are_classes(labels, logits.shape[-1]), other, 0)
        alpha = jnp.asarray(self.alpha).astype(own.dtype)
        return alpha * other.astype(own.dtype) + (1 - alpha) * own


@checked
def dive(
    base: Loss, *, alpha: Scalar = 0.5, temperature: Scalar = 3.0, power: Scalar = 0.5
) -> Dive:
    """Distilling virtual examples: alpha kd(z, teacher; T, power) + (1 - alpha) base(z, y).

    A teacher trained with `balanced_softmax` gives the tail more probability than its
    labels do; what it says of a head image about tail classes stands for examples that
    are not there.

    Args:
      base: the loss on the labels, `balanced_softmax(counts)` in the paper.
      alpha: share of the distillation loss. May be traced.
      temperature: T > 0, 2 or 3 in the paper. May be traced.
      power: that flattens the teacher's probabilities; 1 is plain distillation. May be
        traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], teacher= [..., C], where=None) ->
      per-example [...].

    >>> from jaxtricks.longtail._losses import balanced_softmax
    >>> loss = dive(balanced_softmax([90, 10]))
    >>> loss(jnp.zeros((1, 2)), jnp.array([0]), teacher=jnp.zeros((1, 2))).round(4)
    Array([0.0527], dtype=float32)

    References:
      He et al., Distilling virtual examples for long-tailed recognition, arXiv
      2103.15042.
    """
    return Dive(base, alpha, temperature, power)
