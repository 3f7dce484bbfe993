"""Where an operation comes from: the user's line that calls a layer, not the layer's own."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import jaxtricks as jt
import pytest
from flax import linen as nn
from flax import nnx
from jaxtricks import _jaxpr

HERE = pathlib.Path(__file__).name
X, IMAGES = jnp.ones((64, 16)), jnp.ones((2, 8, 8, 16))
PRODUCTS = ("dot_general", "conv_general_dilated")


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(16, 16, rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        if x.ndim == 4:
            x = self.conv(x)  # a convolution
        x = jnp.tanh(self.dense(x))  # a product
        return self.norm(x)  # a normalization


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        if x.ndim == 4:
            x = nn.Conv(16, (3, 3))(x)  # a convolution
        x = jnp.tanh(nn.Dense(16)(x))  # a product
        return nn.LayerNorm()(x)  # a normalization


def line_of(function, comment):
    """The line of a function with a comment, as file:line."""
    lines, start = inspect.getsourcelines(function)
    (i,) = (i for i, line in enumerate(lines) if line.rstrip().endswith(f"# {comment}"))
    return f"{HERE}:{start + i}"


def lines_of(fn, *args):
    """(primitive, source line) of each operation of fn, those in calls too."""
    closed, _ = _jaxpr.trace(fn, *args)
    eqns = _jaxpr.inline(closed).jaxpr.eqns
    return [(_jaxpr.primitive(eqn), _jaxpr.source_line(eqn)) for eqn in eqns]


def nnx_call():
    apply, params, state = jt.nnx.functional(Model())
    return Model.__call__, lambda x: apply(params, state, x, train=True)[0]


def linen_call():
    model = LinenModel()
    variables = model.init(jax.random.key(0), IMAGES)
    return LinenModel.__call__, lambda x: model.apply(variables, x)


@pytest.mark.parametrize("call", [nnx_call, linen_call])
def test_a_layer_of_flax_stands_for_the_line_that_calls_it(call):
    function, fn = call()
    lines = lines_of(fn, IMAGES)
    found = {name: line for name, line in lines if name in PRODUCTS}
    # "file.py:12 (function)" or "file.py:12:4 (function)".
    for name, comment in zip(PRODUCTS, ("a product", "a convolution"), strict=True):
        assert found[name].startswith(
            (line_of(function, comment) + " ", line_of(function, comment) + ":")
        )
        assert "__call__)" in found[name] and "/" not in found[name]
    normalization = line_of(function, "a normalization")
    assert sum(line.startswith(normalization) for _, line in lines) > 3
    assert any(line.startswith(normalization) for name, line in lines if name == "rsqrt")
    (tanh,) = (line for name, line in lines if name == "tanh")
    assert tanh.startswith(line_of(function, "a product"))


def test_an_operation_of_the_user_is_on_its_own_line():
    def fn(x):
        return jnp.sin(x) @ x.T  # mine

    for name, line in lines_of(fn, X):
        assert line.startswith(line_of(fn, "mine")) and "fn)" in line, name


def test_an_operation_of_nobody_has_no_line():
    closed, _ = _jaxpr.trace(jnp.tanh, X)
    (eqn,) = _jaxpr.inline(closed).jaxpr.eqns
    bare = eqn.replace(source_info=_jaxpr.source_info_util.new_source_info())
    assert _jaxpr.source_line(bare) == ""


def test_a_plan_of_an_nnx_model_names_the_users_file():
    def loss(model, x):
        for _ in range(6):
            x = model(x)
        return (x**2).mean()

    x = jnp.ones((512, 16))
    plan = jt.nnx.plan(loss, Model(), x, budget_bytes=0.8, wrt="temp", max_compiles=3)
    lines = [row[-1] for row in plan.describe().rows]
    assert lines and all(line.startswith(f"{HERE}:") for line in lines)
    wanted = line_of(Model.__call__, "a product")
    assert plan.values and all(row[4].startswith("dot_general") for row in plan.values)
    assert all(row[-1].startswith(wanted) for row in plan.values)
    assert f" at {wanted}" in str(plan)
    assert "linear.py" not in str(plan) and "normalization.py" not in str(plan)
