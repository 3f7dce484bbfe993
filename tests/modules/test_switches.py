"""Every way in which a model is told to train reaches it through functional; fuse finds its evaluation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks._layers import FLAGS

X = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 5, 3)).astype(np.float32)
NORM = {"momentum": 0.5}
# Where the flag stands in the signature, and what it is when nobody says.
PLACES = [
    f"{star}{{flag}}{default}"
    for star, default in itertools.product(("", "*, "), ("", "=True", "=False", "=None"))
]


def written(place, flag, base, body):
    """A class whose call is written out in source code, as people do, with `flag` in this place."""
    signature = place.format(flag=flag)
    mode = f"{flag}" if not FLAGS[flag] else f"not {flag}"
    scope = {"base": base, "jnp": jnp, "nn": nn, "NORM": NORM}
    exec(  # the parameter's name is what is tested
        f"class Net(base):\n{body}\n"
        f"    def __call__(self, x, {signature}):\n"
        f"        return self.run(x, {mode})\n",
        scope,
    )
    return scope["Net"]


class NnxBase(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 4, (2, 2), kernel_init=nnx.initializers.uniform(), rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, **NORM, rngs=nnx.Rngs(0))

    def run(self, x, evaluates):
        return self.norm(self.conv(x), use_running_average=evaluates)


class LinenBase(nn.Module):
    @nn.compact
    def run(self, x, evaluates):
        x = nn.Conv(4, (2, 2), kernel_init=nn.initializers.uniform(), name="conv")(x)
        return nn.BatchNorm(use_running_average=evaluates, **NORM, name="norm")(x)


def nnx_case(model, **kwargs):
    """(functional, what a step of training gives, what evaluation gives then)."""
    trained = nnx.clone(model)
    y = NnxBase.run(trained, X, False)
    return jt.nnx.functional(model, **kwargs), y, NnxBase.run(trained, X, True)


def linen_case(module, variables, **kwargs):
    y, new = LinenBase().apply(variables, X, False, mutable=["batch_stats"], method="run")
    z = LinenBase().apply({**variables, **new}, X, True, method="run")
    return jt.linen.functional(module, variables, **kwargs), y, z


def obeys(case, **call):
    """The law: training trains and moves the statistics, evaluation evaluates and moves none."""
    (apply, params, state), trained, evaluated = case
    y, moved = apply(params, state, X, train=True, **call)
    np.testing.assert_allclose(y, trained, atol=1e-5)
    z, same = apply(params, moved, X, train=False, **call)
    np.testing.assert_allclose(z, evaluated, atol=1e-5)
    assert np.abs(trained - evaluated).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, moved, same)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), moved, state)))


@functools.cache
def linen_variables():
    return LinenBase().init(jax.random.key(0), X, False, method="run")


GRID = list(itertools.product(sorted(FLAGS), PLACES))


@pytest.mark.parametrize(("flag", "place"), GRID)
def test_flags_of_the_call(flag, place):
    obeys(nnx_case(written(place, flag, NnxBase, "    pass")()))
    module = written(place, flag, LinenBase, "    pass")()
    obeys(linen_case(module, linen_variables()))


@pytest.mark.parametrize("flag", sorted(FLAGS))
def test_flags_that_are_attributes(flag):
    """Set in the constructor, as `deterministic` in many configurations; either value at first."""
    sign = "" if not FLAGS[flag] else "not "
    for first in (True, False):
        scope = {"NnxBase": NnxBase, "LinenBase": LinenBase}
        exec(
            "class A(NnxBase):\n"
            f"    def __init__(self):\n        super().__init__()\n        self.{flag} = {first}\n"
            f"    def __call__(self, x):\n        return self.run(x, {sign}self.{flag})\n"
            f"class B(LinenBase):\n    {flag}: bool = {first}\n"
            f"    def __call__(self, x):\n        return self.run(x, {sign}self.{flag})\n",
            scope,
        )
        obeys(nnx_case(scope["A"]()))
        obeys(linen_case(scope["B"](), linen_variables()))


class Mutable(LinenBase):
    """The idiom of jax-resnet and others."""

    def __call__(self, x):
        return self.run(x, not self.is_mutable_collection("batch_stats"))


class Cached(LinenBase):
    """The idiom, beside a collection that is written in evaluation too."""

    def __call__(self, x):
        self.put_variable("cache", "calls", self.get_variable("cache", "calls") + 1)
        return self.run(x, not self.is_mutable_collection("batch_stats"))


def test_modules_that_look_at_what_is_mutable():
    obeys(linen_case(Mutable(), linen_variables()))
    variables = {**linen_variables(), "cache": {"calls": jnp.zeros((), jnp.int32)}}
    apply, params, state = jt.linen.functional(Cached(), variables)
    for train in (True, False):
        new = jax.jit(functools.partial(apply, train=train))(params, state, X)[1]
        assert int(new["cache"]["calls"]) == 1
        moved = bool((new["batch_stats"]["norm"]["mean"] != 0).any())
        assert moved == train


class Frozen(LinenBase):
    def __call__(self, x, frozen=False):
        return self.run(x, frozen)


def test_a_flag_of_another_name():
    """`train_kwargs` says it; without it linen says that it is needed."""
    nnx_net = written("*, train=False", "train", NnxBase, "    pass")

    class Nnx(NnxBase):
        def __call__(self, x, is_test=True):
            return self.run(x, is_test)

    class Linen(LinenBase):
        def __call__(self, x, is_test=False):
            return self.run(x, is_test)

    for given in ({"is_test": False}, lambda train: {"is_test": not train}):
        obeys(nnx_case(Nnx(), train_kwargs=given))
        obeys(linen_case(Linen(), linen_variables(), train_kwargs=given))
    linen = jt.linen.functional(Linen(), linen_variables())
    for apply, params, state in (linen, jt.nnx.functional(Nnx())):
        with pytest.raises(ValueError, match=r"`is_test` that looks like a flag.*`train_kwargs`"):
            apply(params, state, X, train=False)
        apply(params, state, X, train=False, is_test=True)
    with pytest.raises(ValueError, match="`is_test`.*`example_kwargs`"):
        jt.nnx.fuse(Nnx(), example=X)
    model = Nnx()
    NnxBase.run(model, X, False)
    assert jt.nnx.fuse(model, example=X, example_kwargs={"is_test": True})[1].layers
    # A name that says nothing: linen sees what is written.
    apply, params, state = jt.linen.functional(Frozen(), linen_variables())
    with pytest.raises(ValueError, match=r"still updates 'batch_stats'.*train_kwargs"):
        apply(params, state, X, train=False)
    with pytest.raises(Exception, match=r"train_kwargs|rate"):
        jt.nnx.functional(nnx_net(), train_kwargs={"rate": 0.5})


class Deaf(nn.Module):
    """Nothing tells it."""

    evaluates: bool
    dropout: bool = False

    @nn.compact
    def __call__(self, x):
        if self.dropout:
            return nn.Dropout(0.5, deterministic=self.evaluates)(x)
        return nn.BatchNorm(use_running_average=self.evaluates)(x)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_module_without_a_flag_is_never_silent(evaluates, dropout):
    module = Deaf(evaluates, dropout)
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    run = functools.partial(*jt.linen.functional(module, variables), X, key=jax.random.key(2))
    run(train=not evaluates)
    with pytest.raises(ValueError, match="train_kwargs"):
        run(train=evaluates)
    as_it_is = jt.linen.functional(module, variables, train_kwargs={})
    for train in (True, False):
        functools.partial(*as_it_is, X, key=jax.random.key(2))(train=train)


# ---- other arguments of the call


class Asks(NnxBase):
    """Keyword-only arguments, one of them insisted on, as in published vision transformers."""

    def __init__(self):
        super().__init__()
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, scale=1.0, *, rngs, params=0.0, train=False):
        x = self.dropout(x, deterministic=not train, rngs=rngs)
        return scale * self.run(x, not train) + params


def test_keyword_arguments_and_rngs_of_the_call():
    apply, params, state = jt.nnx.functional(Asks())
    run = jax.jit(apply, static_argnames="train")
    key = jax.random.key(1)
    (y, moved), (again, _) = (run(params, state, X, train=True, key=key) for _ in range(2))
    np.testing.assert_array_equal(y, again)
    assert np.abs(y - run(params, state, X, train=True, key=jax.random.key(2))[0]).max() > 0.1
    plain = run(params, moved, X, train=False)[0]
    other = apply(params, moved, X, 2.0, train=False, params=1.0)[0]
    np.testing.assert_allclose(other, 2 * plain + 1, atol=1e-5)
    given = apply(params, state, X, train=True, rngs=nnx.Rngs(3))[0]
    assert np.abs(given - y).max() > 0.1


def test_what_the_caller_says_wins():
    net = written("train", "train", NnxBase, "    pass")
    apply, params, state = jt.nnx.functional(net())
    evaluated = apply(params, state, X, train=False)[0]
    for y, new in (
        apply(params, state, X, False, train=True),
        apply(params, state, X, False, train=False),
    ):
        np.testing.assert_array_equal(y, evaluated)
        jax.tree.map(np.testing.assert_array_equal, new, state)


# ---- fuse


@pytest.mark.parametrize(("flag", "place"), GRID[::5])
def test_fuse_finds_the_evaluation_form(flag, place):
    model = written(place, flag, NnxBase, "    pass")()
    NnxBase.run(model, X, False)
    plain, report = jt.nnx.fuse(model, example=X)
    assert [row.layer for row in report.layers] == ["conv"]
    kwargs = {flag: not FLAGS[flag]}
    np.testing.assert_allclose(plain(X, **kwargs), NnxBase.run(model, X, True), atol=1e-5)
    for how in (
        {"example": X, "example_kwargs": {flag: FLAGS[flag]}},
        {"example": (X, FLAGS[flag])},
    ):
        if "*" in place and isinstance(how["example"], tuple):
            continue
        with pytest.raises(ValueError, match="'norm' is in training mode.*`example_kwargs`"):
            jt.nnx.fuse(model, **how)
    module, variables = written(place, flag, LinenBase, "    pass")(), linen_variables()
    new = LinenBase().apply(variables, X, False, mutable=["batch_stats"], method="run")[1]
    variables = {**variables, **new}
    fused, small, report = jt.linen.fuse(module, variables, example=X)
    expected = LinenBase().apply(variables, X, True, method="run")
    np.testing.assert_allclose(fused.apply(small, X, **kwargs), expected, atol=1e-5)
    with pytest.raises(ValueError, match="'norm' is in training mode"):
        jt.linen.fuse(module, variables, example=X, example_kwargs={flag: FLAGS[flag]})


def test_fuse_of_modules_that_look_at_what_is_mutable():
    new = LinenBase().apply(linen_variables(), X, False, mutable=["batch_stats"], method="run")[1]
    variables = {**linen_variables(), **new}
    fused, small, report = jt.linen.fuse(Mutable(), variables, example=X)
    assert [row.layer for row in report.layers] == ["conv"] and set(small) == {"params"}
    np.testing.assert_allclose(fused.apply(small, X), Mutable().apply(variables, X), atol=1e-5)


def test_fuse_with_keyword_arguments():
    model = Asks()
    NnxBase.run(model, X, False)
    for kwargs in (None, {"params": 1.0}, {"rngs": nnx.Rngs(0), "scale": 2.0}):
        plain, report = jt.nnx.fuse(model, example=X, example_kwargs=kwargs)
        call = {"rngs": None, **(kwargs or {})}
        assert [row.layer for row in report.layers] == ["conv"]
        np.testing.assert_allclose(plain(X, **call), model(X, **call), atol=1e-5)
