"""autocast in 8 bits: against float64, in the zoo, in both orders of grad, and its edges."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from benchmarks.amp_peers import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtricks import _jaxpr, amp, remat
from jaxtricks.amp import _rounding8
from jaxtricks.remat import _recompute

from tests import zoo

F8, I8 = "p=f32,c=f8,o=f32", "p=f32,c=i8,o=f32"
ALL = {"first": "f8", "last": "f8", "attention": "f8"}
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
CASES = [
    pytest.param(name, marks=pytest.mark.slow if name in ("CNN", "LSTM") else ())
    for name in zoo.CASES
]
LAYERS = [k / 2 for k in zoo.kernels(4)]
X = zoo.draw(zoo.BATCH, zoo.WIDTH)


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """The programs are strangers': a bias is added to a batch."""
    with jax.numpy_rank_promotion("allow"):
        yield


def network(layers, x):
    for w in layers[:-1]:
        x = jnp.tanh(x @ w)
    return x @ layers[-1]


def loss(layers, x):
    return jnp.mean(network(layers, x) ** 2)


def products(fn, *args):
    """Counter of (primitive, dtype of either operand) in the trace, loops counted once."""
    found = Counter()
    for eqn in _jaxpr.walk(jax.make_jaxpr(fn)(*args).jaxpr):
        name = eqn.primitive.name
        if name == "product8":
            found[(name, *(side.format for side in eqn.params["sides"]))] += 1
        elif name in amp._precision_table.PRODUCTS:
            found[(name, *(v.aval.dtype.name for v in eqn.invars[:2]))] += 1
    return found


def in_8_bits(found):
    return {key: n for key, n in found.items() if key[0] == "product8"}


def multiplied(fn, *args):
    """Counter of the element types that the lowered program multiplies."""
    text = jax.jit(fn).lower(*args).as_text()
    lines = [line for line in text.splitlines() if "dot_general " in line or "convolution(" in line]
    return Counter(
        tuple(
            part.rpartition("x")[2].rstrip(">)")
            for part in line.split(" : ")[-1].split(" -> ")[0].split(", ")
        )
        for line in lines
    )


# The codec, against float64.


def reference(x, dtype, axes):
    """x rounded to the dtype with a scale per block, as float64: NumPy and ml_dtypes alone."""
    x = np.asarray(x, np.float64)
    largest = np.max(np.where(np.isfinite(x), np.abs(x), 0), axis=axes, keepdims=True)
    if dtype == "int8":
        step = np.where(largest > 0, largest, 127) / 127
        return np.clip(np.round(x / step), -127, 127) * step
    limit = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(divide="ignore"):
        scale = 2.0 ** np.clip(np.floor(np.log2(limit / largest)), -126, 126)
    return (x * scale).astype(np.float32).astype(dtype).astype(np.float64) / scale


@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("policy", [F8, I8])
@pytest.mark.parametrize("shapes", ["ij,jk->ik", "bij,bjk->bik", "bij,jk->bik", "ijb,bkj->bik"])
def test_a_product_equals_its_reference(shapes, policy, scaling):
    sizes = {"i": 5, "j": 64, "k": 7, "b": 3}
    ins, out = shapes.split("->")
    first, second = ins.split(",")
    a, b = (
        zoo.draw(*(sizes[i] for i in names), seed=seed).astype(jnp.bfloat16).astype(jnp.float32)
        for seed, names in enumerate((first, second))
    )
    fn = functools.partial(jnp.einsum, shapes)
    found = amp.autocast(fn, policy, scaling=scaling)(a, b)
    dtype = "int8" if policy == I8 else E4M3

    def axes(names):
        """Batch axes have their own scales, and so have all that are not summed in "row"."""
        apart = set(out) if scaling == "row" else set(first) & set(second) & set(out)
        return tuple(i for i, name in enumerate(names) if name not in apart)

    exact = np.einsum(shapes, reference(a, dtype, axes(first)), reference(b, dtype, axes(second)))
    # It leaves in bfloat16.
    # An integer that lies halfway may go either way in float32.
    near = 1e-5 if policy == F8 else 5e-3
    np.testing.assert_allclose(found, exact, rtol=2.0**-8, atol=near * np.abs(exact).max())


def test_blocks_of_32_have_their_own_scale():
    spread = jnp.repeat(2.0 ** jnp.arange(-40, 40, 20), 32)[:100]
    a, w = zoo.draw(4, 100) * spread, zoo.draw(100, 3, seed=1) / spread[:, None]
    exact = np.asarray(a, np.float64) @ np.asarray(w, np.float64)
    errors = {
        scaling: distance(amp.autocast(jnp.matmul, F8, scaling=scaling)(a, w), exact)
        for scaling in ("tensor", "row", "block32")
    }
    assert errors["block32"] < 0.06 < 0.5 < min(errors["tensor"], errors["row"])


@settings(deadline=None)
@given(
    st.integers(-122, 126).map(lambda k: 1.37 * 2.0**k),
    st.sampled_from([E4M3, E5M2]),
)
def test_a_scale_is_a_power_of_two_that_fills_the_format(largest, format):
    x = jnp.array([largest, -largest / 3, 0.0], jnp.float32)
    values, step = _rounding8.round_to_8_bits(x, format=format, axes=(0,))
    assert np.frexp(step)[0] == 0.5  # a mantissa
    limit = float(jnp.finfo(format).max)
    magnitude = float(jnp.abs(values.astype(jnp.float32)).max())
    # Within float32's exponents: a scale of 2^127 has no reciprocal.
    assert limit / 2 <= magnitude <= limit or step[0] == 2.0**-126
    back = values.astype(jnp.float32) * step
    mantissa = jnp.finfo(format).nmant
    np.testing.assert_allclose(back, x, rtol=2.0 ** -(mantissa + 1), atol=0)


@pytest.mark.parametrize("policy", [F8, I8])
def test_what_is_not_finite_reaches_the_result(policy):
    fn = amp.autocast(jnp.matmul, policy)
    w = LAYERS[0]
    clean = fn(X, w)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        found = fn(X.at[1, 2].set(bad), w)
        assert jnp.isnan(found[1]).all()
        if policy == F8:  # an integer cannot say it, so int8 loses all that shares its scale
            others = jnp.array([0, *range(2, zoo.BATCH)])
            np.testing.assert_array_equal(found[others], clean[others])
        loss = lambda w, bad=bad: fn(X.at[1, 2].set(bad), w).sum()
        assert not jnp.isfinite(loss(w)) and not jnp.isfinite(jax.grad(loss)(w)).all()
    np.testing.assert_array_equal(fn(0 * X, w), 0 * clean)
    np.testing.assert_array_equal(jax.grad(lambda w: fn(0 * X, w).sum())(w), 0 * w)
    assert jnp.isfinite(fn(X / jnp.abs(X).max() * 3e38, w / 100)).all()
    assert fn(X[:0], w).shape == (0, zoo.WIDTH)


# What runs in 8 bits.


@pytest.mark.parametrize("rules", [None, ALL], ids=["by role", "all"])
@pytest.mark.parametrize("name", CASES)
def test_the_zoo_in_both_orders(name, rules):
    fn, args = zoo.CASES[name]()
    inside = jax.grad(amp.autocast(fn, F8, rules=rules))
    outside = amp.autocast(jax.grad(fn), F8, rules=rules)
    found = products(inside, *args)
    assert found == products(outside, *args)
    narrow = in_8_bits(found)
    assert any(E5M2 in key for key in narrow) and ("product8", E4M3, E4M3) in narrow
    if rules:
        assert narrow == dict(found)
    exact = jax.jit(jax.grad(fn))(*args)
    # Eight examples: an activation that turns off moves a gradient by a tenth.
    assert distance(jax.jit(inside)(*args), exact) < 0.35
    assert distance(jax.jit(outside)(*args), exact) < 0.35


def test_the_lowered_program_multiplies_in_8_bits():
    grad = jax.grad(amp.autocast(loss, F8, rules=ALL))
    assert multiplied(grad, LAYERS, X) == {
        ("f8E4M3FN", "f8E4M3FN"): 4,
        ("f8E5M2", "f8E4M3FN"): 7,  # the input has no gradient
    }
    image, kernel = zoo.draw(2, 6, 6, 4), zoo.draw(3, 3, 4, 4, seed=1)
    conv = lambda k, x: lax.conv_general_dilated(
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    total = lambda k, x: jnp.sin(amp.autocast(conv, F8)(k, x)).sum()
    # lax has convolutions of one dtype only.
    assert multiplied(jax.grad(total, (0, 1)), kernel, image) == {("f8E4M3FN", "f8E4M3FN"): 3}


def test_what_ran_before_does_not_matter():
    """Warm and cold caches of jnp's own jitted functions, in every order."""
    fns = {
        "plain": loss,
        "bf16": amp.autocast(loss),
        "f8": amp.autocast(loss, F8),
    }
    lowered = {}
    for order in (["f8", "plain", "bf16"], ["plain", "bf16", "f8"], ["bf16", "f8", "plain"]):
        jax.clear_caches()
        for name in (*order, *reversed(order)):
            found = multiplied(jax.grad(fns[name]), LAYERS, X)
            assert lowered.setdefault(name, found) == found
    assert len(set(map(str, lowered.values()))) == 3


def test_roles_and_rules():
    def roles(fn, *args, **settings):
        found = amp.explain(fn, *args, policy=F8, **settings)
        whys = {i.why.partition(":")[0] for i in found.islands if i.dtype == "bfloat16"}
        return found.low, found.half, whys

    grad = jax.grad(loss)
    assert roles(grad, LAYERS, X) == (6, 5, {"first", "last"})
    assert roles(grad, LAYERS, X, rules={"last": "f8"}) == (9, 2, {"first"})
    assert roles(grad, LAYERS, X, rules=ALL) == (11, 0, set())
    # One or two products are not left out.
    assert roles(jnp.matmul, X, LAYERS[0]) == (1, 0, set())
    here = r"test_amp_product8\.py:\d+:\d+ \(network\)"
    assert roles(grad, LAYERS, X, rules={here: "bf16", **ALL}) == (0, 11, {"rules="})
    attention, args = zoo.CASES["masked attention"]()
    low, _, whys = roles(jax.grad(attention), *args)
    assert "attention" in whys and low > 0
    # In bfloat16 as well as in 8 bits, a primitive has its row of the table.
    assert amp.explain(loss, LAYERS, X, policy=F8, rules={"dot_general": "deny"}).full == 4


def test_a_recomputed_product_has_the_role_of_the_first_time():
    def scanned(layers, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        x, _ = lax.scan(body, x @ layers[0], jnp.stack(layers[1:3]))
        return jnp.mean((x @ layers[3]) ** 2)

    found = in_8_bits(products(amp.autocast(jax.grad(scanned), F8), LAYERS, X))
    # The product of the layer, that again, and its two gradients; loops count once.
    assert found["product8", E4M3, E4M3] == 2 and sum(found.values()) == 4
    assert found == in_8_bits(products(jax.grad(amp.autocast(scanned, F8)), LAYERS, X))


def test_rules_of_the_user_have_the_roles_of_the_first_time():
    # recompute_grad runs the function again in the backward rule of a custom_vjp.
    if not _recompute.barriers_hold():
        pytest.skip("what ties the second run to the gradient looks like a part of it here")

    def head(layers, x):
        x = x @ layers[0]
        x = jnp.tanh(x @ layers[1])
        return jnp.sum(x @ layers[2])

    def counts(fn):
        found = products(jax.grad(amp.autocast(fn, F8)), LAYERS, X)
        return {key[1:]: n for key, n in found.items()}

    plain, again = counts(head), counts(remat.recompute_grad(head))
    assert plain == {(E4M3, E4M3): 1, (E5M2, E4M3): 2, ("bfloat16", "bfloat16"): 5}
    # Each once more, and the gradient of x.
    assert again == {**plain, (E4M3, E4M3): 2, ("bfloat16", "bfloat16"): 8}


def test_policies_of_checkpoint_save_products_in_8_bits():
    def forward(policy, order):
        body = jax.checkpoint(network, policy=policy)
        total = lambda layers, x: jnp.sum(body(layers, x))
        grad = jax.grad(amp.autocast(total, F8, rules=ALL))
        if order == "outside":
            grad = amp.autocast(jax.grad(total), F8, rules=ALL)
        return products(grad, LAYERS, X)["product8", E4M3, E4M3]

    policies = jax.checkpoint_policies
    for order in ("inside", "outside"):
        assert forward(policies.everything_saveable, order) == 4
        assert forward(policies.nothing_saveable, order) == 7  # the last is not needed again
        assert forward(policies.dots_saveable, order) == 4


def test_the_census_counts_operations():
    big = [*LAYERS[:3], zoo.draw(zoo.WIDTH, 3)]
    found = amp.explain(loss, big, X, policy=F8, rules={"first": "f8"})
    layer = 2 * zoo.BATCH * zoo.WIDTH**2
    assert found.flops == {E4M3: 3 * layer, "bfloat16": layer * 3 // zoo.WIDTH}
    assert found.share_of_flops() == pytest.approx(3 / (3 + 3 / 16))
    assert found.share_of_flops("bfloat16") == pytest.approx(3 / 16 / (3 + 3 / 16))
    assert f"{E4M3} has 94.1 % of their operations" in str(found)
    scanned = lambda w, x: lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]
    assert amp.explain(scanned, LAYERS[0], X).flops == {"bfloat16": 5 * layer}
    assert amp.explain(jnp.sin, X).share_of_flops() == 0


# Transformations.


def test_derivatives_of_all_orders():
    fn = amp.autocast(loss, F8, rules=ALL)
    direction = jax.tree.map(lambda w: zoo.draw(*w.shape, seed=9), LAYERS)
    forward = lambda fn: jax.jvp(lambda w: fn(w, X), (LAYERS,), (direction,))[1]
    outputs = amp.autocast(network, F8, rules=ALL)
    assert distance(forward(outputs), forward(network)) < 0.15
    product = lambda fn: jax.jvp(jax.grad(lambda w: fn(w, X)), (LAYERS,), (direction,))[1]
    reverse = lambda fn: jax.grad(
        lambda w: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(fn)(w, X), direction)))
    )(LAYERS)
    jitted = lambda fn: jax.jit(fn)
    for hessian in (product, reverse):
        exact = hessian(loss)
        assert distance(hessian(fn), exact) < 0.2
        assert distance(hessian(jitted(fn)), exact) < 0.2
        assert distance(jax.jit(amp.autocast(functools.partial(hessian, loss), F8))(), exact) < 0.2


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_members_under_vmap_have_their_own_scales(in_axes):
    def member(x, axis, i):
        return x if axis is None else jnp.take(x, i, axis)

    apart = 10.0 ** (-6 * jnp.arange(3))
    args = [
        base if axis is None else jnp.stack([base * s for s in apart], axis)
        for base, axis in zip((X, LAYERS[0]), in_axes, strict=True)
    ]
    fn = amp.autocast(jnp.matmul, F8)
    found = jax.vmap(fn, in_axes)(*args)
    for i in range(3):
        np.testing.assert_array_equal(
            found[i], fn(*(member(x, axis, i) for x, axis in zip(args, in_axes, strict=True)))
        )
    square = lambda x, w: jnp.sum(fn(x, w) ** 2)
    found = jax.vmap(jax.grad(square, (0, 1)), in_axes)(*args)
    for i in range(3):
        alone = jax.grad(square, (0, 1))(
            *(member(x, axis, i) for x, axis in zip(args, in_axes, strict=True))
        )
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2.0**-7, atol=1e-6 * jnp.abs(b).max())


def test_convolutions_under_vmap():
    fn = amp.autocast(
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        F8,
    )
    image, kernel = zoo.draw(2, 5, 5, 4), zoo.draw(3, 3, 4, 6, seed=1)
    images, kernels = jnp.stack([image, 1e-6 * image]), jnp.stack([kernel, 1e5 * kernel])
    for x, k, axes in ((images, kernel, (0, None)), (image, kernels, (None, 0))):
        found = jax.vmap(fn, axes)(x, k)
        for i in range(2):
            alone = fn(*(a if axis is None else a[i] for a, axis in zip((x, k), axes, strict=True)))
            np.testing.assert_array_equal(found[i], alone)
    # A kernel for each image becomes groups, which share a scale.
    found = jax.vmap(fn)(jnp.stack([image, 2 * image]), jnp.stack([kernel, 3 * kernel]))
    np.testing.assert_allclose(found[1], fn(2 * image, 3 * kernel), rtol=0.02, atol=0.02)


def test_loops_save_8_bits():
    stack = jnp.stack(LAYERS)

    def scanned(stack, x):
        return jnp.sum(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0])

    jaxpr = jax.make_jaxpr(jax.grad(amp.autocast(scanned, F8)))(stack, X).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    saved = Counter(v.aval.dtype.name for v in forward.outvars if v.aval.shape[:1] == (4,))
    assert saved[E4M3] >= 2  # the layer's input and its kernel
    text = jax.jit(jax.grad(amp.autocast(scanned, F8))).lower(stack, X).compile().as_text()
    carried = next(line for line in text.splitlines() if " while(" in line)
    assert "f8e4m3fn[4,8,16]" in carried and "bf16[4,16,16]" not in carried


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    x, w = place(X, "data", None), place(LAYERS[0], None, "model")
    fn = lambda w, x: jnp.sum(jnp.sin(amp.autocast(jnp.matmul, F8)(x, w)))
    found = jax.jit(jax.value_and_grad(fn))(w, x)
    exact = jax.value_and_grad(fn)(LAYERS[0], X)
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-3)
    np.testing.assert_allclose(found[1], exact[1], rtol=0.02, atol=0.02)


def test_shard_map_equals_one_device():
    """A scale for each shard: powers of two change no digit, so it is no matter which."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    cast = amp.autocast(loss, F8, rules=ALL)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    def spread(layers, x):
        return lax.pmean(cast(layers, x), "data")

    found = jax.jit(jax.value_and_grad(spread))(LAYERS, X)
    exact = jax.value_and_grad(cast)(LAYERS, X)
    # XLA may keep a float32 value where bfloat16 was asked for, and an entry near the
    # middle of two then rounds the other way.
    np.testing.assert_allclose(found[0], exact[0], rtol=0.03)
    assert distance(found[1], exact[1]) < 0.1
    product = amp.autocast(jnp.matmul, F8)
    apart = jax.shard_map(product, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    np.testing.assert_array_equal(apart(X, LAYERS[0]), product(X, LAYERS[0]))


def test_int8_passes_gradients_straight_through():
    x, w = X, LAYERS[0]
    rounded = [
        jnp.asarray(reference(a.astype(jnp.bfloat16), "int8", (0, 1)), jnp.float32) for a in (x, w)
    ]
    weights = zoo.draw(zoo.BATCH, zoo.WIDTH, seed=5)
    fn = lambda x, w: jnp.sum(weights * amp.autocast(jnp.matmul, I8)(x, w))
    found = jax.grad(fn, (0, 1))(x, w)
    exact = jax.grad(lambda x, w: jnp.sum(weights * (x @ w)), (0, 1))(*rounded)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)
    assert multiplied(amp.autocast(jnp.matmul, I8), x, w) == {("i8", "i8"): 1}
    assert multiplied(jax.grad(fn), x, w)["bf16", "bf16"] >= 1


def test_a_step_descends_with_an_nnx_model():
    import jaxtricks as jt
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second, self.third, self.last = (
                nnx.Linear(16, 16, rngs=rngs) for _ in range(4)
            )
            self.norm = nnx.BatchNorm(16, rngs=rngs)

        def __call__(self, x):
            for layer in (self.first, self.second, self.third, self.last):
                x = x + nnx.gelu(layer(x))
            return self.norm(x)

    model = Model(nnx.Rngs(0))
    fn = jt.nnx.autocast(lambda model, x: jnp.mean((model(x) - 1) ** 2), F8)
    value, grads = nnx.value_and_grad(fn)(model, X)
    assert jnp.isfinite(value) and model.norm.mean[...].dtype == jnp.float32
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    smaller = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert fn(nnx.merge(graph, smaller, rest), X) < value


# Bad settings.


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"policy": "f8"}, "`param` is float8_e4m3fn.*compute"),
        ({"policy": "p=f32,c=f8,o=f8"}, "`output` is float8_e4m3fn"),
        ({"policy": "p=f32,c=f4,o=f32"}, "unknown dtype 'f4'"),
        ({"policy": F8, "rules": {"first": "f32"}}, "'first' the dtype 'f32'; use bf16 or f8"),
        ({"policy": F8, "rules": {"model.py:12": "f8"}}, "use bf16"),
        ({"policy": F8, "rules": {"model.py:(": "bf16"}}, "not a regular expression"),
        ({"rules": {"attention": "bf16"}}, "'attention', which is for products in 8 bits"),
    ],
)
def test_bad_settings(given, match):
    for entry in (amp.autocast, lambda fn, **s: amp.explain(fn, 1.0, **s)):
        with pytest.raises(ValueError, match=match):
            entry(jnp.sin, **given)
    with pytest.raises(Exception, match="scaling"):  # here the type checker is first
        amp.autocast(jnp.sin, F8, scaling="column")


def test_policies():
    policy = amp.Policy.parse("c=f8")
    assert str(policy) == "p=f32,c=f8,o=bf16" and policy.arrays == jnp.bfloat16
    assert policy.cast_to_compute(X).dtype == jnp.bfloat16
    assert dataclasses.replace(policy, compute=jnp.int8).arrays == jnp.bfloat16
    with pytest.raises(ValueError, match=r"use amp\.autocast"):
        amp.with_policy(jnp.sin, F8)
    value, grads = amp.value_and_grad(loss, F8)(LAYERS, X)
    assert value.dtype == jnp.float32 and grads[0].dtype == jnp.float32
