"""jt.linen: the twins compute what jt.nnx computes, from the same parameter paths."""

import functools

import flax
import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtricks import _tree

X = np.random.default_rng(0).normal(1.0, 2.0, (6, 9, 8, 4)).astype(np.float32)

CONV = dict(
    strides=2, kernel_dilation=(1, 2), feature_group_count=2, preset="timm", use_bias=True, eps=1e-5
)
ACB = dict(strides=(2, 1), padding=((1, 1), (0, 2)), gamma_init=0.5)
# The default initializer takes seconds to compile, for each shape.
UNIFORM = nn.initializers.uniform(0.2)
PLAIN_NNX = dict(conv=functools.partial(nnx.Conv, kernel_init=UNIFORM))
PLAIN_LINEN = dict(conv=functools.partial(nn.Conv, kernel_init=UNIFORM))
TWINS = {
    "WSConv": (
        lambda r: jt.nnx.WSConv(4, 6, (3, 2), **CONV, rngs=r),
        lambda: jt.linen.WSConv(6, (3, 2), **CONV),
    ),
    "ExtendedBatchNorm": (
        lambda r: jt.nnx.ExtendedBatchNorm(4, momentum=0.9, variance="grand", rngs=r),
        lambda: jt.linen.ExtendedBatchNorm(momentum=0.9, variance="grand"),
    ),
    "ACBlock": (
        lambda r: jt.nnx.ACBlock(
            4, 6, (3, 3), norm=functools.partial(nnx.BatchNorm, momentum=0.9), **ACB, rngs=r
        ),
        lambda: jt.linen.ACBlock(
            6, (3, 3), norm=functools.partial(nn.BatchNorm, momentum=0.9), **ACB
        ),
    ),
    "ACBlock, WSConv, ExtendedBatchNorm": (
        lambda r: jt.nnx.ACBlock(
            4, 6, (3, 3), conv=jt.nnx.WSConv, norm=jt.nnx.ExtendedBatchNorm, rngs=r
        ),
        lambda: jt.linen.ACBlock(6, (3, 3), conv=jt.linen.WSConv, norm=jt.linen.ExtendedBatchNorm),
    ),
    "RepVGGBlock": (
        lambda r: jt.nnx.RepVGGBlock(4, 4, kernel_dilation=2, **PLAIN_NNX, rngs=r),
        lambda: jt.linen.RepVGGBlock(4, kernel_dilation=2, **PLAIN_LINEN),
    ),
    "RepVGGBlock, strided": (
        lambda r: jt.nnx.RepVGGBlock(
            4, 4, strides=2, feature_group_count=2, norm=jt.nnx.ExtendedBatchNorm, rngs=r
        ),
        lambda: jt.linen.RepVGGBlock(
            4, strides=2, feature_group_count=2, norm=jt.linen.ExtendedBatchNorm
        ),
    ),
    "DiverseBranchBlock": (
        lambda r: jt.nnx.DiverseBranchBlock(4, 8, (3, 3), strides=2, **PLAIN_NNX, rngs=r),
        lambda: jt.linen.DiverseBranchBlock(8, (3, 3), strides=2, **PLAIN_LINEN),
    ),
    "DiverseBranchBlock, depthwise": (
        lambda r: jt.nnx.DiverseBranchBlock(
            4, 4, (3, 3), feature_group_count=4, norm=jt.nnx.ExtendedBatchNorm, rngs=r
        ),
        lambda: jt.linen.DiverseBranchBlock(
            4, (3, 3), feature_group_count=4, norm=jt.linen.ExtendedBatchNorm
        ),
    ),
    "MobileOneBlock": (
        lambda r: jt.nnx.MobileOneBlock(4, 4, num_branches=2, **PLAIN_NNX, rngs=r),
        lambda: jt.linen.MobileOneBlock(4, num_branches=2, **PLAIN_LINEN),
    ),
    "DilatedReparamBlock": (
        lambda r: jt.nnx.DilatedReparamBlock(4, 4, (5, 5), **PLAIN_NNX, rngs=r),
        lambda: jt.linen.DilatedReparamBlock(4, (5, 5), **PLAIN_LINEN),
    ),
    "ACBlock, online": (
        lambda r: jt.nnx.ACBlock(4, 6, (3, 3), mode="online", **ACB, **PLAIN_NNX, rngs=r),
        lambda: jt.linen.ACBlock(6, (3, 3), mode="online", **ACB, **PLAIN_LINEN),
    ),
    "RepVGGBlock, online, WSConv": (
        lambda r: jt.nnx.RepVGGBlock(
            4, 4, mode="online", conv=jt.nnx.WSConv, norm=jt.nnx.ExtendedBatchNorm, rngs=r
        ),
        lambda: jt.linen.RepVGGBlock(
            4, mode="online", conv=jt.linen.WSConv, norm=jt.linen.ExtendedBatchNorm
        ),
    ),
    "DiverseBranchBlock, online": (
        lambda r: jt.nnx.DiverseBranchBlock(4, 6, (3, 3), 2, mode="online", **PLAIN_NNX, rngs=r),
        lambda: jt.linen.DiverseBranchBlock(6, (3, 3), 2, mode="online", **PLAIN_LINEN),
    ),
}


def init(module, *args, **kwargs):
    return jax.jit(functools.partial(module.init, **kwargs))(jax.random.key(0), *args)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_twins(name):
    make_nnx, make_linen = TWINS[name]
    apply, params, state = jt.nnx.functional(make_nnx(nnx.Rngs(0)))
    module = make_linen()
    flags = {} if isinstance(module, jt.linen.WSConv) else {"use_running_average": False}
    variables = init(module, X, **flags)
    linen_apply, linen_params, linen_state = jt.linen.functional(module, variables)
    shapes = lambda tree: {path: x.shape for path, x in _tree.leaves_with_paths(tree)}
    assert shapes(linen_params) == shapes(params)
    assert shapes(linen_state.get("batch_stats", {})) == shapes(state)

    def loss(apply, params, state):
        y, state = apply(params, state, X, train=True)
        return jnp.sum(jnp.sin(y)), (y, state)

    step = lambda apply: jax.jit(jax.value_and_grad(functools.partial(loss, apply), has_aux=True))
    (_, (y, new)), grads = step(apply)(params, state)
    (_, (linen_y, linen_new)), linen_grads = step(linen_apply)(params, linen_state)
    close((y, grads), (linen_y, linen_grads), 2e-5)
    assert jax.tree.structure(linen_new) == jax.tree.structure(linen_state)
    if state:
        close(new, linen_new["batch_stats"], 1e-5)
    evaluated = apply(params, new, X, train=False)[0]
    linen_evaluated, same = linen_apply(params, linen_new, X, train=False)
    close(evaluated, linen_evaluated, 1e-5)
    close(same, linen_new, 0)
    rule, linen_rule = jt.nnx.roles(make_nnx(nnx.Rngs(0))), jt.linen.roles(module, X, **flags)
    for path, shape in shapes(params).items():
        assert rule(path, shape) == linen_rule(path, shape) is not None


def close(a, b, tol):
    def check(x, y):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol * max(1, np.abs(y).max()))

    jax.tree.map(check, a, b)


class Net(nn.Module):
    """What the twins do not cover: dropout, a flag called train, stacked layers, attention."""

    axis: int = 0

    @nn.compact
    def __call__(self, x, train):
        x = jt.linen.ACBlock(8, (3, 3), norm=jt.linen.ExtendedBatchNorm)(x, not train)
        x = nn.Dropout(0.5)(x.mean((1, 2)), deterministic=not train)
        x = nn.vmap(
            nn.Dense,
            in_axes=None,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            axis_size=3,
        )(5)(x)
        x = nn.MultiHeadDotProductAttention(1)(x, x)
        x = nn.remat(nn.DenseGeneral)((2, 3))(x)
        x = nn.Einsum((2, 3, 7), "...ab,abc->...c")(x)
        return nnx.bridge.to_linen(nnx.Linear, 7, 2, name="bridged")(x)


def test_functional_of_a_model():
    module = Net()
    variables = init(module, X, train=False)
    apply, params, state = jt.linen.functional(module, variables)
    assert set(state) == {"batch_stats"} and type(params) is dict
    run = jax.jit(functools.partial(apply, train=True))
    key = jax.random.key(1)
    (y, new), (again, _) = run(params, state, X, key=key), run(params, state, X, key=key)
    assert np.array_equal(y, again)
    assert not np.array_equal(y, run(params, state, X, key=jax.random.key(2))[0])
    assert jax.tree.structure(new) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="needs `key`"):
        apply(params, state, X, train=True)
    with pytest.raises(ValueError, match="typed PRNG key"):
        apply(params, state, X, train=True, key=jax.random.PRNGKey(0))
    evaluate = jax.jit(functools.partial(apply, train=False))
    close(evaluate(params, state, X)[0], module.apply(variables, X, train=False), 1e-6)


def test_train_kwargs():
    module = Net()
    variables = init(module, X, train=False)
    expected = module.apply(variables, X, train=False)
    for given in ({"train": True}, lambda train: {"train": train}):
        apply, params, state = jt.linen.functional(module, variables, train_kwargs=given)
        close(apply(params, state, X, train=False)[0], expected, 1e-6)
    with pytest.raises(Exception, match=r"train_kwargs|rate"):
        jt.linen.functional(module, variables, train_kwargs={"rate": 0.5})


@pytest.mark.parametrize("axis", [0, 1])
def test_roles_of_a_model(axis):
    rule = jt.linen.roles(Net(axis), X, train=False)
    variables = jax.eval_shape(functools.partial(Net(axis).init, train=False), jax.random.key(0), X)
    shapes = {path: leaf.shape for path, leaf in _tree.leaves_with_paths(variables["params"])}
    got = {path: " ".join(rule(path, shape) or ("unknown",)) for path, shape in shapes.items()}
    assert "unknown" not in got.values()
    expected = {
        "ACBlock_0/square/conv/kernel": "in in in out",
        "VmapDense_0/kernel": "batch in out" if axis == 0 else "in batch out",
        "VmapDense_0/bias": "batch none" if axis == 0 else "none batch",
        "MultiHeadDotProductAttention_0/query/kernel": "in out out",
        "MultiHeadDotProductAttention_0/out/kernel": "in in out",
        "CheckpointDenseGeneral_0/kernel": "in out out",
        "CheckpointDenseGeneral_0/bias": "none none",
        "Einsum_0/kernel": "in in out",
        "bridged/kernel": "in out",
    }
    assert expected.items() <= got.items()


@pytest.mark.devices
def test_initializing_leaves_statistics_and_skips_collectives():
    norm = jt.linen.ExtendedBatchNorm(axis_name="data", momentum=0.5)
    variables = norm.init(jax.random.key(0), X)  # no axis is bound here
    assert float(variables["batch_stats"]["var"]) == 1
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=(spec, PartitionSpec()),
    )
    def run(variables, x):
        return norm.apply(variables, x, mutable=["batch_stats"])

    y, new = jax.jit(run)(variables, X)
    alone = jt.linen.ExtendedBatchNorm(momentum=0.5)
    expected, stats = alone.apply(variables, X, mutable=["batch_stats"])
    close(y, expected, 1e-5)
    close(new, flax.core.unfreeze(stats), 1e-5)


def test_mistakes_of_blocks_name_the_block():
    mistakes = [
        (jt.linen.ACBlock(4, (3,)), "ACBlock: `kernel_size`"),
        (jt.linen.ACBlock(4, (3, 3), padding="CIRCULAR"), "CIRCULAR"),
        (jt.linen.RepVGGBlock(4, mode="offline"), "'branches' or 'online'"),
        (jt.linen.MobileOneBlock(6, feature_group_count=4), "does not divide both"),
        (jt.linen.MobileOneBlock(4, num_branches=0), "at least 1"),
        (jt.linen.DilatedReparamBlock(4, (7, 5)), "no default"),
        (
            jt.linen.DiverseBranchBlock(4, 3, feature_group_count=2, internal_features=3),
            "multiple of the 2 groups",
        ),
    ]
    for block, words in mistakes:
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(block.init, jax.random.key(0), X)


def test_bfloat16_parameters_keep_float32_statistics():
    module = jt.linen.ACBlock(6, (3, 3), conv=jt.linen.WSConv, norm=jt.linen.ExtendedBatchNorm)
    variables = init(module, X)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables["params"])
    y, new = jax.eval_shape(
        functools.partial(module.apply, mutable=["batch_stats"]),
        {**variables, "params": low},
        X.astype(jnp.bfloat16),
    )
    assert y.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(new))


def test_a_diverse_block_of_boxed_and_stacked_parameters():
    """The border reads scales and biases, which partitioned parameters have in boxes."""
    boxed = nn.with_partitioning(nn.initializers.ones, ("model",))
    norm = functools.partial(jt.linen.ExtendedBatchNorm, scale_init=boxed)
    block = jt.linen.DiverseBranchBlock(4, (3, 3), norm=norm, **PLAIN_LINEN)
    variables = nn.meta.unbox(init(block, X))
    plain = jt.linen.DiverseBranchBlock(4, (3, 3), norm=jt.linen.ExtendedBatchNorm, **PLAIN_LINEN)
    run = lambda m: m.apply(variables, X, mutable=["batch_stats"])[0]
    close(run(block), run(plain), 0)
    stack = nn.vmap(
        jt.linen.DiverseBranchBlock,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=4,
    )(4, (3, 3), norm=jt.linen.ExtendedBatchNorm, **PLAIN_LINEN)
    assert not jt.linen.roles(stack, X).assumed
