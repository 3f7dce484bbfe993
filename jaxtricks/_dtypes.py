"""Decide on dtypes: which are floating, and which one to compute statistics in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_floating(x: Any) -> bool:
    """Return whether x is an array (or shape) of a floating dtype."""
    # float8_e8m0fnu holds scales: it has neither a sign nor a zero.
    return (
        hasattr(x, "dtype")
        and jnp.issubdtype(x.dtype, jnp.floating)
        and x.dtype.name != "float8_e8m0fnu"
    )


def is_inexact(x: Any) -> bool:
    """Return whether x is an inexact array (or shape), float or complex."""
    if isinstance(x, float | complex):
        return True
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def is_key(x: Any) -> bool:
    """Return whether x is an array (or shape) of typed PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_floating(name: str, x: Any) -> None:
    """Raise unless x is of a floating dtype; `name` is "room.function: `argument`".

    Raises:
      ValueError: an integer, complex, bool or key array.
    """
    dtype = getattr(x, "dtype", None)
    if dtype is not None and not is_floating(x):
        raise ValueError(f"{name} is of {dtype}: give floating numbers")


def wide_dtype(*xs: Any) -> np.dtype:
    """Return the dtype for statistics: that of all the arrays, float32 at least."""
    return common_dtype(*xs, np.zeros((), np.float32))


def common_dtype(*xs: Any, override: Any = None) -> np.dtype:
    """Return the dtype that holds all the arrays; `override` replaces it.

    `jnp.promote_types` refuses mixed dtypes under strict promotion, which asks for an
    explicit choice: this is ours.
    """
    if override is not None:
        return np.dtype(override)
    dtypes = {x.dtype for x in xs if hasattr(x, "dtype")}
    if len(dtypes) > 1:
        dtypes = {_promotable(dtype) for dtype in dtypes}
    with jax.numpy_dtype_promotion("standard"):
        return jax.dtypes.canonicalize_dtype(
            functools.reduce(jnp.promote_types, dtypes)
        )


def _promotable(dtype: Any) -> Any:
    """Return the dtype, or bfloat16 for floats of 8 and 4 bits, which JAX never promotes."""
    tiny = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16
    return np.dtype(jnp.bfloat16) if tiny else dtype
