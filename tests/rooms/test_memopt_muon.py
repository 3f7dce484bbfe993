"""memopt.muon: optax's Muon on the matrices that the roles name, against NumPy in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jaxtricks import _tree, memopt, roles

from tests.reference import muon as reference

CASES = {
    "dense": ((12, 9), ("in", "out")),
    "dense, wide": ((9, 12), ("in", "out")),
    "transposed": ((9, 12), ("out", "in")),
    "scanned": ((3, 12, 9), ("batch", "in", "out")),
    "scanned experts": ((2, 3, 8, 6), ("batch", "batch", "in", "out")),
    "stacked in between": ((12, 3, 9), ("in", "batch", "out")),
    "query": ((8, 2, 5), ("in", "out", "out")),
    "attention output": ((2, 5, 8), ("in", "in", "out")),
    "convolution": ((3, 3, 4, 8), ("in", "in", "in", "out")),
    "scanned convolution": ((2, 3, 3, 4, 8), ("batch", "in", "in", "in", "out")),
    "none": ((2, 12, 9), ("none", "in", "out")),
}
# The same matrix under another shape: what the leaf must equal to rounding.
RESHAPED = {
    "query": (8, 10),
    "attention output": (10, 8),
    "convolution": (36, 8),
}


def updates_of(tx, *grads):
    """The updates of some steps on a tree of one leaf."""
    params = {"w": jnp.ones_like(grads[0])}
    state, update = tx.init(params), jax.jit(tx.update)
    steps = []
    for g in grads:
        u, state = update({"w": jnp.asarray(g)}, state, params)
        steps.append(u["w"])
    return steps


def gradients(shape, dtype=np.float64):
    return np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)


def off(a, b):
    return np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_equals_numpy(case, dtype, x64, ours):
    shape, names = CASES[case]
    grads, slots = gradients(shape), {}
    tx = memopt.muon(0.1, roles=lambda *_: names)
    found = updates_of(tx, *grads.astype(dtype))
    for count, (u, g) in enumerate(zip(found, grads, strict=True)):
        expected = reference.step(g, slots, count, names, rate=0.1)
        assert u.dtype == dtype
        assert off(u, expected) < (1e-12 if dtype == "float64" else 2e-5)


@pytest.mark.parametrize("case", RESHAPED)
def test_a_kernel_is_the_matrix_of_its_sides(case, ours):
    shape, names = CASES[case]
    grads = gradients(shape, np.float32)
    tensor = updates_of(memopt.muon(0.1, roles=lambda *_: names), *grads)
    flat = [g.reshape(RESHAPED[case]) for g in grads]
    matrix = updates_of(memopt.muon(0.1, roles=lambda *_: ("in", "out")), *flat)
    for u, v in zip(tensor, matrix, strict=True):
        assert off(np.reshape(u, v.shape), np.asarray(v)) < 1e-6


def test_what_is_no_matrix_is_adamws(ours):
    params = {
        "kernel": jnp.ones((8, 6)), "embed": jnp.ones((20, 8)), "head": {"kernel": jnp.ones((8, 20))},
        "unknown": jnp.ones((4, 4)), "bias": jnp.ones(6), "scale": jnp.ones((3, 6)),
        "empty": jnp.ones((0, 6)),
    }  # fmt: skip
    rule = roles.by_path(
        {".*kernel|embed|empty": ("in", "out"), "bias": ("none",), "scale": ("batch", "none")},
        strict=False,
    )
    make = functools.partial(memopt.muon, 0.1, roles=rule)
    tx = make(path_filter=roles.exclude("embed", "head"), adam_learning_rate=1e-3, adam_b2=0.99)
    grads = jax.tree.map(jnp.cos, params)
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        adam = optax.adamw(1e-3, b2=0.99, weight_decay=0.0, nesterov=True)
        expected, _ = adam.update(grads, adam.init(params), params)
    for name in ("embed", "head", "unknown", "bias", "scale", "empty"):
        jax.tree.map(
            lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5), found[name], expected[name]
        )
    assert off(found["kernel"], np.asarray(expected["kernel"])) > 1
    # Two numbers per parameter of Adam's, one of Muon's.
    of_adam = {path: x.nu for path, x in _states(make().init(params)).items() if hasattr(x, "nu")}
    (nu,) = of_adam.values()
    assert {x.shape for x in jax.tree.leaves(nu)} == {(4, 4), (6,), (3, 6), (0, 6)}


def _states(state):
    def is_state(x):
        return hasattr(x, "mu")

    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state)
    return {jax.tree_util.keystr(path): x for path, x in leaves if is_state(x)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_parameters_have_a_wide_state(dtype, ours):
    g = gradients((12, 9), dtype)
    tx = memopt.muon(0.1, roles=lambda *_: ("in", "out"))
    wide = updates_of(tx, *g.astype(np.float32))
    for u, v in zip(updates_of(tx, *g), wide, strict=True):
        assert u.dtype == dtype
        assert off(u, np.asarray(v)) < jnp.finfo(dtype).eps
    zero = np.zeros((12, 9), dtype)
    assert not np.any(updates_of(tx, zero)[0])
    half = memopt.muon(0.1, roles=lambda *_: ("in", "out"), mu_dtype="bfloat16")
    assert memopt.state_bytes(half, {"w": g[0]}) < memopt.state_bytes(tx, {"w": g[0]})


def test_any_tree_and_any_name(ours):
    g = jnp.asarray(gradients((12, 9), np.float32)[0])
    expected = updates_of(memopt.muon(0.1, roles=lambda *_: ("in", "out")), g)[0]
    rule = lambda path, shape: ("in", "out") if len(shape) > 1 else ("none",) * len(shape)
    names = {"ns_coeffs": jnp.ones(3), "mu": {"nu": {"mu": g}}, "count": jnp.ones(())}
    for params in (g, (g,), names):
        tx = memopt.muon(0.1, roles=rule)
        found, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
        (matrix,) = (u for u in jax.tree.leaves(found) if u.ndim > 1)
        np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-6)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.head(self.conv(x + self.attention(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Embed(10, 8, name="embed")(x)
        x = x + linen.MultiHeadDotProductAttention(2, name="attention")(x)
        return linen.Dense(10, name="head")(linen.Conv(8, (3,), name="conv")(x))


TOKENS = jnp.arange(12).reshape(2, 6) % 10
MATRICES = {
    "attention/key/kernel", "attention/query/kernel", "attention/value/kernel",
    "attention/out/kernel", "conv/kernel",
}  # fmt: skip


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, (TOKENS * 7 + 3) % 10).mean()


def muon_paths(params, axes, path_filter):
    views = roles.matrix_view(params, axes)
    leaves = _tree.leaves_with_paths(views, lambda x: isinstance(x, roles.MatrixView))
    return {path for path, view in leaves if path_filter(path)}


@pytest.mark.parametrize("around", ["alone", "chain"])
def test_trains_an_nnx_model(around):
    net = Net(nnx.Rngs(0))
    axes, inner = jt.nnx.roles(net), roles.exclude("embed", "head")
    assert muon_paths(nnx.state(net, nnx.Param), axes, inner) == MATRICES
    tx = memopt.muon(0.02, roles=axes, path_filter=inner, adam_learning_rate=0.02)
    if around == "chain":
        clip = jt.agc.adaptive_grad_clip(1.0, roles=axes)
        tx = optax.chain(clip, tx, memopt.stochastic_round(0))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        loss, grads = nnx.value_and_grad(lambda net: cross_entropy(net(TOKENS)))(net)
        optimizer.update(net, grads)
        return loss

    losses = [float(step(net, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_tree_of_variables_is_updated_as_one_of_arrays():
    net = Net(nnx.Rngs(0))
    state, axes = nnx.state(net, nnx.Param), jt.nnx.roles(net)
    plain = nnx.to_pure_dict(state)
    tx = memopt.muon(0.02, roles=axes)
    found, after = tx.update(state, before := tx.init(state), state)
    expected, _ = tx.update(plain, tx.init(plain), plain)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for u, v in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-6)


def test_trains_a_linen_model():
    net = LinenNet()
    params = net.init(jax.random.key(0), TOKENS)["params"]
    axes, inner = jt.linen.roles(net, TOKENS), roles.exclude("embed", "head")
    assert muon_paths(params, axes, inner) == MATRICES
    tx = memopt.muon(0.02, roles=axes, path_filter=inner, consistent_rms=0.2)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss = lambda p: cross_entropy(net.apply({"params": p}, TOKENS))
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_every_other_argument_is_optaxs():
    theirs = inspect.signature(optax.contrib.muon).parameters.keys()
    ours = inspect.signature(memopt.muon).parameters.keys()
    assert ours ^ theirs == {"roles", "path_filter", "muon_weight_dimension_numbers"}
    g = gradients((12, 9), np.float32)
    options = dict(beta=0.8, ns_steps=3, nesterov=False, weight_decay=0.1, consistent_rms=0.2)
    found = updates_of(memopt.muon(0.1, roles=lambda *_: ("in", "out"), **options), *g)
    for u, v in zip(found, updates_of(optax.contrib.muon(0.1, **options), *g), strict=True):
        np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-7)
    with pytest.raises(TypeError, match="betta"):
        memopt.muon(0.1, roles=roles.infer, betta=0.9)


@pytest.mark.parametrize("rate", [0.5, lambda step: 0.5])
def test_an_injected_rate_takes_effect(rate):
    make = optax.inject_hyperparams(memopt.muon, static_args=("roles", "path_filter"))
    tx = make(rate, roles=lambda *_: ("in", "out"), beta=0.9)
    params = {"w": jnp.asarray(gradients((12, 9), np.float32)[0])}
    state = jax.jit(tx.init)(params)
    full, state = jax.jit(tx.update)(params, state, params)
    assert {"learning_rate", "beta", "weight_decay"} <= state.hyperparams.keys()
    plain = memopt.muon(0.5, roles=lambda *_: ("in", "out"), beta=0.9)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(full["w"], expected["w"], rtol=1e-4, atol=1e-6)


MATRIX = {"w": jnp.ones((4, 3))}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: memopt.muon(0.1, roles=None), "memopt.muon: `roles` is None: give"),
        (lambda: memopt.muon(-0.1, roles=roles.infer), "memopt.muon: `learning_rate` is -0.1: give"),
        (
            lambda: memopt.muon(0.1, roles=roles.infer, muon_weight_dimension_numbers=None),
            "memopt.muon: `muon_weight_dimension_numbers` is made from `roles`: leave it out",
        ),
        (lambda: memopt.muon(0.1, roles=roles.infer).init(MATRIX), "leave no matrix to Muon, not even 'w'"),
        (
            lambda: memopt.muon(
                0.1, roles=lambda *_: ("in", "out"), path_filter=roles.exclude("v")
            ).init(MATRIX),
            "roles.exclude: 'v' matches no parameter",
        ),
        (lambda: memopt.muon(0.1, roles={"w": ("in",)}).init(MATRIX), "give one per axis"),
        (
            lambda: memopt.muon(0.1, roles=lambda *_: ("batch", "in", "out"), adaptive=True).init(
                {"w": jnp.ones((2, 4, 3))}
            ),
            "memopt.muon: `adaptive` is True, but optax sums its norm over all matrices of 'w'",
        ),
        (
            lambda: memopt.muon(0.1, roles=lambda *_: ("in", "out")).init({"w": jnp.ones((2, 2), int)}),
            "memopt.muon: the parameter 'w' is int",
        ),
        (
            lambda: (tx := memopt.muon(0.1, roles=lambda *_: ("in", "out"))).update(
                MATRIX, tx.init(MATRIX)
            ),
            "memopt.muon needs `params`",
        ),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_do(make, says):
    with pytest.raises(ValueError) as found:
        make()
    assert says in str(found.value)
