"""Chains of functions whose memory grows slower than their length."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtricks import _integers
from jaxtricks._arguments import checked
from jaxtricks.remat.recompute import recompute_grad

Fn = Callable[..., Any]


@checked
def sequential(fns: Sequence[Fn], segments: str | int | Sequence[int] = "sqrt") -> Fn:
    """The composition of functions, cut into segments that are recomputed in the backward pass.

    k segments of n functions keep their k inputs and, one segment at a time, what n / k functions save:
    2 sqrt(n) at k = sqrt(n), for one more forward pass. Halves of halves keep g(n) = 1 + g(n / 2) =
    log2(n) inputs, for about log2(n) / 2 more forward passes.

    Args:
      fns: n functions of one pytree, x -> x, or of parameters and a pytree, (p, x) -> x; they may close
        over traced values. One that updates a flax.nnx module is neither: jaxtricks.nnx.recompute_grad.
      segments: "sqrt", about sqrt(n) of equal size; "log", the recursion; how many, sizes equal to one
        function; or their sizes. Functions that save much more than their input (attention) want more
        segments than sqrt(n), up to n.

    Returns:
      run(x) = fns[-1](... fns[0](x)), or run(params, x) with a list or tuple of one pytree a function.
      Differentiable in reverse mode, like `recompute_grad`.

    Raises:
      ValueError: no functions, or segments that are unknown, too many or do not sum to n; when run,
        params that are not one a function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> run = sequential([lambda w, x: jnp.tanh(w * x)] * 9)
      >>> float(jax.grad(run, argnums=1)([jnp.float32(1.0)] * 9, jnp.float32(0.0)))
      1.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174: algorithm 1; section
      4.4, g(n) = k log_{k+1}(n), at k = 1 for "log".
    """
    fns = list(fns)
    if not fns:
        raise ValueError("remat.sequential: `fns` is empty: give at least one function")
    sizes = None if isinstance(segments, str) and segments == "log" else _sizes(segments, len(fns))

    def run(*args: Any) -> Any:
        if len(args) == 1:
            steps, params = [_without_parameters(fn) for fn in fns], [None] * len(fns)
        elif len(args) == 2:
            steps, params = fns, _parameters(args[0], len(fns))
        else:
            raise ValueError(
                f"remat.sequential: call it as (x) or (params, x), not with {len(args)} arguments"
            )
        whole = _halves(steps) if sizes is None else _segments(steps, sizes)
        return whole(params, args[-1])

    return run


def _segments(fns: Sequence[Fn], sizes: Sequence[int]) -> Fn:
    # The last one is wrapped too. Its backward pass starts at once only where the network ends: a head
    # runs first, beside all that the segment would have kept. Measured, 64 layers of two products: 1.9
    # MB instead of 2.9 with a head 16 times as wide, equal with a light one; 3% more FLOPs.
    ends = list(itertools.accumulate(sizes))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))

    def run(params: Sequence[Any], x: Any) -> Any:
        for a, b in bounds:
            x = recompute_grad(_chain(fns[a:b]))(params[a:b], x)
        return x

    return run


def _halves(fns: Sequence[Fn]) -> Fn:
    # A right half is not wrapped: its backward pass does start at once, since the left half's follows.
    # But the very last function meets the head, as above.
    *head, last = fns

    def recurse(fns: Sequence[Fn]) -> Fn:
        if len(fns) == 1:
            return _chain(fns)
        half = len(fns) // 2
        left, right = recompute_grad(recurse(fns[:half])), recurse(fns[half:])
        return lambda params, x: right(params[half:], left(params[:half], x))

    return recurse([*head, recompute_grad(last)])


def _chain(fns: Sequence[Fn]) -> Fn:
    def run(params: Sequence[Any], x: Any) -> Any:
        for fn, p in zip(fns, params, strict=True):
            x = fn(p, x)
        return x

    return run


def _without_parameters(fn: Fn) -> Fn:
    return lambda _, x: fn(x)


def _parameters(params: Any, n: int) -> Sequence[Any]:
    if not isinstance(params, Sequence) or len(params) != n:
        raise ValueError(
            f"remat.sequential: `params` must be a list or tuple of {n}, one a function"
        )
    return params


def _sizes(segments: str | int | Sequence[int], n: int) -> list[int]:
    """Sizes of the segments of n functions."""
    if isinstance(segments, str):
        if segments != "sqrt":
            raise ValueError(
                f'remat.sequential: `segments` must be "sqrt", "log", a number or sizes, not {segments!r}'
            )
        segments = round(n**0.5)
    segments = _integers.plain(segments)
    if isinstance(segments, tuple):
        sizes = list(segments)
        if sum(sizes) != n or min(sizes) < 1:
            raise ValueError(
                f"remat.sequential: `segments` must be positive sizes that sum to {n}, not {sizes}"
            )
        return sizes
    if not 1 <= segments <= n:
        raise ValueError(f"remat.sequential: `segments` must be in 1..{n}, not {segments}")
    return [n // segments + (i < n % segments) for i in range(segments)]
