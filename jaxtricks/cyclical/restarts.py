"""Cosine annealing with warm restarts, however many of them, in a graph of one size."""

import itertools
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar, Schedule
from jaxtricks.cyclical.phase import (
    blend,
    check_number,
    exact,
    iteration,
    phase,
    plain,
    representable,
)

_STEPS = 2**32 - 1
_MAX_CYCLES = 1000
_GRAIN = 2**128


@checked
def warm_restarts(
    peak: Scalar, first_period: Scalar, *, period_mult: Scalar = 1, floor: Scalar = 0.0
) -> Schedule:
    """Half a cosine from peak to floor, then from peak again, in ever longer cycles.

    rate = floor + (peak - floor) (1 + cos(pi t / T)) / 2, t iterations into a cycle of T iterations;
    T = first_period period_mult^k in cycle k = 0, 1, ...

    Args:
      peak: rate at the start of every cycle; a number or array [].
      first_period: iterations of the first cycle, >= 1. Fractions whose denominator is at most 1000
        are exact; others are rounded to the nearest of those.
      period_mult: length of a cycle over that of the one before, 1 or more (not so near 1 that there
        would be more than 1000 different cycles in 2^32 iterations); exact as first_period is.
      floor: rate that a cycle falls to (the restart comes when it would be reached); a number or
        array [].

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape (below 0 counts
      as 0), the rate is float32 (float64 under jax_enable_x64) of the same shape.

    Raises:
      ValueError: first_period below 1, traced or too large, period_mult below 1, traced or too near 1;
        when called, a step that is not an integer.

    Example:
      >>> rate = warm_restarts(1.0, 2, period_mult=2)
      >>> [round(float(rate(step)), 3) for step in range(7)]
      [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    References:
      Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983,
      equation 5; torch.optim.lr_scheduler.CosineAnnealingWarmRestarts.
    """
    check_number("warm_restarts: `peak`", peak)
    check_number("warm_restarts: `floor`", floor)
    name = "warm_restarts: `first_period`"
    period = representable(name, exact(name, first_period))
    mult = plain("warm_restarts: `period_mult`", period_mult)
    if not 1 <= mult < math.inf:
        raise ValueError(f"cyclical.warm_restarts: `period_mult` is {mult}: give a number >= 1")
    starts = _starts(period, mult) if mult > 1 else []

    def schedule(step: Any) -> Array:
        n, dtype = iteration(step), jnp.result_type(float)
        if starts:
            t, length = _growing(n, starts, dtype)
        else:
            t, length = phase(n, period)[1].astype(dtype), float(period.numerator)
        return blend(peak, floor, t / length, (length - t) / length, cos=True)

    return schedule


def _starts(period: Fraction, mult: float) -> list[Fraction]:
    """Where the cycles start, up to the first start that no step reaches."""
    # A float that is the nearest one to 4/3 or 1.1 means that, so that cycles end on whole iterations.
    rational = Fraction(mult).limit_denominator(1000)
    ratio = rational if float(rational) == mult else Fraction(mult)
    starts, length = [Fraction(0)], period
    while starts[-1] < _STEPS:
        starts.append(starts[-1] + length)
        length *= ratio
        if length.denominator > _GRAIN:
            # Exact powers of a fraction grow without end; by now no cycle can end on a whole iteration.
            length = Fraction(round(length * _GRAIN), _GRAIN)
        if len(starts) > _MAX_CYCLES:
            raise ValueError(
                f"cyclical.warm_restarts: `period_mult` is {float(mult)}: give 1, or a number so large"
                f" that there are at most {_MAX_CYCLES} different cycles"
            )
    return starts


def _growing(n: Array, starts: list[Fraction], dtype: Any) -> tuple[Array, Array]:
    """(iterations into the cycle, its length) from the table of starts."""
    # Step n is in the last cycle whose start, rounded up, is not after it.
    bounds = np.asarray([math.ceil(s) for s in starts[1:-1]], np.uint32)
    bounds = bounds.reshape((1,) * n.ndim + (-1,))
    cycle = jnp.sum(n[..., None] >= bounds, axis=-1, dtype=jnp.int32)
    whole = np.asarray([math.floor(s) for s in starts[:-1]], np.uint32)
    rest = np.asarray([float(s - math.floor(s)) for s in starts[:-1]])
    lengths = np.asarray([float(b - a) for a, b in itertools.pairwise(starts)])
    t = (n - jnp.asarray(whole)[cycle]).astype(dtype) - jnp.asarray(rest, dtype)[cycle]
    return t, jnp.asarray(lengths, dtype)[cycle]
