"""Switches of jax that only some versions have."""

import contextlib

import jax
import pytest

HAS_REMAT3 = hasattr(jax.config, "jax_remat3")


@contextlib.contextmanager
def remat3(on=True):
    """Under it, jax.checkpoint is (or is not) the one to come; skips where this jax has none."""
    if not HAS_REMAT3:
        if on:
            pytest.skip("this jax has no jax_remat3")
        yield
        return
    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", on)
    try:
        yield
    finally:
        jax.config.update("jax_remat3", before)
