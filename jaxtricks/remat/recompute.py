"""Recompute in the backward pass, ordered after the cotangent by data."""

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxtricks import _compat, _jaxpr
from jaxtricks._arguments import checked
from jaxtricks._partition import Call, refuse_module
from jaxtricks.remat import _recompute, flat

Ad = Literal["reverse", "both"]
_FORWARD = {
    "reverse": 'pass ad="both" for jax.hessian or jax.jvp of jax.grad, or fn itself for jax.jvp alone',
    "both": "forward mode alone stores nothing, so pass fn itself",
}
# ({input: what is differentiated}, {input: what is not}, values of the saved equations)
Residuals = tuple[dict[int, Any], dict[int, Any], list[Any]]


@checked
def recompute_grad(fn: Callable[..., Any], *, seed: Any = None, ad: Ad = "reverse") -> Any:
    """fn that keeps only its inputs for the backward pass and runs again there.

    Values and gradients are those of fn, bit for bit where XLA compiles both passes alike. Tracers that
    fn closes over are inputs like the others and receive gradients. Arguments that are no arrays
    (strings, booleans, None, callables) are static.

    Args:
      fn: any function of pytrees; keyword arguments are allowed.
      seed: accepted for the signature of TensorFlow's recompute_grad and unneeded: keys are inputs.
      ad: "reverse" differentiates in reverse mode as often as you like, and recomputes in every order.
        "both" allows forward over reverse (`jax.hessian`, `jax.jvp` of `jax.grad`); reverse over reverse
        then keeps what the first pass made. Forward mode alone stores nothing: use fn itself.

    Returns:
      A function with the signature of fn.

    Raises:
      ValueError: for another ad, for a flax.nnx module, or if fn changes an argument in place.
      TypeError: in forward mode, unless ad is "both".

    Example:
      >>> f = recompute_grad(lambda x: jnp.sin(jnp.sin(x)))
      >>> float(jax.grad(f)(jnp.float32(0.0)))
      1.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, algorithm 1.
    """
    del seed
    refuse_module(fn, "recompute_grad")
    if ad not in ("reverse", "both"):
        raise ValueError(f'ad must be "reverse" or "both", not {ad!r}')

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = Call(fn, args, kwargs, nnx="recompute_grad")
        # The trace turns closed-over tracers into inputs: a custom_vjp may not close over them.
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        try:
            outs = recomputed(closed.jaxpr, ad=ad)(*closed.consts, *call.arrays)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                f"remat.recompute_grad can't be differentiated forward here: {_FORWARD[ad]}"
            ) from error
        return call.assemble(outs)

    return wrapped


def recomputed(
    jaxpr: _jaxpr.Jaxpr,
    *,
    saved: Collection[int] = (),
    ordered: bool = True,
    ad: Ad = "reverse",
) -> Callable[..., list[Any]]:
    """The jaxpr as a function of (*constvars, *invars) that runs again in the backward pass.

    Args:
      jaxpr: what to run; inlined if anything is saved.
      saved: indices of equations whose results are kept and not computed again.
      ordered: make the second run wait for the cotangent. Bodies of loops need no order: their backward
        pass is another computation, nothing of the first pass is in it to be merged with.
      ad: see `recompute_grad`.
    """
    kept = [v for i in sorted(saved) for v in jaxpr.eqns[i].outvars]
    outputs = len(jaxpr.outvars)
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    tied = sorted(_recompute.tied_inputs(jaxpr, saved)) if ordered else []
    first = _jaxpr.as_fun(_jaxpr.made((), inputs, [*jaxpr.outvars, *kept], jaxpr.eqns))
    again = flat.replaced(jaxpr, saved) if kept else lambda xs, _: first((), *xs)

    # The name is what `is_recomputed` finds in a trace.
    @jax.custom_vjp
    def jaxtricks_recomputed(*xs: Any) -> list[Any]:
        return first((), *xs)[:outputs]

    def forward(*primals: Any) -> tuple[list[Any], Residuals]:
        xs = [p.value for p in primals]
        moving = {i: p.value for i, p in enumerate(primals) if p.perturbed}
        fixed = {i: p.value for i, p in enumerate(primals) if not p.perturbed}
        if ad == "reverse" and not kept:
            return jaxtricks_recomputed(*xs), (moving, fixed, [])
        results = first((), *xs)
        return results[:outputs], (moving, fixed, results[outputs:])

    def backward(residuals: Residuals, cotangents: list[Any]) -> tuple[Any, ...]:
        moving, fixed, values = residuals
        xs, cotangents = moving | fixed, list(map(_instantiated, cotangents))
        if ordered:
            late, cotangents = _recompute.wait([*(xs[i] for i in tied), *values], cotangents)
            values = late[len(tied) :]
            xs |= dict(zip(tied, late, strict=False))

        def rerun(moving: dict[int, Any]) -> list[Any]:
            return again([(xs | moving)[i] for i in range(len(xs))], values)

        (found,) = jax.vjp(rerun, {i: xs[i] for i in moving})[1](cotangents)
        return tuple(found.get(i) for i in range(len(xs)))

    jaxtricks_recomputed.defvjp(forward, backward, symbolic_zeros=True)
    return jaxtricks_recomputed


def is_recomputed(eqn: Any) -> bool:
    """Whether an equation is a call of what `recomputed` returns."""
    if _compat.primitive(eqn) != "custom_vjp_call":
        return False
    info = _compat.bodies(eqn)[0].jaxpr.debug_info
    return info is not None and info.func_src_info.startswith("jaxtricks_recomputed ")


def _instantiated(ct: Any) -> Any:
    if not isinstance(ct, SymbolicZero):
        return ct
    aval: Any = ct
    return (np if aval.dtype == jax.dtypes.float0 else jnp).zeros(aval.shape, aval.dtype)
