"""Distill a teacher's targets, flattened towards the tail."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import as_mask, floating, same_shape
from jaxtricks.longtail._softmax import floor

__all__ = [
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
    """Compute the distillation loss.

    T^2 KL(t || softmax(z / T)), t ~ softmax(teacher / T)^power

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
    t = jax.lax.stop_gradient(same_shape("teacher", teacher, z.shape)).astype(
        z.dtype
    )
    # Before the arithmetic: 0 times the gradient of a NaN is a NaN.
    if where is not None:
        keep = as_mask(where, z.shape[:-1])[..., None]
        z = jnp.where(keep, z, 0)
        t = jnp.where(keep, t, 0)
    temperature = jnp.asarray(temperature).astype(z.dtype)
    power = jnp.asarray(power).astype(z.dtype)
    return temperature**2 * kl_divergence(
        power * t / temperature, z / temperature
    )


@checked
def kl_divergence(
    p: Float[Array, "*batch C"], q: Float[Array, "*batch C"]
) -> Float[Array, "*batch"]:
    """Compute KL(softmax(p) || softmax(q)) of logits, finite where both are -inf."""
    p = jnp.maximum(p, floor(p))
    q = jnp.maximum(q, floor(q))
    log_p = jax.nn.log_softmax(p, axis=-1)
    log_q = jax.nn.log_softmax(q, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
