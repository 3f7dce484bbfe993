"""Stochastic rounding: without bias, exact where it lands, the same whatever the shards."""

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _random_bits as bits
from jaxtricks import memopt
from jaxtricks.memopt import _stochastic_rounding

pytestmark = pytest.mark.stock
LOW = ["bfloat16", "float16"]


def wide(x):
    return np.asarray(x, np.float64)


def values(dtype, n=2000):
    """Float32 numbers over the range of the dtype, subnormal ones too."""
    info = jnp.finfo(dtype)
    rng = np.random.default_rng(0)
    lo, hi = (
        np.log2(float(info.smallest_subnormal)) if dtype == "float16" else -100,
        np.log2(float(info.max)),
    )
    return jnp.asarray(rng.choice([-1, 1], n) * 2.0 ** rng.uniform(lo, hi - 1, n), jnp.float32)


def neighbours(x, dtype):
    """The largest value of the dtype below x and the smallest above."""
    near = np.asarray(x).astype(jnp.dtype(dtype))
    up, down = (np.nextafter(near, near.dtype.type(s * np.inf)) for s in (1, -1))
    lower = np.where(wide(near) <= wide(x), near, down)
    upper = np.where(wide(near) >= wide(x), near, up)
    return wide(lower.astype(np.float32)), wide(upper.astype(np.float32))


@pytest.mark.parametrize("dtype", LOW)
def test_rounds_to_a_neighbour_with_the_probability_of_the_remainder(dtype, ours):
    x = values(dtype)
    lower, upper = neighbours(x, dtype)
    noise = jnp.arange(0, 2**16, 7, dtype=jnp.float32)
    every = jax.jit(
        jax.vmap(
            lambda n: _stochastic_rounding.to_neighbour(
                x, jnp.dtype(dtype), jnp.full(x.shape, n / 2**16)
            )
        )
    )
    rounded = wide(every(noise))
    assert np.all((rounded == lower) | (rounded == upper))
    exact = lower == upper
    probability = np.where(exact, 0, (wide(x) - lower) / np.where(exact, 1, upper - lower))
    np.testing.assert_allclose(np.mean(rounded == upper, 0)[~exact], probability[~exact], atol=2e-4)


@pytest.mark.parametrize("dtype", LOW)
def test_what_has_no_neighbours(dtype, ours):
    info = jnp.finfo(dtype)
    x = jnp.asarray(
        [0.0, np.inf, -np.inf, np.nan, float(info.max), float(info.max) * 1.003], jnp.float32
    )
    for n in (0, 30000, 65535):
        rounded = _stochastic_rounding.to_neighbour(
            x, jnp.dtype(dtype), jnp.full(x.shape, n / 2**16)
        )
        np.testing.assert_array_equal(rounded, x.astype(dtype).astype(jnp.float32))


@pytest.mark.parametrize("dtype", LOW)
def test_lands_exactly_on_rounded_values_through_optax_and_nnx(dtype):
    p = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), dtype)
    u = jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)) * 1e-3, jnp.float32)
    tx = memopt.stochastic_round(7)
    updates, state = tx.update({"w": u}, tx.init({"w": p}), {"w": p})
    assert updates["w"].dtype == jnp.float32
    landed = optax.apply_updates({"w": p}, updates)["w"]
    lower, upper = neighbours(np.asarray(p, np.float32) + np.asarray(u), dtype)
    assert landed.dtype == jnp.dtype(dtype)
    assert np.all((wide(landed) == lower) | (wide(landed) == upper))
    assert state.count == 1

    model = nnx.Linear(64, 32, use_bias=False, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    model.kernel[...] = p
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    grads["kernel"] = grads["kernel"].replace(u)
    optimizer.update(model, grads)
    # Its path is "kernel", not "w": other bits, the same two neighbours.
    assert np.all((wide(model.kernel[...]) == lower) | (wide(model.kernel[...]) == upper))
    assert model.kernel[...].dtype == jnp.dtype(dtype)


def test_the_bits_are_uniform_and_unrelated(ours):
    shape, steps = (64, 256), 64
    seeds = jax.vmap(lambda t: bits.of_leaf(bits.of_step(jax.random.key(0), t), "w"))(
        jnp.arange(steps)
    )
    x = wide(jax.jit(jax.vmap(lambda s: bits.uniform(s, shape)))(seeds)).reshape(steps, -1)
    n = x.size
    assert np.all((x >= 0) & (x < 1) & (x * 2**16 == np.floor(x * 2**16)))
    share, _ = np.histogram(x, bins=64, range=(0, 1))
    assert np.sum((share - n / 64) ** 2) / (n / 64) < 63 + 5 * np.sqrt(2 * 63)  # chi square
    z = (x - 0.5) * np.sqrt(12)

    def unrelated(a, b):
        return abs(np.mean(a * b)) < 5 / np.sqrt(a.size)

    assert unrelated(z[:, 1:], z[:, :-1])  # neighbours
    assert unrelated(z[1:], z[:-1])  # steps
    assert unrelated(z[:, 256:], z[:, :-256])  # rows
    assert unrelated(z[1:] ** 2 - 1, z[:-1] ** 2 - 1)
    assert np.max(np.abs(z.mean(0))) < 6 / np.sqrt(steps)  # no entry is favoured


def test_one_step_is_unbiased(ours):
    # A thousandth of 1: to the nearest nothing happens, the neighbours are 1 and 0.99609375.
    params = {"w": jnp.ones(100_000, jnp.bfloat16)}
    grads = {"w": jnp.full(100_000, 1e-3, jnp.float32)}
    tx = memopt.stochastic_round(0)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.negative, grads), tx.init(params), params)
    mean = wide(updates["w"]).mean()
    assert abs(mean + 1e-3) < 5 * 0.5 * 2**-8 / np.sqrt(100_000)


def test_a_thousand_small_steps_arrive_where_nearest_rounding_stands_still():
    rate, steps = 1e-4, 1000
    tx = {
        "nearest": optax.sgd(rate),
        "stochastic": optax.chain(optax.sgd(rate), memopt.stochastic_round(3)),
    }
    ends = {}
    for name, optimizer in tx.items():

        def body(carry, _, optimizer=optimizer):
            params, state = carry
            grads = params.astype(jnp.float32)  # shrinks by 1e-4 a step
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.ones(4096, jnp.bfloat16)
        (end, _), _ = jax.jit(
            lambda s, b=body, o=optimizer: jax.lax.scan(b, (s, o.init(s)), length=steps)
        )(start)
        ends[name] = wide(end).mean()
    assert ends["nearest"] == 1
    np.testing.assert_allclose(ends["stochastic"], (1 - rate) ** steps, rtol=2e-3)


def test_bits_are_of_seed_step_and_path(ours):
    params = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)

    def run(seed, count=0, tree=params):
        tx = memopt.stochastic_round(seed)
        state = tx.init(tree)._replace(count=jnp.int32(count))
        return tx.update({n: updates[n] for n in tree}, state, tree)[0]

    first = run(0)
    np.testing.assert_array_equal(run(0)["a"], first["a"])
    np.testing.assert_array_equal(run(jax.random.key(0))["a"], first["a"])
    np.testing.assert_array_equal(run(0, tree={"b": params["b"]})["b"], first["b"])
    for other in (run(1)["a"], run(0, count=1)["a"], first["b"]):
        assert 0.05 < np.mean(np.asarray(other) != np.asarray(first["a"])) < 0.5


@pytest.mark.devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_shards_do_not_change_the_bits(kind, ours):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    p = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    u = jnp.full(p.shape, 1e-3)
    tx = memopt.stochastic_round(0)
    state = tx.init(p)
    expected, _ = jax.jit(tx.update)(u, state, p)
    got, _ = jax.jit(lambda *args: tx.update(*args))(place(u), state, place(p))
    np.testing.assert_array_equal(got, expected)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)


def test_wide_and_other_leaves_pass():
    params = {"f": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16), "n": None, "i": jnp.arange(3)}
    updates = {"f": jnp.full(3, 0.1), "b": jnp.full(3, 0.5), "n": None, "i": jnp.ones(3, jnp.int32)}
    tx = memopt.stochastic_round(0)
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(out["f"], updates["f"])
    np.testing.assert_array_equal(out["i"], 1)
    np.testing.assert_array_equal(out["b"], 0.5)
    assert out["n"] is None


def test_the_last_link_of_the_documented_order():
    model = nnx.Linear(8, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    roles = jt.nnx.roles(model)
    chain = optax.chain(
        jt.agc.adaptive_grad_clip(0.1, roles=roles),
        memopt.adafactor(1e-2, roles=roles, min_dim_size_to_factor=4),
        memopt.stochastic_round(0),
    )
    optimizer = nnx.Optimizer(model, jt.amp.dynamic_loss_scale(chain, init=4.0), wrt=nnx.Param)
    x = jnp.ones((4, 8), jnp.bfloat16)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean(jnp.square(m(x).astype(jnp.float32))) * 4.0
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert model.kernel[...].dtype == jnp.bfloat16


def test_apply_updates():
    params = {"w": jnp.ones(20_000, jnp.bfloat16), "f": jnp.ones(3)}
    updates = {"w": jnp.full(20_000, 1e-3, jnp.bfloat16), "f": jnp.full(3, 1e-3)}
    new = memopt.apply_updates(params, updates, key=jax.random.key(0))
    assert new["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(new["w"]).mean(), 1.001, atol=1e-4)
    np.testing.assert_array_equal(new["f"], jnp.float32(1) + jnp.float32(1e-3))


def test_apply_updates_without_a_key_is_optax():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    updates = {"w": jnp.full(4, 1e-3, jnp.bfloat16)}
    np.testing.assert_array_equal(memopt.apply_updates(params, updates)["w"], 1)


def test_mistakes_say_what_to_do():
    tx = memopt.stochastic_round(0)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="needs `params`"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="'v'"):
        tx.update({"v": jnp.ones(3)}, tx.init(params), params)
    with pytest.raises(ValueError, match="seed"):
        memopt.stochastic_round("seven")


def test_members_of_an_ensemble_round_differently_with_a_key_each():
    params = jnp.ones((4, 1000), jnp.bfloat16)

    def step(key, params):
        tx = memopt.stochastic_round(key)
        updates, _ = tx.update(jnp.full(1000, 1e-3, jnp.float32), tx.init(params), params)
        return updates

    updates = jax.vmap(step)(jax.random.split(jax.random.key(0), 4), params)
    assert all(np.any(updates[i] != updates[j]) for i in range(4) for j in range(i))
    one = step(jax.random.split(jax.random.key(0), 4)[2], params[2])
    np.testing.assert_array_equal(updates[2], one)
