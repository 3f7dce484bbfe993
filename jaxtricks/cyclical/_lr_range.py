"""Test a range of learning rates: train briefly while the rate sweeps from lo to hi."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks._arguments import checked
from jaxtricks._typing import Array


class RangeTest(NamedTuple):
    """Losses over a sweep of learning rates; the result of `lr_range_test`.

    Attributes:
      lrs: rates [n].
      losses: the losses at them [n], before the update with that rate.
      smoothed: their bias-corrected exponential moving average [n].
      suggestion: the rate at which `smoothed` falls most steeply over log(rate) within
        its longest unbroken fall (the first averages are over few losses and noisy);
        NaN if it never falls. See `still_falling` for a fall that did not end.
    """

    lrs: Array
    losses: Array
    smoothed: Array
    suggestion: Array | float

    @property
    def still_falling(self) -> bool:
        """Return whether the smoothed loss was lowest at the last rate.

        The suggestion then lies in a fall that had not ended: raise `hi`, unless a NaN
        loss ended the test below it.
        """
        smoothed = np.asarray(self.smoothed)
        averages = smoothed[~np.isnan(smoothed)]
        return bool(
            averages.size == len(self.lrs)
            and averages.size > 1
            and averages[-1] <= np.min(averages[:-1])
        )


Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""step(carry, batch, lr) -> (carry, loss)."""


class _Curve(NamedTuple):
    """The curve so far; entries from `count` on are NaN."""

    count: jax.Array
    stopped: jax.Array
    average: jax.Array
    best: jax.Array
    losses: jax.Array
    smoothed: jax.Array


@checked
def lr_range_test(
    step: Step,
    carry: Any,
    batches: Any,
    *,
    lo: float = 1e-6,
    hi: float = 1.0,
    num_steps: int = 100,
    spacing: str = "exp",
    smoothing: float = 0.98,
    stop_factor: float = 4.0,
) -> RangeTest:
    """Train for num_steps at rates from lo to hi and watch the loss.

    lr_i = lo (hi / lo)^(i / (num_steps - 1)), or evenly spaced
    smoothed_i = (1 - s) / (1 - s^(i+1)) * sum_j s^(i-j) loss_j

    It stops after the first i where smoothed_i - best > (stop_factor - 1) |best|, with
    best = min smoothed.

    For a positive loss this means smoothed > stop_factor * best. A loss that is NaN or
    infinite also stops the test and is not in the result. The test ends at a lower rate
    if the batches run out.

    Args:
      step: step(carry, batch, lr) -> (carry, loss []), lr a floating array []; jit it
        yourself if batches is an iterable.
      carry: pytree of arrays that step updates (parameters, optimizer state); step gets
        a copy.
      batches: an iterable of batches (a list, a generator, a loader), or all of them
        stacked: an array or a dict, tuple or other pytree of arrays [batches, ...]. An
        iterable is looped over on the host; stacked batches make one `lax.while_loop`,
        also under jit.
      lo: first rate, > 0.
      hi: last rate, > lo.
      num_steps: number of rates, at least 2.
      spacing: "exp" (evenly in log(lr)) or "linear".
      smoothing: s of the average, in [0, 1); 0 = none.
      stop_factor: multiple of the best smoothed loss that ends the test, > 1; infinity
        = never.

    Returns:
      RangeTest of n <= num_steps entries, on the host. Under jit the arrays have
      num_steps entries, and losses and smoothed are NaN from where the test stopped.

    Raises:
      ValueError: lo, hi, num_steps, spacing, smoothing or stop_factor as above; no
        batches, or stacked ones of different number; a loss that is not a scalar.

    Example:
      >>> def step(w, batch, lr):
      ...     return w - lr * 2 * w, w**2
      >>> r = lr_range_test(step, 1.0, jnp.zeros(50), lo=1e-3, hi=10.0, num_steps=50, smoothing=0.0)
      >>> len(r.losses) < 50, 0.01 < r.suggestion < 1.0
      (True, True)

    References:
      Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186,
      section 3.3.
    """
    lrs = _rates(lo, hi, num_steps, spacing)
    weights = _weights(smoothing, stop_factor, num_steps)
    carry = jax.tree.map(
        lambda x: x.copy() if isinstance(x, Array) else x, carry
    )
    sweep = _on_device if _is_stacked(batches) else _on_host
    curve = sweep(step, carry, batches, lrs, weights, stop_factor)
    suggestion = _steepest(lrs, curve.smoothed, curve.count)
    if isinstance(curve.count, jax.core.Tracer):
        return RangeTest(lrs, curve.losses, curve.smoothed, suggestion)
    n = int(curve.count)
    if n == 0 and not curve.stopped:
        raise ValueError(
            "cyclical.lr_range_test: `batches` is empty: give at least one batch"
        )
    host = (np.asarray(x)[:n] for x in (lrs, curve.losses, curve.smoothed))
    return RangeTest(*host, suggestion=float(suggestion))


def _rates(lo: Any, hi: Any, num_steps: int, spacing: str) -> Array:
    says = "cyclical.lr_range_test: "
    if not 0 < lo < hi < math.inf:
        raise ValueError(f"{says}`lo` is {lo} and `hi` {hi}: give 0 < lo < hi")
    if num_steps < 2:
        raise ValueError(f"{says}`num_steps` is {num_steps}: give at least 2")
    if spacing not in ("exp", "linear"):
        raise ValueError(
            f"{says}`spacing` is {spacing!r}: give 'exp' or 'linear'"
        )
    spaced = np.geomspace if spacing == "exp" else np.linspace
    return jnp.asarray(spaced(lo, hi, num_steps), jnp.result_type(float))


def _weights(smoothing: float, stop_factor: float, num_steps: int) -> Array:
    """Return the weights of average += weight (loss - average), with bias correction."""
    if not 0 <= smoothing < 1:
        raise ValueError(
            f"cyclical.lr_range_test: `smoothing` is {smoothing}: give a "
            "number in [0, 1)"
        )
    if not stop_factor > 1:
        raise ValueError(
            f"cyclical.lr_range_test: `stop_factor` is {stop_factor}: give a number > 1"
        )
    weights = (1 - smoothing) / (1 - smoothing ** np.arange(1.0, num_steps + 1))
    return jnp.asarray(weights, jnp.result_type(float))


def _is_stacked(batches: Any) -> bool:
    """Return whether it is a pytree of arrays [batches, ...]; a list never is."""
    leaves = jax.tree.leaves(batches, is_leaf=_is_loader)
    if not hasattr(batches, "__iter__") and (
        not leaves or leaves[0] is batches
    ):
        raise ValueError(
            f"cyclical.lr_range_test: `batches` is a {type(batches).__name__}: "
            "give an iterable of batches, or all of them stacked"
        )
    if isinstance(batches, list) or not all(
        isinstance(x, Array) and x.ndim for x in leaves
    ):
        return False
    if len({len(x) for x in leaves}) > 1:
        raise ValueError(
            "cyclical.lr_range_test: `batches` has leaves of different length: "
            "stack the same number of batches in each, or give a list of "
            "batches"
        )
    return bool(leaves)


def _is_loader(x: Any) -> bool:
    # JAX warns of iterators in trees and will refuse them, so they count as leaves.
    return isinstance(x, Iterable) and not isinstance(x, tuple | list | Mapping)


def _on_host(
    step: Step,
    carry: Any,
    batches: Any,
    lrs: Array,
    weights: Array,
    stop_factor: float,
) -> _Curve:
    curve = _empty_curve(lrs)
    observe = jax.jit(_observe)
    for batch, lr in zip(
        itertools.islice(batches, len(lrs)), lrs, strict=False
    ):
        carry, loss = step(carry, batch, lr)
        curve = observe(curve, _scalar(loss), weights, stop_factor)
        if curve.stopped:
            break
    return curve


def _on_device(
    step: Step,
    carry: Any,
    batches: Any,
    lrs: Array,
    weights: Array,
    stop_factor: float,
) -> _Curve:
    batches = jax.tree.map(jnp.asarray, batches)
    limit = min(len(lrs), len(jax.tree.leaves(batches)[0]))

    def body(state: tuple[Any, _Curve]) -> tuple[Any, _Curve]:
        carry, curve = state
        batch = jax.tree.map(lambda x: x[curve.count], batches)
        carry, loss = step(carry, batch, lrs[curve.count])
        return carry, _observe(curve, _scalar(loss), weights, stop_factor)

    def is_running(state: tuple[Any, _Curve]) -> Array:
        return ~state[1].stopped & (state[1].count < limit)

    if limit == 0:
        return _empty_curve(lrs)
    start = (jax.tree.map(jnp.asarray, carry), _empty_curve(lrs))
    _, curve = lax.while_loop(is_running, body, start)
    return curve


def _empty_curve(lrs: Array) -> _Curve:
    zero = jnp.zeros([], lrs.dtype)
    blank = jnp.full(lrs.shape, jnp.nan, lrs.dtype)
    return _Curve(
        jnp.int32(0), jnp.bool_(False), zero, zero + jnp.inf, blank, blank
    )


def _scalar(loss: Any) -> Array:
    if jnp.shape(loss) != ():
        raise ValueError(
            "cyclical.lr_range_test: `step` returned a loss of shape "
            f"{jnp.shape(loss)}: return its mean"
        )
    return jnp.asarray(loss).astype(jnp.result_type(float))


def _observe(
    curve: _Curve, loss: Array, weights: Array, stop_factor: Any
) -> _Curve:
    i = curve.count
    finite = jnp.isfinite(loss)
    average = curve.average + weights[i] * (loss - curve.average)
    best = jnp.minimum(curve.best, average)
    diverged = average - best > (stop_factor - 1.0) * jnp.abs(best)
    after = _Curve(
        i + np.int32(1),
        diverged,
        average,
        best,
        curve.losses.at[i].set(loss),
        curve.smoothed.at[i].set(average),
    )
    # A step with a loss that is not finite must leave no trace in the averages, so the
    # whole curve is selected rather than the loss.
    latest = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), after, curve
    )
    return latest._replace(stopped=diverged | ~finite)


@jax.jit
def _steepest(lrs: Array, smoothed: Array, count: Array) -> Array:
    """Return the rate in the longest fall where the slope over log(rate) is least.

    Slopes are second-order difference quotients.
    """
    step = jnp.diff(jnp.log(lrs))
    slope = jnp.diff(smoothed) / step
    # An inner point has the mean of both slopes; the nearer neighbour counts more.
    inner = (slope[:-1] * step[1:] + slope[1:] * step[:-1]) / (
        step[:-1] + step[1:]
    )
    slopes = jnp.concatenate([slope[:1], inner, slope[-1:]])
    index = jnp.arange(len(lrs))
    # After an early stop the last point has only the slope before it.
    before = jnp.concatenate([slope[:1], slope])
    slopes = jnp.where(index == count - 1, before, slopes)
    falls = (jnp.diff(smoothed) < 0) & (index[1:] < count)
    length = index[1:] - lax.cummax(jnp.where(falls, 0, index[1:]))
    end = jnp.argmax(length) + 1
    longest = (index >= end - jnp.max(length, initial=0)) & (index <= end)
    slopes = jnp.where(longest & (index < count) & (count > 1), slopes, jnp.inf)
    least = jnp.argmin(slopes)
    return jnp.where(slopes[least] < 0, lrs[least], jnp.nan)
