"""ebn: against the Keras layer, against hand-derived moments, with masks, across devices."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtricks import ebn

KERAS = [f"case{i:02d}" for i in range(9)]
HAND = [f"case{i:02d}" for i in range(3)]


def part(arrays, case):
    return {k[len(case) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{case}/")}


def layer(x, scale, bias, epsilon):
    mean, var = ebn.extended_moments(x)
    return ebn.normalize(x, mean, var, scale, bias, epsilon=epsilon)


@pytest.mark.parametrize("case", KERAS)
def test_equals_keras(golden, ours, case):
    """Values, gradients and running statistics over three training steps, then evaluation."""
    arrays, meta = golden("ebn_keras")
    g, m = part(arrays, case), meta["cases"][case]
    half = m["x_dtype"] == "f2"
    # The reference's single-pass variance costs digits where the mean is large.
    offset = m["note"].startswith("moderate offset")
    tol, grad_tol = (2e-3, 2e-3) if half else (5e-5, 1e-3) if offset else (1e-5, 2e-5)
    scale, bias = g.get("init/gamma"), g.get("init/beta")
    run = jax.jit(functools.partial(layer, epsilon=m["epsilon"]))
    for t in range(3):
        y = run(g[f"train{t}/x"], scale, bias)
        assert y.dtype == m["y_dtype"]
        np.testing.assert_allclose(np.float32(y), np.float32(g[f"train{t}/y"]), atol=tol)
    y, pull = jax.vjp(
        run, *(None if a is None else jnp.asarray(a) for a in (g["train0/x"], scale, bias))
    )
    dx, dscale, dbias = pull(jnp.asarray(g["train0/cot"]).astype(y.dtype))
    close(dx, g["train0/dx"], 4 * grad_tol)
    if scale is not None:
        close(dscale, g["train0/dgamma"], grad_tol)
    if bias is not None:
        close(dbias, g["train0/dbeta"], grad_tol)
    stats = g["train2/moving_mean"], g["train2/moving_variance"]
    y = ebn.normalize(g["eval/x"], *stats, scale, bias, epsilon=m["epsilon"])
    np.testing.assert_allclose(np.float32(y), np.float32(g["eval/y"]), atol=tol)


def close(actual, expected, tol):
    actual, expected = np.float64(actual), np.float64(expected)
    assert np.abs(actual - expected).max() <= tol * max(1, np.abs(expected).max())


@pytest.mark.parametrize("case", KERAS)
def test_module_keeps_the_keras_running_statistics(golden, case):
    arrays, meta = golden("ebn_keras")
    g, m = part(arrays, case), meta["cases"][case]
    norm = jt.nnx.ExtendedBatchNorm(
        g["init/moving_mean"].size, momentum=m["momentum"], epsilon=m["epsilon"], rngs=nnx.Rngs(0)
    )
    norm.mean[...] = jnp.asarray(g["init/moving_mean"])
    apply, params, state = jt.nnx.functional(norm)
    step = jax.jit(functools.partial(apply, train=True))
    for t in range(3):
        _, state = step(params, state, g[f"train{t}/x"])
    rtol = 1e-3 if m["x_dtype"] == "f2" else 1e-5
    np.testing.assert_allclose(state["mean"], g["train2/moving_mean"], rtol=rtol, atol=1e-5)
    # The reference keeps one variance per channel; what it started from decays, the rest is shared.
    decayed = m["momentum"] ** 3
    shared = g["train2/moving_variance"] - decayed * g["init/moving_variance"]
    np.testing.assert_allclose(np.asarray(state["var"]) - decayed, shared, rtol=rtol, atol=2e-5)


@pytest.mark.parametrize("case", HAND)
def test_both_readings_and_masks(golden, ours, case):
    arrays, meta = golden("ebn_handderived")
    g, eps = part(arrays, case), meta["cases"][case]["eps"]
    for variance, key in (("channel", "channel_mean"), ("grand", "grand_mean")):
        mean, var = ebn.extended_moments(g["x"], variance=variance)
        np.testing.assert_allclose(mean, g["mean"], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(var, g[f"var_about_{key}"], rtol=2e-6)
        y = ebn.normalize(g["x"], mean, var, g["gamma"], g["beta"], epsilon=eps)
        np.testing.assert_allclose(y, g[f"y_{variance}"], atol=5e-6)
    if "mask" in g:
        mean, var = ebn.extended_moments(g["x"], mask=g["mask"])
        np.testing.assert_allclose(mean, g["mean_masked"], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(var, g["var_masked_about_channel_mean"], rtol=2e-6)


@pytest.mark.stock
def test_large_mean_small_variance(ours):
    x = np.random.default_rng(0).normal(1e4, 1.0, (64, 16, 16, 8)).astype(np.float32)
    mean, var = jax.jit(ebn.extended_moments)(x)
    exact = np.float64(x)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)).mean(), rtol=1e-5)


@pytest.mark.parametrize("variance", ["channel", "grand"])
def test_gradient_is_that_of_the_formula(x64, ours, variance):
    """Second derivatives too: the correction pass must not change them."""
    x = np.random.default_rng(0).normal(2.0, 1.0, (5, 3, 4))
    mask = np.random.default_rng(1).random((5, 3)) < 0.7

    def plain(x):
        m = jnp.asarray(mask, x.dtype)[..., None]
        mean = jnp.sum(m * x, (0, 1)) / m.sum()
        about = mean.reshape(1, 1, 4) if variance == "channel" else jnp.mean(mean)
        return mean, jnp.sum(m * (x - about) ** 2) / (4 * m.sum())

    def ours_(x):
        return ebn.extended_moments(x, mask=mask, variance=variance)

    def total(f):
        return lambda x: jnp.sum(jnp.sin(f(x)[0])) + jnp.exp(f(x)[1])

    for transform in (lambda f: f, jax.grad, jax.hessian):
        got, expected = (jax.jit(transform(total(f)))(x) for f in (ours_, plain))
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


SHAPES = [(6,), (6, 5), (6, 1, 4), (6, 5, 4), (1, 5), (6, 5, 4, 1), (1, 1, 1, 3), (6, 5, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_shapes(ours, shape):
    rng = np.random.default_rng(len(shape))
    x = rng.normal(size=(6, 5, 4, 3)).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask.flat[0] = True
    full = np.broadcast_to(mask.reshape(shape + (1,) * (4 - len(shape))), x.shape)
    n = full.sum((0, 1, 2))
    mean = np.where(full, x, 0).sum((0, 1, 2)) / np.maximum(n, 1)
    var = (np.where(full, x - mean, 0) ** 2).sum() / n.sum()
    got = ebn.moments(np.where(full, x, np.nan), mask=mask)
    np.testing.assert_allclose(got.mean, mean, atol=1e-6)
    np.testing.assert_allclose(got.var, var, rtol=1e-5)
    assert float(got.count) == n.sum()


def test_mask_that_does_not_fit():
    x = np.ones((6, 5, 4, 3), np.float32)
    for shape in [(5,), (4, 3), (6, 5, 4, 2), (6, 5, 4, 3, 1)]:
        with pytest.raises(ValueError, match="`mask` of shape"):
            ebn.extended_moments(x, mask=np.ones(shape, bool))
    with pytest.raises(Exception, match="variance"):
        ebn.extended_moments(x, variance="both")


def test_empty_mask_is_defined(ours):
    x = jnp.full((4, 3), jnp.nan)
    mask = jnp.zeros(4, bool)
    mean, var = ebn.extended_moments(x, mask=mask)
    assert np.all(np.asarray(mean) == 0) and float(var) == 0
    gradient = jax.grad(lambda x: jnp.sum(ebn.extended_moments(x, mask=mask)[1]))(x)
    assert np.all(np.asarray(gradient) == 0)
    norm = jt.nnx.ExtendedBatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    norm(jnp.ones((4, 3)), mask=mask)
    assert np.all(np.asarray(norm.mean[...]) == 0) and float(norm.var[...]) == 1


@pytest.mark.devices
def test_shards_with_unequal_counts_equal_one_device(ours):
    """Eight devices, one with nothing to count; values and gradients."""
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (16, 4, 5)).astype(np.float32)
    mask = rng.random((16, 4)) < 0.5
    mask[2:4] = False
    weights = rng.normal(size=x.shape).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spec = PartitionSpec("data")

    def normalized(x, mask, axis_name=None):
        mean, var = ebn.extended_moments(x, mask=mask, axis_name=axis_name)
        return ebn.normalize(x, mean, var)

    sharded = jax.shard_map(
        functools.partial(normalized, axis_name="data"),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
    )

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(f(x, mask) * weights)))

    (value, gradient), (expected, grad) = loss(sharded)(x), loss(normalized)(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, grad, atol=2e-6)
    # Averaging the shards' own moments, as flax does, is another number.
    shards = [
        ebn.extended_moments(a, mask=m)[1]
        for a, m in zip(x.reshape(8, 2, 4, 5), mask.reshape(8, 2, 4), strict=True)
    ]
    assert abs(np.mean(shards) - ebn.extended_moments(x, mask=mask)[1]) > 0.1


def test_module_across_devices_and_masks():
    x = jax.random.normal(jax.random.key(0), (16, 3))
    mask = jnp.arange(16) % 5 != 0
    norm = jt.nnx.ExtendedBatchNorm(3, axis_name="data", momentum=0.5, rngs=nnx.Rngs(0))
    apply, params, state = jt.nnx.functional(norm)

    def step(params, state, x):
        return apply(params, state, x, train=True)

    mapped = jax.vmap(step, in_axes=(None, None, 0), axis_name="data")
    y, stats = mapped(params, state, x.reshape(4, 4, 3))
    alone = jt.nnx.ExtendedBatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(y.reshape(16, 3), alone(x), atol=2e-6)
    np.testing.assert_allclose(stats["var"], jnp.full(4, alone.var[...]), rtol=1e-6)
    alone(x, mask=mask)
    assert np.all(np.isfinite(alone.mean[...]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_inputs(ours, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(100.0, 0.5, (8, 8, 4)), dtype)
    mean, var = ebn.extended_moments(x)
    assert mean.dtype == var.dtype == jnp.float32
    wide = np.float64(np.float32(x))
    np.testing.assert_allclose(var, wide.var((0, 1)).mean(), rtol=1e-5)
    y = ebn.normalize(x, mean, var, jnp.ones(4, dtype), jnp.zeros(4, jnp.float32))
    assert y.dtype == dtype
    exact = (wide - wide.mean((0, 1))) / np.sqrt(wide.var((0, 1)).mean() + 1e-3)
    np.testing.assert_allclose(np.float32(y), exact, rtol=1e-2, atol=1e-2)


def test_one_value_per_channel_gives_the_bias(ours):
    x = jnp.array([[1.0, 5.0, -3.0]])
    bias = jnp.array([1.0, 2.0, 3.0])
    assert np.array_equal(layer(x, jnp.ones(3), bias, 1e-3), bias[None])
    assert float(ebn.extended_moments(x, variance="grand")[1]) > 1


def test_module_settings():
    norm = jt.nnx.ExtendedBatchNorm(3, rngs=nnx.Rngs(0))
    assert (norm.momentum, norm.epsilon) == (0.99, 1e-3)
    bare = jt.nnx.ExtendedBatchNorm(3, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    assert nnx.to_pure_dict(nnx.state(bare, nnx.Param)) == {}
    unset = jt.nnx.ExtendedBatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average"):
        unset(jnp.ones((2, 3)))
    x = jnp.array([[4.0, 0.0, 2.0]])
    np.testing.assert_allclose(unset(x, use_running_average=True), x / np.sqrt(1 + 1e-3), rtol=1e-6)


def adversarial(kind):
    """Data on which a variance about a sampled mean could lose its digits; the lattice is x[:, ::4, ::4]."""
    x = np.random.default_rng(0).normal(size=(8, 32, 32, 3))
    if kind == "noise on a large mean":
        return x + 1e4
    if kind == "zero border":
        x[:, 4:28, 4:28] += 1e4
        x[:, [*range(4), *range(28, 32)]] = 0
        x[:, :, [*range(4), *range(28, 32)]] = 0
    elif kind == "the sample is far off":
        x = 1e-3 * x + 1e4
        x[:, ::4, ::4] -= 2e4
    elif kind == "the sample is constant":
        x = x + 1e4
        x[:, ::4, ::4] = 1e4
    elif kind == "only the sample varies":
        x[:] = 1e4
        x[:, ::4, ::4] += np.random.default_rng(1).normal(size=(8, 8, 8, 3))
    elif kind == "one outlier in the sample":
        x[0, 0, 0] = 1e6
    elif kind == "trend along space":
        x = 1e4 + np.broadcast_to(np.arange(32.0)[:, None, None], x.shape) + 1e-2 * x
    return x


@pytest.mark.stock
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "kind",
    [
        "noise on a large mean",
        "zero border",
        "the sample is far off",
        "the sample is constant",
        "only the sample varies",
        "one outlier in the sample",
        "trend along space",
    ],
)
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 1, 3), (0, 3)])
def test_one_pass_about_a_sampled_mean_keeps_its_digits(x64, ours, kind, dtype, axes):
    """Two spatial axes, one and none; at most 1 + 16 times the error of an exact shift."""
    x = adversarial(kind).astype(dtype)
    x = x[tuple(slice(None) if i in axes else 4 for i in range(4))]
    over = tuple(range(x.ndim - 1))
    exact = np.asarray(x, np.longdouble)
    mean, var = jax.jit(ebn.extended_moments)(x)
    unit = np.finfo(dtype).eps
    expected = exact.var(over).mean()
    # How exact a sum of 8,192 numbers is depends on the processor, and a far shift costs 17 times that.
    np.testing.assert_allclose(np.longdouble(var), expected, rtol=17 * 25 * unit, atol=1e-300)
    deviation = np.abs(np.longdouble(mean) - exact.mean(over))
    assert np.all(deviation <= 2 * unit * (np.abs(exact.mean(over)) + 20 * np.sqrt(expected)))


def test_sample_is_a_sixteenth_at_least_and_never_along_the_batch():
    for shape in [(3, 64, 2), (3, 5, 2), (3, 32, 31, 2), (3, 1, 7, 2), (3, 9, 8, 7, 2), (2, 3)]:
        sample = ebn._sample(np.zeros(shape))
        assert sample.shape[0] == shape[0] and sample.shape[-1] == shape[-1]
        assert 16 * sample.size >= np.prod(shape)
    assert ebn._sample(np.zeros((1, 64, 64, 1))).size == 256


@pytest.mark.parametrize("variance", ["channel", "grand"])
def test_derivatives_without_a_mask(x64, ours, variance):
    """Both modes and second derivatives, through moments and normalize together, and over a mapped axis."""
    rng = np.random.default_rng(0)
    x, tangent = rng.normal(2.0, 1.0, (2, 4, 6, 3)), rng.normal(size=(4, 6, 3))
    scale, bias = rng.normal(size=3), rng.normal(size=3)

    def ours_(x, scale, bias, axis_name=None):
        mean, var = ebn.extended_moments(x, variance=variance, axis_name=axis_name)
        return ebn.normalize(x, mean, var, scale, bias)

    def plain(x, scale, bias):
        over = tuple(range(x.ndim - 1))
        row = lambda v: jnp.reshape(v, (1,) * len(over) + (3,))
        mean = jnp.mean(x, over, keepdims=True)
        var = jnp.mean(jnp.square(x - (mean if variance == "channel" else jnp.mean(mean))))
        return (x - mean) / jnp.sqrt(var + 1e-3) * row(scale) + row(bias)

    def total(f):
        return lambda *args: jnp.sum(jnp.sin(f(*args)))

    one = x[0], scale, bias
    for transform in (jax.grad, jax.hessian, jax.jacfwd):
        got, expected = (jax.jit(transform(total(f), (0, 1, 2)))(*one) for f in (ours_, plain))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected
        )
    push = lambda f: jax.jvp(jax.jit(lambda x: f(x, scale, bias)), (x[0],), (tangent,))
    np.testing.assert_allclose(push(ours_), push(plain), rtol=1e-9, atol=1e-11)
    mapped = jax.vmap(functools.partial(ours_, axis_name="i"), (0, None, None), axis_name="i")
    for transform in (jax.grad, jax.hessian):
        got, expected = (
            jax.jit(transform(total(f), (1, 2)))(x, scale, bias) for f in (mapped, plain)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected
        )
    got, expected = (jax.jit(jax.grad(total(f)))(x, scale, bias) for f in (mapped, plain))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.devices
@pytest.mark.parametrize("axis", ["batch", "channels", "height"])
def test_sharded_arrays_under_jit_equal_one_device(ours, axis):
    """No axis_name: the arrays are global, whatever the layout."""
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (8, 16, 4, 16)).astype(np.float32)
    weights = rng.normal(size=x.shape).astype(np.float32)
    scale = rng.normal(size=16).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    spec = {
        "batch": PartitionSpec("d"),
        "height": PartitionSpec(None, "d"),
        "channels": PartitionSpec(None, None, None, "d"),
    }[axis]

    @jax.jit
    def run(x, scale):
        def loss(x, scale):
            mean, var = ebn.extended_moments(x)
            return jnp.sum(ebn.normalize(x, mean, var, scale) * weights), (mean, var)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, scale)

    place = lambda a, s: jax.device_put(a, jax.sharding.NamedSharding(mesh, s))
    row = PartitionSpec("d") if axis == "channels" else PartitionSpec()
    sharded = run(place(x, spec), place(scale, row))
    assert sharded[1][0].sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), sharded, run(x, scale)
    )
