"""Normalize batches by a mean per channel and one variance for the whole layer.

What. mean_c is taken over batch and space, as in batch normalization; the variance is
one scalar over batch, space and channels. With few examples a single variance is
estimated from C times as many numbers.

Use.

    import jax.numpy as jnp
    from flax import nnx
    import jaxtricks as jt
    norm = jt.nnx.ExtendedBatchNorm(16, rngs=nnx.Rngs(0))  # in place of nnx.BatchNorm
    # or the two functions
    x = jnp.arange(32.0).reshape(2, 2, 2, 4)
    mean, var = jt.ebn.extended_moments(x)
    y = jt.ebn.normalize(x, mean, var, jnp.ones(4), jnp.zeros(4))

Settings to start from. momentum 0.99, epsilon 1e-3, variance "channel". Momentum 0.99
remembers about a hundred steps; take 0.9 for short runs.

When it helps and when not. Batches of a few images per device, or channels with one
value per example. With large batches the statistics of every channel are good already.
A channel of high variance shrinks all the others, since they share the divisor.

Cost. One pass over x for both sums; the running variance is a scalar. Figures:
docs/techniques/ebn.md.

Composes with. jit under SPMD needs nothing; inside shard_map give `axis_name`. Masks may
leave different counts on every device. It folds into the convolution in front of it
(`reparam.Norm`). vmap, scan and remat: the functions are pure.

Differences from the paper and from optax/flax. Sums and counts are added up across
devices, where Flax averages the means; statistics stay float32.

References. Luo, Peng, "Extended Batch Normalization", arXiv 2003.05569.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks import _dtypes
from jaxtricks._arguments import checked
from jaxtricks._typing import Array

__all__ = ["Moments", "extended_moments", "moments", "normalize"]

AxisName = str | tuple[str, ...]


class Moments(NamedTuple):
    """Moments of one batch.

    Attributes:
      mean: [C].
      var: [] shared by the channels.
      count: [] number of entries behind var; 0 if the mask left none.
    """

    mean: Float[Array, " C"]
    var: Float[Array, ""]
    count: Float[Array, ""]


@checked
def extended_moments(
    x: Float[Array, "*batch C"],
    *,
    mask: Bool[Array, "..."]
    | Integer[Array, "..."]
    | Float[Array, "..."]
    | None = None,
    axis_name: AxisName | None = None,
    variance: Literal["channel", "grand"] = "channel",
) -> tuple[Float[Array, " C"], Float[Array, ""]]:
    """Compute a mean per channel and one variance for all channels.

    n_c = sum_i m_ic;   mean_c = sum_i m_ic x_ic / n_c;   n = sum_c n_c
    var = sum_ic m_ic (x_ic - mean_c)^2 / n              "channel"
    var = sum_ic m_ic (x_ic - sum_c n_c mean_c / n)^2 / n    "grand"

    Args:
      x: [..., C], channels last.
      mask: which entries count (nonzero = counts). Either the leading axes of x in
        order, each of full size or 1: [N], [N, H], [N, 1, W], [N, H, W] for
        x [N, H, W, C]; or as many axes as x, each of full size or 1, the last one being the
        channels: [N, H, W, 1], [1, 1, 1, C].
      axis_name: mapped axes (shard_map, pmap, vmap) to sum over; sums and counts are
        added, so devices may see different counts.
      variance: about the channels' means or about the grand mean.

    Returns:
      mean [C] and var [], float32 (float64 for float64 x). Masked entries may be NaN. A
      channel without entries has mean 0; no entries at all give mean 0 and variance 0.

    Raises:
      ValueError: unknown `variance`, or a mask whose shape does not fit.

    Example:
      >>> mean, var = extended_moments(jnp.array([[0.0, 10.0], [2.0, 14.0]]))
      >>> mean.tolist(), float(var)
      ([1.0, 12.0], 2.5)

    References:
      Luo, Peng, arXiv 2003.05569.
    """
    batch = moments(x, mask=mask, axis_name=axis_name, variance=variance)
    return batch.mean, batch.var


@checked
def moments(
    x: Float[Array, "*batch C"],
    *,
    mask: Bool[Array, "..."]
    | Integer[Array, "..."]
    | Float[Array, "..."]
    | None = None,
    axis_name: AxisName | None = None,
    variance: Literal["channel", "grand"] = "channel",
) -> Moments:
    """Compute `extended_moments` and the count, which tells whether the mask was empty.

    Args:
      x: see `extended_moments`.
      mask: see `extended_moments`.
      axis_name: see `extended_moments`.
      variance: see `extended_moments`.

    Returns:
      Moments(mean, var, count).

    Raises:
      ValueError: as `extended_moments`.

    Example:
      >>> float(moments(jnp.ones((4, 3)), mask=jnp.array([True, False, False, True])).count)
      6.0
    """
    if variance not in ("channel", "grand"):
        raise ValueError(
            f"ebn: `variance` is {variance!r}; use 'channel' or 'grand'"
        )
    _dtypes.check_floating("ebn: `x`", x)
    x = jnp.asarray(x, _dtypes.wide_dtype(x))
    over = tuple(range(x.ndim - 1))
    if mask is None:
        keep = None
        count = jnp.full(x.shape[-1:], math.prod(x.shape[:-1]), x.dtype)
    else:
        keep = _mask_like(mask, x)
        count = jnp.sum(keep, axis=over, dtype=x.dtype)

    def only(values: Array) -> Array:
        return values if keep is None else jnp.where(keep, values, 0)

    # Sums are taken about a first estimate of the mean and corrected by its error. The
    # result does not depend on the estimate, so no gradient needs to flow through it.
    guess = jax.lax.stop_gradient(x)
    guess = _sample(guess) if keep is None else only(guess)
    sampled = count * (guess.size / x.size) if x.size else count
    # One collective for the three sums.
    local = jnp.stack([count, sampled, jnp.sum(guess, axis=over)])
    count, sampled, first = _psum(local, axis_name)
    shift = first / jnp.maximum(sampled, 1)
    centred = only(x - _row(shift, x))
    rest, squares = _psum(jnp.stack(_sums(centred)), axis_name)
    error = rest / jnp.maximum(count, 1)
    mean = shift + error
    n = jnp.sum(count)
    # Rounding may take the difference of squares below zero.
    within = jnp.maximum(squares - count * error * error, 0)
    if variance == "grand":
        grand = jnp.sum(count * mean) / jnp.maximum(n, 1)
        within = within + count * jnp.square(mean - grand)
    return Moments(mean, jnp.sum(within) / jnp.maximum(n, 1), n)


@checked
def normalize(
    x: Float[Array, "*batch C"],
    mean: Float[Array, " C"],
    var: Float[Array, ""] | Float[Array, " C"],
    scale: Float[Array, " C"] | None = None,
    bias: Float[Array, " C"] | None = None,
    *,
    epsilon: float = 1e-3,
) -> Float[Array, "*batch C"]:
    """Compute (x - mean) / sqrt(var + epsilon) * scale + bias.

    Args:
      x: [..., C].
      mean: [C].
      var: [] (or [C], as batch normalization has it).
      scale: [C] or None for ones.
      bias: [C] or None for zeros.
      epsilon: added to the variance, inside the root.

    Returns:
      An array of x's shape and dtype, computed in float32 or better.

    Example:
      >>> x = jnp.array([[0.0, 10.0], [2.0, 14.0]])
      >>> normalize(x, jnp.array([1.0, 12.0]), jnp.array(4.0), epsilon=0.0).tolist()
      [[-0.5, -1.0], [0.5, 1.0]]
    """
    x = jnp.asarray(x)
    _dtypes.check_floating("ebn.normalize: `x`", x)
    dtype = _dtypes.wide_dtype(x, mean, var, scale, bias)
    factor = jax.lax.rsqrt(jnp.asarray(var, dtype) + epsilon)
    if scale is not None:
        factor = factor * jnp.asarray(scale, dtype)
    mean = jnp.asarray(mean, dtype)
    # The gradient of mean goes through the offset: with that of bias it is one sum over
    # the cotangents, where (x - mean) * factor would need a second.
    fixed = jax.lax.stop_gradient(mean)
    offset = (fixed - mean) * factor
    if bias is not None:
        offset = offset + jnp.asarray(bias, dtype)
    return _affine(jnp.asarray(x, dtype), fixed, factor, offset).astype(x.dtype)


@jax.custom_jvp
def _affine(x: Array, shift: Array, factor: Array, offset: Array) -> Array:
    """Compute (x - shift) * factor + offset, sharing nothing between the two passes.

    XLA's CPU backend would compute the common part (x - shift, and factor broadcast to
    x) once, write it at the size of x and read it twice. Barriers around the small
    vectors make the two passes differ, so each is fused into its reader.
    """
    shift, factor, offset = map(
        jax.lax.optimization_barrier, (shift, factor, offset)
    )
    return (x - _row(shift, x)) * _row(factor, x) + _row(offset, x)


@_affine.defjvp
def _affine_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    x, shift, factor, _ = primals
    dx, dshift, dfactor, doffset = tangents
    centred = x - _row(shift, x)
    dy = (
        (dx - _row(dshift, x)) * _row(factor, x)
        + centred * _row(dfactor, x)
        + _row(doffset, x)
    )
    return _affine(*primals), dy


def _sample(x: Array) -> Array:
    """Take at least 1/16 of the positions, by strides along space.

    The batch axis stays whole, because it may be sharded.

    Its mean m is as good as the true one to take squares about. With a share p of every
    channel's entries in the sample, n var >= sum over the sample of (x - mean)^2 >= p n
    (m - mean)^2 for any data, so that E[(x - m)^2] = var + (m - mean)^2 <= (1 + 1/p)
    var: what is subtracted to get var from it costs at most a factor 1 + 1/p in
    relative error. Without a spatial axis the sample is everything.
    """
    space = x.ndim - 2
    if space < 1:
        return x
    stride = slice(None, None, int(16 ** (1 / space)))
    return x[(slice(None), *[stride] * space)]


@jax.custom_jvp
def _sums(x: Array) -> tuple[Array, Array]:
    """Compute (sum of x, sum of x^2) over all axes but the last, reading x once.

    JAX has no derivative for the reduction of a pair, so this function defines it. One
    axis is reduced first: the CPU backend does not vectorize a reduction over all axes.
    """
    pair = (x, x * x)
    if x.ndim > 1:
        zero = jnp.zeros_like(x, shape=())
        pair = jax.lax.reduce(
            pair,
            (zero, zero),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            (x.ndim - 2,),
        )
    over = tuple(range(x.ndim - 2))
    return jnp.sum(pair[0], axis=over), jnp.sum(pair[1], axis=over)


@_sums.defjvp
def _sums_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    over = tuple(range(x.ndim - 1))
    return _sums(x), (jnp.sum(dx, axis=over), 2 * jnp.sum(x * dx, axis=over))


def _row(values: Array, x: Array) -> Array:
    """Reshape [C] to [1, ..., 1, C] with the rank of x; leave scalars alone."""
    if not values.ndim:
        return values
    return values.reshape((1,) * (x.ndim - 1) + (-1,))


def _mask_like(mask: Array, x: Array) -> Array:
    mask = jnp.asarray(mask)
    fits = mask.ndim <= x.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, x.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"ebn: a `mask` of shape {mask.shape} does not fit x of shape "
            f"{x.shape}: give the leading axes of x in order, or as many axes "
            "as x has, each of full size or 1"
        )
    mask = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    keep = mask if mask.dtype == bool else mask != 0
    return jnp.broadcast_to(keep, x.shape)


def _psum(values: Array, axis_name: AxisName | None) -> Array:
    return values if axis_name is None else jax.lax.psum(values, axis_name)
