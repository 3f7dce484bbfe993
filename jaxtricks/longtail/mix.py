"""Mix examples inside jit: mixup, and two variants that favour rare classes."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer, Real

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Key, Scalar
from jaxtricks.longtail._counts import (
    Counts,
    as_vector,
    at_least_rarest,
    class_indices,
    floating,
)

__all__ = [
    "mixup",
    "remix",
    "unimix",
]


@checked
def mixup(
    key: Key,
    x: Real[Array, "N ..."],
    labels: Integer[Array, "N"] | Float[Array, "N C"],
    num_classes: int,
    alpha: Scalar = 1.0,
) -> tuple[Float[Array, "N ..."], Float[Array, "N C"]]:
    """Mix examples and labels by one share per batch.

    lam x_i + (1 - lam) x_j, lam ~ Beta(alpha, alpha)

    Args:
      key: typed PRNG key, new each step.
      x: [N, ...] examples; j is a permutation of them.
      labels: [N] integers in [0, C), or [N, C] probabilities.
      num_classes: C; static.
      alpha: > 0; 1 on CIFAR, 0.2 on ImageNet. May be traced.

    Returns:
      The mixed examples (dtype of x, float32 for integers) and [N, C] soft labels,
      which every loss of this room takes.

    Raises:
      ValueError: if alpha is a number <= 0.

    References:
      Zhang et al., mixup, arXiv 1710.09412.
    """
    lam, partner = _draw("mixup", key, jnp.asarray(x).shape[0], alpha)
    q = _soft(labels, num_classes)
    return _blend(x, partner, lam), _blend(q, partner, lam)


@checked
def remix(
    key: Key,
    x: Real[Array, "N ..."],
    labels: Integer[Array, "N"],
    counts: Counts,
    alpha: Scalar = 1.0,
    kappa: Scalar = 3.0,
    tau: Scalar = 0.5,
) -> tuple[Float[Array, "N ..."], Float[Array, "N C"]]:
    """Mix examples as `mixup`, and give the label to a much rarer class.

    The share of label i is

    0 if n_i / n_j >= kappa and lam < tau
    1 if n_i / n_j <= 1 / kappa and 1 - lam < tau
    lam otherwise

    With balanced counts it is mixup (kappa > 1).

    Args:
      key: typed PRNG key, new each step.
      x: [N, ...] examples.
      labels: [N] integers in [0, C).
      counts: [C] training examples per class; may be traced. One without any counts as
        the rarest.
      alpha: > 0, of Beta(alpha, alpha). May be traced.
      kappa: ratio of the counts from which on a class is much rarer. May be traced.
      tau: bound on the other one's share of the example. May be traced.

    Returns:
      The mixed examples (dtype of x, float32 for integers) and [N, C] soft labels.

    Raises:
      ValueError: if alpha is a number <= 0.

    References:
      Chou et al., Remix: rebalanced mixup, arXiv 2007.03943.
    """
    n = at_least_rarest(as_vector("mix.remix: `counts`", counts))
    labels = class_indices(labels)
    lam, partner = _draw("remix", key, labels.shape[0], alpha)
    kappa = jnp.asarray(kappa).astype(jnp.float32)
    tau = jnp.asarray(tau).astype(jnp.float32)
    count = n[labels]
    partner_count = n[labels[partner]]
    kappa = kappa.astype(count.dtype)
    to_partner = (count >= kappa * partner_count) & (lam < tau)
    to_first = (kappa * count <= partner_count) & (1 - lam < tau)
    share = jnp.where(to_partner, 0, jnp.where(to_first, 1, lam))
    return _blend(x, partner, lam), _blend(
        _soft(labels, n.shape[0]), partner, share
    )


@checked
def unimix(
    key: Key,
    x: Real[Array, "N ..."],
    labels: Integer[Array, "N"],
    counts: Counts,
    alpha: Scalar = 0.8,
    tau: Scalar = -0.1,
) -> tuple[Float[Array, "N ..."], Float[Array, "N C"]]:
    """Mix with partners of rare classes.

    p_j ~ n_j^tau, lam_ij = (Beta(alpha, alpha) + n_j / (n_i + n_j)) mod 1

    Args:
      key: typed PRNG key, new each step.
      x: [N, ...] examples; the partners are drawn from them, with replacement.
      labels: [N] integers in [0, C).
      counts: [C] training examples per class; may be traced. One without any counts as
        the rarest.
      alpha: > 0, of the Beta distribution; one draw per example. May be traced.
      tau: power of the partner's count; -0.5 on CIFAR-10-LT, -0.1 on CIFAR-100-LT. May
        be traced.

    Returns:
      The mixed examples (dtype of x, float32 for integers) and [N, C] soft labels.

    Raises:
      ValueError: if alpha is a number <= 0.

    References:
      Xu et al., Towards calibrated model for long-tailed visual recognition from prior
      perspective, arXiv 2111.03874.
    """
    n = at_least_rarest(as_vector("mix.unimix: `counts`", counts))
    labels = class_indices(labels)
    alpha = _checked("unimix", alpha)
    beta_key, partner_key = jax.random.split(key)
    count = n[labels]
    log_p = jnp.asarray(tau).astype(n.dtype) * jnp.log(count)
    partner = jax.random.categorical(partner_key, log_p, shape=labels.shape)
    draws = jax.random.beta(beta_key, alpha, alpha, labels.shape).astype(
        n.dtype
    )
    partner_count = count[partner]
    lam = draws + partner_count / (count + partner_count)
    lam = jnp.where(lam > 1, lam - 1, lam)
    return _blend(x, partner, lam), _blend(
        _soft(labels, n.shape[0]), partner, lam
    )


def _draw(name: str, key: Key, size: int, alpha: Scalar) -> tuple[Array, Array]:
    alpha = _checked(name, alpha)
    beta_key, partner_key = jax.random.split(key)
    lam = jax.random.beta(beta_key, alpha, alpha).astype(jnp.float32)
    return lam, jax.random.permutation(partner_key, size)


def _checked(name: str, alpha: Scalar) -> Array:
    if isinstance(alpha, int | float) and alpha <= 0:
        raise ValueError(
            f"longtail.mix.{name} needs `alpha` > 0, got {alpha}: do not call it for 0"
        )
    return jnp.asarray(alpha).astype(jnp.float32)


def _soft(labels: Array, num_classes: int) -> Array:
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(
            class_indices(labels), num_classes, dtype=jnp.float32
        )
    return floating(labels)


def _blend(x: Array, partner: Array, share: Array) -> Array:
    """Return share x_i + (1 - share) x_partner, with one share or one per example."""
    x = jnp.asarray(x)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    wide = floating(x)
    share = share.astype(wide.dtype).reshape((-1,) + (1,) * (x.ndim - 1))
    return (share * wide + (1 - share) * wide[partner]).astype(dtype)
