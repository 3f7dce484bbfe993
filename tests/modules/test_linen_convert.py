"""linen.convert: layers of existing modules exchanged, the function preserved, and back by fuse."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from jaxtricks import _tree, weightstd

from tests import strangers
from tests.modules.test_linen_fuse import trained

STATS = ["batch_stats"]
KEY = jax.random.key(1)
# The default initializer takes seconds to compile, for each shape.
CONV = functools.partial(nn.Conv, kernel_init=nn.initializers.uniform(0.2))
AC = functools.partial(jt.linen.ACBlock, conv=CONV)
BLOCKS = {
    "ACBlock": jt.linen.ACBlock,
    "RepVGGBlock": jt.linen.RepVGGBlock,
    "DiverseBranchBlock": jt.linen.DiverseBranchBlock,
    "MobileOneBlock": functools.partial(jt.linen.MobileOneBlock, num_branches=2),
    "DilatedReparamBlock": functools.partial(
        jt.linen.DilatedReparamBlock, kernel_sizes=(2, 1), dilates=(1, 1), feature_group_count=1
    ),
}


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def resnet():
    module, x = strangers.LinenResNet(), image(1, 16, 16, 3)
    return module, trained(module, x), x


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tol * max(1, np.abs(b).max()))


class Pair(nn.Module):
    """Two convolutions, each with its normalization."""

    momenta: tuple = (0.7, 0.8)
    conv: object = CONV
    between: object = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, x, train: bool = False):
        for i, momentum in enumerate(self.momenta):
            norm = nn.BatchNorm(use_running_average=not train, momentum=momentum, name=f"norm{i}")
            x = norm(self.between(self.conv(4, (3, 3), name=f"conv{i}")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@functools.cache
def pair():
    module, x = Pair(), image(2, 6, 6, 4)
    return module, trained(module, x), x


@pytest.mark.parametrize("mode", ["branches", "online"])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks_preserve_the_function_train_and_fuse_back(name, mode):
    module, variables, x = pair()
    block = functools.partial(BLOCKS[name], conv=CONV, mode=mode)
    rules = {r"conv\d": block, nn.BatchNorm: jt.linen.ExtendedBatchNorm}
    new, new_variables = jt.linen.convert(module, variables, rules, key=KEY, example=x)
    y = module.apply(variables, x)
    close(new.apply(new_variables, x), y)
    close(jax.jit(new.apply)(new_variables, x), y)
    # A step of training moves the statistics of all normalizations, and nothing else.
    _, moved = new.apply(new_variables, x, train=True, mutable=STATS)
    assert jax.tree.structure(moved["batch_stats"]) == jax.tree.structure(
        new_variables["batch_stats"]
    )
    for path, old in _tree.leaves_with_paths(new_variables["batch_stats"]):
        assert np.any(_tree.by_path(moved["batch_stats"])[path] != old), path
    new_variables = {**new_variables, **moved}
    fused, small, report = jt.linen.fuse(new, new_variables, example=x)
    assert {row.layer for row in report.layers} == {"conv0", "conv1"} and not report.kept
    assert set(small) == {"params"} and set(small["params"]["conv0"]) == {"kernel", "bias"}
    close(fused.apply(small, x), new.apply(new_variables, x))


def test_a_stranger_resnet():
    module, variables, x = resnet()
    rules = {r"ResNetBlock_\d/Conv_0": AC, nn.BatchNorm: jt.linen.ExtendedBatchNorm}
    names = _tree.by_path(variables["params"])
    rules = rules if any("ResNetBlock" in n for n in names) else {nn.BatchNorm: rules.popitem()[1]}
    new, new_variables = jt.linen.convert(
        module, variables, rules, key=KEY, example=x, example_kwargs={"train": False}
    )
    close(new.apply(new_variables, x, train=False), module.apply(variables, x, train=False))
    stats = _tree.by_path(new_variables["batch_stats"])
    assert {leaf.ndim for path, leaf in stats.items() if path.endswith("/var")} <= {0, 1}
    apply, params, state = jt.linen.functional(new, new_variables)
    _, moved = apply(params, state, x, train=True)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    again, same = apply(params, state, x, train=False)
    close(again, module.apply(variables, x, train=False))
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_it_is_a_module_like_any_other():
    """Initialized, differentiated, with roles, converted again, and part of another module."""
    module, variables, x = pair()
    new, new_variables = jt.linen.convert(
        module, variables, {"conv0": AC}, key=KEY, example=x, init="fresh"
    )
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(jax.eval_shape(new.init, KEY, x)) == shapes(new_variables)
    gradients = jax.grad(
        lambda params: new.apply({**new_variables, "params": params}, x, train=True, mutable=STATS)[
            0
        ].sum()
    )(new_variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    rule = jt.linen.roles(new, x)
    assert rule("conv0/vertical/conv/kernel", (3, 1, 4, 4)) == ("in", "in", "in", "out")
    twice, twice_variables = jt.linen.convert(new, new_variables, {"conv1": AC}, key=KEY, example=x)
    close(twice.apply(twice_variables, x), new.apply(new_variables, x))
    assert set(twice.layers) == {"conv0", "conv1"}

    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.inner(x) + self.inner(x)

    outer = Outer(new)
    nested = {name: {"inner": tree} for name, tree in new_variables.items()}
    close(outer.apply(nested, x), 2 * new.apply(new_variables, x))
    assert shapes(jax.eval_shape(outer.init, KEY, x)) == shapes(nested)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = CONV(4, (3, 3), name="conv")
        x = conv(nn.relu(conv(x)))
        return nn.remat(CONV.func)(4, (3, 3), name="remat")(x)


def test_shared_and_rematerialized_layers_stay_so():
    x = image(1, 6, 6, 4)
    variables = Shared().init(KEY, x)
    new, new_variables = jt.linen.convert(Shared(), variables, {nn.Conv: AC}, key=KEY, example=x)
    assert set(new_variables["params"]) == {"conv", "remat"}
    close(new.apply(new_variables, x), Shared().apply(variables, x))


class Mutable(nn.Module):
    """Without flags: it trains where its statistics are mutable."""

    @nn.compact
    def __call__(self, x):
        evaluates = not self.is_mutable_collection("batch_stats")
        return nn.BatchNorm(use_running_average=evaluates)(CONV(4, (3, 3), name="conv")(x))


def test_blocks_train_where_the_module_around_them_does():
    x = image(4, 6, 6, 4)
    variables = trained(Mutable(), x)
    new, new_variables = jt.linen.convert(Mutable(), variables, {"conv": AC}, key=KEY, example=x)
    apply, params, state = jt.linen.functional(new, new_variables)
    _, moved = apply(params, state, x, train=True)
    old = state["batch_stats"]["conv"]["square"]["norm"]["mean"]
    assert np.any(moved["batch_stats"]["conv"]["square"]["norm"]["mean"] != old)
    close(apply(params, state, x, train=False)[0], Mutable().apply(variables, x))
    # A bound setting takes precedence.
    frozen = functools.partial(AC, use_running_average=True)
    new, new_variables = jt.linen.convert(
        Mutable(), variables, {"conv": frozen}, key=KEY, example=x
    )
    _, moved = new.apply(new_variables, x, mutable=STATS)
    jax.tree.map(
        np.testing.assert_array_equal,
        moved["batch_stats"]["conv"],
        new_variables["batch_stats"]["conv"],
    )


def test_settings_of_the_normalization_behind():
    module, variables, x = pair()
    convert = functools.partial(
        jt.linen.convert, module, variables, key=KEY, example=x, init="fresh"
    )
    new, _ = convert({nn.Conv: AC})
    momenta = {path: layer.norm.keywords["momentum"] for path, layer in new.layers.items()}
    assert momenta == {"conv0": 0.7, "conv1": 0.8}
    norm = functools.partial(nn.BatchNorm, momentum=0.6)
    new, _ = convert({"conv0": functools.partial(AC, norm=norm)})
    assert new.layers["conv0"].norm.keywords["momentum"] == 0.6
    hidden = Pair(between=nn.relu)
    with pytest.raises(ValueError, match=r"'conv0'.*`momentum` 0\.[78] and 0\.[78]"):
        jt.linen.convert(hidden, variables, {"conv0": AC}, key=KEY, example=x)


def test_heads_and_standardized_filters():
    module, variables, x = pair()
    for head in (jt.linen.LWSHead, jt.linen.DisAlignHead):
        new, new_variables = jt.linen.convert(
            module, variables, {nn.Dense: head}, key=KEY, example=x
        )
        close(new.apply(new_variables, x), module.apply(variables, x))
        assert len(new_variables["params"]["head"]) > 2
    with pytest.raises(ValueError, match=r"'conv0' \(Conv\): standardizing would remove the means"):
        jt.linen.convert(module, variables, {nn.Conv: jt.linen.WSConv}, key=KEY, example=x)
    hooked = Pair(
        conv=functools.partial(CONV, conv_general_dilated=weightstd.standardized(gain=1.5))
    )
    target = functools.partial(jt.linen.WSConv, preset="qiao", use_bias=True)
    new, new_variables = jt.linen.convert(hooked, variables, {nn.Conv: target}, key=KEY, example=x)
    close(new.apply(new_variables, x), hooked.apply(variables, x), 1e-4)


class OwnCall(nn.Conv):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_rules():
    module, variables, x = pair()
    convert = functools.partial(
        jt.linen.convert, module, variables, key=KEY, example=x, init="fresh"
    )
    new, _ = convert({"conv0": None, nn.Conv: AC})
    assert set(new.layers) == {"conv1"}
    mistakes = [
        ({r"block/conv1": AC}, "the rule 'block/conv1' decides no layer"),
        ({nn.Conv: None, "conv0": AC}, "'conv0' decides no layer.*earlier rules"),
        ({nn.GroupNorm: jt.linen.ExtendedBatchNorm}, "GroupNorm decides no layer"),
        ({nn.Dense: AC}, r"'head' \(Dense\): only nn.Conv"),
    ]
    for rules, words in mistakes:
        with pytest.raises(ValueError, match=words):
            convert(rules)
    with pytest.raises(ValueError, match="GroupNorm could compute.*'fresh'"):
        groups = functools.partial(nn.GroupNorm, num_groups=2)
        jt.linen.convert(module, variables, {nn.BatchNorm: groups}, key=KEY, example=x)
    with pytest.raises(Exception, match="init"):
        jt.linen.convert(module, variables, {nn.Conv: AC}, key=KEY, example=x, init="keep")
    own = nn.Sequential([OwnCall(4, (3, 3))])
    own_variables = own.init(KEY, x)
    with pytest.raises(ValueError, match="is a OwnCall that overrides `__call__`"):
        jt.linen.convert(own, own_variables, {nn.Conv: AC}, key=KEY, example=x)
    new, _ = jt.linen.convert(own, own_variables, {OwnCall: AC}, key=KEY, example=x, init="fresh")
    assert set(new.layers) == {"layers_0"}
    # Layers inside blocks are left alone.
    block = jt.linen.ACBlock(4, (3, 3))
    with pytest.raises(ValueError, match="the rule Conv decides no layer"):
        jt.linen.convert(
            block,
            block.init(KEY, x, use_running_average=True),
            {nn.Conv: AC},
            key=KEY,
            example=x,
        )


def test_stacked_and_padded_layers_are_refused():
    x = image(1, 6, 6, 4)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda conv, x, _: (conv(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scan(CONV(4, (3, 3), name="conv"), x, None)[0]

    for module, words in (
        (Stack(), "'conv' .*stacked"),
        (nn.Sequential([CONV(4, (3, 3), padding="CIRCULAR")]), "'layers_0'.*CIRCULAR"),
    ):
        with pytest.raises(ValueError, match=words):
            jt.linen.convert(module, module.init(KEY, x), {nn.Conv: AC}, key=KEY, example=x)
