"""cyclical against the Keras callback and PyTorch, and in exact rationals."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtricks.cyclical import (
    cyclical,
    cyclical_momentum,
    one_cycle,
    one_cycle_momentum,
    warm_restarts,
)


def sine(cycle):
    return 0.5 * (1 + jnp.sin(cycle % 4 * (np.pi / 2)))


def arguments(h):
    return {
        "base": h["base_lr"],
        "peak": h["max_lr"],
        "step_size_up": h.get("step_size", h.get("step_size_up")),
        "step_size_down": h.get("step_size_down"),
        "mode": h.get("mode", "triangular"),
        "gamma": h.get("gamma", 1.0),
        "scale_fn": sine if "fn" in h else None,
    }


def compare_keras(golden, near, far):
    arrays, meta = golden("clr_keras")
    for setting, h in meta["settings"].items():
        rate = jax.jit(cyclical(**arguments(h)))
        amplitude = h["max_lr"] - h["base_lr"]
        for kind, steps, tolerance in (
            ("lr", np.arange(len(arrays["lr/triangular"])), near),
            ("lr_far", arrays["far_iterations"], far),
        ):
            np.testing.assert_allclose(
                rate(jnp.asarray(steps, jnp.int32)),
                arrays[f"{kind}/{setting}"],
                rtol=0,
                atol=tolerance * amplitude,
                err_msg=f"{kind} {setting}",
            )


def test_equals_keras_in_float32(golden, ours):
    compare_keras(golden, 1e-6, 1e-6)


def test_equals_keras_in_float64(golden, x64, ours):
    # Far out the callback itself, in float64, has lost digits of it / step_size.
    compare_keras(golden, 1e-12, 1e-9)


@pytest.mark.parametrize(
    "setting", ["cyclic_triangular_asym", "cyclic_triangular2", "cyclic_exp_range"]
)
def test_equals_torch(setting, golden, x64, ours):
    arrays, meta = golden("clr_torch")
    h = meta["settings"][setting]["kwargs"]
    expected = arrays[f"lr/{setting}"]
    steps = jnp.arange(len(expected))
    np.testing.assert_allclose(cyclical(**arguments(h))(steps), expected, rtol=1e-12)
    bounds = {"base": h.get("base_momentum", 0.8), "peak": h.get("max_momentum", 0.9)}
    momentum = cyclical_momentum(**{**arguments(h), **bounds})
    np.testing.assert_allclose(momentum(steps), arrays[f"momentum/{setting}"], rtol=1e-12)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (Fraction(20), Fraction(20)),
        (Fraction(1), Fraction(1)),
        (Fraction(9, 2), Fraction(13, 4)),
        (Fraction(1, 3), Fraction(5, 7)),
        (Fraction(7999, 1000), Fraction(7999, 1000)),
        (Fraction(1234567, 1000), Fraction(2000000, 999)),
        (Fraction(2**30 - 1), Fraction(2**29)),
    ],
)
def test_exact_in_float32_after_any_number_of_steps(up, down, ours):
    steps = [0, 1, 2, 19, 20, 1000, 2**24 + 1, 50_000_000, 50_000_003, 2**31 - 1]
    expected = []
    for step in steps:
        at = Fraction(step) % (up + down)
        expected.append(float(at / up if at <= up else (up + down - at) / down))
    rate = cyclical(0.0, 1.0, float(up), float(down))
    np.testing.assert_allclose(rate(jnp.asarray(steps, jnp.int32)), expected, rtol=0, atol=3e-7)


def test_cycles_are_counted_exactly(ours):
    rate = cyclical(0.0, 1.0, 0.75, 0.5, scale_fn=lambda cycle: cycle, mode="triangular2")
    steps = np.asarray([1, 2, 3, 4, 12_345_679])
    cycle = steps * 4 // 5 + 1
    at = steps % 1.25
    x = np.where(at <= 0.75, at / 0.75, (1.25 - at) / 0.5)
    np.testing.assert_allclose(rate(jnp.asarray(steps)), cycle * x, rtol=1e-6)


def test_scale_by_iteration(ours):
    rate = cyclical(1.0, 2.0, 2, scale_fn=lambda step: 1 / (1 + step), scale_by="iteration")
    np.testing.assert_allclose(rate(jnp.arange(4)), [1, 1.25, 1 + 1 / 3, 1.125], rtol=1e-6)


def test_triangular2_far_out_is_zero_not_nan(ours):
    rates = cyclical(0.0, 1.0, 1, mode="triangular2")(jnp.asarray([1, 3, 2001, 2**31 - 1]))
    np.testing.assert_array_equal(rates, [1, 0.5, 0, 0])


def one_cycle_pair(h, momenta=(0.85, 0.95)):
    shape = {
        "pct_start": h.get("pct_start", 0.3),
        "anneal": h.get("anneal_strategy", "cos"),
        "three_phase": h.get("three_phase", False),
    }
    factors = {k: h[k] for k in ("div_factor", "final_div_factor") if k in h}
    total = h["total_steps"]
    return (
        one_cycle(h["max_lr"], total, **shape, **factors),
        one_cycle_momentum(*momenta, total, **shape),
    )


def compare_one_cycle(setting, golden, tolerance):
    arrays, meta = golden("clr_torch")
    schedules = one_cycle_pair(meta["settings"][setting]["kwargs"])
    for kind, schedule in zip(("lr", "momentum"), schedules, strict=True):
        expected = arrays[f"{kind}/{setting}"]
        values = jax.jit(schedule)(jnp.arange(len(expected), dtype=jnp.int32))
        np.testing.assert_allclose(values, expected, rtol=tolerance, err_msg=kind)


@pytest.mark.parametrize("setting", ["onecycle_cos", "onecycle_linear_3phase", "onecycle_linear"])
class TestOneCycle:
    def test_equals_torch_in_float64(self, setting, golden, x64, ours):
        compare_one_cycle(setting, golden, 1e-12)

    def test_equals_torch_in_float32_also_near_nothing(self, setting, golden, ours):
        # Relative, although the last rate is 4e-6 of the peak.
        compare_one_cycle(setting, golden, 1e-6)


def one_cycle_in_float64(step, total, pct, three):
    """Rates over the peak, defaults otherwise; one step at a time, with the phases of the docstring."""
    initial, final, summit = 1 / 25, 1 / 25e4, pct * total - 1
    knots = [(0.0, initial), (summit, 1.0)]
    knots += [(2 * summit, initial)] if three else []
    knots += [(total - 1, final)]
    for (start, a), (end, b) in itertools.pairwise(knots):
        if step <= end:
            return b + (a - b) * (1 + np.cos(np.pi * (step - start) / (end - start))) / 2
    return final


def compare_edges(total, pct, three, tolerance):
    summit = int(pct * total - 1)
    near = [0, 1, summit - 1, summit, summit + 1, 2 * summit, 2 * summit + 1]
    steps = [s for s in (*near, total // 2, total - 3, total - 2, total - 1) if 0 <= s < total]
    expected = [one_cycle_in_float64(s, total, pct, three) for s in steps]
    rates = jax.jit(one_cycle(1.0, total, pct_start=pct, three_phase=three))(jnp.asarray(steps))
    assert rates.dtype == jnp.result_type(float)
    np.testing.assert_allclose(rates, expected, rtol=tolerance)


@pytest.mark.parametrize(
    ("total", "pct", "three"),
    [
        (10, 0.0, False),
        (10, 0.05, False),
        (7, 1.0, False),
        (7, 1 / 3, True),
        (1000, 0.5, True),
        (2**29 + 1, 0.3, False),
        (2**29 + 1, 0.2, True),
        (1, 0.3, False),
    ],
)
class TestOneCycleAtTheEdges:
    def test_in_float64(self, total, pct, three, x64, ours):
        compare_edges(total, pct, three, 1e-10)

    def test_in_float32(self, total, pct, three, ours):
        compare_edges(total, pct, three, 2e-6)


def test_one_cycle_starts_peaks_ends_and_holds(ours):
    rate = one_cycle(1.0, 10, div_factor=4.0, final_div_factor=8.0)
    steps = jnp.asarray([-5, 0, 2, 9, 10, 2**31 - 1])
    np.testing.assert_array_equal(rate(steps), np.float32([0.25, 0.25, 1, 1 / 32, 1 / 32, 1 / 32]))
    momentum = one_cycle_momentum(0.5, 1.0, 10)
    np.testing.assert_array_equal(momentum(steps), np.float32([1, 1, 0.5, 1, 1, 1]))
    # A single step: the phase of length zero is left out.
    assert one_cycle(1.0, 1, pct_start=1.0, div_factor=1.0, final_div_factor=2.0)(0) == 0.5
    assert one_cycle(1.0, 2, pct_start=0.5, div_factor=2.0)(0) == 1.0


def compare_warm_restarts(golden, tolerance):
    arrays, meta = golden("clr_torch")
    h = meta["settings"]["sgdr"]["kwargs"]
    rate = warm_restarts(h["opt_lr"], h["T_0"], period_mult=h["T_mult"], floor=h["eta_min"])
    expected = arrays["lr/sgdr"]
    np.testing.assert_allclose(jax.jit(rate)(jnp.arange(len(expected))), expected, rtol=tolerance)


def test_warm_restarts_equal_torch_in_float64(golden, x64, ours):
    compare_warm_restarts(golden, 1e-12)


def test_warm_restarts_equal_torch_in_float32(golden, ours):
    compare_warm_restarts(golden, 1e-6)


@pytest.mark.parametrize(
    ("period", "mult"),
    [(1, 1), (10, 1), (4.5, 1), (7 / 3, 1), (10, 2), (1, 3), (4.5, 1.5), (7 / 3, 1.25)],
)
def test_warm_restarts_are_exact_in_float32_after_any_number_of_steps(period, mult, ours):
    exact = Fraction(period).limit_denominator(1000)
    restarts, start, length = [], Fraction(0), exact
    while len(restarts) < 12:
        restarts.append(round(start))
        start, length = start + length, length * Fraction(mult)
    steps = sorted({0, 1, 2, *restarts, 2**24 + 1, 50_000_000, 50_000_003, 2**31 - 1})
    expected = []
    for step in steps:
        start, length = Fraction(0), exact
        if mult == 1:
            start = step // length * length
        while start + length <= step:
            start, length = start + length, length * Fraction(mult)
        expected.append(0.25 + 0.75 * (1 + np.cos(np.pi * float((step - start) / length))) / 2)
    rate = jax.jit(warm_restarts(1.0, period, period_mult=mult, floor=0.25))
    np.testing.assert_allclose(rate(jnp.asarray(steps, jnp.int32)), expected, rtol=0, atol=4e-7)
    square = jnp.asarray(steps[:4], jnp.int32).reshape(2, 2)
    np.testing.assert_array_equal(rate(square).ravel(), rate(square.ravel()))


def test_schedules_scan_and_their_bounds_may_be_traced(ours):
    def sweep(peak, floor):
        schedules = (
            one_cycle(peak, 30, div_factor=peak / floor, three_phase=True),
            one_cycle_momentum(floor, peak, 30),
            cyclical_momentum(floor, peak, 3, 4),
            warm_restarts(peak, 5, period_mult=2, floor=floor),
        )
        body = lambda n, _: (n + 1, jnp.stack([schedule(n) for schedule in schedules]))
        return jax.lax.scan(body, jnp.int32(0), length=30)[1]

    peaks, floors = np.float32([1.0, 2.0]), np.float32([0.1, 0.5])
    traced = jax.jit(jax.vmap(sweep))(peaks, floors)
    for row, peak, floor in zip(traced, peaks, floors, strict=True):
        np.testing.assert_allclose(row, sweep(float(peak), float(floor)), rtol=3e-6)
    assert len(np.unique(traced[0], axis=0)) > 20


def test_bounds_and_gamma_may_be_traced(ours):
    steps = jnp.arange(30)

    def sweep(base, peak, gamma):
        return cyclical(base, peak, 4.5, mode="exp_range", gamma=gamma)(steps)

    traced = jax.jit(jax.vmap(sweep))(
        jnp.array([0.1, 0.2]), jnp.array([1.0, 2.0]), jnp.array([0.9, 1.0])
    )
    for row, h in zip(traced, [(0.1, 1.0, 0.9), (0.2, 2.0, 1.0)], strict=True):
        np.testing.assert_allclose(row, sweep(*h), rtol=2e-6)


def test_the_graph_does_not_grow(ours):
    sizes = {
        len(jax.make_jaxpr(cyclical(0.0, 1.0, up))(jnp.int32(0)).jaxpr.eqns) for up in (2, 10**6)
    }
    assert max(sizes) < 60
    sizes = {
        len(jax.make_jaxpr(warm_restarts(0.1, 10, period_mult=m))(jnp.int32(0)).jaxpr.eqns)
        for m in (1, 1.1, 2, 1000)
    }
    assert max(sizes) < 60


def test_negative_steps_count_as_zero(ours):
    assert cyclical(0.25, 1.0, 4)(-3) == 0.25


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: cyclical(mode="cosine"), "mode"),
        (lambda: cyclical(scale_by="epoch"), "scale_by"),
        (lambda: cyclical(step_size_up=0), "step_size_up"),
        (lambda: cyclical(step_size_down=-1.0), "step_size_down"),
        (lambda: cyclical(step_size_up=0.25), "shorter"),
        (lambda: cyclical(gamma=0.0), "gamma"),
        (lambda: cyclical()(1.5), "integer"),
        (lambda: cyclical_momentum(0.8, 0.9, 0), "step_size_up"),
        (lambda: one_cycle(1.0, 0), "total_steps"),
        (lambda: one_cycle(1.0, 10.5), "total_steps"),
        (lambda: one_cycle(1.0, 10, anneal="exp"), "anneal"),
        (lambda: one_cycle(1.0, 10, pct_start=1.1), "pct_start"),
        (lambda: one_cycle(1.0, 10, pct_start=float("nan")), "pct_start"),
        (lambda: one_cycle(1.0, 10, pct_start=0.6, three_phase=True), "pct_start"),
        (lambda: one_cycle(1.0, 10, pct_start=0.1, three_phase=True), "pct_start"),
        (lambda: one_cycle(1.0, 10, div_factor=0.0), "div_factor"),
        (lambda: one_cycle(1.0, 10, final_div_factor=-1.0), "final_div_factor"),
        (lambda: one_cycle(1.0, 10)(1.5), "integer"),
        (lambda: jax.jit(lambda n: one_cycle(1.0, n)(0))(3), "traced"),
        (lambda: one_cycle_momentum(0.8, 0.9, -1), "one_cycle_momentum"),
        (lambda: warm_restarts(1.0, 0), "first_period"),
        (lambda: warm_restarts(1.0, 0.5), "shorter"),
        (lambda: warm_restarts(1.0, 10, period_mult=0.5), "period_mult"),
        (lambda: warm_restarts(1.0, 10, period_mult=1.001), "period_mult"),
        (lambda: warm_restarts(1.0, 10, period_mult=float("inf")), "period_mult"),
        (lambda: jax.jit(lambda up: cyclical(step_size_up=up)(0))(3.0), "traced"),
    ],
)
def test_mistakes_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()
