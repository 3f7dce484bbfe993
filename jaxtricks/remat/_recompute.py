"""Run a function again in the backward pass, after the cotangent has arrived.

Only the order keeps a compiler from merging the second run with the first: `wait` makes
it, `tied_inputs` says for which inputs, `recomputed` builds the function.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

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

P = ParamSpec("P")
R = TypeVar("R")


def wait(
    xs: Sequence[Array],
    cotangents: Sequence[Any],
) -> tuple[list[Array], list[Any]]:
    """Return xs and cotangents bit for bit, none before all of the cotangents exist.

    XLA has a barrier for this. Before jaxlib 0.11.2 its CPU backend deletes barriers
    before it merges common subexpressions, and a mere dependence by data does not stop
    it from fusing the sum of all cotangents of a residual stream into its last reader,
    which keeps every term alive. There it is a conditional, whose other branch is never
    taken and which no pass can see through.

    Args:
      xs: arrays of any dtype, typed keys among them.
      cotangents: those of integer outputs (float0) pass by.
    """
    key_impls = [
        jax.random.key_impl(x) if _dtypes.is_key(x) else None for x in xs
    ]
    data = [
        x if impl is None else jax.random.key_data(x)
        for x, impl in zip(xs, key_impls, strict=True)
    ]
    floating = [ct for ct in cotangents if _dtypes.is_floating(ct)]
    inputs = (_never(floating), *data, *floating)
    # Inside shard_map what has passed a barrier would vary over the axes of all that
    # passes with it.
    is_mixed = len({_compat.varying(x) for x in inputs[1:]}) > 1
    out: list[Any]
    if is_mixed:
        out = _conditional(*inputs)
    elif barriers_hold():
        out = _barrier(*inputs)
    else:
        out = jax.lax.platform_dependent(
            *inputs, cpu=_conditional, default=_barrier
        )
    late: list[Any] = [
        x
        if impl is None
        else jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
        for x, impl in zip(out[: len(xs)], key_impls, strict=True)
    ]
    passed = iter(out[len(xs) :])
    late_cotangents = [
        next(passed) if _dtypes.is_floating(ct) else ct for ct in cotangents
    ]
    return late, late_cotangents


@functools.cache
def barriers_hold() -> bool:
    """Return whether XLA's CPU backend respects barriers, by a small program."""

    def square_twice(x: Array) -> Array:
        square = lambda y: y @ y  # noqa: E731
        return x @ x + square(jax.lax.optimization_barrier(x))

    try:
        cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    except RuntimeError:
        # This process has no CPU backend: nothing is compiled for one.
        return True
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=cpu)
    cost: Any = jax.jit(square_twice).lower(shape).compile().cost_analysis()
    # Of two products, or of one where they were merged.
    return cost["flops"] > 2 * 2 * 8**3


def _conditional(never: Array, *xs: Array) -> list[Array]:
    def other_branch(xs: list[Array]) -> list[Array]:
        return [_changed(x) for x in xs]

    return jax.lax.cond(never, other_branch, lambda xs: xs, list(xs))


def _changed(x: Array) -> Array:
    # Both branches doing the same would be merged.
    return x + x if jnp.issubdtype(x.dtype, jnp.inexact) else ~x


def _barrier(never: Array, *xs: Array) -> list[Array]:
    return list(jax.lax.optimization_barrier((never, *xs))[1:])


def _never(cotangents: Sequence[Array]) -> Array:
    """Return False, which no compiler can tell before the cotangents: bool [].

    A population count is at most 32, so shifted right by six it is 0; XLA does no range
    analysis on it.
    """
    bits = jnp.uint32(0)
    for ct in cotangents:
        if ct.size:
            first = _first_element(ct).astype(jnp.float32)
            first_bits = jax.lax.bitcast_convert_type(first, jnp.uint32)
            bits = bits | jax.lax.population_count(first_bits)
    return bits >> 6 > 0


def _first_element(x: Array) -> Array:
    # An explicitly sharded axis can't be indexed; any one number that needs the whole
    # of x will do.
    return jnp.max(x) if _sharding.is_explicit(x) else x[(0,) * x.ndim]


_SMALL = 1e-3  # of the bytes that wait: an input that may be copied for nothing


def tied_inputs(
    jaxpr: _jaxpr.Jaxpr,
    saved: Collection[int] = (),
) -> set[int]:
    """Return which inputs must wait for the cotangent so that the recompute waits.

    What depends on no tied input can be merged with the first pass, and then stays
    alive until the second. Tying may copy an input, so weights are tied only if enough
    is computed from them alone. Greedy cover: take the input that makes most further
    bytes wait, until the next one costs more than it brings. With convolutions all are
    tied: XLA's CPU backend transposes their operands for the gradient of the kernel,
    does so in the first pass where it can, and holds on to the copies.

    Args:
      jaxpr: the traced function; inputs are its constvars, then its invars.
      saved: equations whose results are not recomputed; those wait in any case.

    Returns:
      Indices into (*constvars, *invars).
    """
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    if "conv_general_dilated" in map(_jaxpr.primitive, _jaxpr.walk(jaxpr)):
        return set(range(len(inputs)))
    if not saved:
        # What one input of a recomputed block reaches inside it need not be all of the
        # block.
        closed = _jaxpr.ClosedJaxpr(jaxpr, jaxpr.constvars)
        jaxpr = _jaxpr.inline(
            closed, (*_jaxpr.PLAIN_CALLS, *_jaxpr.RULES)
        ).jaxpr
    reach = [_reached(jaxpr, [v], saved) for v in inputs]
    saved_vars = _jaxpr.computed_variables([jaxpr.eqns[i] for i in saved])
    waiting = _reached(jaxpr, saved_vars, saved)
    tied: set[int] = set()
    while True:
        gains = [
            _new_bytes(reached, waiting) - var_bytes(v)
            for reached, v in zip(reach, inputs, strict=True)
        ]
        best = max(range(len(inputs)), key=gains.__getitem__, default=None)
        if best is None or best in tied:
            break
        # Something has to wait, even if it does not pay.
        is_first = not waiting and reach[best]
        if gains[best] <= 0 and not is_first:
            break
        tied.add(best)
        waiting |= reach[best]
    # A bias costs next to nothing. Where jaxlib 0.12 hands large products to its library
    # of CPU kernels, it writes out what they broadcast, and both passes would share that:
    # a decoder of batch 32 took 254 MiB instead of 64.
    bound = sum(waiting.values()) * _SMALL
    small = {
        i for i, v in enumerate(inputs) if reach[i] and var_bytes(v) < bound
    }
    return tied | small


def _reached(
    jaxpr: _jaxpr.Jaxpr,
    sources: Sequence[Any],
    saved: Collection[int],
) -> dict[int, int]:
    """Return {equation: bytes of its outputs} of what depends on the sources."""
    dependent = set(sources)
    reached = {}
    for i, eqn in enumerate(jaxpr.eqns):
        if i in saved:
            continue
        if any(
            isinstance(v, _jaxpr.Var) and v in dependent for v in eqn.invars
        ):
            dependent.update(eqn.outvars)
            reached[i] = _jaxpr.output_bytes(eqn)
    return reached


def _new_bytes(
    reached: Mapping[int, int],
    waiting: Collection[int],
) -> int:
    new = reached.keys() - waiting
    return sum(reached[i] for i in new)


# The function that runs again.


Ad = Literal["reverse", "both"]
_FORWARD_ADVICE = {
    "reverse": (
        'pass ad="both" for jax.hessian or jax.jvp of jax.grad, or fn itself for '
        "jax.jvp alone"
    ),
    "both": "forward mode alone stores nothing, so pass fn itself",
}
Residuals = tuple[dict[int, Any], dict[int, Any], list[Any]]
"""({input: varied value}, {input: fixed value}, values of saved equations)."""


@checked
def recompute_grad(
    fn: Callable[P, R],
    *,
    seed: Any = None,
    ad: Ad = "reverse",
) -> Callable[P, R]:
    """Return fn that saves only its inputs for the backward pass and runs again there.

    Values and gradients are those of fn, bit for bit where XLA compiles both passes
    alike. Tracers that fn closes over are inputs like the others and receive gradients.
    Arguments that are not arrays (strings, booleans, None, callables) are static.

    Args:
      fn: any function of pytrees; keyword arguments are allowed.
      seed: accepted for the signature of TensorFlow's recompute_grad and not needed:
        keys are inputs.
      ad: "reverse" differentiates in reverse mode any number of times, and recomputes
        in every order. "both" allows forward over reverse (`jax.hessian`, `jax.jvp` of
        `jax.grad`); reverse over reverse then saves the results of the first pass.
        Forward mode alone stores nothing: use fn itself.

    Returns:
      A function with the signature of fn.

    Raises:
      ValueError: another `ad`, a flax.nnx module, or a function that changes an
        argument in place.
      TypeError: in forward mode, unless `ad` is "both".

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
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        call = Call(
            fn,
            args,
            kwargs,
            nnx="recompute_grad",
        )
        # The trace turns closed-over tracers into inputs: a custom_vjp may not close
        # over them.
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        try:
            outs = recomputed(closed.jaxpr, ad=ad)(*closed.consts, *call.arrays)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "remat.recompute_grad can't be differentiated forward here: "
                f"{_FORWARD_ADVICE[ad]}"
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
    """Return a function of (*constvars, *invars) that runs again in the backward pass.

    Args:
      jaxpr: what to run; inlined if anything is saved.
      saved: indices of equations whose results are not computed again.
      ordered: make the second run wait for the cotangent. Bodies of loops need no
        order: their backward pass is another computation, with nothing of the first
        pass in it to be merged with.
      ad: see `recompute_grad`.
    """
    saved_eqns = [jaxpr.eqns[i] for i in sorted(saved)]
    saved_vars = _jaxpr.computed_variables(saved_eqns)
    outputs = len(jaxpr.outvars)
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    tied = sorted(tied_inputs(jaxpr, saved)) if ordered else []
    results = [*jaxpr.outvars, *saved_vars]
    first = _jaxpr.as_fun(_jaxpr.build((), inputs, results, jaxpr.eqns))
    if saved_vars:
        again = _jaxpr.with_saved_values(jaxpr, saved)
    else:
        again = lambda xs, _: first((), *xs)  # noqa: E731

    # `is_recomputed` looks for this name in a trace.
    @jax.custom_vjp
    def jaxtricks_recomputed(*xs: Any) -> list[Any]:
        return first((), *xs)[:outputs]

    def forward(*primals: Any) -> tuple[list[Any], Residuals]:
        xs = []
        varied: dict[int, Any] = {}
        fixed: dict[int, Any] = {}
        for i, primal in enumerate(primals):
            xs.append(primal.value)
            if primal.perturbed:
                varied[i] = primal.value
            else:
                fixed[i] = primal.value
        if ad == "reverse" and not saved_vars:
            # Called as a custom_vjp it is recomputed under a second derivative too.
            return jaxtricks_recomputed(*xs), (varied, fixed, [])
        results = first((), *xs)
        return results[:outputs], (varied, fixed, results[outputs:])

    def backward(
        residuals: Residuals,
        cotangents: list[Any],
    ) -> tuple[Any, ...]:
        varied, fixed, values = residuals
        xs = varied | fixed
        cotangents = list(map(_instantiated, cotangents))
        indices = range(len(xs))
        if ordered:
            waiting = [xs[i] for i in tied] + values
            late, cotangents = wait(waiting, cotangents)
            values = late[len(tied) :]
            xs |= dict(zip(tied, late, strict=False))

        def rerun(varied: dict[int, Any]) -> list[Any]:
            arguments = xs | varied
            return again([arguments[i] for i in indices], values)

        late_varied = {i: xs[i] for i in varied}
        _, pullback = jax.vjp(rerun, late_varied)
        (gradients,) = pullback(cotangents)
        # None is a zero gradient, of what is not differentiated.
        return tuple(gradients.get(i) for i in indices)

    jaxtricks_recomputed.defvjp(forward, backward, symbolic_zeros=True)
    return jaxtricks_recomputed


def is_recomputed(eqn: Any) -> bool:
    """Return whether an equation calls what `recomputed` returns."""
    if _jaxpr.primitive(eqn) != "custom_vjp_call":
        return False
    info = _jaxpr.bodies(eqn)[0].jaxpr.debug_info
    return info is not None and info.func_src_info.startswith(
        "jaxtricks_recomputed "
    )


def _instantiated(ct: Any) -> Any:
    if not isinstance(ct, SymbolicZero):
        return ct
    aval: Any = ct
    zeros = np.zeros if aval.dtype == jax.dtypes.float0 else jnp.zeros
    return zeros(aval.shape, aval.dtype)
