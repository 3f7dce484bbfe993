"""Adafactor's own schedules: the relative step and the decay of the second moment."""

from typing import Any

import jax.numpy as jnp

from jaxtricks._typing import Array, ScalarOrSchedule
from jaxtricks.memopt import _leaves


def relative_step(count: Any, warmup_init: bool, dtype: Any) -> Array:
    """min(1e-2, 1/sqrt(t)), or min(1e-6 t, 1/sqrt(t)); t = count + 1."""
    t = count.astype(dtype) + 1
    return jnp.minimum(1e-6 * t if warmup_init else jnp.asarray(1e-2, dtype), 1 / jnp.sqrt(t))


def check_decay(name: str, decay: str, rate: ScalarOrSchedule, cap: ScalarOrSchedule) -> None:
    """Raise for an unknown decay or numbers that cannot decay."""
    if decay not in ("pow", "adam"):
        raise ValueError(f"memopt.{name}: `decay` is {decay!r}: give 'pow' or 'adam'")
    _leaves.check_number(name, "decay_rate", rate, 0, 1 if decay == "adam" else float("inf"))
    _leaves.check_number(name, "decay_cap", cap, 0, 1)


def one_minus_beta2(
    count: Any,
    dtype: Any,
    decay: str,
    rate: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    cap: ScalarOrSchedule,
) -> Array:
    """1 - beta2_t, which keeps its digits where beta2_t is near 1.

    "pow": t^-rate. "adam": 1 - rate (1 - rate^(t-1)) / (1 - rate^t) = (1 - rate) / (1 - rate^t).
    t = max(count + 1 - offset, 1): before the offset, and on a fresh state, beta2_t is 0.
    """
    t = count + 1 - _leaves.value(offset, count, count.dtype)
    t = jnp.maximum(t, 1).astype(dtype)
    floor = _complement(cap, count, dtype)
    if decay == "pow":
        return jnp.maximum(t ** -_leaves.value(rate, count, dtype), floor)
    # Not below one rounding error: the limit of the quotient at rate 1 is 1 / t, not 0 / 0.
    complement = jnp.maximum(_complement(rate, count, dtype), jnp.finfo(dtype).eps)
    return jnp.maximum(complement / -jnp.expm1(t * jnp.log1p(-complement)), floor)


def _complement(x: Any, count: Any, dtype: Any) -> Array:
    # A Python number is subtracted in double precision, before rounding.
    x = x(count) if callable(x) else x
    return jnp.asarray(1 - x).astype(dtype)
