"""Carry out what `_precision_analysis` decided: bind every equation in its new dtypes.

Inner jaxprs are rewritten once each. Functions with custom derivatives are built anew
with `jax.custom_jvp` and `jax.custom_vjp`: their rule differentiates the original
equation, in its original dtypes, and the trace of that is analysed and rewritten like
the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks import _jaxpr
from jaxtricks.amp import _precision_table as table
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
from jaxtricks.amp._product8 import (
    multiply,
    policy_of_products,
    round_once,
)
from jaxtricks.amp._product_roles import (
    AGAIN,
    ANY,
    COTANGENT,
    Choice,
    Choices,
    Chooser,
    Origins,
    of_bodies,
    of_eqns,
)
from jaxtricks.amp._rounding8 import Product, Rounded, Side

T = TypeVar("T")
Read = Callable[[Any, State], Any]
"""(variable or literal, state) -> its value, brought to the state."""

_FULL = np.dtype(np.float32)


class Emitter:
    """Binds analysed jaxprs in the caller's trace.

    Args:
      analyzer: what decided; derivatives of custom rules are analysed when they are
        traced.
      chooser: what chose the products in 8 bits, if there are any.
    """

    def __init__(self, analyzer: Analyzer, chooser: Chooser | None):
        self.analyzer = analyzer
        self.chooser = chooser
        self.low = analyzer.low
        self._rewritten: dict[Any, _jaxpr.ClosedJaxpr] = {}

    def run(
        self,
        analysis: Analysis,
        consts: Sequence[Any],
        args: Sequence[Any],
        choices: Choices | None,
    ) -> list[Any]:
        """Return the results, in the states of `analysis.outs`.

        Args:
          analysis: of the jaxpr.
          consts: of the jaxpr.
          args: inputs, in the states of `analysis.ins`.
          choices: of products in 8 bits.
        """
        jaxpr = analysis.jaxpr
        variables = (*jaxpr.constvars, *jaxpr.invars)
        values = dict(zip(variables, (*consts, *args), strict=True))
        # A shared raise keeps the cotangents of its uses in float32 until they are
        # added. Lowered values are not shared: each use rounds anew (XLA merges the
        # casts), and the cotangents of a weight's uses add in float32.
        raised: dict[Any, Any] = {}
        compared = _compared_variables(analysis)
        rounded: dict[Any, Rounded | None] = {}

        def read(v: Any, state: State) -> Any:
            if _jaxpr.is_literal(v):
                return (
                    np.asarray(v.val, self._dtype(state))
                    if is_full(v)
                    else v.val
                )
            x = values[v]
            if not is_full(v) or state is None:
                return x
            if state == LOW or x.dtype == _FULL:
                return self.cast(x, state)
            # Low, and needed in float32.
            if v not in raised:
                raised[v] = (
                    self._rounded(x) if v in compared else self.cast(x, FULL)
                )
            return raised[v]

        for eqn, decision, choice in zip(
            jaxpr.eqns,
            analysis.decisions,
            of_eqns(choices, jaxpr),
            strict=True,
        ):
            with _jaxpr.source_context(eqn) as bare:
                results = self._bind(bare, decision, choice, read, rounded)
            values.update(zip(eqn.outvars, results, strict=True))
        return [
            read(v, s)
            for v, s in zip(jaxpr.outvars, analysis.outs, strict=True)
        ]

    def cast(
        self,
        x: Any,
        state: State,
    ) -> Any:
        """Return a float32 or low value, brought to a state."""
        dtype = self._dtype(state)
        return x if x.dtype == dtype else lax.convert_element_type(x, dtype)

    def _closed(
        self,
        analysis: Analysis,
        consts: Sequence[Any],
        choices: Choices | None,
    ) -> _jaxpr.ClosedJaxpr:
        """Return the rewritten jaxpr, closed."""
        key = (
            analysis.jaxpr,
            analysis.ins,
            analysis.decisions,
            analysis.outs,
            choices,
        )
        if key not in self._rewritten:
            avals = [
                v.aval.update(dtype=self.low) if state == LOW else v.aval
                for v, state in zip(
                    analysis.jaxpr.invars, analysis.ins, strict=True
                )
            ]
            run = lambda *args: self.run(analysis, consts, args, choices)  # noqa: E731
            self._rewritten[key] = jax.make_jaxpr(run)(*avals)
        return self._rewritten[key]

    def _dtype(self, state: State) -> np.dtype:
        return self.low if state == LOW else _FULL

    def _bind(
        self,
        eqn: Any,
        decision: Decision,
        choice: Choice | None,
        read: Read,
        rounded: dict[Any, Rounded | None],
    ) -> list[Any]:
        if decision.bodies and decision.rebuilt:
            return self._bind_with_bodies(eqn, decision, choice, read)
        name = _jaxpr.primitive(eqn)
        runs_low = decision.run == LOW
        if (
            name == table.CONVERT
            and decision.run is None
            and is_full(eqn.invars[0])
        ):
            # To float32 again, or to low and already there.
            return [read(eqn.invars[0], None)]
        if decision.kind == table.FOLLOW and runs_low:
            operands = [self._spread(eqn, v, read) for v in eqn.invars]
        elif _compares(eqn, decision):
            operands = [read(v, FULL) for v in eqn.invars]
        else:
            operands = [read(v, decision.run) for v in eqn.invars]
        if name == "broadcast_in_dim" and runs_low:
            # It only adds axes of size 1; as a reshape its derivative is no sum.
            return [lax.reshape(operands[0], eqn.outvars[0].aval.shape)]
        if runs_low and choice is not None and choice.sides is not None:
            return [self._product8(eqn, operands, choice.sides, rounded)]
        changes = {}
        # Else JAX would take the dtype of the original result, float32.
        if decision.kind == table.MATMUL and runs_low:
            changes["preferred_element_type"] = self.low
        results = _jaxpr.bind(eqn, operands, **changes)
        states = zip(results, decision.outs, strict=True)
        return [x if s is None else self.cast(x, s) for x, s in states]

    def _product8(
        self,
        eqn: Any,
        operands: Sequence[Any],
        sides: Sequence[Side],
        rounded: dict[Any, Rounded | None],
    ) -> Any:
        """Return a product in 8 bits.

        Args:
          eqn: the product.
          operands: low.
          sides: how they are rounded.
          rounded: {(variable, how): the operand rounded}, which is added to.
        """
        product = Product.of(eqn)
        ready = []
        with eqn.ctx.manager:
            for i, (v, x, side) in enumerate(
                zip(eqn.invars, operands, sides, strict=True)
            ):
                if _jaxpr.is_literal(v):
                    ready.append(None)
                    continue
                key = v, side, side.scale_axes(product, i, x.ndim)
                if key not in rounded:
                    rounded[key] = round_once(product, x, i, side)
                ready.append(rounded[key])
            return multiply(product, operands, sides, ready)

    def _spread(
        self,
        eqn: Any,
        v: Any,
        read: Read,
    ) -> Any:
        """Return a low operand, broadcast before it is rounded if at all.

        What the operation would broadcast is summed by its derivative, in float32 this
        way. A literal has no derivative.
        """
        shape = eqn.outvars[0].aval.shape
        if _jaxpr.is_literal(v) or not is_full(v) or v.aval.shape == shape:
            return read(v, LOW)
        # Operands align at their last axes.
        axes = range(len(shape) - v.aval.ndim, len(shape))
        spread = lax.broadcast_in_dim(read(v, FULL), shape, tuple(axes))
        return self.cast(spread, LOW)

    def _rounded(self, x: Any) -> Any:
        """Return a low value in float32, where something compares it.

        XLA may drop a rounding that float32 follows, on one side only: then the largest
        value of an array would equal none of its elements.
        """
        bits = jnp.finfo(self.low)
        return lax.reduce_precision(
            self.cast(x, FULL),
            exponent_bits=bits.nexp,
            mantissa_bits=bits.nmant,
        )

    def _bind_with_bodies(
        self,
        eqn: Any,
        decision: Decision,
        choice: Choice | None,
        read: Read,
    ) -> list[Any]:
        name = _jaxpr.primitive(eqn)
        analyses = decision.bodies
        chosen = of_bodies(choice, len(analyses))
        expected = zip(eqn.invars, _expected(eqn, analyses), strict=True)
        operands = [read(v, state) for v, state in expected]
        if name == "custom_jvp_call":
            return _custom_jvp(self, eqn, analyses[0], choice, operands)
        if name == "custom_vjp_call":
            return _custom_vjp(self, eqn, analyses[0], choice, operands)
        if name == "shard_map":
            # Its body can be traced only inside it, where its axes are bound.
            run = lambda *args: self.run(analyses[0], (), args, chosen[0])  # noqa: E731
            return jax.shard_map(run, **_jaxpr.shard_map_arguments(eqn))(
                *operands
            )
        # Loops, branches, jit and checkpoint take any bodies that fit together.
        new_bodies = [
            self._closed(body, old.consts, choices)
            for body, old, choices in zip(
                analyses, _jaxpr.bodies(eqn), chosen, strict=True
            )
        ]
        changes = {}
        policy = _jaxpr.policy_of(eqn)
        if name == "checkpoint" and choice is not None and policy is not None:
            changes["policy"] = policy_of_products(policy)
        return _jaxpr.bind_with_bodies(eqn, operands, new_bodies, **changes)


def _compares(eqn: Any, decision: Decision) -> bool:
    """Return whether an equation compares its operands, or its derivative will."""
    chooses = decision.run == FULL and _jaxpr.primitive(eqn) in table.CHOICES
    return chooses or decision.kind == table.EXACT


def _compared_variables(analysis: Analysis) -> set[Any]:
    compared: set[Any] = set()
    pairs = zip(analysis.jaxpr.eqns, analysis.decisions, strict=True)
    for eqn, decision in pairs:
        if _compares(eqn, decision):
            compared.update(v for v in eqn.invars if not _jaxpr.is_literal(v))
    return compared


def _expected(
    eqn: Any,
    analyses: Sequence[Analysis],
) -> list[State]:
    """Return the states in which the bodies of an equation expect its operands."""
    first = analyses[0].ins
    name = _jaxpr.primitive(eqn)
    # The first operand of a cond chooses the branch.
    if name == "cond":
        return [None, *first]
    if name == "while":
        cond_consts, _ = _jaxpr.while_consts(eqn)
        return [*first[:cond_consts], *analyses[1].ins]
    return list(first)


# Functions with custom derivatives.


def _custom_jvp(
    emitter: Emitter,
    eqn: Any,
    body: Analysis,
    choice: Choice | None,
    operands: Sequence[Any],
) -> list[Any]:
    """Return the results of a rewritten `custom_jvp_call`."""
    choices, origins = _of_call(eqn, choice)
    consts = _jaxpr.bodies(eqn)[0].consts
    has_tangent = _are_inexact(eqn.outvars)
    avals = [v.aval for v in eqn.invars]
    n = len(avals)

    def run(*args: Any) -> list[Any]:
        return emitter.run(body, consts, args, choices)

    run.__name__ = _jaxpr.function_name(eqn) or run.__name__
    function = jax.custom_jvp(run)

    @function.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        varied = [t.dtype != jax.dtypes.float0 for t in tangents]

        def derivative(*xs: Any) -> Any:
            primals, tangents = xs[:n], xs[n:]
            fn = _of_some(eqn, primals, varied)
            outs, rates = jax.jvp(fn, tuple(_select(primals, varied)), tangents)
            return [*outs, *_select(rates, has_tangent)]

        # Tangents have the states of their primals.
        results, _ = _rewritten(
            emitter,
            derivative,
            [*avals, *_select(avals, varied)],
            [*body.ins, *_select(body.ins, varied)],
            [*body.outs, *_select(body.outs, has_tangent)],
            [*primals, *_select(tangents, varied)],
            [*origins, *(COTANGENT for is_varied in varied if is_varied)],
        )
        outs, rates = results[: len(has_tangent)], results[len(has_tangent) :]
        return outs, _with_zeros(rates, outs, has_tangent)

    return function(*operands)


def _custom_vjp(
    emitter: Emitter,
    eqn: Any,
    body: Analysis,
    choice: Choice | None,
    operands: Sequence[Any],
) -> list[Any]:
    """Return the results of a rewritten `custom_vjp_call`."""
    choices, origins = _of_call(eqn, choice)
    consts = _jaxpr.bodies(eqn)[0].consts
    avals = [v.aval for v in eqn.invars]
    out_avals = [v.aval for v in eqn.outvars]
    varied, has_cotangent = _are_inexact(eqn.invars), _are_inexact(eqn.outvars)
    outputs = len(out_avals)
    residuals = _Residuals()

    @jax.custom_vjp
    def function(*args: Any) -> list[Any]:
        return emitter.run(body, consts, args, choices)

    def forward(*args: Any) -> Any:
        def original(*args: Any) -> Any:
            fn = _of_some(eqn, args, varied)
            outs, pullback = jax.vjp(fn, *_select(args, varied))
            # The arrays inside a pullback are what the user's rule saves.
            return [*outs, *residuals.flatten(pullback)]

        outs = [*body.outs, ...]
        results, out_origins = _rewritten(
            emitter, original, avals, body.ins, outs, args, origins
        )
        saved = results[outputs:]
        residuals.origins = out_origins[outputs:]
        residuals.is_low = [
            x.dtype != aval.dtype
            for x, aval in zip(saved, residuals.avals, strict=True)
        ]
        return results[:outputs], saved

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        n = len(saved)

        def original(*args: Any) -> Any:
            cotangents = _with_zeros(args[n:], out_avals, has_cotangent)
            return residuals.unflatten(args[:n])(cotangents)

        given = _select(cotangents, has_cotangent)
        gradients, _ = _rewritten(
            emitter,
            original,
            [*residuals.avals, *_select(out_avals, has_cotangent)],
            [*residuals.states(), *_select(body.outs, has_cotangent)],
            _select(body.ins, varied),
            [*saved, *given],
            [*residuals.origins, *(COTANGENT for _ in given)],
        )
        return tuple(_with_zeros(gradients, avals, varied))

    function.defvjp(forward, backward)
    return function(*operands)


class _Residuals:
    """Structure of the saved residuals, which the backward rule needs beside the arrays.

    Attributes:
      structure: of the pullback, whose leaves are the arrays.
      avals: of these arrays before the rewrite.
      is_low: which of them the rewrite left in the compute dtype.
      origins: of them, in `_product_roles`.
    """

    structure: Any
    avals: list[Any]
    is_low: list[bool]
    origins: Sequence[int]

    def flatten(self, pullback: Any) -> list[Any]:
        leaves, self.structure = jax.tree.flatten(pullback)
        self.avals = [jax.typeof(x) for x in leaves]
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, leaves)

    def states(self) -> list[State]:
        states: list[State] = []
        for aval, is_low in zip(self.avals, self.is_low, strict=True):
            if aval.dtype != np.float32:
                states.append(None)
            else:
                states.append(LOW if is_low else FREE)
        return states


def _rewritten(
    emitter: Emitter,
    fn: Callable[..., Any],
    avals: Sequence[Any],
    ins: Sequence[State],
    outs: Sequence[Any],
    args: Sequence[Any],
    origins: Sequence[int],
) -> tuple[list[Any], Origins]:
    """Return the results of fn's rewritten trace, and their origins.

    Args:
      emitter: rewrites it.
      fn: a function of arrays, in the original dtypes.
      avals: of its arguments.
      ins: states of its arguments.
      outs: states of its results; `...` at the end: the rest leave as they come.
      args: the arguments in their states.
      origins: of the arguments, in `_product_roles`.
    """
    closed = jax.make_jaxpr(fn)(*avals)
    demanded = [False] * len(closed.jaxpr.outvars)
    analysis = emitter.analyzer.analyse(closed.jaxpr, ins, demanded)
    if outs and outs[-1] is ...:
        outs = [*outs[:-1], *analysis.outs[len(outs) - 1 :]]
    choices = None
    if emitter.chooser is not None:
        # What follows a part of a function is not known when it is differentiated; the
        # products that it had before tell their roles.
        followed = [ANY] * len(closed.jaxpr.outvars)
        choices = emitter.chooser.choose(closed.jaxpr, origins, followed, AGAIN)
    results = emitter.run(analysis.leaving(outs), closed.consts, args, choices)
    return results, choices.outs if choices else (0,) * len(results)


def _of_call(eqn: Any, choice: Choice | None) -> tuple[Choices | None, Origins]:
    """Return the choices for the body of a call, and the origins of its operands."""
    if choice is None:
        return None, (0,) * len(eqn.invars)
    return choice.bodies[0], choice.operands


def _of_some(
    eqn: Any,
    args: Sequence[Any],
    varied: Sequence[bool],
) -> Callable[..., list[Any]]:
    """Return the original equation as a function of its varied operands."""

    def fn(*some: Any) -> list[Any]:
        remaining = iter(some)
        operands = [
            next(remaining) if is_varied else x
            for x, is_varied in zip(args, varied, strict=True)
        ]
        return _jaxpr.bind(eqn, operands)

    return fn


def _are_inexact(variables: Sequence[Any]) -> list[bool]:
    """Return which of them have tangents: floating and complex ones."""
    return [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in variables]


def _select(
    xs: Sequence[T],
    is_selected: Sequence[bool],
) -> list[T]:
    return [x for x, selected in zip(xs, is_selected, strict=True) if selected]


def _with_zeros(
    tangents: Sequence[Any],
    like: Sequence[Any],
    has_tangent: Sequence[bool],
) -> list[Any]:
    """Return all tangents, with the zeros that JAX expects where there is none."""
    remaining = iter(tangents)
    return [
        next(remaining) if has else np.zeros(x.shape, jax.dtypes.float0)
        for x, has in zip(like, has_tangent, strict=True)
    ]
