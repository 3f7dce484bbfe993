"""agc against the NFNets code, its units, its metrics, and what is not finite."""

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from jaxtricks import agc

SETTINGS = ("clip0.01_eps1e-3", "clip0.1_eps1e-3", "clip0.02_eps0.1_nesterov_wd")


def arrays_of(arrays, kind, names, t=None):
    pick = (lambda x: x) if t is None else (lambda x: x[t])
    return {n: jnp.asarray(pick(arrays[f"{kind}/{n}"]), jnp.float64) for n in names}


@pytest.mark.parametrize("setting", SETTINGS)
def test_clipping_equals_nfnets(setting, golden, x64, ours):
    arrays, meta = golden("agc")
    h = meta["settings"][setting]
    tx = agc.adaptive_grad_clip(h["clip"], eps=h["eps"])
    params = arrays_of(arrays, "param", meta["steps"])
    update = jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])
    for t in (0, meta["T"] - 1):
        names = [n for n, steps in meta["steps"].items() if t in steps]
        params = arrays_of(arrays, "param", names)
        clipped = update(arrays_of(arrays, "grad", names, t))
        for n in names:
            expected = arrays[f"clipped/{setting}/{n}"][meta["steps"][n].index(t)]
            np.testing.assert_allclose(
                clipped[n], expected, rtol=0, atol=1e-10 * np.max(np.abs(expected))
            )


@pytest.mark.parametrize(
    ("setting", "kind"),
    [(SETTINGS[0], "sgd_traj"), (SETTINGS[2], "sgd_agc_traj")],
)
def test_chains_follow_the_reference_trajectories(setting, kind, golden, x64):
    arrays, meta = golden("agc")
    h = meta["settings"][setting]
    links = [agc.adaptive_grad_clip(h["clip"], eps=h["eps"])]
    if kind == "sgd_agc_traj":
        links.append(optax.add_decayed_weights(h["weight_decay"]))
    nesterov = kind == "sgd_agc_traj" and bool(h["nesterov"])
    tx = optax.chain(*links, optax.sgd(h["lr"], h["momentum"], nesterov=nesterov))
    names = [n for n, steps in meta["steps"].items() if len(steps) > 1]
    start = params = arrays_of(arrays, "param", names)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(meta["T"]):
        updates, state = update(arrays_of(arrays, "grad", names, t), state, params)
        params = optax.apply_updates(params, updates)
    for n in names:
        expected = arrays[f"{kind}/{setting}/{n}"][-1]
        moved = np.max(np.abs(expected - start[n]))
        np.testing.assert_allclose(params[n], expected, rtol=0, atol=1e-10 * moved)


@pytest.mark.parametrize(
    ("shape", "roles", "units"),
    [
        ((), None, ()),
        ((7,), None, (1,)),
        ((1, 9), None, (1, 1)),
        ((9, 1), None, (1, 1)),
        ((1, 1, 1, 5), None, (1, 1, 1, 1)),
        ((4, 5), None, (1, 5)),
        ((3, 4, 5), None, (1, 4, 5)),
        ((3, 3, 4, 5), None, (1, 1, 1, 5)),
        ((2, 3, 3, 4, 5), None, (1, 1, 1, 1, 5)),
        ((4, 2, 3), ("in", "out", "out"), (1, 2, 3)),
        ((2, 3, 4), ("in", "in", "out"), (1, 1, 4)),
        ((5, 8, 16), ("batch", "in", "out"), (5, 1, 16)),
        ((5, 16), ("batch", "none"), (5, 1)),
        ((1, 9), ("in", "out"), (1, 9)),
    ],
)
def test_units(shape, roles, units, ours):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    norm = agc.unitwise_norm(x, roles)
    assert norm.shape == units
    reduced = tuple(i for i in range(len(shape)) if shape[i] != 1 and units[i] == 1)
    expected = np.sqrt(np.sum(np.square(x), axis=reduced, keepdims=True))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_rank_6_has_no_rule():
    with pytest.raises(ValueError, match=r"rank 6.*roles="):
        agc.adaptive_grad_clip().init({"w": jnp.ones((2,) * 6)})


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float16", 6e4), ("bfloat16", 1e18), ("float32", 1e18), ("float32", 1e-15), ("float32", 0)],
)
def test_norms_neither_overflow_nor_vanish(dtype, size, ours):
    x = jnp.full((4, 3), size, dtype)
    expected = np.float64(np.asarray(x[0, 0], np.float64)) * 2
    # As an argument and as a constant: XLA simplifies the two differently.
    norm = jax.jit(lambda a: agc.unitwise_norm(a, ("in", "out")))(x)
    np.testing.assert_allclose(norm, np.full((1, 3), expected), rtol=1e-6)
    norm = jax.jit(lambda: agc.unitwise_norm(x, ("in", "out")))()
    np.testing.assert_allclose(norm, np.full((1, 3), expected), rtol=1e-6)


def test_float16_gradients_are_clipped_not_zeroed(ours):
    # In float16 the norm of 4096 gradients of 100 is beyond the range: the update would be 0.
    params = {"w": jnp.ones((4096, 1), jnp.float16)}
    grads = {"w": jnp.full((4096, 1), 100, jnp.float16)}
    tx = agc.adaptive_grad_clip(0.01)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(updates["w"], np.float32), 0.01, rtol=1e-3)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_stays_so_and_the_other_units_are_clipped(bad, ours):
    params = {"w": jnp.ones((4, 3))}
    grads = {"w": jnp.ones((4, 3)).at[1, 1].set(bad)}
    tx = agc.adaptive_grad_clip(0.1)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert not np.isfinite(updates["w"][1, 1])
    np.testing.assert_allclose(updates["w"][:, [0, 2]], 0.1, rtol=1e-6)
    np.testing.assert_allclose(state.clipped_fraction, 2 / 3 if np.isnan(bad) else 1, rtol=1e-6)
    assert state.max_ratio == np.inf


def test_a_norm_beyond_the_range_gives_no_update(ours):
    tx = agc.adaptive_grad_clip(0.1)
    params = {"w": jnp.ones((4, 3))}
    updates, state = tx.update({"w": jnp.full((4, 3), 1e30)}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert state.max_ratio == np.inf


def test_nothing_is_made_up_for_zeros(ours):
    params = {"w": jnp.zeros((4, 3)), "e": jnp.zeros((0, 3))}
    tx = agc.adaptive_grad_clip(0.1, eps=0.0)
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert (state.clipped_fraction, state.max_ratio) == (0, 0)
    updates, state = tx.update({"w": jnp.ones((4, 3)), "e": params["e"]}, state, params)
    np.testing.assert_array_equal(updates["w"], 0)
    assert state.clipped_fraction == 1


def test_metrics_count_eligible_units(ours):
    params = {"head": jnp.ones((4, 3)), "w": jnp.ones((4, 2))}
    grads = {"head": jnp.full((4, 3), 100.0), "w": jnp.array([[1.0, 0.01]] * 4)}
    tx = agc.adaptive_grad_clip(0.1, path_filter=agc.exclude("head"))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["head"], grads["head"])
    metrics = jt.metrics((state, optax.EmptyState()))
    assert set(metrics) == {"agc/clipped_fraction", "agc/max_ratio"}
    np.testing.assert_allclose(metrics["agc/clipped_fraction"], 0.5)
    np.testing.assert_allclose(metrics["agc/max_ratio"], 1.0, rtol=1e-6)
    nothing = agc.adaptive_grad_clip(0.1, path_filter=lambda path: False)
    _, state = nothing.update(grads, nothing.init(params), params)
    assert (state.clipped_fraction, state.max_ratio) == (0, 0)


def test_exclude_that_matches_nothing_raises_but_not_under_masked():
    params = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.ones(3)}}
    tx = agc.adaptive_grad_clip(path_filter=agc.exclude("b/w", "c/w"))
    with pytest.raises(ValueError, match="'c/w'"):
        tx.init(params)
    optax.masked(tx, {"a": True, "b": False}).init(params)


def test_schedules_count_and_constants_do_not(ours):
    params = {"w": jnp.ones((4, 2))}
    grads = {"w": jnp.full((4, 2), 10.0)}
    tx = agc.adaptive_grad_clip(lambda step: jnp.where(step < 1, 0.1, 0.2))
    state, update = tx.init(params), jax.jit(tx.update)
    for expected in (0.1, 0.2):
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    assert state.count == 2
    assert agc.adaptive_grad_clip(0.1).init(params).count is None


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="clipping"):
        agc.adaptive_grad_clip(-1)
    with pytest.raises(ValueError, match="eps"):
        agc.adaptive_grad_clip(eps=np.float32(-1))
    with pytest.raises(ValueError, match="one per axis"):
        agc.adaptive_grad_clip(roles={"w": ("in",)}).init({"w": jnp.ones((2, 3))})
    mixed = {"w": jnp.ones(3), "z": jnp.ones(3, jnp.complex64), "n": jnp.arange(3)}
    with pytest.raises(ValueError, match="'n' is int32"):
        agc.adaptive_grad_clip().init(mixed)
    with pytest.raises(ValueError, match="'z' is complex64"):
        agc.adaptive_grad_clip(path_filter=agc.exclude("n")).init(mixed)
    agc.adaptive_grad_clip(path_filter=agc.exclude("n", "z")).init(mixed)
    tx = agc.adaptive_grad_clip()
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="'v'"):
        tx.update({"v": jnp.ones(3)}, tx.init(params), params)
