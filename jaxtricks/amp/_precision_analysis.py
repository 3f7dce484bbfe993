"""Decide in which dtype autocast runs each operation, by dataflow; nothing is computed.

`Analyzer` follows every float32 value through a jaxpr and decides by the classes of
`_precision_table`; `_rewrite` carries the decisions out.

Forward, every float32 value gets a state: FREE (float32, untouched by a sensitive
operation: it may be rounded where it meets a low value), LOW (in the compute dtype)
or FULL (float32, downstream of a sensitive operation: it draws a low partner up).
Joining is the maximum. Backward, a value is demanded in float32 if all its consumers
need that: then the operation that computes it runs in float32 rather than round just
before.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtricks import _jaxpr
from jaxtricks.amp._precision_table import (
    CONVERT,
    DENY,
    EXACT,
    FOLLOW,
    LAYOUT,
    LOCAL,
    MATMUL,
    OPAQUE,
    ROUNDED,
    WIDE,
    classify,
)

FREE, LOW, FULL = 0, 1, 2
State = int | None  # None: no float32 value, untouched
States = tuple[State, ...]
BODY = "body"
FULL_PRECISION = "amp_full_precision"
"""Name of the jitted call that `full_precision` makes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """How one equation runs.

    Attributes:
      kind: its class in `_precision_table.TABLE`, or "body".
      why: the reason for an exception; "" if none.
      run: LOW or FULL: what its float32 operands are brought to; None leaves operands
        alone.
      outs: states of its results.
      bodies: the analyses of its inner jaxprs.
      rebuilt: whether those are rewritten; else the equation stays as it is.
    """

    kind: str
    why: str
    run: State
    outs: States
    bodies: tuple["Analysis", ...] = ()
    rebuilt: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A jaxpr and how each of its equations runs.

    Attributes:
      jaxpr: the jaxpr.
      ins: states of its inputs.
      decisions: one per equation.
      outs: the states that its results leave in.
      changed: whether anything becomes low.
    """

    jaxpr: _jaxpr.Jaxpr
    ins: States
    decisions: tuple[Decision, ...]
    outs: States
    changed: bool

    def leaving(self, outs: Sequence[State]) -> "Analysis":
        """Return the same with its results brought to other states."""
        changed = self.changed or LOW in outs
        return dataclasses.replace(self, outs=tuple(outs), changed=changed)


def is_full(v: Any) -> bool:
    """Return whether a variable is float32: the only dtype that autocast moves."""
    return getattr(v.aval, "dtype", None) == np.float32


class Analyzer:
    """The analysis of one traced function, with its settings.

    Args:
      low: the compute dtype.
      rules: the caller's rows of the table.
      scan_carry: "keep" holds float32 carries of a scan in float32. The others lower
        those that come out low and feed, for "layers", a product with a slice of what
        is scanned; for "auto", any product or sensitive operation.
    """

    def __init__(
        self,
        low: np.dtype,
        rules: Mapping[str, str],
        scan_carry: str,
    ):
        self.low = low
        self.rules = rules
        self.scan_carry = scan_carry
        # Inner jaxprs are shared: each is analysed once per states of its inputs.
        self._demands: dict[Any, dict[Any, bool]] = {}
        self._analyses: dict[Any, Analysis] = {}

    def analyse(
        self,
        jaxpr: _jaxpr.Jaxpr,
        ins: Sequence[State],
        demanded: Sequence[bool],
    ) -> Analysis:
        """Return the states of every value.

        Args:
          jaxpr: an open jaxpr.
          ins: states of its inputs.
          demanded: for each result, whether its consumers need it in float32.
        """
        key = jaxpr, tuple(ins), tuple(demanded)
        if key not in self._analyses:
            self._analyses[key] = self._analyse(*key)
        return self._analyses[key]

    def _analyse(
        self,
        jaxpr: _jaxpr.Jaxpr,
        ins: States,
        demanded: tuple[bool, ...],
    ) -> Analysis:
        demand = self._demand(jaxpr, demanded)
        states = {v: held(v, FREE) for v in jaxpr.constvars}
        states |= dict(zip(jaxpr.invars, ins, strict=True))

        def state(v: Any) -> State:
            return held(v, FREE) if _jaxpr.is_literal(v) else states[v]

        decisions = []
        for eqn in jaxpr.eqns:
            decision = self._decide(eqn, tuple(map(state, eqn.invars)), demand)
            states.update(zip(eqn.outvars, decision.outs, strict=True))
            decisions.append(decision)
        changed = LOW in ins or any(
            LOW in d.outs or (d.bodies and d.rebuilt) for d in decisions
        )
        outs = tuple(map(state, jaxpr.outvars))
        return Analysis(jaxpr, ins, tuple(decisions), outs, changed)

    def _decide(
        self,
        eqn: Any,
        ins: States,
        demand: Mapping[Any, bool],
    ) -> Decision:
        name = _jaxpr.primitive(eqn)
        demanded = _demanded(eqn, demand)
        if name == CONVERT:
            return self._convert(eqn, ins[0])
        if _jaxpr.function_name(eqn) == FULL_PRECISION:
            return Decision(FULL_PRECISION, "", FULL, _all(eqn, FULL))
        if name in _jaxpr.CALLS:
            return self._call(eqn, ins, demanded)
        if name == "scan":
            return self._scan(eqn, ins)
        if name == "while":
            return self._while(eqn, ins)
        if name == "cond":
            return self._cond(eqn, ins, demanded)
        return self._simple(eqn, ins, demanded)

    def _simple(
        self,
        eqn: Any,
        ins: States,
        demanded: Sequence[bool],
    ) -> Decision:
        operands = [s for s in ins if s is not None]
        if not operands and not any(map(is_full, eqn.outvars)):
            return Decision(EXACT, "", None, _all(eqn, None))
        kind, why = classify(eqn, self.low, self.rules)
        if not operands:
            # Computed from what is not float32: from wider or narrower floats on
            # purpose, so it stays; from integers or nothing, it may be rounded.
            on_purpose = kind == OPAQUE or any(map(_is_inexact, eqn.invars))
            outs = _all(eqn, FULL if on_purpose else FREE)
            return Decision(kind, why, None, outs)
        results = zip(eqn.outvars, demanded, strict=True)
        full = [is_demanded for v, is_demanded in results if is_full(v)]
        run, out = _RUN[kind](max(operands), bool(full) and all(full))
        return Decision(kind, why, run, _all(eqn, out))

    def _convert(
        self,
        eqn: Any,
        state: State,
    ) -> Decision:
        (source,), (result,) = eqn.invars, eqn.outvars
        if is_full(source) and is_full(result):
            return Decision(CONVERT, "", None, (state,))
        if is_full(source):
            is_rounded = state == LOW and result.aval.dtype == self.low
            return Decision(CONVERT, "", None if is_rounded else FULL, (None,))
        # A low value that the user raised is meant to be in float32.
        out = FULL if _is_inexact(source) else FREE
        return Decision(CONVERT, "", None, _all(eqn, out))

    def _call(
        self,
        eqn: Any,
        ins: States,
        demanded: Sequence[bool],
    ) -> Decision:
        (jaxpr,) = _open_bodies(eqn)
        body = self.analyse(jaxpr, ins, demanded)
        # The backward rule may hold products where the function has none.
        rebuilt = body.changed or _jaxpr.primitive(eqn) == "custom_vjp_call"
        return Decision(BODY, "", None, body.outs, (body,), rebuilt)

    def _scan(
        self,
        eqn: Any,
        ins: States,
    ) -> Decision:
        (jaxpr,) = _open_bodies(eqn)
        parts = _jaxpr.scan_parts(eqn)
        first, last = parts.consts, parts.consts + parts.carry
        carries = jaxpr.invars[first:last]
        may_lower = [
            self._may_lower(jaxpr, v, s, jaxpr.invars[last:])
            for v, s in zip(carries, ins[first:last], strict=True)
        ]
        stacked = [False] * (len(jaxpr.outvars) - len(carries))
        # A carry stays low only if it comes out of the body low; lowering fewer may
        # raise others, so repeat until none changes.
        while True:
            carry = [
                held(v, LOW if is_low else FULL)
                for v, is_low in zip(carries, may_lower, strict=True)
            ]
            demanded = [s == FULL for s in carry] + stacked
            body = self.analyse(
                jaxpr, (*ins[:first], *carry, *ins[last:]), demanded
            )
            leaving = body.outs[: len(carry)]
            still_low = [
                is_low and s != FULL
                for is_low, s in zip(may_lower, leaving, strict=True)
            ]
            if still_low == may_lower:
                break
            may_lower = still_low
        body = body.leaving((*carry, *body.outs[len(carry) :]))
        return Decision(BODY, "", None, body.outs, (body,))

    def _may_lower(
        self,
        jaxpr: _jaxpr.Jaxpr,
        carry: Any,
        state: State,
        slices: Sequence[Any],
    ) -> bool:
        if self.scan_carry == "keep" or not is_full(carry) or state == FULL:
            return False
        if self.scan_carry == "layers":
            return _meets_layers(jaxpr, {carry}, set(slices))
        return self._feeds_compute(jaxpr, carry)

    def _feeds_compute(
        self,
        jaxpr: _jaxpr.Jaxpr,
        carry: Any,
    ) -> bool:
        """Return whether a product or a sensitive operation reads the carry.

        An accumulator is only added to.
        """
        reached = {carry}
        for eqn in jaxpr.eqns:
            operands = [v for v in eqn.invars if not _jaxpr.is_literal(v)]
            if not any(v in reached for v in operands):
                continue
            if _jaxpr.has_bodies(eqn):
                return True
            if classify(eqn, self.low, self.rules)[0] in (MATMUL, DENY):
                return True
            reached.update(eqn.outvars)
        return False

    def _while(
        self,
        eqn: Any,
        ins: States,
    ) -> Decision:
        cond, body = _open_bodies(eqn)
        cond_consts, body_consts = _jaxpr.while_consts(eqn)
        first = cond_consts + body_consts
        carry = tuple(None if s is None else FULL for s in ins[first:])
        cond_ins = (*ins[:cond_consts], *carry)
        body_ins = (*ins[cond_consts:first], *carry)
        demanded = [s == FULL for s in carry]
        condition = self.analyse(cond, cond_ins, (False,))
        loop = self.analyse(body, body_ins, demanded).leaving(carry)
        return Decision(BODY, "", None, carry, (condition, loop))

    def _cond(
        self,
        eqn: Any,
        ins: States,
        demanded: Sequence[bool],
    ) -> Decision:
        branches = [
            self.analyse(jaxpr, ins[1:], demanded)
            for jaxpr in _open_bodies(eqn)
        ]
        outs = tuple(
            None if states[0] is None else max(states)
            for states in zip(
                *(branch.outs for branch in branches), strict=True
            )
        )
        rewritten = tuple(branch.leaving(outs) for branch in branches)
        return Decision(BODY, "", None, outs, rewritten)

    def _demand(
        self,
        jaxpr: _jaxpr.Jaxpr,
        demanded: tuple[bool, ...],
    ) -> dict[Any, bool]:
        """Return {variable: whether every consumer needs it in float32}.

        Variables without a consumer are absent.
        """
        key = jaxpr, demanded
        if key in self._demands:
            return self._demands[key]
        demand: dict[Any, bool] = {}

        def consume(v: Any, needs_full: bool) -> None:
            if not _jaxpr.is_literal(v) and is_full(v):
                demand[v] = demand.get(v, True) and needs_full

        for v, needs_full in zip(jaxpr.outvars, demanded, strict=True):
            consume(v, needs_full)
        for eqn in reversed(jaxpr.eqns):
            operands = self._demand_of(eqn, demand)
            if operands is not None:
                for v, needs_full in zip(eqn.invars, operands, strict=True):
                    consume(v, needs_full)
        self._demands[key] = demand
        return demand

    def _demand_of(
        self,
        eqn: Any,
        demand: Mapping[Any, bool],
    ) -> list[bool] | None:
        """Return which operands it needs in float32; None if it is indifferent."""
        demanded = _demanded(eqn, demand)
        n = len(eqn.invars)
        name = _jaxpr.primitive(eqn)
        if name == CONVERT or _jaxpr.function_name(eqn) == FULL_PRECISION:
            return [True] * n
        if name in _jaxpr.CALLS:
            (body,) = _open_bodies(eqn)
            inner = self._demand(body, demanded)
            return [inner.get(v, True) for v in body.invars]
        if _jaxpr.has_bodies(eqn):
            return [False] * n
        kind, _ = classify(eqn, self.low, self.rules)
        if kind == EXACT:
            return None
        if kind in (FOLLOW, LAYOUT, WIDE):
            results = zip(eqn.outvars, demanded, strict=True)
            full = [is_demanded for v, is_demanded in results if is_full(v)]
            return [all(full)] * n if full else None
        return [kind != MATMUL] * n


def _meets_layers(
    jaxpr: _jaxpr.Jaxpr, carried: set[Any], sliced: set[Any]
) -> bool:
    """Return whether a product multiplies a carry with the slice of a stack of kernels.

    Then the carry is what layers pass on. The state of a recurrent network meets the
    same kernel in every round, and an accumulator none: over many rounds, both would
    lose what is small beside them. Queries that meet such a state have batch axes, or
    only the axis that is summed.

    Args:
      jaxpr: the body.
      carried: the carry, to which is added what is computed from it.
      sliced: slices of what is scanned, likewise.
    """
    for eqn in jaxpr.eqns:
        operands = _jaxpr.variables_of(eqn.invars)
        name = _jaxpr.primitive(eqn)
        if name in ROUNDED:
            for i in range(2):
                kernel, other = eqn.invars[i], eqn.invars[1 - i]
                meets = _is_in(kernel, sliced) and _is_in(other, carried)
                if meets and _is_kernel(eqn, i):
                    return True
        if name in _jaxpr.CALLS:
            (body,) = _open_bodies(eqn)
            pairs = list(zip(body.invars, eqn.invars, strict=True))
            inner = [
                {inside for inside, v in pairs if _is_in(v, outer)}
                for outer in (carried, sliced)
            ]
            if _meets_layers(body, *inner):
                return True
        if any(v in carried for v in operands):
            carried.update(eqn.outvars)
        elif any(v in sliced for v in operands):
            sliced.update(eqn.outvars)
    return False


def _is_kernel(eqn: Any, which: int) -> bool:
    """Return whether an operand of a product has axes like a kernel: in, out, no batch."""
    if _jaxpr.primitive(eqn) != "dot_general":
        return True
    contracting, batch = _jaxpr.dimension_numbers(eqn)
    rank = eqn.invars[which].aval.ndim
    return not batch[0] and rank > len(contracting[which])


def _is_in(v: Any, variables: set[Any]) -> bool:
    return not _jaxpr.is_literal(v) and v in variables


def _open_bodies(eqn: Any) -> list[_jaxpr.Jaxpr]:
    """Return the jaxprs that run with an equation, without those of its rules."""
    return [body.jaxpr for body in _jaxpr.bodies(eqn)]


def held(v: Any, state: State) -> State:
    """Return the state, for a float32 variable or literal; None for the others."""
    return state if is_full(v) else None


def _all(eqn: Any, state: State) -> States:
    return tuple(held(v, state) for v in eqn.outvars)


def _demanded(
    eqn: Any,
    demand: Mapping[Any, bool],
) -> tuple[bool, ...]:
    """Return whether each result is needed in float32; one that is not read may be."""
    return tuple(is_full(v) and demand.get(v, True) for v in eqn.outvars)


def _is_inexact(v: Any) -> bool:
    dtype = getattr(v.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _around(joined: int, demanded: bool) -> tuple[int, int]:
    return FULL, FULL if joined == LOW and demanded else joined


def _there(joined: int, demanded: bool) -> tuple[int, int]:
    return LOW if joined == LOW else FULL, joined


def _there_unless_demanded(
    joined: int,
    demanded: bool,
) -> tuple[int, int]:
    return (
        (FULL, FULL) if joined == LOW and demanded else _there(joined, demanded)
    )


# Class -> (joined state of the operands, demanded in float32) -> (state to run in,
# state of the results).
_RUN = {
    MATMUL: lambda joined, demanded: (LOW, LOW),
    DENY: lambda joined, demanded: (FULL, FULL),
    OPAQUE: lambda joined, demanded: (FULL, FULL),
    EXACT: lambda joined, demanded: (FULL, FREE),
    LOCAL: _around,
    WIDE: _around,
    LAYOUT: _there,
    FOLLOW: _there_unless_demanded,
}
