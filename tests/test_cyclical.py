"""cyclical against the Keras callback and PyTorch, and in exact rationals."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtricks.cyclical import cyclical


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
    rates = cyclical(**arguments(h))(jnp.arange(len(expected)))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


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
        (lambda: jax.jit(lambda up: cyclical(step_size_up=up)(0))(3.0), "traced"),
    ],
)
def test_mistakes_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()
