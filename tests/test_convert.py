"""nnx.convert: layers of existing models exchanged, the function kept, and back again by fuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtricks as jt
from jaxtricks import _tree, weightstd
from tests import strangers
from tests.strangers import trained

# The default initializer takes seconds to compile, for each shape.
CONV = functools.partial(nnx.Conv, kernel_init=nnx.initializers.uniform(0.2))
AC = functools.partial(jt.nnx.ACBlock, conv=CONV)
BLOCKS = {
    "ACBlock": jt.nnx.ACBlock,
    "RepVGGBlock": jt.nnx.RepVGGBlock,
    "DiverseBranchBlock": jt.nnx.DiverseBranchBlock,
}


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def resnet():
    x = image(1, 16, 16, 3)
    return trained(strangers.made(strangers.ResNet), x), x


def count(model, kind):
    return len({id(m) for _, m in nnx.iter_graph(model) if isinstance(m, kind)})


@pytest.mark.parametrize(
    "name",
    [n if n == "ACBlock" else pytest.param(n, marks=pytest.mark.slow) for n in sorted(BLOCKS)],
)
def test_blocks_keep_the_function_and_fuse_back(name):
    """A stranger's ResNet: converted, trained a little, fused; its 3x3 convolutions by their paths."""
    model, x = resnet()
    block = functools.partial(BLOCKS[name], conv=CONV)
    rules = {r"blocks/\d/conv1": block, nnx.BatchNorm: jt.nnx.ExtendedBatchNorm}
    new = jt.nnx.convert(model, rules, rngs=nnx.Rngs(1))
    assert count(new, BLOCKS[name]) == 4 and count(model, BLOCKS[name]) == 0
    np.testing.assert_allclose(new(x), model(x), atol=1e-5)
    before = new(x)
    trained(new, x, steps=1)
    assert np.abs(new(x) - before).max() > 1e-4
    plain, report = jt.nnx.fuse(new, example=x)
    assert count(plain, nnx.Conv) == count(model, nnx.Conv) and not report.kept
    branches = {row.branches for row in report.layers if row.layer.endswith("/conv1")}
    assert branches <= {2, 3, 4} and branches
    np.testing.assert_allclose(plain(x), new(x), atol=1e-5)


def test_types_that_stand_for_layers_in_containers():
    x = image(1, 6, 6, 4)
    model = trained(strangers.Shared(rngs=nnx.Rngs(0)), x)
    new = jt.nnx.convert(model, {nnx.Conv: AC}, rngs=nnx.Rngs(1))
    assert new.one is new.same is new.parts["pair"][0]
    assert type(new.parts["list"][0]) is type(new.one) is jt.nnx.ACBlock
    assert new.parts["list"][1] is nnx.relu
    np.testing.assert_allclose(new(x), model(x), atol=1e-5)


def test_train_and_eval_mode_stay():
    model, _ = resnet()
    rules = {nnx.BatchNorm: jt.nnx.ExtendedBatchNorm, r"conv_init": AC}
    new = jt.nnx.convert(model, rules, rngs=nnx.Rngs(0))
    assert new.bn_init.use_running_average and new.conv_init.square.norm.use_running_average
    fresh = strangers.made(strangers.ResNet)
    new = jt.nnx.convert(fresh, rules, rngs=nnx.Rngs(0))
    assert not new.bn_init.use_running_average
    assert (new.bn_init.momentum, new.bn_init.epsilon) == (0.9, 1e-5)


def test_settings_go_over_and_bound_ones_win():
    model = nnx.Sequential(
        nnx.Conv(
            4, 6, (3, 5), strides=(2, 1), padding=((1, 1), (2, 2)), feature_group_count=2,
            kernel_dilation=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    target = functools.partial(jt.nnx.WSConv, preset="qiao", use_bias=False)
    conv = jt.nnx.convert(model, {nnx.Conv: target}, rngs=nnx.Rngs(1), init="fresh").layers[0]
    assert (conv.preset, conv.strides, conv.kernel_dilation) == ("qiao", (2, 1), 2)
    assert conv.bias is None and conv.dtype == conv.kernel[...].dtype == jnp.bfloat16
    norm = functools.partial(jt.nnx.ExtendedBatchNorm, variance="grand")
    block = functools.partial(jt.nnx.ACBlock, norm=norm)
    made = jt.nnx.convert(model, {nnx.Conv: block}, rngs=nnx.Rngs(1)).layers[0]
    assert made.square.norm.variance == "grand" and made.square.conv.dtype == jnp.bfloat16


def test_standardized_filters_go_over_others_are_refused():
    x = image(2, 6, 6, 4)
    model, _ = resnet()
    with pytest.raises(ValueError, match=r"\(Conv\): standardizing would remove the means"):
        jt.nnx.convert(model, {nnx.Conv: jt.nnx.WSConv}, rngs=nnx.Rngs(0))
    hook = weightstd.standardized(preset="bit", gain=1.5)
    own = nnx.Sequential(nnx.Conv(4, 4, (3, 3), conv_general_dilated=hook, rngs=nnx.Rngs(0)))
    for preset in ("nfnet", "qiao"):
        target = functools.partial(jt.nnx.WSConv, preset=preset)
        new = jt.nnx.convert(own, {nnx.Conv: target}, rngs=nnx.Rngs(1))
        np.testing.assert_allclose(new(x), own(x), atol=1e-4)


def test_extended_norm_keeps_every_channel():
    norm = nnx.BatchNorm(5, epsilon=1e-2, use_scale=False, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    norm.mean[...] = jnp.asarray(rng.normal(size=5), jnp.float32)
    norm.var[...] = jnp.asarray(rng.uniform(0.01, 10, 5), jnp.float32)
    norm.eval()
    new = jt.nnx.convert(norm, {nnx.BatchNorm: jt.nnx.ExtendedBatchNorm}, rngs=nnx.Rngs(0))
    x = image(3, 5)
    np.testing.assert_allclose(new(x), norm(x), rtol=1e-5, atol=1e-5)
    assert new.var[...].shape == ()


# ---- rules


class OwnCall(nnx.Conv):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OwnDefaults(nnx.Conv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, use_bias=False, **kwargs)


def test_subclasses():
    """Those with a call of their own are never exchanged by accident."""
    make = lambda kind: nnx.Sequential(kind(4, 4, (3, 3), rngs=nnx.Rngs(0)))
    own, x = make(OwnCall), image(1, 6, 6, 4)
    with pytest.raises(ValueError, match="'layers/0' is a OwnCall with a `__call__` of its own"):
        jt.nnx.convert(own, {nnx.Conv: AC}, rngs=nnx.Rngs(0))
    kept = jt.nnx.convert(own, {OwnCall: None}, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(kept(x), own(x))
    named = jt.nnx.convert(own, {OwnCall: AC}, rngs=nnx.Rngs(0), init="fresh")
    assert count(named, jt.nnx.ACBlock) == 1
    new = jt.nnx.convert(make(OwnDefaults), {nnx.Conv: AC}, rngs=nnx.Rngs(0))
    assert count(new, jt.nnx.ACBlock) == 1


def test_the_first_rule_decides_and_blocks_are_left_alone():
    model, _ = resnet()
    rules = {r"conv_init": None, r".*/conv1": AC, nnx.Conv: jt.nnx.RepVGGBlock}
    new = jt.nnx.convert(model, rules, rngs=nnx.Rngs(0), init="fresh")
    assert type(new.conv_init) is nnx.Conv and count(new, jt.nnx.ACBlock) == 4
    again = jt.nnx.convert(new, {r"conv_init": AC}, rngs=nnx.Rngs(0))
    assert count(again, jt.nnx.ACBlock) == 5
    with pytest.raises(ValueError, match="the rule Conv decides no layer"):
        jt.nnx.convert(again, {nnx.Conv: AC}, rngs=nnx.Rngs(0))


MISTAKES = [
    ({r"block/conv1": AC}, "the rule 'block/conv1' decides no layer"),
    ({nnx.Conv: None, r"conv_init": AC}, "'conv_init' decides no layer.*earlier rules"),
    ({nnx.GroupNorm: jt.nnx.ExtendedBatchNorm}, "GroupNorm decides no layer"),
    ({nnx.Linear: AC}, r"'head' \(Linear\): only nnx.Conv"),
    (
        {nnx.BatchNorm: functools.partial(nnx.GroupNorm, num_groups=2)},
        "GroupNorm could compute.*'fresh'",
    ),
    ({r"conv_init": jt.nnx.ExtendedBatchNorm}, "'conv_init'.*num_features"),
]


@pytest.mark.parametrize(("rules", "words"), MISTAKES)
def test_mistakes_name_the_layer_or_the_rule(rules, words):
    with pytest.raises(ValueError, match=words):
        jt.nnx.convert(resnet()[0], rules, rngs=nnx.Rngs(0))


def test_other_targets_begin_anew():
    model, x = resnet()
    groups = functools.partial(nnx.GroupNorm, num_groups=2)
    new = jt.nnx.convert(model, {nnx.BatchNorm: groups}, rngs=nnx.Rngs(0), init="fresh")
    assert count(new, nnx.GroupNorm) == 15 and new(x).shape == (1, 5)
    with pytest.raises(Exception, match="init"):
        jt.nnx.convert(model, {nnx.BatchNorm: groups}, rngs=nnx.Rngs(0), init="keep")


def test_stacked_and_padded_layers_are_refused():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Conv(4, 4, (3, 3), rngs=rngs)

    with pytest.raises(ValueError, match="'layers/0' .*stacked"):
        jt.nnx.convert(nnx.Sequential(make(nnx.Rngs(0))), {nnx.Conv: AC}, rngs=nnx.Rngs(0))
    circular = nnx.Sequential(nnx.Conv(4, 4, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'layers/0'.*CIRCULAR"):
        jt.nnx.convert(circular, {nnx.Conv: AC}, rngs=nnx.Rngs(0))


# ---- checkpoints and optimizers of the plain model


def test_path_map_of_a_plain_checkpoint():
    model, _ = resnet()
    rules = {r".*conv1": AC, nnx.BatchNorm: jt.nnx.ExtendedBatchNorm}
    new = jt.nnx.convert(model, rules, rngs=nnx.Rngs(0), init="fresh")
    paths = jt.nnx.plain_paths(new)
    plain = _tree.by_path(nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    there = _tree.by_path(nnx.to_pure_dict(nnx.state(new, (nnx.Param, nnx.BatchStat))))
    assert paths["blocks/0/conv1/kernel"] == "blocks/0/conv1/square/conv/kernel"
    assert set(paths) <= set(plain) and set(paths.values()) <= set(there)
    assert all(plain[a].shape == there[b].shape for a, b in paths.items())
    # What has no place: one variance a channel.
    assert {path.rsplit("/", 1)[1] for path in set(plain) - set(paths)} == {"var"}


def test_an_optimizer_of_the_plain_model_says_rebuild_it():
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)))
    new = jt.nnx.convert(model, {nnx.Conv: AC}, rngs=nnx.Rngs(0))
    for tx in (jt.memopt.adafactor(1e-2), jt.memopt.sm3(1e-2)):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 4, 4, 4)))))(new)
        with pytest.raises(ValueError, match="rebuild"):
            optimizer.update(new, grads)
