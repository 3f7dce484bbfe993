"""autocast: where every operation of a zoo of programs runs, what it costs in accuracy, and its edges."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from benchmarks.amp_peers import PRODUCTS, distance, gradient64
from flax import nnx
from jax import lax
from jax.experimental import pallas
from jaxtricks import _compat, _dtypes, _jaxpr, amp

from tests import zoo

CASES = [
    pytest.param(name, marks=pytest.mark.devices) if name.endswith("parallel") else name
    for name in zoo.CASES
]
W, X = zoo.kernels(1)[0], zoo.draw(zoo.BATCH, zoo.WIDTH)
SUMS = {"reduce_sum", "reduce_prod", "cumsum", "scatter-add", "reduce_window_sum", "psum"}
SUMS |= {"psum2", "psum_invariant", "select_and_scatter_add", "reduce_scatter"}
SENSITIVE = {"exp", "exp2", "expm1", "log", "log1p", "pow", "rsqrt"}


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """The programs are strangers': a bias is added to a batch."""
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def case(name):
    return zoo.CASES[name]()


def around(loss, order, policy="p=f32,c=bf16,o=f32", **settings):
    """The gradient of loss, autocast inside of grad or outside."""
    if order == "grad(autocast)":
        return jax.value_and_grad(amp.autocast(loss, policy, **settings))
    return amp.autocast(jax.value_and_grad(loss), policy, **settings)


def operands(fn, *args):
    """[(primitive, dtypes of its floating operands)] of the whole trace."""
    for eqn in _jaxpr.walk(jax.make_jaxpr(fn)(*args).jaxpr):
        dtypes = {v.aval.dtype.name for v in eqn.invars if _dtypes.is_floating(v.aval)}
        if dtypes:
            yield eqn, dtypes


@pytest.mark.parametrize("order", ["grad(autocast)", "autocast(grad)"])
@pytest.mark.parametrize("low", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_low_and_sums_are_not(name, low, order):
    loss, args = case(name)
    fn = around(loss, order, f"p=f32,c={low},o=f32")
    products = 0
    for eqn, dtypes in operands(fn, *args):
        primitive = eqn.primitive.name
        if primitive in PRODUCTS:
            products += 1
            assert dtypes == {low}, eqn
        elif primitive in SUMS | SENSITIVE:
            assert dtypes == {"float32"}, eqn
    assert products >= 2
    found, plain = jax.eval_shape(fn, *args), jax.eval_shape(jax.value_and_grad(loss), *args)
    same = jax.tree.map(lambda a, b: (a.dtype, a.weak_type) == (b.dtype, b.weak_type), found, plain)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_the_zoo_is_unknown(name):
    loss, args = case(name)
    found = amp.explain(jax.grad(loss), *args)
    assert found.unknown == {} and found.opaque == {} and found.full == 0 and found.low >= 2


@pytest.mark.parametrize("name", [n for n in CASES if n != "LSTM"])
def test_gradients_are_as_close_as_cast_by_hand(name):
    loss, args = case(name)
    exact = gradient64(loss, args)
    by_hand = distance(jax.jit(jax.grad(amp.with_policy(loss, "p=f32,c=bf16,o=f32")))(*args), exact)
    for order in ("grad(autocast)", "autocast(grad)"):
        found = jax.jit(around(loss, order))(*args)[1]
        assert distance(found, exact) <= 1.1 * by_hand, order


def test_gradients_of_a_recurrent_network_are_close():
    loss, args = case("LSTM")  # its module casts to its own dtype: there is no cast by hand
    exact = jax.jit(jax.grad(loss))(*args)
    found = jax.jit(around(loss, "grad(autocast)"))(*args)[1]
    assert distance(found, exact) < 0.02


def test_a_tangent_of_equal_operands_is_not_merged():
    @jax.custom_jvp
    def product(a, b):
        return a @ b

    @product.defjvp
    def rule(primals, tangents):
        return product(*primals), 2 * tangents[0] @ primals[1] + 3 * primals[0] @ tangents[1]

    def loss(w):
        return product(w, w).sum()

    exact = jax.grad(loss)(W)
    np.testing.assert_allclose(jax.grad(amp.autocast(loss))(W), exact, atol=0.1)


def test_higher_derivatives_and_vmap():
    def loss(w):
        return jnp.tanh(X[0] @ w).sum()

    w = W[:, 0]
    exact = jax.hessian(lambda w: loss(w[:, None]))(w)
    found = jax.hessian(lambda w: amp.autocast(loss)(w[:, None]))(w)
    assert distance(found, exact) < 0.05
    rows = jax.vmap(lambda x: amp.autocast(lambda x, w: jnp.tanh(x @ w))(x, W))(X)
    np.testing.assert_array_equal(rows, amp.autocast(lambda x, w: jnp.tanh(x @ w))(X, W))


def test_scan_carries():
    def layers(w, x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0].sum()

    def accumulate(w, xs):
        """Gradient accumulation: the carry is only added to."""
        step = lambda total, x: (total + jax.grad(lambda w: ((x @ w) ** 2).sum())(w), None)
        return lax.scan(step, jnp.zeros_like(w), xs)[0]

    def carry(fn, *args, **settings):
        jaxpr = jax.make_jaxpr(amp.autocast(fn, **settings))(*args).jaxpr
        (eqn,) = [e for e in _jaxpr.walk(jaxpr) if e.primitive.name == "scan"]
        return [v.aval.dtype.name for v in eqn.outvars[: _compat.scan_parts(eqn).carry]]

    def recurrent_state(w, xs):
        """Linear attention: a sum of outer products, which queries read."""

        def step(state, x):
            return state + x[:, None] * x[None], jnp.einsum("i,ij->j", x, state)

        return lax.scan(step, jnp.zeros_like(w), xs)[1]

    def stack(w, x, wrap=lambda f: f):
        """Layers, whose kernels are scanned."""
        body = wrap(lambda x, w: (x + jnp.tanh(x @ w), None))
        return lax.scan(body, x, jnp.stack([w, w]))[0].sum()

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert carry(functools.partial(stack, wrap=wrap), W, X) == ["bfloat16"]
    backward = jax.make_jaxpr(amp.autocast(jax.grad(stack)))(W, X).jaxpr
    scans = [e for e in _jaxpr.walk(backward) if e.primitive.name == "scan"]
    assert [e.outvars[0].aval.dtype.name for e in scans] == ["bfloat16"] * 2
    assert carry(stack, W, X, scan_carry="keep") == ["float32"]
    assert carry(recurrent_state, W, X) == ["float32"]
    assert carry(layers, W, X) == ["float32"]  # one kernel in all rounds
    assert carry(layers, W, X, scan_carry="auto") == ["bfloat16"]
    assert carry(accumulate, W, X[:, None]) == ["float32"]
    assert carry(accumulate, W, X[:, None], scan_carry="auto") == ["float32"]


def test_a_shared_weight_gathers_its_gradient_in_float32():
    # Two uses, whose gradients have no sum in bfloat16.
    def loss(w, x):
        return (x @ w).sum() + ((x * 2.0**-10) @ w).sum()

    for order in ("grad(autocast)", "autocast(grad)"):
        found = around(loss, order)(jnp.ones((2, 2)), jnp.ones((1, 2)))[1]
        np.testing.assert_array_equal(found, 1 + 2.0**-10)


def test_what_is_left_alone(x64):
    def kept(fn, *args):
        return {
            d
            for e, ds in operands(amp.autocast(fn), *args)
            for d in ds
            if e.primitive.name in PRODUCTS
        }

    w32, x32 = W.astype(jnp.float32), X.astype(jnp.float32)
    assert kept(lambda w, x: x @ w, W.astype(jnp.float64), X.astype(jnp.float64)) == {"float64"}
    highest = ("highest", "high", ("default", "highest"), lax.DotAlgorithmPreset.F32_F32_F32)
    for precision in highest:
        assert kept(lambda w, x, p=precision: jnp.dot(x, w, precision=p), w32, x32) == {"float32"}
    assert kept(lambda w, x: jnp.vdot(x[0], w[0]), w32, x32) == {"float32"}
    assert kept(lambda w, x: jnp.einsum("bi,bi->b", x, x), w32, x32) == {"float32"}
    assert kept(lambda w, x: amp.full_precision(lambda a, b: a @ b)(x, w), w32, x32) == {"float32"}
    assert kept(
        lambda w, x: jnp.linalg.solve(w + 5 * jnp.eye(16, dtype=jnp.float32), x.T), w32, x32
    ) <= {"float32"}


@pytest.mark.parametrize(
    "precision",
    [None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16", ("default", "fastest")],
)
def test_a_product_of_the_lowest_precision_is_one_without_it(precision):
    image, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((2, 2, 2, 3))
    layout = ("NHWC", "HWIO", "NHWC")
    for fn, args in (
        (lambda x, w: jnp.dot(x, w, precision=precision), (X, W)),
        (lambda x, w: jnp.einsum("bi,io->bo", x, w, precision=precision), (X, W)),
        (lambda x, w: lax.ragged_dot(x, w[None], jnp.array([8]), precision=precision), (X[:8], W)),
        (
            lambda x, k: lax.conv_general_dilated(
                x, k, (1, 1), "SAME", dimension_numbers=layout, precision=precision
            ),
            (image, kernel),
        ),
    ):
        cast, plain = amp.autocast(fn), jax.jit(fn)
        found = [
            d for e, d in operands(cast, *args) if e.primitive.name in amp._precision_table.PRODUCTS
        ]
        assert found == [{"bfloat16"}]
        np.testing.assert_allclose(jax.jit(cast)(*args), plain(*args), rtol=0.03, atol=0.03)
        census = amp.explain(fn, *args)
        assert (census.low, census.full) == (1, 0)


@pytest.mark.parametrize("order", ["grad(autocast)", "autocast(grad)"])
def test_full_precision_holds_in_the_backward_pass(order):
    def loss(w):
        return amp.full_precision(lambda x, w: jnp.tanh(x @ w))(X, w).sum() + (X @ w).sum()

    products = [d for e, d in operands(around(loss, order), W) if e.primitive.name in PRODUCTS]
    assert sorted(map(min, products)) == ["bfloat16"] * 2 + ["float32"] * 2


def test_static_arguments_and_outputs():
    @amp.autocast
    def fn(x, w, mode, flag=False, extra=None):
        assert mode == "tanh" and flag is True and extra is None
        return {"y": jnp.tanh(x @ w), "mode": mode, "n": 3, "none": None}

    out = fn(X, W, "tanh", flag=True)
    assert out["mode"] == "tanh" and out["n"] == 3 and out["none"] is None
    assert out["y"].dtype == jnp.float32
    low = amp.autocast(lambda x, w: (x @ w, x.astype(jnp.int32)), "p=f32,c=bf16,o=bf16")(X, W)
    assert (low[0].dtype, low[1].dtype) == (jnp.bfloat16, jnp.int32)
    same = amp.autocast(lambda x, w: x @ w, "full")(X, W)
    np.testing.assert_array_equal(same, X @ W)


@pytest.mark.devices
def test_names_and_shardings_and_donation_survive():
    mesh = jax.make_mesh((4,), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    @functools.partial(jax.jit, in_shardings=(rows, None), out_shardings=rows, donate_argnums=0)
    def block(x, w):
        with jax.named_scope("projection"):
            return x @ w

    def fn(x, w):
        return block(x + 1, w)

    closed = jax.make_jaxpr(amp.autocast(fn))(X, W)
    (eqn,) = [e for e in closed.jaxpr.eqns if e.params.get("name") == "block"]
    assert eqn.params["out_shardings"][0].spec == rows.spec
    assert eqn.params["donated_invars"] == (True, False)
    (dot,) = [e for e in _jaxpr.walk(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert "projection" in str(dot.source_info.name_stack)
    assert jax.jit(amp.autocast(fn))(X, W).sharding.spec == rows.spec


def test_effects_and_callbacks_stay(capfd):
    def fn(x, w):
        jax.debug.print("sum {}", jnp.float32(3))
        y = jax.pure_callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return y @ w

    assert amp.explain(fn, X, W).opaque["pure_callback"] == 1
    np.testing.assert_allclose(amp.autocast(fn)(X, W), X @ W, atol=0.05)
    jax.effects_barrier()
    assert "sum 3.0" in capfd.readouterr().out


def test_rules_of_the_caller():
    def fn(x, w):
        return jnp.tanh(x @ w) * 2

    def tanh(**settings):
        return [
            d for e, d in operands(amp.autocast(fn, **settings), X, W) if e.primitive.name == "tanh"
        ]

    assert tanh() == [{"float32"}]  # the result is wanted in float32
    assert tanh(policy="p=f32,c=bf16,o=bf16") == [{"bfloat16"}]
    assert tanh(policy="p=f32,c=bf16,o=bf16", rules={"tanh": "deny"}) == [{"float32"}]
    with pytest.raises(ValueError, match="'tanh' the class 'full'"):
        amp.autocast(fn, rules={"tanh": "full"})
    with pytest.raises(ValueError, match="cannot reclass 'scan'"):
        amp.autocast(fn, rules={"scan": "deny"})
    # what holds a function made for float32 cannot follow low operands
    largest = amp.autocast(into("max"), rules={"scatter-max": "follow"})
    np.testing.assert_allclose(jax.jit(largest)(X, W), into("max")(X, W), rtol=0.02, atol=0.02)


def into(name, low="updates"):
    """Rows of a product, put at indices of another array by .at[].max and the like."""

    def fn(x, w):
        rows = jnp.arange(x.shape[0]) // 2
        low_rows, full_rows = jnp.tanh(0.1 * (x @ w)), jnp.cos(x)
        operand, updates = (full_rows, low_rows) if low == "updates" else (low_rows, full_rows)
        place = operand.at[rows]
        return place.apply(jnp.sin) if name == "apply" else getattr(place, name)(updates)

    return fn


SCATTERS = {f"at.{name}, {low}": into(name, low)
            for name in ("set", "add", "multiply", "min", "max", "apply")
            for low in ("updates", "operand")}  # fmt: skip
SEGMENTS = {
    name: lambda x, w, name=name: getattr(jax.ops, name)(x @ w, jnp.arange(x.shape[0]) % 3, 4)[:3]
    for name in ("segment_sum", "segment_max", "segment_min", "segment_prod")
}
REDUCERS = {
    "reduce": lambda x, w: lax.reduce(x @ w, -jnp.inf, lax.max, (0,)),
    "reduce of two": lambda x, w: lax.reduce(
        (x @ w, x), (0.0, 0.0), lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])), (0,)
    ),
    "reduce_window": lambda x, w: lax.reduce_window(
        x @ w, 0.0, lambda a, b: a + 0.5 * b, (2, 2), (1, 1), "SAME"
    ),
    "sort of two": lambda x, w: lax.sort((x @ w, x), num_keys=1),
    "sort by another": lambda x, w: lax.sort((x, x @ w), num_keys=1),
    "cummax": lambda x, w: lax.cummax(x @ w),
    # Their derivatives ask which operand the result equals, after XLA has dropped some roundings.
    "largest, in float32": lambda x, w: jnp.exp(jnp.max(jnp.tanh(x @ w), 1)),
    "larger, in float32": lambda x, w: jnp.exp(jnp.maximum(jnp.cos(x), jnp.tanh(0.1 * (x @ w)))),
    "segment_max, in float32": lambda x, w: jax.ops.segment_max(
        jnp.tanh(x @ w), jnp.arange(x.shape[0]) // 2, x.shape[0] // 2
    ),
    "cumsum": lambda x, w: jnp.cumsum(x @ w, 0),
    "associative_scan": lambda x, w: lax.associative_scan(jnp.maximum, x @ w),
    "map": lambda x, w: lax.map(lambda row: row * 2, x @ w),
    "clamp": lambda x, w: lax.clamp(jnp.sin(x) - 1, x @ w, jnp.sin(x) + 1),
    "select": lambda x, w: jnp.where(x > 0, x @ w, jnp.exp(x)),
    "dynamic_update_slice": lambda x, w: lax.dynamic_update_slice(jnp.exp(x), (x @ w)[:2], (1, 0)),
    "pad": lambda x, w: lax.pad(x @ w, x[0, 0], [(1, 0, 1), (0, 2, 0)]),
}
TIED = SCATTERS | SEGMENTS | REDUCERS


@pytest.mark.parametrize("how", ["value", "grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", TIED)
def test_what_ties_the_dtypes_of_its_operands_gives_what_it_gave(name, how):
    fn, x, w = TIED[name], X[:6], W

    def loss(fn):
        def total(x, w):
            return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(x, w)))

        return total

    def transformed(fn):
        return {
            "value": fn,
            "grad": jax.grad(loss(fn), (0, 1)),
            "jvp": lambda x, w: jax.jvp(fn, (x, w), (jnp.cos(x), jnp.cos(w))),
            "vmap": jax.vmap(fn, in_axes=(None, 0)),
        }[how]

    if how == "vmap":
        w = jnp.stack([w, -w])
    try:
        want = jax.jit(transformed(fn))(x, w)
    except (NotImplementedError, ValueError):  # jax does not differentiate these
        functions = ("reduce", "at.multiply", "at.apply", "segment_prod")
        assert name.startswith(functions) and how in ("grad", "jvp")
        return
    inside = jax.jit(transformed(amp.autocast(fn)))(x, w)
    outside = jax.jit(amp.autocast(transformed(fn)))(x, w)
    for got in (inside, outside):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            scale = jnp.abs(b).max()
            # where two elements are nearly equal, rounding chooses the other one
            assert jnp.median(jnp.abs(a - b)) <= 0.02 * scale
            assert a.dtype == b.dtype


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"policy": "c=f99"}, "unknown dtype"),
        ({"policy": "p=f32,c=f64"}, "computes in float64"),
    ],
)
def test_bad_settings(settings, match):
    for entry in (amp.autocast, lambda fn, **s: amp.explain(fn, 1.0, **s)):
        with pytest.raises(ValueError, match=match):
            entry(jnp.sin, **settings)
        with pytest.raises(Exception, match="scan_carry"):  # here the type checker is first
            entry(jnp.sin, scan_carry="low")


def test_what_is_changed_in_place_is_refused():
    def fn(tree, x):
        tree["count"] = tree["count"] + 1
        return x @ x.T

    for wrapper in (amp.autocast, amp.full_precision):
        with pytest.raises(ValueError, match=r"in place.*count"):
            wrapper(fn)({"count": jnp.zeros(())}, X)


def test_refs_are_refused():
    if not hasattr(jax, "new_ref"):
        pytest.skip("this jax has no public Ref")

    def fn(x):
        ref = jax.new_ref(x)
        ref[...] = ref[...] @ x
        return ref[...]

    with pytest.raises(ValueError, match="Ref"):
        amp.autocast(fn)(W)
    np.testing.assert_array_equal(amp.autocast(amp.full_precision(fn))(W), fn(W))


def test_kernels_are_left_as_they_are():
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def fn(x, w):
        doubled = pallas.pallas_call(
            double, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
        )(x)
        return doubled @ w

    found = amp.explain(fn, X, W)
    assert (found.low, found.opaque) == (1, {"pallas_call": 1})
    np.testing.assert_allclose(amp.autocast(fn)(X, W), 2 * X @ W, atol=0.1)


def test_explain_says_where_and_why():
    def fn(w, x):
        h = jnp.dot(x, w, precision="highest")
        return jax.nn.softmax(h @ w)

    found = amp.explain(fn, W, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert (found.low, found.full, found.compute) == (1, 1, "bfloat16")
    exact = next(i for i in found.islands if i.primitive == "dot_general")
    assert "HIGHEST" in exact.why and "test_amp_autocast.py" in exact.where and "fn" in exact.where
    for text in (
        "exp",
        "reduce_sum",
        "1 products in bfloat16, 1 in float32",
        "test_amp_autocast.py",
    ):
        assert text in str(found)
    counted = _jaxpr.census(amp.autocast(fn), W, X)
    casts = counted["convert_element_type", "bfloat16"], counted["convert_element_type", "float32"]
    assert (found.casts_down, found.casts_up) == casts


def test_what_einsum_multiplies_entry_by_entry_is_no_product():
    fn = lambda w, x: jnp.einsum("bi,ib->bi", x @ w, (x @ w).T)
    found = amp.explain(fn, W, X)
    assert (found.low, found.full) == (2, 0)
    # The result goes on in the dtype of its operands, as that of `*` does.
    assert amp.autocast(fn, "p=f32,c=bf16,o=bf16")(W, X).dtype == jnp.bfloat16
    assert not any(i.primitive == "dot_general" for i in found.islands)
    np.testing.assert_allclose(amp.autocast(fn)(W, X), (X @ W) ** 2, rtol=0.05, atol=0.05)


def test_explain_names_the_silent_cases():
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (W, X))
    (note,) = amp.explain(lambda w, x: x @ w, *low).notes
    assert "itself" in note
    (note,) = amp.explain(jnp.sin, X).notes
    assert "no matrix product" in note
    (note,) = amp.explain(lambda x: jnp.vdot(x, x), X).notes
    assert "No product is rewritten" in note
    (note,) = amp.explain(lambda w, x: x @ w, W, X, policy="full").notes
    assert "float32" in note
    scanned = amp.explain(lambda w, x: lax.scan(lambda x, _: (x @ w, None), x, length=2)[0], W, X)
    assert scanned.carries_full == 1 and any("carry" in i.why for i in scanned.islands)


class Net(nnx.Module):
    def __init__(self):
        rngs, uniform = nnx.Rngs(0), nnx.initializers.uniform(0.2)
        self.linear = nnx.Linear(16, 8, kernel_init=uniform, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


def test_nnx_modules_keep_their_statistics():
    plain, cast, whole = Net(), Net(), Net()
    plain(X)
    jt.nnx.autocast(cast)(X)
    jt.nnx.autocast(lambda model, x: model(x))(whole, X)
    for model in (cast, whole):
        assert model.norm.mean[...].dtype == jnp.float32
        np.testing.assert_allclose(model.norm.mean[...], plain.norm.mean[...], atol=1e-3)
        assert model.drop.rngs.count[...] == plain.drop.rngs.count[...] == 1

    @nnx.jit
    def step(model, x):
        return nnx.value_and_grad(jt.nnx.autocast(lambda m, x: (m(x) ** 2).mean()))(model, x)

    before = jnp.array(cast.norm.mean[...])
    loss, grads = step(cast, X)
    assert loss.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert (cast.norm.mean[...] != before).any()


def test_nnx_modules_are_refused_with_the_cure():
    model = Net()
    if hasattr(nnx, "Pytree"):  # a module is a pytree: its copy would be updated
        with pytest.raises(ValueError, match=r"in place.*jaxtricks\.nnx\.autocast"):
            amp.autocast(lambda m, x: m(x))(model, X)
    with pytest.raises(Exception, match="trace level") as caught:
        amp.autocast(lambda x: model(x))(X)
    assert any("jaxtricks.nnx.autocast" in note for note in caught.value.__notes__)
    model.eval()
    assert amp.autocast(lambda x: model(x))(X).dtype == jnp.float32


def test_trains_with_scaling_and_accumulation():
    params = {"w": W}
    tx = amp.dynamic_loss_scale(
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), init=2.0**10
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, x):
        fn = lambda p: ((x @ p["w"]) ** 2).mean()
        scale = amp.loss_scale(state)
        loss, grads = amp.value_and_grad(fn, "p=f32,c=f16,o=f32", scale=scale)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(20):
        params, state, loss = step(params, state, X)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0] and state.skipped == 0


def test_numpy_arguments_and_enclosing_jit(x64):
    def fn(x, w):
        return x @ w

    x = np.asarray(X, np.float32)
    eager = amp.autocast(fn)(x, np.asarray(W, np.float32))
    # Compiled, the result need not be rounded.
    found = jax.jit(amp.autocast(fn))(x, W.astype(np.float32))
    np.testing.assert_allclose(found, eager, rtol=2.0**-8, atol=1e-6)
    assert eager.dtype == np.float32
