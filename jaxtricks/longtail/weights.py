"""Weight classes by their counts, and schedule weights, all inside jit.

Weights sum to the number of classes, and an empty class weighs nothing.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Float, Real

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import Counts, as_vector, floating, has_examples

__all__ = [
    "bbn",
    "blend",
    "deferred",
    "effective_number",
    "inverse_frequency",
    "ramp",
]


@checked
def effective_number(
    counts: Counts, beta: Scalar = 0.9999
) -> Float[Array, "C"]:
    """Return inverse effective numbers of examples.

    w_c ~ (1 - beta) / (1 - beta^n_c), sum w = C

    1 - beta^n is computed as -expm1(n log1p(-(1-beta))): the plain form loses every
    digit in float32 where n (1 - beta) is small.

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
            "longtail.weights.effective_number needs 0 <= `beta` < 1, got "
            f"{beta}: the limit of 1 is inverse_frequency"
        )
    n = floating(as_vector("effective_number: `counts`", counts))
    # A Python beta is subtracted in double precision, before it is rounded to the dtype
    # of n.
    rest = 1 - beta if isinstance(beta, int | float) else 1 - jnp.asarray(beta)
    rest = jnp.asarray(rest).astype(n.dtype)
    inverse = 1 / -jnp.expm1(
        jnp.where(has_examples(n), n, 1) * jnp.log1p(-rest)
    )
    return _sum_to_classes(n, inverse)


@checked
def inverse_frequency(counts: Counts, power: Scalar = 1.0) -> Float[Array, "C"]:
    """Return inverse frequencies to a power: w_c ~ n_c^-power, sum w = C.

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
    return _sum_to_classes(
        n, jnp.exp(-power * jnp.log(jnp.where(has_examples(n), n, 1)))
    )


@checked
def deferred(
    step: Scalar, start: Scalar, before: Counts, after: Counts
) -> Float[Array, "C"]:
    """Return `before` while step < start, then `after`.

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
    first, second = _pair("deferred", before, after)
    return jnp.where(jnp.asarray(step) >= jnp.asarray(start), second, first)


@checked
def ramp(
    step: Scalar,
    start: Scalar,
    stop: Scalar,
    *,
    shape: Literal["linear", "cosine"] = "linear",
) -> Float[Array, ""]:
    """Rise from 0 at `start` to 1 at `stop`: a smooth alternative to `deferred`.

    linear: x = (step - start) / (stop - start); cosine: (1 - cos(pi x)) / 2.

    Args:
      step: current step, counted from 0; may be traced.
      start: last step at 0.
      stop: first step at 1; where it is not above start, 0 jumps to 1 after start.
      shape: "linear" or "cosine".

    Returns:
      float32 [] in [0, 1]: the `t` of `sampling.progressive` and of `blend`.

    >>> ramp(75, 0, 100)
    Array(0.75, dtype=float32)
    """
    step = jnp.asarray(step)
    start = jnp.asarray(start)
    stop = jnp.asarray(stop)
    # Differences before the cast: float32 would round large steps.
    over = (step - start).astype(jnp.float32)
    x = jnp.clip(
        over / jnp.maximum((stop - start).astype(jnp.float32), 1e-30), 0, 1
    )
    return (1 - jnp.cos(jnp.pi * x)) / 2 if shape == "cosine" else x


@checked
def blend(t: Scalar, before: Counts, after: Counts) -> Float[Array, "C"]:
    """Return (1 - t) before + t after, with t of `ramp`.

    Args:
      t: in [0, 1]; may be traced.
      before: [C] at t = 0.
      after: [C] at t = 1.

    Returns:
      [C] in float32 or wider.

    Raises:
      ValueError: if the two differ in length.

    >>> blend(0.5, [1.0, 1.0], [0.5, 1.5])
    Array([0.75, 1.25], dtype=float32)
    """
    first, second = _pair("blend", before, after)
    t = jnp.asarray(t).astype(first.dtype)
    return (1 - t) * first + t * second


@checked
def bbn(step: Scalar, total_steps: Scalar) -> Float[Array, ""]:
    """Share of BBN's conventional branch: 1 - (step / total_steps)^2.

    The loss is share * (loss of the branch that samples as the data) + (1 - share) *
    (loss of the branch that samples reversed, `sampling.class_probabilities(counts,
    -1)`).

    Args:
      step: current step or epoch, counted from 0; may be traced.
      total_steps: of the run; the reference takes 100 for 90 epochs and 200 for 180.

    Returns:
      float32 [], 1 at the start and 0 from total_steps on.

    >>> bbn(50, 100)
    Array(0.75, dtype=float32)

    References:
      Zhou et al., BBN, arXiv 1912.02413, section 4.3.
    """
    return 1 - ramp(step, 0, total_steps) ** 2


def _pair(name: str, before: Counts, after: Counts) -> tuple[Array, Array]:
    first = floating(as_vector(f"{name}: `before`", before))
    second = as_vector(f"{name}: `after`", after).astype(first.dtype)
    if first.shape != second.shape:
        raise ValueError(
            f"longtail.weights.{name}: `before` has {first.shape[0]} classes "
            f"and `after` {second.shape[0]}: pass one number per class in both"
        )
    return first, second


def _sum_to_classes(
    n: Real[Array, "C"], raw: Float[Array, "C"]
) -> Float[Array, "C"]:
    raw = jnp.where(has_examples(n), raw, 0)
    total = jnp.sum(raw)
    return raw * (n.shape[0] / jnp.where(total > 0, total, 1))
