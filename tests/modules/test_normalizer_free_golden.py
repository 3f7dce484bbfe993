"""weightstd against DeepMind's NFNets: activations, residual blocks made of our pieces, settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import weightstd as ws

from tests.rooms.test_weightstd_signal_propagation import TABLE


def close(actual, expected, tol):
    """Error relative to the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(TABLE))
def test_activations(golden, ours, name):
    """Up to the ratio of the constants: theirs are estimated by sampling."""
    arrays, _ = golden("nfnet_pieces")
    act = ws.scaled_activation(getattr(jax.nn, name))
    y = act(jnp.asarray(arrays["act/x"])) * jnp.float32(TABLE[name] / act.gain)
    close(y, arrays[f"act/{name}"], 1e-6)


def convolution(p, x, stride=1):
    y = jax.lax.conv_general_dilated(
        x,
        ws.standardize(p["w"], p["gain"], preset="nfnet"),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return y + p["bias"].reshape(1, 1, 1, -1)


def squeeze_excite(p, x):
    h = jnp.mean(x, (1, 2))
    for name in ("linear", "linear_1"):
        layer = p[f"squeeze_excite/~/{name}"]
        h = h @ layer["w"] + layer["b"].reshape(1, -1)
        h = jax.nn.relu(h) if name == "linear" else jax.nn.sigmoid(h)
    return 2 * h[:, None, None, :]


def block(p, x, *, act, scale, stride):
    """NFResBlock: 1x1, 3x3, 1x1 with standardized kernels."""
    out = act(x) * scale.beta
    shortcut = convolution(p["conv_shortcut"], out, stride) if "conv_shortcut" in p else x
    out = convolution(p["conv0"], out)
    out = convolution(p["conv1"], act(out), stride)
    out = convolution(p["conv2"], act(out))
    if "squeeze_excite/~/linear" in p:
        out = out * squeeze_excite(p, out)
    return shortcut + out * p["skip_gain"] * scale.alpha


def module_params(arrays, case, kind):
    """{module: {name: array}} of the keys "<case>/<kind>/b/~/<module>/<name>"."""
    tree, head = {}, f"{case}/{kind}/b/"
    for key in (k for k in arrays if k.startswith(head)):
        path = key.removeprefix(head).removeprefix("~/")
        module, _, name = path.rpartition("/")
        (tree.setdefault(module, {}) if module else tree)[name] = jnp.asarray(arrays[key])
    return tree


@pytest.mark.parametrize("case", ["block00", "block01", "block02"])
def test_residual_blocks(golden, ours, case):
    arrays, meta = golden("nfnet_pieces")
    m = meta["cases"][case]
    fn = getattr(jax.nn, m["act"])
    run = functools.partial(
        block,
        act=ws.ScaledActivation(fn, TABLE[m["act"]]),
        scale=ws.ResidualScale(m["alpha"], m["beta"]),
        stride=m["s"],
    )
    y, pull = jax.vjp(jax.jit(run), module_params(arrays, case, "param"), arrays[f"{case}/x"])
    close(y, arrays[f"{case}/y"], 2e-6)
    grads, dx = pull(jnp.asarray(arrays[f"{case}/cot"]))
    close(dx, arrays[f"{case}/dx"], 2e-5)
    expected = module_params(arrays, case, "grad")
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for module, theirs in expected.items():
        ours_ = grads[module]
        if module == "conv2" and theirs["w"].shape[2] == 2:
            # Two weights are standardized to the same two numbers whatever they are: rounding is left.
            assert np.abs(theirs.pop("w")).max() < 1e-2 and np.abs(ours_.pop("w")).max() < 1e-2
        jax.tree.map(functools.partial(close, tol=2e-5), ours_, theirs)


@pytest.mark.parametrize(
    ("name", "depths"), [("nf_ResNet50", (3, 4, 6, 3)), ("nfnet_F0", (1, 2, 6, 3))]
)
def test_settings_of_every_block(golden, name, depths):
    arrays, _ = golden("nfnet_pieces")
    beta, alpha, rate = arrays[f"{name}/beta_alpha_sd_in_out_stride"].T[:3]
    scales = [scale for stage in ws.residual_scales(depths) for scale in stage]
    np.testing.assert_allclose([s.beta for s in scales], beta, rtol=1e-12)
    np.testing.assert_allclose([s.alpha for s in scales], alpha, rtol=1e-12)
    n = sum(depths)
    expected = rate.max() * n / (n - 1)  # the last block's is rate * (n - 1) / n
    np.testing.assert_allclose(expected * np.arange(n) / n, rate, rtol=1e-12, atol=1e-15)


def test_stochastic_depth_drops_whole_examples(golden, ours):
    arrays, _ = golden("nfnet_pieces")
    x, mask, y = (arrays[f"stochdepth0/{k}"] for k in ("x", "mask_scaled", "y_train"))
    keys = jax.random.split(jax.random.key(0), 4000)
    drop = jax.jit(functools.partial(ws.stochastic_depth, rate=0.3))
    masks = jax.vmap(drop, (0, None))(keys, np.ones_like(mask))
    same = np.flatnonzero(np.all(np.asarray(masks) == mask, axis=(1, 2, 3, 4)))
    assert same.size  # some key draws the reference's mask: the result is the reference's
    np.testing.assert_array_equal(drop(keys[same[0]], x), y)
