"""The arithmetic of Adafactor on one leaf: which axes are factored, moments, clipping, the step."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _tree
from jaxtricks import axes as axes_
from jaxtricks._types import Array, Roles
from jaxtricks.memopt import leaves


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
    """Second moment of a leaf before the first update."""
    shape, dtype = tuple(leaf.shape), _tree.wide_dtype(leaf)
    sides = [math.prod(shape[i] for i in side) for side in (where.rows, where.columns)]
    if not (factored and where.rows and where.columns and 0 not in shape and min(sides) >= min_dim):
        return Full(jnp.zeros(shape, dtype))
    kept = [
        [n for i, n in enumerate(shape) if i not in side] for side in (where.columns, where.rows)
    ]
    return Factored(*(jnp.zeros(shape, dtype) for shape in kept))


@functools.partial(jax.jit, static_argnames=("where", "config"))
def step(g: Any, p: Any, v: Any, m: Any, hyper: Hyper, *, where: Layout, config: Config) -> Any:
    """(update, v, m) of one leaf; without `rate` the update is the scaled gradient, not negated."""
    dtype, result = _tree.wide_dtype(v[0]), leaves.update_dtype(g, p)
    g, p = g.astype(dtype), p.astype(dtype)
    v = _accumulate(v, jnp.square(g) + hyper.eps_square, hyper.one_minus_beta2, where)
    u = _precondition(g, v, where)
    if hyper.clip is not None:
        over = _rms(u, where.others if config.clip_per_slice else tuple(range(u.ndim))) / hyper.clip
        u = u / jnp.maximum(over, 1)
    if config.parameter_scale:
        scale = jnp.maximum(_rms(p, where.others), hyper.eps_scale)
        u = u * (scale if hyper.max_scale is None else jnp.minimum(scale, hyper.max_scale))
    if hyper.rate is None:
        return u.astype(result), v, m
    if not config.momentum_before_rate:
        u = hyper.rate * u
    if m is not None:
        u = hyper.beta1 * m.astype(dtype) + (1 - hyper.beta1) * u
        m = u.astype(m.dtype)
    if config.momentum_before_rate:
        u = hyper.rate * u
    if hyper.weight_decay is not None:
        u = u + hyper.rate * hyper.weight_decay * p
    return (-u).astype(result), v, m


def _accumulate(v: Any, g2: Array, weight: Any, where: Layout) -> Factored | Full:
    if isinstance(v, Full):
        return Full(_lerp(v.v, g2, weight))
    v_in = _lerp(v.v_in, jnp.mean(g2, axis=where.columns), weight)
    return Factored(v_in, _lerp(v.v_out, jnp.mean(g2, axis=where.rows), weight))


def _lerp(old: Array, new: Array, weight: Any) -> Array:
    return (1 - weight) * old + weight * new


def _precondition(g: Array, v: Any, where: Layout) -> Array:
    if isinstance(v, Full):
        return g * jax.lax.rsqrt(v.v)
    # V itself is never formed: the product of the two means may leave the range of the dtype.
    v_in = jnp.expand_dims(v.v_in, where.columns)
    r = jax.lax.rsqrt(v_in / jnp.mean(v_in, axis=where.rows, keepdims=True))
    return g * r * jax.lax.rsqrt(jnp.expand_dims(v.v_out, where.rows))


def _rms(x: Array, axes: tuple[int, ...]) -> Array:
    if not axes:
        return jnp.abs(x)
    n = max(1, math.prod(x.shape[i] for i in axes))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True) / n)
