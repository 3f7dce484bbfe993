"""reparam: fusing is exact, branches are the reference implementations'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import reparam as rp

from tests.reference import reparam as reference

SEEDS = range(27)


def part(arrays, case):
    return {k[len(case) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{case}/")}


# ---- fuse == apply over random structures, float64


def random_norm(rng, c):
    var = rng.uniform(0.1, 3.0, () if rng.random() < 0.3 else c)
    return rp.Norm(
        rng.normal(size=c), np.asarray(var), rng.normal(size=c), rng.normal(size=c), 1e-3
    )


def random_conv(rng, size, ins, outs, groups=1, dilation=1):
    bias = rng.normal(size=outs) if rng.random() < 0.5 else None
    return rp.Conv(rng.normal(size=(*size, ins // groups, outs)), bias, groups, dilation)


def random_size(rng, window):
    return tuple(int(rng.integers(1, k + 1)) for k in window)


def random_branch(rng, kind, window, ins, outs, groups):
    ones = (1,) * len(window)
    size = random_size(rng, window)
    conv = functools.partial(random_conv, rng)
    if kind == "conv":
        return rp.Sequential(conv(size, ins, outs, groups), random_norm(rng, outs))
    if kind == "bare":
        return conv(size, ins, outs)
    if kind == "dilated":  # (k - 1) d + 1 <= window
        size = tuple(1 + (k - 1) // 2 for k in window)
        return rp.Sequential(conv(size, ins, outs, groups, 2), rp.Scale(rng.normal(size=outs)))
    if kind == "sequence":
        middle = 2 * groups
        first = rp.Sequential(conv(ones, ins, middle, groups), random_norm(rng, middle))
        return rp.Sequential(first, conv(size, middle, outs, groups), random_norm(rng, outs))
    if kind == "backwards":
        return rp.Sequential(conv(size, ins, 3), random_norm(rng, 3), conv(ones, 3, outs))
    if kind == "pool":
        pool = rp.AvgPool(size)
        return rp.Sequential(conv(ones, ins, outs, groups), random_norm(rng, outs), pool)
    if kind == "early norm":
        return rp.Sequential(
            random_norm(rng, ins), rp.Scale(rng.normal(size=ins)), conv(size, ins, outs)
        )
    if kind == "nested":
        inner = rp.Sum(conv(size, ins, outs), conv(ones, ins, outs, groups))
        return rp.Sequential(rp.Scale(rng.normal(size=ins)), inner, random_norm(rng, outs))
    if kind == "bare pool":
        return rp.Sequential(rp.AvgPool(size), conv(ones, ins, outs))
    return rp.Sequential(rp.Identity(ins), random_norm(rng, ins))


KINDS = (
    "conv",
    "bare",
    "dilated",
    "sequence",
    "backwards",
    "pool",
    "early norm",
    "nested",
    "bare pool",
)


def random_case(seed):
    """(branches, x, how) with every structure and geometry in some seed."""
    rng = np.random.default_rng(seed)
    axes = int(rng.choice([1, 2, 2, 2, 3]))
    window = tuple(int(k) for k in rng.integers(1, 6 if axes < 3 else 4, axes))
    groups = int(rng.choice([1, 2, 4]))
    ins = outs = 4
    if rng.random() < 0.3:
        ins, outs = 4, 8
    kinds = [KINDS[seed % len(KINDS)], *rng.choice(KINDS, 2)]
    if ins == outs:
        kinds.append("identity")
    nodes = [random_branch(rng, kind, window, ins, outs, groups) for kind in kinds]
    # The window's own size must occur, or the largest branch sets another one.
    nodes.append(random_conv(rng, window, ins, outs, groups))
    d = tuple(int(v) for v in rng.integers(1, 3, axes))
    strides = tuple(int(v) for v in rng.integers(1, 4, axes))
    spatial = tuple(int(v) for v in rng.integers(10, 15, axes))
    pairs = tuple(tuple(int(v) for v in rng.integers(-1, 4, 2)) for _ in range(axes))
    padding = [("SAME"), ("VALID"), ("SAME_LOWER"), pairs, 1][int(rng.integers(5))]
    x = rng.normal(size=(2, *spatial, ins))
    return rp.Sum(*nodes), x, dict(strides=strides, padding=padding, dilation=d)


@pytest.mark.parametrize("seed", SEEDS)
def test_fused_equals_branches(x64, ours, seed):
    node, x, how = random_case(seed)
    branches, fused = jax.jit(
        lambda node, x: (rp.apply(node, x, **how), rp.apply(rp.fuse(node), x, **how))
    )(node, x)
    assert branches.shape == fused.shape and branches.dtype == jnp.float64
    assert np.abs(branches - fused).max() <= 1e-12 * max(1, np.abs(branches).max())


@pytest.mark.parametrize("seed", range(4))
def test_fused_convolution_is_a_plain_convolution(x64, ours, seed):
    """The fused kernel given to lax with the window's own padding: no placement left to get wrong."""
    node, x, how = random_case(seed)
    fused = rp.fuse(node)
    axes = x.ndim - 2
    padding = how["padding"]
    if isinstance(padding, int):
        padding = [(padding, padding)] * axes
    elif padding == "SAME_LOWER":
        padding = jax.lax.padtype_to_pads(
            x.shape[1:-1],
            [
                d * (k - 1) + 1
                for k, d in zip(fused.kernel.shape[:-2], how["dilation"], strict=True)
            ],
            how["strides"],
            padding,
        )
    elif not isinstance(padding, str):
        x, padding = reference.pad(x, padding), "VALID"
    letters = "DHW"[-axes:]
    y = jax.lax.conv_general_dilated(
        x,
        fused.kernel,
        how["strides"],
        padding,
        rhs_dilation=how["dilation"],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=fused.groups,
    )
    y = y + (0.0 if fused.bias is None else fused.bias.reshape((1,) * (axes + 1) + (-1,)))
    expected = rp.apply(node, x, **(how | {"padding": padding}))
    np.testing.assert_allclose(y, expected, atol=1e-11 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("parity", [8, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_refers_to_the_square_kernel(x64, parity, stride):
    """The mistake this room exists for: 1x3 with its own SAME is not the row of a 3x3."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, parity, parity, 2)), rng.normal(size=(1, 1, 2, 2))
    node = rp.Sum(rp.Conv(np.zeros((3, 3, 2, 2))), rp.Conv(kernel))
    embedded = np.zeros((3, 3, 2, 2))
    embedded[1, 1] = kernel[0, 0]
    square = rp.apply(rp.Conv(embedded), x, strides=stride)
    np.testing.assert_allclose(rp.apply(node, x, strides=stride), square, atol=1e-13)
    alone = rp.apply(rp.Conv(kernel), x, strides=stride)
    assert (np.abs(alone - square).max() < 1e-12) == (
        stride == 1 or (parity, stride) in OWN_SAME_FITS
    )


# Where "SAME" of 1x1 and of 3x3 happen to read the same pixels.
OWN_SAME_FITS = {(9, 2)}


@pytest.mark.parametrize("seed", range(5))
def test_apply_equals_numpy(x64, ours, seed):
    """Two branches, written out by definition."""
    rng = np.random.default_rng(seed)
    k, s, d, g = (int(rng.choice(v)) for v in ([2, 3, 4, 5], [1, 2, 3], [1, 2], [1, 2]))
    low, high = (int(v) for v in rng.integers(0, 4, 2))
    x = rng.normal(size=(2, 11, 12, 4))
    big, row = (
        rng.normal(size=(k, k, 4 // g, 6)),
        rng.normal(size=(1, 3 if k > 3 else 1, 4 // g, 6)),
    )
    n = random_norm(rng, 6)
    how = dict(strides=(s, s), dilation=(d, d), groups=g)
    y = reference.conv(x, big, pads=[(low, high)] * 2, **how)
    # A row in the middle of the big kernel, by zeros around it.
    embedded, at = np.zeros_like(big), k // 2
    w = row.shape[1]
    embedded[at, at - w // 2 : at - w // 2 + w] = row[0]
    y = y + reference.norm(
        reference.conv(x, embedded, pads=[(low, high)] * 2, **how),
        n.mean,
        n.var,
        n.scale,
        n.bias,
        1e-3,
    )
    node = rp.Sum(rp.Conv(big, groups=g), rp.Sequential(rp.Conv(row, groups=g), n))
    got = rp.apply(node, x, strides=s, dilation=d, padding=((low, high), (low, high)))
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-11)


def test_border_of_a_sequence_is_its_value_on_zero(x64):
    """1x1 with bias, then 3x3: padding the intermediate with zeros would be another function."""
    rng = np.random.default_rng(0)
    first, second = random_conv(rng, (1, 1), 3, 4), rng.normal(size=(3, 3, 4, 5))
    first = rp.Conv(first.kernel, rng.normal(size=4))
    x = rng.normal(size=(1, 5, 5, 3))
    got = rp.apply(rp.Sequential(first, rp.Conv(second)), x)
    middle = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) @ first.kernel[0, 0] + first.bias
    plain = dict(strides=(1, 1), dilation=(1, 1), pads=[(0, 0)] * 2)
    np.testing.assert_allclose(got, reference.conv(middle, second, **plain), atol=1e-12)


# ---- the reference implementations


def torch_norm(g, name, t="init", epsilon=1e-5):
    stats = (
        g
        if t == "init"
        else {k.replace(f"{t}/", "init/"): v for k, v in g.items() if k.startswith(t)}
    )
    get = lambda source, key: source[f"init/{name}.{key}"]
    return rp.Norm(
        get(stats, "running_mean"),
        get(stats, "running_var"),
        get(g, "weight"),
        get(g, "bias"),
        epsilon,
    )


def acb(g, m, t):
    lines = ("square", "ver", "hor")
    return rp.Sum(
        *(
            rp.Sequential(
                rp.Conv(g[f"init/{n}_conv.weight"], groups=m["g"]), torch_norm(g, f"{n}_bn", t)
            )
            for n in lines
        )
    )


def repvgg(g, m, t):
    nodes = [
        rp.Sequential(
            rp.Conv(g[f"init/{n}.conv.weight"], groups=m["g"]), torch_norm(g, f"{n}.bn", t)
        )
        for n in ("rbr_dense", "rbr_1x1")
    ]
    if m["identity"]:
        nodes.append(torch_norm(g, "rbr_identity", t))
    return rp.Sum(*nodes)


def dbb(g, m, t):
    conv = lambda name: rp.Conv(g[f"init/{name}"], groups=m["g"])
    norm = lambda name: torch_norm(g, name, t)
    pool = rp.AvgPool(m["k"])
    nodes = [rp.Sequential(conv("dbb_origin.conv.weight"), norm("dbb_origin.bn"))]
    if "init/dbb_1x1.conv.weight" in g:
        nodes.append(rp.Sequential(conv("dbb_1x1.conv.weight"), norm("dbb_1x1.bn")))
    if "init/dbb_avg.conv.weight" in g:
        first = conv("dbb_avg.conv.weight"), norm("dbb_avg.bn.bn")
        nodes.append(rp.Sequential(*first, pool, norm("dbb_avg.avgbn")))
    else:  # depthwise
        nodes.append(rp.Sequential(pool, norm("dbb_avg.avgbn")))
    first = (
        "dbb_1x1_kxk.idconv1.actual_kernel"
        if "init/dbb_1x1_kxk.idconv1.actual_kernel" in g
        else "dbb_1x1_kxk.conv1.weight"
    )
    sequence = conv(first), norm("dbb_1x1_kxk.bn1.bn"), conv("dbb_1x1_kxk.conv2.weight")
    return rp.Sum(*nodes, rp.Sequential(*sequence, norm("dbb_1x1_kxk.bn2")))


def unireplknet(g, m, t):
    def branch(conv, norm, dilation):
        return rp.Sequential(
            rp.Conv(g[f"init/{conv}.weight"], groups=m["g"], dilation=dilation),
            torch_norm(g, norm, t),
        )

    nodes = [branch("lk_origin", "origin_bn", 1)]
    for k, d in zip(m["kernel_sizes"], m["dilates"], strict=True):
        nodes.append(branch(f"dil_conv_k{k}_{d}", f"dil_bn_k{k}_{d}", d))
    return rp.Sum(*nodes)


GOLDEN = [
    *(("acb", acb, f"case{i:02d}", 2) for i in (0, 1, 3, 4, 5, 6, 7)),
    *(("repvgg", repvgg, f"case{i:02d}", 2) for i in (0, 2, 3, 4, 5)),
    *(("dbb", dbb, f"case{i:02d}", 2) for i in (0, 1, 2, 4, 5)),
    *(("unireplknet", unireplknet, f"case{i:02d}", 1) for i in (0, 1)),
]


@pytest.mark.parametrize(("name", "build", "case", "steps"), GOLDEN)
def test_equals_reference_code(golden, ours, name, build, case, steps):
    arrays, meta = golden(name)
    g, m = part(arrays, case), meta["cases"][case]
    how = dict(strides=m["s"], padding=m["p"])

    @jax.jit
    def run(node, x):
        fused = rp.fuse(node, m["k"])
        return fused, rp.apply(node, x, **how), rp.apply(fused, x, **how)

    for stage, t in (("eval0", "init"), ("eval1", f"train{steps}")):
        fused, branches, y = run(build(g, m, t), g[f"{stage}/x"])
        assert fused.groups == m["g"]
        close(fused.kernel, g[f"{stage}/fused_kernel"], 1e-6)
        close(fused.bias, g[f"{stage}/fused_bias"], 1e-6)
        relu = jax.nn.relu if m.get("relu") else lambda y: y
        for ours_, theirs in ((branches, "y_eval"), (y, "y_deploy")):
            close(relu(ours_), g[f"{stage}/{theirs}"], 2e-6)


def close(actual, expected, tol):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * max(1, np.abs(expected).max()))


def test_custom_l2_through_the_fused_kernel(golden, ours):
    """fuse is differentiable: RepVGG's penalty on the equivalent kernel, value and gradient."""
    arrays, meta = golden("repvgg")
    g, m = part(arrays, "case02"), meta["cases"]["case02"]
    node = jax.tree.map(jnp.asarray, repvgg(g, m, "init"))
    dense, point = node.nodes

    def penalty(kernels):
        nodes = (
            rp.Sequential(rp.Conv(k), n.nodes[1])
            for k, n in zip(kernels, (dense, point), strict=True)
        )
        centre = rp.fuse(rp.Sum(*nodes)).kernel[1, 1]
        t = [n.nodes[1].scale / jnp.sqrt(n.nodes[1].var + 1e-5) for n in (dense, point)]
        off = jnp.sum(kernels[0] ** 2) - jnp.sum(kernels[0][1, 1] ** 2)
        return off + jnp.sum(centre**2 / (t[0] ** 2 + t[1] ** 2).reshape(1, -1))

    value, grads = jax.value_and_grad(penalty)((dense.nodes[0].kernel, point.nodes[0].kernel))
    np.testing.assert_allclose(value, g["init/custom_L2"], rtol=1e-5)
    assert all(np.abs(d).max() > 0 for d in grads)


# ---- transforms, dtypes, mistakes


def block(c=4):
    norm = rp.Norm(jnp.zeros(c), jnp.ones(()), jnp.ones(c), jnp.ones(c), 1e-3)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, c, c))
    return rp.Sum(rp.Sequential(rp.Conv(kernel), norm), rp.Identity(c))


def test_vmap_over_stacked_branches(ours):
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    blocks = [jax.tree.map(lambda a, i=i: a * i, block()) for i in (1.0, 2.0, 3.0)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *blocks)
    fused = jax.jit(jax.vmap(rp.fuse))(stacked)
    assert fused.kernel.shape == (3, 3, 3, 4, 4)
    y = jax.vmap(lambda n: rp.apply(n, x))(fused)
    each = jnp.stack([rp.apply(b, x) for b in blocks])
    np.testing.assert_allclose(y, each, rtol=1e-5, atol=1e-5)


def test_gradients_through_apply_and_fuse_agree(x64):
    node, x, how = random_case(3)
    node = jax.tree.map(jnp.asarray, node)

    def loss(form):
        return jax.jit(jax.grad(lambda n, x: jnp.sum(jnp.sin(form(n, x))), argnums=(0, 1)))

    direct = loss(lambda n, x: rp.apply(n, x, **how))(node, x)
    fused = loss(lambda n, x: rp.apply(rp.fuse(n), x, **how))(node, x)
    for a, b in zip(jax.tree.leaves(direct), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(ours, dtype):
    node = jax.tree.map(lambda a: a.astype(dtype), block())
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4), dtype)
    fused = rp.fuse(node)
    assert fused.kernel.dtype == jnp.float32
    y = rp.apply(fused, x)
    assert y.dtype == rp.apply(node, x).dtype == dtype
    np.testing.assert_allclose(np.float32(y), np.float32(rp.apply(node, x)), rtol=1e-2, atol=1e-2)


def test_larger_window(x64):
    node, x, how = random_case(1)
    axes = x.ndim - 2
    fused = rp.fuse(node, (7,) * axes)
    assert fused.kernel.shape[:-2] == (7,) * axes
    expected = rp.apply(node, x, kernel_size=7, **how)
    np.testing.assert_allclose(rp.apply(fused, x, **how), expected, atol=1e-11)


def test_groups_are_as_fine_as_every_branch_allows():
    depthwise = rp.Conv(np.ones((3, 3, 1, 4), np.float32), groups=4)
    assert rp.fuse(rp.Sum(depthwise, rp.Identity(4))).groups == 4
    assert (
        rp.fuse(rp.Sum(depthwise, rp.Conv(np.ones((1, 1, 2, 4), np.float32), groups=2))).groups == 2
    )
    assert rp.fuse(rp.Identity(4), (3, 3)).kernel.shape == (3, 3, 1, 4)


def kernel(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: rp.fuse(
                rp.Sequential(rp.Conv(kernel(3, 3, 2, 2)), rp.Conv(kernel(3, 3, 2, 2)))
            ),
            "both",
        ),
        (
            lambda: rp.fuse(rp.Sequential(rp.Conv(kernel(3, 3, 2, 2)), rp.AvgPool(3))),
            "AvgPool both",
        ),
        (lambda: rp.fuse(rp.AvgPool((3, 3))), "channels"),
        (lambda: rp.fuse(rp.Identity(3)), "spatial axes"),
        (lambda: rp.fuse(rp.Conv(kernel(5, 5, 2, 2)), 3), "smaller than"),
        (lambda: rp.fuse(rp.Sum(rp.Conv(kernel(3, 3, 2, 2)), rp.Identity(3))), "takes 3 channels"),
        (
            lambda: rp.fuse(rp.Sum(rp.Conv(kernel(3, 3, 2, 2)), rp.Conv(kernel(1, 1, 2, 3)))),
            "must agree",
        ),
        (
            lambda: rp.fuse(rp.Sum(rp.Conv(kernel(3, 3, 2, 2)), rp.Conv(kernel(3, 2, 2)))),
            "spatial axes",
        ),
        (lambda: rp.Sum(), "at least one"),
        (lambda: rp.Conv(kernel(3, 3, 2, 3), groups=2), "groups"),
        (lambda: rp.apply(rp.Conv(kernel(3, 3, 2, 2)), kernel(4, 4, 2)), r"\[N, \*spatial, C\]"),
        (
            lambda: rp.apply(rp.Conv(kernel(3, 3, 2, 2)), kernel(1, 4, 4, 2), padding="CIRCULAR"),
            "padding",
        ),
        (lambda: rp.apply(rp.Conv(kernel(3, 3, 2, 2)), kernel(1, 4, 4, 2), strides=0), "strides"),
    ],
)
def test_what_does_not_fuse_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- the bound of rounding


def test_error_bound_is_its_equation(x64):
    """16 u (S_fused + sum S_branch), every S by NumPy."""
    rng = np.random.default_rng(0)
    norm = random_norm(rng, 4)
    big = rp.Conv(rng.normal(size=(3, 3, 4, 4)), rng.normal(size=4))
    node = rp.Sum(rp.Sequential(big, norm), rp.Scale(rng.normal(size=4)))
    x = rng.normal(size=(2, 7, 7, 4))
    how = dict(strides=(2, 2), pads=[(1, 1)] * 2, dilation=(1, 1))
    t = np.abs(norm.scale) / np.sqrt(norm.var + norm.epsilon)
    inner = reference.conv(np.abs(x), np.abs(big.kernel), **how) + np.abs(big.bias)
    first = (inner + np.abs(norm.mean)) * t + np.abs(norm.bias)
    second = np.abs(x)[:, ::2, ::2] * np.abs(node.nodes[1].gain)
    fused = rp.fuse(node)
    whole = reference.conv(np.abs(x), np.abs(fused.kernel), **how) + np.abs(fused.bias)
    total = whole.max() + first.max() + second.max()
    got = rp.error_bound(node, x, strides=2, padding=1)
    np.testing.assert_allclose(got, 16 * 2**-53 * total, rtol=1e-12)
    given = rp.error_bound(node, x, strides=2, padding=1, fused=rp.Conv(0 * fused.kernel))
    np.testing.assert_allclose(given, 16 * 2**-53 * (total - whole.max()), rtol=1e-12)


@pytest.mark.parametrize(("dtype", "u"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_error_bound_has_the_roundoff_of_the_input(ours, dtype, u):
    node, x = block(), 1000 * jnp.ones((2, 6, 6, 4), dtype)
    wide = rp.error_bound(node, x.astype(jnp.float32))
    bound = rp.error_bound(node, x)
    assert bound.dtype == jnp.float32 and bound.shape == ()
    np.testing.assert_allclose(bound / u, wide * 2**24, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_error_bound_holds_where_branches_cancel_and_finds_a_wrong_kernel(ours, scale):
    """Two branches of 1e3 that leave 1; a tap that is wrong by a thousandth is more than rounding."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 4, 4)).astype(np.float32)
    small = rp.Norm(np.zeros(4, "f"), np.full(4, 1e-6, "f"), np.ones(4, "f"), np.zeros(4, "f"), 0.0)
    node = rp.Sum(
        rp.Sequential(rp.Conv(kernel), small), rp.Conv(-1000 * kernel), rp.Conv(scale * kernel)
    )
    x = rng.normal(size=(2, 9, 9, 4)).astype(np.float32)
    fused = rp.fuse(node)
    bound = rp.error_bound(node, x, fused=fused)
    difference = np.abs(rp.apply(fused, x) - rp.apply(node, x)).max()
    assert 0 < difference <= bound
    wrong = rp.Conv(fused.kernel.at[0, 0, 0, 0].add(0.1))
    assert np.abs(rp.apply(wrong, x) - rp.apply(node, x)).max() > bound


# ---- branches for a convolution


@pytest.mark.parametrize("seed", range(12))
def test_unfuse_is_the_inverse_of_fuse(x64, seed):
    node, x, how = random_case(seed)
    node = jax.tree.map(jnp.asarray, node)
    # The last branch of random_case is a bare convolution as large as the window; here the first.
    free = node.nodes[-1]
    free = rp.Sequential(free, random_norm(np.random.default_rng(seed), free.kernel.shape[-1]))
    if rp.fuse(node).groups != free.nodes[0].groups:
        free = rp.Sequential(rp.Conv(rp.fuse(node).kernel), free.nodes[1])
    like = rp.Sum(free, *node.nodes[:-1])
    target = rp.fuse(like)
    target = rp.Conv(jnp.cos(target.kernel * 9), jnp.sin(target.bias * 9), target.groups)
    made = jax.jit(rp.unfuse)(target, like)
    assert jax.tree.structure(made) == jax.tree.structure(like)
    back = rp.fuse(made)
    np.testing.assert_allclose(back.kernel, target.kernel, atol=1e-11)
    np.testing.assert_allclose(back.bias, target.bias, atol=1e-11)
    y, again = jax.jit(lambda *nodes: [rp.apply(n, x, **how) for n in nodes])(target, made)
    np.testing.assert_allclose(again, y, atol=1e-10 * max(1, np.abs(y).max()))
    changed = [
        jax.tree_util.keystr(p)
        for (p, a), b in zip(
            jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(like), strict=True
        )
        if not np.array_equal(a, b)
    ]
    # One kernel and one bias, of one branch.
    assert [c.rsplit(".")[-1] for c in changed] == ["kernel", "bias"]
    assert changed[0].split("nodes")[1] == changed[1].split("nodes")[1]


def test_unfuse_in_its_other_forms(ours):
    rng = np.random.default_rng(0)
    target = rp.Conv(rng.normal(size=(3, 3, 1, 4)).astype("f"), np.ones(4, "f"), groups=4)
    gain = rp.Scale(np.full(4, -2.0, "f"))
    bare = rp.Conv(np.zeros((3, 3, 1, 4), "f"), np.zeros(4, "f"), groups=4)
    for like in (bare, rp.Sum(bare, rp.Identity(4)), rp.Sequential(bare, rp.Identity(4), gain)):
        back = rp.fuse(rp.unfuse(target, like))
        assert back.groups == 4
        close(back.kernel, target.kernel, 1e-6)
        close(back.bias, target.bias, 1e-6)
    # A dilated convolution is one of the window's size.
    dilated = rp.Conv(rng.normal(size=(2, 2, 1, 4)).astype("f"), groups=4, dilation=2)
    close(rp.fuse(rp.unfuse(dilated, bare)).kernel, rp.fuse(dilated).kernel, 1e-6)


def test_unfuse_under_vmap_and_grad(ours):
    likes = [jax.tree.map(lambda a, i=i: a * i, block()) for i in (1.0, 2.0, 3.0)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *likes)
    kernels = jax.random.normal(jax.random.key(5), (3, 3, 3, 4, 4))
    made = jax.vmap(lambda k, n: rp.unfuse(rp.Conv(k), n))(kernels, stacked)
    close(jax.vmap(rp.fuse)(made).kernel, kernels, 1e-5)
    round_trip = lambda k: jnp.sum(jnp.sin(rp.fuse(rp.unfuse(rp.Conv(k), likes[0])).kernel))
    close(jax.grad(round_trip)(kernels[0]), jnp.cos(kernels[0]), 1e-5)


@pytest.mark.parametrize(
    ("conv", "like", "words"),
    [
        (rp.Conv(kernel(1, 1, 4, 4)), block, r"fuse\(conv, size\)"),
        (rp.Conv(kernel(3, 4, 4)), block, "has the kernel"),
        (rp.Conv(kernel(3, 3, 4, 4), dilation=2), block, "dilation 2"),
        (rp.Conv(kernel(3, 3, 3, 4)), block, "maps 3 channels to 4"),
        (rp.Conv(kernel(3, 3, 4, 4)), lambda: rp.Identity(4), "no branch of `like`"),
        (
            rp.Conv(kernel(3, 3, 4, 4)),
            lambda: rp.Conv(kernel(3, 3, 1, 4), groups=4),
            "groups",
        ),
        (
            rp.Conv(kernel(3, 3, 2, 4), groups=2),
            lambda: rp.Sum(rp.Conv(kernel(3, 3, 2, 4), groups=2), rp.Conv(kernel(1, 1, 4, 4))),
            "all branches together 1",
        ),
        (
            rp.Conv(kernel(3, 5, 4, 4)),
            lambda: rp.Sum(rp.Conv(kernel(3, 1, 4, 4)), rp.Conv(kernel(1, 5, 4, 4))),
            "reaches every tap",
        ),
        (rp.Conv(kernel(3, 3, 4, 4), kernel(4)), lambda: rp.Conv(kernel(3, 3, 4, 4)), "bias"),
    ],
)
def test_what_does_not_unfuse_says_why(conv, like, words):
    with pytest.raises(ValueError, match=words):
        rp.unfuse(conv, like())
