"""What differs between the jax versions we support: names, spellings, and where equations keep things."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import PartitionSpec as P
from jaxtricks import _compat, _jaxpr

from tests import flags

ROOT = pathlib.Path(__file__).parents[2]
X = np.linspace(-1.0, 1.0, 6, dtype=np.float32)


def with_jvp(op):
    fn = jax.custom_jvp(lambda x: op(x))
    fn.defjvp(lambda primals, tangents: (fn(*primals), tangents[0]))
    return fn


def with_vjp(op):
    fn = jax.custom_vjp(lambda x: op(x))
    fn.defvjp(lambda x: (fn(x), x), lambda x, ct: (ct * x,))
    return fn


def in_shard_map(op):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(lambda x: op(x), mesh=mesh, in_specs=P("data"), out_specs=P("data"))


def scanned(op):
    return lambda x: jax.lax.scan(lambda c, y: (c + op(y), op(y)), x[0], x)


def looped(op):
    return lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + op(x) ** 2, x)


def branched(op):
    return lambda x: jax.lax.cond(x.max() > 0.5, op, lambda x: op(2 * x), x)


# Primitive -> (a program around an operation, how many bodies its equation has).
PROGRAMS = {
    "jit": (lambda op: jax.jit(lambda x: op(x)), 1),
    "checkpoint": (lambda op: jax.checkpoint(lambda x: op(x)), 1),
    "custom_jvp_call": (with_jvp, 1),
    "custom_vjp_call": (with_vjp, 1),
    "shard_map": (in_shard_map, 1),
    "scan": (scanned, 1),
    "while": (looped, 2),
    "cond": (branched, 2),
    "name": (lambda op: lambda x: checkpoint_name(op(x), "a"), 0),
}
WITH_BODIES = [name for name, (_, count) in PROGRAMS.items() if count]
# What the opt-in rewrites of jax make of some of them.
HIGH = {
    "checkpoint": "jax_remat3",
    "name": "jax_remat3",
    "custom_jvp_call": "jax_custom_jvp3",
    "custom_vjp_call": "jax_custom_vjp3",
}


def equation(name, fn):
    closed, _ = _jaxpr.trace(fn, X)
    return next(eqn for eqn in closed.jaxpr.eqns if _compat.primitive(eqn) == name)


def program(name, op=jax.lax.sin):
    return PROGRAMS[name][0](op)


def with_equations(jaxpr, eqns):
    return _jaxpr.build(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, eqns)


def cosines(bodies):
    """The bodies with cos in place of sin."""
    swap = {"sin": jax.lax.cos_p}
    new = []
    for body in bodies:
        eqns = [
            eqn.replace(primitive=swap.get(eqn.primitive.name, eqn.primitive))
            for eqn in body.jaxpr.eqns
        ]
        new.append(core.ClosedJaxpr(with_equations(body.jaxpr, eqns), body.consts))
    return new


@pytest.mark.parametrize("name", WITH_BODIES)
def test_bodies_are_what_runs(name):
    eqn = equation(name, program(name))
    bodies = _compat.bodies(eqn)
    assert len(bodies) == PROGRAMS[name][1] and _compat.has_bodies(eqn)
    assert all(len(body.consts) == len(body.jaxpr.constvars) for body in bodies)
    inner = [eqn for body in bodies for eqn in _jaxpr.walk(body.jaxpr)]
    assert "sin" in map(_compat.primitive, inner)


@pytest.mark.parametrize("name", ["jit", "checkpoint", "scan", "while", "cond"])
def test_an_equation_runs_with_other_bodies(name):
    closed, structure = _jaxpr.trace(program(name), X)
    eqns = [
        eqn.replace(params=_compat.with_bodies(eqn, cosines(_compat.bodies(eqn))))
        if _compat.primitive(eqn) == name
        else eqn
        for eqn in closed.jaxpr.eqns
    ]
    changed = with_equations(closed.jaxpr, eqns)
    out = jax.tree.unflatten(structure, _jaxpr.as_fun(changed)(closed.consts, X))
    want = program(name, jax.lax.cos)(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, want)


@pytest.mark.parametrize("name", HIGH)
def test_opt_in_rewrites_are_spelled_alike(name):
    with flags.opted(HIGH[name]):
        eqn = equation(name, program(name))
        assert eqn.primitive.name == "call_hi_primitive"
        if name == "name":
            assert _compat.params(eqn)["name"] == "a"
        else:
            assert len(_compat.bodies(eqn)) == PROGRAMS[name][1]


@pytest.mark.parametrize("reverse", [False, True])
def test_parts_of_a_scan(reverse):
    w, b = jnp.ones(()), jnp.ones(6)

    def fn(x):
        step = lambda c, y: ((c[0] + w * y, 2 * c[1]), (jnp.sin(y), y + b))
        return jax.lax.scan(step, (b, b), jnp.stack([x, x]), reverse=reverse)

    parts = _compat.scan_parts(equation("scan", fn))
    assert (parts.carry, parts.length, parts.reverse) == (2, 2, reverse)
    eqn = equation("scan", fn)
    assert parts.consts + parts.carry + 1 == len(eqn.invars)


def test_a_scan_without_some_of_its_results():
    def fn(x):
        return jax.lax.scan(lambda c, y: (c + y, (jnp.sin(y), 2 * y)), jnp.zeros(()), x)

    eqn = equation("scan", fn)
    (body,) = _compat.bodies(eqn)
    used = [True, False, True]
    outs = [v for v, use in zip(body.jaxpr.outvars, used, strict=True) if use]
    slim = _jaxpr.build(body.jaxpr.constvars, body.jaxpr.invars, outs, body.jaxpr.eqns)
    new = _compat.scan_outputs(eqn, used, core.ClosedJaxpr(slim, body.consts))
    inputs = [v for v in new.invars if not _jaxpr.is_literal(v)]
    run = _jaxpr.build((), inputs, new.outvars, [new])
    total, doubled = _jaxpr.as_fun(run)((), *[jnp.zeros(())] * (len(inputs) - 1), jnp.asarray(X))
    np.testing.assert_allclose(doubled, 2 * X, rtol=1e-6)
    np.testing.assert_allclose(total, X.sum(), atol=1e-6)


def test_operands_of_a_while_loop():
    a, b = jnp.arange(6.0) + 8, jnp.arange(6.0)

    def fn(x):
        return jax.lax.while_loop(lambda c: c.sum() < a.sum(), lambda c: c + b * b + 1, x)

    eqn = equation("while", lambda x: fn(x))
    cond, body = _compat.while_consts(eqn)
    conditions, bodies = _compat.bodies(eqn)
    assert len(conditions.jaxpr.invars) == cond + 1 and len(bodies.jaxpr.invars) == body + 1


def test_what_shard_map_was_called_with():
    eqn = equation("shard_map", program("shard_map"))
    arguments = _compat.shard_map_arguments(eqn)
    assert arguments["axis_names"] == {"data"} and arguments["in_specs"] == (P("data"),)
    again = jax.shard_map(lambda x: (2 * x,), **(arguments | {"out_specs": (P("data"),)}))
    np.testing.assert_allclose(again(X)[0], 2 * X)


def test_an_unknown_layout_is_said_in_one_sentence():
    scan, loop, shard_map = (equation(n, program(n)) for n in ("scan", "while", "shard_map"))
    for eqn, read in (
        (scan, _compat.scan_parts),
        (scan, _compat.bodies),
        (loop, _compat.while_consts),
        (loop, _compat.bodies),
        (shard_map, _compat.shard_map_arguments),
    ):
        strange = eqn.replace(params={"something_new": 1})
        with pytest.raises(NotImplementedError) as said:
            read(strange)
        text = str(said.value)
        assert jax.__version__ in text and _compat.NEWEST_TESTED in text and "\n" not in text


def test_the_newest_version_tested_is_the_newest_pinned():
    pins = (ROOT / "constraints" / "newest.txt").read_text()
    assert f"\njax=={_compat.NEWEST_TESTED}\n" in pins
    stacks = [
        (ROOT / "constraints" / f"{name}.txt").read_text() for name in ("newest", "py311", "colab")
    ]
    assert any(f"\njax=={jax.__version__}\n" in text for text in stacks)


def test_nothing_else_looks_at_versions():
    private = re.compile(
        r"jax\._src|jax\.interpreters|__version__ *([<>]|==)|version_info|\"_prim\""
    )
    places = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jaxtricks").rglob("*.py")
        if private.search(path.read_text())
    ]
    assert places == ["jaxtricks/_compat.py"]


# The modules that look inside equations; the others ask `_jaxpr`.
READERS = ("_compat.py", "_jaxpr.py", "_flops.py")
# What other modules may use of `_compat`: nothing about equations.
OF_COMPAT = {"enable_x64", "varying", "weakly_typed", "distributed_state"}
OF_COMPAT |= {"has_host_memory", "in_host_memory", "in_device_memory"}
OF_COMPAT |= {"new_primitive", "is_zero", "zero_tangent", "is_linear", "transposed"}


def names_of(node):
    """The dotted names that a node of a syntax tree imports or reads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [ast.unparse(node)] if isinstance(node, ast.Attribute) else []


def looks_inside(source):
    """Lines of a module that read an equation's parts, or that import what does."""
    for node in ast.walk(ast.parse(source)):
        for name in names_of(node):
            owner, _, attribute = name.rpartition(".")
            of_equation = attribute in ("params", "primitive") and owner.endswith("eqn")
            of_jaxpr = owner.endswith("_jaxpr") and attribute == "params"
            of_compat = owner in ("_compat", "jaxtricks._compat") and attribute not in OF_COMPAT
            if of_equation or of_jaxpr or of_compat or name.startswith("jax.extend.core"):
                yield f"{node.lineno}: {name}"


def test_nothing_else_looks_inside_equations():
    package = ROOT / "jaxtricks"
    places = {}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        source = path.read_text()
        if name.startswith("nnx/"):  # its `_compat` is about Flax
            source = re.sub(r"\b_compat\.", "nnx_compat.", source)
        if name not in READERS:
            places[name] = list(looks_inside(source))
    assert {name: lines for name, lines in places.items() if lines} == {}


def test_looks_inside_sees_every_way():
    ways = (
        "from jax.extend.core import Var",
        "from jax.extend import core",
        "import jax.extend.core",
        "eqn.params['name']",
        "self.eqn.primitive.name",
        "_compat.bodies(eqn)",
        "_jaxpr.params(eqn)",
        "from jaxtricks._compat import primitive",
    )
    for way in ways:
        assert list(looks_inside(way)), way
    for fine in ("_compat.varying(x)", "_jaxpr.primitive(eqn)", "model.params", "jax.extend.x"):
        assert not list(looks_inside(fine)), fine


def test_float64_exists_only_inside():
    with _compat.enable_x64():
        assert jnp.ones(1, jnp.float64).dtype == jnp.float64
    assert jnp.asarray([1.0]).dtype == jnp.float32
