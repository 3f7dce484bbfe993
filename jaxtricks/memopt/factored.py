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

from jaxtricks import _sharding
from jaxtricks import roles as roles_lib
from jaxtricks._typing import Array, Roles
from jaxtricks.memopt import _leaves, _momentum

_MANY = 4096  # from here on XLA's CPU backend sums in one kernel


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


def is_second_moment(x: Any) -> bool:
    """Whether x is the second moment of one leaf."""
    return isinstance(x, Factored | Full)


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
    """u = g times size times the factors, all of which broadcast; means over slices, None if unasked."""

    size: Array | None
    factors: tuple[Array, ...]
    mean_square: Array | None
    parameter_square: Array | None


def layout(shape: tuple[int, ...], roles: Roles | None) -> Layout:
    """Axes of a leaf by role, or by the rule of Mesh TensorFlow: the two largest, ties to the earlier."""
    rank = len(shape)
    if roles is None:
        order = sorted(range(rank), key=lambda i: -shape[i])
        pair = tuple((i,) for i in order[:2]) if rank >= 2 else ((), ())
        return Layout(pair[1], pair[0], (), tuple(range(rank)))
    rows, columns = roles_lib.positions(roles, "in"), roles_lib.positions(roles, "out")
    batch = roles_lib.positions(roles, "batch")
    return Layout(rows, columns, batch, tuple(i for i in range(rank) if i not in batch))


def zeros(leaf: Any, where: Layout, factored: bool, min_dim: int) -> Factored | Full:
    """Second moment of a leaf before the first update, placed as the leaf is."""
    shape = tuple(leaf.shape)
    sides = [math.prod(shape[i] for i in side) for side in (where.rows, where.columns)]
    if not (factored and where.rows and where.columns and 0 not in shape and min(sides) >= min_dim):
        return Full(_leaves.zeros(leaf))
    return Factored(*(_leaves.zeros(leaf, without=side) for side in (where.columns, where.rows)))


@functools.partial(jax.jit, static_argnames=("where", "config"))
def step(
    g: Any, p: Any, v: Any, m: Any, seed: Any, hyper: Hyper, *, where: Layout, config: Config
) -> Any:
    """(update, v, m) of one leaf; without `rate` the update is the scaled gradient, not negated."""
    dtype, result = v[0].dtype, _leaves.update_dtype(g, p)
    moments = _factored if isinstance(v, Factored) else _full
    v, direction = moments(g, p, v, hyper, where, config)
    # Numbers are multiplied with numbers, the product with the smallest factor, and only that with the leaf.
    scale = _scale(direction, hyper, config)
    small, *factors = direction.factors
    u = functools.reduce(jnp.multiply, [small * scale, *factors], g.astype(dtype))
    if hyper.rate is None:
        return u.astype(result), v, m
    if m is not None:
        u = hyper.beta1 * _momentum.read(m, dtype) + (1 - hyper.beta1) * u
        m = _momentum.write(u, m, seed)
    if config.momentum_before_rate:
        u = hyper.rate * u
    if hyper.weight_decay is not None:
        u = u + hyper.rate * hyper.weight_decay * p.astype(dtype)
    return (-u).astype(result), v, m


def _full(
    g: Any, p: Any, v: Full, hyper: Hyper, where: Layout, config: Config
) -> tuple[Full, _Direction]:
    square = jnp.square(g.astype(v.v.dtype))
    new = _lerp(v.v, square + hyper.eps_square, hyper.one_minus_beta2)
    slices = _slices(hyper, where, config)
    ratio, weights = square / new, jnp.square(p.astype(new.dtype))
    if slices is not None and config.parameter_scale and slices == where.others:
        means = _means(ratio, weights, slices)
    else:
        means = _optional_mean(ratio, slices), _parameter_square(p, new.dtype, where, config)
    return Full(new), _Direction(None, (jax.lax.rsqrt(new),), *means)


def _factored(
    g: Any, p: Any, v: Factored, hyper: Hyper, where: Layout, config: Config
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
    plain, weighted = _two_means(g, early, sides[second])
    late = accumulate(second, plain)
    # mean(v_in) = mean(v_out), averages of the same mean of g^2: take the one that is at hand. It and
    # what it multiplies vary with "batch" and "none" axes only.
    norm, square = _means(late, weighted / late, sides[first])
    mean_square = _optional_mean(norm * square, _slices(hyper, where, config))
    # V itself is never formed: the product of the two means may leave the range of the dtype.
    factors = (jax.lax.rsqrt(late), jax.lax.rsqrt(early))
    parameter_square = _parameter_square(p, dtype, where, config)
    return Factored(*new), _Direction(jnp.sqrt(norm), factors, mean_square, parameter_square)


def _slices(hyper: Hyper, where: Layout, config: Config) -> tuple[int, ...] | None:
    """Axes over which RMS(u) is taken; None without clipping."""
    if hyper.clip is None:
        return None
    return where.others if config.clip_per_slice else tuple(sorted(where.batch + where.others))


def _parameter_square(p: Any, dtype: Any, where: Layout, config: Config) -> Array | None:
    axes = where.others if config.parameter_scale else None
    return _optional_mean(jnp.square(p.astype(dtype)), axes)


def _two_means(g: Array, v: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """(mean of g^2, mean of g^2 / v) over the axes, in one pass over g on every backend."""
    if _sharding.is_explicit(g, v):
        # Where g and v are sharded differently, so are the results of the two forms; branches must agree.
        return two_means_separate(g, v, axes)
    return jax.lax.platform_dependent(
        g,
        v,
        cpu=functools.partial(two_means_stacked, axes=axes),
        default=functools.partial(two_means_separate, axes=axes),
    )


def two_means_separate(g: Array, v: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The two means as they are written: the compilers for accelerators make one pass of them."""
    square = jnp.square(g.astype(v.dtype))
    return _mean(square, axes), _mean(square * (1 / v), axes)


def two_means_stacked(g: Array, v: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """One reduction with an axis more: XLA's CPU backend has none with two results."""
    share = 1 / _count(g, axes)
    weights = jnp.stack([jnp.full_like(v, share), share / v])
    # Without the barrier g^2 would be shared with the other pass, and written to memory for that.
    square = jnp.square(jax.lax.optimization_barrier(g).astype(v.dtype))[None]
    later = tuple(i + 1 for i in axes)
    means = jnp.expand_dims(jnp.sum(square * weights, axis=later), later)
    return means[0], means[1]


def _scale(direction: _Direction, hyper: Hyper, config: Config) -> Any:
    """What multiplies u, per slice: its own size, RMS(p), the rate if it comes here, and clipping."""
    factors = [] if direction.size is None else [direction.size]
    if direction.parameter_square is not None:
        size = jnp.maximum(jnp.sqrt(direction.parameter_square), hyper.eps_scale)
        factors.append(size if hyper.max_scale is None else jnp.minimum(size, hyper.max_scale))
    if hyper.rate is not None and not config.momentum_before_rate:
        factors.append(hyper.rate)
    scale = functools.reduce(jnp.multiply, factors) if factors else jnp.ones_like(hyper.eps_square)
    if direction.mean_square is None:
        return scale
    return scale / jnp.maximum(jnp.sqrt(direction.mean_square) / hyper.clip, 1)


def _lerp(old: Array, new: Array, weight: Any) -> Array:
    # Not old + weight (new - old): at weight 1, before decay_offset, that loses what is much below old.
    return (1 - weight) * old + weight * new


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(x, axis=axes, keepdims=True) / _count(x, axes)


def _optional_mean(x: Array, axes: tuple[int, ...] | None) -> Array | None:
    return None if axes is None else _mean(x, axes)


def _means(a: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The means of two arrays of one shape.

    Few numbers are summed in one reduction with two results: of each small sum alone XLA's CPU backend
    makes three kernels, which is what the compile time of large trees is spent on. Of shards it is made
    by gathering what every device has, so on a mesh the sums are apart, which are all-reduced.
    """
    n = _count(a, axes)
    if n >= _MANY or _sharding.on_mesh(a):
        return _mean(a, axes), _mean(b, axes)
    zero = jnp.zeros([], a.dtype)
    sums = jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
    return jnp.expand_dims(sums[0], axes) / n, jnp.expand_dims(sums[1], axes) / n


def _count(x: Array, axes: tuple[int, ...]) -> int:
    # One for a leaf without elements: its mean is zero.
    return max(1, math.prod(x.shape[i] for i in axes))
