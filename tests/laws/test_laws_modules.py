"""What every nnx module of this library must do, over all of registry.MODULES."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jaxtricks import _tree

from tests import registry

pytestmark = pytest.mark.parametrize("name", sorted(registry.MODULES))


@functools.cache
def inputs():
    return 1.0 + 2.0 * jax.random.normal(jax.random.key(1), (6, 8, 8, 4))


@functools.cache
def made(name):
    model = registry.MODULES[name](nnx.Rngs(0))
    apply, params, state = jt.nnx.functional(model)
    return model, apply, params, state


@functools.cache
def jitted(name):
    return jax.jit(made(name)[1], static_argnames="train")


def equal(a, b, tol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


def test_functional_is_the_module(name):
    """Training and evaluation, jitted against eager, and the module given in is left alone."""
    model, _, params, state = made(name)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    eager = registry.MODULES[name](nnx.Rngs(0))
    for train in (True, False):
        (eager.train if train else eager.eval)()
        y, state = jitted(name)(params, state, inputs(), train=train)
        equal(y, eager(inputs()))
        equal(state, nnx.to_pure_dict(nnx.state(eager, nnx.Not(nnx.Param))))
    equal(before, nnx.to_pure_dict(nnx.state(model)), 0)


def test_training_moves_statistics_and_evaluation_does_not(name):
    _, _, params, state = made(name)
    _, trained = jitted(name)(params, state, inputs(), train=True)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(trained), strict=True):
        assert np.any(old != new) and old.dtype == new.dtype == jnp.float32
    _, same = jitted(name)(params, trained, inputs(), train=False)
    equal(same, trained, 0)


def test_roles_of_every_parameter(name):
    model, _, params, _ = made(name)
    rule = jt.nnx.roles(model)
    stacked = jax.tree.map(lambda p: jnp.stack([p, p, p]), params)
    for path, leaf in _tree.leaves_with_paths(params):
        roles = rule(path, leaf.shape)
        assert roles is not None and len(roles) == leaf.ndim
        assert (roles[-1] == "out") == jt.roles.is_kernel(path, leaf.shape)
    for path, leaf in _tree.leaves_with_paths(stacked):
        assert rule(path, leaf.shape)[0] == "batch"
    paths = [path for path, _ in _tree.leaves_with_paths(nnx.state(model, nnx.Param))]
    assert paths == [path for path, _ in _tree.leaves_with_paths(params)]


def flax_dtype(dtype):
    """What flax's own BatchNorm makes of it: newer ones count float32 running statistics as parameters."""
    norm = nnx.BatchNorm(4, param_dtype=dtype, rngs=nnx.Rngs(0))
    return norm(jnp.ones((2, 4), dtype)).dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_dtype_is_that_of_input_and_parameters(name, dtype):
    _, apply, params, state = made(name)
    low = jax.tree.map(lambda p: p.astype(dtype), params)
    x = inputs().astype(dtype)
    run = functools.partial(jax.eval_shape, functools.partial(apply, train=True))
    lowest = flax_dtype(dtype) if name == "nnx.ACBlock" else jnp.dtype(dtype)
    for p, expected in ((params, jnp.dtype(jnp.float32)), (low, lowest)):
        y, new = run(p, state, x)
        assert y.dtype == expected
        assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(new))
    y, _ = jitted(name)(low, state, x, train=True)
    wide, _ = jitted(name)(params, state, inputs(), train=True)
    assert (
        np.abs(np.float32(y) - wide).max()
        < (0.2 if dtype == "bfloat16" else 0.03) * np.abs(wide).max()
    )


def test_strict_promotion(name, ours):
    _, apply, params, state = made(name)
    if name in ("nnx.ACBlock", "nnx.DiverseBranchBlock, depthwise"):
        pytest.skip("its branches have flax's Conv or BatchNorm, which need implicit promotion")
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    jax.eval_shape(functools.partial(apply, train=True), low, state, inputs())


def test_gradients_under_remat_vmap_and_scan(name):
    _, apply, params, state = made(name)

    def loss(params, state, x, wrap=lambda f: f):
        y, new = wrap(functools.partial(apply, train=True))(params, state, x)
        return jnp.mean(jnp.sin(y)), new

    grad = jax.grad(loss, has_aux=True)

    @jax.jit
    def all_ways(params, state, x):
        plain = grad(params, state, x)
        remat = jax.grad(functools.partial(loss, wrap=jax.checkpoint), has_aux=True)(
            params, state, x
        )
        stack = jax.tree.map(lambda a: jnp.stack([a, a]), (params, state))
        vmapped = jax.vmap(grad, in_axes=(0, 0, None))(*stack, x)
        final, _ = jax.lax.scan(
            lambda s, x: (grad(params, s, x)[1], None), state, jnp.stack([x, x])
        )
        return plain, remat, jax.tree.map(lambda a: a[1], vmapped), final

    plain, remat, vmapped, final = all_ways(params, state, inputs())
    equal(plain, remat)
    equal(plain, vmapped, 1e-5)
    twice = jitted(name)(params, plain[1], inputs(), train=True)[1]
    equal(final, twice, 1e-5)
    assert all(np.abs(g).max() > 0 for path, g in _tree.leaves_with_paths(plain[0]))
