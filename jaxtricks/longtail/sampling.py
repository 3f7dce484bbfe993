"""Class-balanced sampling inside jit: how likely each class is, and the draws themselves.

Probabilities are functions of the counts and of the step; `table` and `sample_indices` draw by them.
"""

import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail import weights
from jaxtricks.longtail._counts import Counts, as_vector, at_least_rarest, floating, seen
from jaxtricks.longtail.draws import Table, class_aware_indices, sample_indices, table

__all__ = [
    "Table",
    "class_aware_indices",
    "class_probabilities",
    "deferred",
    "effective_number",
    "meta_rates",
    "progressive",
    "sample_indices",
    "table",
]


@checked
def class_probabilities(counts: Counts, power: Scalar = 0.0) -> Float[Array, "C"]:
    """Probability to draw each class: p_c ~ n_c^power.

    Args:
      counts: [C] training examples per class; may be traced.
      power: 1 as the data, 0.5 square root, 0 balanced, -1 reversed (the second branch of BBN).

    Returns:
      [C] probabilities; 0 for a class without examples (all zero if no class has any).

    >>> class_probabilities([90, 10], 0.5)[1].round(3)
    Array(0.25, dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217, equation 1.
    """
    n = floating(as_vector("sampling.class_probabilities: `counts`", counts))
    power = jnp.asarray(power).astype(n.dtype)
    raw = jnp.where(seen(n), jnp.exp(power * jnp.log(jnp.where(seen(n), n, 1))), 0)
    return _normalized(raw)


@checked
def progressive(counts: Counts, t: Scalar) -> Float[Array, "C"]:
    """From the data to balance: (1 - t) p_instance + t p_balanced.

    Args:
      counts: [C] training examples per class; may be traced.
      t: share of the run that is over, clipped to [0, 1]; may be traced (`weights.ramp`). Over E
        epochs the Decoupling code takes e / (E - 1) and BagofTricks (e + 1) / E, e from 0.

    Returns:
      [C] probabilities; 0 for a class without examples.

    >>> progressive([90, 10], 0.5)[1].round(3)
    Array(0.3, dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    data, balanced = class_probabilities(counts, 1.0), class_probabilities(counts, 0.0)
    t = jnp.clip(jnp.asarray(t).astype(data.dtype), 0, 1)
    return (1 - t) * data + t * balanced


@checked
def effective_number(counts: Counts, beta: Scalar = 0.9999) -> Float[Array, "C"]:
    """Each example drawn by its class's inverse effective number: p_c ~ n_c (1 - beta) / (1 - beta^n_c).

    Args:
      counts: [C] training examples per class; may be traced.
      beta: in [0, 1); 0 draws as the data, -> 1 balanced.

    Returns:
      [C] probabilities; 0 for a class without examples.

    Raises:
      ValueError: if beta is a number outside [0, 1).

    >>> effective_number([5000, 50], 0.9999)[0].round(3)
    Array(0.559, dtype=float32)

    References:
      Cao et al., LDAM, arXiv 1906.07413 (the "Resample" rule of its code).
    """
    n = floating(as_vector("sampling.effective_number: `counts`", counts))
    return _normalized(jnp.where(seen(n), n, 0) * weights.effective_number(n, beta))


@checked
def deferred(counts: Counts, step: Scalar, start: Scalar, power: Scalar = 0.0) -> Float[Array, "C"]:
    """Deferred re-sampling: as the data while step < start, p_c ~ n_c^power from there on.

    Args:
      counts: [C] training examples per class; may be traced.
      step: current step, counted from 0; may be traced.
      start: first step of the second phase; may be traced.
      power: of the second phase, as in `class_probabilities`.

    Returns:
      [C] probabilities; 0 for a class without examples.

    >>> deferred([90, 10], 160, 160)
    Array([0.5, 0.5], dtype=float32)

    References:
      Cao et al., LDAM, arXiv 1906.07413; Zhang et al., Bag of tricks, AAAI 2021.
    """
    data, after = class_probabilities(counts, 1.0), class_probabilities(counts, power)
    return weights.deferred(step, start, data, after)


@checked
def meta_rates(counts: Counts, power: Scalar = 0.5) -> Float[Array, "C"]:
    """Where the meta sampler starts: r_c = n_c^-power / (n_max^-power + n_min^-power).

    The rate at which each example of the class is kept; largest and smallest sum to 1. The learned
    parameters are the logits log(r / (1 - r)); a class is drawn with p_c ~ n_c r_c, as
    `class_probabilities(counts, 1 - power)`.

    Args:
      counts: [C] training examples per class; may be traced.
      power: 0 starts as the data, 0.5 square root, 1 balanced.

    Returns:
      [C] rates in (0, 1); a class without examples has that of the rarest.

    >>> [round(float(rate), 3) for rate in meta_rates([90, 10], 1.0)]
    [0.1, 0.9]

    References:
      Ren et al., Balanced meta-softmax, arXiv 2007.10740, section 3.2 and its SampleLearner.
    """
    n = at_least_rarest(as_vector("sampling.meta_rates: `counts`", counts))
    power = jnp.asarray(power).astype(n.dtype)
    # Relative to the mean of the extreme logarithms, so that no power overflows.
    log_n = jnp.log(n)
    log_rate = -power * (log_n - (jnp.max(log_n) + jnp.min(log_n)) / 2)
    return jnp.exp(log_rate) / (jnp.exp(jnp.max(log_rate)) + jnp.exp(jnp.min(log_rate)))


def _normalized(raw: Array) -> Float[Array, "C"]:
    total = jnp.sum(raw)
    return raw / jnp.where(total > 0, total, 1)
