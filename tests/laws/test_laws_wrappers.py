"""Laws of everything that wraps a function and promises the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import registry

every_wrapper = pytest.mark.parametrize("name", sorted(registry.WRAPPERS))
W = jnp.linspace(-1, 1, 12).reshape(3, 4)
X = jnp.linspace(0, 1, 6).reshape(2, 3)


def model(params, x, *, power, label=None):
    """A pytree in, a pytree out, a static and an optional argument."""
    assert isinstance(power, int)
    h = jnp.tanh(x @ params["w"]) ** power
    return {"h": h, "sum": h.sum()} if label is None else {"h": h + label, "sum": h.sum()}


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b)


@every_wrapper
def test_same_values_and_gradients_eager_and_jitted(name, ours):
    wrapped = registry.WRAPPERS[name](model)
    assert wrapped.__name__ == "model"

    def loss(fn):
        return lambda p, x: fn(p, x, power=3)["sum"]

    expected = jax.value_and_grad(loss(model), (0, 1))({"w": W}, X)
    close(jax.value_and_grad(loss(wrapped), (0, 1))({"w": W}, X), expected)
    close(jax.jit(jax.value_and_grad(loss(wrapped), (0, 1)))({"w": W}, X), expected)
    close(wrapped({"w": W}, X, power=2, label=None), model({"w": W}, X, power=2))


@every_wrapper
def test_under_vmap_and_scan(name, ours):
    wrapped = registry.WRAPPERS[name](model)
    grad = lambda fn: jax.grad(lambda p, x: fn(p, x, power=2)["sum"])
    batched = lambda fn: jax.vmap(grad(fn), (None, 0))({"w": W}, jnp.stack([X, -X]))
    close(batched(wrapped), batched(model))

    def scanned(fn):
        def body(c, x):
            return c + fn({"w": W}, x, power=1)["sum"], None

        return jax.grad(lambda xs: jax.lax.scan(body, jnp.float32(0), xs)[0])(jnp.stack([X, -X]))

    close(scanned(wrapped), scanned(model))


@every_wrapper
def test_gradients_reach_what_the_function_closes_over(name, ours):
    wrap = registry.WRAPPERS[name]

    def loss(wrap):
        def run(w):
            return wrap(lambda x: jnp.sin(x @ w) @ w.T)(X).sum()

        return jax.jit(jax.grad(run))(W)

    close(loss(wrap), loss(lambda f: f))
