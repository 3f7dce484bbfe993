"""Decide in which dtype autocast runs each operation, by dataflow; nothing is computed.

A table says what each primitive may do in the compute dtype, `classify` makes the
exceptions that an equation's parameters ask for, and `Analyzer` follows every float32
value through a jaxpr. `_rewrite` carries the decisions out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks import _jaxpr

MATMUL, DENY, LOCAL, WIDE = "matmul", "deny", "local", "wide"
FOLLOW, LAYOUT, EXACT, OPAQUE = "follow", "layout", "exact", "opaque"

# Class -> primitives, of jax 0.7 to 0.12; tests/ground/test_primitives.py says which one is
# missing.
TABLE = {
    # Operands in the compute dtype, and so is the result; the hardware accumulates in
    # float32.
    MATMUL: "dot_general conv_general_dilated ragged_dot ragged_dot_general",
    # Operands in float32; the result stays in float32 and draws its partners up to it.
    # (Between the two halves of a collective is a future, which nothing can cast. The
    # result of scatter-max is compared with its operands, see CHOICES: rounded, it
    # would equal none in float32.)
    DENY: """
        exp exp2 expm1 log log1p log2 pow rsqrt tan asin acos atan sinh cosh asinh
        acosh atanh erf_inv reduce reduce_sum reduce_prod cumsum cumprod cumlogsumexp
        reduce_window scatter-add scatter-sub scatter-mul scatter-max scatter-min
        reduce_scatter_start reduce_scatter_done lgamma digamma polygamma zeta igamma
        igammac igamma_grad_a regularized_incomplete_beta bessel_i0e bessel_i1e
        random_gamma random_gamma_grad cholesky cholesky_update lu
        lu_pivots_to_permutation qr geqrf geqp3 householder_product ormqr eig eigh svd
        schur hessenberg tridiagonal tridiagonal_solve triangular_solve
        symmetric_product fft complex real imag conj""",
    # Computed in float32; the result goes back to the compute dtype if an operand was
    # in it. (A polynomial is a sum; the objects Frexp and Ldexp were built for operands
    # in float32.)
    LOCAL: """
        sin cos sqrt cbrt atan2 rem polynomial Frexp Ldexp reduce_precision
        reduce_window_sum select_and_scatter_add select_and_gather_add
        select_and_scatter psum reduce_scatter unreduced_psum unreduced_reduce_scatter""",
    # Exact in any dtype, but the derivative sums: computed as LOCAL, so that it sums in
    # float32.
    WIDE: """
        gather reduce_max reduce_min reduce_window_max reduce_window_min sort top_k
        approx_top_k tile pvary pbroadcast pcast all_gather all_gather_invariant
        all_gather_reduced""",
    # Elementwise: computed where the operands are, in float32 if every consumer needs
    # that. (In the derivative of tanh, one_minus_square is (1 + y)(1 - y), and 1 - y is
    # exact for y from 1/2 to 1. The digits that it lacks near 1 were lost when y was
    # rounded: float32 would not bring them back. y is at most 1, so float16 does not
    # overflow.)
    FOLLOW: """
        add sub mul div neg tanh logistic erf erfc integer_pow square one_minus_square
        max min abs sign floor ceil round clamp select_n add_any""",
    # Data movement: the dtype passes through.
    LAYOUT: """
        reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice
        scatter concatenate pad rev squeeze expand_dims copy stop_gradient cummax
        cummin split stack unstack name sharding_constraint reshard mesh_cast
        layout_constraint all_to_all ragged_all_to_all ppermute pmax pmin
        optimization_barrier device_put argmax argmin empty empty2 dce_sink stage""",
    # Operands as they were without autocast, since the result is not a number or must
    # be exact.
    EXACT: """
        eq ne lt le gt ge eq_to lt_to le_to is_finite bitcast_convert_type nextafter
        iota Nonzero SearchSorted and or xor not clz population_count mulhi shift_left
        shift_right_arithmetic shift_right_logical reduce_and reduce_or reduce_xor
        axis_index platform_index after_all create_token rng_uniform rng_bit_generator
        random_bits random_fold_in random_seed random_split random_wrap random_unwrap
        threefry2x32""",
    # Not looked into: operands as they were, the result stays in float32.
    OPAQUE: """
        pallas_call ffi_call tpu_custom_call custom_linear_solve CustomRoot
        _RootLinearMap linear_call custom_partitioning_call custom_partitioning
        custom_lin custom_vmap_call composite remat_opt scaled_dot
        scaled_matmul_wrapper psend precv get swap xla_pmap pure_callback io_callback
        debug_callback debug_print python_callback debug_partitioning""",
}
# float16 overflows at 65504, the square of 256.
FLOAT16_DENY = frozenset({"integer_pow", "square"})
CONVERT = "convert_element_type"

# The derivative asks which operand the result equals.
CHOICES = frozenset(
    {"max", "min", "reduce_max", "reduce_min", "scatter-max", "scatter-min"}
)

# What asks for the lowest precision that there is, as a product without `precision=`
# does.
_LOWEST = (None, lax.Precision.DEFAULT, lax.DotAlgorithmPreset.DEFAULT)

PRODUCTS = frozenset(TABLE[MATMUL].split())
_CLASS = {name: kind for kind, names in TABLE.items() for name in names.split()}


def is_classified(eqn: Any) -> bool:
    """Return whether the table (or the code for bodies) says what to do with it."""
    name = _jaxpr.primitive(eqn)
    return name in _CLASS or _jaxpr.has_bodies(eqn) or name == CONVERT


def check_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """Return the caller's rows of the table, primitive -> class.

    Raises:
      ValueError: an unknown class, or a primitive with a body or without a class.
    """
    rules = dict(rules or {})
    for primitive, kind in rules.items():
        if kind not in TABLE:
            raise ValueError(
                f"amp.autocast: `rules` gives {primitive!r} the class {kind!r}; "
                f"use one of {', '.join(TABLE)}"
            )
        if primitive in _jaxpr.WITH_BODIES or primitive == CONVERT:
            raise ValueError(
                f"amp.autocast: `rules` cannot reclass {primitive!r}; "
                "name the primitives inside it, or wrap a part in amp.full_precision"
            )
    return rules


def classify(
    eqn: Any,
    low: np.dtype,
    rules: Mapping[str, str],
) -> tuple[str, str]:
    """Return the class of an equation, and the reason for an exception ("" if none).

    Args:
      eqn: an equation without bodies.
      low: the compute dtype.
      rules: the caller's rows of the table.
    """
    name = _jaxpr.primitive(eqn)
    kind = rules.get(name) or _CLASS.get(name, OPAQUE)
    passes_through = kind in (LAYOUT, FOLLOW)
    if passes_through and any(True for _ in _jaxpr.sub_jaxprs(eqn)):
        return DENY, "its function is for operands in float32"
    if name in rules:
        return kind, "rules="
    if kind == MATMUL:
        why = _why_not_low(eqn, low)
        return (DENY, why) if why else (kind, "")
    if name == "broadcast_in_dim" and _grows(eqn):
        return WIDE, ""
    if passes_through and _jaxpr.is_high(eqn):
        return WIDE, ""  # the object was built for operands in float32
    if low == np.float16 and (name in FLOAT16_DENY or _is_square(eqn)):
        return DENY, "float16 squares overflow at 256"
    return kind, "" if name in _CLASS else "unknown primitive"


def _why_not_low(eqn: Any, low: np.dtype) -> str:
    """Return why a product stays in float32; "" if it need not."""
    precisions = _jaxpr.precisions(eqn)
    if any(p not in _LOWEST for p in precisions):
        return f"precision={'/'.join(dict.fromkeys(map(str, precisions)))}"
    if _jaxpr.is_inner_product(eqn):
        return "an inner product: a reduction"
    for v in eqn.invars:
        dtype = v.aval.dtype
        if dtype not in (np.float32, low) and jnp.issubdtype(
            dtype, jnp.inexact
        ):
            return f"an operand is {dtype}"
    return ""


def _grows(eqn: Any) -> bool:
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def _is_square(eqn: Any) -> bool:
    return _jaxpr.primitive(eqn) == "mul" and eqn.invars[0] is eqn.invars[1]


# Where each float32 value of a jaxpr is held.
#
# Forward, every float32 value gets a state: FREE (float32, untouched by a sensitive
# operation: it may be rounded where it meets a low value), LOW (in the compute dtype)
# or FULL (float32, downstream of a sensitive operation: it draws a low partner up).
# Joining is the maximum. Backward, a value is demanded in float32 if all its consumers
# need that: then the operation that computes it runs in float32 rather than round just
# before.


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
      kind: its class in `TABLE`, or "body".
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
      scan_carry: "keep" holds float32 carries of a scan in float32; "auto" lowers those
        that feed a matrix product (or a sensitive operation) and come out low:
        activations, not accumulators.
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
            self._may_lower(jaxpr, v, s)
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
    ) -> bool:
        return (
            self.scan_carry == "auto"
            and is_full(carry)
            and state != FULL
            and self._feeds_compute(jaxpr, carry)
        )

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
