"""What each axis of every parameter means, for every layer of flax, stacked or not."""

import inspect
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import _tree
from jaxtricks import roles as roles_lib

VECTOR = jnp.ones((2, 5, 4))
IMAGE = jnp.ones((2, 8, 8, 4))
PLANE = {"kernel": "in in in out", "bias": "none"}
MATRIX = {"kernel": "in out", "bias": "none"}
NORM = {"scale": "none", "bias": "none"}


def below(prefix, layer):
    return {f"{prefix}/{name}": roles for name, roles in layer.items()}


def gates(inputs, hidden, biased):
    """The matrices of a recurrent cell; those named in `biased` have a bias."""
    names = (*inputs.split(), *hidden.split())
    kernels = {f"{name}/kernel": "in out" for name in names}
    return kernels | {f"{name}/bias": "none" for name in biased.split()}


def projections(bias=True, norms=""):
    """Parameters of multi-head attention."""
    heads = {"kernel": "in out out"} | ({"bias": "none none"} if bias else {})
    out = {"kernel": "in in out"} | ({"bias": "none"} if bias else {})
    found = {k: v for name in ("query", "key", "value") for k, v in below(name, heads).items()}
    scales = {f"{name}_ln/scale": "none" for name in norms.split()}
    return found | below("out", out) | scales


def decided(params, rule):
    """{path: roles in one string}, "?" where the rule says nothing."""
    leaves = _tree.leaves_with_paths(params)
    roles = roles_lib.leaf_roles(rule, params)
    return {
        path: "?" if r is None else " ".join(r) for (path, _), r in zip(leaves, roles, strict=True)
    }


# ---- every layer of flax.nnx


def weight_norm_scales():
    """What this flax's WeightNorm adds: its scales are parameters since 0.12.11, before no nnx.Param."""
    model = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    paths = _tree.by_path(nnx.state(model, nnx.Param))
    return {path: "none" for path in paths if path.startswith("scales")}


WEIGHT_NORM_SCALES = weight_norm_scales() if hasattr(nnx, "WeightNorm") else {}
NNX = {
    "Linear": (lambda r: nnx.Linear(3, 4, rngs=r), MATRIX),
    "LinearGeneral: heads": (
        lambda r: nnx.LinearGeneral(4, (2, 3), rngs=r),
        {"kernel": "in out out", "bias": "none none"},
    ),
    "LinearGeneral: several": (
        lambda r: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=r),
        {"kernel": "in in out out", "bias": "none none"},
    ),
    "LinearGeneral: batch": (
        lambda r: nnx.LinearGeneral(2, 5, batch_axis={0: 3}, rngs=r),
        {"kernel": "batch in out", "bias": "batch none"},
    ),
    "Conv: 1": (
        lambda r: nnx.Conv(3, 4, 5, rngs=r),
        {"kernel": "in in out", "bias": "none"},
    ),
    "Conv: 2, groups": (
        lambda r: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=r),
        PLANE,
    ),
    "Conv: 3": (
        lambda r: nnx.Conv(3, 4, (2, 2, 2), use_bias=False, rngs=r),
        {"kernel": "in in in in out"},
    ),
    "ConvTranspose": (lambda r: nnx.ConvTranspose(3, 4, (2, 2), rngs=r), PLANE),
    "ConvTranspose: turned": (
        lambda r: nnx.ConvTranspose(3, 4, (2, 2), transpose_kernel=True, rngs=r),
        {"kernel": "in in out in", "bias": "none"},
    ),
    "Einsum": (
        lambda r: nnx.Einsum("btd,dnh->btnh", (2, 3, 4), (3, 4), rngs=r),
        {"kernel": "in out out", "bias": "none none"},
    ),
    "Einsum: experts": (
        lambda r: nnx.Einsum("ebd,edf->ebf", (2, 3, 4), (2, 4), rngs=r),
        {"kernel": "batch in out", "bias": "batch none"},
    ),
    "Einsum: scale": (
        lambda r: nnx.Einsum("bnh,nh->bnh", (3, 4), (3, 4), rngs=r),
        {"kernel": "none none", "bias": "none none"},
    ),
    "Einsum: sums all": (lambda r: nnx.Einsum("bcd,cd->b", (3, 4), rngs=r), {"kernel": "in in"}),
    # An equation that does not name every axis of the kernel is no help.
    "Einsum: dots": (
        lambda r: nnx.Einsum("b...,...c->bc", (3, 4), (4,), rngs=r),
        {"kernel": "?", "bias": "none"},
    ),
    "Embed": (lambda r: nnx.Embed(7, 3, rngs=r), {"embedding": "in out"}),
    "LoRA": (lambda r: nnx.LoRA(3, 2, 4, rngs=r), {"lora_a": "in out", "lora_b": "in out"}),
    "LoRA: around": (
        lambda r: nnx.LoRA(3, 2, 4, base_module=nnx.Linear(3, 4, rngs=r), rngs=r),
        {"lora_a": "in out", "lora_b": "in out"} | below("base_module", MATRIX),
    ),
    "LoRALinear": (
        lambda r: nnx.LoRALinear(3, 4, lora_rank=2, rngs=r),
        MATRIX | {"lora/lora_a": "in out", "lora/lora_b": "in out"},
    ),
    "MultiHeadAttention": (
        lambda r: nnx.MultiHeadAttention(2, 6, qkv_features=4, decode=True, rngs=r),
        projections(),
    ),
    "MultiHeadAttention: norms": (
        lambda r: nnx.MultiHeadAttention(2, 6, 4, normalize_qk=True, use_bias=False, rngs=r),
        projections(bias=False, norms="query key"),
    ),
    "LSTMCell": (
        lambda r: nnx.LSTMCell(3, 4, rngs=r),
        gates("ii if_ ig io", "hi hf hg ho", "hi hf hg ho"),
    ),
    "OptimizedLSTMCell": (
        lambda r: nnx.OptimizedLSTMCell(3, 4, rngs=r),
        gates("dense_i", "dense_h", "dense_h"),
    ),
    "GRUCell": (
        lambda r: nnx.GRUCell(3, 4, rngs=r),
        gates("dense_i", "dense_h", "dense_i"),
    ),
    "SimpleCell": (
        lambda r: nnx.SimpleCell(3, 4, rngs=r),
        gates("dense_i", "dense_h", "dense_i"),
    ),
    "RNN": (
        lambda r: nnx.RNN(nnx.GRUCell(3, 4, rngs=r), rngs=r),
        below("cell", gates("dense_i", "dense_h", "dense_i")),
    ),
    "Bidirectional": (
        lambda r: nnx.Bidirectional(
            *(nnx.RNN(nnx.SimpleCell(3, 4, rngs=r), rngs=r) for _ in range(2)), rngs=r
        ),
        below("forward_rnn/cell", gates("dense_i", "dense_h", "dense_i"))
        | below("backward_rnn/cell", gates("dense_i", "dense_h", "dense_i")),
    ),
    "BatchNorm": (lambda r: nnx.BatchNorm(4, rngs=r), NORM),
    "LayerNorm": (lambda r: nnx.LayerNorm(4, rngs=r), NORM),
    "GroupNorm": (lambda r: nnx.GroupNorm(4, num_groups=2, rngs=r), NORM),
    "InstanceNorm": (lambda r: nnx.InstanceNorm(4, rngs=r), NORM),
    "RMSNorm": (lambda r: nnx.RMSNorm(4, rngs=r), {"scale": "none"}),
    "WeightNorm": (
        lambda r: nnx.WeightNorm(nnx.Linear(3, 4, rngs=r), rngs=r),
        below("layer_instance", MATRIX) | WEIGHT_NORM_SCALES,
    ),
    "SpectralNorm": (
        lambda r: nnx.SpectralNorm(nnx.Linear(3, 4, rngs=r), rngs=r),
        below("layer_instance", MATRIX),
    ),
    "PReLU": (lambda r: nnx.PReLU(), {"negative_slope": ""}),
    "Sequential": (
        lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r), nnx.relu),
        below("layers/0", MATRIX),
    ),
    "WSConv": (
        lambda r: jt.nnx.WSConv(3, 4, (3, 3), use_bias=True, rngs=r),
        PLANE | {"gain": "none"},
    ),
    "ExtendedBatchNorm": (lambda r: jt.nnx.ExtendedBatchNorm(4, rngs=r), NORM),
    "ACBlock": (
        lambda r: jt.nnx.ACBlock(3, 4, (3, 3), rngs=r),
        {f"{b}/conv/kernel": "in in in out" for b in ("square", "vertical", "horizontal")}
        | {f"{b}/norm/{n}": "none" for b in ("square", "vertical", "horizontal") for n in NORM},
    ),
}
PRESENT = [
    name for name in NNX if hasattr(nnx, kind := name.split(":")[0]) or hasattr(jt.nnx, kind)
]


@pytest.mark.parametrize("name", PRESENT)
def test_every_nnx_layer(name):
    make, expected = NNX[name]
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert decided(nnx.state(model, nnx.Param), jt.nnx.roles(model)) == expected


def modules_of(package, base):
    kinds = (getattr(package, name) for name in dir(package))
    return {k.__name__ for k in kinds if inspect.isclass(k) and issubclass(k, base)}


def test_no_layer_of_flax_is_forgotten():
    """A layer that a new version of flax brings must be looked at."""
    without = {"Dropout", "Module", "RNNCellBase", "List", "Dict", "Sequential", "RoPE"}
    fp8 = {name for name in modules_of(nn, nn.Module) if "Fp8" in name}  # no parameters
    tables = ((nnx, NNX, set()), (nn, LINEN, fp8))
    for package, table, more in tables:
        listed = {name.split(":")[0] for name in table}
        assert modules_of(package, package.Module) - without - more <= listed


# ---- every layer of flax.linen


class Inside(nn.Module):
    """Layers that need something of their call."""

    kind: str

    @nn.compact
    def __call__(self, x):
        match self.kind:
            case "einsum":
                return nn.Einsum((4, 3))(x, "abc,cd->abd")
            case "einsum by name":
                return nn.Einsum((4, 3))(x, einsum_str="abc,cd->abd")
            case "weight norm":
                return nn.WeightNorm(nn.DenseGeneral((4, 3)))(x)
            case "spectral norm":
                return nn.SpectralNorm(nn.DenseGeneral((4, 3)))(x, update_stats=True)


def rnn(cell, **kwargs):
    return nn.RNN(cell(4, **kwargs))


LSTM = below("cell", gates("ii if ig io", "hi hf hg ho", "hi hf hg ho"))
GRU = gates("ir iz in", "hr hz hn", "ir iz in hn")
LINEN = {
    "Dense": (nn.Dense(3), VECTOR, MATRIX),
    "DenseGeneral: heads": (
        nn.DenseGeneral((2, 3)),
        VECTOR,
        {"kernel": "in out out", "bias": "none none"},
    ),
    "DenseGeneral: several": (
        nn.DenseGeneral(3, axis=(-2, -1)),
        VECTOR,
        {"kernel": "in in out", "bias": "none"},
    ),
    "DenseGeneral: batch": (
        nn.DenseGeneral((3, 2), axis=-1, batch_dims=(0,)),
        VECTOR,
        {"kernel": "batch in out out", "bias": "batch none none"},
    ),
    "Conv: 1": (nn.Conv(3, 5), VECTOR, {"kernel": "in in out", "bias": "none"}),
    "Conv: 2, groups": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGE, PLANE),
    "Conv: 3": (
        nn.Conv(3, (1, 2, 3), use_bias=False),
        IMAGE[..., None],
        {"kernel": "in in in in out"},
    ),
    # Every position has its own kernel: an independent copy.
    "ConvLocal": (
        nn.ConvLocal(3, (3, 3)),
        IMAGE,
        {"kernel": "batch batch in out", "bias": "batch batch none"},
    ),
    "ConvTranspose": (nn.ConvTranspose(3, (2, 2)), IMAGE, PLANE),
    "ConvTranspose: turned": (
        nn.ConvTranspose(3, (2, 2), transpose_kernel=True),
        IMAGE,
        {"kernel": "in in out in", "bias": "none"},
    ),
    "Embed": (nn.Embed(7, 3), jnp.zeros((2,), jnp.int32), {"embedding": "in out"}),
    "Einsum": (
        nn.Einsum((4, 3, 2), "abc,cnh->abnh"),
        VECTOR,
        {"kernel": "in out out", "bias": "none none"},
    ),
    "Einsum: experts": (
        nn.Einsum((5, 4, 3), "bec,ecd->bed"),
        VECTOR,
        {"kernel": "batch in out", "bias": "batch none"},
    ),
    "Einsum: at the call": (Inside("einsum"), VECTOR, below("Einsum_0", MATRIX)),
    "Einsum: by name": (Inside("einsum by name"), VECTOR, below("Einsum_0", MATRIX)),
    "MultiHeadDotProductAttention": (
        nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=3),
        VECTOR,
        projections(),
    ),
    "MultiHeadAttention": (
        nn.MultiHeadAttention(2, normalize_qk=True, use_bias=False, decode=True),
        VECTOR,
        projections(bias=False, norms="query key"),
    ),
    "SelfAttention": (nn.SelfAttention(2), VECTOR, projections()),
    "LSTMCell": (rnn(nn.LSTMCell), VECTOR, LSTM),
    "OptimizedLSTMCell": (rnn(nn.OptimizedLSTMCell), VECTOR, LSTM),
    "GRUCell": (rnn(nn.GRUCell), VECTOR, below("cell", GRU)),
    "MGUCell": (rnn(nn.MGUCell), VECTOR, below("cell", gates("if in", "hf hn", "if in hn"))),
    "SimpleCell": (rnn(nn.SimpleCell), VECTOR, below("cell", gates("i", "h", "i"))),
    "ConvLSTMCell": (
        rnn(nn.ConvLSTMCell, kernel_size=(3, 3)),
        IMAGE[:, None],
        below("cell/ih", PLANE) | below("cell/hh", PLANE),
    ),
    "RNN": (nn.RNN(nn.GRUCell(4)), VECTOR, below("cell", GRU)),
    "Bidirectional": (
        nn.Bidirectional(rnn(nn.GRUCell), rnn(nn.GRUCell)),
        VECTOR,
        below("forward_rnn/cell", GRU) | below("backward_rnn/cell", GRU),
    ),
    "BatchNorm": (nn.BatchNorm(use_running_average=False), VECTOR, NORM),
    "LayerNorm": (nn.LayerNorm(), VECTOR, NORM),
    "LayerNorm: two axes": (
        nn.LayerNorm(feature_axes=(-2, -1)),
        VECTOR,
        {"scale": "none none", "bias": "none none"},
    ),
    "RMSNorm": (nn.RMSNorm(), VECTOR, {"scale": "none"}),
    "GroupNorm": (nn.GroupNorm(2), VECTOR, NORM),
    "InstanceNorm": (nn.InstanceNorm(), VECTOR, NORM),
    "WeightNorm": (
        Inside("weight norm"),
        VECTOR,
        {"DenseGeneral_0/kernel": "in out out", "DenseGeneral_0/bias": "none none"}
        | {"WeightNorm_0/DenseGeneral_0/kernel/scale": "none"},
    ),
    "WeightNorm: of everything": (
        nn.WeightNorm(nn.DenseGeneral((4, 3)), feature_axes=(-2, -1), variable_filter=None),
        VECTOR,
        {"layer_instance/kernel": "in out out", "layer_instance/bias": "none none"}
        | {f"layer_instance/{name}/scale": "none none" for name in ("kernel", "bias")},
    ),
    "SpectralNorm": (
        Inside("spectral norm"),
        VECTOR,
        {"DenseGeneral_0/kernel": "in out out", "DenseGeneral_0/bias": "none none"},
    ),
    "PReLU": (nn.PReLU(), VECTOR, {"negative_slope": ""}),
    "WSConv": (
        jt.linen.WSConv(3, (3, 3), use_bias=True),
        IMAGE,
        PLANE | {"gain": "none"},
    ),
    "ExtendedBatchNorm": (jt.linen.ExtendedBatchNorm(), VECTOR, NORM),
    "ACBlock": (jt.linen.ACBlock(4, (3, 3)), IMAGE, NNX["ACBlock"][1]),
}


def initialized(module, *args, **kwargs):
    start = lambda key: module.init(key, *args, **kwargs)["params"]
    return jax.eval_shape(start, jax.random.key(0))


@pytest.mark.parametrize("name", LINEN)
def test_every_linen_layer(name):
    module, x, expected = LINEN[name]
    if name == "ACBlock":
        module = module.clone(use_running_average=False)
    rule = jt.linen.roles(module, x)
    assert decided(initialized(module, x), rule) == expected
    assert not rule.assumed


# ---- stacked: linen


def with_batch(roles, at):
    """The roles of one layer, with "batch" where a transform has put its axis."""
    words = roles.split()
    words.insert(at % (len(words) + 1), "batch")
    return " ".join(words)


class Block(nn.Module):
    """A body for nn.scan: everything has four of everything, so sizes show nothing."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False)(x)
        x = nn.MultiHeadDotProductAttention(4, use_bias=False)(x, x)
        return nn.DenseGeneral(4, axis=(-2, -1), use_bias=False)(jnp.stack([x] * 4, -2)), None


BLOCK = {"Dense_0/kernel": "in out", "DenseGeneral_0/kernel": "in in out"} | below(
    "MultiHeadDotProductAttention_0", projections(bias=False)
)
LIFT = dict(split_rngs={"params": True})


class Stack(nn.Module):
    """Four copies of a body along any axis."""

    how: str
    axis: int
    body: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        lift = dict(LIFT, variable_axes={"params": self.axis})
        if self.how == "scan":
            return nn.scan(self.body, length=4, in_axes=(), **lift)(name="stack")(x)[0]
        if self.how == "remat":
            body = nn.remat(self.body)
            return nn.scan(body, length=4, in_axes=(), **lift)(name="stack")(x)[0]
        if self.how == "method":
            body = self.body(name="stack")
            step = lambda body, x: body(x)
            return nn.scan(step, length=4, in_axes=(), **lift)(body, x)[0]
        return nn.vmap(self.body, in_axes=None, axis_size=4, **lift)(name="stack")(x)[0]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("how", ["scan", "vmap", "remat", "method"])
def test_linen_stacks_are_exact_where_sizes_show_nothing(how, axis):
    module = Stack(how, axis)
    expected = {f"stack/{path}": with_batch(roles, axis) for path, roles in BLOCK.items()}
    rule = jt.linen.roles(module, VECTOR)
    assert decided(initialized(module, VECTOR), rule) == expected
    assert not rule.assumed


class Reads(nn.Module):
    """A body that looks at its own parameters: it cannot be initialized with boxes."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, use_bias=False, name="dense")
        dense(x)
        return x @ self.variables["params"]["dense"]["kernel"] ** 2, None


def test_what_linen_cannot_say_is_marked():
    module = Stack("scan", 1, Reads)
    rule, params = jt.linen.roles(module, VECTOR), initialized(Stack("scan", 1, Reads), VECTOR)
    assert decided(params, rule) == {"stack/dense/kernel": "batch in out"}
    assert rule.assumed == {"stack/dense/kernel"}
    assert "1 of 1 leaves (assumed)" in str(roles_lib.describe(params, rule))
    wide = VECTOR[..., :3]  # sizes show it
    assert jt.linen.roles(Stack("scan", 1, Wide), wide).table == {
        "stack/dense/kernel": ("in", "batch", "out")
    }


class Wide(nn.Module):
    """As `Reads`, with sizes that differ from the number of layers."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, use_bias=False, name="dense")
        dense(x)
        return x @ self.variables["params"]["dense"]["kernel"] ** 2, None


class Cell(nn.Module):
    """A recurrent layer and wrapped ones, as a body."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(4), name="rnn")(x)
        x = nn.WeightNorm(nn.Dense(4, use_bias=False), name="norm")(x)
        part = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(4, kernel_init=part, name="part")(x), None


@pytest.mark.parametrize("axis", [0, -1])
def test_linen_recurrent_wrapped_and_partitioned_layers_in_nested_stacks(axis):
    inner = nn.vmap(
        Cell,
        in_axes=None,
        axis_size=4,
        variable_axes={"params": axis},
        metadata_params={nn.PARTITION_NAME: "inner"},
        **LIFT,
    )

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inner(name="in")(x)[0].mean(0), None

    outer = nn.scan(
        Outer,
        length=4,
        in_axes=(),
        variable_axes={"params": 0},
        metadata_params={nn.PARTITION_NAME: "outer"},
        **LIFT,
    )
    one = {name.replace("cell", "OptimizedLSTMCell_0"): roles for name, roles in LSTM.items()}
    one |= {"Dense_0/kernel": "in out", "norm/Dense_0/kernel/scale": "none"} | below("part", MATRIX)
    expected = {f"in/{name}": f"batch {with_batch(roles, axis)}" for name, roles in one.items()}
    rule = jt.linen.roles(outer(), VECTOR)
    assert decided(initialized(outer(), VECTOR), rule) == expected
    assert not rule.assumed


class Shared(nn.Module):
    """`setup`, lists and dicts of layers, a layer that is called twice, one that two modules share."""

    def setup(self):
        self.embed = nn.Embed(4, 4)
        self.stack = nn.vmap(
            nn.Dense, in_axes=None, axis_size=4, variable_axes={"params": 1}, **LIFT
        )(4)
        self.layers = [nn.Dense(4), {"a": nn.LayerNorm()}]
        self.user = User(self.layers[0])

    def __call__(self, x, train):
        if not train:
            raise ValueError("a flag must stay a flag")
        x = self.stack(self.embed(x)).mean(0)
        x = self.stack(self.layers[1]["a"](self.user(x))).mean(0)
        return self.embed.attend(self.layers[0](x))


class User(nn.Module):
    """Calls a layer that is not its own, and a method of a module that is bound to nothing."""

    layer: nn.Module

    def __call__(self, x):
        return User(None, parent=None).unchanged(self.layer(x))

    def unchanged(self, x):
        return x


def test_linen_setup_lists_shared_layers_and_flags():
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    expected = {
        "embed/embedding": "in out",
        "stack/kernel": "in batch out",
        "stack/bias": "none batch",
        "layers_0/kernel": "in out",
        "layers_0/bias": "none",
        "layers_1_a/scale": "none",
        "layers_1_a/bias": "none",
    }
    for args, kwargs in (
        ((tokens, True), {}),
        ((tokens,), {"train": True}),
        ((), {"x": tokens, "train": True}),
    ):
        rule = jt.linen.roles(Shared(), *args, **kwargs)
        shapes = initialized(Shared(), jnp.zeros((2, 4), jnp.int32), True)
        assert decided(shapes, rule) == expected
        assert not rule.assumed


def test_linen_parameters_that_are_stored_otherwise_are_left_open():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            turn = lambda tree: jax.tree.map(jnp.transpose, tree)
            dense = nn.map_variables(nn.Dense, "params", turn, turn, mutable=True, init=True)
            return dense(3)(x)

    rule = jt.linen.roles(Turned(), VECTOR)
    params = initialized(Turned(), VECTOR)
    (kernel,) = (path for path, x in _tree.leaves_with_paths(params) if x.shape == (3, 4))
    assert decided(params, rule)[kernel] == "?"


# ---- stacked: nnx


def stacked(make, out_axes=0, n=4, **kwargs):
    """n copies of a layer, made by nnx.vmap; abstract."""

    @nnx.split_rngs(splits=n)
    @nnx.vmap(in_axes=0, out_axes=out_axes, axis_size=n, **kwargs)
    def copies(rngs):
        return make(rngs)

    return nnx.eval_shape(lambda: copies(nnx.Rngs(0)))


def check(model, expected, assumed=()):
    rule = jt.nnx.roles(model)
    state = nnx.state(model, nnx.Param)
    assert decided(state, rule) == decided(nnx.to_pure_dict(state), rule) == expected
    assert rule.assumed == set(assumed)


@pytest.mark.parametrize("name", [n for n in PRESENT if n not in ("WeightNorm", "Einsum: dots")])
@pytest.mark.parametrize("axis", [0, -1])
def test_every_nnx_layer_stacked(name, axis):
    """Eleven copies: a size that no layer here has."""
    make, one = NNX[name]
    expected = {path: with_batch(roles, axis) for path, roles in one.items()}
    check(stacked(make, axis, n=11), expected)


def test_nnx_stacks_along_other_axes_and_nested():
    inner = nnx.StateAxes({nnx.PathContains("kernel"): 1, ...: 0})
    check(
        stacked(lambda r: nnx.Linear(3, 5, rngs=r), inner),
        {"kernel": "in batch out", "bias": "batch none"},
    )
    twice = stacked(lambda r: Copies(r, nnx.Linear(3, 5, rngs=r), 7), n=6)
    check(twice, below("layers", {"kernel": "batch batch in out", "bias": "batch batch none"}))


class Copies(nnx.Module):
    """A stack inside a module."""

    def __init__(self, rngs, like, n):
        @nnx.split_rngs(splits=n)
        @nnx.vmap(axis_size=n)
        def copies(rngs):
            sizes = like.in_features, like.out_features
            return nnx.Linear(*sizes, use_bias=like.use_bias, rngs=rngs)

        self.layers = copies(rngs)


def test_what_nnx_cannot_say_is_marked():
    """Sizes are all that is left of nnx.vmap: four layers of 4 by 4 could be stacked along any axis."""
    model = stacked(lambda r: nnx.Linear(4, 4, rngs=r), 1)
    check(model, {"kernel": "batch in out", "bias": "batch none"}, ("kernel", "bias"))
    text = str(roles_lib.describe(nnx.state(model, nnx.Param), jt.nnx.roles(model)))
    assert "batch in out (assumed)" in text and "2 of 2 leaves (assumed)" in text


def test_names_of_partitioned_variables_settle_it():
    def make(rngs):
        part = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        return nnx.Sequential(
            nnx.Linear(4, 4, use_bias=False, kernel_init=part, rngs=rngs),
            nnx.Linear(4, 3, use_bias=False, kernel_init=part, rngs=rngs),
            nnx.Linear(3, 5, use_bias=False, kernel_init=part, rngs=rngs),
        )

    # Newer flax would shard at once, and asks for a mesh.
    with nnx.use_eager_sharding(False) if hasattr(nnx, "use_eager_sharding") else nullcontext():
        named = stacked(make, 1, transform_metadata={nnx.PARTITION_NAME: "layers"})
    check(named, {f"layers/{i}/kernel": "in batch out" for i in range(3)})


def test_nnx_scan_lists_dicts_shared_and_replaced_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.tied = nnx.Linear(4, 4, rngs=rngs)
            self.tied.kernel = self.first.kernel
            self.stack = Copies(rngs, self.first, 3)
            self.other = nnx.Embed(5, 4, rngs=rngs)
            self.other.embedding = nnx.Param(jnp.ones((9, 4)))  # a larger vocabulary
            self.odd = nnx.Linear(4, 4, rngs=rngs)
            self.odd.kernel = nnx.Param(jnp.ones(7))
            self.mine = nnx.Param(jnp.ones((4, 4)))

        def __call__(self, x):
            run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            return run(self.stack.layers, self.first(x))

    model = Model(nnx.Rngs(0))
    assert model(VECTOR).shape == VECTOR.shape
    expected = below("first", MATRIX) | {"tied/bias": "none", "odd/bias": "none", "odd/kernel": "?"}
    expected |= below("stack/layers", {"kernel": "batch in out", "bias": "batch none"})
    check(model, expected | {"other/embedding": "in out", "mine": "?"})


# ---- between the frameworks


class Bridged(nn.Module):
    """Copies of an nnx layer that has copies itself."""

    @nn.compact
    def __call__(self, x):
        step = nn.vmap(
            lambda bridge, x: bridge(x),
            in_axes=(None,),
            axis_size=4,
            variable_axes={"params": 2},
            **LIFT,
        )
        return step(nnx.bridge.ToLinen(Inside4, name="bridge"), x)


class Inside4(nnx.Module):
    """Nested layers below one linen module."""

    def __init__(self, rngs):
        self.stack = Copies(rngs, nnx.Linear(4, 4, use_bias=False, rngs=rngs), 3)
        self.heads = nnx.LinearGeneral(4, (4, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.heads(x)


def test_nnx_in_linen():
    rule = jt.linen.roles(Bridged(), VECTOR)
    assert decided(initialized(Bridged(), VECTOR), rule) == {
        "bridge/stack/layers/kernel": "batch in batch out",
        "bridge/heads/kernel": "in out batch out",
    }
    assert not rule.assumed


def test_linen_in_nnx_takes_the_rule_of_linen():
    """The types of linen's layers are known only while they are called."""
    module = nn.Sequential([nn.Dense(3), nn.DenseGeneral((2, 2))])
    model = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(VECTOR)
    params = nnx.state(model, nnx.Param)
    assert set(decided(params, jt.nnx.roles(model)).values()) == {"?"}
    assert decided(params, jt.linen.roles(module, VECTOR)) == below("layers_0", MATRIX) | below(
        "layers_1", {"kernel": "in out out", "bias": "none none"}
    )


# ---- whole models, and what the transforms make of the roles


class Encoder(nnx.Module):
    """A transformer block."""

    def __init__(self, rngs, d=8):
        self.attention = nnx.MultiHeadAttention(2, d, decode=False, rngs=rngs)
        self.norms = nnx.data(dict(a=nnx.LayerNorm(d, rngs=rngs), b=nnx.RMSNorm(d, rngs=rngs)))
        self.mlp = nnx.Sequential(
            nnx.Linear(d, 3 * d, rngs=rngs), nnx.gelu, nnx.Linear(3 * d, d, rngs=rngs)
        )

    def __call__(self, x):
        x = x + self.attention(self.norms["a"](x))
        return x + self.mlp(self.norms["b"](x))


class LinenEncoder(nn.Module):
    """A transformer block."""

    @nn.compact
    def __call__(self, x):
        d = x.shape[-1]
        x = x + nn.SelfAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(d)(nn.gelu(nn.Dense(3 * d)(nn.RMSNorm()(x))))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.block = jt.nnx.ACBlock(8, 8, (3, 3), conv=jt.nnx.WSConv, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)


class LinenResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3))(x))
        x = x + nn.remat(jt.linen.ACBlock)(
            8, (3, 3), conv=jt.linen.WSConv, use_running_average=False
        )(x)
        return nn.Dense(10)(nn.GroupNorm(2)(x).mean((1, 2)))


class Tagger(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        cells = (nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=rngs), rngs=rngs) for _ in range(2))
        self.rnn = nnx.Bidirectional(*cells, rngs=rngs)
        self.head = nnx.LoRALinear(12, 3, lora_rank=2, rngs=rngs)


class LinenTagger(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = nn.Bidirectional(rnn(nn.OptimizedLSTMCell), rnn(nn.MGUCell))(x)
        return nn.PReLU()(nn.Dense(3)(x))


TOKENS = jnp.zeros((2, 5), jnp.int32)
LINEN_MODELS = [(LinenEncoder(), VECTOR), (LinenResNet(), IMAGE), (LinenTagger(), TOKENS)]


@pytest.mark.parametrize("kind", [Encoder, ResNet, Tagger])
@pytest.mark.parametrize("copies", [0, 13])
def test_every_leaf_of_nnx_models_is_decided(kind, copies):
    model = stacked(kind, n=copies) if copies else nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
    state, rule = nnx.state(model, nnx.Param), jt.nnx.roles(model)
    found = decided(state, rule)
    assert len(found) >= 8 and "?" not in found.values() and not rule.assumed
    assert all(words.startswith("batch") == bool(copies) for words in found.values())
    assert not roles_lib.describe(state, rule).notes


@pytest.mark.parametrize(("module", "x"), LINEN_MODELS, ids=lambda m: type(m).__name__)
def test_every_leaf_of_linen_models_is_decided(module, x):
    params, rule = initialized(module, x), jt.linen.roles(module, x)
    found = decided(params, rule)
    assert len(found) >= 8 and "?" not in found.values() and not rule.assumed
    assert not roles_lib.describe(params, rule).notes


TRANSFORMS = {
    "agc": lambda rule: jt.agc.adaptive_grad_clip(0.1, roles=rule),
    "adafactor": lambda rule: jt.memopt.adafactor(0.1, min_dim_size_to_factor=2, roles=rule),
    "sm3": lambda rule: jt.memopt.sm3(0.1, roles=rule),
}


def check_stacking(tx, layers, one, rules):
    """The updates of stacked layers are those of the layers, one by one."""

    def updater(rule):
        def second(grads, params):  # at the first step sm3 does not look at its axes
            state = tx(rule).init(params)
            _, state = tx(rule).update(jax.tree.map(jnp.cos, grads), state, params)
            return tx(rule).update(grads, state, params)[0]

        return jax.jit(second)

    stack, single = map(updater, rules)
    grads = jax.tree.map(lambda p: jnp.sin(7 * p) + 0.1, layers)
    got = stack(grads, layers)
    for i in range(3):
        part = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        assert jax.tree.map(jnp.shape, part(layers)) == jax.tree.map(jnp.shape, one)
        wanted = single(part(grads), part(layers))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()),
            part(got),
            wanted,
        )
        # Every leaf was clipped or scaled.
        assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, wanted, part(grads))))


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_stacked_nnx_attention_updates_as_its_layers_do(tx):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def copies(rngs):
        return Encoder(rngs)

    models = copies(nnx.Rngs(0)), Encoder(nnx.Rngs(0))
    layers, one = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in models)
    layers = jax.tree.map(lambda p: p + 0.01, layers)  # no zeros: biases would stay below the floor
    check_stacking(tx, layers, one, [jt.nnx.roles(m) for m in models])


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_scanned_linen_attention_updates_as_its_layers_do(tx):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = lambda block, x: (block(x), None)
            lift = dict(LIFT, variable_axes={"params": 0}, length=3, in_axes=())
            return nn.scan(body, **lift)(LinenEncoder(name="block"), x)[0]

    modules = Scanned(), LinenEncoder()
    layers, one = (m.init(jax.random.key(0), VECTOR)["params"] for m in modules)
    stack, single = (jt.linen.roles(m, VECTOR) for m in modules)
    layers = jax.tree.map(lambda p: p + 0.01, layers["block"])
    check_stacking(tx, layers, one, [lambda path, shape: stack(f"block/{path}", shape), single])
