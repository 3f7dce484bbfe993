"""jt.nnx: the functional form, roles, and the layers against their references."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jaxtricks import _tree, reparam, weightstd

from tests.reference import reparam as reference

ACB = [f"case{i:02d}" for i in (0, 1, 4, 6, 7)]
UNIT = 2.0**-24


def part(arrays, case):
    return {k[len(case) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{case}/")}


class Mixed(nnx.Module):
    """Layers of every kind, lists in lists, a shared layer, dropout."""

    def __init__(self, rngs):
        self.blocks = nnx.data([[nnx.Linear(4, 4, rngs=rngs)], [nnx.LayerNorm(4, rngs=rngs)]])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.blocks[0][0]
        self.norm = jt.nnx.ExtendedBatchNorm(4, rngs=rngs)

    def __call__(self, x, twice=False):
        for row in self.blocks:
            for layer in row:
                x = layer(x)
        x = self.norm(self.tied(self.drop(x)))
        return 2 * x if twice else x


# ---- functional


def test_functional_replaces_the_keys():
    apply, params, state = jt.nnx.functional(Mixed(nnx.Rngs(0)))
    x = jnp.ones((8, 4))
    run = jax.jit(functools.partial(apply, train=True))
    key = jax.random.key(5)
    (y1, s1), (y2, _) = run(params, state, x, key=key), run(params, state, x, key=key)
    assert np.array_equal(y1, y2)
    assert not np.array_equal(y1, run(params, state, x, key=jax.random.key(6))[0])
    # The count moves on with the state: the same key does not give the same mask again.
    assert not np.array_equal(y1, run(params, s1, x, key=key)[0])
    counts = [leaf for path, leaf in _tree.leaves_with_paths(s1) if path.endswith("count")]
    assert [int(c) for c in counts] == [1]
    assert not any("key" in path for path, _ in _tree.leaves_with_paths(state))
    other = jax.jit(lambda key: apply(params, state, x, train=True, key=key)[0])
    np.testing.assert_allclose(y1, other(key), rtol=1e-5)


def test_functional_says_when_a_key_is_needed():
    apply, params, state = jt.nnx.functional(Mixed(nnx.Rngs(0)))
    x = jnp.ones((8, 4))
    with pytest.raises(ValueError, match="needs `key`"):
        apply(params, state, x, train=True)
    with pytest.raises(ValueError, match="needs `key`"):
        jax.jit(lambda x: apply(params, state, x, train=True))(x)
    with pytest.raises(ValueError, match="typed PRNG key"):
        apply(params, state, x, train=True, key=jax.random.PRNGKey(0))
    with pytest.raises(Exception, match="train"):
        jax.jit(lambda t: apply(params, state, x, train=t))(True)
    y, _ = apply(params, state, x, True, train=False)  # a Python flag among the inputs
    np.testing.assert_allclose(y, 2 * apply(params, state, x, train=False)[0])


def test_functional_needs_no_key_in_evaluation_of_lifted_layers():
    """nnx.scan and nnx.vmap rewrite RNG counts even where nothing is drawn."""

    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return Mixed(rngs)

            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return layer(x)

            return run(self.layers, x)

    apply, params, state = jt.nnx.functional(Stack(nnx.Rngs(0)))
    x = jnp.ones((8, 4))
    y, _ = jax.jit(functools.partial(apply, train=False))(params, state, x)
    assert y.shape == x.shape
    with pytest.raises(ValueError, match="needs `key`"):
        apply(params, state, x, train=True)
    y, new = jax.jit(functools.partial(apply, train=True))(params, state, x, key=jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    rule = jt.nnx.roles(Stack(nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in _tree.leaves_with_paths(params)}
    assert shapes["layers/blocks/0/0/kernel"] == (3, 4, 4)
    assert rule("layers/blocks/0/0/kernel", (3, 4, 4)) == ("batch", "in", "out")


def test_functional_keeps_the_structure_of_state():
    """What a call creates is not in the carry."""

    class Makes(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            self.seen = nnx.Intermediate(x)
            return self.linear(x)

    apply, params, state = jt.nnx.functional(Makes(nnx.Rngs(0)))
    _, new = apply(params, state, jnp.ones((1, 2)), train=True)
    assert state == new == {}


def test_functional_names_what_does_not_fit():
    apply, params, state = jt.nnx.functional(Mixed(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'norm/bias' is missing"):
        apply(
            {**params, "norm": {"scale": params["norm"]["scale"]}},
            state,
            jnp.ones((1, 4)),
            train=False,
        )
    with pytest.raises(ValueError, match="'extra' does not belong"):
        apply(params, {**state, "extra": jnp.ones(1)}, jnp.ones((1, 4)), train=False)


def test_functional_holds_no_arrays():
    """Donating the parameters must leave the function usable."""
    apply, params, state = jt.nnx.functional(Mixed(nnx.Rngs(0)))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state))
    for leaf in jax.tree.leaves((params, state)):
        leaf.delete()
    run = functools.partial(apply, train=False)
    assert jax.eval_shape(run, *shapes, jax.ShapeDtypeStruct((2, 4), jnp.float32))[0].shape == (
        2,
        4,
    )


# ---- roles


LAYERS = {
    "Linear": (lambda r: nnx.Linear(3, 4, rngs=r), {"kernel": "in out", "bias": "none"}),
    "Conv 1d": (lambda r: nnx.Conv(3, 4, 5, rngs=r), {"kernel": "in in out", "bias": "none"}),
    "Conv 3d": (
        lambda r: nnx.Conv(3, 4, (2, 2, 2), use_bias=False, rngs=r),
        {"kernel": "in in in in out"},
    ),
    "ConvTranspose": (
        lambda r: nnx.ConvTranspose(3, 4, (2, 2), transpose_kernel=True, use_bias=False, rngs=r),
        {"kernel": "in in out in"},
    ),
    "LinearGeneral": (
        lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=r),
        {"kernel": "in in out out", "bias": "none none"},
    ),
    "LinearGeneral, batch": (
        lambda r: nnx.LinearGeneral(2, 5, batch_axis={0: 3}, rngs=r),
        {"kernel": "batch in out", "bias": "batch none"},
    ),
    "Einsum": (
        lambda r: nnx.Einsum("btd,dnh->btnh", (2, 3, 4), (3, 4), rngs=r),
        {"kernel": "in out out"},
    ),
    "Einsum, experts": (
        lambda r: nnx.Einsum("ebd,edf->ebf", (2, 3, 4), rngs=r),
        {"kernel": "batch in out"},
    ),
    "Embed": (lambda r: nnx.Embed(7, 3, rngs=r), {"embedding": "in out"}),
    "BatchNorm": (lambda r: nnx.BatchNorm(3, rngs=r), {"scale": "none", "bias": "none"}),
    "GroupNorm": (
        lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r),
        {"scale": "none", "bias": "none"},
    ),
    "RMSNorm": (lambda r: nnx.RMSNorm(4, rngs=r), {"scale": "none"}),
    "LoRA": (lambda r: nnx.LoRA(3, 2, 4, rngs=r), {"lora_a": "in out", "lora_b": "in out"}),
    "attention": (
        lambda r: nnx.MultiHeadAttention(2, 4, normalize_qk=True, rngs=r),
        {"query/kernel": "in out out", "out/kernel": "in in out", "key/bias": "none none"}
        | {"query_ln/scale": "none"},
    ),
    "WSConv": (
        lambda r: jt.nnx.WSConv(3, 4, (3, 3), use_bias=True, rngs=r),
        {"kernel": "in in in out", "gain": "none", "bias": "none"},
    ),
    "ACBlock": (
        lambda r: jt.nnx.ACBlock(3, 4, (3, 3), rngs=r),
        {"vertical/conv/kernel": "in in in out", "horizontal/norm/scale": "none"},
    ),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_roles_of_layers(name):
    make, expected = LAYERS[name]
    holder = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    rule = jt.nnx.roles(holder)
    got = {
        path: " ".join(rule(path, leaf.shape) or ("unknown",))
        for path, leaf in _tree.leaves_with_paths(nnx.state(holder, nnx.Param))
    }
    assert "unknown" not in got.values()
    assert expected.items() <= got.items()


def test_roles_in_lists_and_of_shared_layers():
    model = Mixed(nnx.Rngs(0))
    rule = jt.nnx.roles(model)
    for tree in (
        nnx.state(model, nnx.Param),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        jt.nnx.functional(model)[1],
    ):
        found = {path: rule(path, leaf.shape) for path, leaf in _tree.leaves_with_paths(tree)}
        assert found == {
            "blocks/0/0/kernel": ("in", "out"),
            "blocks/0/0/bias": ("none",),
            "blocks/1/0/scale": ("none",),
            "blocks/1/0/bias": ("none",),
            "norm/scale": ("none",),
            "norm/bias": ("none",),
        }


def test_roles_of_an_unknown_layer_are_none():
    class Mine(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(jnp.ones((3, 4)))

    assert jt.nnx.roles(Mine())("table", (3, 4)) is None


# ---- WSConv


@pytest.mark.parametrize(
    "padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", 2, ((1, 0), (0, 2)), (1, 2)]
)
def test_wsconv_pads_like_flax(padding):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 4))
    how = dict(strides=(2, 1), padding=padding, kernel_dilation=(1, 2), feature_group_count=2)
    ours = jt.nnx.WSConv(4, 6, (3, 2), use_gain=False, rngs=nnx.Rngs(0), **how)
    plain = nnx.Conv(4, 6, (3, 2), use_bias=False, rngs=nnx.Rngs(0), **how)
    plain.kernel[...] = weightstd.standardize(ours.kernel[...])
    np.testing.assert_allclose(ours(x), plain(x), atol=1e-6)


def test_wsconv_other_ranks_and_batches():
    causal = jt.nnx.WSConv(2, 3, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 7, 2))
    y = causal(x)
    assert np.array_equal(y[:, :4], causal(x.at[:, 4:].set(0))[:, :4])
    volume = jt.nnx.WSConv(2, 3, (3, 3, 3), strides=2, rngs=nnx.Rngs(0))
    v = jax.random.normal(jax.random.key(0), (2, 3, 6, 6, 6, 2))  # two batch axes
    np.testing.assert_allclose(volume(v)[1], volume(v[1]), atol=1e-6)
    np.testing.assert_allclose(volume(v)[1, 2], volume(v[1, 2]), atol=1e-6)


def test_wsconv_standardizes_the_parameter_not_its_cast():
    conv = jt.nnx.WSConv(64, 4, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    conv.kernel[...] = conv.kernel[...] + 1.0  # bfloat16 would keep few digits of the deviations
    y = conv(jnp.ones((1, 4, 4, 64)))
    assert y.dtype == jnp.bfloat16 and conv.kernel[...].dtype == jnp.float32
    exact = weightstd.standardize(conv.kernel[...])
    cast = weightstd.standardize(conv.kernel[...].astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(conv.standardized_kernel(), exact, atol=1e-7)
    assert np.abs(cast - exact).max() > 1e-3


def test_wsconv_initial_variance_and_mistakes():
    conv = jt.nnx.WSConv(64, 64, (3, 3), rngs=nnx.Rngs(0))
    assert np.std(conv.kernel[...]) == pytest.approx(1 / np.sqrt(576), rel=0.02)
    assert float(
        jnp.var(conv(jax.random.normal(jax.random.key(0), (4, 16, 16, 64))))
    ) == pytest.approx(1, rel=0.15)
    with pytest.raises(ValueError, match="fan-in 1"):
        jt.nnx.WSConv(4, 4, (1, 1), feature_group_count=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="feature_group_count"):
        jt.nnx.WSConv(4, 6, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="nfnet"):
        jt.nnx.WSConv(4, 4, (3, 3), preset="own", rngs=nnx.Rngs(0))


# ---- ACBlock


def acb_block(m, **how):
    norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, use_fast_variance=False)
    return jt.nnx.ACBlock(
        m["i"],
        m["o"],
        (m["k"], m["k"]),
        strides=m["s"],
        padding=m["p"],
        feature_group_count=m["g"],
        norm=norm,
        rngs=nnx.Rngs(0),
        **how,
    )


BRANCHES = {"square": "square", "vertical": "ver", "horizontal": "hor"}


def acb_params(g, prefix):
    return {
        ours: {
            "conv": {"kernel": jnp.asarray(g[f"{prefix}{theirs}_conv.weight"])},
            "norm": {
                "scale": jnp.asarray(g[f"{prefix}{theirs}_bn.weight"]),
                "bias": jnp.asarray(g[f"{prefix}{theirs}_bn.bias"]),
            },
        }
        for ours, theirs in BRANCHES.items()
    }


def acb_state(g, prefix):
    return {
        ours: {
            "norm": {
                "mean": jnp.asarray(g[f"{prefix}{theirs}_bn.running_mean"]),
                "var": jnp.asarray(g[f"{prefix}{theirs}_bn.running_var"]),
            }
        }
        for ours, theirs in BRANCHES.items()
    }


@pytest.mark.parametrize("case", ACB)
def test_acblock_equals_acnet(golden, case):
    """Outputs, gradients and running statistics in training; outputs in evaluation."""
    arrays, meta = golden("acb")
    g, m = part(arrays, case), meta["cases"][case]
    apply, params, state = jt.nnx.functional(acb_block(m))
    train = jax.jit(functools.partial(apply, train=True))
    evaluate = jax.jit(functools.partial(apply, train=False))
    params, state = acb_params(g, "init/"), acb_state(g, "init/")
    close(evaluate(params, state, g["eval0/x"])[0], g["eval0/y_eval"], 2e-6)
    weights = jnp.asarray(g["train0/cot"])
    grads = jax.jit(
        jax.grad(lambda p, x: jnp.sum(apply(p, state, x, train=True)[0] * weights), argnums=(0, 1))
    )
    dparams, dx = grads(params, jnp.asarray(g["train0/x"]))
    close(dx, g["train0/dx"], 1e-5)
    expected = acb_params(g, "train0/grad/")
    jax.tree.map(lambda a, b: close(a, b, 3e-5), dparams, expected)
    start = state
    for t in range(3):
        y, state = train(params, state, g[f"train{t}/x"])
        close(y, g[f"train{t}/y"], 3e-6)
        stored = acb_state(g, f"train{t}/")
        n = y.size // y.shape[-1]
        for name in BRANCHES:
            old, ours, theirs = (s[name]["norm"] for s in (start, state, stored))
            close(ours["mean"], theirs["mean"], 2e-6)
            decayed = 0.9 ** (t + 1) * old["var"]  # torch's is the unbiased variance
            close(ours["var"], decayed + (theirs["var"] - decayed) * (n - 1) / n, 3e-6)
    close(evaluate(params, acb_state(g, "train2/"), g["eval1/x"])[0], g["eval1/y_eval"], 2e-6)


def close(actual, expected, tol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


# padding, side, stride, size, dilation, groups
GEOMETRY = [
    ("SAME", 8, 2, (3, 3), 1, 1),
    ("SAME", 7, 2, (2, 4), 2, 2),
    (((2, 0), (-1, 3)), 8, 3, (5, 3), 1, 4),
    ("VALID", 7, 1, (3, 3), 2, 1),
]


@pytest.mark.parametrize(("conv", "norm"), [("nnx", "nnx"), ("ws", "ebn"), ("hook", "ebn")])
def test_fused_within_sixteen_units(conv, norm):
    """|fused - branches| <= 16 u (S_fused + sum S_branch), S = conv(|x|, |K|) + |b| (float64)."""
    convs = {
        "nnx": nnx.Conv,
        "ws": jt.nnx.WSConv,
        "hook": functools.partial(
            nnx.Conv, conv_general_dilated=weightstd.standardized(preset="timm")
        ),
    }
    norms = {"nnx": nnx.BatchNorm, "ebn": jt.nnx.ExtendedBatchNorm}
    for padding, side, stride, size, dilation, groups in GEOMETRY:
        block = jt.nnx.ACBlock(
            4,
            8,
            size,
            strides=stride,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            conv=convs[conv],
            norm=norms[norm],
            rngs=nnx.Rngs(stride),
        )
        x = np.random.default_rng(side).normal(size=(2, side + 6, side + 5, 4)).astype(np.float32)
        randomize(block, side)
        block.eval()
        plain = block.fused()
        assert type(plain) is nnx.Conv
        how = dict(strides=stride, padding=padding, dilation=dilation)
        y, fused, nodes = jax.jit(
            lambda x, b=block, p=plain, h=how: (b(x), p(x), reparam.apply(b.node(), x, **h))
        )(x)
        bound = 16 * UNIT * magnitude(block, plain, x)
        assert y.shape == fused.shape == bound.shape
        for other in (fused, nodes):
            assert np.all(np.abs(np.float64(y) - np.float64(other)) <= bound)


def randomize(block, seed):
    rng = np.random.default_rng(seed)
    for branch in (block.square, block.vertical, block.horizontal):
        n = branch.norm
        for v in (n.mean, n.scale, n.bias):
            v[...] = jnp.asarray(rng.normal(size=v[...].shape), jnp.float32)
        n.var[...] = jnp.asarray(rng.uniform(0.1, 2.0, n.var[...].shape), jnp.float32)


def magnitude(block, plain, x):
    """S_fused + sum of S_branch by its definition."""
    size, d, s = block.kernel_size, block.kernel_dilation, block.strides
    pads = block.padding
    if isinstance(pads, str):
        extents = [di * (k - 1) + 1 for k, di in zip(size, d, strict=True)]
        pads = jax.lax.padtype_to_pads(x.shape[1:3], extents, s, pads)
    how = dict(strides=s, pads=pads, dilation=d, groups=block.feature_group_count)
    kernels = [(plain.kernel[...], plain.bias[...])]
    for node in block.node().nodes:
        fused = reparam.fuse(node, size)
        kernels.append((fused.kernel, fused.bias))
    ax = np.abs(np.float64(x))
    return sum(
        reference.conv(ax, np.abs(np.float64(k)), bias=np.abs(np.float64(b)), **how)
        for k, b in kernels
    )


def test_acblock_settings_and_mistakes():
    rngs = nnx.Rngs(0)
    block = jt.nnx.ACBlock(3, 4, (3, 3), gamma_init=1 / 3, rngs=rngs)
    np.testing.assert_allclose(block.vertical.norm.scale[...], 1 / 3)
    assert block.horizontal.conv.kernel[...].shape == (1, 3, 3, 4)
    with pytest.raises(ValueError, match=r"\(height, width\)"):
        jt.nnx.ACBlock(3, 4, (3,), rngs=rngs)
    with pytest.raises(ValueError, match="CIRCULAR"):
        jt.nnx.ACBlock(3, 4, (3, 3), padding="CIRCULAR", rngs=rngs)
    grouped = functools.partial(nnx.GroupNorm, num_groups=2)
    with pytest.raises(ValueError, match="GroupNorm has no running statistics"):
        jt.nnx.ACBlock(3, 4, (3, 3), norm=grouped, rngs=rngs).fused()
    other = functools.partial(nnx.Conv, conv_general_dilated=lambda *a, **k: None)
    with pytest.raises(ValueError, match="conv_general_dilated"):
        jt.nnx.ACBlock(3, 4, (3, 3), conv=other, rngs=rngs).fused()


def test_acblock_call_overrides_the_mode():
    block = jt.nnx.ACBlock(3, 4, (3, 3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    y = block(x, use_running_average=True)
    assert float(jnp.abs(block.square.norm.mean[...]).max()) == 0
    block.eval()
    assert np.array_equal(y, block(x))
    block(x, False)
    assert float(jnp.abs(block.square.norm.mean[...]).max()) > 0
