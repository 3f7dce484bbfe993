"""List what autocast rewrites of a function, and why the rest stays in float32."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtricks import _flops, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks.amp import _precision_table as table
from jaxtricks.amp._autocast import DEFAULT, Rules, ScanCarry, Settings, Traced
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
from jaxtricks.amp._product8 import multiplied_formats
from jaxtricks.amp._product_roles import (
    Choice,
    Choices,
    of_bodies,
    of_eqns,
)
from jaxtricks.amp._rewrite import Emitter
from jaxtricks.amp._rounding8 import Product, Scaling, round_to_8_bits


@dataclasses.dataclass(frozen=True)
class Island:
    """Equations that stay in float32, or products that 8 bits leave in bfloat16.

    Attributes:
      primitive: which.
      dtype: name of the dtype that they stay in.
      why: its class in the table of primitives, or the reason for an exception.
      where: source line.
      count: how many there are; those under a scan count once.
    """

    primitive: str
    dtype: str
    why: str
    where: str
    count: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The census of a rewritten function; str() is the table.

    Attributes:
      compute: name of the compute dtype.
      low: products and convolutions in it.
      half: those in bfloat16 where the compute dtype has 8 bits.
      full: those left in float32.
      flops: {name of a dtype: operations of the products in it}; those of a loop count
        as often as it runs, one that ends by a condition once.
      casts_down, casts_up: casts that the rewrite adds, into the compute dtype and out
        of it.
      carries_low, carries_full: float32 carries of loops that were lowered, and those
        that stay.
      opaque: {primitive: count} of those that cannot be looked into.
      unknown: {primitive: count} of those that the table of primitives lacks: left in
        float32.
      islands: where float32 stays, the largest first.
      notes: sentences about what will surprise.
    """

    compute: str
    low: int
    half: int
    full: int
    flops: dict[str, int]
    casts_down: int
    casts_up: int
    carries_low: int
    carries_full: int
    opaque: dict[str, int]
    unknown: dict[str, int]
    islands: tuple[Island, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        half = f"{self.half} in bfloat16, " if self.half else ""
        heading = (
            f"{self.low} products in {self.compute}, {half}"
            f"{self.full} in float32; {self.compute} has "
            f"{100 * self.share_of_flops():.1f} % of their operations; "
            f"casts: {self.casts_down} down, {self.casts_up} up; carries: "
            f"{self.carries_low} low, {self.carries_full} float32"
        )
        paragraphs = [heading, *self.notes]
        for dtype in ("bfloat16", "float32"):
            rows = [
                (i.primitive, i.count, i.why, i.where)
                for i in self.islands
                if i.dtype == dtype
            ]
            if rows:
                headers = (f"in {dtype}", "count", "why", "where")
                paragraphs.append(str(_table.make(headers, rows)))
        return "\n".join(paragraphs)

    def share_of_flops(self, dtype: str | None = None) -> float:
        """Return the share of the products' operations in a dtype, from 0 to 1.

        Args:
          dtype: its name; None: that of the compute dtype.
        """
        total = sum(self.flops.values())
        return (
            self.flops.get(dtype or self.compute, 0) / total if total else 0.0
        )


@checked
def explain(
    fn: Callable[..., Any],
    *args: Any,
    policy: Policy | str = DEFAULT,
    rules: Rules | None = None,
    scan_carry: ScanCarry = "layers",
    scaling: Scaling = "tensor",
) -> Explanation:
    """Explain what `autocast` with the same settings does to fn(*args).

    Nothing is computed.

    Args:
      fn: any function of pytrees: of a loss, explain `jax.grad(loss)` to see the
        backward pass too.
      args: its arguments, or their shapes (jax.ShapeDtypeStruct).
      policy, rules, scan_carry, scaling: see `autocast`.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> census = explain(lambda w, x: jax.nn.softmax(x @ w), w, x)
      >>> census.low, sorted({i.primitive for i in census.islands})
      (1, ['exp', 'reduce_sum'])
    """
    settings = Settings.of(policy, rules, scan_carry, scaling)
    traced = settings.trace(fn, args, {})
    low, compute = settings.policy.arrays, settings.policy.compute.name
    products: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    carries: Counter[Any] = Counter()
    islands: Counter[tuple[str, str, str, str]] = Counter()
    opaque: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    casting_products = 0
    for step in _steps(traced.analysis, traced.choices):
        eqn, decision, choice, line, rounds = step
        name = _jaxpr.primitive(eqn)
        if name in table.PRODUCTS and not _jaxpr.sums_nothing(eqn):
            # Of float32 operands it could run low.
            if any(map(is_full, eqn.invars)):
                dtype, why = _of_product(eqn, decision, choice, compute, low)
                products[dtype] += 1
                operations[dtype] += rounds * _flops.eqn_flops(eqn)
                if why:
                    islands[name, dtype, why, line] += 1
            casting_products += eqn.outvars[0].aval.dtype == low
        # None counts values that are not float32, which nothing reports.
        carries.update(_carries(eqn, decision))
        if decision.kind == table.OPAQUE:
            counts = opaque if table.is_classified(eqn) else unknown
            counts[name] += 1
        if _is_island(eqn, decision):
            islands[_name(eqn, decision), "float32", _why(decision), line] += 1
    casts = _added_casts(traced, low)
    full = products["float32"] if compute != "float32" else 0
    lowered = sum(products.values()) - products["float32"]
    notes = [
        _note(lowered, products["float32"], casting_products, low),
        _unknown_note(unknown),
    ]
    return Explanation(
        compute=compute,
        low=products[compute],
        half=products[low.name] if compute != low.name else 0,
        full=full,
        flops=dict(operations),
        casts_down=casts["down"],
        casts_up=casts["up"],
        carries_low=carries[LOW],
        carries_full=carries[FULL],
        opaque=opaque,
        unknown=unknown,
        islands=tuple(
            Island(*key, count) for key, count in islands.most_common()
        ),
        notes=tuple(filter(None, notes)),
    )


class _Step(NamedTuple):
    """An equation, what is decided of it, its source line and how often it runs."""

    eqn: Any
    decision: Decision
    choice: Choice | None
    line: str
    rounds: int


def _steps(
    analysis: Analysis,
    choices: Choices | None,
    outer: str = "",
    rounds: int = 1,
) -> Iterator[_Step]:
    """Yield the steps of a function, inner ones after theirs.

    Equations of a library have the line that called it.
    """
    for eqn, decision, choice in zip(
        analysis.jaxpr.eqns,
        analysis.decisions,
        of_eqns(choices, analysis.jaxpr),
        strict=True,
    ):
        line = _jaxpr.source_line(eqn) or outer
        yield _Step(eqn, decision, choice, line, rounds)
        bodies = of_bodies(choice, len(decision.bodies))
        inner = rounds
        if _jaxpr.primitive(eqn) == "scan":
            inner *= _jaxpr.scan_parts(eqn).length
        for body, body_choices in zip(decision.bodies, bodies, strict=True):
            yield from _steps(body, body_choices, line, inner)


_ROUNDING = getattr(round_to_8_bits, "__name__", "")
_WHY_HALF = {
    "first": "first: it reads inputs of the function alone",
    "last": "last: no product follows",
    "attention": "attention: a product of activations",
}


def _of_product(
    eqn: Any,
    decision: Decision,
    choice: Choice | None,
    compute: str,
    low: np.dtype,
) -> tuple[str, str]:
    """Return the dtype that a product computes in, and why not in 8 bits; "" if it does."""
    if decision.run != LOW:
        return "float32", ""
    if compute == low.name:
        return compute, ""
    if choice is None:
        return low.name, f"8 bits are not for {_jaxpr.primitive(eqn)}"
    if choice.sides is None:
        return low.name, _WHY_HALF.get(choice.role, "rules=")
    if multiplied_formats(Product.of(eqn), choice.sides):
        return compute, ""
    if choice.sides[0].scaling == "block32":
        return low.name, "rounded in blocks of 32, then multiplied wide"
    return low.name, "a gradient, which passes straight through"


def _is_island(eqn: Any, decision: Decision) -> bool:
    # Other classes stay in float32 only because an operand does.
    if decision.kind in (table.DENY, FULL_PRECISION, table.OPAQUE):
        return decision.run == FULL or any(map(is_full, eqn.outvars))
    # A cast up that the function asks for itself.
    if decision.kind == table.CONVERT:
        return decision.outs[0] == FULL and not is_full(eqn.invars[0])
    return FULL in _carries(eqn, decision)


def _carries(eqn: Any, decision: Decision) -> tuple[Any, ...]:
    """Return the states of the carries of a loop; none for other equations."""
    name = _jaxpr.primitive(eqn)
    # The results of a scan after its carries are stacked outputs.
    if name == "scan":
        return decision.outs[: _jaxpr.scan_parts(eqn).carry]
    return decision.outs if name == "while" else ()


def _name(eqn: Any, decision: Decision) -> str:
    is_region = decision.kind == FULL_PRECISION
    return "full_precision" if is_region else _jaxpr.primitive(eqn)


def _why(decision: Decision) -> str:
    reasons = {
        table.CONVERT: "raised by the function itself",
        FULL_PRECISION: "asked for",
        BODY: "carry kept in float32",
    }
    return decision.why or reasons.get(decision.kind, decision.kind)


def _added_casts(
    traced: Traced,
    low: np.dtype,
) -> Counter[str]:
    """Count the casts of the rewritten program that the original lacks."""
    # Counted, not derived from the decisions: the rewrite shares some casts.
    emitter = Emitter(traced.analyzer, traced.chooser)
    jaxpr = traced.jaxpr.jaxpr

    def run(consts: Any, args: Any) -> Any:
        return emitter.run(traced.analysis, consts, args, traced.choices)

    consts = [v.aval for v in jaxpr.constvars]
    args = [v.aval for v in jaxpr.invars]
    rewritten = jax.make_jaxpr(run)(consts, args)
    return _casts(rewritten.jaxpr, low) - _casts(jaxpr, low)


def _casts(
    jaxpr: _jaxpr.Jaxpr,
    low: np.dtype,
) -> Counter[str]:
    full = np.dtype(np.float32)
    directions = {(full, low): "down", (low, full): "up"}
    counts: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if _jaxpr.primitive(eqn) == table.CONVERT:
            variables: list[Any] = [*eqn.invars, *eqn.outvars]
            dtypes = tuple(v.aval.dtype for v in variables)
            if dtypes in directions:
                counts[directions[dtypes]] += 1
        # Rounding to 8 bits goes by float32, which is not a cast of autocast.
        elif _jaxpr.function_name(eqn) != _ROUNDING:
            for inner in _jaxpr.sub_jaxprs(eqn):
                counts += _casts(inner, low)
    return counts


def _note(
    lowered: int,
    full: int,
    casting_products: int,
    low: np.dtype,
) -> str:
    """Return a sentence about products that will surprise; "" if there is none."""
    if low == np.float32:
        return "The policy computes in float32: nothing is rewritten."
    if lowered:
        return ""
    # The most frequent surprise: a model that has `dtype=bfloat16` already.
    if casting_products:
        return (
            f"Nothing to do: the function casts its {casting_products} "
            f"products to {low.name} itself. autocast respects that, its sums "
            "in that dtype included; give it the float32 model instead."
        )
    if full:
        return (
            "No product is rewritten: the table says why each stays in float32."
        )
    return (
        "The function has no matrix product or convolution in float32: "
        "autocast changes nothing."
    )


def _unknown_note(unknown: Mapping[str, int]) -> str:
    if not unknown:
        return ""
    counts = ", ".join(f"{name} ({n})" for name, n in sorted(unknown.items()))
    stay = "they stay" if len(unknown) > 1 else "it stays"
    return f"amp does not know {counts}: {stay} in float32; `rules=` can say otherwise."
