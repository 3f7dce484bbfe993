"""Triangles between two bounds."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar, Schedule
from jaxtricks.cyclical.phase import cast, check_number, exact, iteration, phase, representable

_MODES = ("triangular", "triangular2", "exp_range")


@checked
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
      peak: rate in the middle of the first cycle, below base for a valley; a number or array [].
      step_size_up: iterations from base to peak, > 0. Fractions whose denominator is at most 1000 are
        exact; others are rounded to the nearest of those.
      step_size_down: iterations from peak to base; None = step_size_up.
      mode: how the amplitude shrinks.
      gamma: factor per iteration of "exp_range", > 0; a number (which keeps its digits near 1) or array
        []. Above 1 the amplitude grows, up to the largest float.
      scale_fn: scale as a function of your own instead of `mode`; it gets a floating array shaped as
        the step (in float32 whole numbers beyond 2^24 are rounded).
      scale_by: what scale_fn gets: "cycle" (1, 2, ...) or "iteration" (0, 1, ...).

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape (below 0 counts
      as 0), the rate is float32 (float64 under jax_enable_x64) of the same shape.

    Raises:
      ValueError: an unknown mode or scale_by, a step size that is not positive, is traced or too large,
        a cycle below one iteration, gamma not positive, a bound that is not finite; when called, a
        step that is not an integer.

    Example:
      >>> rate = cyclical(0.0, 1.0, 4, mode="triangular2")
      >>> [float(rate(step)) for step in (0, 2, 4, 6, 8, 12)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]

    References:
      Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.
    """
    return _triangles(
        "cyclical", ("base", base), ("peak", peak), (step_size_up, step_size_down), mode, gamma,
        scale_fn, scale_by,
    )  # fmt: skip


@checked
def cyclical_momentum(
    base: Scalar,
    peak: Scalar,
    step_size_up: Scalar = 2000,
    step_size_down: Scalar | None = None,
    *,
    mode: str = "triangular",
    gamma: Scalar = 1.0,
    scale_fn: Callable[[Any], Any] | None = None,
    scale_by: str = "cycle",
) -> Schedule:
    """The momentum that goes with `cyclical`: at peak where the rate is at base, and the reverse.

    momentum = peak - (peak - base) * x * scale, with the x and scale of `cyclical`

    Args:
      base: momentum in the middle of the first cycle; a number or array [].
      peak: momentum at step 0 and between cycles; a number or array [].
      step_size_up: iterations while the rate rises and the momentum falls; give all that follow the
        values that `cyclical` got.
      step_size_down: iterations back; None = step_size_up.
      mode: how the amplitude shrinks.
      gamma: factor per iteration of "exp_range".
      scale_fn: scale as a function of your own.
      scale_by: what scale_fn gets.

    Returns:
      schedule(step) -> momentum, as for `cyclical`.

    Raises:
      ValueError: as `cyclical`.

    Example:
      >>> momentum = cyclical_momentum(0.5, 1.0, 2)
      >>> [float(momentum(step)) for step in range(5)]
      [1.0, 0.75, 0.5, 0.75, 1.0]

    References:
      Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186;
      torch.optim.lr_scheduler.CyclicLR (cycle_momentum).
    """
    # It is the same triangle upside down.
    return _triangles(
        "cyclical_momentum", ("peak", peak), ("base", base), (step_size_up, step_size_down), mode,
        gamma, scale_fn, scale_by,
    )  # fmt: skip


def _triangles(
    name: str,
    low: tuple[str, Scalar],
    high: tuple[str, Scalar],
    step_sizes: tuple[Scalar, Scalar | None],
    mode: str,
    gamma: Scalar,
    scale_fn: Callable[[Any], Any] | None,
    scale_by: str,
) -> Schedule:
    for argument, x in (low, high):
        check_number(f"{name}: `{argument}`", x)
    _check_scale(name, mode, gamma, scale_by)
    up = exact(f"{name}: `step_size_up`", step_sizes[0])
    down = up if step_sizes[1] is None else exact(f"{name}: `step_size_down`", step_sizes[1])
    period = representable(f"{name}: `step_size_up`", up + down)

    def schedule(step: Any) -> Array:
        n, dtype = iteration(step), jnp.result_type(float)
        cycle, position = phase(n, period)
        if scale_fn is not None:
            seen = n if scale_by == "iteration" else cycle + np.uint32(1)
            scale = jnp.asarray(scale_fn(seen.astype(dtype))).astype(dtype)
        else:
            scale = _scale(mode, gamma, n, cycle, dtype)
        x = _triangle(position, up, down, period, dtype) * scale
        return cast(low[1], dtype) + _span(low[1], high[1], dtype) * x

    return schedule


def _span(low: Any, high: Any, dtype: Any) -> Array:
    # Python numbers are subtracted in double precision, before rounding.
    if isinstance(low, int | float) and isinstance(high, int | float):
        return cast(high - low, dtype)
    return cast(high, dtype) - cast(low, dtype)


def _check_scale(name: str, mode: str, gamma: Any, scale_by: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"cyclical.{name}: `mode` is {mode!r}: give one of {', '.join(_MODES)}")
    if scale_by not in ("cycle", "iteration"):
        raise ValueError(
            f"cyclical.{name}: `scale_by` is {scale_by!r}: give 'cycle' or 'iteration'"
        )
    check_number(f"{name}: `gamma`", gamma, 0)


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
        growth = jnp.exp(n.astype(dtype) * jnp.asarray(log).astype(dtype))
        # Not inf: at the ends of a cycle it is multiplied by 0.
        return jnp.minimum(growth, jnp.finfo(dtype).max)
    return jnp.ones(n.shape, dtype)
