"""What the optimizers keep: how many bytes, in what form, and on which devices."""

import dataclasses
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _compat, _random_bits, _table, _tree, memopt
from jaxtricks.memopt import _momentum

SHAPES = {
    "w": (256, 512),
    "b": (512,),
    "s": (),
    "stack": (8, 256, 384),
    "heads": (256, 4, 128),
    "odd": (130, 131),
}
SPECS = {
    "w": P("data", "model"),
    "b": P("model"),
    "s": P(),
    "stack": P(None, "data", "model"),
    "heads": P(("data", "model")),
    "odd": P(),
}
ROLES = {
    "w": ("in", "out"),
    "b": ("none",),
    "s": (),
    "stack": ("batch", "in", "out"),
    "heads": ("in", "out", "out"),
    "odd": None,
}
# Of every optimizer the state of "w", "stack" and "heads".
PLACED = {
    "adafactor": (
        memopt.adafactor(1e-2, roles=ROLES),
        [(P("data"), P("model")), (P(None, "data"), P(None, "model")), (P(("data", "model")), P())],
    ),
    "sm3": (
        memopt.sm3(0.1, roles=ROLES),
        [
            (P("data"), P("model")),
            (P(None, "data"), P(None, "model")),
            (P(("data", "model")), P(), P()),
        ],
    ),
    "momentum": (memopt.adafactor(beta1=0.9, roles=ROLES), None),
    "int8": (memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8", roles=ROLES), None),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def on_mesh(mesh, tree):
    return {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in tree.items()}


def assert_placed(state, specs, mesh):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    wanted = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    for (path, x), spec in zip(leaves, wanted, strict=True):
        if x.ndim:
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (path, spec)


@pytest.mark.parametrize("name", PLACED)
def test_specs_are_those_of_the_parameters_without_the_reduced_axes(name):
    tx, wanted = PLACED[name]
    specs = memopt.state_specs(tx, arrays(), SPECS)
    chex.assert_trees_all_equal_structs(specs, jax.eval_shape(tx.init, arrays()))
    assert specs.count == P()
    if wanted:
        assert [tuple(specs.v[n]) for n in ("w", "stack", "heads")] == wanted
    if name == "momentum":
        assert specs.m == SPECS
    if name == "int8":
        assert {n: m.codes if _momentum.is_int8(m) else m for n, m in specs.m.items()} == SPECS
        assert specs.m["w"].scale == P("data", "model")


@pytest.mark.devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("name", PLACED)
def test_init_places_the_state_and_steps_keep_it_there(name, kind):
    tx, _ = PLACED[name]
    mesh = mesh_of(kind)
    params = on_mesh(mesh, arrays())
    specs = memopt.state_specs(tx, params, SPECS)
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        assert_placed(state, specs, mesh)
    update, plain = jax.jit(lambda *args: tx.update(*args)), arrays()
    single, expected_state = jax.jit(lambda *args: tx.update(*args)), tx.init(plain)
    for seed in (1, 2, 3):
        updates, state = update(on_mesh(mesh, arrays(seed)), state, params)
        expected, expected_state = single(arrays(seed), expected_state, plain)
        assert_placed(state, specs, mesh)
        for n in SHAPES:
            size = np.max(np.abs(expected[n]))
            np.testing.assert_allclose(updates[n], expected[n], rtol=0, atol=1e-5 * size)
    assert update._cache_size() == 1


@pytest.mark.devices
@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_replicated_gradients_serve_sharded_parameters(name, kind):
    tx, _ = PLACED[name]
    mesh, grads = mesh_of(kind), arrays(1)
    everywhere = jax.device_put(grads, NamedSharding(mesh, P()))
    expected, _ = jax.jit(tx.update)(grads, tx.init(arrays()), arrays())
    with jax.set_mesh(mesh):
        params = on_mesh(mesh, arrays())
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(everywhere, state, params)
    assert_placed(new_state, memopt.state_specs(tx, params, SPECS), mesh)
    for n in SHAPES:
        size = np.max(np.abs(expected[n]))
        np.testing.assert_allclose(updates[n], expected[n], rtol=0, atol=1e-5 * size)


def test_specs_of_any_chain():
    tx = optax.chain(jt.agc.adaptive_grad_clip(), optax.adamw(1e-3), memopt.stochastic_round(0))
    specs = memopt.state_specs(optax.MultiSteps(tx, 2), arrays(), SPECS)
    clip, adam, rounding = specs.inner_opt_state
    assert specs.acc_grads == SPECS
    assert adam[0].mu == adam[0].nu == SPECS
    assert (clip.clipped_fraction, clip.max_ratio, rounding.count) == (P(), P(), P())


@pytest.mark.devices
def test_specs_serve_out_shardings():
    tx, mesh = PLACED["adafactor"][0], mesh_of(AxisType.Auto)
    params = on_mesh(mesh, arrays())
    specs = memopt.state_specs(tx, params, jax.tree.map(lambda x: x.sharding, params))
    is_spec = lambda x: isinstance(x, P)
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)
    assert_placed(jax.jit(tx.init, out_shardings=places)(params), specs, mesh)


def test_specs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="5 specs for 6 parameters"):
        memopt.state_specs(memopt.adafactor(), arrays(), {n: SPECS[n] for n in SHAPES if n != "w"})
    with pytest.raises(ValueError, match="'b' has more axes"):
        memopt.state_specs(memopt.adafactor(), arrays(), SPECS | {"b": P("data", "model")})


# Tables


@pytest.mark.parametrize(
    "tx",
    [
        memopt.adafactor(beta1=0.9),
        memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8"),
        optax.adamw(1e-3),
    ],
    ids=["adafactor", "sm3, int8", "adamw"],
)
def test_table_counts_every_byte(tx):
    params = {"net": arrays()}
    table = memopt.state_table(tx, jax.eval_shape(lambda: params))
    assert table.headers == ("parameter", "shape", "state", "bytes/param")
    assert {row[0] for row in table.rows} == {f"net/{n}" for n in SHAPES} | {"others", "total"}
    held = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert memopt.state_bytes(tx, params) == held
    entries = sum(x.size for x in jax.tree.leaves(params))
    np.testing.assert_allclose(table.rows[-1][3], held / entries, rtol=1e-12)
    (checkpoint,) = (note for note in table.notes if note.startswith("a checkpoint is "))
    in_file = _table.format_bytes(held + 4 * entries)
    assert checkpoint.startswith(f"a checkpoint is {in_file}: parameters 4.1 MiB, state ")


def test_table_names_what_did_not_factor_and_what_that_costs():
    table = memopt.state_table(memopt.adafactor(roles=ROLES), arrays())
    assert [note.partition(" is ")[0] for note in table.notes] == ["a checkpoint"]
    table = memopt.state_table(optax.chain(memopt.adafactor(min_dim_size_to_factor=200)), arrays())
    assert [note.partition(" is ")[0] for note in table.notes] == ["heads", "odd", "a checkpoint"]
    assert "512.0 KiB, where 3.0 KiB would do" in table.notes[0]
    assert len(memopt.state_table(optax.adam(1e-3), arrays()).notes) == 1


@pytest.mark.devices
def test_table_has_a_column_for_one_device():
    mesh = mesh_of(AxisType.Auto)
    table = memopt.state_table(optax.adam(1e-3), on_mesh(mesh, arrays()))
    rows = {row[0]: row for row in table.rows}
    assert table.headers[-1] == "per device"
    assert (rows["w"][2], rows["w"][4]) == ("1.0 MiB", "128.0 KiB")
    assert (rows["odd"][2], rows["odd"][4]) == ("133.0 KiB", "133.0 KiB")


@pytest.mark.devices
@pytest.mark.skipif(not _compat.has_host_memory(), reason="needs host memory")
def test_table_says_what_lies_on_the_host():
    tx, mesh = memopt.host_offload(optax.adam(1e-3)), mesh_of(AxisType.Auto)
    table = memopt.state_table(tx, arrays())
    assert table.headers[-1] == "on host"
    rows = {row[0]: row for row in table.rows}
    assert (rows["w"][2:], rows["b"][2:]) == (("1.0 MiB", 8, "1.0 MiB"), ("4.0 KiB", 8, "0 B"))
    table = memopt.state_table(tx, on_mesh(mesh, arrays()))
    assert table.headers[-2:] == ("per device", "on host")
    rows = {row[0]: row for row in table.rows}
    assert (rows["w"][4:], rows["b"][4:]) == (("0 B", "1.0 MiB"), ("2.0 KiB", "0 B"))


def test_table_tells_apart_parameters_whose_paths_end_alike():
    params = {"w": jnp.ones(4), "a": {"w": jnp.ones(8)}, "b": [{"w": jnp.ones(16)}]}
    rows = memopt.state_table(optax.trace(0.9), params).rows
    assert {row[0]: row[2] for row in rows[:3]} == {"w": "16 B", "a/w": "32 B", "b/0/w": "64 B"}


def test_table_counts_what_stands_where_the_parameters_do():
    # Paths alone would find "0", the place in the chain, and "v", the name in the state.
    tx = optax.chain(memopt.adafactor(), optax.trace(0.9))
    rows = lambda params: {row[0]: row[2] for row in memopt.state_table(tx, params).rows}
    several = rows([jnp.ones(4), {"v": jnp.ones(8), "w": jnp.ones(16)}])
    assert several["0"] == "32 B"
    assert (several["1/v"], several["1/w"], several["others"]) == ("64 B", "128 B", "4 B")
    assert rows(jnp.ones(4))[""] == "32 B"


def test_table_of_a_transformation_that_optax_can_not_map():
    flat = optax.GradientTransformation(
        _tree.by_path, lambda updates, state, params: (updates, state)
    )
    rows = memopt.state_table(flat, {"a": {"w": jnp.ones(8)}, "b": jnp.ones(4)}).rows
    assert {row[0]: row[2] for row in rows[:2]} == {"a/w": "32 B", "b": "16 B"}


# Trees


@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])

MATRIX = np.linspace(-1, 1, 300, dtype=np.float32).reshape(20, 15)
VECTOR = np.ones(15, np.float32)
CONTAINERS = {
    "bare": MATRIX,
    "tuple": (MATRIX, VECTOR),
    "nested tuples": ((MATRIX,), (), ((VECTOR, None), MATRIX)),
    "named tuple": optax.TraceState((MATRIX, VECTOR)),
    "list, None, scalar, empty": [{"w": MATRIX}, None, np.float32(2), np.zeros((0, 4), np.float32)],
    "masked": {"w": MATRIX, "b": optax.MaskedNode()},
    "frozen": flax.core.freeze({"a": {"w": MATRIX, "b": VECTOR}}),
    "dataclass": {"layer": Layer(MATRIX, VECTOR)},
    "nothing": {},
}
MAPPED = {
    "adafactor": memopt.adafactor(min_dim_size_to_factor=4),
    "adafactor, momentum": memopt.adafactor(1e-2, beta1=0.9),
    "adafactor, int8": memopt.adafactor(1e-2, beta1=0.9, momentum_dtype="int8"),
    "sm3": memopt.sm3(0.1),
    "sm3, bfloat16": memopt.sm3(0.1, momentum=0.9, momentum_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("container", CONTAINERS)
def test_states_are_the_parameters_tree(container, name):
    tx, params = MAPPED[name], jax.tree.map(jnp.asarray, CONTAINERS[container])
    state = tx.init(params)
    structure = jax.tree.structure(params)
    for tree in (state.v, state.m):
        if tree is not None:
            assert len(structure.flatten_up_to(tree)) == len(jax.tree.leaves(params))
    _, after = tx.update(jax.tree.map(jnp.cos, params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    owned = optax.tree_utils.tree_map_params(
        tx, lambda _: True, state, transform_non_params=lambda _: False
    )
    assert not owned.count
    assert all(jax.tree.leaves((owned.v, owned.m)))


def test_average_and_parameter_are_mapped_together():
    params = {"a": {"w": jnp.ones((4, 3))}, "b": jnp.full(3, 2.0)}
    tx = memopt.adafactor(beta1=0.9)
    state = optax.tree_utils.tree_map_params(
        tx, lambda x, p: jax.tree.map(lambda y: jnp.full_like(y, jnp.mean(p)), x), tx.init(params),
        params, is_leaf=lambda x: isinstance(x, memopt.Full),
    )  # fmt: skip
    for tree in (state.m, state.v):
        assert {float(jnp.mean(x)) for x in jax.tree.leaves(tree["a"])} == {1.0}
        assert {float(jnp.mean(x)) for x in jax.tree.leaves(tree["b"])} == {2.0}


@pytest.mark.parametrize(
    "axes",
    [
        {"w": ("in", "out"), "b": ("none",)},
        jt.roles.by_path({"w": ("in", "out"), "b": ("none",)}),
        lambda path, shape: None,
    ],
    ids=["tree", "rule", "function"],
)
def test_mapped_with_roles(axes):
    params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
    clip = jt.agc.adaptive_grad_clip(roles=axes, path_filter=jt.agc.exclude("b"))
    tx = optax.chain(clip, memopt.adafactor(roles=axes), memopt.sm3(0.1, roles=axes))
    state = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(params))
    assert all(np.all(x == 1) for x in jax.tree.leaves((state[1].v, state[2].v)))


@pytest.mark.parametrize("name", MAPPED)
def test_states_of_nnx_models(name):
    """By the parameters' paths, whether or not an nnx.Optimizer has made arrays of the Variables."""
    tx, model = (
        MAPPED[name],
        nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))),
    )
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)
    pure = tx.init(jax.tree.map(jnp.asarray, nnx.to_pure_dict(params)))
    shapes = lambda tree: {path: x.shape for path, x in _tree.leaves_with_paths(tree)}
    assert shapes(state) == shapes(pure)
    _, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    zeros = optax.tree_utils.tree_map_params(tx, lambda x: x * 0, after)
    assert not any(np.any(x) for x in jax.tree.leaves((zeros.v, zeros.m)))

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = shapes(nnx.state(optimizer))
    nnx.jit(lambda o, m: o.update(m, nnx.state(m, nnx.Param)))(optimizer, model)
    assert shapes(nnx.state(optimizer)) == before
    assert {path.removeprefix("opt_state/") for path in before} >= shapes(pure).keys()


# Momentum in eight bits


def test_int8_momentum_costs_1_03_bytes():
    shapes = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    plain = memopt.state_bytes(memopt.sm3(0.1), shapes)
    extra = memopt.state_bytes(memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8"), shapes) - plain
    assert extra / 2**20 == 1 + 2 / 64
    m = (
        memopt.adafactor(beta1=0.9, momentum_dtype=jnp.int8)
        .init({"w": jnp.ones((1024, 1024))})
        .m["w"]
    )
    assert (m.codes.dtype, m.scale.dtype) == (jnp.uint8, jnp.bfloat16)
    assert m.scale.shape == (16, 1024)


@pytest.mark.parametrize(
    ("shape", "roles", "scales"),
    [
        ((5,), None, (1,)),
        ((300,), None, (5,)),
        ((3, 3, 4, 8), None, (3, 3, 4, 1)),
        ((3, 3, 16, 1), None, (3, 3, 1, 1)),
        ((4, 2, 64), None, (4, 2, 1)),
        ((64, 256), ("batch", "none"), (64, 4)),
        ((16, 64), ("out", "batch"), (1, 64)),
        # Numbers one by one, and no numbers, are stored as they are.
        ((), None, None),
        ((1, 1), None, None),
        ((64,), ("batch",), None),
        ((0, 4), None, None),
    ],
)
def test_int8_blocks_of_any_shape(shape, roles, scales, ours):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    empty = _momentum.zeros(x, jnp.dtype("int8"), roles)
    m = _momentum.write(x, empty, _random_bits.of_step(jax.random.key(0), 0))
    chex.assert_trees_all_equal_shapes_and_dtypes(m, empty)
    if scales is None:
        assert m.dtype == jnp.float32
        step = 0.0
    else:
        assert (m.codes.shape, m.scale.shape) == (shape, scales)
        # Of two codes at the largest of a block, whose scale is rounded up to bfloat16.
        step = np.max(np.abs(x), initial=0) / 63 * (1 + 2**-7)
    np.testing.assert_allclose(_momentum.read(m, jnp.float32), x, rtol=0, atol=step)
    np.testing.assert_array_equal(_momentum.read(empty, jnp.float32), np.zeros(shape))


def test_int8_of_a_stack_is_that_of_its_layers(ours):
    """A layer's slice of the state reads as the layer, and layers share no scale."""
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8, 48)), jnp.float32)
    stack *= jnp.asarray(np.geomspace(1, 1e-8, 64), jnp.float32)[:, None, None]
    seed = _random_bits.of_step(jax.random.key(0), 0)
    m = _momentum.write(
        stack, _momentum.zeros(stack, jnp.dtype("int8"), ("batch", "in", "out")), seed
    )
    assert m.scale.shape == (64, 8, 1)
    whole = _momentum.read(m, jnp.float32)
    sliced = _momentum.read(jax.tree.map(lambda x: x[3], m), jnp.float32)
    np.testing.assert_array_equal(sliced, whole[3])
    empty = _momentum.zeros(stack[0], jnp.dtype("int8"))
    mapped = jax.vmap(lambda x: _momentum.write(x, empty, seed))(stack)
    np.testing.assert_array_equal(mapped.scale, m.scale)
    read = jax.vmap(lambda m: _momentum.read(m, jnp.float32))
    np.testing.assert_array_equal(read(m), whole)


def test_int8_rounding_is_unbiased(ours):
    x = jnp.asarray(np.random.default_rng(0).normal(size=128), jnp.float32)
    empty = _momentum.zeros(x, jnp.dtype("int8"))

    def once(step):
        seed = _random_bits.of_step(jax.random.key(1), step)
        return _momentum.read(_momentum.write(x, empty, seed), jnp.float32)

    n = 4000
    samples = jax.jit(jax.vmap(once))(jnp.arange(n))
    step = float(jnp.max(jnp.abs(x)) / 63)
    error = np.abs(np.mean(samples, 0) - x)
    # Five standard deviations, of half a step at most, which is sqrt(share) of the largest one.
    share = np.abs(x) / jnp.max(jnp.abs(x)) + 1 / 126
    assert np.all(error < 5 * 0.5 * 1.1 * step * np.sqrt(share) / np.sqrt(n) + 1e-6)


def test_int8_momentum_inside_low_bit_stays_as_it_is(ours):
    inner = memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8")
    tx, params = memopt.low_bit(inner, min_size=1), {"w": arrays()["w"], "s": jnp.ones([])}
    update, state, alone = jax.jit(tx.update), tx.init(params), inner.init(params)
    for _ in range(2):
        updates, state = update(params, state, params)
        expected, alone = jax.jit(inner.update)(params, alone, params)
    chex.assert_trees_all_equal(state.inner.m["w"], alone.m["w"])
    chex.assert_trees_all_equal(updates, expected)


@pytest.mark.parametrize("make", [memopt.sm3, memopt.adafactor])
def test_int8_momentum_follows_float32_and_repeats_itself(make, ours):
    name = "momentum" if make is memopt.sm3 else "beta1"
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 256)), jnp.float32), "b": jnp.ones(40)}
    noise = [
        {n: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for n, p in params.items()}
        for _ in range(200)
    ]

    def descend(dtype):
        tx = make(1e-2, **{name: 0.9}, momentum_dtype=dtype)

        @jax.jit
        def step(p, state, z):
            grads = jax.tree.map(lambda x, e: x + 0.1 * e, p, z)
            updates, state = tx.update(grads, state, p)
            return jax.tree.map(jnp.add, p, updates), state

        p, state = params, tx.init(params)
        for z in noise:
            p, state = step(p, state, z)
        return p, state

    (exact, _), (rough, state), (again, state_again) = (
        descend(None),
        descend("int8"),
        descend("int8"),
    )
    chex.assert_trees_all_equal((rough, state), (again, state_again))
    assert state.m["w"].codes.dtype == jnp.uint8
    for n in params:
        moved = np.sqrt(np.mean(np.square(exact[n] - params[n])))
        assert np.sqrt(np.mean(np.square(rough[n] - exact[n]))) < 0.02 * moved


def test_int8_seeds_are_of_step_and_path(ours):
    m = {n: _momentum.zeros(jnp.ones(8), jnp.dtype("int8")) for n in ("a", "b")}
    data = lambda count, table: {
        n: seed.tolist() for n, seed in _momentum.seeds(table, count).items()
    }
    first = data(3, m)
    assert first["a"] != first["b"]
    assert data(4, m)["a"] != first["a"]
    assert data(3, {"a": m["a"]})["a"] == first["a"]  # what else there is does not matter
    assert _momentum.seeds({"a": jnp.ones(3)}, 0) == {}


def test_int8_in_an_nnx_optimizer():
    model = nnx.Linear(128, 6, rngs=nnx.Rngs(0))
    tx = memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8", roles=jt.nnx.roles(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(jnp.square(m(jnp.ones((4, 128))))))(model)
        optimizer.update(model, grads)

    before = float(jnp.mean(jnp.square(model(jnp.ones((4, 128))))))
    for _ in range(20):
        step(model, optimizer)
    assert float(jnp.mean(jnp.square(model(jnp.ones((4, 128)))))) < 0.5 * before


def test_int8_state_of_host_arrays(ours):
    """What a checkpoint gives back; without jit."""
    tx = memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8")
    params = {"w": jnp.linspace(-1, 1, 300).reshape(2, 150)}
    _, state = tx.update(params, tx.init(params), params)
    expected, _ = tx.update(params, state, params)
    updates, _ = tx.update(params, jax.tree.map(np.asarray, state), params)
    np.testing.assert_array_equal(updates["w"], expected["w"])


def test_the_advice_is_computed_from_the_leaf_and_its_roles():
    """By rank the axes decide; by roles only the size can; what no size factors gets no advice."""

    def notes(shape, **kwargs):
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        return memopt.state_table(memopt.adafactor(**kwargs), params).notes[:-1]

    (by_rank,) = notes((1024, 16, 64))
    assert by_rank.endswith("where 8.0 KiB would do: pass roles=, or lower min_dim_size_to_factor")
    for shape, kwargs in (
        ((8, 32), {}),
        ((8, 32), {"roles": {"w": ("in", "out")}}),
        ((64, 4, 16), {"roles": {"w": ("in", "out", "out")}}),
        ((12, 64, 64), {"roles": {"w": ("batch", "in", "out")}}),
    ):
        (note,) = notes(shape, **kwargs)
        assert note.endswith("would do: lower min_dim_size_to_factor") and "roles" not in note
    assert not notes((12, 256), roles={"w": ("batch", "none")})
    assert not notes((4, 64), roles={"w": ("none", "none")}, min_dim_size_to_factor=4)
    assert not notes((64, 64), factored=False)
