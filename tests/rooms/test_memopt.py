"""memopt against the reference implementations, and what they get wrong."""

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from jaxtricks import memopt
from jaxtricks.memopt._adafactor import layout

from tests.reference import memopt as reference

STACKED = {"matrix_5x7": ("batch", "none"), "heads_36x6x8": ("batch", "in", "out")}


def as_roles(rule):
    """Mesh's, t5x's words for the roles of an axis -> ours."""
    words = {"row": "in", "col": "out"}

    def roles(path, shape):
        names = rule[path]
        if names == "heuristic":
            return None
        return tuple(words.get(n, n) for n in names or ("none",) * len(shape))

    return roles


def deviation(golden, setting, tx, dtype, count=0):
    """Largest |ours - reference| over the reference's largest displacement, per leaf, and the state."""
    arrays, meta = golden
    names = list(meta["steps"])
    params = {n: jnp.asarray(arrays[f"param/{n}"], dtype) for n in names}
    state = tx.init(params)._replace(count=jnp.asarray(count, jnp.int32))
    update, trajectory = jax.jit(tx.update), []
    for t in range(meta["T"]):
        grads = {n: jnp.asarray(arrays[f"grad/{n}"][t], dtype) for n in names}
        updates, state = update(grads, state, params)
        params = {n: params[n] + updates[n] for n in names}
        trajectory.append(params)
    errors = {}
    for n in names:
        expected = arrays[f"out/{setting}/{n}"]
        ours = np.stack([trajectory[t][n] for t in meta["steps"][n]])
        moved = np.max(np.abs(expected - arrays[f"param/{n}"].astype(expected.dtype)))
        rounding = meta["T"] * 1.2e-7 * np.max(np.abs(arrays[f"param/{n}"]))
        allowed = 1e-10 * moved if dtype == np.float64 else 1e-4 * moved + rounding
        errors[n] = np.max(np.abs(ours - expected)) / allowed
    return errors, state


MESH = {
    "defaults": {},
    "defaults_min8": {"min_dim_size_to_factor": 8},
    "lr_const_momentum": {"learning_rate": 0.02, "beta1": 0.9, "min_dim_size_to_factor": 4},
    "absolute_step": {
        "learning_rate": 5e-4,
        "multiply_by_parameter_scale": False,
        "min_dim_size_to_factor": 4,
    },
    "noclip_unfactored": {"learning_rate": 1e-3, "clipping_threshold": None, "factored": False},
    "decay_adam_0.999_clip0.5": {
        "learning_rate": 0.01,
        "decay": "adam",
        "decay_rate": 0.999,
        "clipping_threshold": 0.5,
        "min_dim_size_to_factor": 4,
    },
    "offset3_pow0.6": {"decay_rate": 0.6, "decay_offset": 3, "min_dim_size_to_factor": 4},
    "stacked_dim0": {
        "learning_rate": 0.01,
        "min_dim_size_to_factor": 4,
        "roles": lambda path, shape: STACKED.get(path),
    },
}


@pytest.mark.parametrize("setting", MESH)
def test_adafactor_equals_mesh(setting, golden, x64, ours):
    tx = memopt.adafactor(**memopt.PRESETS["mesh"] | MESH[setting])
    count = 3 if "offset" in setting else 0
    arrays, meta = golden("adafactor_mesh")
    errors, state = deviation((arrays, meta), setting, tx, np.float64, count)
    assert max(errors.values()) <= 1, errors
    for name in meta["steps"]:
        v = state.v[name]
        slots = ("vr", "vc") if isinstance(v, memopt.Factored) else ("v",)
        for slot, mine in zip(slots, v, strict=True):
            np.testing.assert_allclose(
                mine, arrays[f"state/{setting}/{name}_slot_{slot}"], rtol=1e-10
            )


def test_adafactor_equals_mesh_in_float32(golden, ours):
    tx = memopt.adafactor(**memopt.PRESETS["mesh"] | MESH["lr_const_momentum"])
    errors, _ = deviation(golden("adafactor_mesh"), "lr_const_momentum", tx, np.float32)
    assert max(errors.values()) <= 1, errors


T5X = {
    "lr0.01": {"learning_rate": 0.01},
    # t5x multiplies the parameter by 1 - 0.001; ours is times the learning rate.
    "lr0.02_beta1_wd": {"learning_rate": 0.02, "beta1": 0.9, "weight_decay": 0.001 / 0.02},
    "noscale_clip2": {
        "learning_rate": 1e-3,
        "multiply_by_parameter_scale": False,
        "clipping_threshold": 2.0,
    },
}


@pytest.mark.parametrize("setting", T5X)
def test_adafactor_equals_t5x(setting, golden, ours):
    arrays, meta = golden("adafactor_t5x")
    tx = memopt.adafactor(
        **memopt.PRESETS["t5x"] | T5X[setting],
        roles=as_roles(meta["factor_rule"]),
        min_dim_size_to_factor=meta["min_dim_size_to_factor"],
    )
    errors, state = deviation((arrays, meta), setting, tx, np.float32)
    assert max(errors.values()) <= 1, errors
    for name, v in state.v.items():
        pair = v if isinstance(v, memopt.Factored) else None
        assert (pair is not None) == (arrays[f"state/{setting}/{name}/v_row"].shape != (1,))
        if pair:
            row, column = (arrays[f"state/{setting}/{name}/{k}"] for k in ("v_row", "v_col"))
            np.testing.assert_allclose(pair.v_in, row, rtol=2e-5)
            np.testing.assert_allclose(pair.v_out, column, rtol=2e-5)


HF = {
    "defaults": {},
    "warmup_init": {"warmup_init": True},
    "lr_beta1_scaled": {"learning_rate": 0.02, "beta1": 0.9},
    "lr_wd_noscale_clip0.5": {
        "learning_rate": 1e-3,
        "multiply_by_parameter_scale": False,
        "weight_decay": 0.01,
        "clipping_threshold": 0.5,
    },
}


@pytest.mark.parametrize("setting", HF)
def test_adafactor_equals_transformers(setting, golden, x64, ours):
    tx = memopt.adafactor(**memopt.PRESETS["hf"] | HF[setting])
    errors, _ = deviation(golden("adafactor_hf"), setting, tx, np.float64)
    assert max(errors.values()) <= 1, errors


def test_adafactor_equals_big_vision(x64, ours):
    rng = np.random.default_rng(0)
    shapes = {"w": (40, 33), "tie": (34, 34, 34), "small": (5, 40), "b": (7,), "s": ()}
    params = {n: rng.normal(size=s) for n, s in shapes.items()}
    tx = memopt.adafactor(0.01, **memopt.PRESETS["big_vision"] | {"momentum_dtype": None})
    state = tx.init(jax.tree.map(jnp.asarray, params))
    # The cap 0.999 binds from t = 5624 on.
    state = state._replace(count=jnp.asarray(9000, jnp.int32))
    expected, slots = dict(params), {}
    for t in range(9000, 9004):
        grads = {n: rng.normal(size=s) for n, s in shapes.items()}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = {n: params[n] + np.asarray(updates[n]) for n in params}
        expected = {
            n: p - 0.01 * reference.big_vision(grads[n], slots.setdefault(n, {}), t)
            for n, p in expected.items()
        }
    for n in shapes:
        np.testing.assert_allclose(params[n], expected[n], rtol=0, atol=1e-10)


SM3 = {"m0_lr0.1": (0.1, 0.0), "m0.9_lr0.1": (0.1, 0.9), "m0.5_lr1": (1.0, 0.5)}


@pytest.mark.parametrize("setting", SM3)
def test_sm3_equals_the_reference(setting, golden, x64, ours):
    rate, momentum = SM3[setting]
    tx = memopt.sm3(rate, momentum=momentum)
    errors, state = deviation(golden("sm3"), setting, tx, np.float64)
    assert max(errors.values()) <= 1, errors
    assert (state.m is None) == (momentum == 0)


def test_sm3_equals_the_reference_in_float32(golden, ours):
    errors, _ = deviation(golden("sm3"), "m0.9_lr0.1", memopt.sm3(0.1, momentum=0.9), np.float32)
    assert max(errors.values()) <= 1, errors


def test_ties_go_to_the_earlier_axes():
    where = layout((10, 10, 10), None)
    assert (where.rows, where.columns) == ((1,), (0,))


@pytest.mark.parametrize(
    ("shape", "roles", "min_dim", "factored"),
    [
        ((128, 128), None, 128, True),
        ((128, 127), None, 128, False),
        ((8, 4, 4), ("in", "out", "out"), 8, True),
        ((8, 4, 4), ("in", "out", "out"), 9, False),
        ((9, 11), ("batch", "none"), 1, False),
        ((9, 11), ("batch", "out"), 0, False),
        ((0, 11), ("in", "out"), 0, False),
        ((3, 8, 9), ("batch", "in", "out"), 8, True),
    ],
)
def test_what_is_factored(shape, roles, min_dim, factored):
    tx = memopt.scale_by_adafactor(
        roles=None if roles is None else lambda path, shape: roles, min_dim_size_to_factor=min_dim
    )
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    assert isinstance(state.v["w"], memopt.Factored) == factored


def test_decay_offset_on_a_fresh_state_is_no_nan(ours):
    tx = memopt.adafactor(decay_offset=1000)
    params = {"w": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(state.v["w"].v, 1.0)


def test_decay_rates(x64):
    from jaxtricks.memopt import _adafactor

    count = jnp.arange(5, dtype=jnp.int32)
    t = np.arange(5) + 1.0
    adam = _adafactor.one_minus_beta2(count, jnp.float64, "adam", 0.9, 0, 1.0)
    np.testing.assert_allclose(1 - adam, 0.9 * (1 - 0.9 ** (t - 1)) / (1 - 0.9**t), rtol=1e-12)
    # A rate of 1 (a schedule may reach it) averages all steps alike.
    one = _adafactor.one_minus_beta2(count, jnp.float64, "adam", jnp.float64(1), 0, 1.0)
    np.testing.assert_allclose(one, 1 / t, rtol=1e-12)
    capped = _adafactor.one_minus_beta2(count, jnp.float64, "pow", 0.8, 0, 0.5)
    np.testing.assert_allclose(1 - capped, np.minimum(1 - t**-0.8, 0.5), rtol=1e-12)


def test_second_moment_follows_a_jump_in_bfloat16(ours):
    # A bfloat16 accumulator would stay at 1: a hundredth of a step is below its resolution.
    tx = memopt.scale_by_adafactor(factored=False)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = tx.init(params)._replace(count=jnp.int32(20000))
    state = state._replace(v={"w": memopt.Full(jnp.ones(4))})
    grads = {"w": jnp.full(4, 2, jnp.bfloat16)}
    step = jax.jit(lambda s: tx.update(grads, s, params)[1])
    for _ in range(200):
        state = step(state)
    assert 1.15 < float(state.v["w"].v[0]) < 1.3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_float16_zero_and_tiny_gradients(dtype, ours):
    for tx in (memopt.adafactor(min_dim_size_to_factor=2), memopt.sm3(0.1)):
        params = {"w": jnp.ones((4, 3), dtype)}
        state = tx.init(params)
        for g in (0.0, 1e-4, 0.0):
            updates, state = tx.update({"w": jnp.full((4, 3), g, dtype)}, state, params)
            assert updates["w"].dtype == dtype
            assert np.all(np.isfinite(np.asarray(updates["w"], np.float32)))


@pytest.mark.parametrize("shape", [(8, 6), (6,)])
@pytest.mark.parametrize(("size", "weight"), [(1e-14, 1e-3), (1e-8, 1e6), (1.0, 1e15), (1e9, 1.0)])
def test_zeros_beside_gradients_and_weights_of_any_size(shape, size, weight, ours):
    g = size * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    g[0] = 0
    tx = memopt.adafactor(1.0, min_dim_size_to_factor=2, clipping_threshold=None)
    params = np.full(shape, weight, np.float32)
    u, _ = jax.jit(tx.update)(g, tx.init(params), params)
    np.testing.assert_array_equal(u[0], 0)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(u[1:] / weight))), 1, rtol=0.2)


def test_update_is_not_rounded_to_the_narrower_of_gradient_and_parameter(ours):
    tx = memopt.adafactor(1e-3)
    for param, grad in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        params = {"w": jnp.ones(3, param)}
        updates, _ = tx.update({"w": jnp.ones(3, grad)}, tx.init(params), params)
        assert updates["w"].dtype == jnp.float32


def test_weight_decay_is_times_the_rate_and_only_where_the_mask_says(ours):
    params = {"kernel": jnp.full((2, 2), 100.0), "bias": jnp.full(2, 100.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    masks = (
        jt.roles.is_kernel,
        {"kernel": True, "bias": False},
        lambda p: {"kernel": True, "bias": False},
    )
    for mask in masks:
        tx = memopt.adafactor(lambda step: 0.5, weight_decay=0.1, weight_decay_mask=mask)
        updates, _ = tx.update(zero, tx.init(params), params)
        np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 100, rtol=1e-6)
        np.testing.assert_array_equal(updates["bias"], 0)
    tx = memopt.adafactor(weight_decay=0.1)  # rho_1 = 0.01
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.01 * 0.1 * 100, rtol=1e-6)


def test_clip_and_scale_per_slice(ours):
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)}
    grads = {"w": jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)}
    grads["w"] = grads["w"].at[0, 0, 0].set(1e4)
    results = {}
    for per_slice in (True, False):
        tx = memopt.scale_by_adafactor(
            roles={"w": ("batch", "in", "out")},
            min_dim_size_to_factor=2,
            clipping_threshold=0.1,
            multiply_by_parameter_scale=False,
            clip_per_slice=per_slice,
        )
        updates, _ = tx.update(grads, tx.init(params), params)
        results[per_slice] = np.sqrt(np.mean(np.square(updates["w"]), axis=(1, 2)))
    np.testing.assert_allclose(results[True], 0.1, rtol=1e-5)
    assert abs(results[False][0] / results[False][1] - 1) > 0.05


def test_momentum_before_the_rate_forgets_the_rate(ours):
    params = {"w": jnp.ones(3)}
    for before, expected in ((True, 0.0), (False, 0.9 * 0.1)):
        tx = memopt.adafactor(
            lambda step: jnp.where(step < 1, 1.0, 0.0),
            beta1=0.9,
            momentum_before_lr=before,
            decay_rate=0.0,
        )
        state = tx.init(params)
        for _ in range(2):  # rates 1 and 0
            updates, state = tx.update(params, state, params)
        np.testing.assert_allclose(updates["w"], -expected, rtol=1e-5)


def test_momentum_dtype_and_buffers():
    params = {"w": jnp.ones((200, 200))}
    assert memopt.adafactor(beta1=0.9, momentum_dtype="bfloat16").init(params).m["w"].dtype == (
        jnp.bfloat16
    )
    assert memopt.adafactor(beta1=0.0).init(params).m is None
    assert memopt.sm3(0.1).init(params).m is None
    assert memopt.sm3(0.1, momentum=0.9, momentum_dtype=jnp.bfloat16).init(params).m["w"].dtype == (
        jnp.bfloat16
    )
    # An array may become nonzero later, so it has its buffer from the start.
    assert memopt.sm3(0.1, momentum=jnp.zeros([])).init(params).m is not None
    with pytest.raises(ValueError, match="int4"):
        memopt.sm3(0.1, momentum=0.9, momentum_dtype="int4")


def test_state_bytes_are_exact_and_allocate_nothing():
    shapes = {
        "w": jax.ShapeDtypeStruct((1 << 20, 1 << 16), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((7,), jnp.bfloat16),
    }
    both = (1 << 20) + (1 << 16)
    assert memopt.state_bytes(memopt.adafactor(), shapes) == 4 * (both + 7 + 1)
    assert memopt.state_bytes(memopt.sm3(0.1), shapes) == 4 * (both + 7 + 1)
    injected = optax.inject_hyperparams(memopt.adafactor)(1e-3)
    assert memopt.state_bytes(injected, shapes) < 4 * (both + 7) + 100
    small = {"w": jnp.ones((130, 140))}
    tx = memopt.adafactor(beta1=0.9)
    counted = sum(x.nbytes for x in jax.tree.leaves(tx.init(small)))
    assert memopt.state_bytes(tx, small) == counted


def test_injected_rate_takes_effect_and_a_traced_size_says_what_to_do():
    params = {"w": jnp.ones((4, 4))}
    tx = optax.inject_hyperparams(memopt.adafactor)(1e-2)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    first, state = update(params, state, params)
    state.hyperparams["learning_rate"] = jnp.float32(1e-1)
    second, _ = update(params, state, params)
    np.testing.assert_allclose(second["w"], 10 * first["w"], rtol=1e-5)
    tx = optax.inject_hyperparams(memopt.adafactor)(1e-2, min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(tx.init)(params)


def test_roles_say_what_is_a_slice_for_sm3(ours):
    tx = memopt.sm3(0.1, roles=jt.roles.by_path({"w": ("in", "out"), "b": ("none",)}))
    state = tx.init({"w": jnp.ones((3, 4, 5)), "b": jnp.ones((3, 5))})
    assert [a.shape for a in state.v["w"]] == [(3, 4), (3, 5)]
    assert [a.shape for a in state.v["b"]] == [(3, 5)]


def test_scale_by_is_the_update_without_rate_and_sign(ours):
    params = {"w": jnp.full((4, 4), 3.0)}
    grads = {"w": jnp.arange(16.0).reshape(4, 4)}
    pairs = (
        (memopt.adafactor(0.5), memopt.scale_by_adafactor()),
        (memopt.sm3(0.5, momentum=0.9), memopt.scale_by_sm3(momentum=0.9)),
    )
    for whole, part in pairs:
        a, _ = whole.update(grads, whole.init(params), params)
        b, _ = part.update(grads, part.init(params), params)
        np.testing.assert_allclose(a["w"], -0.5 * b["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: memopt.adafactor(decay="exp"), "decay"),
        (lambda: memopt.adafactor(eps=(0.0, 1e-3)), r"eps\[0\]"),
        (lambda: memopt.adafactor(eps=1e-30), "eps"),
        (lambda: memopt.adafactor(clipping_threshold=0), "clipping_threshold"),
        (lambda: memopt.adafactor(beta1=1.5), "beta1"),
        (lambda: memopt.adafactor(1e-3, warmup_init=True), "warmup_init"),
        (lambda: memopt.adafactor(momentum_dtype="int32"), "momentum_dtype"),
        (lambda: memopt.adafactor(momentum_dtype="fp17"), "momentum_dtype"),
        (lambda: memopt.sm3(0.1, momentum=-1), "momentum"),
        (lambda: memopt.adafactor(-1e-3), "`learning_rate` is -0.001: give a number >= 0"),
        (lambda: memopt.adafactor(np.float32("nan")), "learning_rate"),
        (lambda: memopt.sm3(-0.1), "learning_rate"),
        (lambda: memopt.adafactor(weight_decay=-0.1), "weight_decay"),
        (lambda: memopt.adafactor(decay_rate=-0.8), "decay_rate"),
        (lambda: memopt.adafactor(decay="adam", decay_rate=1.5), "decay_rate"),
        (lambda: memopt.sm3(0.1, eps=-1), "eps"),
        (lambda: memopt.sm3(0.1, roles={"w": ("in",)}).init({"w": jnp.ones((2, 3))}), "one per axis"),
        (lambda: memopt.adafactor(roles={"w": ("row", "in")}).init({"w": jnp.ones((2, 3))}), "'row'"),
        (lambda: memopt.adafactor().init({"z": jnp.ones(3, jnp.complex64)}), "'z' is complex64"),
        (lambda: memopt.sm3(0.1).init({"z": jnp.ones(3, jnp.complex64)}), "'z' is complex64"),
        (lambda: memopt.adafactor().init({"n": jnp.arange(3)}), "int32"),
        (lambda: memopt.adafactor(roles=jt.roles.by_path({"x": ("in",)})).init({"w": jnp.ones(3)}), "'x'"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()


MAKERS = {
    "adafactor": lambda: memopt.adafactor(1e-2, min_dim_size_to_factor=2),
    "adafactor, int8": lambda: memopt.adafactor(1e-2, beta1=0.9, momentum_dtype="int8"),
    "sm3": lambda: memopt.sm3(0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_spoils_its_leaf_and_no_other(name, bad):
    tx = MAKERS[name]()
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    grads = {"w": jnp.ones((4, 3)).at[1, 1].set(bad), "b": jnp.full(3, 0.5)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        assert not np.all(np.isfinite(updates["w"]))
        assert np.all(np.isfinite(updates["b"]))
    _, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    assert not np.all(np.isfinite(jnp.concatenate([jnp.ravel(x) for x in state.v["w"]])))
    assert np.all(np.isfinite(jnp.concatenate([jnp.ravel(x) for x in state.v["b"]])))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_skip_nonfinite_keeps_it_out_of_the_state(name, bad):
    tx = jt.amp.skip_nonfinite(MAKERS[name]())
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    good = {"w": jnp.ones((4, 3)), "b": jnp.full(3, 0.5)}
    broken = {**good, "w": good["w"].at[1, 1].set(bad)}
    update = jax.jit(tx.update)
    _, before = update(good, tx.init(params), params)
    updates, after = update(broken, before, params)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    resumed, _ = update(good, after, params)
    expected, _ = update(good, before, params)
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_another_trees_state_is_refused():
    tx = memopt.adafactor()
    state = tx.init({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="'b'"):
        tx.update({"b": jnp.ones(3)}, state, {"b": jnp.ones(3)})


def test_what_is_factored_is_read_from_the_state(ours):
    params = {"w": jnp.ones((8, 8))}
    state = memopt.adafactor(min_dim_size_to_factor=4).init(params)
    _, state = memopt.adafactor(min_dim_size_to_factor=128).update(params, state, params)
    assert isinstance(state.v["w"], memopt.Factored)
