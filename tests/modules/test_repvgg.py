"""jt.nnx.RepVGGBlock: the reference's block, and exact fusion in every geometry."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jaxtricks import _compat, _tree, reparam

CASES = [f"case{i:02d}" for i in (0, 2, 3, 4, 5)]
NAMES = {"square": "rbr_dense", "point": "rbr_1x1", "identity": "rbr_identity"}


def load(block, g, stats):
    """The reference's parameters, and its statistics at one time, into the block."""
    for ours, theirs in NAMES.items():
        branch = getattr(block, ours)
        if branch is None:
            continue
        prefix = theirs if branch.conv is None else f"{theirs}.bn"
        if branch.conv is not None:
            branch.conv.kernel[...] = jnp.asarray(g[f"init/{theirs}.conv.weight"])
        branch.norm.scale[...] = jnp.asarray(g[f"init/{prefix}.weight"])
        branch.norm.bias[...] = jnp.asarray(g[f"init/{prefix}.bias"])
        branch.norm.mean[...] = jnp.asarray(g[f"{stats}/{prefix}.running_mean"])
        branch.norm.var[...] = jnp.asarray(g[f"{stats}/{prefix}.running_var"])


@pytest.mark.parametrize("case", CASES)
def test_equals_reference_code(golden, case):
    arrays, meta = golden("repvgg")
    g = {k[len(case) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{case}/")}
    m = meta["cases"][case]
    block = jt.nnx.RepVGGBlock(
        m["i"],
        m["o"],
        strides=m["s"],
        padding=m["p"],
        feature_group_count=m["g"],
        norm=functools.partial(nnx.BatchNorm, epsilon=1e-5),
        rngs=nnx.Rngs(0),
    )
    block.eval()
    assert (block.identity is not None) == m["identity"]
    activate = jax.nn.relu if m.get("relu") else lambda y: y
    for stage, stats in (("eval0", "init"), ("eval1", "train2")):
        load(block, g, stats)
        conv = block.fused()
        close(conv.kernel[...], g[f"{stage}/fused_kernel"], 1e-6)
        close(conv.bias[...], g[f"{stage}/fused_bias"], 1e-6)
        close(activate(block(g[f"{stage}/x"])), g[f"{stage}/y_eval"], 2e-6)
        close(activate(conv(g[f"{stage}/x"])), g[f"{stage}/y_deploy"], 2e-6)


def close(actual, expected, tol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


def randomize(block, seed):
    rng = np.random.default_rng(seed)
    for branch in block.named_branches().values():
        norm = branch.norm
        for v in (norm.mean, norm.scale, norm.bias):
            v[...] = jnp.asarray(rng.normal(size=v[...].shape), v[...].dtype)
        norm.var[...] = jnp.asarray(rng.uniform(0.1, 2.0, norm.var[...].shape), norm.var[...].dtype)


# side, stride, groups, padding, size, dilation
GEOMETRY = [
    (8, 1, 1, "SAME", (3, 3), 1),
    (7, 2, 2, "SAME", (3, 3), 1),
    (8, 2, 4, "SAME", (3, 3), 1),
    (7, 1, 2, "VALID", (3, 3), 2),
    (8, 1, 1, ((2, 0), (-1, 3)), (5, 2), 1),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_fused_is_the_block_in_evaluation(geometry, dtype):
    side, stride, groups, padding, size, dilation = geometry
    with _compat.enable_x64():
        block = jt.nnx.RepVGGBlock(
            4,
            4,
            size,
            stride,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            conv=functools.partial(nnx.Conv, param_dtype=dtype),
            norm=functools.partial(jt.nnx.ExtendedBatchNorm, param_dtype=dtype),
            rngs=nnx.Rngs(side),
        )
        randomize(block, side)
        block.eval()
        x = np.random.default_rng(0).normal(size=(2, side, side + 1, 4)).astype(dtype)
        plain = block.fused()
        assert type(plain) is nnx.Conv and (block.identity is None) == (stride == 2)
        how = dict(strides=stride, padding=padding, dilation=dilation)
        y, fused, nodes = block(x), plain(x), reparam.apply(block.node(), x, **how)
        assert y.dtype == fused.dtype == dtype
        for other in (fused, nodes):
            close(other, y, 5e-6 if dtype == "float32" else 1e-13)


def test_trains_with_batch_norm_and_moves_every_statistic():
    block = jt.nnx.RepVGGBlock(4, 4, rngs=nnx.Rngs(0))
    apply, params, state = jt.nnx.functional(block)
    x = 1 + jax.random.normal(jax.random.key(0), (4, 6, 6, 4))
    y, trained = jax.jit(functools.partial(apply, train=True))(params, state, x)
    # At first every branch has mean 0 and variance 1 in every channel.
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    assert set(trained) == set(NAMES)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), state, trained)
    assert all(jax.tree.leaves(changed))


def test_roles_settings_and_mistakes():
    block = jt.nnx.RepVGGBlock(3, 4, rngs=nnx.Rngs(0))
    rule = jt.nnx.roles(block)
    shapes = {p: leaf.shape for p, leaf in _tree.leaves_with_paths(jt.nnx.functional(block)[1])}
    assert shapes["point/conv/kernel"] == (1, 1, 3, 4) and block.identity is None
    for path, shape in shapes.items():
        kernel = path.endswith("kernel")
        assert rule(path, shape) == (("in", "in", "in", "out") if kernel else ("none",))
    with pytest.raises(ValueError, match=r"RepVGGBlock: .*give 1 to 3 sizes"):
        jt.nnx.RepVGGBlock(3, 4, (3, 3, 3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="CIRCULAR"):
        jt.nnx.RepVGGBlock(3, 4, padding="CIRCULAR", rngs=nnx.Rngs(0))
