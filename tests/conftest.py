"""Switches for every test: strict ranks, eight virtual devices, golden arrays at hand."""

import json
import os
import pathlib
import tempfile

# TEST_PLATFORM=cuda,cpu tests on a GPU, as `make gpu-check` does; TEST_PLATFORM=cpu on one CPU device.
# XLA_FLAGS are then those of the environment.
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
# Nearly all the time of this suite is XLA compiling small programs that then run once. CHEAP_COMPILER=1,
# as `make test` sets it, compiles them with LLVM at -O0, and what another module compiled comes from disk.
# Tests of what the compiler's own choices decide (bytes, last bits) are marked `stock`; those `make test`
# runs without it, as `make test-all` runs everything.
if "TEST_PLATFORM" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_FLAGS", "")
if os.environ.get("CHEAP_COMPILER"):
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )

# Devices wait for each other in threads of one pool, which XLA makes as large as this says: with one a
# device, two sums under way at once can take all threads and wait for ever.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
import pytest

from tests import cases, flags

if os.environ.get("CHEAP_COMPILER"):
    # One folder a worker, since jax does not write its entries at once; not in the environment, where the
    # processes that tests start would share it.
    programs = tempfile.TemporaryDirectory(prefix="jaxtricks-programs-")
    jax.config.update("jax_compilation_cache_dir", programs.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

ELSEWHERE = "TEST_PLATFORM" in os.environ
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_unconfigure():
    """The folder of compiled programs goes with its process."""
    if os.environ.get("CHEAP_COMPILER"):
        programs.cleanup()


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items):
    """Mark what `make test` leaves out, what is expected to fail, and what this platform lacks."""
    cases.mark(items)
    flags.mark(items)
    if not ELSEWHERE:
        return
    unmet = {"devices": jax.device_count() < 8, "stock": jax.default_backend() != "cpu"}
    reasons = {"devices": "needs eight devices", "stock": "of programs for XLA's CPU backend"}
    for item in items:
        for name in filter(unmet.get, unmet):
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reasons[name]))


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Compiled programs go with their module: thousands, with an MLIR context each, slow compiling down."""
    yield
    jax.clear_caches()


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
