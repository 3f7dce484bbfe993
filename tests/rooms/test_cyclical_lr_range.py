"""lr_range_test on the host and on the device, against NumPy; and its picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import plot
from jaxtricks.cyclical import lr_range_test

N = 60


def quadratic(carry, batch, lr):
    """Least squares in one unknown: diverges for lr > 2."""
    residual = carry["w"] * batch["x"] - batch["y"]
    grad = jnp.mean(residual * batch["x"])
    return {"w": carry["w"] - lr * grad, "steps": carry["steps"] + 1}, jnp.mean(residual**2)


def scripted(losses):
    """A step that returns given losses, whatever the rate; the carry counts."""
    losses = jnp.asarray(losses, jnp.float32)
    return lambda i, batch, lr: (i + 1, losses[i])


def data(n=N):
    x = np.random.default_rng(0).normal(size=(n, 8)).astype(np.float32)
    return {"x": x, "y": 3 * x + 0.1}


def start():
    return {"w": jnp.zeros([]), "steps": jnp.int32(0)}


def as_list(batches):
    return [{k: v[i] for k, v in batches.items()} for i in range(len(batches["x"]))]


def curve(lrs, losses, smoothing=0.98, stop_factor=4.0):
    """(smoothed, n, suggestion) by the definition, in float64."""
    average, smoothed, n = 0.0, [], 0
    for i, loss in enumerate(np.asarray(losses, np.float64)):
        if not np.isfinite(loss):
            break
        average = smoothing * average + (1 - smoothing) * loss
        smoothed.append(average / (1 - smoothing ** (i + 1)))
        n = i + 1
        if smoothed[-1] - min(smoothed) > (stop_factor - 1) * abs(min(smoothed)):
            break
    if n < 2:
        return smoothed, n, np.nan
    slopes = np.gradient(np.asarray(smoothed), np.log(np.asarray(lrs[:n], np.float64)))
    runs, start = [], 0  # unbroken falls, first and last point
    for i in range(1, n + 1):
        if i == n or smoothed[i] >= smoothed[i - 1]:
            runs.append((start, i - 1))
            start = i
    first, last = max(runs, key=lambda run: run[1] - run[0])
    best = first + slopes[first : last + 1].argmin()
    return smoothed, n, lrs[best] if slopes[best] < 0 else np.nan


def both(step, carry, n, **settings):
    """The test over a list of batches and over an array of them: the same numbers."""
    host = lr_range_test(jax.jit(step), carry, [np.zeros(2)] * n, **settings)
    device = lr_range_test(step, carry, jnp.zeros((n, 2)), **settings)
    for a, b in zip(host, device, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    return host


@pytest.mark.parametrize(("spacing", "smoothing"), [("exp", 0.98), ("linear", 0.5), ("exp", 0.0)])
def test_host_and_device_agree_and_equal_the_definition(spacing, smoothing, ours):
    settings = dict(lo=1e-3, hi=100.0, num_steps=N, spacing=spacing, smoothing=smoothing)
    batches = data()
    host = lr_range_test(jax.jit(quadratic), start(), iter(as_list(batches)), **settings)
    device = lr_range_test(quadratic, start(), batches, **settings)
    for a, b in zip(host, device, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    spaced = np.geomspace if spacing == "exp" else np.linspace
    smoothed, n, suggestion = curve(spaced(1e-3, 100, N), host.losses, smoothing)
    assert 2 < n == len(host.lrs) == len(host.losses) == len(host.smoothed) < N
    np.testing.assert_allclose(host.lrs, spaced(1e-3, 100, N)[:n], rtol=1e-6)
    np.testing.assert_allclose(host.smoothed, smoothed, rtol=1e-5)
    np.testing.assert_allclose(host.suggestion, suggestion, rtol=1e-5)


def test_the_first_loss_is_that_of_the_carry_and_it_trains(ours):
    batches = data()
    r = lr_range_test(quadratic, start(), batches, lo=0.1, hi=0.2, num_steps=20)
    np.testing.assert_allclose(r.losses[0], np.mean(batches["y"][0] ** 2), rtol=1e-6)
    assert r.losses[-1] < 0.1 * r.losses[0]


@pytest.mark.parametrize("form", ["host", "device"])
def test_the_carry_is_untouched_even_if_the_step_donates_it(form, ours):
    carry = {"w": jnp.float32(1.0), "steps": np.zeros([], np.int32), "key": jax.random.key(3)}

    def step(carry, batch, lr):
        new = {**carry, "w": carry["w"] - lr, "steps": carry["steps"] + 1}
        return new, new["w"] ** 2

    donating = jax.jit(step, donate_argnums=0)

    def in_place(carry, batch, lr):
        return donating(carry, batch, lr)

    batches = [0] * 5 if form == "host" else jnp.zeros(5)
    lr_range_test(in_place, carry, batches, num_steps=5)
    assert carry["w"] == 1 and carry["steps"] == 0
    assert jnp.array_equal(
        jax.random.key_data(carry["key"]), jax.random.key_data(jax.random.key(3))
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_stops_and_is_left_out(bad, ours):
    r = both(scripted([3, 2, 1.5, bad, 1, 1]), 0, 6, num_steps=6, smoothing=0.0)
    np.testing.assert_allclose(r.losses, [3, 2, 1.5])
    np.testing.assert_allclose(r.smoothed, [3, 2, 1.5])
    np.testing.assert_allclose(r.suggestion, 1e-6, rtol=1e-5)
    first = both(scripted([bad, 1.0]), 0, 2, num_steps=2)
    assert first.losses.shape == (0,) and np.isnan(first.suggestion)


def test_it_stops_after_the_first_loss_beyond_the_factor(ours):
    losses = [2.0, 1.0, 4.0, 4.1, 9.0]
    settings = dict(num_steps=5, smoothing=0.0)
    assert len(both(scripted(losses), 0, 5, **settings).losses) == 4
    assert len(both(scripted(losses), 0, 5, stop_factor=2.0, **settings).losses) == 3
    assert len(both(scripted(losses), 0, 5, stop_factor=np.inf, **settings).losses) == 5
    # A falling negative loss (a log-likelihood) goes on; it stops as far above as below zero.
    below = [-1.0, -2.0, -3.0, 5.9, 6.1, 0.0]
    assert len(both(scripted(below), 0, 6, num_steps=6, smoothing=0.0).losses) == 5


def test_suggestions_by_hand(ours):
    flat = both(scripted([1.0, 1.0, 1.5]), 0, 3, num_steps=3)
    assert np.isnan(flat.suggestion)
    assert np.isnan(both(scripted([1.0]), 0, 1, num_steps=3).suggestion)
    # Central differences over log(lr): the middle of the fall from 5 to 2.
    fall = both(scripted([5, 5, 3.5, 2, 2]), 0, 5, lo=1.0, hi=1e4, num_steps=5, smoothing=0.0)
    np.testing.assert_allclose(fall.suggestion, 100, rtol=1e-5)
    # The last point before the stop counts with the slope behind it, not with what lies after.
    last = both(scripted([5, 4, 1, np.nan, 0]), 0, 5, lo=1.0, hi=1e4, num_steps=5, smoothing=0.0)
    np.testing.assert_allclose(last.suggestion, 100, rtol=1e-5)


EIGENVALUES = np.geomspace(1 / 30, 1, 20, dtype=np.float32)


def regression(carry, batch, lr):
    """Least squares in twenty unknowns, of curvatures 1/30 to 1."""
    loss = lambda w: 0.5 * jnp.mean((batch["x"] @ w - batch["noise"]) ** 2)
    value, grad = jax.value_and_grad(loss)(carry)
    return carry - lr * grad, value


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_suggestion_trains_and_is_not_timid(noise, ours):
    rng, seeds = np.random.default_rng(0), 12
    start = rng.normal(scale=3, size=(seeds, 20)).astype(np.float32) / np.sqrt(EIGENVALUES)
    x = rng.normal(size=(seeds, 100, 16, 20)).astype(np.float32) * np.sqrt(EIGENVALUES)
    batches = {"x": x, "noise": rng.normal(scale=noise, size=(seeds, 100, 16)).astype(np.float32)}

    def losses(w, batches):
        """The suggestion, and how far training at it, and at a thousandth of it, gets."""
        rate = lr_range_test(regression, w, batches, lo=1e-4, hi=100.0).suggestion
        train = lambda lr: jax.lax.scan(lambda w, b: regression(w, b, lr), w, batches)[1]
        return rate, *(jnp.mean(train(lr)[-10:]) / train(lr)[0] for lr in (rate, rate / 1000))

    rates, at, below = jax.jit(jax.vmap(losses))(start, batches)
    # Full gradients diverge from 2 on, those of 16 examples earlier.
    assert np.all((rates > 0.05) & (rates < 2))
    assert np.all(at < 0.25) and np.median(at) < 0.05 and np.all(below > 0.3)


def test_it_ends_where_the_batches_end_and_takes_no_more_than_it_needs(ours):
    r = both(scripted([3.0, 2.0, 1.0, 1.0]), 0, 4, num_steps=10)
    assert len(r.losses) == 4
    np.testing.assert_allclose(r.lrs, np.geomspace(1e-6, 1, 10)[:4], rtol=1e-5)
    loader = iter(range(10))
    lr_range_test(scripted(np.ones(10)), 0, loader, num_steps=4)
    assert next(loader) == 4

    class Loader:
        def __iter__(self):
            yield from range(3)

    assert len(lr_range_test(scripted(np.ones(10)), 0, Loader()).losses) == 3


def test_under_jit_the_rest_is_nan(ours):
    settings = dict(lo=1e-3, hi=100.0, num_steps=N)
    eager = lr_range_test(quadratic, start(), data(), **settings)
    jitted = jax.jit(lambda c, b: lr_range_test(quadratic, c, b, **settings))(start(), data())
    n = len(eager.losses)
    assert jitted.lrs.shape == jitted.losses.shape == (N,) and n < N
    for a, b in zip(eager[:3], jitted[:3], strict=True):
        np.testing.assert_allclose(a, b[:n], rtol=2e-5)
    assert np.isnan(jitted.losses[n:]).all() and np.isnan(jitted.smoothed[n:]).all()
    np.testing.assert_allclose(jitted.suggestion, eager.suggestion, rtol=1e-6)


def test_tuples_of_arrays_are_stacked_batches(ours):
    seen = []

    def step(carry, batch, lr):
        seen.append(tuple(jnp.shape(x) for x in batch))
        return carry, jnp.sum(batch[0]) * 0 + 1

    lr_range_test(step, 0, (np.zeros((3, 2), np.float32), np.zeros(3)), num_steps=3)
    assert set(seen) == {((2,), ())}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(lo=0.0), "lo"),
        (dict(lo=1.0, hi=1.0), "hi"),
        (dict(num_steps=1), "num_steps"),
        (dict(spacing="log"), "spacing"),
        (dict(smoothing=1.0), "smoothing"),
        (dict(stop_factor=1.0), "stop_factor"),
        (dict(batches=[]), "empty"),
        (dict(batches=np.zeros((0, 2))), "empty"),
        (dict(batches=(np.zeros(3), np.zeros(4))), "different length"),
        (dict(step=lambda carry, batch, lr: (carry, jnp.ones(3))), "shape"),
    ],
)
def test_mistakes_say_what_to_do(settings, says):
    arguments = {"step": scripted(np.ones(9)), "carry": 0, "batches": np.zeros(9)}
    with pytest.raises(ValueError, match=says):
        lr_range_test(**{**arguments, **settings})


def test_the_picture_shows_the_curve_and_the_suggestion():
    r = lr_range_test(scripted([3.0, 2.0, 1.0]), 0, np.zeros(3), num_steps=3)
    (axis,) = plot.lr_range(r).axes
    loss, smoothed, line = axis.get_lines()
    np.testing.assert_array_equal(loss.get_ydata(), r.losses)
    np.testing.assert_array_equal(smoothed.get_ydata(), r.smoothed)
    assert axis.get_xscale() == "log" and set(line.get_xdata()) == {r.suggestion}
    assert len(plot.lr_range(r._replace(suggestion=np.nan)).axes[0].get_lines()) == 2


def test_the_picture_is_scaled_to_the_fall_not_to_the_explosion():
    def limits(losses):
        n = len(losses)
        r = lr_range_test(scripted(losses), 0, np.zeros(n), num_steps=n, smoothing=0.0)
        return plot.lr_range(r).axes[0].get_ylim()

    np.testing.assert_allclose(limits([5.0, 4.0, 1.0, 3.0, 1e6]), (0.6, 7.0))
    # Nothing explodes, nothing falls, nothing is there: as matplotlib likes it.
    low, high = limits([5.0, 4.0, 1.0, 3.0, 3.0])
    assert 0.7 < low < 1 and 5 < high < 5.3
    assert limits([1.0, 2.0, 1e6])[1] > 1e6
    assert all(np.isfinite(limits([np.nan, 1.0])))


def test_a_fall_that_had_not_ended_is_told(ours):
    ended = lr_range_test(scripted([3.0, 2.0, 1.0, 2.0]), 0, [0] * 4, num_steps=4, smoothing=0.0)
    assert not ended.still_falling
    falling = lr_range_test(scripted([4.0, 3.0, 2.0, 1.0]), 0, [0] * 4, num_steps=4, smoothing=0.0)
    assert falling.still_falling
    flat = lr_range_test(scripted([1.0]), 0, [0], num_steps=4, smoothing=0.0)
    assert not flat.still_falling
