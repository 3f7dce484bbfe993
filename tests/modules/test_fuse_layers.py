"""fuse and convert against every argument that a layer of flax can be made with, and every subclass."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import weightstd

UNIFORM = nnx.initializers.uniform(0.4)


def own_promotion(*args, **kwargs):
    """Another function than flax's default, of the signature of nnx and of linen."""
    from flax.linen import dtypes as linen_dtypes
    from flax.nnx.nn import dtypes

    if isinstance(args[0], tuple):
        return dtypes.promote_dtype(*args, **kwargs)
    return linen_dtypes.promote_dtype(*args, **kwargs)


def hooked(fn):
    return lambda *args, **kwargs: 1.5 * fn(*args, **kwargs)


# ---- layers: (nnx class, its sizes), (linen class, its sizes), input, channels of the output

LAYERS = {
    "Conv": ((nnx.Conv, (3, 4, (3, 3))), (nn.Conv, (4, (3, 3))), (2, 5, 6, 3), 4),
    "ConvTranspose": (
        (nnx.ConvTranspose, (3, 4, (3, 2))), (nn.ConvTranspose, (4, (3, 2))), (2, 5, 6, 3), 4,
    ),
    "Linear": ((nnx.Linear, (3, 4)), (nn.Dense, (4,)), (5, 3), 4),
    "LinearGeneral": ((nnx.LinearGeneral, (3, (2, 4))), (nn.DenseGeneral, ((2, 4),)), (5, 3), 4),
    "Einsum": (
        (nnx.Einsum, ("...ab,abcd->...cd", (3, 2, 2, 4), (2, 4))),
        (nn.Einsum, ((3, 2, 2, 4), "...ab,abcd->...cd")),
        (5, 3, 2),
        4,
    ),
}  # fmt: skip
# For every argument of a constructor, values other than its default. An argument of a later flax that is not
# here fails the test: somebody has to say what fuse and convert make of it.
VALUES = {
    "axis": [(0,)],
    "batch_axis": [{0: 5}],
    "batch_dims": [(0,)],
    "bias_init": [],
    "bias_metadata": [],
    "bias_shape": [None],
    "conv_general_dilated": [hooked(jax.lax.conv_general_dilated), weightstd.standardized()],
    "conv_general_dilated_cls": [lambda: hooked(jax.lax.conv_general_dilated)],
    "dot_general": [hooked(jax.lax.dot_general)],
    "dot_general_cls": [lambda: hooked(jax.lax.dot_general)],
    "dtype": [jnp.bfloat16, jnp.float16],
    "einsum_op": [hooked(jnp.einsum)],
    "feature_group_count": [1],
    "input_dilation": [2, (1, 2)],
    "kernel_dilation": [2, (1, 2), None],
    "kernel_init": [],
    "kernel_metadata": [],
    "mask": ["mask"],
    "name": [],
    "padding": ["VALID", "CIRCULAR", ((1, 2), (0, 1)), 2],
    "param_dtype": [jnp.bfloat16],
    "parent": [],
    "precision": ["highest", jax.lax.Precision.HIGH],
    "preferred_element_type": [jnp.float32],
    "promote_dtype": [own_promotion],
    "rngs": [],
    "strides": [2, (2, 1), None],
    "transpose_kernel": [True],
    "use_bias": [False],
    # Of normalizations.
    "axis_index_groups": [[[0]]],
    "axis_name": ["devices"],
    "epsilon": [0.3],
    "force_float32_reductions": [False],
    "momentum": [0.5],
    "scale_init": [],
    "scale_metadata": [],
    "use_fast_variance": [False],
    "use_running_average": [],
    "use_scale": [False],
}
# Positional ones, which are the sizes.
SIZES = {
    "in_features",
    "out_features",
    "features",
    "kernel_size",
    "einsum_str",
    "kernel_shape",
    "shape",
}
SIZES |= {"num_features", "self"}
# What may compute anything is kept, with its reason.
REFUSED = {"input_dilation", "promote_dtype", "dot_general", "dot_general_cls", "einsum_op"}
REFUSED |= {"conv_general_dilated_cls", "axis"}


def settings(name, linen):
    """(argument, value) of a layer's class."""
    kind, _ = LAYERS[name][linen]
    for argument in inspect.signature(kind.__init__).parameters:
        if argument not in SIZES:
            yield from ((argument, value) for value in VALUES[argument])


# Of the rest, what could differ between frameworks or layers is `slow` in one of them.
QUICK = REFUSED | {
    "mask",
    "preferred_element_type",
    "param_dtype",
    "transpose_kernel",
    "batch_axis",
}


def cases():
    for name, linen in itertools.product(LAYERS, (False, True)):
        for i, (argument, value) in enumerate(settings(name, linen)):
            quick = argument in QUICK or (name == "Conv" and not linen)
            marks = () if quick else pytest.mark.slow
            where = f"{name}-{'linen' if linen else 'nnx'}-{argument}-{i}"
            yield pytest.param(name, linen, argument, value, id=where, marks=marks)


def arguments(name, argument, value):
    """The keyword arguments of the layer and its input."""
    shape = LAYERS[name][2]
    how = {} if argument is None else {argument: value}
    if argument == "mask":
        last = {"Conv": (3, 3, 3, 4), "ConvTranspose": (3, 2, 3, 4)}[name]
        how = {"mask": jnp.asarray(np.random.default_rng(1).integers(0, 2, last), jnp.float32)}
    if argument == "input_dilation":
        how["padding"] = 1
    if argument == "batch_axis":
        shape = (5, 3)
    dtype = value if argument == "dtype" else jnp.float32
    if argument == "preferred_element_type":
        how["dtype"] = dtype = jnp.bfloat16
    x = np.random.default_rng(0).normal(1.0, 1.0, shape)
    return how, jnp.asarray(x, dtype)


def nearest(kind):
    """The class of flax that this one is or is derived from."""
    return next(cls for cls in kind.__mro__ if cls.__module__.startswith("flax."))


class Net(nnx.Module):
    """A layer of this kind with its normalization, behind a pair that always folds."""

    def __init__(self, kind, sizes, how, channels, norm, width):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(width, width, kernel_init=UNIFORM, rngs=rngs)
        self.first_norm = nnx.BatchNorm(width, rngs=rngs)
        parameters = inspect.signature(nearest(kind).__init__).parameters
        sizes = dict(zip(list(parameters)[1:], sizes, strict=False))
        self.layer = kind(**{**sizes, "kernel_init": UNIFORM, **how}, rngs=rngs)
        self.norm = norm(channels, rngs=rngs)

    def __call__(self, x, train=False):
        mode = {"use_running_average": not train}
        x = self.first_norm(self.first(x), **mode).astype(x.dtype)
        return self.norm(self.layer(x), **mode)


class LinenNet(nn.Module):
    kind: type
    sizes: tuple
    how: dict
    norm: type

    @nn.compact
    def __call__(self, x, train=False):
        mode = {"use_running_average": not train}
        y = nn.Dense(x.shape[-1], kernel_init=UNIFORM, name="first")(x)
        x = nn.BatchNorm(name="first_norm")(y, **mode).astype(x.dtype)
        layer = self.kind(*self.sizes, kernel_init=UNIFORM, name="layer", **self.how)
        return self.norm(name="norm")(layer(x), **mode)


def made(name, linen, how, x, norm=None, kind=None):
    """(the model's call, the fused model's call, report), after two training steps."""
    own, sizes = LAYERS[name][linen]
    kind = kind or own
    if linen:
        model = LinenNet(kind, sizes, how, norm or nn.BatchNorm)
        variables = model.init(jax.random.key(0), x)
        for i in range(2):
            new = model.apply(variables, x + i, train=True, mutable=["batch_stats"])[1]
            variables = {**variables, **new}
        fused, small, report = jt.linen.fuse(model, variables, example=x)
        return (
            functools.partial(model.apply, variables),
            functools.partial(fused.apply, small),
            report,
        )
    model = Net(kind, sizes, how, LAYERS[name][3], norm or nnx.BatchNorm, x.shape[-1])
    for i in range(2):
        model(x + i, train=True)
    fused, report = jt.nnx.fuse(model, example=x)
    return model, fused, report


def same(model, fused, report, x, folds):
    """The law: one function, one dtype, and what does not fold has a reason by name."""
    layers = {row.layer for row in report.layers}
    assert layers == ({"first", "layer"} if folds else {"first"})
    if not folds:
        (norm, reason), *_ = report.kept
        assert norm == "norm" and ("'layer'" in reason or "'norm'" in reason)
        assert "please" not in reason
    y, z = model(x + 0.5), fused(x + 0.5)
    assert y.dtype == z.dtype
    coarse = report.model.bound + 1e-5
    np.testing.assert_allclose(np.float32(z), np.float32(y), atol=4 * coarse)


@pytest.mark.parametrize(("name", "linen", "argument", "value"), list(cases()))
def test_every_argument_of_every_layer(name, linen, argument, value):
    how, x = arguments(name, argument, value)
    if argument == "axis":  # another one is contracted; the last of the output stays last
        x = x.T
    hook = argument == "conv_general_dilated" and not isinstance(value, weightstd.Hook)
    folds = argument not in REFUSED - {"axis"} and not hook
    same(*made(name, linen, how, x), x, folds)


NORM_ARGUMENTS = [
    pytest.param(linen, argument, value, id=f"{('nnx', 'linen')[linen]}-{argument}-{i}")
    for linen, kind in enumerate((nnx.BatchNorm, nn.BatchNorm))
    for argument in inspect.signature(kind.__init__).parameters
    if argument not in SIZES
    for i, value in enumerate(VALUES[argument] if argument != "axis" else [-2, -1])
    # In evaluation nothing is shared between devices, and to train, an axis would have to be mapped.
    if argument not in ("axis_name", "axis_index_groups")
]


@pytest.mark.parametrize(("linen", "argument", "value"), NORM_ARGUMENTS)
@pytest.mark.parametrize("name", ["Conv", pytest.param("Linear", marks=pytest.mark.slow)])
def test_every_argument_of_a_normalization(name, linen, argument, value):
    shape = (4, 4, 4, 3) if name == "Conv" else (4, 3)  # then any axis has four channels
    x = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, shape), jnp.float32)
    norm = functools.partial((nnx.BatchNorm, nn.BatchNorm)[linen], **{argument: value})
    folds = argument not in REFUSED or value == -1
    same(*made(name, linen, {}, x, norm=norm), x, folds)


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("linen", [False, True])
def test_extended_normalizations_and_sixteen_bits(name, linen):
    norm = (jt.nnx, jt.linen)[linen].ExtendedBatchNorm
    for dtype in (None, jnp.bfloat16):
        how, x = arguments(name, None, None)
        same(*made(name, linen, how, x, norm=functools.partial(norm, dtype=dtype)), x, True)


# ---- subclasses


def subclasses(base, linen):
    """{what is its own: (class, whether it computes what its base does)}."""

    class Call(base):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Pads(base):
        def __call__(self, x):
            return super().__call__(jnp.concatenate([x, x]))

    class Helper(base):
        note = "nothing else"

        def describe(self):
            return self.note

    found = {"call": (Call, False), "pads": (Pads, False), "helper": (Helper, True)}
    if linen:

        class Param(base):
            def param(self, name, *args, **kwargs):
                p = super().param(name, *args, **kwargs)
                return p - p.mean() if name == "kernel" else p

        return {**found, "param": (Param, False), "remat": (nn.remat(base), True)}

    class Kernel(base):
        @property
        def kernel(self):
            return nnx.Param(self.stored[...] - self.stored[...].mean())

        @kernel.setter
        def kernel(self, value):
            self.stored = value

    class Init(base):
        def __init__(self, *, rngs, **kwargs):
            super().__init__(**kwargs, rngs=rngs)

    return {**found, "kernel": (Kernel, False), "init": (Init, True)}


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("linen", [False, True])
def test_subclasses_are_kept_by_name_and_the_rest_is_fused(name, linen):
    for what, (kind, folds) in subclasses(LAYERS[name][linen][0], linen).items():
        how, x = arguments(name, None, None)
        model, fused, report = made(name, linen, how, x, kind=kind)
        same(model, fused, report, x, folds)
        if not folds:
            assert (
                f"that overrides `{'__call__' if what in ('call', 'pads') else what}`"
                in report.kept[0][1]
            )


@pytest.mark.parametrize("linen", [False, True])
def test_a_normalization_with_an_activation(linen):
    base = (nnx.BatchNorm, nn.BatchNorm)[linen]

    class Act(base):
        def __call__(self, x, **kwargs):
            return nnx.relu(super().__call__(x, **kwargs))

    how, x = arguments("Conv", None, None)
    model, fused, report = made("Conv", linen, how, x, norm=Act)
    same(model, fused, report, x, False)
    assert "Act that overrides `__call__`" in report.kept[0][1]


def normed(kind, **how):
    """A layer whose kernel something else makes at every call; absent in older releases of flax.nnx."""
    return kind(
        nnx.Conv(3, 4, (3, 3), kernel_init=UNIFORM, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1), **how
    )


class Wrapped(nnx.Module):
    def __init__(self):
        self.first, self.first_norm = (
            nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
        )
        self.layer, self.norm = normed(nnx.WeightNorm), nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, train=False):
        mode = {"use_running_average": not train}
        return self.norm(self.layer(self.first_norm(self.first(x), **mode)), **mode)


class LinenWrapped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        mode = {"use_running_average": not train}
        x = nn.BatchNorm(name="first_norm")(nn.Dense(3, name="first")(x), **mode)
        for wrap in (nn.WeightNorm, nn.SpectralNorm):
            flags = {} if wrap is nn.WeightNorm else {"update_stats": train}
            x = wrap(nn.Conv(4, (3, 3), kernel_init=nn.initializers.normal()))(x, **flags)
            x = nn.BatchNorm()(x, **mode)
        return x


def test_layers_whose_kernel_is_made_at_every_call():
    _, x = arguments("Conv", None, None)
    variables = LinenWrapped().init(jax.random.key(0), x)
    for i in range(2):
        new = LinenWrapped().apply(variables, x + i, train=True, mutable=["batch_stats"])[1]
        variables = {**variables, **new}
    fused, small, report = jt.linen.fuse(LinenWrapped(), variables, example=x)
    assert [row.layer for row in report.layers] == ["first"]
    assert ["another kernel" in why for _, why in report.kept] == [True, True]
    y = LinenWrapped().apply(variables, x)
    np.testing.assert_allclose(fused.apply(small, x), y, atol=1e-5)
    if hasattr(nnx, "WeightNorm"):
        model = Wrapped()
        for _ in range(2):
            model(x, train=True)
        # Otherwise the scales are those that the layer was made with.
        model.layer.scales[next(iter(model.layer.scales))] = nnx.Param(jnp.full(4, 0.5))
        plain, report = jt.nnx.fuse(model, example=x)
        assert [row.layer for row in report.layers] == [
            "first"
        ] and "another kernel" in report.kept[0][1]
        np.testing.assert_allclose(plain(x), model(x), atol=1e-5)
