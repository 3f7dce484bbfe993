"""Mixed precision as a rewrite of the traced function.

`_precision_analysis` decides which operation runs in which dtype, `_rewrite` binds it.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _compat, _jaxpr
from jaxtricks._arguments import check_regex, checked
from jaxtricks._partition import Call
from jaxtricks.amp._policy import Policy, as_policy
from jaxtricks.amp._precision_analysis import (
    FREE,
    FULL,
    FULL_PRECISION,
    LOW,
    Analysis,
    Analyzer,
    held,
    is_full,
)
from jaxtricks.amp._precision_table import check_rules
from jaxtricks.amp._product_roles import ROLES, Choices, Chooser
from jaxtricks.amp._rewrite import Emitter
from jaxtricks.amp._rounding8 import FORMATS, SCALINGS, Scaling

P = ParamSpec("P")
R = TypeVar("R")
Rules = Mapping[str, str]
"""{primitive: class in `_precision_table`; role or source line of products: dtype}."""
ScanCarry = Literal["layers", "auto", "keep"]

DEFAULT = "p=f32,c=bf16,o=f32"


@checked
def autocast(
    fn: Callable[P, R],
    policy: Policy | str = DEFAULT,
    *,
    rules: Rules | None = None,
    scan_carry: ScanCarry = "layers",
    scaling: Scaling = "tensor",
) -> Callable[P, R]:
    """Run the products of fn in the compute dtype, its sensitive operations in float32.

    fn is traced at every call, and its float32 operations are rewritten by a table of
    primitives: matrix products and convolutions in the compute dtype; sums,
    exponentials, logarithms, powers and linear algebra in float32; the rest where their
    operands are. Parameters stay float32 and so do their gradients. Other dtypes
    (float64, integers, what is already 16-bit), products with a `precision=` above
    DEFAULT, inner products and kernels that cannot be looked into are left as they are:
    `amp.explain` lists them. It goes inside or outside of grad, jit, vmap, shard_map
    and jax.checkpoint.

    With "p=f32,c=f8,o=f32" the rest runs as with bfloat16, and products round their
    operands to float8_e4m3fn, cotangents to float8_e5m2 (in convolutions, whose operands
    have one dtype, to float8_e4m3fn), and add in float32. Scales are powers of two,
    taken from the largest finite magnitude in every step; there is no state. "c=i8"
    rounds the operands to int8, for quantization-aware training: gradients pass straight
    through, in bfloat16.

    Args:
      fn: any function of pytrees, traced as jax.jit would; leaves that are not
        arrays are static.
      policy: a Policy or its text. `compute` is bfloat16, float16, float8_e4m3fn or
        int8 (float32 rewrites nothing); `output` is the dtype of what was float32 in
        fn's results.
      rules: {primitive: class} in place of the table's rows, e.g. {"tanh": "deny"}. With
        8 bits also {role: dtype} for the products that stay in bfloat16 by default,
        e.g. {"attention": "f8"}: "first" (of two inputs of fn), "last" (no product
        follows) and "attention" (of activations, under batch axes); and {pattern:
        "bf16"} for products whose source line, as `explain` prints it, has the regular
        expression in it, e.g. {r"model.py:12": "bf16"}.
      scan_carry: which float32 carries of lax.scan are lowered. "layers": the
        activations of layers whose kernels are scanned. "auto": whatever a product sees
        and that comes out low, states of recurrent networks too. "keep": none.
      scaling: which entries share a scale in 8 bits: "tensor" (all; under vmap and for
        batch axes of a product, each index has its own), "row" (those that one result
        sums), "block32" (32 of these, as in the MX formats: rounded so and multiplied
        in bfloat16, since few devices multiply it).

    Returns:
      A function with the signature of fn. float16 needs loss scaling:
      `amp.dynamic_loss_scale`.

    Raises:
      ValueError: a policy or a rule that does not parse; (at the call) Refs, or an
        argument that fn changes in place.

    Example:
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> print(jax.make_jaxpr(autocast(lambda w, x: x @ w))(w, x).out_avals[0])
      float32[4,2]

    References:
      The idea of the rewrite: TensorFlow's auto_mixed_precision graph pass.
    """
    settings = Settings.of(policy, rules, scan_carry, scaling)

    @functools.wraps(fn)
    def cast(*args: P.args, **kwargs: P.kwargs) -> R:
        traced = settings.trace(fn, args, kwargs)
        program, call = traced.jaxpr, traced.call
        emitter = Emitter(traced.analyzer, traced.chooser)
        outs = emitter.run(
            traced.analysis, program.consts, call.arrays, traced.choices
        )
        return call.assemble(settings.leave(outs, program.jaxpr.outvars))

    return cast


@checked
def full_precision(fn: Callable[P, R]) -> Callable[P, R]:
    """Let a surrounding `autocast` leave fn and its derivatives in float32.

    Outside of autocast it is jax.jit(fn); leaves that are not arrays are static.

    Example:
      >>> logits = jnp.ones((2, 2))
      >>> full_precision(lambda x: x @ x)(logits).dtype
      dtype('float32')
    """

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        call = Call(fn, args, kwargs)
        region = lambda *arrays: call.run(*arrays)  # noqa: E731
        # The analysis looks for this name.
        region.__name__ = FULL_PRECISION
        return call.assemble(jax.jit(region)(*call.arrays))

    return wrapped


class Traced(NamedTuple):
    """A traced and analysed call.

    Attributes:
      call: the call.
      jaxpr: its trace.
      analyzer: what made the analysis.
      analysis: how every equation runs.
      chooser: what made the choices; None without 8 bits.
      choices: which products run in 8 bits.
    """

    call: Call
    jaxpr: _jaxpr.ClosedJaxpr
    analyzer: Analyzer
    analysis: Analysis
    chooser: Chooser | None
    choices: Choices | None


class Settings(NamedTuple):
    """The checked arguments of `autocast` and `explain`."""

    policy: Policy
    rules: dict[str, str]
    products: dict[str, str]
    scan_carry: str
    scaling: str

    @classmethod
    def of(
        cls,
        policy: Policy | str,
        rules: Rules | None,
        scan_carry: str,
        scaling: str,
    ) -> "Settings":
        """Check the arguments of `autocast`, which says what raises ValueError."""
        policy = as_policy(policy)
        wide = (np.float32, np.float16, jnp.bfloat16)
        if policy.compute not in (*wide, *map(np.dtype, FORMATS)):
            raise ValueError(
                f"amp.autocast: the policy computes in {policy.compute}; use "
                "bfloat16, float16, float8_e4m3fn, int8 or float32"
            )
        if scaling not in SCALINGS:
            raise ValueError(
                f"amp.autocast: `scaling` is {scaling!r}; use one of "
                f"{', '.join(SCALINGS)}"
            )
        products = {
            key: value
            for key, value in (rules or {}).items()
            if _is_of_products(key)
        }
        _check_product_rules(products, policy)
        rules = {k: v for k, v in (rules or {}).items() if k not in products}
        if scan_carry not in ("layers", "auto", "keep"):
            raise ValueError(
                f"amp.autocast: `scan_carry` is {scan_carry!r}; use 'layers', "
                "'auto' or 'keep'"
            )
        return cls(policy, check_rules(rules), products, scan_carry, scaling)

    def trace(
        self,
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Traced:
        """Trace and analyse fn(*args, **kwargs).

        Raises:
          ValueError: the function uses Refs.
        """
        call = Call(fn, args, kwargs)
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        _refuse_refs(closed.jaxpr)
        analyzer = Analyzer(self.policy.arrays, self.rules, self.scan_carry)
        # Results that leave low anyway need not be raised first.
        leaving = LOW if self.policy.output == self.policy.arrays else FULL
        outs = [held(v, leaving) for v in closed.jaxpr.outvars]
        ins = [held(v, FREE) for v in closed.jaxpr.invars]
        demanded = [state == FULL for state in outs]
        analysis = analyzer.analyse(closed.jaxpr, ins, demanded)
        chooser = self._chooser()
        choices = None if chooser is None else chooser.whole(closed.jaxpr)
        return Traced(
            call, closed, analyzer, analysis.leaving(outs), chooser, choices
        )

    def _chooser(self) -> Chooser | None:
        if not self.policy.has_8_bits:
            return None
        wide = {
            role for role in ROLES if self.products.get(role, "bf16") == "bf16"
        }
        patterns = [
            re.compile(key) for key in self.products if key not in ROLES
        ]

        def is_wide(eqn: Any) -> bool:
            if not patterns:
                return False
            line = _jaxpr.source_line(eqn)
            return any(pattern.search(line) for pattern in patterns)

        return Chooser(
            self.policy.compute.name, self.scaling, frozenset(wide), is_wide
        )

    def leave(
        self,
        outs: list[Any],
        like: list[Any],
    ) -> list[Any]:
        """Return results in the dtypes (and weak types) of the function's.

        Those that were float32 are in the output dtype of the policy.

        Args:
          outs: results of the rewritten function.
          like: variables of the original one.
        """
        return [
            self._leave(x, v.aval) if is_full(v) else x
            for x, v in zip(outs, like, strict=True)
        ]

    def _leave(
        self,
        x: Any,
        aval: Any,
    ) -> Any:
        if self.policy.output != np.float32:
            return x.astype(self.policy.output)
        # A loss that is weakly typed must not promote what it meets now.
        if aval.weak_type and not jax.typeof(x).weak_type:
            return _compat.weakly_typed(x, aval.dtype)
        return x


def _is_of_products(key: str) -> bool:
    """Return whether a key of `rules` is a role or a source line, not a primitive."""
    return key in ROLES or not key.replace("-", "_").isidentifier()


def _check_product_rules(products: Mapping[str, str], policy: Policy) -> None:
    if products and not policy.has_8_bits:
        raise ValueError(
            f"amp.autocast: `rules` has {next(iter(products))!r}, which is for "
            'products in 8 bits; compute in them ("c=f8") or name a primitive'
        )
    narrow = str(policy).split(",")[1].removeprefix("c=")
    for key, value in products.items():
        allowed = ("bf16", narrow) if key in ROLES else ("bf16",)
        if value not in allowed:
            raise ValueError(
                f"amp.autocast: `rules` gives {key!r} the dtype {value!r}; use "
                f"{' or '.join(allowed)}"
            )
        if key not in ROLES:
            check_regex("amp.autocast: `rules`", key)


def _refuse_refs(jaxpr: _jaxpr.Jaxpr) -> None:
    for eqn in jaxpr.eqns:
        if _jaxpr.function_name(eqn) == FULL_PRECISION:
            continue
        if any(map(_is_ref, eqn.invars)):
            raise ValueError(
                "amp.autocast: the function uses a Ref at "
                f"{_jaxpr.source_line(eqn)}, which has a fixed dtype; pass and "
                "return arrays instead, or wrap that part in amp.full_precision"
            )
        # The Refs of a Pallas kernel stay inside it.
        if _jaxpr.has_bodies(eqn):
            for inner in _jaxpr.sub_jaxprs(eqn):
                _refuse_refs(inner)


def _is_ref(v: Any) -> bool:
    # The future of a collective operation (since jax 0.12) holds an array as well.
    holds = not _jaxpr.is_literal(v) and hasattr(v.aval, "inner_aval")
    return holds and not hasattr(v.aval, "done_fun")
