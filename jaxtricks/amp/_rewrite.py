"""The rewritten computation: every equation bound on operands of the dtypes that `states` decided."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jaxtricks import _compat, _jaxpr
from jaxtricks.amp import custom_rules
from jaxtricks.amp import rules as table
from jaxtricks.amp._precision_analysis import (
    FULL,
    LOW,
    Analysis,
    Analyzer,
    Decision,
    State,
    is_full,
)

_FULL = np.dtype(np.float32)


class Emitter:
    """Binds analysed jaxprs in the caller's trace; inner jaxprs are rewritten once each.

    Args:
      analyzer: what decided; derivatives of custom rules are analysed when they are traced.
    """

    def __init__(self, analyzer: Analyzer):
        self.analyzer, self.low = analyzer, analyzer.low
        self._closed: dict[Any, Any] = {}

    def run(self, analysis: Analysis, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The results, in the states of `analysis.outs`.

        Args:
          analysis: what becomes of the jaxpr.
          consts: of the jaxpr.
          args: inputs, in the states of `analysis.ins`.
        """
        jaxpr = analysis.jaxpr
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        # A shared raise keeps the cotangents of its uses in float32 until they are added. Lowered
        # values are not kept: each use rounds anew (XLA merges the casts), and the cotangents of a
        # weight's uses add in float32.
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

    def _eqn(self, eqn: Any, decision: Decision, read: Callable[[Any, State], Any]) -> list[Any]:
        if decision.bodies and decision.rebuilt:
            return self._with_bodies(eqn, decision, read)
        if (
            _compat.primitive(eqn) == table.CONVERT
            and decision.run is None
            and is_full(eqn.invars[0])
        ):
            return [read(eqn.invars[0], None)]  # to float32 again, or to low and already there
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

        XLA may drop a rounding that float32 follows, on one side only: then the largest value of an array
        would equal none of its elements.
        """
        bits = jnp.finfo(self.low)
        x = self.cast(x, FULL)
        return lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

    def _with_bodies(self, eqn: Any, decision: Decision, read: Callable[..., Any]) -> list[Any]:
        name, bodies = _compat.primitive(eqn), decision.bodies
        operands = [read(v, s) for v, s in zip(eqn.invars, _expected(eqn, bodies), strict=True)]
        if name in custom_rules.HANDLERS:
            return custom_rules.HANDLERS[name](self, eqn, bodies[0], operands)
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
    run = jax.checkpoint(jaxpr_as_fun(body), policy=params["policy"], prevent_cse=prevent_cse)
    return run(*operands)


def _expected(eqn: Any, bodies: Sequence[Analysis]) -> list[State]:
    """The states in which the bodies of an equation expect its operands."""
    first = bodies[0].ins
    if _compat.primitive(eqn) == "cond":
        return [None, *first]
    if _compat.primitive(eqn) == "while":
        return [*first[: _compat.while_consts(eqn)[0]], *bodies[1].ins]
    return list(first)
