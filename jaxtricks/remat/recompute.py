"""Recompute in the backward pass, ordered after the cotangent by data."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _jaxpr, _tree
from jaxtricks._call import Call
from jaxtricks._types import Array


def recompute_grad(fn: Callable[..., Any], *, seed: Any = None) -> Callable[..., Any]:
    """fn that keeps only its inputs for the backward pass and runs again there.

    Values and gradients are those of fn, bit for bit where XLA compiles both passes alike. Tracers that
    fn closes over are inputs like the others and receive gradients. Arguments that are no arrays
    (strings, booleans, None, callables) are static.

    Args:
      fn: any function of pytrees; keyword arguments are allowed.
      seed: accepted for the signature of TensorFlow's recompute_grad and unneeded: keys are inputs.

    Returns:
      A function with the signature of fn, differentiable in reverse mode.

    Example:
      >>> f = recompute_grad(lambda x: jnp.sin(jnp.sin(x)))
      >>> float(jax.grad(f)(jnp.float32(0.0)))
      1.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, algorithm 1.
    """
    del seed

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = Call(fn, args, kwargs)
        # The trace turns closed-over tracers into inputs: a custom_vjp may not close over them.
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        return call.assemble(_recomputed(closed.jaxpr)(*closed.consts, *call.arrays))

    return wrapped


def _recomputed(jaxpr: _jaxpr.Jaxpr) -> Callable[..., list[Any]]:
    n = len(jaxpr.constvars)
    tied = tied_inputs(jaxpr)
    evaluate = _jaxpr.as_fun(jaxpr)

    @jax.custom_vjp
    def run(*inputs: Any) -> list[Any]:
        return evaluate(inputs[:n], *inputs[n:])

    def forward(*inputs: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return run(*inputs), inputs

    def backward(inputs: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...]:
        zero = zero_after(cotangents)
        late = [_late(x, zero) if i in tied else x for i, x in enumerate(inputs)]
        return jax.vjp(lambda *xs: evaluate(xs[:n], *xs[n:]), *late)[1](cotangents)

    run.defvjp(forward, backward)
    return run


def zero_after(cotangents: Any) -> Array:
    """Integer 0 that no compiler can know before the cotangents: uint32 [].

    A population count is at most 32, so shifted right by six it is 0; XLA does no range analysis on it.
    """
    z = jnp.uint32(0)
    for ct in jax.tree.leaves(cotangents):
        if _tree.is_floating(ct) and ct.size:
            first = _first(ct).astype(jnp.float32)
            z = z | jax.lax.population_count(jax.lax.bitcast_convert_type(first, jnp.uint32))
    return z >> 6


def _first(x: Array) -> Array:
    # An explicitly sharded axis can't be indexed; any one number that needs the whole of x will do.
    return jnp.max(x) if any(jax.typeof(x).sharding.spec) else x[(0,) * x.ndim]


def _late(x: Array, zero: Array) -> Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(x)
        return jax.random.wrap_key_data(data + zero.astype(data.dtype), impl=jax.random.key_impl(x))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        # -0.0 + 0.0 would be 0.0; x * 1 is x for every x.
        return x * (zero + 1).astype(x.dtype)
    return x ^ zero.astype(x.dtype)


def tied_inputs(jaxpr: _jaxpr.Jaxpr) -> set[int]:
    """Which inputs must wait for the cotangent so that (nearly) all of the recompute waits.

    What depends on no tied input can be merged with the first pass, and is then kept. Tying copies an
    input, so weights are tied only if enough is computed from them alone. Greedy cover: take the input
    that makes most further bytes wait, until the next one costs more than it brings.

    Args:
      jaxpr: the traced function; inputs are its constvars, then its invars.

    Returns:
      Indices into (*constvars, *invars).
    """
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    reach = [_reached(jaxpr, var) for var in inputs]
    tied: set[int] = set()
    waiting: dict[int, int] = {}
    while True:
        gains = [_new_bytes(r, waiting) - _bytes(v) for r, v in zip(reach, inputs, strict=True)]
        best = max(range(len(inputs)), key=gains.__getitem__, default=None)
        if best is None or best in tied or not (gains[best] > 0 or (not tied and reach[best])):
            return tied
        tied.add(best)
        waiting |= reach[best]


def _reached(jaxpr: _jaxpr.Jaxpr, source: Any) -> dict[int, int]:
    """{index of equation: bytes of its outputs} for the equations that depend on source."""
    seen, found = {source}, {}
    for i, eqn in enumerate(jaxpr.eqns):
        if any(isinstance(v, _jaxpr.Var) and v in seen for v in eqn.invars):
            seen.update(eqn.outvars)
            found[i] = sum(map(_bytes, eqn.outvars))
    return found


def _new_bytes(reach: dict[int, int], waiting: dict[int, int]) -> int:
    return sum(n for i, n in reach.items() if i not in waiting)


def _bytes(var: Any) -> int:
    aval = var.aval
    if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize
