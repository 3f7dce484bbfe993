"""Mixed precision: casts, loss scales against hand-computed sequences, skipped steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtricks import amp


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [
        ("p=f32,c=bf16,o=f32", ("float32", "bfloat16", "float32")),
        ("params=float32,compute=float16,output=float32", ("float32", "float16", "float32")),
        ("half", ("bfloat16",) * 3),
        ("full", ("float32",) * 3),
        ("float16", ("float16",) * 3),
        ("c=bf16", ("float32", "bfloat16", "bfloat16")),
        ("p=f16", ("float16",) * 3),
    ],
)
def test_parse(text, dtypes):
    policy = amp.Policy.parse(text)
    assert (policy.param.name, policy.compute.name, policy.output.name) == dtypes
    assert amp.Policy.parse(str(policy)) == policy


@pytest.mark.parametrize("text", ["q=f32", "p=f99", "", "int8", "p"])
def test_parse_errors(text):
    with pytest.raises(ValueError, match=r"amp\.Policy"):
        amp.Policy.parse(text)
    with pytest.raises(ValueError, match="floating"):
        amp.Policy(jnp.int32, jnp.float32, jnp.float32)


def test_casts_touch_only_floating_arrays():
    tree = {
        "f": jnp.ones(2),
        "np": np.ones(2, np.float32),
        "scalar": np.float32(1),
        "i": jnp.arange(2),
        "b": jnp.array(True),
        "key": jax.random.key(0),
        "py": 1.5,
        "fn": abs,
        "none": None,
        "shape": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    out = amp.Policy.parse("p=f32,c=bf16").cast_to_compute(tree)
    for name in ("f", "np", "scalar", "shape"):
        assert out[name].dtype == jnp.bfloat16, name
    assert out["i"].dtype == jnp.int32 and out["b"].dtype == jnp.bool_
    assert jnp.issubdtype(out["key"].dtype, jax.dtypes.prng_key)
    assert out["py"] == 1.5 and out["fn"] is abs and out["none"] is None


def test_with_policy_gradients_come_in_the_parameters_dtype(ours):
    w, x = jnp.ones((3, 2)), jnp.full((4, 3), 0.1)
    seen = []

    def loss(w, x):
        seen.append((w.dtype, x.dtype))
        return (x @ w).sum()

    value, grad = jax.value_and_grad(amp.with_policy(loss, "p=f32,c=bf16,o=f32"))(w, x)
    assert seen == [(jnp.bfloat16, jnp.bfloat16)]
    assert value.dtype == jnp.float32 and grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, 0.4, rtol=4e-3)


def test_value_and_grad_scales_gradients_not_the_loss(ours):
    def loss(w, x):
        return (w * x).sum(), {"w": w}

    w, x = jnp.arange(3.0), jnp.ones(3)
    fn = amp.value_and_grad(loss, scale=jnp.float32(1024), has_aux=True)
    (value, aux), grads = jax.jit(fn)(w, x)
    assert value == 3 and (aux["w"] == w).all()
    np.testing.assert_array_equal(grads, 1024 * np.ones(3))
    both = amp.value_and_grad(lambda a, b: a * b, scale=amp.StaticLossScale(2.0), argnums=(0, 1))
    assert both(jnp.float32(3), jnp.float32(4)) == (12, (8, 6))


def test_float16_gradients_survive_by_scaling():
    # The product 1e-5 * 1e-4 of the backward pass underflows in float16 unless the loss is scaled.
    def loss(w, x):
        return (x @ w).sum() * 1e-4

    w, x = jnp.ones(4), jnp.full((1, 4), 1e-5, jnp.float32)
    with pytest.warns(UserWarning, match="loss scaling"):
        plain = amp.value_and_grad(loss, "p=f32,c=f16,o=f32")(w, x)[1]
    scaled = amp.value_and_grad(loss, "p=f32,c=f16,o=f32", scale=2.0**12)(w, x)[1]
    assert (plain == 0).all()
    np.testing.assert_allclose(scaled / 2.0**12, 1e-9, rtol=2e-2)


def test_dynamic_scale_follows_the_rules(ours):
    scale = amp.DynamicLossScale(jnp.float32(8), jnp.int32(0), growth_interval=2, min_scale=2.0)
    adjust = jax.jit(lambda s, ok: s.adjust(ok))
    values = []
    for finite in [True, True, True, False, True, False, False, False]:
        scale = adjust(scale, jnp.bool_(finite))
        values.append(float(scale.value))
    # Grows at the second clean step in a row, halves at each bad one, stays above min_scale.
    assert values == [8, 16, 16, 8, 8, 4, 2, 2]
    top = amp.DynamicLossScale(jnp.float32(3e38), jnp.int32(5), growth_interval=1)
    assert float(top.adjust(jnp.bool_(True)).value) == np.float32(3e38)


def test_static_and_noop_scales():
    tree = {"f": jnp.ones(2, jnp.float16), "i": jnp.arange(2)}
    static = amp.StaticLossScale(2.0**14)
    scaled = static.scale(tree)
    assert scaled["f"].dtype == jnp.float32 and scaled["f"][0] == 2**14
    assert scaled["i"].dtype == jnp.int32
    assert static.unscale(scaled)["f"][0] == 1 and static.adjust(jnp.bool_(False)) is static
    noop = amp.NoOpLossScale()
    assert noop.scale(tree) is tree and noop.unscale(tree) is tree and float(noop.value) == 1
    assert noop.adjust(jnp.bool_(False)) is noop


def test_all_finite_and_select_tree(ours):
    good = {"a": jnp.ones(2), "i": jnp.arange(2), "k": jax.random.key(0)}
    assert amp.all_finite(good) and amp.all_finite({})
    for bad in (jnp.nan, jnp.inf):
        assert not amp.all_finite({**good, "b": jnp.array([0.0, bad])})
    other = jax.tree.map(lambda x: x, good) | {"k": jax.random.key(1), "a": jnp.zeros(2)}
    picked = amp.select_tree(jnp.bool_(False), good, other)
    assert (picked["a"] == 0).all()
    assert (jax.random.key_data(picked["k"]) == jax.random.key_data(other["k"])).all()


def test_scaled_training_equals_unscaled_training():
    params = {"w": jnp.linspace(-1, 1, 5), "none": None}
    x = jnp.linspace(0, 1, 5)

    def loss(p):
        return ((p["w"] - x) ** 2).sum()

    plain, scaled = optax.adam(0.1), amp.dynamic_loss_scale(optax.adam(0.1), init=2.0**10)
    p, q = params, params
    s, t = plain.init(p), scaled.init(q)

    @jax.jit
    def step(q, t):
        _, grads = amp.value_and_grad(loss, scale=amp.loss_scale(t))(q)
        updates, t = scaled.update(grads, t, q)
        return optax.apply_updates(q, updates), t

    for _ in range(5):
        updates, s = plain.update(jax.grad(loss)(p), s, p)
        p = optax.apply_updates(p, updates)
        q, t = step(q, t)
    np.testing.assert_allclose(p["w"], q["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_state_of_16_bits_stays_so(inner, dtype):
    tx = amp.dynamic_loss_scale(inner, init=4.0)
    params = {"w": jnp.ones(3, dtype)}

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"w": 4 * g}, state, params)
        return (optax.apply_updates(params, updates), state), None

    grads = jnp.asarray([[0.5, -0.25, 1.0], [1.0, 0.5, -0.5]], dtype)
    start = params, tx.init(params)
    jitted, _ = jax.jit(lambda start: jax.lax.scan(step, start, grads))(start)
    eager = functools.reduce(lambda carry, g: step(carry, g)[0], grads, start)
    plain, state = params, inner.init(params)
    for g in grads:
        updates, state = inner.update({"w": g}, state, plain)
        plain = optax.apply_updates(plain, updates)
    for found, after in (jitted, eager):
        chex.assert_trees_all_equal_dtypes(after.inner_state, state)
        chex.assert_trees_all_close(found, plain, rtol=2e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_step_changes_nothing_but_the_scale(bad):
    tx = amp.dynamic_loss_scale(optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda t: t)))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.ones(3)}, state, params)
    updates, after = jax.jit(tx.update)({"w": jnp.array([1.0, bad, 1.0])}, state, params)
    assert (updates["w"] == 0).all()
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state.inner_state, after.inner_state)
    assert jax.tree.all(same)
    assert float(amp.loss_scale(after)) == 2.0**14
    assert jt.metrics(after) == {"amp/loss_scale": 2.0**14, "amp/skipped_steps": 1}


def test_gradients_are_divided_by_the_scale_that_multiplied_them():
    # On a growth step a library that adjusts first would halve the gradients.
    tx = amp.dynamic_loss_scale(optax.identity(), init=4.0, growth_interval=1)
    state = tx.init(jnp.ones(2))
    updates, state = tx.update(jnp.full(2, 4.0), state)
    np.testing.assert_array_equal(updates, 1.0)
    assert float(amp.loss_scale(state)) == 8


def test_in_an_nnx_optimizer():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, amp.dynamic_loss_scale(optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        scale = amp.loss_scale(optimizer.opt_state)
        graph, params = nnx.split(model)
        loss_fn = lambda params: (nnx.merge(graph, params)(x) ** 2).mean()
        loss, grads = amp.value_and_grad(loss_fn, scale=scale)(params)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, jnp.ones((4, 2)))) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_around_multi_steps_and_with_extra_args():
    tx = amp.dynamic_loss_scale(
        optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(), init=2.0
    )
    params = jnp.zeros(2)
    state = tx.init(params)
    for expected in (0.0, -1.0):
        updates, state = tx.update(jnp.full(2, 2.0), state, params)
        np.testing.assert_array_equal(updates, expected)
    ignoring = amp.dynamic_loss_scale(optax.sgd(1.0))
    ignoring.update(params, ignoring.init(params), params, value=jnp.float32(1))


def test_skip_nonfinite_and_check():
    tx = amp.skip_nonfinite(optax.sgd(1.0), max_consecutive=1)
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jnp.array([jnp.nan, 1.0]), state, params)
        assert (updates == 0).all()
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        amp.check_skipped(state)
    updates, state = tx.update(jnp.ones(2), state, params)
    assert (updates == -1).all()
    amp.check_skipped(state)
    assert int(state.skipped) == 2


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="has 0 loss scales"):
        amp.loss_scale(optax.sgd(1.0).init(jnp.ones(2)))
    twice = amp.dynamic_loss_scale(amp.dynamic_loss_scale(optax.sgd(1.0)))
    with pytest.raises(ValueError, match="`growth`"):
        amp.dynamic_loss_scale(optax.sgd(1.0), growth=0.5)
    assert twice is not None


def test_a_scale_inside_a_scale_is_refused():
    tx = amp.dynamic_loss_scale(
        optax.chain(optax.clip(1.0), amp.dynamic_loss_scale(optax.sgd(1.0)))
    )
    with pytest.raises(ValueError, match="has a loss scale too"):
        tx.init({"w": jnp.ones(2)})


def test_float16_without_a_scale_warns_and_bfloat16_does_not(recwarn):
    amp.value_and_grad(jnp.sum, "p=f32,c=bf16,o=f32")
    amp.value_and_grad(jnp.sum, "p=f32,c=f16,o=f32", scale=2.0)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"amp\.dynamic_loss_scale"):
        amp.value_and_grad(jnp.sum, "p=f32,c=f16,o=f32")


def test_changes_in_place_are_refused_with_and_without_a_policy():
    def counting(tree, x):
        tree["count"] = tree["count"] + 1
        return (x * tree["scale"]).sum()

    tree = {"count": jnp.zeros(()), "scale": jnp.ones(())}
    norm, x = nnx.BatchNorm(4, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    for wrap in (
        lambda fn: amp.with_policy(fn, "full"),
        amp.value_and_grad,
        lambda fn: amp.value_and_grad(fn, "full"),
    ):
        with pytest.raises(ValueError, match=r"in place.*jaxtricks\.nnx\.autocast"):
            wrap(counting)(dict(tree), x)
        with pytest.raises(ValueError, match=r"in place.*jaxtricks\.nnx\.autocast"):
            wrap(lambda norm, x: norm(x).sum())(norm, x)
