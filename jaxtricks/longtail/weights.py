"""Class weights from counts; both sum to the number of classes, and an empty class weighs nothing."""

import jax.numpy as jnp
from jaxtyping import Float, Num

from jaxtricks._types import Array, Scalar
from jaxtricks.longtail.counts import Counts, as_vector, floating, seen


def effective_number(counts: Counts, beta: Scalar = 0.9999) -> Float[Array, "C"]:
    """Inverse effective number of examples: w_c ~ (1 - beta) / (1 - beta^n_c), sum w = C.

    1 - beta^n is computed as -expm1(n log1p(-(1-beta))): the plain form loses every digit in
    float32 where n (1 - beta) is small.

    Args:
      counts: [C] training examples per class; may be traced.
      beta: in [0, 1); 0 gives ones, -> 1 inverse frequency.

    Returns:
      [C] weights that sum to C; 0 for a class without examples.

    Raises:
      ValueError: if beta is a number outside [0, 1).

    >>> effective_number([5000, 50], 0.9999)[0].round(4)
    Array(0.025, dtype=float32)

    References:
      Cui et al., arXiv 1901.05555.
    """
    if isinstance(beta, int | float) and not 0 <= beta < 1:
        raise ValueError(
            f"longtail.weights.effective_number needs 0 <= `beta` < 1, got {beta}: "
            "the limit of 1 is inverse_frequency"
        )
    n = floating(as_vector("effective_number: `counts`", counts))
    # A Python beta is subtracted in double precision, before it is rounded to the dtype of n.
    rest = 1 - beta if isinstance(beta, int | float) else 1 - jnp.asarray(beta)
    rest = jnp.asarray(rest).astype(n.dtype)
    inverse = 1 / -jnp.expm1(jnp.where(seen(n), n, 1) * jnp.log1p(-rest))
    return _sum_to_classes(n, inverse)


def inverse_frequency(counts: Counts, power: Scalar = 1.0) -> Float[Array, "C"]:
    """Inverse frequency to a power: w_c ~ n_c^-power, sum w = C.

    Args:
      counts: [C] training examples per class; may be traced.
      power: 1 is full, 0.5 square-root, 0 no weighting.

    Returns:
      [C] weights that sum to C; 0 for a class without examples.

    >>> inverse_frequency([90, 10])[0].round(3)
    Array(0.2, dtype=float32)
    """
    n = floating(as_vector("inverse_frequency: `counts`", counts))
    power = jnp.asarray(power).astype(n.dtype)
    return _sum_to_classes(n, jnp.exp(-power * jnp.log(jnp.where(seen(n), n, 1))))


def deferred(step: Scalar, start: Scalar, before: Counts, after: Counts) -> Float[Array, "C"]:
    """Deferred re-weighting: `before` while step < start, `after` from there on.

    Usually ones first and `effective_number(counts)` for the last fifth of the run.

    Args:
      step: current step, counted from 0; may be traced.
      start: first step of the second phase; may be traced.
      before: [C] weights.
      after: [C] weights.

    Returns:
      [C] weights in float32 or wider.

    Raises:
      ValueError: if the two differ in length.

    >>> deferred(160, 160, [1.0, 1.0], [0.5, 1.5])
    Array([0.5, 1.5], dtype=float32)

    References:
      Cao et al., LDAM, arXiv 1906.07413.
    """
    first = floating(as_vector("deferred: `before`", before))
    second = as_vector("deferred: `after`", after).astype(first.dtype)
    if first.shape != second.shape:
        raise ValueError(
            f"longtail.weights.deferred: `before` has {first.shape[0]} classes and `after` "
            f"{second.shape[0]}: pass one number per class in both"
        )
    return jnp.where(jnp.asarray(step) >= jnp.asarray(start), second, first)


def _sum_to_classes(n: Num[Array, "C"], raw: Float[Array, "C"]) -> Float[Array, "C"]:
    raw = jnp.where(seen(n), raw, 0)
    total = jnp.sum(raw)
    return raw * (n.shape[0] / jnp.where(total > 0, total, 1))
