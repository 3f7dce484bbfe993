"""Functions with their own derivatives: the user's rule is traced, analysed and rewritten like the rest.

The rewritten function is built with `jax.custom_jvp` and `jax.custom_vjp`. Its rule
differentiates the original equation, in its original dtypes, and rewrites the trace of
that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jaxtricks import _compat, _jaxpr
from jaxtricks.amp import _precision_analysis as table
from jaxtricks.amp._precision_analysis import (
    FREE,
    FULL,
    LOW,
    Analysis,
    Analyzer,
    Decision,
    State,
    is_full,
)


def custom_jvp(
    emitter: Any, eqn: Any, body: Analysis, operands: Sequence[Any]
) -> list[Any]:
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
        results = _rewritten(
            emitter, flat, [*avals, *_some(avals, varied)], ins, outs, args
        )
        primal, rates = results[: len(moved)], results[len(moved) :]
        return primal, _filled(rates, primal, moved)

    return function(*operands)


def custom_vjp(
    emitter: Any, eqn: Any, body: Analysis, operands: Sequence[Any]
) -> list[Any]:
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
        results = _rewritten(
            emitter, original, avals, body.ins, [*body.outs, ...], args
        )
        n = len(moved)
        residuals.low = [
            x.dtype != aval.dtype
            for x, aval in zip(results[n:], residuals.avals, strict=True)
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
    analysis = emitter.analyzer.analyse(
        closed.jaxpr, ins, [False] * len(closed.jaxpr.outvars)
    )
    if outs and outs[-1] is ...:
        outs = [*outs[:-1], *analysis.outs[len(outs) - 1 :]]
    return emitter.run(analysis.leaving(outs), closed.consts, args)


def _of_some(
    eqn: Any, args: Sequence[Any], varied: Sequence[bool]
) -> Callable[..., list[Any]]:
    """The original equation as a function of some of its operands."""

    def fn(*some: Any) -> list[Any]:
        given = iter(some)
        return _jaxpr.bind(
            eqn,
            [
                next(given) if is_varied else x
                for x, is_varied in zip(args, varied, strict=True)
            ],
        )

    return fn


def _movable(variables: Sequence[Any]) -> list[bool]:
    """Which of them have tangents: floating and complex ones."""
    return [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in variables]


def _some(xs: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [x for x, is_chosen in zip(xs, chosen, strict=True) if is_chosen]


def _filled(
    some: Sequence[Any], like: Sequence[Any], chosen: Sequence[bool]
) -> list[Any]:
    """All of them, with the zeros that JAX expects where there is no tangent."""
    given = iter(some)
    zeros = jax.dtypes.float0
    pairs = zip(like, chosen, strict=True)
    return [
        next(given) if is_chosen else np.zeros(x.shape, zeros) for x, is_chosen in pairs
    ]


# The rewritten computation: every equation bound on operands of the dtypes that
# `states` decided.


_FULL = np.dtype(np.float32)


class Emitter:
    """Binds analysed jaxprs in the caller's trace; inner jaxprs are rewritten once each.

    Args:
      analyzer: what decided; derivatives of custom rules are analysed when they are
        traced.
    """

    def __init__(self, analyzer: Analyzer):
        self.analyzer, self.low = analyzer, analyzer.low
        self._closed: dict[Any, Any] = {}

    def run(
        self, analysis: Analysis, consts: Sequence[Any], args: Sequence[Any]
    ) -> list[Any]:
        """The results, in the states of `analysis.outs`.

        Args:
          analysis: what becomes of the jaxpr.
          consts: of the jaxpr.
          args: inputs, in the states of `analysis.ins`.
        """
        jaxpr = analysis.jaxpr
        values = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True)
        )
        # A shared raise keeps the cotangents of its uses in float32 until they are
        # added. Lowered values are not kept: each use rounds anew (XLA merges the
        # casts), and the cotangents of a weight's uses add in float32.
        raised: dict[Any, Any] = {}
        compared = {
            v
            for eqn, decision in zip(jaxpr.eqns, analysis.decisions, strict=True)
            if _compares(eqn, decision)
            for v in eqn.invars
            if not _jaxpr.is_literal(v)
        }

        def read(v: Any, state: State) -> Any:
            if _jaxpr.is_literal(v):
                return np.asarray(v.val, self._dtype(state)) if is_full(v) else v.val
            x = values[v]
            if not is_full(v) or state is None:
                return x
            if state == LOW or x.dtype == _FULL:
                return self.cast(x, state)
            if v not in raised:
                raised[v] = self._rounded(x) if v in compared else self.cast(x, FULL)
            return raised[v]

        for eqn, decision in zip(jaxpr.eqns, analysis.decisions, strict=True):
            with _jaxpr.place_of(eqn) as bare:
                results = self._eqn(bare, decision, read)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v, s) for v, s in zip(jaxpr.outvars, analysis.outs, strict=True)]

    def cast(self, x: Any, state: State) -> Any:
        """A float32 or low value, brought to a state."""
        dtype = self._dtype(state)
        return x if x.dtype == dtype else lax.convert_element_type(x, dtype)

    def closed(self, analysis: Analysis, consts: Sequence[Any] = ()) -> Any:
        """The rewritten jaxpr, closed."""
        key = analysis.jaxpr, analysis.ins, analysis.decisions, analysis.outs
        if key not in self._closed:
            avals = [
                v.aval.update(dtype=self.low) if s == LOW else v.aval
                for v, s in zip(analysis.jaxpr.invars, analysis.ins, strict=True)
            ]
            run = lambda *args: self.run(analysis, consts, args)  # noqa: E731
            self._closed[key] = jax.make_jaxpr(run)(*avals)
        return self._closed[key]

    def _dtype(self, state: State) -> np.dtype:
        return self.low if state == LOW else _FULL

    def _eqn(
        self, eqn: Any, decision: Decision, read: Callable[[Any, State], Any]
    ) -> list[Any]:
        if decision.bodies and decision.rebuilt:
            return self._with_bodies(eqn, decision, read)
        if (
            _compat.primitive(eqn) == table.CONVERT
            and decision.run is None
            and is_full(eqn.invars[0])
        ):
            return [
                read(eqn.invars[0], None)
            ]  # to float32 again, or to low and already there
        if decision.kind == table.FOLLOW and decision.run == LOW:
            operands = [self._spread(eqn, v, read) for v in eqn.invars]
        elif _compares(eqn, decision):
            operands = [read(v, FULL) for v in eqn.invars]
        else:
            operands = [read(v, decision.run) for v in eqn.invars]
        if _compat.primitive(eqn) == "broadcast_in_dim" and decision.run == LOW:
            # It only adds axes of size 1; as a reshape its derivative is no sum.
            return [lax.reshape(operands[0], eqn.outvars[0].aval.shape)]
        is_low = decision.kind == table.MATMUL and decision.run == LOW
        params = {"preferred_element_type": self.low} if is_low else {}
        results = _jaxpr.bind(eqn, operands, **params)
        states = zip(results, decision.outs, strict=True)
        return [x if s is None else self.cast(x, s) for x, s in states]

    def _spread(self, eqn: Any, v: Any, read: Callable[[Any, State], Any]) -> Any:
        """A low operand; what the operation would broadcast is broadcast before it is rounded.

        The derivative then sums in float32. A literal has none.
        """
        shape = eqn.outvars[0].aval.shape
        if _jaxpr.is_literal(v) or not is_full(v) or v.aval.shape == shape:
            return read(v, LOW)
        axes = range(len(shape) - v.aval.ndim, len(shape))
        return self.cast(lax.broadcast_in_dim(read(v, FULL), shape, tuple(axes)), LOW)

    def _rounded(self, x: Any) -> Any:
        """A low value in float32, where something compares it.

        XLA may drop a rounding that float32 follows, on one side only: then the largest
        value of an array would equal none of its elements.
        """
        bits = jnp.finfo(self.low)
        x = self.cast(x, FULL)
        return lax.reduce_precision(
            x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant
        )

    def _with_bodies(
        self, eqn: Any, decision: Decision, read: Callable[..., Any]
    ) -> list[Any]:
        name, bodies = _compat.primitive(eqn), decision.bodies
        operands = [
            read(v, s) for v, s in zip(eqn.invars, _expected(eqn, bodies), strict=True)
        ]
        if name in HANDLERS:
            return HANDLERS[name](self, eqn, bodies[0], operands)
        if name == "shard_map":
            return self._shard_map(eqn, bodies[0], operands)
        pairs = zip(bodies, _compat.bodies(eqn), strict=True)
        new = [self.closed(body, old.consts) for body, old in pairs]
        if _compat.is_high(eqn):
            return _checkpoint(eqn, new[0], operands)
        return _jaxpr.bind(eqn, operands, **_compat.with_bodies(eqn, new))

    def _shard_map(self, eqn: Any, body: Analysis, operands: list[Any]) -> list[Any]:
        # Its body can be traced only inside it, where its axes are bound.
        run = lambda *args: self.run(body, (), args)  # noqa: E731
        return jax.shard_map(run, **_compat.shard_map_arguments(eqn))(*operands)


def _compares(eqn: Any, decision: Decision) -> bool:
    """Whether it compares its operands, or its derivative will."""
    chooses = decision.run == FULL and _compat.primitive(eqn) in table.CHOICES
    return chooses or decision.kind == table.EXACT


def _checkpoint(eqn: Any, body: Any, operands: Sequence[Any]) -> list[Any]:
    """A checkpoint of jax_remat3, made anew: the equation's own object has the dtypes of the old body."""
    params = _compat.params(eqn)
    prevent_cse = params.get("prevent_cse", True)  # jax 0.10.2 does not write it down
    run = jax.checkpoint(
        jaxpr_as_fun(body), policy=params["policy"], prevent_cse=prevent_cse
    )
    return run(*operands)


def _expected(eqn: Any, bodies: Sequence[Analysis]) -> list[State]:
    """The states in which the bodies of an equation expect its operands."""
    first = bodies[0].ins
    if _compat.primitive(eqn) == "cond":
        return [None, *first]
    if _compat.primitive(eqn) == "while":
        return [*first[: _compat.while_consts(eqn)[0]], *bodies[1].ins]
    return list(first)
