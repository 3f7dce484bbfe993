"""Switches of jax that only some versions have."""

import contextlib

import jax
import pytest

OPT_IN = ("jax_remat3", "jax_custom_jvp3", "jax_custom_vjp3", "jax_scan3")
HAS_REMAT3 = hasattr(jax.config, "jax_remat3")


@contextlib.contextmanager
def opted(flag):
    """Under it, jax uses what the flag brings early; skips where this jax lacks the flag."""
    if not hasattr(jax.config, flag):
        pytest.skip(f"this jax has no {flag}")
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        yield
    finally:
        jax.config.update(flag, before)


@contextlib.contextmanager
def remat3(on=True):
    """Under it, jax.checkpoint is (or is not) the one to come; skips where this jax has none."""
    if not on:
        yield
        return
    with opted("jax_remat3"):
        yield
