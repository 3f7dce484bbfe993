"""Transforms that carry the state of modules, and the pure ones, which refuse to lose it by name."""

import functools

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

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

    compiled = jt.remat.memory_analysis(jax.jit(train), state, X)
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


@pytest.mark.slow
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


class Counter(nnx.Pytree):
    """A graph node that is not a module."""

    def __init__(self):
        self.calls = nnx.Variable(jnp.float32(0))


def count(variable):
    variable[...] = variable[...] + 1
    return variable[...] * 1.0


def returning_zero(update):
    return lambda node, x: (update(node, x), jnp.float32(0))[1]


ADAM = optax.adam(0.1)  # part of how an optimizer is built

# Everything with variables that a call writes: how it is built, and a call that writes and returns a number.
NODES = {
    "Rngs": (lambda: nnx.Rngs(0), lambda r, _: jax.random.uniform(r.default())),
    "RngStream": (lambda: nnx.Rngs(1).default, lambda r, _: jax.random.uniform(r())),
    "Variable": (lambda: nnx.Variable(jnp.float32(0)), lambda v, _: count(v)),
    "BatchStat": (lambda: nnx.BatchStat(jnp.int32(0)), lambda v, _: count(v)),
    "Average": (nnx.metrics.Average, returning_zero(lambda m, x: m.update(values=x))),
    "MultiMetric": (
        lambda: nnx.MultiMetric(
            loss=nnx.metrics.Average("loss"), spread=nnx.metrics.Welford("loss")
        ),
        returning_zero(lambda m, x: m.update(loss=x)),
    ),
    "Pytree": (Counter, lambda c, _: count(c.calls)),
    "Optimizer": (
        lambda: nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), ADAM, wrt=nnx.Param),
        lambda o, _: count(o.step),
    ),
    "Dropout": (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(2)), lambda m, x: m(x).mean()),
    "BatchNorm": (lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)), lambda m, x: m(x).mean()),
}
SMALL = jnp.arange(8, dtype=jnp.float32).reshape(2, 4)
ROOMY = WRAPPERS | {
    "plan": lambda fn, *args: jt.nnx.plan(fn, *args, budget_bytes="1GB").fn,
    "auto_remat": lambda fn, *args: jt.nnx.auto_remat(fn, "1GB"),
}


def with_nodes(names):
    """loss(model, nodes, x) that writes all the nodes."""

    def fn(model, nodes, x):
        values = [NODES[name][1](node, x) for name, node in zip(names, nodes["in"], strict=True)]
        return (model(x) ** 2).mean() * (1 + sum(values))

    return fn


def nodes_of(names):
    """New nodes; of two with the same name the second is the first."""
    made = {name: NODES[name][0]() for name in names}
    return {"in": [made[name] for name in names]}


def steps(fn, names):
    """Losses, gradients, and the state of the nodes after two steps."""
    model, nodes = nnx.Linear(4, 4, rngs=nnx.Rngs(3)), nodes_of(names)
    outs = [nnx.value_and_grad(fn)(model, nodes, SMALL) for _ in range(2)]
    state = nnx.state(tuple(nodes["in"]), nnx.Not(nnx.RngKey))
    return jax.tree.leaves(outs), jax.tree.leaves(state)


def assert_carried(name, names):
    fn, model = with_nodes(names), nnx.Linear(4, 4, rngs=nnx.Rngs(3))
    wrapped = ROOMY[name](fn, model, nodes_of(names), SMALL)
    want = steps(fn, names)
    assert_equal(steps(wrapped, names), want)
    before = jax.tree.leaves(nnx.state(tuple(nodes_of(names)["in"]), nnx.Not(nnx.RngKey)))
    assert any((a != b).any() for a, b in zip(before, want[1], strict=True))


@each
def test_the_state_of_every_kind_of_node_is_carried(name):
    assert_carried(name, tuple(NODES))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_nodes_in_any_order_and_twice_are_carried(data):
    name = data.draw(st.sampled_from(sorted(ROOMY)))
    assert_carried(
        name, data.draw(st.lists(st.sampled_from(sorted(NODES)), min_size=1, max_size=4))
    )


@pytest.mark.parametrize("name", ["recompute_grad", "checkpoint", "autocast"])
def test_a_module_is_called_with_rngs_of_the_caller(name):
    rngs, plain = nnx.Rngs(0), nnx.Rngs(0)
    drop = nnx.Dropout(0.5)
    wrapped = WRAPPERS[name](drop)
    for _ in range(3):
        np.testing.assert_array_equal(wrapped(SMALL, rngs=rngs), drop(SMALL, rngs=plain))
    assert int(rngs.default.count[...]) == 3


class Coder(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def encode(self, x, double=False):
        return self.norm(x) * (2 if double else 1)


@pytest.mark.parametrize("name", ["recompute_grad", "checkpoint", "autocast"])
def test_methods_and_partials_of_modules_are_carried(name):
    calls = {
        "method": lambda coder: coder.encode,
        "partial": lambda coder: functools.partial(Coder.encode, coder),
        "both": lambda coder: functools.partial(coder.encode, double=True),
    }
    for make in calls.values():
        coder, plain = Coder(), Coder()
        np.testing.assert_allclose(
            WRAPPERS[name](make(coder))(SMALL), make(plain)(SMALL), rtol=1e-5, atol=1e-6
        )
        assert_equal([variables(coder)], [variables(plain)])
        assert not np.allclose(coder.norm.mean[...], 0)


def test_flags_are_static_and_static_argnums_is_refused():
    policy = jax.checkpoint_policies.dots_saveable
    for fn in (jt.nnx.checkpoint(Coder.encode), jt.nnx.checkpoint(Coder.encode, policy=policy)):
        np.testing.assert_allclose(fn(Coder(), SMALL, True), 2 * fn(Coder(), SMALL, False))
    with pytest.raises(ValueError, match=r"nnx\.checkpoint takes no `static_argnums`"):
        jt.nnx.checkpoint(Coder.encode, static_argnums=(2,))


@pytest.mark.parametrize("name", ["recompute_grad", "checkpoint"])
def test_the_pure_functions_refuse_a_module_and_name_the_cure(name):
    with pytest.raises(ValueError, match=rf"remat\.{name}: .*\(Linear\).*jaxtricks\.nnx\.{name}"):
        getattr(jt.remat, name)(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    jitted = nnx.jit(lambda x: x * 2)  # of flax.nnx, but not a module
    np.testing.assert_array_equal(getattr(jt.remat, name)(jitted)(SMALL), SMALL * 2)
