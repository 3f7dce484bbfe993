"""Corrections at test time, for a model trained with the plain loss."""

import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks._types import Array, Scalar
from jaxtricks.longtail.counts import UNSEEN_LOG_PRIOR, Counts, as_vector, floating, log_prior, seen


def adjust(
    logits: Float[Array, "*batch C"], counts: Counts, tau: Scalar = 1.0
) -> Float[Array, "*batch C"]:
    """Post-hoc logit adjustment: z_c - tau log(n_c / sum n).

    For logits of a model trained with plain cross entropy. Never together with a loss that knows
    the prior already (`balanced_softmax`, `logit_adjusted`, `vs`): that would count it twice.

    A class without training examples has no prior to divide by; taken literally it would win every
    time. It is held back instead, by tau * 27.6 (a factor of 1e-12 to the power tau).

    Args:
      logits: [..., C] of a trained model.
      counts: [C] training examples per class; may be traced.
      tau: strength; choose it on held-out data by balanced accuracy. Traced, differentiable.

    Returns:
      [..., C] adjusted logits in float32 or wider.

    Raises:
      ValueError: if counts has not one entry per logit.

    >>> adjust(jnp.array([[2.0, 0.5]]), [90, 10]).argmax(-1)
    Array([1], dtype=int32)

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation 9.
    """
    z = floating(jnp.asarray(logits))
    n = as_vector("posthoc.adjust: `counts`", counts).astype(z.dtype)
    if n.shape[0] != z.shape[-1]:
        raise ValueError(
            f"longtail.posthoc.adjust: `counts` has {n.shape[0]} classes where the logits have "
            f"{z.shape[-1]}: pass one number per class"
        )
    shift = jnp.where(seen(n), -log_prior(n), UNSEEN_LOG_PRIOR)
    shift = jnp.asarray(tau).astype(z.dtype) * shift
    return z + shift.reshape((1,) * (z.ndim - 1) + shift.shape)


def shift_prior(
    logits: Float[Array, "*batch C"], source: Counts, target: Counts
) -> Float[Array, "*batch C"]:
    """From one class prior to another: z_c - log source_c + log target_c.

    For logits calibrated to the source prior. Those of a model trained with a prior-adjusted loss
    (`balanced_softmax`, `lade`) are calibrated to a uniform one: pass ones as the source.

    A class that the source lacks is held back by 27.6 (a factor of 1e-12), as in `adjust`; so is one
    that the target lacks, beside its source prior.

    Args:
      logits: [..., C].
      source: [C] counts or probabilities, of the prior in the logits; need not sum to 1.
      target: [C] counts or probabilities, of the prior wanted. Both may be traced.

    Returns:
      [..., C] shifted logits in float32 or wider.

    Raises:
      ValueError: if a prior has not one entry per logit.

    >>> shift_prior(jnp.zeros((1, 2)), [1, 1], [3, 1]).round(4)
    Array([[ 0.4055, -0.6931]], dtype=float32)

    References:
      Hong et al., LADE, arXiv 2012.00321.
    """
    z = floating(jnp.asarray(logits))
    old, new = _prior("source", source, z), _prior("target", target, z)
    shift = jnp.where(seen(old), log_prior(new) - log_prior(old), UNSEEN_LOG_PRIOR)
    return z + shift.reshape((1,) * (z.ndim - 1) + shift.shape)


def _prior(name: str, values: Counts, z: Array) -> Array:
    n = as_vector(f"posthoc.shift_prior: `{name}`", values).astype(z.dtype)
    if n.shape[0] != z.shape[-1]:
        raise ValueError(
            f"longtail.posthoc.shift_prior: `{name}` has {n.shape[0]} classes where the logits "
            f"have {z.shape[-1]}: pass one number per class"
        )
    total = jnp.sum(n)
    return n / jnp.where(total > 0, total, 1)
