"""RIDE: experts that are each trained on the labels, and pushed away from their mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import Counts, are_classes, as_mask, as_vector, floating
from jaxtricks.longtail.distill import Loss, kl_divergence
from jaxtricks.longtail.presets import cross_entropy


@checked
def aggregate(
    logits: Float[Array, "E *batch C"], weights: Float[Array, "E"] | None = None
) -> Float[Array, "*batch C"]:
    """One prediction of all experts: sum_e w_e z_e, the mean without weights.

    Args:
      logits: [E, ..., C].
      weights: [E], which should sum to 1 (`fit_weights`), or None.

    Returns:
      [..., C] logits in float32 or wider; -inf where any expert of positive weight says so.

    Raises:
      ValueError: if there is not one weight per expert.

    >>> aggregate(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
    Array([2., 0.], dtype=float32)
    """
    z = floating(jnp.asarray(logits))
    if weights is None:
        return jnp.mean(z, axis=0)
    w = jnp.asarray(weights).astype(z.dtype)
    if w.shape != z.shape[:1]:
        raise ValueError(
            f"longtail.experts.aggregate: `weights` has shape {w.shape} for {z.shape[0]} experts: "
            "pass one number per expert"
        )
    w = w.reshape(w.shape + (1,) * (z.ndim - 1))
    return jnp.sum(jnp.where(w != 0, w * z, 0), axis=0)


@checked
def divergence(
    logits: Float[Array, "E *batch C"],
    temperature: Scalar | Float[Array, "C"] = 1.0,
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """How far the experts are from their mean: mean(T)^2 sum_e KL(softmax(zbar/T) || softmax(z_e/T)).

    zbar is the mean of the logits. It is held constant; the gradient through it sums to zero anyway.

    Args:
      logits: [E, ..., C].
      temperature: T > 0, or [C] one for each class. May be traced.
      where: [...] booleans; a masked example has divergence 0, whatever it holds.

    Returns:
      [...] divergences in float32 or wider, >= 0.
    """
    z = floating(jnp.asarray(logits))
    if where is not None:
        z = jnp.where(as_mask(where, z.shape[1:-1])[None, ..., None], z, 0)
    t = jnp.asarray(temperature).astype(z.dtype)
    mean = jax.lax.stop_gradient(jnp.mean(z, axis=0, keepdims=True))
    z, mean = (x / t.reshape((1,) * (z.ndim - t.ndim) + t.shape) for x in (z, mean))
    each = jax.vmap(lambda expert: kl_divergence(mean[0], expert))(z)
    return jnp.mean(t) ** 2 * jnp.sum(each, axis=0)


@node
class Ride:
    """The loss of `ride`: a pytree where its base is one, and callable.

    Attributes:
      base: the loss of each expert.
      diversity: factor of the divergence; below 0 it drives the experts apart.
      temperature: scalar or [C], of the divergence.
    """

    base: Loss
    diversity: Scalar
    temperature: Scalar | Array

    @checked
    def __call__(
        self,
        logits: Float[Array, "E *batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example, summed over the experts; `logits` are [E, ..., C]."""
        own = jnp.sum(jax.vmap(lambda z: self.base(z, labels, where=where))(logits), axis=0)
        apart = divergence(logits, self.temperature, where=where).astype(own.dtype)
        apart = jnp.where(are_classes(labels, logits.shape[-1]), apart, 0)
        return own + jnp.asarray(self.diversity).astype(own.dtype) * apart


@checked
def ride(
    base: Loss | None = None,
    counts: Counts | None = None,
    *,
    diversity: Scalar = -0.2,
    temperature: Scalar = 1.0,
    reweight: Scalar = 0.05,
) -> Ride:
    """RIDE: sum_e base(z_e, y) + diversity mean(T)^2 KL(softmax(zbar / T) || softmax(z_e / T)).

    With counts the temperature of class c is T_c = temperature v_c / max v, v_c = C pi_c r + 1 - r,
    r = reweight: the experts may differ more on rare classes. The reference turns that on together
    with the class weights of its base loss, at epoch 160 of 200.

    Args:
      base: loss(logits [..., C], labels, where=) of each expert, any of the room; None is cross
        entropy. The reference has LDAM on logits that its cosine heads have scaled by s already:
        `ldam(counts, max_margin=0.5 * s, s=1.0)`.
      counts: [C] training examples per class, or None for one temperature. May be traced.
      diversity: factor of the divergence; -0.2 is the reference's default, -0.45 its CIFAR setting.
        May be traced.
      temperature: T > 0. May be traced.
      reweight: r in [0, 1), how much the temperature follows the counts. May be traced.

    Returns:
      loss(logits [E, ..., C], labels [...] or [..., C], where=None) -> per-example [...]. It is not
      bounded below: a diversity of -1 diverges.

    >>> loss = ride(diversity=0.0)
    >>> loss(jnp.zeros((3, 1, 2)), jnp.array([0])).round(4)
    Array([2.0794], dtype=float32)

    References:
      Wang et al., Long-tailed recognition by routing diverse distribution-aware experts,
      arXiv 2010.01809.
    """
    base = cross_entropy() if base is None else base
    if counts is None:
        return Ride(base, diversity, temperature)
    n = floating(as_vector("experts.ride: `counts`", counts))
    r, top = (jnp.asarray(x).astype(n.dtype) for x in (reweight, temperature))
    v = n.shape[0] * r * n / jnp.maximum(jnp.sum(n), 1) + 1 - r
    return Ride(base, diversity, top * v / jnp.max(v))
