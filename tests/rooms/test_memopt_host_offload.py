"""Optimizer state in the memory of the host: where it lies, what it survives, in which order it is copied."""

import chex
import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _compat, _jaxpr, memopt
from jaxtricks.memopt import _host_offload

needs_host = pytest.mark.skipif(
    not _compat.has_host_memory(), reason="jax 0.7 on CPU has no host memory in jit"
)
SHAPES = {"w0": (16, 32), "w1": (16, 32), "w2": (32, 8), "bias": (8,), "scalar": ()}
LARGE = {"w0", "w1", "w2"}
INNER = {
    "adamw": optax.adamw(1e-3),
    "clip, adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "sm3": memopt.sm3(0.1, momentum=0.9),
    "int8": memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8"),
    "adafactor": memopt.adafactor(beta1=0.9, min_dim_size_to_factor=4),
    "lamb": optax.lamb(1e-2),
    "inject": optax.inject_hyperparams(optax.adam)(1e-2),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


def offload(inner=INNER["adamw"], min_bytes=256):
    return memopt.host_offload(inner, min_bytes=min_bytes)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


def kinds(state):
    return jax.tree.map(lambda x: x.sharding.memory_kind, state)


def on_device(tree):
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def assert_large_on_host(state):
    for x in jax.tree.leaves(state):
        kind = "pinned_host" if x.ndim and x.nbytes >= 256 else "device"
        assert x.sharding.memory_kind == kind, x.shape


def train(tx, steps=3, state=None, **jit):
    params = jax.device_put(arrays(), jax.devices()[0])
    state = jax.jit(tx.init)(params) if state is None else state

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, **jit)
    for seed in range(steps):
        params, state = step(params, state, jax.device_put(arrays(seed + 1), jax.devices()[0]))
    return params, state, step._cache_size()


def test_a_backend_without_host_memory_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(_compat, "has_host_memory", lambda: False)
    with pytest.raises(ValueError, match=r"on '\w+': use `inner` without host_offload"):
        offload().init(arrays())
    with pytest.raises(ValueError, match="`min_bytes` is -1: give 0 or more"):
        offload(min_bytes=-1)


@needs_host
@pytest.mark.parametrize("name", INNER)
def test_steps_are_inners_and_the_state_stays_on_the_host(name):
    inner = INNER[name]
    params, state, compiled = train(offload(inner))
    expected = train(inner)
    chex.assert_trees_all_close((params, on_device(state)), expected[:2], rtol=1e-6, atol=1e-7)
    assert jax.tree.structure(state) == jax.tree.structure(expected[1])
    assert compiled == 1
    assert_large_on_host(state)
    assert "pinned_host" in jax.tree.leaves(kinds(state)) or name == "adafactor"


@needs_host
def test_outside_of_jit_too():
    tx, params = offload(), arrays()
    state = tx.init(params)
    assert_large_on_host(state)
    updates, state = tx.update(arrays(1), state, params)
    assert_large_on_host(state)
    assert set(jax.tree.leaves(kinds(updates))) == {"device"}
    expected, _ = INNER["adamw"].update(arrays(1), INNER["adamw"].init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@needs_host
def test_small_arrays_counts_and_keys_stay():
    params = {"w": jnp.ones((16, 16)), "keys": jnp.ones(4)}
    holds = lambda p: (p, jax.random.split(jax.random.key(0), 100), jnp.zeros((0, 4)), jnp.int32(0))
    inner = optax.GradientTransformation(holds, lambda u, s, p=None: (u, s))
    state = jax.jit(offload(inner, 0).init)(params)
    assert jax.tree.leaves(kinds(state)) == ["pinned_host"] * 2 + ["device"] * 3


@needs_host
def test_other_arguments_reach_inner():
    inner = optax.GradientTransformationExtraArgs(
        lambda p: p, lambda u, s, p=None, *, value, name: (jax.tree.map(lambda x: x * value, u), s)
    )
    tx, params = offload(inner), arrays()
    step = jax.jit(lambda u, s, value: tx.update(u, s, value=value, name="static"))
    updates, _ = step(params, tx.init(params), jnp.float32(2))
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 2 * x, params))


@needs_host
@pytest.mark.devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_the_sharding_stays(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {n: P("data", "model") for n in LARGE} | {"bias": P("model"), "scalar": P()}
    place = lambda tree: {
        n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in tree.items()
    }
    tx, params = offload(optax.adam(1e-2)), place(arrays())
    update, state = jax.jit(tx.update), tx.init(params)
    for seed in (1, 2):
        updates, state = update(place(arrays(seed)), state, params)
        assert_large_on_host(state)
        for n in LARGE:
            for x in (state[0].mu[n], state[0].nu[n]):
                wanted = NamedSharding(mesh, specs[n], memory_kind="pinned_host")
                assert x.sharding.is_equivalent_to(wanted, 2)
    plain = optax.adam(1e-2)
    _, expected = plain.update(arrays(1), plain.init(arrays()), arrays())
    expected, _ = plain.update(arrays(2), expected, arrays())
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(expected), rtol=1e-5)
    assert memopt.state_specs(tx, params, specs)[0].mu == specs


@needs_host
def test_donated_state_is_written_in_place():
    params, state, _ = train(offload(), donate_argnums=(0, 1))
    expected = train(INNER["adamw"])
    chex.assert_trees_all_close((params, on_device(state)), expected[:2], rtol=1e-6)
    assert_large_on_host(state)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {n: n != "w1" for n in SHAPES}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "b": optax.sgd(0.1)}, {n: "a" if n in LARGE else "b" for n in SHAPES}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "dynamic_loss_scale": lambda tx: jt.amp.dynamic_loss_scale(tx, init=2.0),
    "skip_nonfinite": lambda tx: jt.amp.skip_nonfinite(tx, 3),
}


@needs_host
@pytest.mark.parametrize("name", WRAPPED)
def test_inside_of_wrappers(name):
    wrap = WRAPPED[name]
    params, state, compiled = train(wrap(offload(optax.adam(1e-2))))
    expected = train(wrap(optax.adam(1e-2)))
    chex.assert_trees_all_close((params, on_device(state)), expected[:2], rtol=1e-6, atol=1e-7)
    moments = optax.tree_utils.tree_get_all_with_path(state, "mu")
    assert compiled == 1 and moments
    for _, mu in moments:
        assert_large_on_host(mu)


@needs_host
def test_inject_hyperparams_around_it():
    make = optax.inject_hyperparams(lambda learning_rate: offload(optax.adam(learning_rate)))
    _, state, _ = train(make(1e-2))
    assert_large_on_host(state)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-2)


@needs_host
def test_steps_inside_a_scan():
    tx, params = offload(), arrays()
    grads = jax.tree.map(lambda *xs: jnp.stack(xs), *map(arrays, (1, 2, 3)))

    @jax.jit
    def run(params, state):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), grads)[0]

    params, state = run(params, tx.init(params))
    assert_large_on_host(state)
    chex.assert_trees_all_close(params, train(INNER["adamw"])[0], rtol=1e-6)


@needs_host
def test_optax_maps_its_state():
    state = offload().init(arrays())
    owned = optax.tree_utils.tree_map_params(
        offload(), lambda _: True, state, transform_non_params=lambda _: False
    )
    assert all(jax.tree.leaves((owned[0].mu, owned[0].nu))) and not owned[0].count


@needs_host
@pytest.mark.parametrize("saved", ["host", "device"])
def test_checkpoints_restore_to_where_the_target_lies(saved, tmp_path):
    """Also those of `inner`: the structure is the same."""
    txs = {"host": offload(), "device": INNER["adamw"]}
    _, state, _ = train(txs[saved])
    target = jax.jit(txs["host"].init)(jax.device_put(arrays(), jax.devices()[0]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert kinds(restored) == kinds(target)
    assert_large_on_host(restored)
    chex.assert_trees_all_equal(on_device(restored), on_device(state))
    _, state, _ = train(offload(), 1, restored)
    assert_large_on_host(state)


def stages_of(inner):
    """The updates that are ready, the arrays that arrive and the outputs that leave, stage by stage."""
    params = arrays()
    leaves, structure = jax.tree.flatten(inner.init(params))
    step = lambda *state: inner.update(arrays(1), jax.tree.unflatten(structure, state), params)
    program = _jaxpr.inline(jax.make_jaxpr(step)(*leaves))
    size = len(params)
    for stage in _host_offload._stages(program.jaxpr, size):
        if stage.arrays:
            yield (
                [i for i in stage.outs if i < size],
                stage.arrays,
                [i - size for i in stage.outs if i >= size],
            )


def test_each_parameter_has_its_stage_and_the_last_comes_first():
    # The state of Adam: its count, mu, nu.
    stages = list(stages_of(optax.scale_by_adam()))
    mu, nu = range(1, 6), range(6, 11)
    assert [updates for updates, *_ in stages] == [[4], [3], [2], [1], [0]]
    for i, (_, arriving, leaving) in zip((4, 3, 2, 1, 0), stages, strict=True):
        assert set(arriving) - {0} == set(leaving) - {0} == {mu[i], nu[i]}


@needs_host
@pytest.mark.parametrize(("name", "barriers"), [("clip, adam", 2), ("MultiSteps", 0)])
def test_copies_wait_for_the_stage_before(name, barriers):
    tx, params = offload(INNER[name]), arrays()
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    assert str(jaxpr).count("optimization_barrier") == barriers


@needs_host
def test_effects_keep_their_order():
    def update(updates, state, params=None):
        jax.debug.callback(lambda: None)
        return updates, jax.tree.map(lambda x: x + 1, state)

    inner = optax.GradientTransformation(lambda p: p, update)
    jaxpr = jax.make_jaxpr(offload(inner).update)(arrays(), offload(inner).init(arrays()))
    assert "optimization_barrier" not in str(jaxpr)
