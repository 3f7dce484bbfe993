"""A stack of layers that is updated in its backward pass: the ordinary step, in fewer bytes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _compat, memopt
from jaxtricks.remat import _recompute

LAYERS, WIDTH, BATCH = 4, 6, 5


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"] + w["bias"][None]


def stacked(seed=0, layers=LAYERS, width=WIDTH):
    rng = np.random.default_rng(seed)
    shapes = {"up": (width, 4 * width), "down": (4 * width, width), "bias": (width,)}
    scale = width**-0.5
    return {n: jnp.asarray(scale * rng.normal(size=(layers, *s))) for n, s in shapes.items()}


def head_loss(w, y):
    return jnp.mean((y @ w) ** 2)


def ordinary(layer, tx, params, state, x, xs=None):
    """Loss, gradients of head and input, and the layers after the optimizer's step."""

    def loss(head, layers, x):
        body = lambda x, w: (layer(*w[:1], x, *w[1:]), None)
        return head_loss(head, jax.lax.scan(body, x, (layers,) if xs is None else (layers, xs))[0])

    value, grads = jax.value_and_grad(loss, (0, 1, 2))(params["head"], params["layers"], x)
    updates, state = jax.vmap(tx.update)(grads[1], state, params["layers"])
    layers = optax.apply_updates(params["layers"], updates)
    return value, grads[0], grads[2], layers, state


def released(layer, tx, params, state, x, xs=None):
    y, update = memopt.release_gradients(layer, tx, params["layers"], state, x, xs)
    value, vjp = jax.vjp(head_loss, params["head"], y)
    head, dy = vjp(jnp.ones_like(value))
    dx, layers, state = update(dy)
    return value, head, dx, layers, state


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adamw": optax.adamw(1e-2),
    "clipped per layer": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "adafactor": memopt.adafactor(1e-2, min_dim_size_to_factor=4),
    "sm3": memopt.sm3(0.1, momentum=0.9),
    "inject": optax.inject_hyperparams(optax.adam)(1e-2),
}


def assert_close(found, expected, rtol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.max(np.abs(y)), 1e-30))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_ordinary_step(name, x64):
    tx, x = OPTIMIZERS[name], jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, WIDTH)))
    params = {"head": jnp.linspace(-1.0, 1, WIDTH), "layers": stacked()}
    states = [jax.vmap(tx.init)(params["layers"])] * 2
    steps = [jax.jit(step, static_argnums=(0, 1)) for step in (released, ordinary)]
    trees = [params] * 2
    for _ in range(3):
        found, expected = (
            step(layer, tx, p, s, x) for step, p, s in zip(steps, trees, states, strict=True)
        )
        assert_close(found, expected)
        trees = [{"head": params["head"], "layers": out[3]} for out in (found, expected)]
        states = [found[4], expected[4]]
    assert float(jnp.max(jnp.abs(trees[0]["layers"]["up"] - params["layers"]["up"]))) > 1e-3


def test_other_inputs_of_each_layer(x64):
    def dropped(w, x, key):
        return layer(w, x) * jax.random.bernoulli(key, 0.8, x.shape)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, WIDTH)))
    params = {"head": jnp.linspace(-1.0, 1, WIDTH), "layers": stacked()}
    keys, tx = jax.random.split(jax.random.key(0), LAYERS), optax.adam(1e-2)
    state = jax.vmap(tx.init)(params["layers"])
    assert_close(*(f(dropped, tx, params, state, x, keys) for f in (released, ordinary)))


def test_trees_flow_through_the_stack(x64):
    """As of a mixture of experts: activations, and a loss that grows from layer to layer."""

    def with_loss(w, carry):
        x, loss = carry
        return layer(w, x), loss + jnp.sum(w["bias"] ** 2)

    x, tx, layers = jnp.ones((BATCH, WIDTH)), optax.sgd(0.1), stacked()
    state = jax.vmap(tx.init)(layers)
    (y, loss), update = memopt.release_gradients(with_loss, tx, layers, state, (x, 0.0))
    _, new, _ = update((jnp.zeros_like(y), jnp.ones_like(loss)))
    np.testing.assert_allclose(new["bias"], 0.8 * layers["bias"], rtol=1e-12)
    np.testing.assert_array_equal(new["up"], layers["up"])


def bytes_of(step, layers, width, batch):
    tx = optax.adamw(1e-3)
    params = jax.eval_shape(lambda: {"head": jnp.ones(width), "layers": stacked(0, layers, width)})
    state = jax.eval_shape(jax.vmap(tx.init), params["layers"])
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    run = jax.jit(lambda *args: step(layer, tx, *args), donate_argnums=(0, 1))
    return run.lower(params, state, x).compile().memory_analysis()


@pytest.mark.stock
@pytest.mark.skipif(
    not _recompute.barriers_hold(), reason="XLA for CPU before jaxlib 0.11.2 deletes barriers"
)
def test_the_gradients_of_one_layer_are_alive():
    """8 layers of 2 MiB: their gradients are 16 MiB, their parameters and state 48."""
    usual, ours = (bytes_of(step, 8, 256, 32) for step in (ordinary, released))
    assert ours.alias_size_in_bytes == usual.alias_size_in_bytes  # params and state, in place
    assert usual.temp_size_in_bytes > 16 * 2**20
    assert ours.temp_size_in_bytes < 0.4 * usual.temp_size_in_bytes
    deeper = bytes_of(released, 16, 256, 32)
    # Only the inputs of the layers grow with their number: 32 KiB each.
    assert deeper.temp_size_in_bytes - ours.temp_size_in_bytes < 8 * 2**16


@pytest.mark.skipif(not _compat.has_host_memory(), reason="needs host memory")
def test_with_the_state_on_the_host():
    inner = optax.adam(1e-2)
    tx = memopt.host_offload(inner, min_bytes=256)
    x = jnp.ones((BATCH, WIDTH))
    params = {"head": jnp.linspace(-1.0, 1, WIDTH), "layers": stacked()}
    state = jax.vmap(tx.init)(params["layers"])
    run = jax.jit(lambda *args: released(layer, tx, *args))
    *found, state = run(params, state, x)
    *expected, _ = released(layer, inner, params, jax.vmap(inner.init)(params["layers"]), x)
    assert_close(found, expected, 1e-6)
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, state[0].mu)
    assert kinds == {"up": "pinned_host", "down": "pinned_host", "bias": "device"}


def elementwise(w, x):
    """Without products, whose results Explicit axes would have us place."""
    return x * jnp.mean(w["up"] ** 2) + w["bias"][None] - jnp.mean(w["down"])


@pytest.mark.devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_layers_sharded_over_a_mesh(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"up": P(None, None, "model"), "down": P(None, "model", None), "bias": P()}
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    layers, tx = {n: place(x, specs[n]) for n, x in stacked(width=8).items()}, optax.adam(1e-2)

    def step(layers, state, x):
        y, update = memopt.release_gradients(elementwise, tx, layers, state, x)
        return update(y)

    x = place(np.ones((8, 8), np.float32), P("data"))
    with jax.set_mesh(mesh):
        _, new, _ = jax.jit(step)(layers, jax.vmap(tx.init)(layers), x)
    plain = stacked(width=8)
    _, expected, _ = step(plain, jax.vmap(tx.init)(plain), np.ones((8, 8), np.float32))
    for n in specs:
        assert new[n].sharding.is_equivalent_to(layers[n].sharding, new[n].ndim)
        np.testing.assert_allclose(new[n], expected[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state": optax.adam(0.1).init(stacked())},
            r"`params` at 'bias' has 4, `state` at .* no a",
        ),
        ({"xs": jnp.ones(3)}, r"`xs` has 3\): stack `params`"),
        ({"params": {}, "state": ()}, "there are no arrays"),
    ],
    ids=["state", "xs", "nothing"],
)
def test_arrays_without_a_common_axis_are_refused(change, message):
    arguments = {"params": stacked(), "state": jax.vmap(optax.adam(0.1).init)(stacked())} | change
    with pytest.raises(ValueError, match=message):
        memopt.release_gradients(layer, optax.adam(0.1), x=jnp.ones((5, 6)), **arguments)


# Layers of flax


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


def test_layers_of_nnx():
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def blocks(rngs):
        return Block(rngs)

    graph, params = nnx.split(blocks(nnx.Rngs(0)), nnx.Param)
    block = lambda w, x: nnx.merge(graph, w)(x)
    check_flax(block, nnx.to_pure_dict(params))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(WIDTH)(x)), None


def test_layers_of_linen():
    stack = nn.scan(
        LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
    )()
    params = stack.init(jax.random.key(0), jnp.ones((BATCH, WIDTH)))["params"]
    check_flax(lambda w, x: LinenBlock().apply({"params": w}, x)[0], params)


def check_flax(block, layers):
    tx, params = optax.adam(1e-2), {"head": jnp.ones(WIDTH), "layers": layers}
    state, x = jax.vmap(tx.init)(layers), jnp.ones((BATCH, WIDTH))
    found, expected = (
        jax.jit(step, static_argnums=(0, 1))(block, tx, params, state, x)
        for step in (released, ordinary)
    )
    assert_close(found, expected, 1e-5)
