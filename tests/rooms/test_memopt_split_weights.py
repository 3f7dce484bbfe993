"""Weights in bfloat16 and an int8 correction, and AdamW with them, against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import memopt

CHAIN = optax.chain(optax.sgd(1.0), memopt.split_weights())


def split(weights):
    """(params, state) that hold these float32 weights."""
    params = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.bfloat16), weights)
    return memopt.split_float32(weights, CHAIN.init(params))


def joined(params, state):
    return jax.tree.map(lambda w: np.asarray(w, np.float64), memopt.float32_weights(params, state))


@settings(max_examples=80, deadline=None)
@given(st.floats(-30, 38), st.integers(0, 2**20))
def test_the_error_is_bounded(exponent, seed):
    rng = np.random.default_rng(seed)
    w = np.clip(rng.normal(size=64) * 10.0**exponent, -3.38e38, 3.38e38).astype(np.float32)
    (params, state) = split({"w": jnp.asarray(w)})
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["w"], jnp.asarray(w).astype(jnp.bfloat16))
    error = np.abs(joined(params, state)["w"] - w.astype(np.float64))
    # Half a step, but for the one next to a tie, where 128 would not fit.
    assert np.all(error <= 2.0**-15 * np.abs(w) + 1e-38)
    assert np.mean(error <= 2.0**-16 * np.abs(w) + 1e-38) > 0.9


def test_ties_zeros_and_what_is_not_finite(ours):
    tie = 1 + 2.0**-8  # in the middle: 128 steps, of which int8 has 127
    w = jnp.asarray([tie, -tie, 0.0, jnp.inf, -jnp.inf, jnp.nan, 2.0 - 2**-9, 1e-38], jnp.float32)
    params, state = split({"w": w})
    new = joined(params, state)["w"]
    np.testing.assert_allclose(new[[0, 1, 6]], np.asarray(w)[[0, 1, 6]], rtol=2.0**-15)
    np.testing.assert_array_equal(new[2:6], np.asarray(w)[2:6])


def test_steps_follow_float32():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(40, 50)).astype(np.float32)
    params, state = split({"w": jnp.asarray(start)})
    exact = start.astype(np.float64)
    update = jax.jit(CHAIN.update)
    for _ in range(100):
        g = (1e-3 * rng.normal(size=start.shape) + 2e-4).astype(np.float32)
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        exact = exact - g
    assert params["w"].dtype == jnp.bfloat16
    error = joined(params, state)["w"] - exact
    # Each step is rounded once.
    assert np.max(np.abs(error)) < 100 * 2.0**-16 * np.max(np.abs(exact)) / 8


def test_a_long_step_leaves_a_right_correction():
    """1 - (1 - 1e-6) is not a float32 number: the correction belongs to what the parameter becomes."""
    params, state = split({"w": jnp.ones(3)})
    goal = np.float32([1e-6, -3e-12, 0.0])
    updates, state = CHAIN.update({"w": 1 - jnp.asarray(goal)}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(joined(params, state)["w"], goal, atol=2.0**-23)


def test_joining_and_splitting_is_exact():
    """Also where the correction is at its largest, and with two chains for two parts of the tree."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16) for n in ("a", "b")}
    tx = optax.multi_transform(
        {"a": memopt.adamw7(1e-2), "b": memopt.adamw7(1e-3)}, {"a": "a", "b": "b"}
    )
    state = tx.init(params)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    again, new = memopt.split_float32(memopt.float32_weights(params, state), state)
    chex.assert_trees_all_equal(again, params)
    chex.assert_trees_all_equal(jax.tree.leaves(new), jax.tree.leaves(state))


def test_other_dtypes_pass_and_trees_map(ours):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3), "h": jnp.ones(2, jnp.float16)}
    state = CHAIN.init(params)
    grads = jax.tree.map(lambda p: p * 0 + 0.25, params)
    updates, new = CHAIN.update(grads, state, params)
    np.testing.assert_array_equal(updates["b"], -0.25)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(state)] == [jnp.int8]
    mapped = optax.tree_utils.tree_map_params(CHAIN, lambda x: x + 1, state)
    np.testing.assert_array_equal(mapped[1].correction["w"], 1)
    assert memopt.float32_weights(params, state)["b"] is params["b"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_correction_lies_as_its_parameter(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    place = NamedSharding(mesh, P("data", "model"))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        params = jax.device_put(jnp.ones((64, 128), jnp.bfloat16), place)
        tx = memopt.adamw7(1e-3)
        for state in (tx.init(params), jax.jit(tx.init)(params)):
            assert state[1].correction.sharding.is_equivalent_to(place, 2)
        _, state = jax.jit(tx.update)(params, state, params)
        assert state[1].correction.sharding.is_equivalent_to(place, 2)


def test_adamw7_takes_seven_bytes_with_its_gradient():
    shape = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)}
    state = memopt.state_bytes(memopt.adamw7(1e-3), shape) / 2**20
    assert 2 + 2 + state == pytest.approx(7 + 2 * 2 / 64, abs=1e-4)  # two bfloat16 scales per 64
    assert memopt.state_bytes(memopt.adamw7(1e-3, bits=4), shape) / 2**20 < 2.07


def test_adamw7_follows_adamw():
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.normal(size=(128, 96)), jnp.float32), "b": jnp.ones(96)}
    settings = {"b2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "nesterov": True}
    mask = {"w": True, "b": False}
    grads = [
        jax.tree.map(lambda p: jnp.asarray(p + rng.normal(size=p.shape), jnp.float32), start)
        for _ in range(60)
    ]

    def run(tx, params):
        state, update = tx.init(params), jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    exact, _ = run(optax.adamw(1e-2, mask=mask, **settings), start)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start)
    params, state = run(memopt.adamw7(1e-2, mask=mask, **settings), narrow)
    full = memopt.float32_weights(params, state)
    for name in start:
        moved = np.linalg.norm(exact[name] - start[name])
        assert np.linalg.norm(full[name] - exact[name]) < 0.06 * moved
    # bfloat16 parameters alone, with the same optimizer, are further off.
    alone, _ = run(memopt.low_bit(optax.adamw(1e-2, mask=mask, **settings)), narrow)
    error = [np.linalg.norm(x["w"] - exact["w"]) for x in (full, alone)]
    assert error[0] < 0.8 * error[1]


def test_an_nnx_model_in_bfloat16():
    model = nnx.Linear(128, 64, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, memopt.adamw7(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(jnp.eye(128)) - 1)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert model.kernel[...].dtype == jnp.bfloat16


def test_mistakes_are_one_sentence():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = CHAIN.init(params)
    with pytest.raises(ValueError, match=r"memopt.split_weights needs `params`: call tx.update"):
        CHAIN.update(params, state)
    with pytest.raises(
        ValueError, match="^memopt.split_float32: `opt_state` has no state of split"
    ):
        memopt.split_float32(params, optax.sgd(1.0).init(params))
    for other in ({"v": jnp.ones(3)}, {"w": jnp.ones(4)}):
        with pytest.raises(
            ValueError, match=r"has a correction \(3,\) for 'w', and there is no such"
        ):
            memopt.float32_weights(other, state)
    with pytest.raises(ValueError, match="'v' has a gradient but `params` has no such entry"):
        CHAIN.update({"v": jnp.ones(3)}, state, params)
    chex.assert_trees_all_equal_structs(CHAIN.init(params), state)
