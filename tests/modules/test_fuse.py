"""nnx.fuse: plain convolutions in place of blocks, standardized kernels and normalizations."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import nnx
from jax import export
from jaxtricks import _tree, weightstd

from tests import strangers
from tests.strangers import trained

SHAPES = {"CNN": (2, 8, 8, 1), "ResNet": (1, 16, 16, 3), "PreActivation": (2, 8, 8, 3)}


def image(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def stranger(name):
    x = image(*SHAPES[name])
    model = trained(strangers.made(getattr(strangers, name)), x)
    return model, x


class Chain(nnx.Module):
    """layers one after the other; functions among them."""

    def __init__(self, *layers):
        self.layers = nnx.data(list(layers))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def conv(ins=4, outs=4, **how):
    return nnx.Conv(ins, outs, (3, 3), rngs=nnx.Rngs(1), **how)


def norm(features=4, **how):
    return nnx.BatchNorm(features, rngs=nnx.Rngs(2), **how)


def types(model):
    return {type(m).__name__ for _, m in nnx.iter_graph(model) if isinstance(m, nnx.Module)}


# ---- models of others


@pytest.mark.parametrize(
    ("name", "fused", "kept"), [("CNN", 2, 0), ("ResNet", 15, 0), ("PreActivation", 1, 1)]
)
def test_convolutions_take_up_their_normalizations(name, fused, kept):
    model, x = stranger(name)
    before = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    plain, report = jt.nnx.fuse(model, example=x)
    assert len(report.layers) == fused and len(report.kept) == kept
    # Another input than the example, jitted.
    y = image(*x.shape, seed=1)
    np.testing.assert_allclose(nnx.jit(lambda m, y: m(y))(plain, y), model(y), atol=2e-6)
    left = [m for _, m in nnx.iter_graph(plain) if isinstance(m, nnx.BatchNorm)]
    assert len(left) == kept
    after = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_report_of_a_model():
    model, x = stranger("CNN")
    plain, report = jt.nnx.fuse(model, example=x)
    first = report.layers[0]
    assert (first.layer, first.branches) == ("conv1", 1)
    assert 0 < first.max_error <= first.bound and 0 < first.ratio <= 1
    # 3x3x1x8 and a bias, and four vectors of the normalization.
    assert (first.params_before, first.params_after) == (80 + 32, 80)
    assert first.flops_after == 2 * 9 * 8 * 2 * 64 + 8 * 2 * 64 < first.flops_before
    whole = report.model
    assert whole.params_after == sum(p.size for p in jax.tree.leaves(nnx.state(plain, nnx.Param)))
    assert whole.max_error <= whole.bound < 1e-4 and whole.flops_after < whole.flops_before
    text = str(report)
    assert "conv2" in text and "the model" in text and "bound" in text


def test_without_an_example_normalizations_are_never_folded():
    with pytest.raises(ValueError, match="batch_norm1: without `example`"):
        jt.nnx.fuse(stranger("CNN")[0])
    model = trained(Chain(jt.nnx.WSConv(4, 4, (3, 3), rngs=nnx.Rngs(0)), norm()), image(2, 6, 6, 4))
    plain, report = jt.nnx.fuse(model)
    assert [row.layer for row in report.layers] == ["layers/0"] and report.model is None
    assert report.kept[0][0] == "layers/1" and types(plain) == {"Chain", "Conv", "BatchNorm"}
    same = jt.nnx.fuse(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))[1]
    assert same == ((), None, ())


# ---- what does not fold, by name


REFUSED = {
    "an activation between": (
        lambda: Chain(conv(), nnx.relu, norm()),
        "layers/2.*not the output of one",
    ),
    "normalization first": (
        lambda: Chain(norm(), nnx.relu, conv()),
        "layers/0.*not the output of one",
    ),
    "a convolution used twice": (lambda: Twice(), "'conv' is called 2 times"),
    "an output used twice": (
        lambda: Skip(),
        "'conv' has an output that is used by more than 'norm'",
    ),
    "two convolutions": (lambda: Either(), "'norm' normalizes is not the output of one"),
    "another axis": (lambda: Chain(conv(outs=6), norm(6, axis=1)), "normalizes axis 1"),
    "an unknown convolution": (
        lambda: Chain(
            conv(conv_general_dilated=lambda *a, **k: jax.lax.conv_general_dilated(*a, **k)), norm()
        ),
        "not known",
    ),
}


class Twice(nnx.Module):
    def __init__(self):
        self.conv, self.norm, self.other = conv(), norm(), norm()

    def __call__(self, x):
        return self.other(self.conv(self.norm(self.conv(x))))


class Skip(nnx.Module):
    def __init__(self):
        self.conv, self.norm = conv(), norm()

    def __call__(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class Either(nnx.Module):
    def __init__(self):
        self.conv, self.second, self.norm = conv(), conv(), norm()

    def __call__(self, x):
        return self.norm(self.conv(x)) + self.norm(self.second(x))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_fold_is_refused_by_name(name):
    make, words = REFUSED[name]
    x = image(2, 6, 6, 4)
    model = trained(make(), x)
    with pytest.raises(ValueError, match=f"nothing can be fused: .*{words}"):
        jt.nnx.fuse(model, example=x)
    # Beside something that folds it is kept, and the function is the same.
    both = Chain(conv(), norm(), model)
    trained(both, x)
    plain, report = jt.nnx.fuse(both, example=x)
    assert {row.layer for row in report.layers} == {"layers/0"} and len(report.kept) >= 1
    np.testing.assert_allclose(plain(x), both(x), atol=1e-5)


def test_a_shared_convolution_is_refused_by_name():
    x = image(1, 6, 6, 4)
    model = trained(strangers.Shared(rngs=nnx.Rngs(0)), x)
    with pytest.raises(ValueError, match="'one' is called 3 times"):
        jt.nnx.fuse(model, example=x)


def test_a_pair_that_is_used_twice_folds_once():
    """Shared weights are no obstacle where convolution and normalization always go together."""

    class Recurrent(nnx.Module):
        def __init__(self):
            self.conv, self.norm = conv(), norm()

        def __call__(self, x):
            for _ in range(3):
                x = nnx.relu(self.norm(self.conv(x)))
            return x

    x = image(2, 6, 6, 4)
    model = trained(Recurrent(), x)
    plain, report = jt.nnx.fuse(model, example=x)
    assert len(report.layers) == 1 and report.layers[0].max_error > 0
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)


@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit, lambda f: f])
def test_the_trace_is_read_through_transformations(wrap):
    class Wrapped(nnx.Module):
        def __init__(self):
            self.conv, self.norm, self.out = conv(), norm(), conv()

        def __call__(self, x, double=False):
            y = wrap(lambda m, x: m.conv(x))(self, x)
            y = self.out(wrap(lambda m, y: jax.nn.silu(m.norm(y)))(self, y))
            return 2 * y if double else y

    x = image(2, 6, 6, 4)
    model = trained(Wrapped(), x)
    plain, report = jt.nnx.fuse(model, example=(x, True))
    assert [row.layer for row in report.layers] == ["conv"]
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)


# ---- every kind of convolution


KINDS = {
    "strided": dict(strides=2),
    "explicit": dict(padding=((2, 0), (0, 1)), strides=(1, 2)),
    "circular": dict(padding="CIRCULAR"),
    "reflect": dict(padding="REFLECT", kernel_dilation=2),
    "grouped, no bias": dict(feature_group_count=2, use_bias=False),
    "depthwise": dict(feature_group_count=4),
    "masked": dict(mask=jnp.ones((3, 3, 4, 4)).at[0].set(0)),
    "standardized": dict(conv_general_dilated=weightstd.standardized(preset="bit")),
    "None": dict(strides=None, kernel_dilation=None),
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_convolutions_of_every_kind(name):
    x = image(2, 7, 8, 4)
    model = trained(Chain(conv(**KINDS[name]), norm(epsilon=1e-2, use_bias=name != "strided")), x)
    plain, _ = jt.nnx.fuse(model, example=x)
    assert type(plain.layers[0]) is nnx.Conv and "BatchNorm" not in types(plain)
    assert plain.layers[0].conv_general_dilated is jax.lax.conv_general_dilated
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)
    assert not nnx.to_flat_state(nnx.state(plain, nnx.BatchStat))


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    x = image(2, *(6,) * rank, 3)
    layer = nnx.Conv(3, 4, (3,) * rank, rngs=nnx.Rngs(0))
    model = trained(Chain(layer, jt.nnx.ExtendedBatchNorm(4, rngs=nnx.Rngs(0))), x)
    plain, _ = jt.nnx.fuse(model, example=x)
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype):
    x = image(2, 6, 6, 4).astype(dtype)
    block = jt.nnx.ACBlock(
        4,
        4,
        (3, 3),
        conv=functools.partial(nnx.Conv, dtype=dtype),
        norm=jt.nnx.ExtendedBatchNorm,
        rngs=nnx.Rngs(0),
    )
    model = trained(Chain(block, nnx.relu, conv(dtype=dtype), norm()), x)
    plain, report = jt.nnx.fuse(model, example=x)
    assert plain.layers[0].dtype == dtype
    if "preferred_element_type" in inspect.signature(nnx.Conv.__init__).parameters:
        assert plain.layers[0](x).dtype == block(x).dtype == jnp.float32
    assert report.model.max_error <= report.model.bound < 10


def test_blocks_with_a_normalization_behind_them():
    x = image(2, 6, 6, 4)
    block = jt.nnx.ACBlock(4, 4, (3, 3), conv=jt.nnx.WSConv, rngs=nnx.Rngs(0))
    model = trained(Chain(block, norm(), nnx.relu, jt.nnx.RepVGGBlock(4, 4, rngs=nnx.Rngs(1))), x)
    plain, report = jt.nnx.fuse(model, example=x)
    assert [(row.layer, row.branches) for row in report.layers] == [
        ("layers/0", 3),
        ("layers/3", 3),
    ]
    assert types(plain) == {"Chain", "Conv", "Folded"}
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)


# ---- part of a model, and mistakes


def test_part_of_a_model():
    model, x = stranger("ResNet")
    plain, report = jt.nnx.fuse(
        model, example=x, path_filter=lambda path: path.startswith("blocks/0/")
    )
    assert {row.layer.split("/")[1] for row in report.layers} == {"0"} and len(report.layers) == 4
    np.testing.assert_allclose(plain(x), model(x), atol=2e-6)
    by_norm = jt.nnx.fuse(model, example=x, path_filter=lambda path: path == "bn_init")[1]
    assert [row.layer for row in by_norm.layers] == ["conv_init"]
    with pytest.raises(ValueError, match="`path_filter` chooses nothing"):
        jt.nnx.fuse(model, example=x, path_filter=lambda path: path == "head")


def test_training_mode_and_untouched_statistics_are_refused():
    x = image(2, 6, 6, 4)
    block = jt.nnx.ACBlock(4, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"norm' is in training mode.*model\.eval\(\)"):
        jt.nnx.fuse(block)
    block.eval()
    with pytest.raises(ValueError, match="norm' were never updated"):
        jt.nnx.fuse(block)
    model = Chain(conv(), norm(), block)
    model.eval()
    with pytest.raises(ValueError, match="'layers/1' were never updated"):
        jt.nnx.fuse(model, example=x, path_filter=lambda path: path == "layers/1")
    trained(model, x)
    model.layers[2].train()
    with pytest.raises(ValueError, match="layers/2/.*norm.*training mode"):
        jt.nnx.fuse(model, example=x)


def test_a_difference_that_rounding_does_not_explain_is_an_error(monkeypatch):
    x = image(2, 6, 6, 4)
    model = trained(Chain(conv(), norm()), x)
    true = jt.nnx._fuse.frozen_norm

    def wrong(layer):
        node = true(layer)
        return jt.reparam.Norm(node.mean + 0.01, node.var, node.scale, node.bias, node.epsilon)

    monkeypatch.setattr(jt.nnx._fuse, "frozen_norm", wrong)
    with pytest.raises(ValueError, match="'layers/0' differ by"):
        jt.nnx.fuse(model, example=x)


def test_stacked_layers_are_refused():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return jt.nnx.WSConv(4, 4, (3, 3), rngs=rngs)

    with pytest.raises(ValueError, match="'layers/0' is stacked"):
        jt.nnx.fuse(Chain(make(nnx.Rngs(0))))


def test_fused_model_is_orbax_and_export_ready(tmp_path):
    """Nothing of this library is in the variables, and the export runs."""
    import orbax.checkpoint as ocp

    model, x = stranger("CNN")
    plain, _ = jt.nnx.fuse(model, example=x)
    params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    assert {path.rsplit("/", 1)[1] for path, _ in _tree.leaves_with_paths(params)} == {
        "kernel",
        "bias",
    }
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "plain", params)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, params, restored)
    exported = export.export(jax.jit(lambda x: plain(x)))(jax.ShapeDtypeStruct(x.shape, x.dtype))
    again = export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(x), plain(x), atol=1e-6)
