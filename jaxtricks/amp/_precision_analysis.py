"""Where each float32 value of a jaxpr is held: the dataflow behind autocast. Nothing is computed here.

Forward, every float32 value gets a state: FREE (float32, untouched by a sensitive operation: it may be
rounded where it meets a low value), LOW (in the compute dtype) or FULL (float32, downstream of a sensitive
operation: it draws a low partner up). Joining is the maximum. Backward, a value is wanted in float32 if
all its consumers want that: then the operation that makes it runs in float32 rather than round just before.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtricks import _compat, _jaxpr
from jaxtricks.amp import rules as table

FREE, LOW, FULL = 0, 1, 2
State = int | None  # None: no float32 value, untouched
States = tuple[State, ...]
BODY = "body"
FULL_PRECISION = "amp_full_precision"  # name of the jitted call that `full_precision` makes

_CALLS = ("jit", "call", "checkpoint", "shard_map", "custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of one equation.

    Attributes:
      kind: its class in the table of `rules`, or "body".
      why: the exception that was made for it; "" if none.
      run: LOW or FULL: what its float32 operands are brought to; None leaves operands alone.
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
    """A jaxpr and what becomes of it.

    Attributes:
      jaxpr: the jaxpr.
      ins: states of its inputs.
      decisions: one an equation.
      outs: the states that its results leave in.
      changed: whether anything becomes low.
    """

    jaxpr: Any
    ins: States
    decisions: tuple[Decision, ...]
    outs: States
    changed: bool

    def leaving(self, outs: Sequence[State]) -> "Analysis":
        """The same with its results brought to other states."""
        return dataclasses.replace(self, outs=tuple(outs), changed=self.changed or LOW in outs)


def is_full(v: Any) -> bool:
    """Whether a variable or literal is float32: the only dtype that autocast moves."""
    return getattr(v.aval, "dtype", None) == np.float32


class Analyzer:
    """The analysis of one traced function, with its settings.

    Args:
      low: the compute dtype.
      rules: the caller's own rows of the table.
      scan_carry: "keep" holds float32 carries of a scan in float32; "auto" lowers those that feed a
        matrix product (or a sensitive operation) and come out low: activations, not accumulators.
    """

    def __init__(self, low: np.dtype, rules: Mapping[str, str], scan_carry: str):
        self.low, self.rules, self.scan_carry = low, rules, scan_carry
        self._wanted: dict[Any, Any] = {}
        self._analyses: dict[Any, Analysis] = {}

    def analyse(self, jaxpr: Any, ins: Sequence[State], wanted: Sequence[bool]) -> Analysis:
        """States of every value.

        Args:
          jaxpr: an open jaxpr.
          ins: states of its inputs.
          wanted: whether each result is wanted in float32.
        """
        ins, wanted = tuple(ins), tuple(wanted)
        key = jaxpr, ins, wanted
        if key not in self._analyses:
            self._analyses[key] = self._analyse(jaxpr, ins, wanted)
        return self._analyses[key]

    def _analyse(self, jaxpr: Any, ins: States, wanted: tuple[bool, ...]) -> Analysis:
        wants = self._demand(jaxpr, wanted)
        states = {v: held(v, FREE) for v in jaxpr.constvars}
        states |= dict(zip(jaxpr.invars, ins, strict=True))

        def state(v: Any) -> State:
            return held(v, FREE) if _jaxpr.is_literal(v) else states[v]

        decisions = []
        for eqn in jaxpr.eqns:
            decision = self._decide(eqn, tuple(map(state, eqn.invars)), wants)
            states.update(zip(eqn.outvars, decision.outs, strict=True))
            decisions.append(decision)
        changed = LOW in ins or any(LOW in d.outs or (d.bodies and d.rebuilt) for d in decisions)
        return Analysis(jaxpr, ins, tuple(decisions), tuple(map(state, jaxpr.outvars)), changed)

    def _decide(self, eqn: Any, ins: States, wants: Mapping[Any, bool]) -> Decision:
        name, wanted = _compat.primitive(eqn), _wanted(eqn, wants)
        if name == table.CONVERT:
            return self._convert(eqn, ins[0])
        if eqn.params.get("name") == FULL_PRECISION:
            return Decision(FULL_PRECISION, "", FULL, _all(eqn, FULL))
        if name in _CALLS:
            return self._call(eqn, ins, wanted)
        if name == "scan":
            return self._scan(eqn, ins)
        if name == "while":
            return self._while(eqn, ins)
        if name == "cond":
            return self._cond(eqn, ins, wanted)
        return self._simple(eqn, ins, wanted)

    def _simple(self, eqn: Any, ins: States, wanted: Sequence[bool]) -> Decision:
        operands = [s for s in ins if s is not None]
        if not operands and not any(map(is_full, eqn.outvars)):
            return Decision(table.EXACT, "", None, _all(eqn, None))
        kind, why = table.classify(eqn, self.low, self.rules)
        if not operands:
            made = kind == table.OPAQUE or any(map(_is_inexact, eqn.invars))
            return Decision(kind, why, None, _all(eqn, FULL if made else FREE))
        full = [w for v, w in zip(eqn.outvars, wanted, strict=True) if is_full(v)]
        run, out = _RUN[kind](max(operands), bool(full) and all(full))
        return Decision(kind, why, run, _all(eqn, out))

    def _convert(self, eqn: Any, state: State) -> Decision:
        (source,), (result,) = eqn.invars, eqn.outvars
        if is_full(source) and is_full(result):
            return Decision(table.CONVERT, "", None, (state,))
        if is_full(source):
            rounded = state == LOW and result.aval.dtype == self.low
            return Decision(table.CONVERT, "", None if rounded else FULL, (None,))
        # A low value that the user raised is meant to be in float32.
        return Decision(table.CONVERT, "", None, _all(eqn, FULL if _is_inexact(source) else FREE))

    def _call(self, eqn: Any, ins: States, wanted: Sequence[bool]) -> Decision:
        (jaxpr,) = bodies(eqn)
        body = self.analyse(jaxpr, ins, wanted)
        # The backward rule may hold products where the function has none.
        rebuilt = body.changed or _compat.primitive(eqn) == "custom_vjp_call"
        return Decision(BODY, "", None, body.outs, (body,), rebuilt)

    def _scan(self, eqn: Any, ins: States) -> Decision:
        (jaxpr,) = bodies(eqn)
        first, carry_size, *_ = _compat.scan_parts(eqn)
        last = first + carry_size
        carries = jaxpr.invars[first:last]
        low = [self._may_lower(jaxpr, v, s) for v, s in zip(carries, ins[first:last], strict=True)]
        while True:
            carry = [
                held(v, LOW if is_low else FULL) for v, is_low in zip(carries, low, strict=True)
            ]
            wanted = [s == FULL for s in carry] + [False] * (len(jaxpr.outvars) - len(carry))
            body = self.analyse(jaxpr, (*ins[:first], *carry, *ins[last:]), wanted)
            leaving = body.outs[: len(carry)]
            still = [is_low and s != FULL for is_low, s in zip(low, leaving, strict=True)]
            if still == low:
                break
            low = still
        body = body.leaving((*carry, *body.outs[len(carry) :]))
        return Decision(BODY, "", None, body.outs, (body,))

    def _may_lower(self, jaxpr: Any, carry: Any, state: State) -> bool:
        return (
            self.scan_carry == "auto"
            and is_full(carry)
            and state != FULL
            and self._feeds_compute(jaxpr, carry)
        )

    def _feeds_compute(self, jaxpr: Any, carry: Any) -> bool:
        """Whether a product or a sensitive operation sees the carry: an accumulator is only added to."""
        reached = {carry}
        for eqn in jaxpr.eqns:
            if any(not _jaxpr.is_literal(v) and v in reached for v in eqn.invars):
                if _compat.has_bodies(eqn):
                    return True
                if table.classify(eqn, self.low, self.rules)[0] in (table.MATMUL, table.DENY):
                    return True
                reached.update(eqn.outvars)
        return False

    def _while(self, eqn: Any, ins: States) -> Decision:
        cond, body = bodies(eqn)
        a, body_consts = _compat.while_consts(eqn)
        b = a + body_consts
        carry = tuple(None if s is None else FULL for s in ins[b:])
        bodies_ = (
            self.analyse(cond, (*ins[:a], *carry), (False,)),
            self.analyse(body, (*ins[a:b], *carry), [s == FULL for s in carry]).leaving(carry),
        )
        return Decision(BODY, "", None, carry, bodies_)

    def _cond(self, eqn: Any, ins: States, wanted: Sequence[bool]) -> Decision:
        branches = [self.analyse(j, ins[1:], wanted) for j in bodies(eqn)]
        outs = tuple(
            None if s[0] is None else max(s) for s in zip(*(b.outs for b in branches), strict=True)
        )
        return Decision(BODY, "", None, outs, tuple(b.leaving(outs) for b in branches))

    def _demand(self, jaxpr: Any, outs: tuple[bool, ...]) -> dict[Any, bool]:
        """{variable: whether every consumer wants it in float32}; absent if it has none."""
        key = jaxpr, outs
        if key in self._wanted:
            return self._wanted[key]
        wants: dict[Any, bool] = {}

        def consume(v: Any, want: bool) -> None:
            if not _jaxpr.is_literal(v) and is_full(v):
                wants[v] = wants.get(v, True) and want

        for v, want in zip(jaxpr.outvars, outs, strict=True):
            consume(v, want)
        for eqn in reversed(jaxpr.eqns):
            wanted = self._operands(eqn, wants)
            if wanted is not None:
                for v, want in zip(eqn.invars, wanted, strict=True):
                    consume(v, want)
        self._wanted[key] = wants
        return wants

    def _operands(self, eqn: Any, wants: Mapping[Any, bool]) -> list[bool] | None:
        """Whether an equation wants its operands in float32; None if it does not care."""
        outs = _wanted(eqn, wants)
        n, name = len(eqn.invars), _compat.primitive(eqn)
        if eqn.params.get("name") == FULL_PRECISION or name == table.CONVERT:
            return [True] * n
        if name in _CALLS:
            (body,) = bodies(eqn)
            inner = self._demand(body, outs)
            return [inner.get(v, True) for v in body.invars]
        if _compat.has_bodies(eqn):
            return [False] * n
        kind, _ = table.classify(eqn, self.low, self.rules)
        if kind == table.EXACT:
            return None
        if kind in (table.FOLLOW, table.LAYOUT, table.WIDE):
            full = [o for v, o in zip(eqn.outvars, outs, strict=True) if is_full(v)]
            return [all(full)] * n if full else None
        return [kind != table.MATMUL] * n


def bodies(eqn: Any) -> list[Any]:
    """The inner jaxprs of an equation, open; those that differentiate it are not among them."""
    return [body.jaxpr for body in _compat.bodies(eqn)]


def held(v: Any, state: State) -> State:
    """The state, for a float32 variable or literal; None for the others."""
    return state if is_full(v) else None


def _all(eqn: Any, state: State) -> States:
    return tuple(held(v, state) for v in eqn.outvars)


def _wanted(eqn: Any, wants: Mapping[Any, bool]) -> tuple[bool, ...]:
    """Whether each result is wanted in float32; what nobody reads is not in the way."""
    return tuple(is_full(v) and wants.get(v, True) for v in eqn.outvars)


def _is_inexact(v: Any) -> bool:
    dtype = getattr(v.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _around(joined: int, wanted: bool) -> tuple[int, int]:
    return FULL, FULL if joined == LOW and wanted else joined


def _there(joined: int, wanted: bool) -> tuple[int, int]:
    return LOW if joined == LOW else FULL, joined


def _there_unless_wanted(joined: int, wanted: bool) -> tuple[int, int]:
    return (FULL, FULL) if joined == LOW and wanted else _there(joined, wanted)


# Class -> (joined state of the operands, wanted in float32) -> (state to run in, state of the results).
_RUN = {
    table.MATMUL: lambda joined, wanted: (LOW, LOW),
    table.DENY: lambda joined, wanted: (FULL, FULL),
    table.OPAQUE: lambda joined, wanted: (FULL, FULL),
    table.EXACT: lambda joined, wanted: (FULL, FREE),
    table.LOCAL: _around,
    table.WIDE: _around,
    table.LAYOUT: _there,
    table.FOLLOW: _there_unless_wanted,
}
