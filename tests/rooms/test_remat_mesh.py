"""Plans of losses on a mesh: bodies of shard_map are opened, and collectives run as often as they may."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxtricks import _jaxpr, remat
from jaxtricks.remat import _costs, _stages

pytestmark = [pytest.mark.devices, pytest.mark.stock]

WIDTH, LAYERS, ROWS = 32, 8, 1024
AXIS = "data"
AXES = jax.sharding.AxisType


def on_mesh(kind=AXES.Auto):
    return jax.make_mesh((8,), (AXIS,), axis_types=(kind,))


def layers(weights, x, gather=lambda w: w):
    for up, down in weights:
        x = x + jnp.tanh(jax.nn.gelu(x @ gather(up)) @ gather(down))
    return x


def arrays(mesh, weights, batch):
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS)
    pairs = [
        (
            0.2 * jax.random.normal(keys[2 * i], (WIDTH, 4 * WIDTH)),
            0.2 * jax.random.normal(keys[2 * i + 1], (4 * WIDTH, WIDTH)),
        )
        for i in range(LAYERS)
    ]
    x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    return jax.device_put(pairs, NamedSharding(mesh, weights)), jax.device_put(
        x, NamedSharding(mesh, batch)
    )


def split_data(mesh):
    def local(weights, x):
        return jax.lax.pmean((layers(weights, x) ** 2).mean(), AXIS)

    specs = PartitionSpec(), PartitionSpec(AXIS)
    loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    return loss, arrays(mesh, *specs)


def split_weights(mesh):
    """Fully sharded: each layer gathers its weights."""
    gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)

    def local(weights, x):
        return jax.lax.pmean((layers(weights, x, gather) ** 2).mean(), AXIS)

    specs = PartitionSpec(AXIS), PartitionSpec(AXIS)
    loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    return loss, arrays(mesh, *specs)


def count(fn, args, names):
    program = _jaxpr.inline(jax.make_jaxpr(jax.grad(fn))(*args)).jaxpr
    walked = map(_jaxpr.primitive, _jaxpr.walk(_jaxpr.prune(program)))
    return sum(name in names for name in walked)


def same_gradients(plan, loss, args):
    planned, plain = (jax.jit(jax.grad(f))(*args) for f in (plan.fn, loss))
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("make", [split_data, split_weights])
def test_the_body_of_a_shard_map_is_planned(make):
    loss, args = make(on_mesh())
    plan = remat.plan(loss, *args, budget_bytes=0.5, wrt="temp")
    assert plan.peak <= plan.baseline / 2
    report = remat.memory_analysis(jax.value_and_grad(plan.fn), *args)
    assert abs(report.temp - plan.peak) <= max(64, 1e-3 * plan.peak)
    same_gradients(plan, loss, args)
    again = remat.plan_from_json(plan.to_json(), loss)
    assert remat.memory_analysis(jax.value_and_grad(again.fn), *args).temp == report.temp


def test_gathers_of_weights_run_again_and_nothing_else():
    loss, args = split_weights(on_mesh())
    plan = remat.plan(loss, *args, budget_bytes=0.4, wrt="temp")
    assert count(plan.fn, args, _costs.GATHERS) > count(loss, args, _costs.GATHERS)
    others = _costs.COLLECTIVES - _costs.GATHERS
    assert count(plan.fn, args, others) == count(loss, args, others)


def test_gathers_across_hosts_run_once(monkeypatch):
    monkeypatch.setattr(_jaxpr, "remote_axes", lambda eqn: frozenset({AXIS}))
    loss, args = split_weights(on_mesh())
    plan = remat.plan(loss, *args, budget_bytes=0.9, wrt="temp")
    assert count(plan.fn, args, _costs.GATHERS) == count(loss, args, _costs.GATHERS)
    same_gradients(plan, loss, args)


class Chip:
    def __init__(self, host):
        self.process_index = host


def test_axes_that_span_hosts():
    devices = np.array([[Chip(0), Chip(0)], [Chip(1), Chip(1)]])

    class Mesh:
        axis_names = ("replica", "data")

    mesh = Mesh()
    mesh.devices = devices
    assert _jaxpr.axes_between_hosts(mesh) == {"replica"}
    mesh.devices = None
    assert _jaxpr.axes_between_hosts(mesh) == frozenset()


def test_a_gather_is_no_stage_of_its_own():
    loss, args = split_weights(on_mesh())
    program = _jaxpr.straight(jax.make_jaxpr(loss)(*args)).jaxpr
    index, body = _stages.main_body(program)
    assert _jaxpr.primitive(program.eqns[index]) == "shard_map"
    local, remote = (_stages.cut(body.jaxpr, remote_axes=axes) for axes in (frozenset(), {AXIS}))
    assert len(local) < len(remote)


@pytest.mark.parametrize("kind", [AXES.Auto, AXES.Explicit])
def test_whole_steps_without_shard_map(kind):
    """The compiler, or the types, place the loss; the user's donated step is measured."""
    mesh = on_mesh(kind)
    with jax.set_mesh(mesh):
        args = arrays(mesh, PartitionSpec(), PartitionSpec(AXIS))
        tx = optax.adamw(1e-3)

        def loss(weights, x):
            return (layers(weights, x) ** 2).mean()

        def within(loss):
            def step(weights, state, x):
                grads = jax.grad(loss)(weights, x)
                updates, state = tx.update(grads, state, weights)
                return optax.apply_updates(weights, updates), state

            state = jax.jit(tx.init)(args[0])
            return jax.jit(step, donate_argnums=(0, 1)), (args[0], state, args[1])

        plan = remat.plan(loss, *args, budget_bytes=0.6, wrt="temp", within=within)
        assert plan.peak <= 0.6 * plan.baseline
        # A device's share, not the bytes of all of them.
        whole = sum(x.nbytes for x in jax.tree.leaves(args[1]))
        assert plan.baseline < 8 * LAYERS * whole
        same_gradients(plan, loss, args)
