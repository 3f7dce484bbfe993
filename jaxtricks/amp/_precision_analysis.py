"""What autocast does with each primitive: one table, and the exceptions that its parameters make."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks import _compat, _jaxpr

MATMUL, DENY, LOCAL, WIDE = "matmul", "deny", "local", "wide"
FOLLOW, LAYOUT, EXACT, OPAQUE = "follow", "layout", "exact", "opaque"

# Class -> primitives, of jax 0.7 to 0.12; tests/test_primitives.py says which one is
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
        exp exp2 expm1 log log1p log2 pow rsqrt tan asin acos atan sinh cosh asinh acosh atanh erf_inv
        reduce reduce_sum reduce_prod cumsum cumprod cumlogsumexp reduce_window
        scatter-add scatter-sub scatter-mul scatter-max scatter-min reduce_scatter_start reduce_scatter_done
        lgamma digamma polygamma zeta igamma igammac igamma_grad_a regularized_incomplete_beta
        bessel_i0e bessel_i1e random_gamma random_gamma_grad
        cholesky cholesky_update lu lu_pivots_to_permutation qr geqrf geqp3 householder_product ormqr eig
        eigh svd schur hessenberg tridiagonal tridiagonal_solve triangular_solve symmetric_product fft
        complex real imag conj""",
    # Computed in float32; the result goes back to the compute dtype if an operand was
    # in it. (A polynomial is a sum; the objects Frexp and Ldexp were made for operands
    # in float32.)
    LOCAL: """
        sin cos sqrt cbrt atan2 rem polynomial Frexp Ldexp reduce_precision reduce_window_sum
        select_and_scatter_add select_and_gather_add select_and_scatter psum reduce_scatter unreduced_psum
        unreduced_reduce_scatter""",
    # Exact in any dtype, but the derivative sums: computed as LOCAL, so that it sums in
    # float32.
    WIDE: """
        gather reduce_max reduce_min reduce_window_max reduce_window_min sort top_k approx_top_k tile
        pvary pbroadcast pcast all_gather all_gather_invariant all_gather_reduced""",
    # Elementwise: computed where the operands are, in float32 if every consumer wants
    # that. (In the derivative of tanh, one_minus_square is (1 + y)(1 - y), and 1 - y is
    # exact for y from 1/2 to 1. The digits that it lacks near 1 were lost when y was
    # rounded: float32 would not bring them back. y is at most 1, so float16 does not
    # overflow.)
    FOLLOW: """
        add sub mul div neg tanh logistic erf erfc integer_pow square one_minus_square max min abs sign
        floor ceil round clamp select_n add_any""",
    # Data movement: the dtype passes through.
    LAYOUT: """
        reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice scatter concatenate
        pad rev squeeze expand_dims copy stop_gradient cummax cummin split
        stack unstack name sharding_constraint reshard mesh_cast layout_constraint all_to_all
        ragged_all_to_all ppermute pmax pmin optimization_barrier device_put argmax argmin empty empty2
        dce_sink stage""",
    # Operands as they were without autocast, since the result is not a number or must
    # be exact.
    EXACT: """
        eq ne lt le gt ge eq_to lt_to le_to is_finite bitcast_convert_type nextafter iota Nonzero
        SearchSorted and or xor not clz population_count mulhi shift_left shift_right_arithmetic
        shift_right_logical reduce_and reduce_or reduce_xor axis_index platform_index after_all
        create_token rng_uniform rng_bit_generator random_bits random_fold_in random_seed random_split
        random_wrap random_unwrap threefry2x32""",
    # Not looked into: operands as they were, the result stays in float32.
    OPAQUE: """
        pallas_call ffi_call tpu_custom_call custom_linear_solve CustomRoot _RootLinearMap linear_call
        custom_partitioning_call custom_partitioning custom_lin custom_vmap_call composite remat_opt
        scaled_dot scaled_matmul_wrapper psend precv get swap xla_pmap pure_callback io_callback
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


def known(eqn: Any) -> bool:
    """Whether the table (or the code for bodies) says what to do with it."""
    name = _compat.primitive(eqn)
    return name in _CLASS or _compat.has_bodies(eqn) or name == CONVERT


def check_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """The caller's own rows, primitive -> class, checked.

    Raises:
      ValueError: an unknown class, or a primitive with a body or without a class of its
        own.
    """
    rules = dict(rules or {})
    for primitive, kind in rules.items():
        if kind not in TABLE:
            raise ValueError(
                f"amp.autocast: `rules` gives {primitive!r} the class {kind!r}; "
                f"use one of {', '.join(TABLE)}"
            )
        if primitive in _compat.WITH_BODIES or primitive == CONVERT:
            raise ValueError(
                f"amp.autocast: `rules` cannot reclass {primitive!r}; "
                "name the primitives inside it, or wrap a part in amp.full_precision"
            )
    return rules


def classify(eqn: Any, low: np.dtype, rules: Mapping[str, str]) -> tuple[str, str]:
    """(class of an equation, the exception that was made: "" if none)."""
    name = _compat.primitive(eqn)
    kind = rules.get(name) or _CLASS.get(name, OPAQUE)
    if kind in (LAYOUT, FOLLOW) and any(True for _ in _jaxpr.sub_jaxprs(eqn)):
        return DENY, "its function is for operands in float32"
    if name in rules:
        return kind, "rules="
    if kind == MATMUL:
        why = _no_matmul(eqn, low)
        return (DENY, why) if why else (kind, "")
    if kind == LAYOUT and name == "broadcast_in_dim" and _grows(eqn):
        return WIDE, ""
    if kind in (LAYOUT, FOLLOW) and _compat.is_high(eqn):
        return WIDE, ""  # the object was made for operands in float32
    if low == np.float16 and (name in FLOAT16_DENY or _squares(eqn)):
        return DENY, "float16 squares overflow at 256"
    return kind, "" if name in _CLASS else "unknown primitive"


def _no_matmul(eqn: Any, low: np.dtype) -> str:
    precision = eqn.params.get("precision")
    pair = precision if isinstance(precision, tuple) else (precision,)
    if any(p not in _LOWEST for p in pair):
        return f"precision={'/'.join(dict.fromkeys(map(str, pair)))}"
    if _compat.primitive(eqn) == "dot_general" and _is_inner(eqn):
        return "an inner product: a reduction"
    for v in eqn.invars:
        dtype = v.aval.dtype
        if dtype not in (np.float32, low) and jnp.issubdtype(dtype, jnp.inexact):
            return f"an operand is {dtype}"
    return ""


def _is_inner(eqn: Any) -> bool:
    """No free axis on either side: each result is one inner product."""
    contracting, batch = eqn.params["dimension_numbers"]
    sides = zip(eqn.invars, contracting, batch, strict=True)
    return all(v.aval.ndim == len(c) + len(b) for v, c, b in sides)


def _grows(eqn: Any) -> bool:
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def _squares(eqn: Any) -> bool:
    return _compat.primitive(eqn) == "mul" and eqn.invars[0] is eqn.invars[1]


# Where each float32 value of a jaxpr is held: the dataflow behind autocast. Nothing is
# computed here.
#
# Forward, every float32 value gets a state: FREE (float32, untouched by a sensitive
# operation: it may be rounded where it meets a low value), LOW (in the compute dtype)
# or FULL (float32, downstream of a sensitive operation: it draws a low partner up).
# Joining is the maximum. Backward, a value is wanted in float32 if all its consumers
# want that: then the operation that makes it runs in float32 rather than round just
# before.


FREE, LOW, FULL = 0, 1, 2
State = int | None  # None: no float32 value, untouched
States = tuple[State, ...]
BODY = "body"
FULL_PRECISION = (
    "amp_full_precision"  # name of the jitted call that `full_precision` makes
)

_CALLS = (
    "jit",
    "call",
    "checkpoint",
    "shard_map",
    "custom_jvp_call",
    "custom_vjp_call",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of one equation.

    Attributes:
      kind: its class in the table of `rules`, or "body".
      why: the exception that was made for it; "" if none.
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
        return dataclasses.replace(
            self, outs=tuple(outs), changed=self.changed or LOW in outs
        )


def is_full(v: Any) -> bool:
    """Whether a variable or literal is float32: the only dtype that autocast moves."""
    return getattr(v.aval, "dtype", None) == np.float32


class Analyzer:
    """The analysis of one traced function, with its settings.

    Args:
      low: the compute dtype.
      rules: the caller's own rows of the table.
      scan_carry: "keep" holds float32 carries of a scan in float32; "auto" lowers those
        that feed a matrix product (or a sensitive operation) and come out low:
        activations, not accumulators.
    """

    def __init__(self, low: np.dtype, rules: Mapping[str, str], scan_carry: str):
        self.low, self.rules, self.scan_carry = low, rules, scan_carry
        self._wanted: dict[Any, Any] = {}
        self._analyses: dict[Any, Analysis] = {}

    def analyse(
        self, jaxpr: Any, ins: Sequence[State], wanted: Sequence[bool]
    ) -> Analysis:
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
        changed = LOW in ins or any(
            LOW in d.outs or (d.bodies and d.rebuilt) for d in decisions
        )
        return Analysis(
            jaxpr, ins, tuple(decisions), tuple(map(state, jaxpr.outvars)), changed
        )

    def _decide(self, eqn: Any, ins: States, wants: Mapping[Any, bool]) -> Decision:
        name, wanted = _compat.primitive(eqn), _wanted(eqn, wants)
        if name == CONVERT:
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
            return Decision(EXACT, "", None, _all(eqn, None))
        kind, why = classify(eqn, self.low, self.rules)
        if not operands:
            made = kind == OPAQUE or any(map(_is_inexact, eqn.invars))
            return Decision(kind, why, None, _all(eqn, FULL if made else FREE))
        full = [w for v, w in zip(eqn.outvars, wanted, strict=True) if is_full(v)]
        run, out = _RUN[kind](max(operands), bool(full) and all(full))
        return Decision(kind, why, run, _all(eqn, out))

    def _convert(self, eqn: Any, state: State) -> Decision:
        (source,), (result,) = eqn.invars, eqn.outvars
        if is_full(source) and is_full(result):
            return Decision(CONVERT, "", None, (state,))
        if is_full(source):
            rounded = state == LOW and result.aval.dtype == self.low
            return Decision(CONVERT, "", None if rounded else FULL, (None,))
        # A low value that the user raised is meant to be in float32.
        return Decision(
            CONVERT, "", None, _all(eqn, FULL if _is_inexact(source) else FREE)
        )

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
        low = [
            self._may_lower(jaxpr, v, s)
            for v, s in zip(carries, ins[first:last], strict=True)
        ]
        while True:
            carry = [
                held(v, LOW if is_low else FULL)
                for v, is_low in zip(carries, low, strict=True)
            ]
            wanted = [s == FULL for s in carry] + [False] * (
                len(jaxpr.outvars) - len(carry)
            )
            body = self.analyse(jaxpr, (*ins[:first], *carry, *ins[last:]), wanted)
            leaving = body.outs[: len(carry)]
            still = [
                is_low and s != FULL for is_low, s in zip(low, leaving, strict=True)
            ]
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
                if classify(eqn, self.low, self.rules)[0] in (MATMUL, DENY):
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
            self.analyse(body, (*ins[a:b], *carry), [s == FULL for s in carry]).leaving(
                carry
            ),
        )
        return Decision(BODY, "", None, carry, bodies_)

    def _cond(self, eqn: Any, ins: States, wanted: Sequence[bool]) -> Decision:
        branches = [self.analyse(j, ins[1:], wanted) for j in bodies(eqn)]
        outs = tuple(
            None if s[0] is None else max(s)
            for s in zip(*(b.outs for b in branches), strict=True)
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
        if eqn.params.get("name") == FULL_PRECISION or name == CONVERT:
            return [True] * n
        if name in _CALLS:
            (body,) = bodies(eqn)
            inner = self._demand(body, outs)
            return [inner.get(v, True) for v in body.invars]
        if _compat.has_bodies(eqn):
            return [False] * n
        kind, _ = classify(eqn, self.low, self.rules)
        if kind == EXACT:
            return None
        if kind in (FOLLOW, LAYOUT, WIDE):
            full = [o for v, o in zip(eqn.outvars, outs, strict=True) if is_full(v)]
            return [all(full)] * n if full else None
        return [kind != MATMUL] * n


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


# Class -> (joined state of the operands, wanted in float32) -> (state to run in, state
# of the results).
_RUN = {
    MATMUL: lambda joined, wanted: (LOW, LOW),
    DENY: lambda joined, wanted: (FULL, FULL),
    OPAQUE: lambda joined, wanted: (FULL, FULL),
    EXACT: lambda joined, wanted: (FULL, FREE),
    LOCAL: _around,
    WIDE: _around,
    LAYOUT: _there,
    FOLLOW: _there_unless_wanted,
}
