"""nnx.convert: layers of existing models exchanged, the function kept, and back again by fuse."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jaxtricks import _tree, weightstd

from tests import strangers
from tests.modules.test_fuse_layers import REFUSED, VALUES, own_promotion
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
    with pytest.raises(ValueError, match="'layers/0' is a OwnCall that overrides `__call__`"):
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
    paths = jt.nnx.checkpoint_paths(new)
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


# ---- a block's own normalizations are made like the one behind the convolution

EVERY_BLOCK = {
    **BLOCKS,
    "MobileOneBlock": functools.partial(jt.nnx.MobileOneBlock, num_branches=2),
    "DilatedReparamBlock": functools.partial(
        jt.nnx.DilatedReparamBlock, kernel_sizes=(2, 1), dilates=(1, 1), feature_group_count=1
    ),
}
NORMS = {"nnx": nnx.BatchNorm, "ours": jt.nnx.ExtendedBatchNorm}


class Pair(nnx.Module):
    """Convolutions and normalizations whose order as attributes says nothing."""

    def __init__(self, first, second, between=lambda x: x):
        self.conv1, self.conv2 = (CONV(4, 4, (3, 3), rngs=nnx.Rngs(i)) for i in range(2))
        self.norm2, self.norm1 = second, first
        self.between = between

    def __call__(self, x, *, train):
        mode = {"use_running_average": not train}
        x = self.norm1(self.between(self.conv1(x)), **mode)
        return self.norm2(self.conv2(x), **mode)


def norms(model):
    return [m for _, m in nnx.iter_graph(model) if isinstance(m, tuple(NORMS.values()))]


def seen(model, *names):
    return {tuple(getattr(norm, name) for name in names) for norm in norms(model)}


@pytest.mark.parametrize("mode", ["branches", "online"])
@pytest.mark.parametrize("block", sorted(EVERY_BLOCK))
def test_blocks_take_the_settings_of_the_normalization_behind(block, mode):
    """All blocks, both modes, both kinds of normalization behind and inside, with and without an example."""
    rng = np.random.default_rng(0)
    for behind, inside, example in itertools.product(NORMS, NORMS, (None, image(1, 6, 6, 4))):
        momentum, epsilon = map(float, rng.uniform(0.1, 0.9, 2))
        how = dict(momentum=momentum, epsilon=epsilon, param_dtype=jnp.bfloat16)
        pair = Pair(*(NORMS[behind](4, **how, rngs=nnx.Rngs(0)) for _ in range(2)))
        target = functools.partial(EVERY_BLOCK[block], conv=CONV, norm=NORMS[inside], mode=mode)
        convert = functools.partial(
            jt.nnx.convert, pair, rngs=nnx.Rngs(1), init="fresh", example=example
        )
        new = convert({"conv1": target}).conv1
        assert seen(new, *how) == {(momentum, epsilon, jnp.bfloat16)} and norms(new)
        # What is bound wins, alone or in part.
        bound = functools.partial(target, norm=functools.partial(NORMS[inside], momentum=0.25))
        assert seen(convert({nnx.Conv: bound}).conv2, *how) == {(0.25, epsilon, jnp.bfloat16)}


def test_which_normalization_is_behind():
    x = image(1, 6, 6, 4)
    make = lambda momentum, features=4: nnx.BatchNorm(features, momentum=momentum, rngs=nnx.Rngs(0))
    momenta = lambda model: {norm.momentum for norm in norms(model)}
    convert = functools.partial(jt.nnx.convert, rngs=nnx.Rngs(1), init="fresh")
    pair = Pair(make(0.7), make(0.8))
    # Two that differ, in any order: the trace knows, and nothing is guessed without it.
    new = convert(pair, {nnx.Conv: AC}, example=x)
    assert (momenta(new.conv1), momenta(new.conv2)) == ({0.7}, {0.8})
    words = r"'conv1'.*`momentum` 0.[78] and 0.[78]: give `example`.*functools\.partial"
    with pytest.raises(ValueError, match=words):
        convert(pair, {nnx.Conv: AC})
    norm = functools.partial(nnx.BatchNorm, momentum=0.6)
    assert momenta(convert(pair, {nnx.Conv: functools.partial(AC, norm=norm)}).conv1) == {0.6}
    # An activation between hides it from the trace; all that lie beside the convolution agree.
    hidden = Pair(make(0.7), make(0.7), nnx.relu)
    assert momenta(convert(hidden, {"conv1": AC}, example=x).conv1) == {0.7}
    # Those beside it and of its width go before others; without any, all of the model.
    plain = lambda: CONV(4, 4, (3, 3), rngs=nnx.Rngs(0))
    both = Outer(nnx.Sequential(plain(), make(0.3), make(0.4, 5)), make(0.5))
    new = convert(both, {r"near/layers/0": AC})
    assert momenta(new.near.layers[0]) == {0.3}
    alone = Outer(nnx.Sequential(plain()), make(0.5))
    assert momenta(convert(alone, {r"near/layers/0": AC}).near) == {0.5}
    # A model without normalizations: the block's defaults.
    assert momenta(convert(nnx.Sequential(plain()), {nnx.Conv: AC})) == {0.99}


class Outer(nnx.Module):
    def __init__(self, near, far):
        self.near, self.far = near, far


def test_nothing_of_a_convolution_is_lost_in_silence():
    """Every argument of nnx.Conv: the block's convolutions have it, or the layer is refused by name."""
    x = image(1, 6, 6, 4)
    handed = {"in_features", "out_features", "kernel_size", "rngs", "self"}
    handed |= {"kernel_init", "bias_init", "kernel_metadata", "bias_metadata"}  # of the start alone
    handed |= {"strides", "padding", "kernel_dilation", "use_bias"}  # of the block; see above
    for argument in set(inspect.signature(nnx.Conv.__init__).parameters) - handed:
        for value in VALUES[argument]:
            value = jnp.ones((3, 3, 4, 4)) if argument == "mask" else value
            model = nnx.Sequential(CONV(4, 4, (3, 3), **{argument: value}, rngs=nnx.Rngs(0)))
            convert = functools.partial(jt.nnx.convert, model, rngs=nnx.Rngs(1), init="fresh")
            try:
                new = convert({nnx.Conv: jt.nnx.ACBlock}).layers[0]
            except ValueError as error:
                assert argument in str(error) and argument in REFUSED | {"mask"}
                continue
            assert argument not in REFUSED | {"mask"}
            assert getattr(new.square.conv, argument) == value
            if argument != "feature_group_count":
                # Also where the convolution's author has said something else of it.
                target = functools.partial(jt.nnx.ACBlock, conv=CONV)
                new = convert({nnx.Conv: target}).layers[0]
                kept = getattr(new.square.conv, argument)
                assert kept == (value if argument != "conv_general_dilated" else kept)
            assert new(x.astype(jnp.float32)).shape == x.shape
    with pytest.raises(ValueError, match="preferred_element_type"):
        model = nnx.Sequential(CONV(4, 4, (3, 3), rngs=nnx.Rngs(0)))
        model.layers[0].preferred_element_type = jnp.float32
        jt.nnx.convert(model, {nnx.Conv: jt.nnx.WSConv}, rngs=nnx.Rngs(1), init="fresh")


@pytest.mark.parametrize(
    "hook",
    [
        {"dot_general": lambda *a, **k: 2 * jax.lax.dot_general(*a, **k)},
        {"promote_dtype": own_promotion},
    ],
)
def test_a_linear_layer_with_a_function_of_its_own_is_refused(hook):
    model = nnx.Sequential(nnx.Linear(4, 4, **hook, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"it has a custom `{next(iter(hook))}`"):
        jt.nnx.convert(model, {nnx.Linear: jt.nnx.LWSHead}, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_short_run_with_the_statistics_of_the_model():
    """The running statistics of a converted model keep up with a run as short as those of the plain one."""
    x = 2 + 3 * image(64, 6, 6, 4)
    make = lambda: nnx.BatchNorm(4, momentum=0.8, rngs=nnx.Rngs(0))
    new = jt.nnx.convert(Pair(make(), make()), {nnx.Conv: AC}, rngs=nnx.Rngs(1))
    for _ in range(40):
        y = new(x, train=True)
    np.testing.assert_allclose(new(x, train=False), y, atol=0.02)
