"""linen.fuse: the same as nnx.fuse, for modules that make their layers while they are called."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from jaxtricks import _tree, weightstd

from tests import strangers

STATS = ["batch_stats"]


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def trained(module, x, **flags):
    """Variables after two training steps, parameters drawn here."""
    variables = jax.eval_shape(functools.partial(module.init, **flags), jax.random.key(0), x)
    rng = np.random.default_rng(0)
    fill = lambda s: jnp.asarray(1 + 0.3 * rng.normal(size=s.shape), s.dtype)
    variables = {"batch_stats": {}, **jax.tree.map(fill, variables)}
    step = jax.jit(lambda v, x: module.apply(v, x, mutable=STATS, **flags)[1])
    for i in range(2):
        variables = {**variables, **step(variables, x + i)}
    return variables


def same(module, variables, example, where=None, **flags):
    """The fused module, compared on another input, jitted."""
    fused, small, report = jt.linen.fuse(module, variables, example=example, path_filter=where)
    x = example[0] if isinstance(example, tuple) else example
    y = image(*x.shape, seed=3)
    expected = module.apply(variables, y, **flags)
    got = jax.jit(lambda v, y: fused.apply(v, y, **flags))(small, y)
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()))
    return fused, small, report


def test_a_stranger_resnet():
    module, x = strangers.LinenResNet(), image(2, 16, 16, 3)
    variables = trained(module, x)
    _, small, report = same(module, variables, x, train=False)
    assert len(report.layers) == 7 and not report.kept and set(small) == {"params"}
    shapes = {p: a.shape for p, a in _tree.leaves_with_paths(small["params"])}
    assert shapes["conv_init/kernel"] == (7, 7, 3, 6) and shapes["conv_init/bias"] == (6,)
    assert not any("norm" in path.lower() for path in shapes)
    assert report.model.params_after == sum(a.size for a in jax.tree.leaves(small))
    apply, params, state = jt.linen.functional(*jt.linen.fuse(module, variables, example=x)[:2])
    np.testing.assert_allclose(
        apply(params, state, x, train=False)[0],
        module.apply(variables, x, train=False),
        rtol=1e-4,
        atol=1e-5,
    )


def test_part_of_a_module():
    module, x = strangers.LinenResNet(), image(1, 16, 16, 3)
    variables = trained(module, x)
    where = lambda path: path in ("conv_init", "norm_proj_1")
    _, small, report = same(module, variables, x, where=where, train=False)
    assert {row.layer for row in report.layers} == {"conv_init", "conv_proj_1"}
    assert "BatchNorm_0" in small["batch_stats"] and "bn_init" not in small["batch_stats"]


LAYERS = {
    "WSConv": lambda: jt.linen.WSConv(4, (3, 3), strides=2, use_bias=True, preset="timm"),
    "hook": lambda: nn.Conv(
        4, (3, 3), padding="CIRCULAR", conv_general_dilated=weightstd.standardized()
    ),
    "ACBlock": lambda: jt.linen.ACBlock(
        6, (3, 5), strides=(2, 1), norm=functools.partial(nn.BatchNorm, epsilon=1e-3)
    ),
    "ACBlock, ours": lambda: jt.linen.ACBlock(
        4, (3, 3), kernel_dilation=2, conv=jt.linen.WSConv, norm=jt.linen.ExtendedBatchNorm
    ),
    "RepVGGBlock": lambda: jt.linen.RepVGGBlock(3, norm=jt.linen.ExtendedBatchNorm),
    "DiverseBranchBlock": lambda: jt.linen.DiverseBranchBlock(4, (3, 3)),
    "MobileOneBlock": lambda: jt.linen.MobileOneBlock(4, num_branches=2),
    "DilatedReparamBlock": lambda: jt.linen.DilatedReparamBlock(
        4, (5, 5), feature_group_count=1, norm=jt.linen.ExtendedBatchNorm
    ),
    "RepVGGBlock, online": lambda: jt.linen.RepVGGBlock(3, mode="online"),
}


class Inside(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x, train: bool = True):
        is_block = hasattr(self.layer, "use_running_average")
        flags = {"use_running_average": not train} if is_block else {}
        y = nn.relu(self.layer(x, **flags))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(2, (3, 3))(y))
        return nn.Dense(3)(y.mean((1, 2)))


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers(name):
    module, x = Inside(LAYERS[name]()), image(2, 7, 8, 3)
    variables = trained(module, x)
    _, small, report = same(module, variables, x, train=False)
    assert {row.layer for row in report.layers} == {"layer", "Conv_0"}
    assert set(small["params"]["layer"]) == {"kernel", "bias"} and set(small) == {"params"}


def test_a_block_itself_and_a_missing_example():
    block, x = jt.linen.ACBlock(4, (3, 3)), image(2, 6, 6, 3)
    variables = trained(block, x, use_running_average=False)
    evaluate = jt.linen.ACBlock(4, (3, 3), use_running_average=True)
    _, small, _ = same(evaluate, variables, x)
    assert {p: a.shape for p, a in _tree.leaves_with_paths(small)} == {
        "params/bias": (4,),
        "params/kernel": (3, 3, 3, 4),
    }
    with pytest.raises(ValueError, match="`example` is missing"):
        jt.linen.fuse(evaluate, variables)


class Odd(nn.Module):
    """What does not fold."""

    kind: str

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = nn.BatchNorm(use_running_average=not train)
        if self.kind == "activation":
            return norm(nn.relu(nn.Conv(3, (3, 3))(x)))
        conv = nn.Conv(3, (3, 3))
        y = conv(conv(x)) if self.kind == "twice" else conv(x)
        return norm(y) + y if self.kind == "skip" else norm(y)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("activation", "'BatchNorm_0' normalizes is not the output of one convolution"),
        ("twice", "'Conv_0' is called 2 times"),
        ("skip", "'Conv_0' has an output that is used by more than 'BatchNorm_0'"),
    ],
)
def test_what_does_not_fold_is_refused_by_name(kind, words):
    module, x = Odd(kind), image(2, 6, 6, 3)
    with pytest.raises(ValueError, match=f"linen.fuse: nothing can be fused: .*{words}"):
        jt.linen.fuse(module, trained(module, x), example=x)


def test_training_mode_and_untouched_statistics_are_refused():
    class Fixed(nn.Module):
        evaluates: bool

        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=self.evaluates)(nn.Conv(3, (3, 3))(x))

    x = image(1, 6, 6, 3)
    variables = Fixed(True).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="'BatchNorm_0' were never updated"):
        jt.linen.fuse(Fixed(True), variables, example=x)
    with pytest.raises(ValueError, match="'BatchNorm_0' is in training mode"):
        jt.linen.fuse(Fixed(False), variables, example=x)


def test_a_block_in_sixteen_bits_gives_what_it_gave():
    """Its normalizations give float32, and so does the convolution that stands for it."""
    conv = functools.partial(nn.Conv, dtype=jnp.bfloat16)
    block, x = jt.linen.ACBlock(4, (3, 3), conv=conv), image(2, 6, 6, 3).astype(jnp.bfloat16)
    variables = trained(block, x, use_running_average=False)
    fused, small, _ = jt.linen.fuse(block, variables, example=x)
    y, z = block.apply(variables, x, use_running_average=True), fused.apply(small, x)
    assert y.dtype == z.dtype == jnp.float32
    np.testing.assert_allclose(z, y, atol=0.1)
