"""Switches for every test: strict ranks, eight virtual devices, golden arrays at hand."""

import json
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def ours():
    """Strict dtype promotion: for tests that call only our own rooms (optax and flax fail under it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Float64 on, for comparisons with float64 references."""
    from jaxtricks import _compat

    with _compat.enable_x64():
        yield


@pytest.fixture
def golden():
    """golden("agc") -> (arrays, meta) of tests/golden/agc.npz; see tests/golden/README.md."""

    def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            arrays = {key: archive[key] for key in archive.files if key != "meta"}
            meta = json.loads(str(archive["meta"])) if "meta" in archive.files else {}
        return arrays, meta

    return load
