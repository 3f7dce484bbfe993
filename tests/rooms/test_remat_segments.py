"""sequential and scan: the same numbers as the plain chain and lax.scan, in fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import remat
from jaxtricks.remat import _sequential

from tests.flags import remat3

pytestmark = pytest.mark.stock  # bytes, and gradients to the last bits
SHAPE = jax.ShapeDtypeStruct


def close(a, b, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def exponent(ns, temps):
    return np.polyfit(np.log(ns), np.log(temps), 1)[0]


# ---- sequential


def layer(p, x):
    return jnp.tanh(x @ p["w"] + p["b"])


def parameters(n, d=8):
    w = jax.random.normal(jax.random.key(0), (n, d, d)) / d**0.5
    return [{"w": w[i], "b": jnp.float32(0.1 * i)} for i in range(n)]


def chain(fns):
    def run(params, x):
        for fn, p in zip(fns, params, strict=True):
            x = fn(p, x)
        return x

    return run


def gradient(run):
    return jax.jit(jax.value_and_grad(lambda p, x: (run(p, x) ** 2).sum(), (0, 1)))


@pytest.mark.parametrize(
    ("n", "cut"),
    [(5, "sqrt"), (6, "log"), (5, 5), (5, [1, 3, 1]), (3, 1), (1, "sqrt"), (1, "log")],
    ids=str,
)
def test_sequential_is_the_chain(n, cut, ours):
    params, x = parameters(n), jax.random.normal(jax.random.key(1), (4, 8))
    fns = [layer] * n
    close(gradient(remat.sequential(fns, cut))(params, x), gradient(chain(fns))(params, x))

    def closing(make):
        def loss(params, x):
            fns = [lambda x, p=p: layer(p, x) for p in params]
            return (make(fns)(x) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    plain = lambda fns: lambda x: chain([lambda _, x, f=f: f(x) for f in fns])([None] * n, x)
    close(closing(lambda fns: remat.sequential(fns, cut))(params, x), closing(plain)(params, x))


@pytest.mark.parametrize(
    ("cut", "passes"), [("sqrt", 2), ("log", None), (5, 2), ([10], 2)], ids=str
)
def test_sequential_recomputes_each_segment_once(cut, passes):
    runs = remat.memory_analysis(
        gradient(remat.sequential([layer] * 10, cut)), parameters(10), SHAPE((64, 8), "float32")
    ).flops
    plain = remat.memory_analysis(
        gradient(chain([layer] * 10)), parameters(10), SHAPE((64, 8), "float32")
    ).flops
    # Three products a layer; every pass more adds one.
    if passes:
        assert runs / plain == pytest.approx((passes + 2) / 3, abs=0.03)
    else:
        assert 1.5 < runs / plain < 2


def test_sequential_takes_pytrees_between_functions_and_bfloat16():
    split = lambda p, x: {"a": x, "b": [jnp.sin(x), jnp.arange(2)]}
    join = lambda p, t: t["a"] * t["b"][0] + t["b"][1][0].astype(t["a"].dtype)
    fns, params = [layer, split, join, layer], parameters(4)
    x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    for cut in ("sqrt", "log"):
        run = remat.sequential(fns, cut)
        close(gradient(run)(params, x), gradient(chain(fns))(params, x))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    value, grads = gradient(run)(*half)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    close(np.float32(value), np.float32(gradient(run)(params, x)[0]), 0.05)


def test_sequential_under_vmap_and_twice_differentiated():
    fns, params, xs = [layer] * 4, parameters(4), jnp.linspace(-1, 1, 24).reshape(3, 8)

    def twice(run):
        slope = lambda x: jax.grad(lambda x: run(params, x).sum())(x)
        return jax.vmap(jax.grad(lambda x: (slope(x) ** 2).sum()))(xs)

    for cut in ("sqrt", "log"):
        close(twice(remat.sequential(fns, cut)), twice(chain(fns)), 1e-5)


def sequential_temp(n, cut, argnums, d=64, batch=512):
    params = [{"w": SHAPE((d, d), "float32"), "b": SHAPE((), "float32")}] * n
    run = remat.sequential([layer] * n, cut)
    grad = jax.grad(lambda p, x: (run(p, x) ** 2).mean(), argnums)
    return remat.memory_analysis(grad, params, SHAPE((batch, d), "float32")).temp


def test_sequential_grows_with_the_root():
    ns = (16, 144)
    assert exponent(ns, [sequential_temp(n, "sqrt", 0) for n in ns]) == pytest.approx(0.5, abs=0.05)


def test_sequential_grows_with_the_logarithm():
    # A doubling of the depth costs one to two activations, whatever the depth.
    temps = np.array([sequential_temp(n, "log", 1) for n in (8, 16, 32)]) / (512 * 64 * 4)
    assert (np.diff(temps) > 0).all()
    assert (np.diff(temps) < 2.1).all()


def test_the_last_segment_is_not_kept_through_a_head():
    def fat(w, x):
        return x + jnp.tanh(jnp.tanh(x @ w) @ w)

    def temp(run):
        def loss(ws, head, x):
            return (jnp.tanh(run(ws, x) @ head) ** 2).mean()

        w, head, x = (SHAPE(s, "float32") for s in ((32, 32), (32, 512), (256, 32)))
        return remat.memory_analysis(jax.value_and_grad(loss, (0, 1)), [w] * 16, head, x).temp

    def unwrapped(ws, x):
        return chain([fat] * 4)(ws[12:], remat.sequential([fat] * 12, 3)(ws[:12], x))

    assert temp(remat.sequential([fat] * 16)) < 0.8 * temp(unwrapped)


def test_equal_sizes():
    assert _sequential._sizes(3, 7) == [3, 2, 2]
    assert _sequential._sizes("sqrt", 13) == [4, 3, 3, 3]


@pytest.mark.parametrize(
    ("fns", "cut", "words"),
    [
        ([], "sqrt", "`fns` is empty"),
        ([layer] * 3, [1, 1], "`segments` must be positive sizes that sum to 3"),
        ([layer] * 3, [4, -1], "positive sizes"),
        ([layer] * 3, [], "sum to 3"),
        ([layer] * 3, 4, "`segments` must be in 1..3"),
        ([layer] * 3, "cube", '`segments` must be "sqrt", "log"'),
    ],
)
def test_sequential_refuses(fns, cut, words):
    with pytest.raises(ValueError, match=words):
        remat.sequential(fns, cut)


def test_sequential_refuses_parameters_of_another_number():
    run = remat.sequential([layer] * 3)
    for params in (parameters(2), {"w": 1}):
        with pytest.raises(ValueError, match="`params` must be a list or tuple of 3"):
            run(params, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="not with 3 arguments"):
        run(1, 2, 3)


# ---- scan


def noisy(w):
    """A step that depends on its place: a key, an integer and a float a step."""

    def body(carry, x):
        c, count = carry
        noise = (jax.random.key_data(x["key"]) % 8).sum().astype(c.dtype)
        c = jnp.tanh(w * c + x["x"] + 0.1 * noise) * (1 + 0.01 * x["n"])
        return (c, count + x["n"]), {"y": c.sum(), "n": x["n"] * 2, "key": x["key"], "none": None}

    return body


def steps(n):
    return {
        "key": jax.random.split(jax.random.key(3), n),
        "n": jnp.arange(n),
        "x": jax.random.normal(jax.random.key(4), (n, 3)),
    }


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 12, 13])
def test_scan_is_lax_scan_for_any_length(n, reverse):
    xs, init = steps(n), (jnp.linspace(-1, 1, 3), jnp.int32(0))

    def results(scan):
        def loss(w, c, x):
            (c, count), ys = scan(noisy(w), (c, init[1]), xs | {"x": x}, reverse=reverse)
            total = (c**2).sum() + (ys["y"] * jnp.cos(jnp.arange(n))).sum()
            return total, (c, count, ys | {"key": jax.random.key_data(ys["key"])})

        out = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        return out(jnp.full(3, 0.7), init[0], xs["x"])

    expected = results(jax.lax.scan)
    for levels in ("sqrt", 3) if n == 13 else ("sqrt",):
        close(results(lambda *a, levels=levels, **k: remat.scan(*a, levels=levels, **k)), expected)


def test_scan_with_lengths_unroll_and_no_xs():
    body = lambda c, x: (jnp.sin(c + 0.1), c)
    expected = jax.lax.scan(body, 0.3, None, 12)
    for levels in ([3, 4], [2, 2, 3], [12], [1, 12, 1], 1, 4):
        for unroll in (1, 2, True) if levels == [3, 4] else (1,):
            close(remat.scan(body, 0.3, length=12, levels=levels, unroll=unroll), expected)
    carry, ys = remat.scan(lambda c, x: (c + x, None), jnp.float32(0), jnp.ones(7), length=7)
    assert float(carry) == 7 and ys is None


def rnn(scan):
    def loss(w, x, c):
        def body(c, x):
            c = jnp.tanh(w * c + x)
            return c, c

        c, ys = scan(body, c, x)
        return (c**2).sum() + (ys**3).sum()

    return loss


def test_scan_composes_with_vmap_and_second_derivatives():
    args = jnp.float32(0.8), jnp.linspace(-1, 1, 10).reshape(5, 2), jnp.ones(2)

    def results(scan):
        loss = rnn(scan)
        batched = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(jnp.arange(3.0), *args[1:])
        twice = jax.grad(jax.grad(loss))(*args), jax.jvp(jax.grad(loss), args, args)
        return batched, twice

    close(*(jax.jit(results, static_argnums=0)(scan) for scan in (remat.scan, jax.lax.scan)), 1e-5)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), args)
    grads = jax.grad(rnn(remat.scan), (0, 1, 2))(*half)
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    exact = jax.grad(rnn(jax.lax.scan), (0, 1, 2))(*args)
    for got, want in zip(grads, exact, strict=True):  # some processors round more often than others
        worst = jnp.max(jnp.abs(got.astype(float) - want))
        assert worst <= 0.1 * max(jnp.max(jnp.abs(g)) for g in exact)


def scan_temp(scan, n, d=64, batch=512):
    def loss(params, x):
        body = lambda c, p: (jnp.tanh(c @ p["w"] + p["b"]), None)
        return (scan(body, x, params)[0] ** 2).mean()

    params = {"w": SHAPE((n, d, d), "float32"), "b": SHAPE((n,), "float32")}
    return remat.memory_analysis(jax.grad(loss, (0, 1)), params, SHAPE((batch, d), "float32")).temp


@pytest.mark.parametrize("flag", [False, True], ids=["", "remat3"])
def test_scan_grows_with_the_root(flag):
    ns = (16, 256)
    with remat3(flag):
        assert 0.4 < exponent(ns, [scan_temp(remat.scan, n) for n in ns]) < 0.6


def test_lax_scan_grows_with_the_length_and_a_prime_costs_a_copy_of_xs():
    ns = (16, 64)
    assert exponent(ns, [scan_temp(jax.lax.scan, n) for n in ns]) > 0.95
    assert scan_temp(remat.scan, 257) < scan_temp(remat.scan, 256) + 2.1 * 257 * 64 * 64 * 4


def test_scan_in_logarithmic_levels_keeps_fewer_carries():
    def temp(levels, n=256):
        def loss(x):
            body = lambda c, _: (jnp.tanh(jnp.sin(c) * c), None)
            return remat.scan(body, x, length=n, levels=levels)[0].sum()

        return remat.memory_analysis(jax.grad(loss), SHAPE((4096,), "float32")).temp

    # 4 loops of 4 steps, not 2 of 16.
    assert temp("log") < 0.75 * temp("sqrt") < 0.2 * temp(1)


def test_loops_divide_where_they_can():
    for levels, n, expected in [
        ("sqrt", 256, [16]),
        ("sqrt", 26, [5]),  # 2 and 13 are too far away
        ("sqrt", 1000, [40]),
        ("log", 256, [4, 4, 4]),
        (3, 24, [3, 4]),
        (9, 3, []),
        ([2, 1, 13], 26, [2]),
    ]:
        assert _sequential._outer(levels, n) == expected


@pytest.mark.parametrize(
    ("xs", "given", "words"),
    [
        (jnp.ones(6), {"levels": [2, 2]}, "`levels` must multiply to 6"),
        (jnp.ones(6), {"levels": []}, "`levels` must multiply to 6"),
        (jnp.ones(6), {"levels": 0}, "`levels` must be 1 or more"),
        (jnp.ones(6), {"levels": "cube"}, '`levels` must be "sqrt", "log"'),
        (
            (jnp.ones(6), jnp.ones(5)),
            {},
            r"`xs` must have one length, not `xs` \(0\) 6, `xs` \(1\) 5",
        ),
        (jnp.ones(6), {"length": 5}, "one length, not `length` 5, `xs` 6"),
        ({"a": jnp.float32(1)}, {}, r"scalar \(a\)"),
        (None, {}, "give the `length`"),
    ],
)
def test_scan_refuses(xs, given, words):
    with pytest.raises(ValueError, match=words):
        remat.scan(lambda c, x: (c, None), jnp.float32(0), xs, **given)


def test_errors_of_lax_scan_come_through():
    body = lambda c, x: (c.astype(jnp.int32), None)
    with pytest.raises(TypeError, match="carry input and carry output must have equal types"):
        remat.scan(body, jnp.ones(2), jnp.ones(12))
    with pytest.raises(TypeError, match="pair"):
        remat.scan(lambda c, x: c, jnp.ones(2), jnp.ones(12))
