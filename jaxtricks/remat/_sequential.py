"""Run loops and chains of functions in memory that grows slower than their length.

`scan` nests loops, each recomputed from its first carry; `sequential` cuts a chain of
functions into recomputed segments.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _integers, _tree
from jaxtricks._arguments import checked
from jaxtricks.remat._recompute import recompute_grad

Fn = Callable[..., Any]
Step = Callable[[Any, Any], tuple[Any, Any]]
"""(carry, x) -> (carry, y)."""


@checked
def scan(
    body: Callable[..., tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    *,
    levels: str | int | Sequence[int] = "sqrt",
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """jax.lax.scan that saves about sqrt(n) carries instead of n steps' residuals.

    L nested loops of about n**(1/L) steps, each recomputed from its first carry, save L
    n**(1/L) carries for L more forward passes. Loops divide n where they can; else the
    steps left over (13 = 4 x 3 + 1) run in a separate loop, which costs a copy of xs
    and ys. Inner loops copy their part of xs.

    Args:
      body: (carry, x) -> (carry, y); recomputed in every step.
      init: first carry, a pytree.
      xs: pytree of arrays [n, ...], of any dtype (typed keys too), or None with a
        length.
      levels: "sqrt", 2 loops; "log", loops of about 4 steps; how many; or their
        lengths, outermost first, whose product is n.
      length, reverse, unroll: as in jax.lax.scan; unroll is that of the innermost
        loops.

    Returns:
      (carry, ys [n, ...]) of jax.lax.scan, differentiable in both modes.

    Raises:
      ValueError: xs without a length or of different lengths; levels that are unknown,
        below 1, or do not multiply to n.

    Example:
      >>> body = lambda c, x: (jnp.sin(c * x), c)
      >>> total = lambda w: scan(body, w, jnp.ones(13))[1].sum()
      >>> print(jax.grad(total)(jnp.float32(0.0)))
      13.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174,
      algorithm 1 and section 4.4.
    """
    n = _length(xs, length)
    outer = _outer(levels, n)
    step = _recomputed_step(body)
    return nested(
        step,
        init,
        xs,
        n,
        outer,
        reverse=reverse,
        unroll=unroll,
    )


def nested(
    step: Step,
    carry: Any,
    xs: Any,
    n: int,
    outer: Sequence[int],
    *,
    reverse: bool = False,
    unroll: int | bool = 1,
    recompute: Callable[[Step], Step] | None = None,
) -> tuple[Any, Any]:
    """jax.lax.scan of a step as nested loops, each but the outermost recomputed.

    Args:
      step: (carry, x) -> (carry, y), recomputed only if it does so itself.
      carry, xs: as in jax.lax.scan.
      n: number of steps.
      outer: lengths of all loops but the innermost, outermost first.
      reverse, unroll: as in jax.lax.scan.
      recompute: wraps what each loop but the innermost repeats; None saves only its
        inputs.
    """
    if not outer:
        return jax.lax.scan(
            step,
            carry,
            xs,
            n,
            reverse,
            unroll,
        )
    blocks_count, block_size = outer[0], n // outer[0]
    in_blocks = blocks_count * block_size
    again = functools.partial(
        nested,
        step,
        reverse=reverse,
        unroll=unroll,
        recompute=recompute,
    )
    wrap = recompute or _recomputed_step
    inner = wrap(lambda c, xs: again(c, xs, block_size, outer[1:]))

    def loops(carry: Any) -> tuple[Any, Any]:
        def into_blocks(x: Any) -> Any:
            return x[:in_blocks].reshape(blocks_count, block_size, *x.shape[1:])

        def flattened(y: Any) -> Any:
            return y.reshape(in_blocks, *y.shape[2:])

        blocks = jax.tree.map(into_blocks, xs)
        carry, ys = jax.lax.scan(
            inner,
            carry,
            blocks,
            blocks_count,
            reverse,
        )
        return carry, jax.tree.map(flattened, ys)

    def rest(carry: Any) -> tuple[Any, Any]:
        last = jax.tree.map(lambda x: x[in_blocks:], xs)
        return again(carry, last, n - in_blocks, ())

    if n == in_blocks:
        return loops(carry)
    if reverse:
        carry, last = rest(carry)
        carry, first = loops(carry)
    else:
        carry, first = loops(carry)
        carry, last = rest(carry)
    return carry, jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), first, last
    )


def _recomputed_step(body: Callable[..., Any]) -> Callable[..., Any]:
    # The backward pass of a loop is another loop, so nothing can be merged across the
    # two and jax.checkpoint needs no barrier, with jax_remat3 or without: the bytes are
    # those of recompute_grad in every pairing measured (n = 16, 64, 256), for up to 25%
    # fewer FLOPs, and forward mode works.
    return jax.checkpoint(body, prevent_cse=False)


def _length(xs: Any, length: int | None) -> int:
    lengths: dict[str, int] = {}
    if length is not None:
        lengths["`length`"] = operator.index(length)
    for path, x in _tree.leaves_with_paths(xs):
        if not np.shape(x):
            raise ValueError(
                f"remat.scan: `xs` has a scalar ({path or 'xs'}): stack its values [n]"
            )
        lengths[f"`xs` ({path})" if path else "`xs`"] = np.shape(x)[0]
    if not lengths:
        raise ValueError("remat.scan: `xs` has no arrays: give the `length`")
    if len(set(lengths.values())) > 1:
        table = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise ValueError(f"remat.scan: `xs` must have one length, not {table}")
    return next(iter(lengths.values()))


def _outer(
    levels: str | int | Sequence[int],
    n: int,
) -> list[int]:
    """Return the lengths of all loops but the innermost."""
    if isinstance(levels, str):
        if levels not in ("sqrt", "log"):
            raise ValueError(
                'remat.scan: `levels` must be "sqrt", "log", a number or lengths, not '
                f"{levels!r}"
            )
        # A loop of b steps stacks b carries, b log_b(n) in all: as many at 4 as at 2,
        # in half the forward passes and with fewer copies of xs (measured, n = 256: 3.7
        # MB at 4, 6.4 at 2).
        levels = (
            2 if levels == "sqrt" else max(1, round(math.log(max(n, 1), 4)))
        )
    levels = _integers.plain(levels)
    if isinstance(levels, tuple):
        lengths = list(levels)
        if math.prod(lengths) != n or not lengths:
            raise ValueError(
                f"remat.scan: `levels` must multiply to {n}, not {lengths}"
            )
        return [k for k in lengths if k != 1][:-1]
    if levels < 1:
        raise ValueError(
            f"remat.scan: `levels` must be 1 or more, not {levels}"
        )
    outer = []
    while levels > 1 and n > 3:
        outer.append(_nearest_divisor(n, max(2, round(n ** (1 / levels)))))
        n //= outer[-1]
        levels -= 1
    return outer


def _nearest_divisor(n: int, k: int) -> int:
    """Return the divisor of n nearest to k and within a factor of two, else k.

    Without a divisor there are steps left over, for which XLA copies xs.
    """
    candidates = range((k + 1) // 2, 2 * k + 1)
    nearest_first = sorted(candidates, key=lambda d: max(d / k, k / d))
    return next((d for d in nearest_first if d > 1 and n % d == 0), k)


# Chains of functions.


@checked
def sequential(
    fns: Sequence[Fn],
    segments: str | int | Sequence[int] = "sqrt",
) -> Fn:
    """Compose functions in segments that are recomputed in the backward pass.

    k segments of n functions save their k inputs and, one segment at a time, what n / k
    functions save: 2 sqrt(n) at k = sqrt(n), for one more forward pass. Halves of
    halves save g(n) = 1 + g(n / 2) = log2(n) inputs, for about log2(n) / 2 more.

    Args:
      fns: n functions of one pytree, x -> x, or of parameters and a pytree, (p, x) ->
        x; they may close over traced values. One that updates a flax.nnx module is
        neither: see jaxtricks.nnx.recompute_grad.
      segments: "sqrt", about sqrt(n) of equal size; "log", the recursion; how many,
        sizes equal to one function; or their sizes. Functions that save much more than
        their input (attention) want more segments than sqrt(n), up to n.

    Returns:
      run(x) = fns[-1](... fns[0](x)), or run(params, x) with a list or tuple of one
      pytree per function. Differentiable in reverse mode, like `recompute_grad`.

    Raises:
      ValueError: no functions, or segments that are unknown, too many or do not sum to
        n; when run, params that are not one per function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> run = sequential([lambda w, x: jnp.tanh(w * x)] * 9)
      >>> float(jax.grad(run, argnums=1)([jnp.float32(1.0)] * 9, jnp.float32(0.0)))
      1.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174:
      algorithm 1; section 4.4, g(n) = k log_{k+1}(n), at k = 1 for "log".
    """
    fns = list(fns)
    n = len(fns)
    if not fns:
        raise ValueError(
            "remat.sequential: `fns` is empty: give at least one function"
        )
    is_recursive = isinstance(segments, str) and segments == "log"
    sizes = None if is_recursive else _sizes(segments, n)

    def run(*args: Any) -> Any:
        if len(args) == 1:
            steps = [_without_parameters(fn) for fn in fns]
            params: Sequence[Any] = [None] * n
        elif len(args) == 2:
            steps = fns
            params = _parameters(args[0], n)
        else:
            raise ValueError(
                "remat.sequential: call it as (x) or (params, x), not with "
                f"{len(args)} arguments"
            )
        whole = _halves(steps) if sizes is None else _segments(steps, sizes)
        return whole(params, args[-1])

    return run


def _segments(fns: Sequence[Fn], sizes: Sequence[int]) -> Fn:
    # The last one is wrapped too. Its backward pass starts at once only where the
    # network ends: a head runs first, beside all that the segment would have saved.
    # Measured, 64 layers of two products: 1.9 MB instead of 2.9 with a head 16 times as
    # wide, equal with a light one; 3% more FLOPs.
    ends = list(itertools.accumulate(sizes))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))

    def run(params: Sequence[Any], x: Any) -> Any:
        for a, b in bounds:
            x = recompute_grad(_chain(fns[a:b]))(params[a:b], x)
        return x

    return run


def _halves(fns: Sequence[Fn]) -> Fn:
    # A right half is not wrapped: its backward pass does start at once, since the left
    # half's follows. But the very last function meets the head, as above.
    *head, last = fns

    def recurse(fns: Sequence[Fn]) -> Fn:
        if len(fns) == 1:
            return _chain(fns)
        half = len(fns) // 2
        left = recompute_grad(recurse(fns[:half]))
        right = recurse(fns[half:])
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
            f"remat.sequential: `params` must be a list or tuple of {n}, one "
            "per function"
        )
    return params


def _sizes(
    segments: str | int | Sequence[int],
    n: int,
) -> list[int]:
    """Return the sizes of the segments of n functions."""
    if isinstance(segments, str):
        if segments != "sqrt":
            raise ValueError(
                'remat.sequential: `segments` must be "sqrt", "log", a number or '
                f"sizes, not {segments!r}"
            )
        segments = round(n**0.5)
    segments = _integers.plain(segments)
    if isinstance(segments, tuple):
        sizes = list(segments)
        if sum(sizes) != n or min(sizes) < 1:
            raise ValueError(
                "remat.sequential: `segments` must be positive sizes that sum "
                f"to {n}, not {sizes}"
            )
        return sizes
    if not 1 <= segments <= n:
        raise ValueError(
            f"remat.sequential: `segments` must be in 1..{n}, not {segments}"
        )
    # The first ones take the functions left over.
    smallest, left_over = divmod(n, segments)
    return [smallest + (i < left_over) for i in range(segments)]
