"""Blocks of every kind: they start from a plain convolution, fuse in every geometry, train online."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jaxtricks import reparam

BLOCKS = {
    "ac": jt.nnx.ACBlock,
    "repvgg": jt.nnx.RepVGGBlock,
    "dbb": jt.nnx.DiverseBranchBlock,
    "mobileone": functools.partial(jt.nnx.MobileOneBlock, num_branches=2),
    "dilated": functools.partial(
        jt.nnx.DilatedReparamBlock, kernel_sizes=(2, 1), dilates=(2, 1), feature_group_count=1
    ),
}
NORMS = {"bn": nnx.BatchNorm, "ebn": jt.nnx.ExtendedBatchNorm}


def close(actual, expected, tol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("mode", ["branches", "online"])
@pytest.mark.parametrize(("name", "norm"), [(n, v) for n in BLOCKS for v in NORMS])
def test_starts_from_a_convolution(name, norm, mode):
    block = BLOCKS[name](4, 4, (3, 3), mode=mode, norm=NORMS[norm], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4, 4)).astype("f") / 6
    bias = rng.normal(size=4).astype("f")
    block.start_from(kernel, bias)
    x = rng.normal(size=(64, 9, 8, 4)).astype("f")
    y = reparam.apply(reparam.Conv(kernel, bias), x)
    fused = block.fused()
    close(fused.kernel[...], kernel, 3e-6)
    close(fused.bias[...], bias, 3e-6)
    close(block(x, True), y, 1e-5)
    # In training only the batch's own statistics and the border differ.
    assert np.std(block(x, False) - y) < 0.2 * np.std(y)


@pytest.mark.parametrize(
    "geometry", [(8, 2, "SAME", 1), (9, 1, "VALID", 2), (7, 3, ((2, -1),) * 2, 1)]
)
@pytest.mark.parametrize("mode", ["branches", "online"])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_fused_is_the_block_within_the_bound(name, mode, geometry):
    side, stride, padding, dilation = geometry
    block = BLOCKS[name](
        4, 6, (3, 4), stride, padding=padding, kernel_dilation=dilation, mode=mode, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).normal(1, 2, size=(2, side, side, 4)).astype("f")
    block(x)  # statistics that are not the first ones
    block.eval()
    how = dict(strides=stride, padding=padding, dilation=dilation)
    y, fused, bound = jax.jit(
        lambda x: (block(x), block.fused()(x), reparam.error_bound(block.node(), x, **how))
    )(x)
    assert y.shape == fused.shape and np.abs(y - fused).max() <= bound < 1e-2


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_one_and_three_axes(name, axes):
    if name == "ac" and axes == 1:
        with pytest.raises(ValueError, match="give 2 to 3 sizes"):
            BLOCKS[name](4, 4, (3,), rngs=nnx.Rngs(0))
        return
    block = BLOCKS[name](4, 4, (3,) * axes, 2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, *(6, 5, 7)[:axes], 4)).astype("f")
    assert block(x).shape == (2, *(3, 3, 4)[:axes], 4)
    block.eval()
    close(block.fused()(x), block(x), 1e-5)


def test_mistakes():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="standardized kernels"):
        jt.nnx.ACBlock(4, 4, (3, 3), conv=jt.nnx.WSConv, rngs=rngs).start_from(
            jnp.ones((3, 3, 4, 4))
        )
    with pytest.raises(ValueError, match="maps 3 channels to 4"):
        jt.nnx.RepVGGBlock(4, 4, rngs=rngs).start_from(jnp.ones((3, 3, 3, 4)))
    with pytest.raises(ValueError, match="no scale or no bias"):
        norm = functools.partial(nnx.BatchNorm, use_bias=False)
        jt.nnx.RepVGGBlock(4, 4, norm=norm, rngs=rngs).start_from(jnp.ones((3, 3, 4, 4)))
    with pytest.raises(ValueError, match="'branches' or 'online'"):
        jt.nnx.RepVGGBlock(4, 4, mode="offline", rngs=rngs)
    with pytest.raises(ValueError, match="does not divide both"):
        jt.nnx.MobileOneBlock(4, 6, feature_group_count=4, rngs=rngs)
    with pytest.raises(ValueError, match="at least 1"):
        jt.nnx.MobileOneBlock(4, 6, num_branches=0, rngs=rngs)
    with pytest.raises(ValueError, match="multiple of the 2 groups"):
        jt.nnx.DiverseBranchBlock(4, 4, 3, feature_group_count=2, internal_features=3, rngs=rngs)
    dilated = functools.partial(jt.nnx.DilatedReparamBlock, 4, 4, rngs=rngs)
    with pytest.raises(ValueError, match="no default"):
        dilated((7, 5))
    with pytest.raises(ValueError, match="together"):
        dilated((7, 7), kernel_sizes=(3,))
    with pytest.raises(ValueError, match="reaches over 9"):
        dilated((7, 7), kernel_sizes=(3,), dilates=(4,))
