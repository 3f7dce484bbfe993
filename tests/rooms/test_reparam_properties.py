"""reparam: the laws of fusing over drawn structures and geometries, and under JAX's transformations."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtricks import _compat
from jaxtricks import reparam as rp

from tests.reference import reparam as reference
from tests.rooms.test_reparam import random_conv, random_norm

SETTINGS = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # shrinking would compile a program at every step
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# Largest kernel, own dilation and input per axis, by number of spatial axes.
KERNEL, OWN, INPUT = {1: 7, 2: 5, 3: 3}, {1: 3, 2: 3, 3: 2}, {1: 16, 2: 9, 3: 6}
SHORTCUTS = ("norm", "identity", "scale")
KINDS = ("conv", "bare", "sequence", "pool", "early scale")


# ---- structures and geometries


def ints(low, high, axes):
    return st.tuples(*[st.integers(low, high)] * axes)


@dataclasses.dataclass(frozen=True)
class Branch:
    """What one branch is made of, but for its arrays."""

    kind: str
    size: tuple[int, ...]
    own: tuple[int, ...]
    groups: int

    @property
    def extent(self):
        if self.kind in SHORTCUTS:
            return (1,) * len(self.size)
        return tuple(d * (k - 1) + 1 for d, k in zip(self.own, self.size, strict=True))

    def build(self, rng, ins, outs):
        conv = functools.partial(random_conv, rng)
        first = conv((1,) * len(self.size), ins, ins, self.groups), random_norm(rng, ins)
        main = conv(self.size, ins, outs, self.groups, self.own)
        match self.kind:
            case "conv":
                return rp.Sequential(main, random_norm(rng, outs))
            case "bare":
                return main
            case "early scale":
                return rp.Sequential(rp.Scale(rng.normal(size=ins)), main)
            case "sequence":
                return rp.Sequential(*first, main, random_norm(rng, outs))
            case "pool":
                last = conv((1,) * len(self.size), ins, outs, self.groups), random_norm(rng, outs)
                return rp.Sequential(*last, rp.AvgPool(self.size), random_norm(rng, outs))
            case "norm":
                return random_norm(rng, ins)
            case "identity":
                return rp.Identity(ins)
            case "scale":
                return rp.Scale(rng.normal(size=ins))


@dataclasses.dataclass(frozen=True)
class Tree:
    """A Sum of branches; `seed` makes their arrays."""

    branches: tuple[Branch, ...]
    ins: int
    outs: int
    seed: int

    @property
    def window(self):
        return tuple(map(max, zip(*(b.extent for b in self.branches), strict=True)))

    def build(self):
        rng = np.random.default_rng(self.seed)
        return rp.Sum(*(b.build(rng, self.ins, self.outs) for b in self.branches)), rng


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Window placement on an input; `pads` is `padding` as pairs."""

    spatial: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    pads: tuple[tuple[int, int], ...]


@st.composite
def trees(draw):
    """One to four branches, at least one of them a convolution."""
    axes = draw(st.integers(1, 3))
    outs, groups = draw(st.sampled_from([4, 8])), draw(st.sampled_from([1, 2, 4]))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=2))
    kinds += draw(st.lists(st.sampled_from(KINDS + SHORTCUTS * (outs == 4)), max_size=2))
    dense = draw(st.booleans())  # grouped branches beside a dense one
    every = [groups] * (len(kinds) - 1) + [1 if dense else groups]

    def branch(kind, groups):
        dilated = kind in ("conv", "bare", "early scale")
        own = draw(ints(1, OWN[axes], axes)) if dilated else (1,) * axes
        return Branch(kind, draw(ints(1, KERNEL[axes], axes)), own, groups)

    branches = tuple(map(branch, kinds, every))
    return Tree(branches, 4, outs, draw(st.integers(0, 2**32 - 1)))


@st.composite
def cases(draw):
    """A tree and a geometry that leaves at least one output."""
    tree = draw(trees())
    axes = len(tree.window)
    dilation, strides = draw(ints(1, 3, axes)), draw(ints(1, 3, axes))
    spatial = draw(ints(1, INPUT[axes], axes))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, tree.window, strict=True)]
    fits = all(n >= r for n, r in zip(spatial, reach, strict=True))
    padding = draw(st.sampled_from(["SAME", "SAME_LOWER", "explicit"] + ["VALID"] * fits))
    if padding == "explicit":
        low, more = draw(ints(-2, 4, axes)), draw(ints(-2, 4, axes))
        pads = padding = tuple(map(explicit, spatial, reach, low, more))
    else:
        pads = tuple(map(functools.partial(named, padding), spatial, reach, strides))
    return tree, Geometry(spatial, strides, dilation, padding, pads)


def explicit(n, reach, low, high):
    """A pair that crops at most n - 1 of n and leaves room for one output."""
    low = max(low, 1 - n)
    return low, max(high, reach - n - low, 1 - n - min(low, 0))


def named(padding, n, reach, stride):
    """Padding of one axis by its definition: ceil(n / stride) outputs, the odd zero high or low."""
    if padding == "VALID":
        return 0, 0
    total = max((math.ceil(n / stride) - 1) * stride + reach - n, 0)
    less, more = total // 2, total - total // 2
    return (more, less) if padding == "SAME_LOWER" else (less, more)


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation"))
def both(node, x, **how):
    """(branches, one convolution, it, bound)."""
    fused = rp.fuse(node)
    bound = rp.error_bound(node, x, fused=fused, **how)
    return rp.apply(node, x, **how), rp.apply(fused, x, **how), fused, bound


# ---- one convolution equals the branches


def check_fused(case):
    tree, geometry = case
    node, rng = tree.build()
    x = rng.normal(size=(2, *geometry.spatial, tree.ins))
    plain = dict(strides=geometry.strides, dilation=geometry.dilation)
    how = plain | dict(padding=geometry.padding)
    half = jax.tree.map(lambda a: np.asarray(a, np.float32), (node, x))
    y, y_fused, _, bound = both(*half, **how)
    assert y.dtype == y_fused.dtype == np.float32 and y.shape == y_fused.shape
    assert np.abs(y - y_fused).max() <= bound
    with _compat.enable_x64():
        y, y_fused, fused, bound = both(node, x, **how)
        y, y_fused, kernel = map(np.asarray, (y, y_fused, fused.kernel))
        bias = None if fused.bias is None else np.asarray(fused.bias)
    tol = 1e-12 * float(bound) / (16 * 2.0**-53)
    assert y.dtype == np.float64 and np.abs(y - y_fused).max() <= tol
    expected = reference.conv(
        x, kernel, groups=fused.groups, bias=bias, pads=geometry.pads, **plain
    )
    assert y.shape == expected.shape and np.abs(y - expected).max() <= tol


@hypothesis.settings(SETTINGS, max_examples=10)  # every case compiles twice
@hypothesis.given(cases())
def test_fused_equals_branches(case):
    check_fused(case)


@pytest.mark.slow
@hypothesis.settings(SETTINGS, max_examples=150)
@hypothesis.given(cases())
def test_fused_equals_branches_in_many_cases(case):
    check_fused(case)


@hypothesis.settings(SETTINGS, max_examples=8)
@hypothesis.given(trees())
def test_unfuse_is_the_inverse_of_fuse(tree):
    """A free convolution as large as the window in front: then no structure is refused."""
    node, rng = tree.build()
    with _compat.enable_x64():
        whole = jax.eval_shape(rp.fuse, node)
        norm = random_norm(rng, whole.kernel.shape[-1])
        norm = rp.Norm(norm.mean, norm.var, rng.uniform(0.5, 2, norm.mean.shape), norm.bias)
        free = rp.Sequential(rp.Conv(np.zeros(whole.kernel.shape), groups=whole.groups), norm)
        kernel, bias = rng.normal(size=whole.kernel.shape), rng.normal(size=norm.mean.shape)
        target = rp.Conv(kernel, bias, whole.groups)
        like = rp.Sum(free, *node.nodes)
        back = jax.jit(lambda *args: rp.fuse(rp.unfuse(*args)))(target, like)
        np.testing.assert_allclose(back.kernel, kernel, rtol=0, atol=1e-11)
        np.testing.assert_allclose(back.bias, bias, rtol=0, atol=1e-10)


# ---- under JAX's transformations


def layers(n):
    """n stacked layers of three branches, 4 channels to 4."""
    rng = np.random.default_rng(n)

    def norm():
        return rp.Norm(rng.normal(size=4), rng.uniform(0.5, 2, 4), *rng.normal(size=(2, 4)))

    def kernel(size):
        return rp.Conv(rng.normal(size=(*size, 2, 4)), rng.normal(size=4), groups=2)

    def one():
        square, line = kernel((3, 3)), kernel((1, 3))
        return rp.Sum(rp.Sequential(square, norm()), rp.Sequential(line, norm()), norm())

    made = [jax.tree.map(lambda a: np.asarray(a, np.float32), one()) for _ in range(n)]
    return jax.tree.map(lambda *a: jnp.stack(a), *made)


def test_ensembles_scans_and_recomputation():
    stacked = layers(3)
    x = jax.random.normal(jax.random.key(0), (2, 7, 8, 4))
    fused = jax.jit(jax.vmap(rp.fuse))(stacked)
    ensemble = jax.jit(jax.vmap(rp.apply, in_axes=(0, None)))
    close(ensemble(fused, x), ensemble(stacked, x))

    def deep(nodes, x):
        step = jax.checkpoint(lambda x, node: (jnp.tanh(rp.apply(node, x)), None))
        return jnp.sum(jax.lax.scan(step, x, nodes)[0] ** 2)

    value = jax.jit(jax.value_and_grad(deep, argnums=1))
    for a, b in zip(value(stacked, x), value(fused, x), strict=True):
        close(a, b)


@pytest.mark.devices
def test_sharded_inputs():
    node = jax.tree.map(lambda a: a[0], layers(1))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.random.normal(jax.random.key(0), (8, 7, 8, 4))
    run = jax.jit(functools.partial(rp.apply, strides=2))
    expected = run(node, x)
    for form in (node, rp.fuse(node)):
        y = run(form, jax.device_put(x, place))
        assert len(y.sharding.device_set) == 8
        close(y, expected)


def test_gradients_by_every_parameter_agree():
    """In float64, through the branches and through the fused kernel."""
    with _compat.enable_x64():
        node = jax.tree.map(lambda a: a[0].astype(np.float64), layers(1))
        x = np.random.default_rng(0).normal(size=(2, 7, 8, 4))

        def loss(form, node, x):
            return jnp.sum(jnp.sin(rp.apply(form(node), x, strides=2)))

        grads = [
            jax.jit(jax.grad(functools.partial(loss, form), argnums=(0, 1)))(node, x)
            for form in (lambda node: node, rp.fuse)
        ]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
