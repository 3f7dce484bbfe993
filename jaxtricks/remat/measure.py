"""What a compiled program needs: bytes from XLA's buffer assignment, FLOPs from the jaxpr."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _jaxpr, _table
from jaxtricks.remat import flat


class Report(NamedTuple):
    """Memory and arithmetic of one compiled function.

    Attributes:
      temp: bytes of temporaries.
      args, outs: bytes of arguments and results.
      alias: bytes of results that reuse donated arguments.
      peak: args + outs - alias + temp, bytes.
      flops: floating-point operations, loop bodies counted as often as they run.
    """

    temp: int
    args: int
    outs: int
    alias: int
    peak: int
    flops: int

    def __str__(self) -> str:
        rows = [(f, _table.format_bytes(getattr(self, f))) for f in self._fields[:-1]]
        return str(_table.make(("memory", "bytes"), [*rows, ("flops", f"{self.flops:.3e}")]))


def memory(fn: Callable[..., Any], *args: Any) -> Report:
    """Bytes and FLOPs of fn(*args), compiled for the default backend; nothing is run.

    Args:
      fn: a function, or one already jitted (its donation and shardings are respected).
      *args: arrays or ShapeDtypeStructs.

    Returns:
      Report; the constant that some backends add to their temporaries is measured with a trivial
      program and subtracted.

    Example:
      >>> memory(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), jnp.float32)).flops
      1024
    """
    jitted: Any = fn if hasattr(fn, "trace") else jax.jit(fn)
    traced = jitted.trace(*args)
    return report(traced.lower().compile(), traced.jaxpr)


def report(compiled: Any, program: _jaxpr.ClosedJaxpr) -> Report:
    """Report of an executable and the jaxpr it was made from; dead code counts no operations."""
    m = compiled.memory_analysis()
    temp = max(0, m.temp_size_in_bytes - _constant_temp())
    args, outs, alias = m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes
    needed = flops(flat.live(program))
    return Report(temp, args, outs, alias, args + outs - alias + temp, needed)


def refusal(error: Exception, program: _jaxpr.ClosedJaxpr) -> Report | None:
    """Report of a program that the compiler refused for want of memory; None if that is not what it said.

    TPU's compiler names what the program would need; arguments and results stay uncounted.
    """
    text = str(error)
    found = re.search(r"(?:temporaries \(|Used )([0-9.]+)([KMG]?)", text)
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        return None
    temp = int(float(found[1]) * 1024 ** " KMG".index(found[2] or " "))
    return Report(temp, 0, 0, 0, temp, flops(flat.live(program)))


def flops(jaxpr: _jaxpr.Jaxpr) -> int:
    """Floating-point operations: 2 a multiply-add of matrix products, 1 an element elsewhere.

    The body of a scan counts as often as it runs, the dearest branch of a cond once, the body of a
    while loop once (its trip count is not in the program).
    """
    return sum(map(eqn_flops, jaxpr.eqns))


def eqn_flops(eqn: Any) -> int:
    """Floating-point operations of one equation; see `flops`."""
    name, inner = eqn.primitive.name, list(_jaxpr.sub_jaxprs(eqn))
    if name == "scan":
        return eqn.params["length"] * flops(inner[0])
    if name == "cond":
        return max(map(flops, inner))
    if name in ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"):
        return flops(inner[0])  # the rest are rules, not run here
    if inner:
        return sum(map(flops, inner))
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * _size(eqn.outvars[0]) * math.prod(lhs[i] for i in contract)
    if name == "conv_general_dilated":
        rhs_spec = eqn.params["dimension_numbers"].rhs_spec
        kernel = eqn.invars[1].aval.shape
        sums = 2 * _size(eqn.outvars[0]) * math.prod(kernel) // max(1, kernel[rhs_spec[0]])
        # The gradient of a strided convolution reads zeros between its inputs: no work.
        return sums // math.prod(eqn.params["lhs_dilation"])
    if name.startswith("reduce_"):
        return max(map(_float_size, eqn.invars))
    return sum(map(_float_size, eqn.outvars)) if name in _ELEMENTWISE else 0


# One operation an element; layout, comparison, integer and conversion primitives count as none.
_ELEMENTWISE = frozenset(
    " ".join(
        (
            "add sub mul div neg abs sign max min square integer_pow pow sqrt rsqrt cbrt add_any cumsum",
            "exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv",
            "sin cos tan asin acos atan atan2 sinh cosh",
        )
    ).split()
)


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)


def _float_size(var: Any) -> int:
    dtype = getattr(var.aval, "dtype", None)
    return _size(var) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else 0


def _constant_temp() -> int:
    # libtpu reports 2**32 more than a program uses; XLA's CPU backend reports 0.
    compiled: Any = jax.jit(lambda x: x + 1).lower(jnp.float32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes
