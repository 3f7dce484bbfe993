"""Schedule rates in cycles, exact at any step.

The position in a cycle is computed in integers, so that float32 never sees the step.
"""

import itertools
import math
import numbers
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks._arguments import checked, described
from jaxtricks._typing import Array, Scalar, Schedule

_MAX_DENOMINATOR = 1000
_LIMIT = 2**31
_LAST_STEP = 2**32 - 1


def plain(name: str, x: Any) -> float:
    """Return a static number; `name` is "function: `argument`" for the message."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(f"cyclical.{name} is traced: give a plain number")
    is_number = isinstance(x, numbers.Real | np.ndarray | jax.Array)
    if not is_number or np.iscomplexobj(x) or np.ndim(x) != 0:
        raise ValueError(
            f"cyclical.{name} is {described(x)}: give a plain number"
        )
    return float(x)


def check_number(name: str, x: Any, low: float = -math.inf) -> None:
    """Raise unless a number is finite and above `low`.

    Device arrays pass unread, because reading them would wait for the device.
    """
    if isinstance(x, jax.Array):
        return
    values = np.asarray(x)
    expected = "finite number" if low == -math.inf else f"number > {low:g}"
    if values.ndim or values.dtype.kind not in "iuf":
        raise ValueError(
            f"cyclical.{name} is {described(x)}: give a {expected}"
        )
    if not low < values < math.inf:
        raise ValueError(f"cyclical.{name} is {x}: give a {expected}")


def exact(name: str, x: Any) -> Fraction:
    """Return the nearest rational of small denominator."""
    if not 0 < plain(name, x) < _LIMIT / 2:
        raise ValueError(f"cyclical.{name} is {x}: give a number in (0, 2^30)")
    # Through float, because a NumPy float32 or an integer array is not a Rational.
    nearest = Fraction(float(x)).limit_denominator(_MAX_DENOMINATOR)
    return nearest or Fraction(1, _MAX_DENOMINATOR)


def representable(name: str, period: Fraction) -> Fraction:
    """Return the period as a fraction whose numerator fits int32.

    `name` is the argument to lengthen.
    """
    if period < 1:
        raise ValueError(
            f"cyclical.{name} makes cycles of {float(period):g} iterations: "
            "lengthen it, to 1 or more"
        )
    # Only legs with two different, large denominators are affected.
    return period.limit_denominator(max(1, (_LIMIT - 1) // math.ceil(period)))


def iteration(step: Any) -> Array:
    """Return the step as uint32, clipped to [0, 2^32 - 1]."""
    on_host = isinstance(step, int | np.generic | np.ndarray)
    if on_host and np.asarray(step).dtype.kind in "iu":
        # Clip with NumPy: without x64 JAX reads 2^31 as a negative number.
        step = np.clip(np.asarray(step), 0, _LAST_STEP).astype(np.uint32)
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ValueError(f"cyclical: the step is {step.dtype}: give an integer")
    if jnp.iinfo(step.dtype).max > _LAST_STEP:
        step = jnp.minimum(step, jnp.asarray(_LAST_STEP, step.dtype))
    return jnp.maximum(step, 0).astype(jnp.uint32)


def phase(n: Array, period: Fraction) -> tuple[Array, Array]:
    """Return (cycles completed, position in units of 1 / period.denominator), exactly.

    With period = a/b and n = q a + r, q b cycles are over, and floor(r b / a) more. r b
    may leave 32 bits, so it is divided by a digit by digit of b (long division).
    """
    a = period.numerator
    b = period.denominator
    q, r = _divmod(n, a)
    shift = 32 - a.bit_length()
    digits = [
        b >> i & (1 << shift) - 1 for i in range(0, b.bit_length(), shift)
    ][::-1]
    cycle = jnp.zeros_like(n)
    position = jnp.zeros_like(n)
    for digit in digits:
        whole, position = _divmod_sum(position, shift, r, digit, a)
        cycle = (cycle << np.uint32(shift)) + whole
    return q * np.uint32(b) + cycle, position


def _divmod(n: Array, a: int) -> tuple[Array, Array]:
    divisor = jnp.full_like(n, a)
    return lax.div(n, divisor), lax.rem(n, divisor)


def _divmod_sum(
    position: Array, shift: int, r: Array, digit: int, a: int
) -> tuple[Array, Array]:
    # Both terms are below a 2^shift <= 2^32; their sum need not be.
    q1, r1 = _divmod(position << np.uint32(shift), a)
    q2, r2 = _divmod(r * np.uint32(digit), a)
    q3, r3 = _divmod(r1 + r2, a)
    return q1 + q2 + q3, r3


def blend(
    start: Any, end: Any, done: Array, left: Array, *, cos: bool
) -> Array:
    """Interpolate from start (done 0, left 1) to end (done 1, left 0).

    Two fractions instead of one, so that nothing cancels: each end is met exactly,
    however small, and what is added to the nearer end is at most half the way.
    """
    if cos:
        done = jnp.square(jnp.sin(done * (np.pi / 2)))
        left = jnp.square(jnp.sin(left * (np.pi / 2)))
    start = cast(start, done.dtype)
    end = cast(end, done.dtype)
    span = end - start
    return jnp.where(done < left, start + span * done, end - span * left)


def cast(x: Any, dtype: Any) -> Array:
    """Return a number or array of any dtype as a floating array."""
    return jnp.asarray(x).astype(dtype)


# Triangles between two bounds.


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
    """Rise linearly from base to peak and fall back, in endless cycles.

    pos = step mod (up + down)
    x = pos / up if pos <= up else (up + down - pos) / down
    rate = base + (peak - base) * x * scale

    scale is 1 ("triangular"), 1 / 2^(cycle - 1) ("triangular2") or gamma^step
    ("exp_range").

    Args:
      base: rate at step 0 and between cycles; a number or array [].
      peak: rate in the middle of the first cycle, below base for a valley; a number or
        array [].
      step_size_up: iterations from base to peak, > 0. Fractions whose denominator is at
        most 1000 are exact; others are rounded to the nearest of those.
      step_size_down: iterations from peak to base; None = step_size_up.
      mode: how the amplitude shrinks.
      gamma: factor per iteration of "exp_range", > 0; a number (which keeps its digits
        near 1) or array []. Above 1 the amplitude grows, up to the largest float.
      scale_fn: a function that computes scale, instead of `mode`; its argument is a
        floating array shaped as the step (float32 rounds whole numbers beyond 2^24).
      scale_by: the argument of scale_fn: "cycle" (1, 2, ...) or "iteration" (0, 1, ...).

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape
      (below 0 counts as 0), the rate is float32 (float64 under jax_enable_x64) of the
      same shape.

    Raises:
      ValueError: an unknown mode or scale_by, a step size that is not positive, is
        traced or too large, a cycle below one iteration, gamma not positive, a bound
        that is not finite; when called, a step that is not an integer.

    Example:
      >>> rate = cyclical(0.0, 1.0, 4, mode="triangular2")
      >>> [float(rate(step)) for step in (0, 2, 4, 6, 8, 12)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]

    References:
      Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186,
      section 3.
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
    """Cycle momentum against `cyclical`: at peak where the rate is at base.

    momentum = peak - (peak - base) * x * scale, with the x and scale of `cyclical`

    Args:
      base: momentum in the middle of the first cycle; a number or array [].
      peak: momentum at step 0 and between cycles; a number or array [].
      step_size_up: iterations in which the rate rises and the momentum falls; pass the
        same values as to `cyclical`, here and below.
      step_size_down: iterations back; None = step_size_up.
      mode: how the amplitude shrinks.
      gamma: factor per iteration of "exp_range".
      scale_fn: a function that computes scale.
      scale_by: the argument of scale_fn.

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
    # The same triangle upside down.
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
    down = up
    if step_sizes[1] is not None:
        down = exact(f"{name}: `step_size_down`", step_sizes[1])
    period = representable(f"{name}: `step_size_up`", up + down)

    def schedule(step: Any) -> Array:
        n = iteration(step)
        dtype = jnp.result_type(float)
        cycle, position = phase(n, period)
        if scale_fn is not None:
            position_of_scale = (
                n if scale_by == "iteration" else cycle + np.uint32(1)
            )
            scale = jnp.asarray(
                scale_fn(position_of_scale.astype(dtype))
            ).astype(dtype)
        else:
            scale = _scale(mode, gamma, n, cycle, dtype)
        x = _triangle(position, up, down, period, dtype) * scale
        return cast(low[1], dtype) + _span(low[1], high[1], dtype) * x

    return schedule


def _span(low: Any, high: Any, dtype: Any) -> Array:
    # Subtract Python numbers in double precision, before they are rounded.
    if isinstance(low, int | float) and isinstance(high, int | float):
        return cast(high - low, dtype)
    return cast(high, dtype) - cast(low, dtype)


def _check_scale(name: str, mode: str, gamma: Any, scale_by: str) -> None:
    if mode not in _MODES:
        raise ValueError(
            f"cyclical.{name}: `mode` is {mode!r}: give one of {', '.join(_MODES)}"
        )
    if scale_by not in ("cycle", "iteration"):
        raise ValueError(
            f"cyclical.{name}: `scale_by` is {scale_by!r}: give 'cycle' or 'iteration'"
        )
    check_number(f"{name}: `gamma`", gamma, 0)


def _triangle(
    position: Array, up: Fraction, down: Fraction, period: Fraction, dtype: Any
) -> Array:
    left = (np.uint32(period.numerator) - position).astype(dtype)
    rising = position.astype(dtype) * float(1 / (up * period.denominator))
    return jnp.minimum(rising, left * float(1 / (down * period.denominator)))


def _scale(
    mode: str, gamma: Scalar, n: Array, cycle: Array, dtype: Any
) -> Array:
    if mode == "triangular2":
        halvings = jnp.minimum(cycle, np.uint32(1000)).astype(jnp.int32)
        return jnp.ldexp(jnp.ones(n.shape, dtype), -halvings)
    if mode == "exp_range":
        # The exponent loses digits as it grows, but e^x has shrunk by then: the error is
        # at most 1e-7 of 1. A host number takes its logarithm in double precision.
        on_host = isinstance(gamma, int | float | np.generic)
        log = np.log(gamma) if on_host else jnp.log(gamma)
        growth = jnp.exp(n.astype(dtype) * jnp.asarray(log).astype(dtype))
        # Finite, because the ends of a cycle multiply it by 0.
        return jnp.minimum(growth, jnp.finfo(dtype).max)
    return jnp.ones(n.shape, dtype)


# One cycle over the whole training.


_MAX_STEPS = 2**30


@checked
def one_cycle(
    peak: Scalar,
    total_steps: Scalar,
    *,
    pct_start: Scalar = 0.3,
    anneal: str = "cos",
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """Rise once to peak and fall to nearly nothing, as PyTorch's OneCycleLR.

    initial = peak / div_factor
    final = initial / final_div_factor
    summit = pct_start total_steps - 1
    last = total_steps - 1

    two phases: initial -> peak at summit -> final at last
    three phases: initial -> peak at summit -> initial at 2 summit -> final at last

    Args:
      peak: highest rate; a number or array [].
      total_steps: iterations in all, a positive integer below 2^30; the last one is
        total_steps - 1.
      pct_start: fraction of the iterations that rise, in [0, 1]; summit need not be
        whole.
      anneal: shape of the legs: "cos" (half a cosine each) or "linear".
      div_factor: peak / initial, > 0; a number or array [].
      final_div_factor: initial / final, > 0; a number or array [].
      three_phase: the paper's form: come back to initial first, then annihilate.

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape
      (below 0 counts as 0, from total_steps on as the last), the rate is float32
      (float64 under jax_enable_x64).

    Raises:
      ValueError: an unknown anneal, a total_steps that is not a positive integer,
        pct_start outside [0, 1] or, with three phases, outside (1 / total_steps, 1/2],
        a factor that is not positive; when called, a step that is not an integer.

    Example:
      >>> rate = one_cycle(1.0, 9, pct_start=5 / 9, anneal="linear", div_factor=4.0)
      >>> [round(float(rate(step)), 3) for step in (0, 2, 4, 6, 8)]
      [0.25, 0.625, 1.0, 0.5, 0.0]

    References:
      Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using
      Large Learning Rates", arXiv 1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """
    check_number("one_cycle: `peak`", peak)
    check_number("one_cycle: `div_factor`", div_factor, 0)
    check_number("one_cycle: `final_div_factor`", final_div_factor, 0)
    ends = _ends("one_cycle", total_steps, pct_start, anneal, three_phase)

    def values(dtype: Any) -> list[Array]:
        high = cast(peak, dtype)
        initial = high / cast(div_factor, dtype)
        final = initial / cast(final_div_factor, dtype)
        if three_phase:
            return [initial, high, initial, final]
        return [initial, high, final]

    return _path(ends, values, anneal)


@checked
def one_cycle_momentum(
    base: Scalar,
    peak: Scalar,
    total_steps: Scalar,
    *,
    pct_start: Scalar = 0.3,
    anneal: str = "cos",
    three_phase: bool = False,
) -> Schedule:
    """Move momentum against `one_cycle`: down to base as the rate rises, and back.

    two phases: peak -> base at summit -> peak
    three phases: the same, and peak throughout the last phase

    Args:
      base: lowest momentum, where the rate is highest; a number or array [].
      peak: momentum at both ends; a number or array [].
      total_steps: as for `one_cycle`.
      pct_start: fraction of the iterations in which the momentum falls.
      anneal: "cos" or "linear".
      three_phase: whether the rate has three phases.

    Returns:
      schedule(step) -> momentum, as for `one_cycle`.

    Raises:
      ValueError: as `one_cycle`.

    Example:
      >>> momentum = one_cycle_momentum(0.85, 0.95, 10)
      >>> [round(float(momentum(step)), 3) for step in (0, 1, 2, 9)]
      [0.95, 0.9, 0.85, 0.95]

    References:
      Smith and Topin, arXiv 1708.07120; torch.optim.lr_scheduler.OneCycleLR
      (cycle_momentum).
    """
    check_number("one_cycle_momentum: `base`", base)
    check_number("one_cycle_momentum: `peak`", peak)
    ends = _ends(
        "one_cycle_momentum", total_steps, pct_start, anneal, three_phase
    )

    def values(dtype: Any) -> list[Array]:
        low = cast(base, dtype)
        high = cast(peak, dtype)
        return [high, low, high, high] if three_phase else [high, low, high]

    return _path(ends, values, anneal)


def _ends(
    function: str,
    total_steps: Any,
    pct_start: Any,
    anneal: str,
    three_phase: bool,
) -> list[float]:
    """Return where the phases end, in iterations; fractional, and below 0 for no rise."""
    total = plain(f"{function}: `total_steps`", total_steps)
    if not (0 < total < _MAX_STEPS and total.is_integer()):
        raise ValueError(
            f"cyclical.{function}: `total_steps` is {total_steps}: give an "
            "integer in (0, 2^30)"
        )
    if anneal not in ("cos", "linear"):
        raise ValueError(
            f"cyclical.{function}: `anneal` is {anneal!r}: give 'cos' or 'linear'"
        )
    rise = plain(f"{function}: `pct_start`", pct_start)
    summit = rise * total - 1
    if three_phase and not (summit > 0 and rise <= 0.5):
        raise ValueError(
            f"cyclical.{function}: `pct_start` is {rise}: with three phases "
            "give a number in (1 / total_steps, 0.5]"
        )
    if not 0 <= rise <= 1:
        raise ValueError(
            f"cyclical.{function}: `pct_start` is {rise}: give a number in [0, 1]"
        )
    if three_phase:
        return [summit, 2 * summit, total - 1]
    return [summit, total - 1]


def _path(ends: list[float], values: Any, anneal: str) -> Schedule:
    """Build a schedule through values[i] at ends[i - 1], starting at step 0.

    Legs that contain no step are left out.
    """
    last = int(ends[-1])
    spans = list(zip([0.0, *ends], ends, strict=False))
    legs = [
        i for i, (start, end) in enumerate(spans) if end > start and end >= 0
    ]
    if not legs:  # A single step that should rise: it is the last one.
        legs = [len(spans) - 1]
        spans[-1] = (-1.0, 0.0)

    def schedule(step: Any) -> Array:
        n = jnp.minimum(iteration(step), np.uint32(last)).astype(jnp.int32)
        dtype = jnp.result_type(float)
        points = values(dtype)
        rate = _leg(n, *spans[legs[-1]], points[legs[-1] :], anneal, dtype)
        for i in legs[-2::-1]:
            earlier = _leg(n, *spans[i], points[i:], anneal, dtype)
            rate = jnp.where(n <= math.floor(spans[i][1]), earlier, rate)
        return rate

    return schedule


def _leg(
    n: Array, start: float, end: float, points: Any, anneal: str, dtype: Any
) -> Array:
    # Distances from the first whole iteration and to the last: integers plus a positive
    # remainder, which add up without cancelling. Outside the leg they are not used.
    first = math.ceil(start)
    final = math.floor(end)
    done = (n - first).astype(dtype) + (first - start)
    left = (final - n).astype(dtype) + (end - final)
    length = end - start
    is_cosine = anneal == "cos"
    return blend(
        points[0], points[1], done / length, left / length, cos=is_cosine
    )


# Cosine annealing with warm restarts: any number of them in a graph of one size.


_STEPS = 2**32 - 1
_MAX_CYCLES = 1000
_GRAIN = 2**128


@checked
def warm_restarts(
    peak: Scalar,
    first_period: Scalar,
    *,
    period_mult: Scalar = 1,
    floor: Scalar = 0.0,
) -> Schedule:
    """Fall along half a cosine from peak to floor, and restart, in ever longer cycles.

    rate = floor + (peak - floor) (1 + cos(pi t / T)) / 2

    at t iterations into a cycle of T = first_period period_mult^k iterations, in cycle
    k = 0, 1, ...

    Args:
      peak: rate at the start of every cycle; a number or array [].
      first_period: iterations of the first cycle, >= 1. Fractions whose denominator is
        at most 1000 are exact; others are rounded to the nearest of those.
      period_mult: length of a cycle over that of the one before, 1 or more (not so near
        1 that there would be more than 1000 different cycles in 2^32 iterations); exact
        as first_period is.
      floor: rate that a cycle falls to (the restart comes when it would be reached); a
        number or array [].

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape
      (below 0 counts as 0), the rate is float32 (float64 under jax_enable_x64) of the
      same shape.

    Raises:
      ValueError: first_period below 1, traced or too large, period_mult below 1, traced
        or too near 1; when called, a step that is not an integer.

    Example:
      >>> rate = warm_restarts(1.0, 2, period_mult=2)
      >>> [round(float(rate(step)), 3) for step in range(7)]
      [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    References:
      Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts",
      arXiv 1608.03983, equation 5;
      torch.optim.lr_scheduler.CosineAnnealingWarmRestarts.
    """
    check_number("warm_restarts: `peak`", peak)
    check_number("warm_restarts: `floor`", floor)
    name = "warm_restarts: `first_period`"
    period = representable(name, exact(name, first_period))
    mult = plain("warm_restarts: `period_mult`", period_mult)
    if not 1 <= mult < math.inf:
        raise ValueError(
            f"cyclical.warm_restarts: `period_mult` is {mult}: give a number >= 1"
        )
    starts = _starts(period, mult) if mult > 1 else []

    def schedule(step: Any) -> Array:
        n = iteration(step)
        dtype = jnp.result_type(float)
        if starts:
            t, length = _growing(n, starts, dtype)
        else:
            t = phase(n, period)[1].astype(dtype)
            length = float(period.numerator)
        return blend(peak, floor, t / length, (length - t) / length, cos=True)

    return schedule


def _starts(period: Fraction, mult: float) -> list[Fraction]:
    """Return where the cycles start, up to the first start that no step reaches."""
    # A float next to 4/3 or 1.1 is read as that fraction, so that cycles end on whole
    # iterations.
    rational = Fraction(mult).limit_denominator(1000)
    ratio = rational if float(rational) == mult else Fraction(mult)
    starts = [Fraction(0)]
    length = period
    while starts[-1] < _STEPS:
        starts.append(starts[-1] + length)
        length *= ratio
        if length.denominator > _GRAIN:
            # Exact powers of a fraction would grow without end, and no later cycle can
            # end on a whole iteration.
            length = Fraction(round(length * _GRAIN), _GRAIN)
        if len(starts) > _MAX_CYCLES:
            raise ValueError(
                f"cyclical.warm_restarts: `period_mult` is {float(mult)}: give "
                f"1, or a number so large that there are at most {_MAX_CYCLES} "
                "different cycles"
            )
    return starts


def _growing(
    n: Array, starts: list[Fraction], dtype: Any
) -> tuple[Array, Array]:
    """Return (iterations into the cycle, its length) from the table of starts."""
    # Step n is in the last cycle whose start, rounded up, is not after n.
    bounds = np.asarray([math.ceil(s) for s in starts[1:-1]], np.uint32)
    bounds = bounds.reshape((1,) * n.ndim + (-1,))
    cycle = jnp.sum(n[..., None] >= bounds, axis=-1, dtype=jnp.int32)
    whole = np.asarray([math.floor(s) for s in starts[:-1]], np.uint32)
    rest = np.asarray([float(s - math.floor(s)) for s in starts[:-1]])
    lengths = np.asarray([float(b - a) for a, b in itertools.pairwise(starts)])
    t = (n - jnp.asarray(whole)[cycle]).astype(dtype) - jnp.asarray(
        rest, dtype
    )[cycle]
    return t, jnp.asarray(lengths, dtype)[cycle]
