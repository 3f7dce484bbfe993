"""The sharded decoder of the scale table: one device's numbers on eight."""

import jax
import jaxtricks as jt
import numpy as np
import pytest
from benchmarks import scale_model as model
from jax.sharding import Mesh

SIZE = model.Size(layers=2, width=32, hidden=64, heads=4, length=16, vocabulary=64)


def trained(devices, recompute, policy="p=f32,c=f32,o=f32", steps=3):
    """(losses, last parameters) of some steps on a mesh of so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (model.AXIS,))
    tx = jt.memopt.adafactor(1e-2, roles=model.ROLES, min_dim_size_to_factor=8)
    params = model.draw(SIZE)
    tokens = jax.random.randint(jax.random.key(1), (8, SIZE.length + 1), 0, SIZE.vocabulary)
    fn = jt.amp.autocast(model.loss(SIZE, mesh, recompute), policy, scan_carry="auto")
    step, state, losses = model.jitted(tx, params, mesh)(fn), tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, tokens)
        losses.append(float(value))
    return losses, params


@pytest.mark.devices
@pytest.mark.slow
def test_eight_devices_train_as_one_and_hold_an_eighth():
    one, _ = trained(1, lambda layer: layer)
    eight, params = trained(8, jt.remat.recompute_grad)
    assert one[0] > one[1] > one[2]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for x in jax.tree.leaves(params):
        assert x.addressable_shards[0].data.size * 8 == x.size


@pytest.mark.devices
@pytest.mark.slow
def test_autocast_of_the_sharded_step_is_close():
    low, _ = trained(8, jt.remat.recompute_grad, "p=f32,c=bf16,o=f32", steps=2)
    full, _ = trained(8, jt.remat.recompute_grad, steps=2)
    assert low != full
    np.testing.assert_allclose(low, full, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adafactor", "sm3"])
def test_roles_are_exact_so_that_the_state_is_sides_only(optimizer):
    size = SIZE._replace(width=256, hidden=512, vocabulary=512)
    made = getattr(jt.memopt, optimizer)(1e-3, roles=model.ROLES)
    params = model.shapes(size)
    assert jt.memopt.state_bytes(made, params) < 0.02 * jt._tree.nbytes(params)
