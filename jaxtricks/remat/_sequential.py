"""Nested loops: lax.scan whose memory grows slower than its length."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _integers, _tree
from jaxtricks._arguments import checked


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
    """jax.lax.scan that keeps about sqrt(n) carries for the backward pass instead of n residuals.

    L nested loops of about n**(1/L) steps, each recomputed from its first carry, keep L n**(1/L) carries
    for L more forward passes. Loops divide n where they can; else the steps left over (13 = 4 x 3 + 1)
    run in a loop of their own, which costs a copy of xs and ys. Inner loops copy their part of xs.

    Args:
      body: (carry, x) -> (carry, y); recomputed in every step.
      init: first carry, a pytree.
      xs: pytree of arrays [n, ...], of any dtype (typed keys too), or None with a length.
      levels: "sqrt", 2 loops; "log", loops of about 4 steps; how many; or their lengths, outermost
        first, whose product is n.
      length, reverse, unroll: as in jax.lax.scan; unroll is that of the innermost loops.

    Returns:
      (carry, ys [n, ...]) of jax.lax.scan, differentiable in both modes.

    Raises:
      ValueError: xs of no or different lengths; levels that are unknown, below 1, or do not multiply to n.

    Example:
      >>> body = lambda c, x: (jnp.sin(c * x), c)
      >>> total = lambda w: scan(body, w, jnp.ones(13))[1].sum()
      >>> print(jax.grad(total)(jnp.float32(0.0)))
      13.0

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, algorithm 1 and section
      4.4.
    """
    n = _length(xs, length)
    return nested(_recomputed(body), init, xs, n, _outer(levels, n), reverse=reverse, unroll=unroll)


def nested(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    n: int,
    outer: Sequence[int],
    *,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """jax.lax.scan of a step as nested loops, each but the outermost recomputed.

    Args:
      step: (carry, x) -> (carry, y), recomputed only if it does so itself.
      carry, xs: as in jax.lax.scan.
      n: how many steps.
      outer: lengths of all loops but the innermost, outermost first.
      reverse, unroll: as in jax.lax.scan.
    """
    if not outer:
        return jax.lax.scan(step, carry, xs, n, reverse, unroll)
    again = functools.partial(nested, step, reverse=reverse, unroll=unroll)
    k, m = outer[0], n // outer[0]
    inner = _recomputed(lambda carry, xs: again(carry, xs, m, outer[1:]))

    def loops(carry: Any) -> tuple[Any, Any]:
        blocks = jax.tree.map(lambda x: x[: k * m].reshape(k, m, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(inner, carry, blocks, k, reverse)
        return carry, jax.tree.map(lambda y: y.reshape(k * m, *y.shape[2:]), ys)

    def rest(carry: Any) -> tuple[Any, Any]:
        return again(carry, jax.tree.map(lambda x: x[k * m :], xs), n - k * m, ())

    if n == k * m:
        return loops(carry)
    if reverse:
        carry, last = rest(carry)
        carry, first = loops(carry)
    else:
        carry, first = loops(carry)
        carry, last = rest(carry)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


def _recomputed(body: Callable[..., Any]) -> Callable[..., Any]:
    # The backward pass of a loop is a loop of its own, so nothing can be merged across the two and
    # jax.checkpoint needs no barrier, with jax_remat3 or without: the bytes are those of recompute_grad in
    # every pairing measured (n = 16, 64, 256), for up to 25% fewer FLOPs, and forward mode works.
    return jax.checkpoint(body, prevent_cse=False)


def _length(xs: Any, length: int | None) -> int:
    found = {} if length is None else {"`length`": operator.index(length)}
    for path, x in _tree.leaves_with_paths(xs):
        if not np.shape(x):
            raise ValueError(
                f"remat.scan: `xs` has a scalar ({path or 'xs'}): stack its values [n]"
            )
        found[f"`xs` ({path})" if path else "`xs`"] = np.shape(x)[0]
    if not found:
        raise ValueError("remat.scan: `xs` has no arrays: give the `length`")
    if len(set(found.values())) > 1:
        table = ", ".join(f"{name} {n}" for name, n in found.items())
        raise ValueError(f"remat.scan: `xs` must have one length, not {table}")
    return next(iter(found.values()))


def _outer(levels: str | int | Sequence[int], n: int) -> list[int]:
    """Lengths of all loops but the innermost."""
    if isinstance(levels, str):
        if levels not in ("sqrt", "log"):
            raise ValueError(
                f'remat.scan: `levels` must be "sqrt", "log", a number or lengths, not {levels!r}'
            )
        # A loop of b steps stacks b carries, b log_b(n) in all: as many at 4 as at 2, in half the forward
        # passes and with fewer copies of xs (measured, n = 256: 3.7 MB at 4, 6.4 at 2).
        levels = 2 if levels == "sqrt" else max(1, round(math.log(max(n, 1), 4)))
    levels = _integers.plain(levels)
    if isinstance(levels, tuple):
        lengths = list(levels)
        if math.prod(lengths) != n or not lengths:
            raise ValueError(f"remat.scan: `levels` must multiply to {n}, not {lengths}")
        return [k for k in lengths if k != 1][:-1]
    if levels < 1:
        raise ValueError(f"remat.scan: `levels` must be 1 or more, not {levels}")
    outer = []
    while levels > 1 and n > 3:
        outer.append(_divisor(n, max(2, round(n ** (1 / levels)))))
        n, levels = n // outer[-1], levels - 1
    return outer


def _divisor(n: int, k: int) -> int:
    """The divisor of n nearest to k and within a factor of two, else k: a rest makes XLA copy xs."""
    near = sorted(range((k + 1) // 2, 2 * k + 1), key=lambda d: max(d / k, k / d))
    return next((d for d in near if d > 1 and n % d == 0), k)
