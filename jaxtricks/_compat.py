"""Every difference between the jax versions we support, in one place (tests/test_compat.py)."""

import contextlib
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import shard_alike
from jax.experimental.xla_metadata import set_xla_metadata


def enable_x64() -> contextlib.AbstractContextManager[Any]:
    """A context in which float64 exists: a public name of jax since 0.8, an experimental one before."""
    home: Any = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return home.enable_x64(True)


def zeros_alike(x: Any, dtype: Any, tag: str) -> jax.Array:
    """Zeros that are sharded as x is, whatever sharding the compiler finds for x: there is no public name."""
    x = jax.lax.stop_gradient(x).astype(
        dtype
    )  # zeros converted later would be folded, and lie anywhere
    return alike(jnp.zeros_like(x), x, tag)


def alike(x: jax.Array, other: jax.Array, tag: str) -> jax.Array:
    """x, sharded by the compiler as the other is: the same shape and dtype.

    JAX lowers equal equations once, and then all arrays of one shape in a program would be sharded alike.
    The tag, another for every pair, makes them different.
    """
    with set_xla_metadata(alike=tag):
        x, _ = shard_alike.shard_alike(x, other)
    return x


def varying(x: Any) -> frozenset[str]:
    """Axes of shard_map over which x differs; two names of it in two years."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


class Meeting:
    """Short texts that all processes of `jax.distributed` exchange on the host, in an order they share.

    No collective of the devices: a thread that loads data may meet while a step runs. The store that
    jax.distributed keeps for itself has no public name.
    """

    def __init__(self, purpose: str):
        state = importlib.import_module("jax._src.distributed").global_state
        self._client, self._id, self._size = state.client, state.process_id, state.num_processes
        self._count = 0
        if self._client is not None:
            # All processes make their meetings in the same order.
            number = self._client.key_value_increment(f"jaxtricks/{purpose}/{self._id}", 1)
            self._name = f"jaxtricks/{purpose}/{number}"

    def exchange(self, text: str, timeout: float) -> list[str]:
        """The texts of all processes; waits for them, for `timeout` seconds at most, then raises."""
        if self._client is None or self._size == 1:
            return [text]
        self._count += 1
        name = f"{self._name}/{self._count}"
        self._client.key_value_set(f"{name}/{self._id}", text)
        return [
            self._client.blocking_key_value_get(f"{name}/{i}", int(timeout * 1000))
            for i in range(self._size)
        ]
