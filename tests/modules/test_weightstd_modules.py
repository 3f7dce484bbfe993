"""WSConv against DeepMind's and timm's layers, baking, the penalty under SGD, scans of microbatches."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import _jaxpr
from jaxtricks import weightstd as ws

from tests.rooms.test_weightstd import HAIKU, TIMM, close, pair, part

X = np.random.default_rng(0).normal(size=(2, 8, 7, 4)).astype(np.float32)


def layer(framework, g, **how):
    """(apply(params, x), params) of a WSConv with the case's parameters."""
    size, out = g["w"].shape[:-2], g["w"].shape[-1]
    features = g["x"].shape[-1]
    how |= {"use_gain": "gain" in g, "use_bias": "bias" in g, "precision": "highest"}
    names = {"w": "kernel", "gain": "gain", "bias": "bias"}
    params = {names[k]: jnp.asarray(g[k]) for k in names if k in g}
    if framework == "nnx":
        module = jt.nnx.WSConv(features, out, size, rngs=nnx.Rngs(0), **how)
        apply, like, _ = jt.nnx.functional(module)
        assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)
        return lambda p, x: apply(p, {}, x, train=True)[0], params
    module = jt.linen.WSConv(out, size, **how)
    return lambda p, x: module.apply({"params": p}, x), params


def check(apply, params, g, tol, grad_tol):
    def run(params, x, cotangent):
        y, pull = jax.vjp(apply, params, x)
        return y, *pull(cotangent)

    y, grads, dx = jax.jit(run)(params, g["x"], g["cot"])
    close(y, g["y"], tol)
    close(dx, g["dx"], grad_tol)
    for name, key in (("kernel", "dw"), ("gain", "dgain"), ("bias", "dbias")):
        if name in params:
            close(grads[name], g[key], grad_tol)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("case", HAIKU)
def test_modules_equal_deepmind(golden, framework, case):
    arrays, meta = golden("wsconv_haiku")
    g, m = part(arrays, case), meta["cases"][case]
    how = {
        "strides": pair(m["stride"]),
        "padding": m["padding"],
        "kernel_dilation": pair(m["dilation"]),
        "feature_group_count": m["groups"],
        "eps": m["eps"],
    }
    hard = bool(m["note"])
    check(*layer(framework, g, **how), g, *((1e-5, 1e-4) if hard else (2e-6, 2e-5)))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("case", TIMM)
def test_modules_equal_timm(golden, framework, case):
    """ScaledStdConv2d as it is; its gamma, and StdConv2d's missing fan-in, are factors of the gain."""
    arrays, meta = golden("wsconv_timm")
    g, m = part(arrays, case), meta["cases"][case]
    extra = m.get("gamma", 1.0) if m["scale"] else float(np.sqrt(np.prod(g["w"].shape[:-1])))
    gain = g.get("gain", np.ones(g["w"].shape[-1], np.float32))
    g = g | {"gain": gain * np.float32(extra)}
    if "dgain" in g:
        g["dgain"] = g["dgain"] / extra
    how = {
        "strides": pair(m["s"]),
        "padding": "SAME" if m["same_pad"] else [(p, p) for p in m["torch_padding"]],
        "kernel_dilation": pair(m.get("d", 1)),
        "feature_group_count": m["g"],
        "preset": "timm",
        "eps": m["eps"],
    }
    apply, params = layer(framework, g, **how)
    if "dgain" not in g:
        fixed = params.pop("gain")
        inner, apply = apply, lambda p, x: inner(p | {"gain": fixed}, x)
    check(apply, params, g, 2e-6, 3e-5)


# ---- baking


@pytest.mark.parametrize("preset", sorted(ws.PRESETS))
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_baked_parameters_are_those_of_a_plain_convolution(framework, preset):
    how = {"strides": 2, "feature_group_count": 2, "use_bias": True}
    if framework == "nnx":
        standardized = jt.nnx.WSConv(4, 6, (3, 3), preset=preset, rngs=nnx.Rngs(0), **how)
        apply, params, _ = jt.nnx.functional(standardized)
        plain, like, _ = jt.nnx.functional(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(1), **how))
        run = lambda f, p: f(p, {}, X, train=False)[0]
    else:
        module, conv = (
            jt.linen.WSConv(6, (3, 3), preset=preset, **how),
            nn.Conv(6, (3, 3), **how),
        )
        params = module.init(jax.random.key(0), X)["params"]
        like = jax.eval_shape(conv.init, jax.random.key(0), X)["params"]
        apply, plain = module.apply, conv.apply
        run = lambda f, p: f({"params": p}, X)
    params = {**params, "gain": jnp.linspace(-1.0, 2.0, 6), "bias": jnp.arange(6.0)}
    baked = ws.fold_params(params, preset=preset)
    assert jax.tree.structure(baked) == jax.tree.structure(dict(like))
    np.testing.assert_allclose(run(plain, baked), run(apply, params), rtol=1e-5, atol=1e-5)


def test_bake_finds_its_kernels(ours):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    layers = [{"kernel": kernel, "gain": jnp.full(4, 2.0)}, {"kernel": kernel}]
    params = {
        "layers": layers,
        "scale": {"gain": jnp.ones(4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }
    hat = ws.standardize(kernel)
    baked = jax.jit(ws.fold_params)(params)
    np.testing.assert_allclose(baked["layers"][0]["kernel"], 2 * hat, rtol=1e-6)
    assert "gain" not in baked["layers"][0] and "gain" in baked["scale"]
    np.testing.assert_array_equal(baked["layers"][1]["kernel"], kernel)
    chosen = ws.fold_params(params, path_filter=lambda path: path == "layers/1/kernel")
    np.testing.assert_allclose(chosen["layers"][1]["kernel"], hat, rtol=1e-6)
    assert "gain" in chosen["layers"][0]
    assert "gain" in params["layers"][0]  # the argument is as it was
    with pytest.raises(ValueError, match="chosen by `path_filter`"):
        ws.fold_params(params, path_filter=lambda path: False)
    with pytest.raises(ValueError, match="`gain` beside it"):
        ws.fold_params({"head": params["head"]})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_kernels_have_float32_statistics_everywhere(dtype):
    """With a mean of 8 deviations, statistics in 16 bits would be off by whole digits."""
    kernel = np.random.default_rng(0).normal(8.0, 1.0, (3, 3, 4, 6)).astype(np.float32)
    low = jnp.asarray(kernel, dtype)
    x = jnp.asarray(X, dtype)
    exact = ws.standardize(low.astype(jnp.float32))
    expected = exact.astype(dtype)
    baked = ws.fold_params({"kernel": low, "gain": jnp.ones(6, dtype)})["kernel"]
    params = ws.standardize_params({"kernel": low}, path_filter=lambda path: True)["kernel"]
    for got in (baked, params, ws.standardized().kernel(low)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.float32(got), np.float32(expected))
    conv = lambda k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    hooked = nnx.Conv(
        4, 6, (3, 3), use_bias=False, dtype=dtype, param_dtype=dtype,
        conv_general_dilated=ws.standardized(), rngs=nnx.Rngs(0),
    )  # fmt: skip
    hooked.kernel[...] = low
    own = jt.nnx.WSConv(4, 6, (3, 3), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    own.kernel[...] = low
    np.testing.assert_allclose(own.standardized_kernel(), exact, rtol=1e-6)
    for module in (hooked, own):
        y = module(x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.float32(y), np.float32(conv(expected)))


@pytest.mark.parametrize(
    "make",
    [
        lambda k: ws.standardize(k),
        lambda k: ws.standardized().kernel(k),
        lambda k: nnx.Conv(
            4, 4, (1, 1), feature_group_count=4, conv_general_dilated=ws.standardized(), rngs=nnx.Rngs(0)
        )(X),
        lambda k: ws.standardize_params({"kernel": k}, path_filter=lambda path: True),
        lambda k: ws.fold_params({"kernel": k, "gain": jnp.ones(4)}),
        lambda k: jt.nnx.WSConv(4, 4, (1, 1), feature_group_count=4, rngs=nnx.Rngs(0)),
        lambda k: jt.linen.WSConv(4, (1, 1), feature_group_count=4).init(jax.random.key(0), X),
    ],
)  # fmt: skip
def test_depthwise_1x1_is_refused_everywhere(make):
    with pytest.raises(ValueError, match="fan-in 1"):
        make(jnp.ones((1, 1, 1, 4)))


@pytest.mark.parametrize("preset", sorted(ws.PRESETS))
def test_filters_without_variance_give_zeros_everywhere(preset):
    params = {"kernel": jnp.full((3, 3, 4, 6), 0.3), "gain": jnp.ones(6)}
    module = jt.linen.WSConv(6, (3, 3), preset=preset)
    y, pull = jax.vjp(lambda p: module.apply({"params": p}, X), params)
    assert not np.any(np.asarray(y))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(pull(jnp.ones_like(y))))
    assert not np.any(np.asarray(ws.fold_params(params, preset=preset)["kernel"]))
    hooked = ws.standardized(preset=preset)(
        X, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert not np.any(np.asarray(hooked))


# ---- training


def test_l2_is_decoupled_weight_decay_under_sgd():
    """The gradient of 1e-4 * sum w^2 against add_decayed_weights(2e-4) over kernels, ten steps."""
    module = jt.linen.WSConv(6, (3, 3), use_bias=True)
    start = module.init(jax.random.key(0), X)["params"]

    def loss(params):
        return jnp.mean(jnp.square(module.apply({"params": params}, X) - 1.0))

    def run(loss, tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = start, tx.init(start)
        for _ in range(10):
            params, state = step(params, state)
        return params

    mask = {"kernel": True, "gain": False, "bias": False}
    decayed = run(loss, optax.chain(optax.add_decayed_weights(2e-4, mask), optax.sgd(0.5)))
    penalized = run(lambda p: loss(p) + ws.l2(p), optax.sgd(0.5))
    plain = run(loss, optax.sgd(0.5))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7), penalized, decayed
    )
    assert np.abs(plain["kernel"] - decayed["kernel"]).max() > 1e-4


def conv_loss(kernel, x):
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sum(jnp.sin(y))


def accumulated(loss, params, x):
    """Sum of gradients over microbatches [M, N, H, W, C]."""
    add = lambda total, part: (jax.tree.map(jnp.add, total, jax.grad(loss)(params, part)), None)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), x)[0]


def inside(params, x):
    loss = lambda p, part: conv_loss(ws.fold_params(p)["kernel"], part)
    return accumulated(loss, params, x)


def outside(params, x):
    """Standardized once: gradients by the standardized kernel are summed and pulled back at the end."""
    hat, pull_back = jax.vjp(ws.fold_params, params)
    return pull_back(accumulated(lambda p, part: conv_loss(p["kernel"], part), hat, x))[0]


def in_scan_bodies(fn, *args):
    """Names of all primitives inside scans."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    scans = [e for e in _jaxpr.walk(jaxpr) if e.primitive.name == "scan"]
    bodies = [sub for scan in scans for sub in _jaxpr.sub_jaxprs(scan)]
    return {e.primitive.name for body in bodies for e in _jaxpr.walk(body)}


def test_standardization_hoisted_out_of_a_scan_of_microbatches():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 6)), "gain": jnp.ones(6)}
    x = jax.random.normal(jax.random.key(1), (5, 2, 6, 6, 4))
    plain, hoisted = jax.jit(inside)(params, x), jax.jit(outside)(params, x)
    jax.tree.map(functools.partial(close, tol=2e-6), hoisted, plain)
    statistics = {"rsqrt", "max"}
    assert statistics <= in_scan_bodies(inside, params, x)
    found = in_scan_bodies(outside, params, x)
    assert "conv_general_dilated" in found and not found & statistics
