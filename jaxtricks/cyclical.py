"""Cyclical learning rates: triangles between two bounds, exact after any number of steps.

What. The rate rises linearly from base to peak in step_size_up iterations, falls back in step_size_down,
and begins again. Its amplitude may shrink: by half every cycle ("triangular2"), by gamma every iteration
("exp_range"), or by a function of your own.

Use.

    import jaxtricks as jt, optax
    rate = jt.cyclical.cyclical(1e-3, 6e-3, 4 * steps_per_epoch, mode="triangular2")
    tx = optax.sgd(rate, momentum=0.9)

Settings to start from. step_size_up of 2 to 10 epochs; base a third or a quarter of peak, peak where a
range test turns ragged. End training on the low side: after a whole number of cycles. For exp_range,
gamma 0.99994.

When it helps and when not. When you do not want to tune a rate: the cycle passes through a good one. A
well tuned decay is hard to beat, and the metrics go up and down with the rate, so compare at cycle ends.

Cost. A handful of scalar operations a step, however many cycles.

Composes with. Anything that takes an optax schedule: optax.sgd, memopt.adafactor, inject_hyperparams.
Bounds and gamma may be arrays (also traced, so that a sweep over them does not recompile); step sizes
are static.

Differences from the paper and from optax/flax. optax has no cyclical schedule. Names and defaults are
those of the paper's Keras callback; legs of different length are PyTorch's. The position in the cycle is
computed in integers, so float32 does not lose it: the usual formula is off by a tenth of the amplitude
after 5e7 iterations of step size 20. The rate is float32 (float64 under jax_enable_x64).

References. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186. Reference
code: bckenstler/CLR, clr_callback.py; torch.optim.lr_scheduler.CyclicLR.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks._types import Array, Scalar, Schedule

__all__ = ["cyclical"]

_MODES = ("triangular", "triangular2", "exp_range")
_MAX_DENOMINATOR = 1000
_LIMIT = 2**31


def cyclical(
    base: Scalar = 1e-3,
    peak: Scalar = 6e-3,
    step_size_up: Scalar = 2000,
    step_size_down: Scalar | None = None,
    *,
    mode: str = "triangular",
    gamma: Scalar = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_by: str = "cycle",
) -> Schedule:
    """Triangles from base to peak and back, for ever.

    pos = step mod (up + down);  x = pos / up if pos <= up else (up + down - pos) / down
    rate = base + (peak - base) * x * scale
    scale = 1 ("triangular"), 1 / 2^(cycle - 1) ("triangular2"), gamma^step ("exp_range")

    Args:
      base: rate at step 0 and between cycles; a number or array [].
      peak: rate in the middle of the first cycle; a number or array [].
      step_size_up: iterations from base to peak, > 0. Fractions whose denominator is at most 1000 are
        exact; others are rounded to the nearest of those.
      step_size_down: iterations from peak to base; None = step_size_up.
      mode: how the amplitude shrinks.
      gamma: factor per iteration of "exp_range", > 0; a number or array [].
      scale_fn: scale as a function of your own instead of `mode`; it gets a floating array [].
      scale_by: what scale_fn gets: "cycle" (1, 2, ...) or "iteration" (0, 1, ...).

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape (below 0 counts
      as 0), the rate is float32 (float64 under jax_enable_x64) of the same shape.

    Raises:
      ValueError: an unknown mode or scale_by, a step size that is not positive, is traced or too large,
        gamma not positive; when called, a step that is not an integer.

    Example:
      >>> rate = cyclical(0.0, 1.0, 4, mode="triangular2")
      >>> [float(rate(step)) for step in (0, 2, 4, 6, 8, 12)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]

    References:
      Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.
    """
    _check_words(mode, scale_by)
    if isinstance(gamma, int | float) and not gamma > 0:
        raise ValueError(f"cyclical.cyclical: `gamma` is {gamma}: give a number > 0")
    up = _exact("step_size_up", step_size_up)
    down = up if step_size_down is None else _exact("step_size_down", step_size_down)
    period = _representable(up + down)
    low: Any = base

    def schedule(step: Any) -> Array:
        n, dtype = _iteration(step), jnp.result_type(float)
        cycle, position = _phase(n, period)
        if scale_fn is not None:
            seen = n if scale_by == "iteration" else cycle + np.uint32(1)
            scale = jnp.asarray(scale_fn(seen.astype(dtype))).astype(dtype)
        else:
            scale = _scale(mode, gamma, n, cycle, dtype)
        x = _triangle(position, up, down, period, dtype) * scale
        return jnp.asarray(base).astype(dtype) + jnp.asarray(peak - low).astype(dtype) * x

    return schedule


def _check_words(mode: str, scale_by: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"cyclical.cyclical: `mode` is {mode!r}: give one of {', '.join(_MODES)}")
    if scale_by not in ("cycle", "iteration"):
        raise ValueError(
            f"cyclical.cyclical: `scale_by` is {scale_by!r}: give 'cycle' or 'iteration'"
        )


def _exact(name: str, x: Any) -> Fraction:
    if isinstance(x, jax.core.Tracer):
        raise ValueError(f"cyclical.cyclical: `{name}` is traced: give a plain number")
    if not 0 < float(x) < _LIMIT / 2:
        raise ValueError(f"cyclical.cyclical: `{name}` is {x}: give a number in (0, 2^30)")
    # Through float, because a NumPy float32 or an integer array is no Rational.
    nearest = Fraction(float(x)).limit_denominator(_MAX_DENOMINATOR)
    return nearest or Fraction(1, _MAX_DENOMINATOR)


def _representable(period: Fraction) -> Fraction:
    """The period as a fraction whose numerator fits int32."""
    if period < 1:
        raise ValueError("cyclical.cyclical: a cycle is shorter than one iteration: lengthen it")
    # Only legs with two different, large denominators are affected.
    return period.limit_denominator(max(1, (_LIMIT - 1) // math.ceil(period)))


def _iteration(step: Any) -> Array:
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ValueError(f"cyclical: the step is {step.dtype}: give an integer")
    return jnp.maximum(step, 0).astype(jnp.uint32)


def _phase(n: Array, period: Fraction) -> tuple[Array, Array]:
    """(cycles completed, position in the cycle in units of 1 / period.denominator), exact.

    With period = a/b: n = q a + r, so q b cycles are over, and floor(r b / a) more. r b may leave 32
    bits; it is divided by a digit after digit of b, as by hand.
    """
    a, b = period.numerator, period.denominator
    q, r = _divmod(n, a)
    shift = 32 - a.bit_length()
    digits = [b >> i & (1 << shift) - 1 for i in range(0, b.bit_length(), shift)][::-1]
    cycle, position = jnp.zeros_like(n), jnp.zeros_like(n)
    for digit in digits:
        whole, position = _divmod_sum(position, shift, r, digit, a)
        cycle = (cycle << np.uint32(shift)) + whole
    return q * np.uint32(b) + cycle, position


def _divmod(n: Array, a: int) -> tuple[Array, Array]:
    divisor = jnp.full_like(n, a)
    return lax.div(n, divisor), lax.rem(n, divisor)


def _divmod_sum(position: Array, shift: int, r: Array, digit: int, a: int) -> tuple[Array, Array]:
    # Both terms are below a 2^shift <= 2^32; their sum need not be.
    q1, r1 = _divmod(position << np.uint32(shift), a)
    q2, r2 = _divmod(r * np.uint32(digit), a)
    q3, r3 = _divmod(r1 + r2, a)
    return q1 + q2 + q3, r3


def _triangle(position: Array, up: Fraction, down: Fraction, period: Fraction, dtype: Any) -> Array:
    left = (np.uint32(period.numerator) - position).astype(dtype)
    rising = position.astype(dtype) * float(1 / (up * period.denominator))
    return jnp.minimum(rising, left * float(1 / (down * period.denominator)))


def _scale(mode: str, gamma: Scalar, n: Array, cycle: Array, dtype: Any) -> Array:
    if mode == "triangular2":
        halvings = jnp.minimum(cycle, np.uint32(1000)).astype(jnp.int32)
        return jnp.ldexp(jnp.ones(n.shape, dtype), -halvings)
    if mode == "exp_range":
        # The exponent loses digits as it grows, but e^x has shrunk by then: at most 1e-7 of 1.
        log = np.log(gamma) if isinstance(gamma, int | float | np.generic) else jnp.log(gamma)
        return jnp.exp(n.astype(dtype) * jnp.asarray(log).astype(dtype))
    return jnp.ones(n.shape, dtype)
