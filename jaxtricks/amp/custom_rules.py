"""Functions with their own derivatives: the user's rule is traced, analysed and rewritten like the rest.

The rewritten function is built with `jax.custom_jvp` and `jax.custom_vjp`. Its rule differentiates the
original equation, in its original dtypes, and rewrites the trace of that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _compat, _jaxpr
from jaxtricks.amp._precision_analysis import FREE, LOW, Analysis, State


def custom_jvp(emitter: Any, eqn: Any, body: Analysis, operands: Sequence[Any]) -> list[Any]:
    """The results of a rewritten `custom_jvp_call`."""
    (consts,) = (closed.consts for closed in _compat.bodies(eqn))
    moved = _movable(eqn.outvars)

    def run(*args: Any) -> list[Any]:
        return emitter.run(body, consts, args)

    run.__name__ = _compat.params(eqn).get("name", run.__name__)
    function = jax.custom_jvp(run)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        varied = [t.dtype != jax.dtypes.float0 for t in tangents]

        def derivative(primals: Any, tangents: Any) -> Any:
            fn = _of_some(eqn, primals, varied)
            outs, rates = jax.jvp(fn, tuple(_some(primals, varied)), tuple(tangents))
            return [*outs, *_some(rates, moved)]

        avals = [v.aval for v in eqn.invars]
        ins = [*body.ins, *_some(body.ins, varied)]
        outs = [*body.outs, *_some(body.outs, moved)]
        args = [*primals, *_some(tangents, varied)]
        n = len(avals)
        flat = lambda *xs: derivative(xs[:n], xs[n:])  # noqa: E731
        results = _rewritten(emitter, flat, [*avals, *_some(avals, varied)], ins, outs, args)
        primal, rates = results[: len(moved)], results[len(moved) :]
        return primal, _filled(rates, primal, moved)

    return function(*operands)


def custom_vjp(emitter: Any, eqn: Any, body: Analysis, operands: Sequence[Any]) -> list[Any]:
    """The results of a rewritten `custom_vjp_call`."""
    (consts,) = (closed.consts for closed in _compat.bodies(eqn))
    varied, moved = _movable(eqn.invars), _movable(eqn.outvars)
    residuals = _Residuals()

    @jax.custom_vjp
    def function(*args: Any) -> list[Any]:
        return emitter.run(body, consts, args)

    def forward(*args: Any) -> Any:
        def original(*args: Any) -> Any:
            outs, pull = jax.vjp(_of_some(eqn, args, varied), *_some(args, varied))
            return [*outs, *residuals.flatten(pull)]

        avals = [v.aval for v in eqn.invars]
        results = _rewritten(emitter, original, avals, body.ins, [*body.outs, ...], args)
        n = len(moved)
        residuals.low = [
            x.dtype != aval.dtype for x, aval in zip(results[n:], residuals.avals, strict=True)
        ]
        return results[:n], results[n:]

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        n = len(saved)

        def original(*args: Any) -> Any:
            full = _filled(args[n:], [v.aval for v in eqn.outvars], moved)
            return residuals.unflatten(args[:n])(full)

        avals = [*residuals.avals, *_some([v.aval for v in eqn.outvars], moved)]
        states = [
            (LOW if low else FREE) if aval.dtype == np.float32 else None
            for aval, low in zip(residuals.avals, residuals.low, strict=True)
        ]
        args = [*saved, *_some(cotangents, moved)]
        ins = [*states, *_some(body.outs, moved)]
        outs = _some(body.ins, varied)
        results = _rewritten(emitter, original, avals, ins, outs, args)
        return tuple(_filled(results, [v.aval for v in eqn.invars], varied))

    function.defvjp(forward, backward)
    return function(*operands)


HANDLERS = {"custom_jvp_call": custom_jvp, "custom_vjp_call": custom_vjp}


class _Residuals:
    """What the forward rule leaves for the backward one, beside the arrays."""

    structure: Any = None
    avals: Any = None
    low: Any = None

    def flatten(self, pull: Any) -> list[Any]:
        leaves, self.structure = jax.tree.flatten(pull)
        self.avals = [jax.typeof(x) for x in leaves]
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, leaves)


def _rewritten(
    emitter: Any,
    fn: Callable[..., Any],
    avals: Sequence[Any],
    ins: Sequence[State],
    outs: Sequence[Any],
    args: Sequence[Any],
) -> list[Any]:
    """The results of fn's rewritten trace; `...` at the end of outs: the rest leave as they come."""
    closed = jax.make_jaxpr(fn)(*avals)
    analysis = emitter.analyzer.analyse(closed.jaxpr, ins, [False] * len(closed.jaxpr.outvars))
    if outs and outs[-1] is ...:
        outs = [*outs[:-1], *analysis.outs[len(outs) - 1 :]]
    return emitter.run(analysis.leaving(outs), closed.consts, args)


def _of_some(eqn: Any, args: Sequence[Any], varied: Sequence[bool]) -> Callable[..., list[Any]]:
    """The original equation as a function of some of its operands."""

    def fn(*some: Any) -> list[Any]:
        given = iter(some)
        return _jaxpr.bind(
            eqn,
            [next(given) if is_varied else x for x, is_varied in zip(args, varied, strict=True)],
        )

    return fn


def _movable(variables: Sequence[Any]) -> list[bool]:
    """Which of them have tangents: floating and complex ones."""
    return [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in variables]


def _some(xs: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [x for x, is_chosen in zip(xs, chosen, strict=True) if is_chosen]


def _filled(some: Sequence[Any], like: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """All of them, with the zeros that JAX expects where there is no tangent."""
    given = iter(some)
    zeros = jax.dtypes.float0
    pairs = zip(like, chosen, strict=True)
    return [next(given) if is_chosen else np.zeros(x.shape, zeros) for x, is_chosen in pairs]
