"""What autocast makes of a function, and why what stays in float32 stays there."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxtricks import _compat, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks.amp import _precision_analysis as table
from jaxtricks.amp._autocast import DEFAULT, Settings
from jaxtricks.amp._policy import Policy
from jaxtricks.amp._precision_analysis import (
    BODY,
    FULL,
    FULL_PRECISION,
    LOW,
    Analysis,
    Decision,
    is_full,
)
from jaxtricks.amp._rewrite import Emitter


@dataclasses.dataclass(frozen=True)
class Island:
    """Equations that keep float32.

    Attributes:
      primitive: which.
      why: its class in `amp.rules`, or the exception.
      where: source line.
      count: how many there are; those under a scan count once.
    """

    primitive: str
    why: str
    where: str
    count: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The census of a rewritten function; str() is the table.

    Attributes:
      compute: name of the compute dtype.
      low: products and convolutions in it.
      full: those left in float32.
      casts_down, casts_up: casts that the rewrite adds, into the compute dtype and out
        of it.
      carries_low, carries_full: float32 carries of loops that were lowered, and kept.
      opaque: {primitive: count} of those that cannot be looked into.
      unknown: {primitive: count} of those that the table of `amp.rules` lacks: left in
        float32.
      islands: where float32 stays, the largest first.
      notes: sentences about what will surprise.
    """

    compute: str
    low: int
    full: int
    casts_down: int
    casts_up: int
    carries_low: int
    carries_full: int
    opaque: dict[str, int]
    unknown: dict[str, int]
    islands: tuple[Island, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        heading = (
            f"{self.low} products in {self.compute}, {self.full} in float32; "
            f"casts: {self.casts_down} down, {self.casts_up} up; "
            f"carries: {self.carries_low} low, {self.carries_full} float32"
        )
        rows = [(i.primitive, i.count, i.why, i.where) for i in self.islands]
        islands = (
            str(_table.make(("in float32", "count", "why", "where"), rows))
            if rows
            else ""
        )
        return "\n".join(x for x in (heading, *self.notes, islands) if x)


@checked
def explain(
    fn: Callable[..., Any],
    *args: Any,
    policy: Policy | str = DEFAULT,
    rules: Mapping[str, str] | None = None,
    scan_carry: Literal["keep", "auto"] = "keep",
) -> Explanation:
    """What `autocast` with the same settings makes of fn(*args); nothing is computed.

    Args:
      fn: any function of pytrees: of a loss, explain `jax.grad(loss)` to see the
        backward pass too.
      args: its arguments, or their shapes (jax.ShapeDtypeStruct).
      policy, rules, scan_carry: see `autocast`.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> found = explain(lambda w, x: jax.nn.softmax(x @ w), w, x)
      >>> found.low, sorted({i.primitive for i in found.islands})
      (1, ['exp', 'reduce_sum'])
    """
    settings = Settings.of(policy, rules, scan_carry)
    traced = settings.trace(fn, args, {})
    places = list(_steps(traced.analysis, ""))
    steps = [(eqn, decision) for eqn, decision, _ in places]
    low = settings.policy.compute
    casts = _added_casts(traced, low)
    products = Counter(d.run == LOW for e, d in steps if _is_product(e))
    carries = Counter(s for e, d in steps for s in _carries(e, d) if s is not None)
    named = lambda kept: Counter(_compat.primitive(e) for e, d in steps if kept(e, d))  # noqa: E731
    unknown = named(lambda e, d: d.kind == table.OPAQUE and not table.known(e))
    counted = Counter(
        (_name(e, d), _why(d), line) for e, d, line in places if _is_island(e, d)
    )
    return Explanation(
        low.name,
        products[True],
        products[False],
        casts["down"],
        casts["up"],
        carries[LOW],
        carries[FULL],
        named(lambda e, d: d.kind == table.OPAQUE and table.known(e)),
        unknown,
        tuple(Island(*where, count) for where, count in counted.most_common()),
        (*_notes(steps, products, low), *_unknown_note(unknown)),
    )


def _steps(analysis: Analysis, outer: str) -> Iterator[tuple[Any, Decision, str]]:
    """(equation, decision, source line); what a library made has the line that called it."""
    for eqn, decision in zip(analysis.jaxpr.eqns, analysis.decisions, strict=True):
        line = _jaxpr.source_line(eqn) or outer
        yield eqn, decision, line
        for body in decision.bodies:
            yield from _steps(body, line)


def _is_product(eqn: Any) -> bool:
    """One that could run low: of float32 operands."""
    return _compat.primitive(eqn) in table.PRODUCTS and any(map(is_full, eqn.invars))


def _is_island(eqn: Any, decision: Decision) -> bool:
    if decision.kind in (table.DENY, FULL_PRECISION, table.OPAQUE):
        return decision.run == FULL or any(map(is_full, eqn.outvars))
    if decision.kind == table.CONVERT:
        return decision.outs[0] == FULL and not is_full(eqn.invars[0])
    return FULL in _carries(eqn, decision)


def _carries(eqn: Any, decision: Decision) -> tuple[Any, ...]:
    if _compat.primitive(eqn) == "scan":
        return decision.outs[: _compat.scan_parts(eqn).carry]
    return decision.outs if _compat.primitive(eqn) == "while" else ()


def _name(eqn: Any, decision: Decision) -> str:
    return (
        "full_precision" if decision.kind == FULL_PRECISION else _compat.primitive(eqn)
    )


def _why(decision: Decision) -> str:
    words = {
        table.CONVERT: "raised by the function itself",
        FULL_PRECISION: "asked for",
        BODY: "carry kept in float32",
    }
    return decision.why or words.get(decision.kind, decision.kind)


def _added_casts(traced: Any, low: np.dtype) -> Counter[str]:
    emitter = Emitter(traced.analyzer)
    jaxpr = traced.jaxpr.jaxpr
    run = lambda consts, args: emitter.run(traced.analysis, consts, args)  # noqa: E731
    consts, args = ([v.aval for v in vs] for vs in (jaxpr.constvars, jaxpr.invars))
    new = _casts(jax.make_jaxpr(run)(consts, args).jaxpr, low)
    return new - _casts(jaxpr, low)


def _casts(jaxpr: Any, low: np.dtype) -> Counter[str]:
    ways = {(np.dtype(np.float32), low): "down", (low, np.dtype(np.float32)): "up"}
    found: Counter[str] = Counter()
    for eqn in _jaxpr.walk(jaxpr):
        if _compat.primitive(eqn) == table.CONVERT:
            way = ways.get((eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype))
            found.update([way] if way else [])
    return found


def _notes(steps: Any, products: Counter[bool], low: np.dtype) -> Iterator[str]:
    if low == np.float32:
        yield "The policy computes in float32: nothing is rewritten."
    elif not products[True]:
        own = sum(
            _compat.primitive(e) in table.PRODUCTS and e.outvars[0].aval.dtype == low
            for e, _ in steps
        )
        if own:
            yield (
                f"Nothing to do: the function casts its {own} products to {low.name} itself. autocast "
                "respects that, its sums in that dtype included; give it the float32 model instead."
            )
        elif products[False]:
            yield "No product is rewritten: the table says why each stays in float32."
        else:
            yield "The function has no matrix product or convolution in float32: autocast changes nothing."


def _unknown_note(unknown: Mapping[str, int]) -> Iterator[str]:
    if unknown:
        counts = ", ".join(f"{name} ({n})" for name, n in sorted(unknown.items()))
        stay = "they stay" if len(unknown) > 1 else "it stays"
        yield f"amp does not know {counts}: {stay} in float32; `rules=` can say otherwise."
