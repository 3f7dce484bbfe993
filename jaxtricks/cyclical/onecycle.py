"""One cycle over the whole training: up, down, and out."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar, Schedule
from jaxtricks.cyclical.phase import blend, cast, check_number, iteration, plain

_LIMIT = 2**30


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
    """One rise to peak and one fall to nearly nothing, as PyTorch's OneCycleLR.

    initial = peak / div_factor;  final = initial / final_div_factor;  summit = pct_start total_steps - 1
    two phases: initial -> peak at summit -> final at total_steps - 1
    three phases: initial -> peak at summit -> initial at 2 summit -> final at total_steps - 1

    Args:
      peak: highest rate; a number or array [].
      total_steps: iterations in all, a positive integer below 2^30; the last one is total_steps - 1.
      pct_start: fraction of the iterations that rise, in [0, 1]; summit need not be whole.
      anneal: shape of the legs: "cos" (half a cosine each) or "linear".
      div_factor: peak / initial, > 0; a number or array [].
      final_div_factor: initial / final, > 0; a number or array [].
      three_phase: the paper's form: come back to initial first, then annihilate.

    Returns:
      schedule(step) -> rate; step is an integer or an array of integers of any shape (below 0 counts
      as 0, from total_steps on as the last), the rate is float32 (float64 under jax_enable_x64).

    Raises:
      ValueError: an unknown anneal, total_steps no positive integer, pct_start outside [0, 1] or, with
        three phases, outside (1 / total_steps, 1/2], a factor that is not positive; when called, a
        step that is not an integer.

    Example:
      >>> rate = one_cycle(1.0, 9, pct_start=5 / 9, anneal="linear", div_factor=4.0)
      >>> [round(float(rate(step)), 3) for step in (0, 2, 4, 6, 8)]
      [0.25, 0.625, 1.0, 0.5, 0.0]

    References:
      Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning
      Rates", arXiv 1708.07120; torch.optim.lr_scheduler.OneCycleLR.
    """
    check_number("one_cycle: `peak`", peak)
    check_number("one_cycle: `div_factor`", div_factor, 0)
    check_number("one_cycle: `final_div_factor`", final_div_factor, 0)
    ends = _ends("one_cycle", total_steps, pct_start, anneal, three_phase)

    def values(dtype: Any) -> list[Array]:
        high = cast(peak, dtype)
        initial = high / cast(div_factor, dtype)
        final = initial / cast(final_div_factor, dtype)
        return [initial, high, initial, final] if three_phase else [initial, high, final]

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
    """The momentum that goes with `one_cycle`: it falls to base as the rate rises, and comes back.

    two phases: peak -> base at summit -> peak; three phases: it stays at peak in the last

    Args:
      base: lowest momentum, where the rate is highest; a number or array [].
      peak: momentum at both ends; a number or array [].
      total_steps: as for `one_cycle`, and so are the others.
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
      Smith and Topin, arXiv 1708.07120; torch.optim.lr_scheduler.OneCycleLR (cycle_momentum).
    """
    check_number("one_cycle_momentum: `base`", base)
    check_number("one_cycle_momentum: `peak`", peak)
    ends = _ends("one_cycle_momentum", total_steps, pct_start, anneal, three_phase)

    def values(dtype: Any) -> list[Array]:
        low, high = cast(base, dtype), cast(peak, dtype)
        return [high, low, high, high] if three_phase else [high, low, high]

    return _path(ends, values, anneal)


def _ends(
    function: str, total_steps: Any, pct_start: Any, anneal: str, three_phase: bool
) -> list[float]:
    """Where the phases end, in iterations; not whole, and before 0 if nothing rises."""
    total = plain(f"{function}: `total_steps`", total_steps)
    if not (0 < total < _LIMIT and total.is_integer()):
        raise ValueError(
            f"cyclical.{function}: `total_steps` is {total_steps}: give an integer in (0, 2^30)"
        )
    if anneal not in ("cos", "linear"):
        raise ValueError(f"cyclical.{function}: `anneal` is {anneal!r}: give 'cos' or 'linear'")
    rise = plain(f"{function}: `pct_start`", pct_start)
    summit = rise * total - 1
    if three_phase and not (summit > 0 and rise <= 0.5):
        raise ValueError(
            f"cyclical.{function}: `pct_start` is {rise}: with three phases give a number in"
            " (1 / total_steps, 0.5]"
        )
    if not 0 <= rise <= 1:
        raise ValueError(f"cyclical.{function}: `pct_start` is {rise}: give a number in [0, 1]")
    return [summit, *([2 * summit] if three_phase else []), total - 1]


def _path(ends: list[float], values: Any, anneal: str) -> Schedule:
    """Through values[i] at ends[i - 1], from step 0 on; legs that no step falls on are left out."""
    last = int(ends[-1])
    spans = list(zip([0.0, *ends], ends, strict=False))
    legs = [i for i, (start, end) in enumerate(spans) if end > start and end >= 0]
    if not legs:  # One step, and all of it should rise: it is the last one.
        legs, spans[-1] = [len(spans) - 1], (-1.0, 0.0)

    def schedule(step: Any) -> Array:
        n = jnp.minimum(iteration(step), np.uint32(last)).astype(jnp.int32)
        dtype = jnp.result_type(float)
        points = values(dtype)
        rate = _leg(n, *spans[legs[-1]], points[legs[-1] :], anneal, dtype)
        for i in legs[-2::-1]:
            here = _leg(n, *spans[i], points[i:], anneal, dtype)
            rate = jnp.where(n <= math.floor(spans[i][1]), here, rate)
        return rate

    return schedule


def _leg(n: Array, start: float, end: float, points: Any, anneal: str, dtype: Any) -> Array:
    # From the first whole iteration on and up to the last: integers and a positive rest, which add up
    # without cancelling. Outside the leg both are meaningless, and not used.
    first, final = math.ceil(start), math.floor(end)
    done = (n - first).astype(dtype) + (first - start)
    left = (final - n).astype(dtype) + (end - final)
    length = end - start
    return blend(points[0], points[1], done / length, left / length, cos=anneal == "cos")
