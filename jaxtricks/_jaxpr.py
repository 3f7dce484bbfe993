"""Jaxprs: trace, walk, count. The one place that looks inside equations (amp and remat share it)."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

from jaxtricks import _compat

Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
Var = core.Var


def trace(fn: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Jaxpr of fn(*args) and the structure of its output.

    Tracers that fn closes over become `consts` of the result, whatever their type.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return closed, jax.tree.structure(shapes)


def as_fun(jaxpr: Jaxpr) -> Callable[..., list[Any]]:
    """fn(consts, *flat_args) -> flat outputs, evaluated in the caller's trace."""

    def run(consts: Any, *args: Any) -> list[Any]:
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)

    return run


def sub_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation, those of its derivative rules included."""
    for value in _compat.params(eqn).values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if _compat.is_jaxpr(item):
                yield _compat.closed(item).jaxpr


def walk(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation, inner ones after the one that holds them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from walk(inner)


def census(fn: Callable[..., Any], *args: Any) -> Counter[tuple[str, str]]:
    """How often each (primitive, dtype of its first output) occurs in the trace of fn(*args)."""
    closed, _ = trace(fn, *args)
    return Counter(
        (_compat.primitive(eqn), str(eqn.outvars[0].aval.dtype))
        for eqn in walk(closed.jaxpr)
        if eqn.outvars and hasattr(eqn.outvars[0].aval, "dtype")
    )


def is_literal(v: Any) -> bool:
    """Whether an operand is a constant written into the equation."""
    return isinstance(v, core.Literal)


def bind(eqn: Any, operands: Sequence[Any], **params: Any) -> list[Any]:
    """The results of an equation on other operands (of other dtypes, say), in the caller's trace.

    Args:
      eqn: the equation; its context (mesh, compute type) and its place in the source are kept.
      operands: one an operand; a literal's may be a NumPy scalar.
      params: parameters to replace.
    """
    if type(eqn.primitive).get_bind_params is core.Primitive.get_bind_params:
        # No bodies and no rules among its parameters: nothing has to be evaluated around it.
        with place_of(eqn), eqn.ctx.manager:
            results = eqn.primitive.bind(*operands, **{**eqn.params, **params})
        return list(results) if eqn.primitive.multiple_results else [results]
    literal = [
        is_literal(v) and not hasattr(x, "dtype") for v, x in zip(eqn.invars, operands, strict=True)
    ]
    invars = [v if kept else core.Var(v.aval) for v, kept in zip(eqn.invars, literal, strict=True)]
    eqn = eqn.replace(invars=invars, params={**eqn.params, **params})
    given = [v for v, kept in zip(invars, literal, strict=True) if not kept]
    one = made((), given, eqn.outvars, [eqn])
    values = [x for x, kept in zip(operands, literal, strict=True) if not kept]
    return core.jaxpr_as_fun(ClosedJaxpr(one, ()))(*values)


def made(consts: Sequence[Any], ins: Sequence[Any], outs: Sequence[Any], eqns: Any) -> Jaxpr:
    """A jaxpr of these variables and equations."""
    eqns = list(eqns)
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = _anonymous(len(consts) + len(ins), len(outs))
    is_high = any(_compat.is_high(eqn) or any(j.is_high for j in sub_jaxprs(eqn)) for eqn in eqns)
    return Jaxpr(tuple(consts), list(ins), list(outs), eqns, effects, names, is_high)


@functools.cache
def _anonymous(inputs: int, outputs: int) -> Any:
    """Names that the constructor of a jaxpr asks for; they appear nowhere."""
    info = jax.make_jaxpr(lambda: ())().jaxpr.debug_info
    return info._replace(arg_names=("",) * inputs, result_paths=("",) * outputs)


@contextlib.contextmanager
def place_of(eqn: Any) -> Iterator[Any]:
    """Under it, operations carry the equation's names and source line; yields the bare equation."""
    source = eqn.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    bare = source.replace(name_stack=source_info_util.new_name_stack())
    with source_info_util.user_context(source.traceback, name_stack=names):
        yield eqn.replace(source_info=bare)


def source_line(eqn: Any) -> str:
    """ "file.py:12:4 (function)" of an equation; "" where only libraries were at work."""
    return source_info_util.summarize(eqn.source_info).rpartition("/")[2]
