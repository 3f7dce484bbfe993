"""cyclical against the Keras callback and PyTorch, and in exact rationals."""

import itertools
import math
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
from jaxtricks.cyclical._schedules import plain


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


@pytest.mark.stock
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


@pytest.mark.stock
@pytest.mark.parametrize("mode", ["triangular2", "exp_range"])
@pytest.mark.parametrize(
    ("up", "down"),
    [(Fraction(3), Fraction(7)), (Fraction(7, 3), Fraction(11, 7)), (Fraction(997, 999), 10**7)],
)
def test_every_mode_is_exact_in_float32_after_any_number_of_steps(up, down, mode, ours):
    gamma, steps = 1 - 2e-8, [0, 1, 5, 23, 1000, 49_999_999, 50_000_000, 2**31 - 2, 2**31 - 1]
    expected = []
    for step in steps:
        cycle, at = divmod(Fraction(step), up + down)
        scale = 0.5 ** min(cycle, 999) if mode == "triangular2" else np.exp(step * np.log(gamma))
        expected.append(scale * float(at / up if at <= up else (up + down - at) / down))
    steps = jnp.asarray(steps, jnp.int32)
    settings = (float(up), float(down)), {"mode": mode, "gamma": gamma}
    rate = cyclical(0.0, 1.0, *settings[0], **settings[1])(steps)
    np.testing.assert_allclose(rate, expected, rtol=0, atol=3e-7)
    momentum = cyclical_momentum(0.0, 1.0, *settings[0], **settings[1])(steps)
    np.testing.assert_allclose(momentum, 1 - np.asarray(expected), rtol=0, atol=3e-7)


@pytest.mark.stock
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


def path_of_torch(total, pct, anneal, values):
    """OneCycleLR.get_lr of every step, through the given values, in float64."""
    ends = [pct * total - 1, *([2 * pct * total - 2] if len(values) == 4 else []), total - 1]
    path = []
    for step in range(total):
        i = next(i for i, end in enumerate(ends) if step <= end or end == ends[-1])
        start, (a, b) = (0, *ends)[i], values[i : i + 2]
        done = (step - start) / (ends[i] - start)
        path.append(
            (b - a) * done + a
            if anneal == "linear"
            else b + (a - b) / 2 * (np.cos(np.pi * done) + 1)
        )
    return np.asarray(path)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("total", [2, 3, 7, 61, 1000])
def test_one_cycle_is_torchs_at_odd_settings(total, three, anneal, ours):
    tried, steps = 0, jnp.arange(1000)  # one shape for all: it compiles once
    for pct in (0.05, 0.123, 0.29, 0.37, 0.4999, 0.85, 0.99):
        if three and not 1 / total < pct <= 0.5:
            continue
        tried, shape = tried + 1, dict(pct_start=pct, anneal=anneal, three_phase=three)
        initial, last = 0.7 / 13, 0.7 / 13 / 77
        values = [initial, 0.7, initial, last] if three else [initial, 0.7, last]
        rate = one_cycle(0.7, total, div_factor=13.0, final_div_factor=77.0, **shape)
        rates = np.asarray(rate(steps))[:total]
        expected = path_of_torch(total, pct, anneal, values)
        np.testing.assert_allclose(rates, expected, rtol=0, atol=0.7 * 4e-7, err_msg=f"{pct}")
        # A tenth between bounds near 1: less than a rounding error of a float32 near 1 is impossible.
        momenta = np.asarray(one_cycle_momentum(0.85, 0.95, total, **shape)(steps))[:total]
        values = [0.95, 0.85, 0.95, 0.95] if three else [0.95, 0.85, 0.95]
        expected = path_of_torch(total, pct, anneal, values)
        np.testing.assert_allclose(momenta, expected, rtol=0, atol=0.1 * 1e-6, err_msg=f"{pct}")
    assert tried or (three and total == 2)


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


@pytest.mark.stock
@pytest.mark.parametrize(
    ("period", "mult"),
    [
        (1, 1),
        (10, 1),
        (4.5, 1),
        (7 / 3, 1),
        (997 / 991, 1),
        (10, 2),
        (1, 3),
        (4.5, 1.5),
        (7 / 3, 1.25),
    ]
    # Some cycles end on whole iterations, if the factor is taken as the fraction that it means.
    + [(13 / 7, 2), (9, 4 / 3), (9, 5 / 3), (10, 1.1), (100, 1.05)]
    # Hundreds of cycles; digits of no small fraction.
    + [(1000, 1.02), (10, 2**0.5)],
)
def test_warm_restarts_are_exact_in_float32_after_any_number_of_steps(period, mult, ours):
    exact, near = (Fraction(x).limit_denominator(1000) for x in (period, mult))
    mult = near if float(near) == mult else Fraction(mult)
    restarts, start, length = [], Fraction(0), exact
    while len(restarts) < 24:
        restarts += [math.floor(start), math.ceil(start)]
        start, length = start + length, length * mult
    steps = sorted({0, 1, 2, *restarts, 2**24 + 1, 50_000_000, 50_000_003, 2**31 - 1})
    expected = []
    for step in steps:
        start, length = Fraction(0), exact
        if mult == 1:
            start = step // length * length
        while start + length <= step:
            start, length = start + length, length * mult
        expected.append(0.25 + 0.75 * (1 + np.cos(np.pi * float((step - start) / length))) / 2)
    rate = jax.jit(warm_restarts(1.0, period, period_mult=float(mult), floor=0.25))
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


@pytest.mark.parametrize(
    "make",
    [
        lambda base, peak: cyclical(base, peak, 4.5, 3, mode="triangular2"),
        lambda base, peak: cyclical(base, peak, 4.5, mode="exp_range", gamma=base),
        lambda base, peak: cyclical_momentum(base, peak, 3),
        lambda base, peak: one_cycle(peak, 20, div_factor=peak / base, three_phase=True),
        lambda base, peak: one_cycle_momentum(base, peak, 20, anneal="linear"),
        lambda base, peak: warm_restarts(peak, 5.5, period_mult=2, floor=base),
    ],
)
def test_gradients_are_those_of_the_bounds(make, x64, ours):
    at = (jnp.float64(0.5), jnp.float64(0.9))
    total = lambda base, peak: jnp.sum(make(base, peak)(jnp.arange(40)) ** 2)
    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(*at)
    for i, slope in enumerate(slopes):
        up, down = ([x + (j == i) * d for j, x in enumerate(at)] for d in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (total(*up) - total(*down)) / 2e-6, rtol=1e-6)
        assert abs(slope) > 1e-3


def test_bounds_of_any_dtype(ours):
    wide, narrow = np.float64(0.9), jnp.bfloat16(0.5)
    for schedule in (
        cyclical(narrow, wide, 4),
        cyclical_momentum(narrow, wide, 4),
        one_cycle(wide, 9, div_factor=narrow),
        one_cycle_momentum(narrow, wide, 9),
        warm_restarts(wide, 4, floor=narrow),
    ):
        assert schedule(jnp.int8(3)).dtype == jnp.float32
        assert 0.4 < schedule(np.uint32(3)) < 1.8
        assert schedule(jnp.zeros((2, 0), jnp.int32)).shape == (2, 0)


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


@pytest.mark.parametrize("x", ["4", None, np.ones(2)])
def test_static_arguments_are_plain_numbers(x, ours):
    # The annotations say so too, but only these tests check them.
    with pytest.raises(ValueError, match="f: `n` is .*give a plain number"):
        plain("f: `n`", x)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: cyclical(mode="cosine"), "mode"),
        (lambda: cyclical(scale_by="epoch"), "scale_by"),
        (lambda: cyclical(step_size_up=0), "step_size_up"),
        (lambda: cyclical(step_size_down=-1.0), "step_size_down"),
        (lambda: cyclical(step_size_up=0.25), "`step_size_up` makes cycles of 0.5"),
        (lambda: cyclical(step_size_up=float("nan")), "step_size_up"),
        (lambda: cyclical(step_size_up=2**30), "step_size_up"),
        (lambda: cyclical(step_size_up=np.ones(2)), "step_size_up"),
        (lambda: cyclical(float("nan")), "`base`"),
        (lambda: cyclical(gamma=np.float32(-1)), "gamma"),
        (lambda: cyclical(gamma=float("inf")), "gamma"),
        (lambda: cyclical(gamma=0.0), "gamma"),
        (lambda: cyclical()(1.5), "integer"),
        (lambda: cyclical_momentum(0.8, 0.9, 0), "cyclical_momentum: `step_size_up`"),
        (lambda: cyclical_momentum(0.8, 0.9, mode="up"), "cyclical_momentum: `mode`"),
        (lambda: cyclical_momentum(0.8, float("inf")), "cyclical_momentum: `peak`"),
        (lambda: one_cycle(1.0, 2**30), "total_steps"),
        (lambda: one_cycle(float("nan"), 10), "`peak`"),
        (lambda: one_cycle(1.0, 10, pct_start=-0.1), "pct_start"),
        (lambda: one_cycle(1.0, 10, div_factor=np.float32(-2)), "div_factor"),
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
        (lambda: warm_restarts(1.0, 0.5), "`first_period` makes cycles of 0.5"),
        (lambda: warm_restarts(1.0, float("nan")), "first_period"),
        (lambda: warm_restarts(1.0, 10, floor=float("nan")), "floor"),
        (lambda: warm_restarts(1.0, 10, period_mult=float("nan")), "period_mult"),
        (lambda: warm_restarts(1.0, 10, period_mult=0.5), "period_mult"),
        (lambda: warm_restarts(1.0, 10, period_mult=1.001), "period_mult"),
        (lambda: warm_restarts(1.0, 10, period_mult=float("inf")), "period_mult"),
        (lambda: jax.jit(lambda up: cyclical(step_size_up=up)(0))(3.0), "traced"),
    ],
)
def test_mistakes_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()
