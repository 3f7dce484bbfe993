"""Make a recomputation wait for the cotangent, so that no compiler merges it with the first pass."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _jaxpr, _tree
from jaxtricks._types import Array


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


def late(x: Array, zero: Array) -> Array:
    """x, bit for bit, once the zero is known."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(x)
        return jax.random.wrap_key_data(data + zero.astype(data.dtype), impl=jax.random.key_impl(x))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        # -0.0 + 0.0 would be 0.0; x * 1 is x for every x.
        return x * (zero + 1).astype(x.dtype)
    return x ^ zero.astype(x.dtype)


def tied_inputs(jaxpr: _jaxpr.Jaxpr, saved: Collection[int] = ()) -> set[int]:
    """Which inputs must wait for the cotangent so that (nearly) all of the recompute waits.

    What depends on no tied input can be merged with the first pass, and is then kept. Tying copies an
    input, so weights are tied only if enough is computed from them alone. Greedy cover: take the input
    that makes most further bytes wait, until the next one costs more than it brings.

    Args:
      jaxpr: the traced function; inputs are its constvars, then its invars.
      saved: equations whose results are not recomputed; those wait in any case.

    Returns:
      Indices into (*constvars, *invars).
    """
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    reach = [_reached(jaxpr, [var], saved) for var in inputs]
    kept = [v for i in saved for v in jaxpr.eqns[i].outvars]
    tied: set[int] = set()
    waiting = _reached(jaxpr, kept, saved)
    while True:
        gains = [_new_bytes(r, waiting) - var_bytes(v) for r, v in zip(reach, inputs, strict=True)]
        best = max(range(len(inputs)), key=gains.__getitem__, default=None)
        if best is None or best in tied or not (gains[best] > 0 or (not waiting and reach[best])):
            return tied
        tied.add(best)
        waiting |= reach[best]


def _reached(
    jaxpr: _jaxpr.Jaxpr, sources: Sequence[Any], saved: Collection[int]
) -> dict[int, int]:
    """{index of equation: bytes of its outputs} for the equations that depend on the sources."""
    seen, found = set(sources), {}
    for i, eqn in enumerate(jaxpr.eqns):
        if i not in saved and any(isinstance(v, _jaxpr.Var) and v in seen for v in eqn.invars):
            seen.update(eqn.outvars)
            found[i] = sum(map(var_bytes, eqn.outvars))
    return found


def _new_bytes(reach: dict[int, int], waiting: dict[int, int]) -> int:
    return sum(n for i, n in reach.items() if i not in waiting)


def var_bytes(var: Any) -> int:
    """Bytes of a variable; 0 for tokens, keys' wrappers and other values without a size."""
    aval = var.aval
    if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize
