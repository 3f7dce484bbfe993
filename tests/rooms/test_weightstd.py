"""weightstd: against DeepMind's and timm's layers, against NumPy, and at the edges."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen, nnx
from jaxtricks import weightstd as ws

from tests.reference import weightstd as reference

HAIKU = [f"case{i:02d}" for i in range(12)]
TIMM = [f"case{i:02d}" for i in range(8)]


def part(arrays, case):
    return {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(f"{case}/")}


def close(actual, expected, tol):
    """Error relative to the largest entry."""
    expected = np.asarray(expected)
    scale = max(1e-30, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, rtol=0, atol=tol)


def value_and_gradients(g, standardize, **how):
    """y and the gradients of sum(y * cot) by x, w, gain, bias."""

    def layer(x, w, gain, bias):
        w_hat = standardize(w, gain)
        y = jax.lax.conv_general_dilated(
            x, w_hat, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest", **how
        )
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)

    args = tuple(jnp.asarray(g[k]) if k in g else None for k in ("x", "w", "gain", "bias"))
    y, pull = jax.vjp(layer, *args)
    grads = pull(jnp.asarray(g["cot"]))
    return y, {f"d{k}": d for k, d in zip(("x", "w", "gain", "bias"), grads, strict=True)}


def pair(n):
    return (n, n) if isinstance(n, int) else tuple(n)


@pytest.mark.parametrize("case", HAIKU)
def test_nfnet_equals_deepmind(golden, ours, case):
    arrays, meta = golden("wsconv_haiku")
    g, m = part(arrays, case), meta["cases"][case]
    run = jax.jit(
        functools.partial(
            value_and_gradients,
            standardize=functools.partial(ws.standardize, preset="nfnet", eps=m["eps"]),
            window_strides=pair(m["stride"]),
            padding=m["padding"],
            rhs_dilation=pair(m["dilation"]),
            feature_group_count=m["groups"],
        )
    )
    y, grads = run(g)
    hard = bool(m["note"])
    close(ws.standardize(g["w"], g["gain"], eps=m["eps"]), g["w_hat"], 5e-6 if hard else 1e-6)
    close(y, g["y"], 1e-5 if hard else 2e-6)
    for name, grad in grads.items():
        close(grad, g[name], 1e-4 if hard else 2e-5)


@pytest.mark.parametrize("case", TIMM)
def test_timm_equals_timm(golden, ours, case):
    arrays, meta = golden("wsconv_timm")
    g, m = part(arrays, case), meta["cases"][case]
    # StdConv2d has no fan-in scaling: a gain of sqrt(fan_in) undoes it.
    extra = m.get("gamma", 1.0) if m["scale"] else float(np.sqrt(np.prod(g["w"].shape[:-1])))

    def standardize(w, gain):
        gain = jnp.full(w.shape[-1:], extra) if gain is None else gain * extra
        return ws.standardize(w, gain, preset="timm", eps=m["eps"])

    pads = "SAME" if m["same_pad"] else [(p, p) for p in m["torch_padding"]]
    run = jax.jit(
        functools.partial(
            value_and_gradients,
            standardize=standardize,
            window_strides=pair(m["s"]),
            padding=pads,
            rhs_dilation=pair(m.get("d", 1)),
            feature_group_count=m["g"],
        )
    )
    y, grads = run(g)
    close(y, g["y"], 2e-6)
    for name, grad in grads.items():
        if name in g:
            close(grad, g[name], 3e-5)


@pytest.mark.parametrize("preset", sorted(ws.PRESETS))
def test_presets_equal_numpy(x64, ours, preset):
    rng = np.random.default_rng(0)
    w, gain = rng.normal(3.0, 1e-2, (3, 5, 4, 6)), rng.normal(size=6)
    expected = reference.standardize(w, gain, preset)
    np.testing.assert_allclose(ws.standardize(w, gain, preset=preset), expected, rtol=1e-10)


def test_presets_differ():
    w = np.random.default_rng(0).normal(0, 1e-2, (3, 3, 4, 2)).astype(np.float32)
    results = [np.asarray(ws.standardize(w, preset=p)) for p in ws.PRESETS]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert np.abs(a - b).max() > 1e-4


@pytest.mark.parametrize("preset", sorted(ws.PRESETS))
def test_constant_channel_is_zero_with_finite_gradients(ours, preset):
    w = jnp.concatenate([jnp.full((3, 3, 2, 1), 0.7), jnp.arange(18.0).reshape(3, 3, 2, 1)], 3)
    w_hat, pull = jax.vjp(functools.partial(ws.standardize, preset=preset), w)
    assert np.all(np.asarray(w_hat)[..., 0] == 0)
    assert np.all(np.isfinite(pull(jnp.ones_like(w_hat) * w)[0]))


def test_clamp_makes_small_kernels_linear(ours):
    w = jnp.arange(18.0).reshape(3, 3, 1, 2) * 1e-6
    np.testing.assert_allclose(ws.standardize(3 * w), 3 * ws.standardize(w), rtol=1e-5)


def test_large_mean_keeps_digits(ours):
    small = np.random.default_rng(1).normal(size=(3, 3, 8, 4)).astype(np.float32)
    small = np.round(small * 64) / 64  # exactly representable after the shift
    shifted = ws.standardize(jnp.asarray(small + 256.0))
    np.testing.assert_allclose(shifted, ws.standardize(jnp.asarray(small)), atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_use_float32_statistics(ours, dtype):
    w = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 64, 8)), dtype)
    w_hat = ws.standardize(w, jnp.ones(8, jnp.float32))
    assert w_hat.dtype == dtype
    wide = ws.standardize(w.astype(jnp.float32)).astype(dtype)
    assert np.array_equal(np.asarray(w_hat, np.float32), np.asarray(wide, np.float32))


def test_out_axis(ours):
    w = jnp.arange(36.0).reshape(3, 3, 2, 2) ** 1.5
    first = ws.standardize(jnp.moveaxis(w, -1, 0), out_axis=0)
    np.testing.assert_allclose(jnp.moveaxis(first, 0, -1), ws.standardize(w), rtol=1e-6)
    depthwise = ws.standardize(w, jnp.ones((2, 2)), out_axis=(2, 3))  # Keras (kh, kw, C, M)
    alone = ws.standardize(w[:, :, 1:, :1])
    np.testing.assert_allclose(depthwise[:, :, 1:, :1], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"kernel": np.ones((1, 1, 1, 8), np.float32)}, "fan-in 1"),
        ({"kernel": np.ones(8, np.float32)}, "fan-in 1"),
        ({"kernel": np.ones((2, 2), np.float32), "preset": "mine"}, "nfnet"),
        ({"kernel": np.ones((2, 2), np.float32), "gain": np.ones(3, np.float32)}, "`gain`"),
        ({"kernel": np.ones((2, 2), np.float32), "out_axis": 2}, "`out_axis`"),
    ],
)
def test_mistakes_say_what_to_do(kwargs, words):
    with pytest.raises(ValueError, match=words):
        ws.standardize(**kwargs)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_hook_in_flax_convolutions(framework):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 4))
    hook = ws.standardized(preset="timm")
    how = dict(strides=2, feature_group_count=2, conv_general_dilated=hook)
    if framework == "nnx":
        conv = nnx.Conv(4, 6, (3, 3), **how, rngs=nnx.Rngs(0))
        kernel, y = conv.kernel[...], conv(x)
    else:
        conv = linen.Conv(6, (3, 3), **how)
        variables = conv.init(jax.random.key(0), x)
        kernel, y = variables["params"]["kernel"], conv.apply(variables, x)
    plain = jax.lax.conv_general_dilated(
        x,
        ws.standardize(kernel, preset="timm"),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    assert np.array_equal(y, plain)
    assert hook == ws.standardized(preset="timm") and hash(hook) == hash(
        ws.standardized(preset="timm")
    )


def test_hook_finds_the_output_axis(ours):
    x, w = jnp.ones((1, 2, 5, 5)), jnp.arange(54.0).reshape(3, 2, 3, 3)
    y = ws.standardized(gain=2.0)(x, w, (1, 1), "VALID")  # NCHW, OIHW: jax.lax's own layout
    plain = jax.lax.conv_general_dilated(x, 2 * ws.standardize(w, out_axis=0), (1, 1), "VALID")
    np.testing.assert_allclose(y, plain, atol=1e-6)


def test_standardize_params(ours):
    kernels = jnp.arange(3 * 24.0).reshape(3, 4, 6) ** 1.3  # three stacked dense layers
    params = {"stack": {"kernel": kernels, "bias": jnp.ones((3, 6))}, "skip": [None, jnp.ones(2)]}
    rule = jt.roles.by_path({"stack/kernel": ("batch", "in", "out")}, strict=False)
    out = jax.jit(
        lambda p: ws.standardize_params(p, path_filter=lambda path: "kernel" in path, roles=rule)
    )(params)
    np.testing.assert_allclose(out["stack"]["kernel"], jax.vmap(ws.standardize)(kernels), rtol=2e-6)
    assert np.array_equal(out["stack"]["bias"], params["stack"]["bias"])
    with pytest.raises(ValueError, match="chooses no parameter"):
        ws.standardize_params(params, path_filter=lambda path: False)
    with pytest.raises(ValueError, match="at 'stack/bias'|at 'skip/1'"):
        ws.standardize_params(params, path_filter=lambda path: path == "skip/1")


def test_l2_is_the_sum_of_squares_of_kernels(ours):
    params = {"a": {"kernel": jnp.full((2, 3), 2.0, jnp.bfloat16), "bias": jnp.ones(3)}}
    assert float(ws.l2(params)) == pytest.approx(24e-4)
    assert ws.l2(params).dtype == jnp.float32
    assert float(ws.l2(params, 1.0, path_filter=lambda path: path.endswith("bias"))) == 3.0
    assert float(ws.l2({}, 1.0)) == 0.0
    gradient = jax.grad(lambda p: ws.l2(p, 1e-2))({"kernel": jnp.ones((2, 2))})
    np.testing.assert_allclose(gradient["kernel"], 2e-2)  # add_decayed_weights(2 * scale)


def test_vmap_scan_and_remat_agree(ours):
    w = jax.random.normal(jax.random.key(0), (3, 3, 3, 4, 5))
    each = jnp.stack([ws.standardize(k) for k in w])
    np.testing.assert_allclose(jax.vmap(ws.standardize)(w), each, atol=1e-6)
    _, scanned = jax.lax.scan(lambda c, k: (c, jax.checkpoint(ws.standardize)(k)), 0, w)
    np.testing.assert_allclose(scanned, each, atol=1e-6)
