"""Every difference between the jax versions we support, in one place (tests/test_compat.py)."""

import contextlib
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import shard_alike


def enable_x64() -> contextlib.AbstractContextManager[Any]:
    """A context in which float64 exists: a public name of jax since 0.8, an experimental one before."""
    home: Any = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return home.enable_x64(True)


def zeros_alike(x: Any, dtype: Any) -> jax.Array:
    """Zeros that are sharded as x is, whatever sharding the compiler finds for x: there is no public name."""
    x = jax.lax.stop_gradient(x).astype(
        dtype
    )  # zeros converted later would be folded, and lie anywhere
    return alike(jnp.zeros_like(x), x)


def alike(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, sharded by the compiler as the other is: the same shape and dtype."""
    x, _ = shard_alike.shard_alike(x, other)
    return x
