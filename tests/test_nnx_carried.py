"""Transforms that carry the state of modules, and the pure ones, which refuse to lose it by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtricks as jt

X = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
BUDGET = {"budget_bytes": 0.75, "wrt": "temp", "max_compiles": 3}
modules = getattr(nnx, "List", list)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return jnp.tanh(self.drop(self.norm(self.linear(x)))) * scale


class Net(nnx.Module):
    def __init__(self, depth=4):
        rngs = nnx.Rngs(0)
        self.blocks = modules([Block(rngs) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def loss(model, x):
    return (model(x) ** 2).mean()


def loss_with_aux(x, model):
    return loss(model, x), {"x": x.sum()}


def variables(model):
    """All but the keys, as numbers."""
    state = nnx.state(model, nnx.Not(nnx.RngKey))
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def step(fn, order=lambda model, x: (model, x), **grad):
    """Loss, gradients, and what the model holds after a step of a new model."""
    model = Net()
    out, grads = nnx.value_and_grad(fn, **grad)(*order(model, X))
    return jax.tree.leaves(out), jax.tree.leaves(grads), variables(model)


def assert_equal(found, want):
    for mine, theirs in zip(found, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


WRAPPERS = {
    "plan": lambda fn, *args, **kw: jt.nnx.plan(fn, *args, **BUDGET, **kw).fn,
    "auto_remat": lambda fn, *args, **kw: jt.nnx.auto_remat(fn, **BUDGET, **kw),
    "recompute_grad": lambda fn, *args, **kw: jt.nnx.recompute_grad(fn),
    "checkpoint": lambda fn, *args, **kw: jt.nnx.checkpoint(fn),
    "autocast": lambda fn, *args, **kw: jt.nnx.autocast(fn, "p=f32,c=f32,o=f32"),
}
each = pytest.mark.parametrize("name", WRAPPERS)


@each
def test_updates_and_gradients_are_those_of_the_loss(name):
    assert_equal(step(WRAPPERS[name](loss, Net(), X)), step(loss))


@each
def test_the_model_may_stand_anywhere_and_come_by_name(name):
    settings = {"argnums": 1, "has_aux": True}
    wrapped = WRAPPERS[name](loss_with_aux, X, Net(), **settings)
    swapped = lambda model, x: (x, model)
    assert_equal(step(wrapped, swapped, **settings), step(loss_with_aux, swapped, **settings))
    model, plain = Net(), Net()
    (value, aux), (want, more) = wrapped(model=model, x=X), loss_with_aux(X, plain)
    np.testing.assert_allclose([value, aux["x"]], [want, more["x"]], rtol=1e-5)
    assert_equal([variables(model)], [variables(plain)])


@each
def test_a_training_step_under_jit(name):
    wrapped = WRAPPERS[name](loss, Net(), X)
    model, plain = Net(), Net()
    for fn, net in ((wrapped, model), (loss, plain)):
        jitted = nnx.jit(nnx.value_and_grad(fn))
        for _ in range(3):
            jitted(net, X)
    assert_equal([variables(model)], [variables(plain)])
    assert all((a != b).any() for a, b in zip(variables(model), variables(Net()), strict=True) if
               a.shape == (16,) and not (a == 0).all() and not (a == 1).all())  # fmt: skip


def test_the_promised_peak_is_the_compiled_one():
    model = Net(6)
    plan = jt.nnx.plan(loss, model, X, budget_bytes=0.6, wrt="temp")
    assert plan.peak <= 0.6 * plan.baseline
    graph, state = nnx.split(model)

    def train(state, x):
        model = nnx.merge(graph, state)
        value, grads = nnx.value_and_grad(plan.fn)(model, x)
        return value, grads, nnx.state(model, nnx.Not(nnx.Param))

    compiled = jt.remat.memory(jax.jit(train), state, X)
    assert abs(compiled.temp - plan.peak) <= 0.01 * plan.peak


def test_a_wrapped_block_takes_its_place_in_the_model():
    for wrap in (jt.nnx.recompute_grad, jt.nnx.checkpoint):
        model, plain = Net(), Net()
        model.blocks = modules([wrap(block) for block in model.blocks])
        for _ in range(2):
            found, want = (nnx.value_and_grad(loss)(m, X) for m in (model, plain))
            assert_equal(
                [[found[0]], jax.tree.leaves(found[1])], [[want[0]], jax.tree.leaves(want[1])]
            )
        assert_equal([variables(model)], [variables(plain)])
        model.eval(), plain.eval()  # reaches what is wrapped
        np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-6)
        assert model.blocks[0](X, scale=2.0).shape == X.shape


def test_another_model_than_the_planned_one_is_refused():
    model = Net()
    plan = jt.nnx.plan(loss, model, X, **BUDGET)
    model.eval()
    with pytest.raises(ValueError, match=r"nnx\.plan.*plan again after train\(\), eval\(\)"):
        plan.fn(model, X)
    again = jt.nnx.auto_remat(loss, 0.99, wrt="temp")
    again(model, X)
    model.train()
    again(model, X)  # planned anew


def test_a_parameter_that_the_loss_writes_is_refused():
    def writes(model, x):
        value = loss(model, x)
        kernel = model.blocks[0].linear.kernel
        kernel[...] = kernel[...] * 0.5
        return value

    with pytest.raises(ValueError, match=r"nnx\.plan: the loss writes an nnx\.Param"):
        jt.nnx.plan(writes, Net(), X, **BUDGET)
    with pytest.raises(ValueError, match="within"):
        jt.nnx.plan(loss, Net(), X, within=jax.jit, **BUDGET)


BARE = {
    "plan": lambda fn, *args: jt.remat.plan(fn, *args, **BUDGET),
    "auto_remat": lambda fn, *args: jt.remat.auto_remat(fn, **BUDGET)(*args),
    "recompute_grad": lambda fn, *args: jt.remat.recompute_grad(fn)(*args),
    "checkpoint": lambda fn, *args: jt.remat.checkpoint(fn)(*args),
    "autocast": lambda fn, *args: jt.amp.autocast(fn)(*args),
}


@pytest.mark.parametrize("name", BARE)
def test_the_pure_functions_refuse_what_they_would_lose_and_name_the_cure(name):
    def counting(tree, x):
        tree["count"] = tree["count"] + 1
        return (x @ x.T).sum() * tree["scale"]

    cure = rf"in place.*jaxtricks\.nnx\.{name}\b"
    with pytest.raises(ValueError, match=cure):
        BARE[name](counting, {"count": jnp.zeros(()), "scale": jnp.ones(())}, jnp.asarray(X))
    if hasattr(nnx, "Pytree"):  # a module is a pytree
        with pytest.raises(ValueError, match=cure):
            BARE[name](loss, Net(), jnp.asarray(X))
    model = Net()
    with pytest.raises(Exception, match="trace level") as caught:
        BARE[name](lambda x: loss(model, x), jnp.asarray(X))
    assert any(f"jaxtricks.nnx.{name}" in note for note in caught.value.__notes__)


def test_plans_take_keyword_arguments():
    def plain(w, x, bias=0.0):
        for _ in range(8):
            x = jnp.tanh(x @ w + bias)
        return (x**2).mean()

    w, x = jnp.eye(16), jnp.asarray(X)
    want = jax.grad(plain)(w, x)
    planned = jt.remat.plan(plain, w, x, **BUDGET).fn
    for fn in (planned, jt.remat.auto_remat(plain, **BUDGET)):
        for call in (lambda w, fn=fn: fn(w, x=x), lambda w, fn=fn: fn(x=x, w=w)):
            np.testing.assert_allclose(jax.grad(call)(w), want, rtol=1e-5, atol=1e-7)
        with pytest.raises(ValueError, match=r"remat\.\w+: .*weight"):
            fn(w, x, weight=1.0)
    only = functools.partial(jt.remat.auto_remat, **BUDGET)(lambda w, *, x: plain(w, x))
    with pytest.raises(ValueError, match="x can't be passed by position"):
        only(w, x=x)
