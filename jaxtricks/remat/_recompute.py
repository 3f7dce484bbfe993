"""Make a recomputation wait for the cotangent, so that no compiler merges it with the first pass."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import SingleDeviceSharding

from jaxtricks import _compat, _dtypes, _jaxpr, _sharding
from jaxtricks._arguments import checked
from jaxtricks._jaxpr import var_bytes
from jaxtricks._partition import Call, refuse_module
from jaxtricks._typing import Array


def wait(
    xs: Sequence[Array], cotangents: Sequence[Any]
) -> tuple[list[Array], list[Any]]:
    """xs and cotangents, bit for bit, none before all of the cotangents are there.

    XLA has a barrier for this. Before jaxlib 0.11.2 its CPU backend deletes barriers
    before it merges common subexpressions, and a mere dependence by data does not stop
    it from fusing the sum of all cotangents of a residual stream into its last reader,
    which keeps every term alive. There it is a conditional, whose other branch is never
    taken and which no pass can see through.

    Args:
      xs: arrays of any dtype, typed keys among them.
      cotangents: those of integer outputs (float0) pass by.
    """
    keys = [jax.random.key_impl(x) if _is_key(x) else None for x in xs]
    data = [
        x if k is None else jax.random.key_data(x)
        for x, k in zip(xs, keys, strict=True)
    ]
    moving = [ct for ct in cotangents if _dtypes.is_floating(ct)]
    inputs = (_never(moving), *data, *moving)
    # Inside shard_map what has passed a barrier would vary over the axes of all that
    # passes with it.
    alike = len({_compat.varying(x) for x in inputs[1:]}) <= 1
    out: list[Any]
    if not alike:
        out = _conditional(*inputs)
    elif barriers_hold():
        out = _barrier(*inputs)
    else:
        out = jax.lax.platform_dependent(*inputs, cpu=_conditional, default=_barrier)
    late: list[Any] = [
        x if k is None else jax.random.wrap_key_data(jnp.asarray(x), impl=k)
        for x, k in zip(out[: len(xs)], keys, strict=True)
    ]
    passed = iter(out[len(xs) :])
    return late, [next(passed) if _dtypes.is_floating(ct) else ct for ct in cotangents]


@functools.cache
def barriers_hold() -> bool:
    """Whether XLA's CPU backend merges nothing across a barrier: asked of a small program, once."""

    def twice(x: Array) -> Array:
        return x @ x + (lambda y: y @ y)(jax.lax.optimization_barrier(x))

    try:
        cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    except RuntimeError:  # this process has no CPU backend: nothing is compiled for one
        return True
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=cpu)
    cost: Any = jax.jit(twice).lower(shape).compile().cost_analysis()
    return cost["flops"] > 2 * 2 * 8**3  # of two products; one has half


def _conditional(never: Array, *xs: Array) -> list[Array]:
    return jax.lax.cond(
        never, lambda xs: [_other(x) for x in xs], lambda xs: xs, list(xs)
    )


def _other(x: Array) -> Array:
    # Both branches doing the same would be merged.
    return x + x if jnp.issubdtype(x.dtype, jnp.inexact) else ~x


def _barrier(never: Array, *xs: Array) -> list[Array]:
    return list(jax.lax.optimization_barrier((never, *xs))[1:])


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _never(cotangents: Sequence[Array]) -> Array:
    """False, which no compiler can know before the cotangents: bool [].

    A population count is at most 32, so shifted right by six it is 0; XLA does no range
    analysis on it.
    """
    z = jnp.uint32(0)
    for ct in cotangents:
        if ct.size:
            first = _first(ct).astype(jnp.float32)
            z = z | jax.lax.population_count(
                jax.lax.bitcast_convert_type(first, jnp.uint32)
            )
    return z >> 6 > 0


def _first(x: Array) -> Array:
    # An explicitly sharded axis can't be indexed; any one number that needs the whole
    # of x will do.
    return jnp.max(x) if _sharding.is_explicit(x) else x[(0,) * x.ndim]


def tied_inputs(jaxpr: _jaxpr.Jaxpr, saved: Collection[int] = ()) -> set[int]:
    """Which inputs must wait for the cotangent so that (nearly) all of the recompute waits.

    What depends on no tied input can be merged with the first pass, and is then kept.
    Tying may copy an input, so weights are tied only if enough is computed from them
    alone. Greedy cover: take the input that makes most further bytes wait, until the
    next one costs more than it brings. With convolutions all are tied: XLA's CPU
    backend transposes their operands for the gradient of the kernel, and does so in the
    first pass, and keeps the copies, where it can.

    Args:
      jaxpr: the traced function; inputs are its constvars, then its invars.
      saved: equations whose results are not recomputed; those wait in any case.

    Returns:
      Indices into (*constvars, *invars).
    """
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    if any(
        _compat.primitive(eqn) == "conv_general_dilated" for eqn in _jaxpr.walk(jaxpr)
    ):
        return set(range(len(inputs)))
    if not saved:
        # What one input of a recomputed block reaches inside it need not be all of the
        # block.
        closed = _jaxpr.ClosedJaxpr(jaxpr, jaxpr.constvars)
        jaxpr = _jaxpr.inlined(closed, (*_jaxpr.CALLS, *_jaxpr.RULES)).jaxpr
    reach = [_reached(jaxpr, [var], saved) for var in inputs]
    kept = [v for i in saved for v in jaxpr.eqns[i].outvars]
    tied: set[int] = set()
    waiting = _reached(jaxpr, kept, saved)
    while True:
        gains = [
            _new_bytes(r, waiting) - var_bytes(v)
            for r, v in zip(reach, inputs, strict=True)
        ]
        best = max(range(len(inputs)), key=gains.__getitem__, default=None)
        if (
            best is None
            or best in tied
            or not (gains[best] > 0 or (not waiting and reach[best]))
        ):
            return tied
        tied.add(best)
        waiting |= reach[best]


def _reached(
    jaxpr: _jaxpr.Jaxpr, sources: Sequence[Any], saved: Collection[int]
) -> dict[int, int]:
    """{index of equation: bytes of its outputs} for the equations that depend on the sources."""
    seen, found = set(sources), {}
    for i, eqn in enumerate(jaxpr.eqns):
        if i not in saved and any(
            isinstance(v, _jaxpr.Var) and v in seen for v in eqn.invars
        ):
            seen.update(eqn.outvars)
            found[i] = sum(map(var_bytes, eqn.outvars))
    return found


def _new_bytes(reach: dict[int, int], waiting: dict[int, int]) -> int:
    return sum(n for i, n in reach.items() if i not in waiting)


# Recompute in the backward pass, ordered after the cotangent by data.


Ad = Literal["reverse", "both"]
_FORWARD = {
    "reverse": 'pass ad="both" for jax.hessian or jax.jvp of jax.grad, or fn itself for jax.jvp alone',
    "both": "forward mode alone stores nothing, so pass fn itself",
}
# ({input: what is differentiated}, {input: what is not}, values of the saved equations)
Residuals = tuple[dict[int, Any], dict[int, Any], list[Any]]


@checked
def recompute_grad(
    fn: Callable[..., Any], *, seed: Any = None, ad: Ad = "reverse"
) -> Any:
    """fn that keeps only its inputs for the backward pass and runs again there.

    Values and gradients are those of fn, bit for bit where XLA compiles both passes
    alike. Tracers that fn closes over are inputs like the others and receive gradients.
    Arguments that are no arrays (strings, booleans, None, callables) are static.

    Args:
      fn: any function of pytrees; keyword arguments are allowed.
      seed: accepted for the signature of TensorFlow's recompute_grad and unneeded: keys
        are inputs.
      ad: "reverse" differentiates in reverse mode as often as you like, and recomputes
        in every order. "both" allows forward over reverse (`jax.hessian`, `jax.jvp` of
        `jax.grad`); reverse over reverse then keeps what the first pass made. Forward
        mode alone stores nothing: use fn itself.

    Returns:
      A function with the signature of fn.

    Raises:
      ValueError: for another ad, for a flax.nnx module, or if fn changes an argument in
        place.
      TypeError: in forward mode, unless ad is "both".

    Example:
      >>> f = recompute_grad(lambda x: jnp.sin(jnp.sin(x)))
      >>> float(jax.grad(f)(jnp.float32(0.0)))
      1.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174,
      algorithm 1.
    """
    del seed
    refuse_module(fn, "recompute_grad")
    if ad not in ("reverse", "both"):
        raise ValueError(f'ad must be "reverse" or "both", not {ad!r}')

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = Call(fn, args, kwargs, nnx="recompute_grad")
        # The trace turns closed-over tracers into inputs: a custom_vjp may not close
        # over them.
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
      ordered: make the second run wait for the cotangent. Bodies of loops need no
        order: their backward pass is another computation, nothing of the first pass is
        in it to be merged with.
      ad: see `recompute_grad`.
    """
    kept = [v for i in sorted(saved) for v in jaxpr.eqns[i].outvars]
    outputs = len(jaxpr.outvars)
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    tied = sorted(tied_inputs(jaxpr, saved)) if ordered else []
    first = _jaxpr.as_fun(_jaxpr.made((), inputs, [*jaxpr.outvars, *kept], jaxpr.eqns))
    again = _jaxpr.replaced(jaxpr, saved) if kept else lambda xs, _: first((), *xs)

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
            late, cotangents = wait([*(xs[i] for i in tied), *values], cotangents)
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
    return (np if aval.dtype == jax.dtypes.float0 else jnp).zeros(
        aval.shape, aval.dtype
    )
