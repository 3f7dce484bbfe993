"""Switches of jax that only some versions have."""

import contextlib

import jax
import pytest

HAS_REMAT3 = hasattr(jax.config, "jax_remat3")

# What fails under a flag set from the start, as `make test-next` does: {flag: {reason: {test: its cases}}}.
EXPECTED = {
    "jax_scan3": {
        "jax has no gradient and no vmap of Scan3 yet": {
            "test_amp_autocast.py::test_gradients_are_as_close_as_cast_by_hand": [
                "transformer, remat"
            ],
            "test_amp_autocast.py::test_gradients_of_a_recurrent_network_are_close": [],
            "test_amp_autocast.py::test_nothing_in_the_zoo_is_unknown": [
                *("LSTM", "control flow", "custom rules", "data parallel"),
                *("transformer, remat", "transformer, scan"),
            ],
            "test_amp_autocast.py::test_products_are_low_and_sums_are_not": [
                "control flow-bfloat16-autocast(grad)",
                "transformer, remat-float16-autocast(grad)",
                "transformer, scan-bfloat16-autocast(grad)",
            ],
            "test_laws_wrappers.py::test_under_vmap_and_scan": [
                *("amp.autocast, full", "amp.full_precision", "amp.with_policy, full"),
                *("remat.checkpoint", "remat.recompute_grad"),
            ],
            "test_remat_names.py::test_names_in_a_loop_go_to_jax": ["remat", "remat3"],
            "test_remat_names.py::test_vmap_scan_and_bfloat16": ["remat", "remat3"],
        },
        "the carry of Scan3 is a Ref, which autocast refuses": {
            "test_amp_autocast.py::test_explain_names_the_silent_cases": [],
            "test_amp_autocast.py::test_products_are_low_and_sums_are_not": [
                "LSTM-float16-grad(autocast)",
                "custom rules-float16-grad(autocast)",
                "data parallel-float16-grad(autocast)",
                "transformer, remat-bfloat16-grad(autocast)",
            ],
            "test_amp_autocast.py::test_scan_carries": [],
        },
        "within jit a Scan3 without stacked outputs does not run (findings/scan3_values.sh)": {
            "test_laws_modules.py::test_gradients_under_remat_vmap_and_scan": [
                *("nnx.ACBlock", "nnx.DilatedReparamBlock", "nnx.DiverseBranchBlock, online"),
            ],
        },
    },
}


def mark(items):
    """Expect the failures listed for the flags that are on; a listed test that passes fails."""
    on = [flag for flag in EXPECTED if getattr(jax.config, flag, False)]
    expected = {
        test + case: reason
        for flag in on
        for reason, tests in EXPECTED[flag].items()
        for test, cases in tests.items()
        for case in ([f"[{case}]" for case in cases] or [""])
    }
    for item in items:
        path, bracket, case = item.nodeid.partition("[")
        reason = expected.get(path.rpartition("/")[2] + bracket + case)
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


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
