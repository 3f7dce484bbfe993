"""Jaxprs: trace, walk, count. The one place that looks inside equations (amp and remat share it)."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

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
    """The jaxprs among the parameters of an equation (bodies of scan, cond, pjit, custom rules)."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


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
        (eqn.primitive.name, str(eqn.outvars[0].aval.dtype))
        for eqn in walk(closed.jaxpr)
        if eqn.outvars and hasattr(eqn.outvars[0].aval, "dtype")
    )
