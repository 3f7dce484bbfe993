"""The names that differ between the jax versions we support."""

import jax.numpy as jnp

from jaxtricks import _compat


def test_float64_exists_only_inside():
    with _compat.enable_x64():
        assert jnp.ones(1, jnp.float64).dtype == jnp.float64
    assert jnp.asarray([1.0]).dtype == jnp.float32
