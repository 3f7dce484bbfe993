"""What a softmax loss compiles to: as much memory as optax's cross entropy, and no more traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmarks import longtail_losses as bench
from jaxtricks import _compat, longtail

pytestmark = pytest.mark.stock

N, C = 512, 500
COUNTS = np.linspace(900, 4, C)
LOSSES = {
    "cross_entropy": longtail.cross_entropy(),
    "balanced_softmax": longtail.balanced_softmax(COUNTS),
    "logit_adjusted": longtail.logit_adjusted(COUNTS),
    "vs": longtail.vs(COUNTS),
    "ldam": longtail.softmax_loss(longtail.margin(COUNTS**-0.25), longtail.scale(30.0)),
    "focal": longtail.focal(1.0),
    "class_balanced": longtail.class_balanced(COUNTS),
}


def cost(loss):
    logits, labels = jnp.zeros((N, C)), jnp.zeros(N, jnp.int32)
    program = bench.compiled(loss, logits, labels)
    return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize("name", LOSSES)
def test_no_array_of_the_logits_size_and_no_more_traffic_than_cross_entropy(name):
    temp, accessed = cost(LOSSES[name])
    plain_temp, plain_accessed = cost(optax.softmax_cross_entropy_with_integer_labels)
    assert temp <= plain_temp + 4 * 16 * N  # vectors of a number per example
    # A temperature of each class is read with the logits; older compilers do that apart.
    assert accessed <= (1.4 if name == "vs" else 1.15) * plain_accessed


def test_bounds_that_are_far_apart_do_not_overflow():
    """Where the prior or the temperature says more than float32 holds, the maximum is looked for."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)) * 200, jnp.float32)
    y = jnp.asarray([0, 1, 2, 3, 0, 1])
    counts = np.array([1e6, 1, 1e6, 0.0])
    for loss in (
        longtail.logit_adjusted(counts, tau=20.0),
        longtail.vs(counts, gamma=2.0, tau=10.0),
        longtail.softmax_loss(longtail.scale(50.0), longtail.add_log_prior(counts, 30.0)),
    ):
        value, grad = value_and_grad(loss, z, y)
        with _compat.enable_x64():
            exact, slope = value_and_grad(loss, np.asarray(z, np.float64), y)
            np.testing.assert_allclose(value, exact, rtol=1e-5)
            np.testing.assert_allclose(grad, slope, rtol=2e-4, atol=1e-6)


def value_and_grad(loss, z, y):
    return jax.value_and_grad(lambda z: loss(z, y).sum())(z)


def test_second_derivatives_and_forward_mode_agree():
    z, y = jnp.linspace(-2, 3, 5)[None], jnp.array([1])
    loss = lambda tau, z: longtail.logit_adjusted(COUNTS[:5], tau)(z, y).sum()
    np.testing.assert_allclose(
        jax.jacfwd(loss, 1)(1.3, z), jax.jacrev(loss, 1)(1.3, z), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        jax.hessian(loss, 1)(1.3, z).reshape(5, 5),
        jax.hessian(loss, 1)(1.3, z).reshape(5, 5).T,
        rtol=1e-4,
        atol=1e-6,
    )
    p = jax.nn.softmax(z + 1.3 * jnp.log(COUNTS[:5] / COUNTS[:5].sum())[None])[0]
    np.testing.assert_allclose(
        jax.hessian(loss, 1)(1.3, z).reshape(5, 5), jnp.diag(p) - p[:, None] * p[None], atol=2e-6
    )
