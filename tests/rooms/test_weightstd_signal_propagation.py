"""weightstd, networks without normalization: gains, scales of residual blocks, stochastic depth."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import weightstd as ws

# DeepMind's table (nfnets/base.py), made by sampling: 1e-3 is its accuracy.
TABLE = {
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_gains_are_those_of_the_table(ours, name):
    gain = ws.scaled_activation(getattr(jax.nn, name)).gain
    assert gain == pytest.approx(TABLE[name], rel=1e-3)


def moments_above(a):
    """E and E of the square of max(z - a, 0), in closed form."""
    density, beyond = (
        math.exp(-a * a / 2) / math.sqrt(2 * math.pi),
        math.erfc(a / math.sqrt(2)) / 2,
    )
    return density - a * beyond, (1 + a * a) * beyond - a * density


@pytest.mark.parametrize("kink", [0.0, 1 / 3, -1.2345, 3.0])
def test_gains_are_exact_at_kinks(ours, kink):
    first, second = moments_above(kink)
    gain = ws.scaled_activation(lambda z: jnp.maximum(z - kink, 0)).gain
    assert gain == pytest.approx(1 / math.sqrt(second - first**2), rel=1e-6)


def test_gains_in_closed_form(ours):
    exact = {
        jax.nn.relu: math.sqrt(2 / (1 - 1 / math.pi)),
        jnp.sign: 1.0,
        jnp.sin: 1 / math.sqrt((1 - math.exp(-2)) / 2),
        jnp.square: 1 / math.sqrt(2),
        jnp.exp: 1 / math.sqrt(math.exp(2) - math.exp(1)),
    }
    for fn, gain in exact.items():
        assert ws.scaled_activation(fn).gain == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scaled_activation_keeps_the_dtype_in_every_transform(ours, dtype):
    x = jnp.asarray([-1.0, 0.5, 2.0], dtype)
    relu = ws.scaled_activation(jax.nn.relu)
    expected = np.float32([0, 0.5, 2]) * np.float32(jnp.asarray(relu.gain, dtype))
    for fn in (relu, jax.jit(relu), jax.vmap(relu)):
        y = fn(x)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.float32(y), expected, rtol=1e-2 if dtype != "float32" else 0)
    slope = jax.jit(jax.vmap(jax.grad(relu)))(x)
    assert slope.dtype == dtype
    np.testing.assert_allclose(np.float32(slope), np.float32([0, 1, 1]) * 1.71285855, rtol=2e-3)


def test_scaled_activation_is_made_anywhere_and_equal_to_its_twin(ours):
    inside = jax.jit(lambda x: ws.scaled_activation(jnp.tanh)(x))(jnp.ones(3))
    np.testing.assert_allclose(inside, ws.scaled_activation(jnp.tanh)(jnp.ones(3)), rtol=1e-6)
    twins = ws.scaled_activation(jnp.tanh), ws.scaled_activation(jnp.tanh)
    assert twins[0] == twins[1] and hash(twins[0]) == hash(twins[1])


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (jnp.ones_like, "variance .* is 0"),
        (jnp.log, "is nan"),
        (jnp.sum, "elementwise"),
        (lambda x: x[::2], "elementwise"),
    ],
)
def test_what_is_no_activation_says_so(fn, words):
    with pytest.raises(ValueError, match=words):
        ws.scaled_activation(fn)


# ---- residual scales


def test_residual_scales_are_deepminds():
    """The betas of NF-ResNet-50 and of NFNet-F0 as their constructors make them."""
    grow = [1.0, 0.98058068, 0.96225045, 0.94491118, 0.92847669, 0.91287093, 0.89802651]
    resnet = [grow[:3], [grow[3], *grow[1:4]], [grow[4], *grow[1:6]], [grow[6], *grow[1:3]]]
    f0 = [grow[:1], grow[1:2] * 2, [grow[2], *grow[1:6]], [grow[6], *grow[1:3]]]
    for depths, betas in (((3, 4, 6, 3), resnet), ((1, 2, 6, 3), f0)):
        scales = ws.residual_scales(depths)
        assert tuple(map(len, scales)) == depths
        for stage, expected in zip(scales, betas, strict=True):
            assert {scale.alpha for scale in stage} == {0.2}
            np.testing.assert_allclose([scale.beta for scale in stage], expected, rtol=1e-7)


def test_residual_scales_at_the_edges():
    assert ws.residual_scales(()) == [] and ws.residual_scales((0, 1))[0] == ()
    assert {s.beta for stage in ws.residual_scales((3, 3), alpha=0.0) for s in stage} == {1.0}
    with pytest.raises(ValueError, match="depths"):
        ws.residual_scales((2, -1))


def standardized_layers(key, depth, width, dtype=jnp.float32):
    kernels = jax.random.normal(key, (depth, width, width), dtype) + 0.5
    return jax.vmap(ws.standardize)(kernels)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_variance_survives_a_plain_deep_network(ours, name):
    """Forty layers: with the gain the variance stays, without it is gone (or what tanh leaves of it)."""
    layers = standardized_layers(jax.random.key(0), 40, 64)
    x = jax.random.normal(jax.random.key(1), (256, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def variances(act, x):
        return jax.lax.scan(lambda x, w: ((y := act(x) @ w), jnp.var(y)), x, layers)[1]

    fn = getattr(jax.nn, name)
    scaled = variances(ws.scaled_activation(fn), x)
    assert scaled.min() > 0.5 and scaled.max() < 2
    assert variances(fn, x)[-1] < 0.05


def test_residual_variance_follows_the_recursion(ours):
    """Two stages of four blocks whose branches are all on: the variance is what beta expects."""
    act = ws.scaled_activation(jax.nn.relu)
    stages = ws.residual_scales((4, 4), alpha=0.7)

    @jax.jit
    def variances(x):
        found = []
        for stage, scales in enumerate(stages):
            layers = standardized_layers(jax.random.key(stage), 5, x.shape[-1])
            for i, (alpha, beta) in enumerate(scales):
                found.append(jnp.var(x))
                out = beta * act(x)
                shortcut = out @ layers[-1] if i == 0 else x
                x = shortcut + alpha * (out @ layers[i])
        return jnp.stack(found)

    found = variances(jax.random.normal(jax.random.key(2), (512, 128)))
    expected = [scale.beta**-2 for scales in stages for scale in scales]
    np.testing.assert_allclose(found, expected, rtol=0.15)
    assert found[4] > 2.5 > 2 > found[5]  # the transition, block 4, begins anew


# ---- stochastic depth


def test_stochastic_depth_drops_whole_examples_and_does_not_rescale(ours):
    x = jax.random.normal(jax.random.key(0), (2000, 2, 3), jnp.bfloat16)
    run = jax.jit(functools.partial(ws.stochastic_depth, rate=0.3))
    y = run(jax.random.key(1), x)
    kept = np.all(np.asarray(x == y), axis=(1, 2))
    assert y.dtype == x.dtype and kept.mean() == pytest.approx(0.7, abs=0.05)
    assert not np.any(np.asarray(y, np.float32)[~kept])
    np.testing.assert_array_equal(y, run(jax.random.key(1), x))
    assert not np.array_equal(y, run(jax.random.key(2), x))


def test_stochastic_depth_at_zero_and_one(ours):
    x = jnp.ones((50, 4)).at[0].set(jnp.nan)
    for seed in range(5):
        key = jax.random.key(seed)
        np.testing.assert_array_equal(ws.stochastic_depth(key, x, 0.0), x)
        np.testing.assert_array_equal(ws.stochastic_depth(key, x, 1), jnp.zeros_like(x))
    for rate in (-0.1, 1.5):
        with pytest.raises(ValueError, match="rate"):
            ws.stochastic_depth(jax.random.key(0), x, rate)


def test_stochastic_depth_has_a_traced_rate_and_a_gradient(ours):
    x, key = jnp.ones((40, 2)), jax.random.key(3)
    mask = ws.stochastic_depth(key, x, 0.5)
    grad = jax.jit(jax.grad(lambda x, rate: jnp.sum(ws.stochastic_depth(key, x, rate))))
    np.testing.assert_array_equal(grad(x, jnp.float32(0.5)), mask)
    assert 0 < mask.sum() < mask.size


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.vmap, jax.grad, lambda f: lambda x: jax.eval_shape(f, x)]
)
def test_gains_are_numbers_inside_every_transformation(transform):
    gains = []

    def f(x):
        gains.append(ws.scaled_activation(jax.nn.relu).gain)  # relu has a custom derivative
        return ws.scaled_activation(jax.nn.relu)(x)

    transform(f)(jnp.ones(()) if transform is jax.grad else jnp.ones(3))
    np.testing.assert_allclose(gains[0], np.sqrt(2 / (1 - 1 / np.pi)), rtol=1e-9)
