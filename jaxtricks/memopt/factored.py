"""The arithmetic of Adafactor on one leaf: which axes are factored, moments, clipping, the step.

Every pass over a leaf costs its size in memory traffic, so there are four, and nothing of the leaf's size
is written but the result: mean of g^2 over one side; over the other side, together with the weighted mean
that gives RMS(u) without forming u; RMS(p); the step.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import axes as axes_
from jaxtricks._types import Array, Roles
from jaxtricks.memopt import averages, leaves


class Factored(NamedTuple):
    """Second moment of a factored leaf, V = v_in v_out / mean(v_in).

    Attributes:
      v_in: mean of g^2 over the "out" axes, which are gone.
      v_out: mean of g^2 over the "in" axes, which are gone.
    """

    v_in: Any
    v_out: Any


class Full(NamedTuple):
    """Second moment of a leaf that is not factored.

    Attributes:
      v: moving average of g^2, shaped as the leaf.
    """

    v: Any


class Config(NamedTuple):
    """Arguments that do not depend on the step; hashable, so that equal leaves share one trace."""

    factored: bool
    parameter_scale: bool
    clip_per_slice: bool
    momentum_before_rate: bool


class Layout(NamedTuple):
    """Which axes of a leaf are factored against which, and which number independent slices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...]
    others: tuple[int, ...]


class Hyper(NamedTuple):
    """Arguments at one step, as arrays [] in the dtype of the leaf's state; None = off."""

    one_minus_beta2: Any
    clip: Any
    eps_square: Any
    eps_scale: Any
    max_scale: Any
    beta1: Any = None
    rate: Any = None
    weight_decay: Any = None


class _Direction(NamedTuple):
    """u = g times size times the factors, all of which broadcast; mean of u^2 per slice, None if unasked."""

    size: Array | None
    factors: tuple[Array, ...]
    mean_square: Array | None


def layout(shape: tuple[int, ...], roles: Roles | None) -> Layout:
    """Axes of a leaf by role, or by the rule of Mesh TensorFlow: the two largest, ties to the earlier."""
    rank = len(shape)
    if roles is None:
        order = sorted(range(rank), key=lambda i: -shape[i])
        pair = tuple((i,) for i in order[:2]) if rank >= 2 else ((), ())
        return Layout(pair[1], pair[0], (), tuple(range(rank)))
    rows, columns = axes_.positions(roles, "in"), axes_.positions(roles, "out")
    batch = axes_.positions(roles, "batch")
    return Layout(rows, columns, batch, tuple(i for i in range(rank) if i not in batch))


def zeros(leaf: Any, where: Layout, factored: bool, min_dim: int) -> Factored | Full:
    """Second moment of a leaf before the first update, placed as the leaf is."""
    shape = tuple(leaf.shape)
    sides = [math.prod(shape[i] for i in side) for side in (where.rows, where.columns)]
    if not (factored and where.rows and where.columns and 0 not in shape and min(sides) >= min_dim):
        return Full(leaves.zeros(leaf))
    return Factored(*(leaves.zeros(leaf, without=side) for side in (where.columns, where.rows)))


@functools.partial(jax.jit, static_argnames=("where", "config"))
def step(
    g: Any, p: Any, v: Any, m: Any, key: Any, hyper: Hyper, *, where: Layout, config: Config
) -> Any:
    """(update, v, m) of one leaf; without `rate` the update is the scaled gradient, not negated."""
    dtype, result = v[0].dtype, leaves.update_dtype(g, p)
    slices = where.others if config.clip_per_slice else tuple(range(g.ndim))
    moments = _factored if isinstance(v, Factored) else _full
    v, direction = moments(g, v, hyper, where, None if hyper.clip is None else slices)
    # Numbers are multiplied with numbers, the product with the smallest factor, and only that with the leaf.
    scale = _scale(p.astype(dtype), direction, hyper, where, config)
    small, *factors = direction.factors
    u = functools.reduce(jnp.multiply, [small * scale, *factors], g.astype(dtype))
    if hyper.rate is None:
        return u.astype(result), v, m
    if m is not None:
        u = hyper.beta1 * averages.read(m, dtype) + (1 - hyper.beta1) * u
        m = averages.write(u, m, key)
    if config.momentum_before_rate:
        u = hyper.rate * u
    if hyper.weight_decay is not None:
        u = u + hyper.rate * hyper.weight_decay * p.astype(dtype)
    return (-u).astype(result), v, m


def _full(g: Any, v: Full, hyper: Hyper, where: Layout, slices: Any) -> tuple[Full, _Direction]:
    square = jnp.square(g.astype(v.v.dtype))
    new = _lerp(v.v, square + hyper.eps_square, hyper.one_minus_beta2)
    mean_square = None if slices is None else _mean(square / new, slices)
    return Full(new), _Direction(None, (jax.lax.rsqrt(new),), mean_square)


def _factored(
    g: Any, v: Factored, hyper: Hyper, where: Layout, slices: Any
) -> tuple[Factored, _Direction]:
    dtype = v.v_in.dtype
    sides = (where.columns, where.rows)  # what v_in and v_out are means over
    # The side with the last axis comes second: two means at once are cheap where memory is contiguous.
    first = int(max(where.rows) < max(where.columns))
    second = 1 - first
    new = list(v)

    def accumulate(i: int, mean: Array) -> Array:
        mean = jnp.squeeze(mean, sides[i]) + hyper.eps_square
        new[i] = _lerp(v[i], mean, hyper.one_minus_beta2)
        return jnp.expand_dims(new[i], sides[i])

    early = accumulate(first, _mean(jnp.square(g.astype(dtype)), sides[first]))
    plain, weighted = _two_means(g, 1 / early, sides[second])
    late = accumulate(second, plain)
    norm = _mean(late if second == 0 else early, where.rows)
    mean_square = None
    if slices is not None:  # norm and what it multiplies vary with "batch" and "none" axes only
        mean_square = _mean(norm * _mean(weighted / late, sides[first]), slices)
    # V itself is never formed: the product of the two means may leave the range of the dtype.
    factors = (jax.lax.rsqrt(late), jax.lax.rsqrt(early))
    return Factored(*new), _Direction(jnp.sqrt(norm), factors, mean_square)


def _two_means(g: Array, weight: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """(mean of g^2, mean of g^2 weight) over the axes, in one pass over g on every backend."""

    def separate(g: Array, weight: Array) -> tuple[Array, Array]:
        square = jnp.square(g.astype(weight.dtype))
        return _mean(square, axes), _mean(square * weight, axes)

    def stacked(g: Array, weight: Array) -> tuple[Array, Array]:
        # XLA's CPU backend has no reduction with two results: one with an axis more reads g once.
        (g,) = leaves.reread(g)
        weights = jnp.stack([jnp.ones_like(weight), weight])
        square = jnp.square(g.astype(weight.dtype))[None]
        means = _mean(square * weights, tuple(i + 1 for i in axes))
        return means[0], means[1]

    return jax.lax.platform_dependent(g, weight, cpu=stacked, default=separate)


def _scale(p: Array, direction: _Direction, hyper: Hyper, where: Layout, config: Config) -> Any:
    """What multiplies u, per slice: its own size, clipping, RMS(p), and the rate if it comes here."""
    factors = [jnp.ones([], p.dtype)] if direction.size is None else [direction.size]
    if config.parameter_scale:
        size = jnp.maximum(jnp.sqrt(_mean(jnp.square(p), where.others)), hyper.eps_scale)
        factors.append(size if hyper.max_scale is None else jnp.minimum(size, hyper.max_scale))
    if hyper.rate is not None and not config.momentum_before_rate:
        factors.append(hyper.rate)
    scale = functools.reduce(jnp.multiply, factors)
    if direction.mean_square is None:
        return scale
    return scale / jnp.maximum(jnp.sqrt(direction.mean_square) / hyper.clip, 1)


def _lerp(old: Array, new: Array, weight: Any) -> Array:
    return (1 - weight) * old + weight * new


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    # Zero for a leaf without elements, which has no mean.
    n = max(1, math.prod(x.shape[i] for i in axes))
    return jnp.sum(x, axis=axes, keepdims=True) / n
