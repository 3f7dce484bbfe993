"""The position in a cycle, in integers: float32 never sees the step itself."""

import math
import numbers
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks._arguments import described
from jaxtricks._typing import Array

_MAX_DENOMINATOR = 1000
_LIMIT = 2**31
_LAST_STEP = 2**32 - 1


def plain(name: str, x: Any) -> float:
    """A static number; `name` is "function: `argument`" for the message."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(f"cyclical.{name} is traced: give a plain number")
    is_number = isinstance(x, numbers.Real | np.ndarray | jax.Array) and not np.iscomplexobj(x)
    if not is_number or np.ndim(x) != 0:
        raise ValueError(f"cyclical.{name} is {described(x)}: give a plain number")
    return float(x)


def check_number(name: str, x: Any, low: float = -math.inf) -> None:
    """Raise unless a number is finite and above `low`; device arrays pass, they may be traced."""
    if isinstance(x, jax.Array):
        return
    values = np.asarray(x)
    wanted = "finite number" if low == -math.inf else f"number > {low:g}"
    if values.ndim or values.dtype.kind not in "iuf":
        raise ValueError(f"cyclical.{name} is {described(x)}: give a {wanted}")
    if not low < values < math.inf:
        raise ValueError(f"cyclical.{name} is {x}: give a {wanted}")


def exact(name: str, x: Any) -> Fraction:
    """The nearest rational of small denominator."""
    if not 0 < plain(name, x) < _LIMIT / 2:
        raise ValueError(f"cyclical.{name} is {x}: give a number in (0, 2^30)")
    # Through float, because a NumPy float32 or an integer array is no Rational.
    nearest = Fraction(float(x)).limit_denominator(_MAX_DENOMINATOR)
    return nearest or Fraction(1, _MAX_DENOMINATOR)


def representable(name: str, period: Fraction) -> Fraction:
    """The period as a fraction whose numerator fits int32; `name` is the argument to lengthen."""
    if period < 1:
        raise ValueError(
            f"cyclical.{name} makes cycles of {float(period):g} iterations: lengthen it, to 1 or more"
        )
    # Only legs with two different, large denominators are affected.
    return period.limit_denominator(max(1, (_LIMIT - 1) // math.ceil(period)))


def iteration(step: Any) -> Array:
    """The step as uint32; below 0 counts as 0, above 2^32 - 1 as that."""
    if isinstance(step, int | np.generic | np.ndarray) and np.asarray(step).dtype.kind in "iu":
        # On the host: without x64 JAX takes 2^31 for a negative number.
        step = np.clip(np.asarray(step), 0, _LAST_STEP).astype(np.uint32)
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise ValueError(f"cyclical: the step is {step.dtype}: give an integer")
    if jnp.iinfo(step.dtype).max > _LAST_STEP:
        step = jnp.minimum(step, jnp.asarray(_LAST_STEP, step.dtype))
    return jnp.maximum(step, 0).astype(jnp.uint32)


def phase(n: Array, period: Fraction) -> tuple[Array, Array]:
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


def blend(start: Any, end: Any, done: Array, left: Array, *, cos: bool) -> Array:
    """From start (done 0, left 1) to end (done 1, left 0), along half a cosine or a line.

    Both fractions are given, so that nothing cancels: each end is met exactly, however small, and what
    is added to the nearer end is at most half the way, however narrow.
    """
    if cos:
        done, left = (jnp.square(jnp.sin(x * (np.pi / 2))) for x in (done, left))
    start, end = cast(start, done.dtype), cast(end, done.dtype)
    span = end - start
    return jnp.where(done < left, start + span * done, end - span * left)


def cast(x: Any, dtype: Any) -> Array:
    """A number or array of any dtype as a floating array."""
    return jnp.asarray(x).astype(dtype)
