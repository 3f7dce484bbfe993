"""How far all other classes are above the label: what every softmax loss of the room is made of.

gap = log sum_{j != y} exp(z'_j) - z'_y with z' = gain z + offset. The label is left out of the sum, so that
softplus(gap) = -log p_y and softplus(-gap) = -log(1 - p_y) are exact even where p_y rounds to 1.

The forward and backward pass read and write [..., C] as often as those of plain cross entropy: the
maximum is that of the bare logits, which bounds the others closely enough, and the derivative reuses
the exponentials.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxtricks import _sharding
from jaxtricks._typing import Array

_SLACK = 100.0
"""How far apart the bounds of the largest logit may be: e^50 and a sum of many e^50 are finite."""


def gap(z: Array, gain: Array, offset: Array, labels: Array) -> Array:
    """log sum_{j != y} exp(gain_j z_j + offset_j) - (gain_y z_y + offset_y).

    Args:
      z: [..., C] logits; -inf is a class that is not offered.
      gain: [C], or [] for all, positive.
      offset: [C], finite.
      labels: [...] int32; what is outside of [0, C) gets any number.

    Returns:
      [...]; a very low number where no other class is offered, inf where the class of the label is
      not, NaN where a logit is NaN or inf.
    """
    top = jax.lax.stop_gradient(_top(z, gain, offset))
    return _gap(z, gain, offset, top, labels)


def _top(z: Array, gain: Array, offset: Array) -> Array:
    """Close to the largest of gain z + offset, within _SLACK / 2."""
    largest = jnp.max(z, axis=-1)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)  # a row without any class
    ends = jnp.min(gain) * largest, jnp.max(gain) * largest
    low = jnp.minimum(*ends) + jnp.min(offset)
    high = jnp.maximum(*ends) + jnp.max(offset)
    # Of a single gain the bounds are apart by what only [C] decides: no look at the batch.
    apart = jnp.max(offset) - jnp.min(offset) if gain.ndim == 0 else jnp.max(high - low)
    return jax.lax.cond(
        apart <= _SLACK,
        lambda z: low / 2 + high / 2,  # their sum may be beyond the largest float
        lambda z: jnp.maximum(jnp.max(_affine(z, gain, offset), axis=-1), lowest(z)),
        z,
    )


@jax.custom_jvp
def _gap(z: Array, gain: Array, offset: Array, top: Array, labels: Array) -> Array:
    return _parts(z, gain, offset, top, labels)[0]


def _gap_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    z, gain, _, _, labels = primals
    out, terms, total = _parts(*primals)
    share = terms * (1 / jnp.where(total == 0, 1, total))[..., None]
    share = jnp.where(is_label(labels, z), -1, share)
    dz, dgain, doffset = tangents[:3]
    moves = []
    if not isinstance(dz, SymbolicZero):
        moves.append(rows(gain, z) * dz)
    if not isinstance(dgain, SymbolicZero):
        moves.append(rows(dgain, z) * jnp.where(jnp.isneginf(z), 0, z))
    if not isinstance(doffset, SymbolicZero):
        moves.append(rows(doffset, z))
    if not moves:
        return out, jnp.zeros_like(out)
    return out, jnp.sum(share * sum(moves[1:], moves[0]), axis=-1)


_gap.defjvp(_gap_jvp, symbolic_zeros=True)


def _parts(
    z: Array, gain: Array, offset: Array, top: Array, labels: Array
) -> tuple[Array, Array, Array]:
    """(gap, exp(z' - top) of the other classes, their sum)."""
    terms = jnp.exp(_affine(z, gain, offset) - top[..., None])
    if _sharding.on_mesh(z):  # indices into sharded logits would gather the logits, or the indices
        terms, own = _by_mask(terms, z, labels)
    else:
        terms, own = jax.lax.platform_dependent(terms, z, labels, cpu=_by_index, default=_by_mask)
    total = jnp.sum(terms, axis=-1)
    own_gain = gain if gain.ndim == 0 else of_label(gain, labels, z)
    own = own_gain * own + of_label(offset, labels, z)
    # Asked as == 0, so that the sum of a NaN is not taken for that of no class.
    alone = total == 0
    # In this order: the log 2 of two equal logits is lost beside 1e30.
    distance = (top - own) + jnp.log(jnp.where(alone, 1, total))
    distance = jnp.where(alone, jnp.where(jnp.isfinite(own), floor(z), jnp.nan), distance)
    return distance, terms, total


def of_label(vector: Array, labels: Array, z: Array) -> Array:
    """vector[labels] of a [C] vector, for the labels [...] of the logits z [..., C]."""
    if _sharding.is_explicit(z):  # a gather does not propagate the sharding
        zero = jnp.zeros((), vector.dtype)
        return jnp.sum(jnp.where(is_label(labels, z), rows(vector, z), zero), axis=-1)
    return vector[jnp.clip(labels, 0, z.shape[-1] - 1)]


def _by_index(terms: Array, z: Array, labels: Array) -> tuple[Array, Array]:
    """(terms without that of the label, logit of the label), by a scatter and a gather."""
    at = jnp.clip(labels, 0, z.shape[-1] - 1)[..., None]
    others = jnp.put_along_axis(terms, at, jnp.zeros((), z.dtype), axis=-1, inplace=False)
    return others, jnp.take_along_axis(z, at, axis=-1)[..., 0]


def _by_mask(terms: Array, z: Array, labels: Array) -> tuple[Array, Array]:
    """The same by a mask, which accelerators fuse and which needs no indices on a sharded axis."""
    own = is_label(labels, z)
    zero = jnp.zeros((), z.dtype)
    return jnp.where(own, zero, terms), jnp.sum(jnp.where(own, z, zero), axis=-1)


def is_label(labels: Array, z: Array) -> Array:
    """[..., C] bool, the class of each label [...] int32; none for a label outside [0, C)."""
    return labels[..., None] == rows(jnp.arange(z.shape[-1], dtype=labels.dtype), z)


def _affine(z: Array, gain: Array, offset: Array) -> Array:
    return rows(gain, z) * z + rows(offset, z)


def rows(vector: Array, like: Array) -> Array:
    """[C] or [] with a leading axis of 1 for each of those of `like` [..., C]."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def floor(z: Array) -> Array:
    """What stands for a logit of -inf: low, but so that differences of two are finite."""
    return jnp.asarray(jnp.finfo(z.dtype).min / 8, z.dtype)


def lowest(z: Array) -> Array:
    """The lowest finite number of the logits' dtype."""
    return jnp.asarray(jnp.finfo(z.dtype).min, z.dtype)


def gaps(z: Array, left_out: Array | None = None) -> tuple[Array, Array]:
    """`gap` of every class at once, and where a class is offered.

    Args:
      z: [..., C] logits; -inf is a class that is not offered.
      left_out: [..., C] bool, classes that are in no sum, or None.

    Returns:
      [..., C] log sum_{j != c} exp z_j - z_c, and 0 for a class that is not offered; [..., C] bool.
    """
    offered = ~jnp.isneginf(z)
    largest = jnp.max(z, axis=-1, keepdims=True)
    # Relative to the largest one, so that no log is added to 1e30.
    z = z - jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0, largest))
    others = _logsumexp_of_others(z if left_out is None else jnp.where(left_out, lowest(z), z))
    distance = others - jnp.where(offered, z, 0)
    # Finite where no other class is offered, so that a focal factor of it has a derivative.
    return jnp.where(offered, jnp.maximum(distance, floor(z)), 0), offered


def _logsumexp_of_others(z: Array) -> Array:
    """log sum_{j != c} exp z_j for every c at once, without cancellation; -inf is not in the sum."""
    top = jnp.argmax(z, axis=-1, keepdims=True) == rows(jnp.arange(z.shape[-1]), z)
    total = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    # The lowest float adds nothing to the others, and has a gradient where there are none.
    without_top = jax.nn.logsumexp(jnp.where(top, lowest(z), z), axis=-1, keepdims=True)
    share = jnp.exp(jnp.where(top, total - 1, z) - total)  # <= 1/2 wherever it is used
    return jnp.where(top, without_top, total + jnp.log1p(-share))


def expected(q: Array, each: Array, offered: Array) -> Array:
    """sum_c q_c each_c [...]: a class that is not offered costs inf where q_c > 0, else nothing."""
    # A class without a share may cost inf, and 0 times that would be NaN.
    counts = offered & ((q != 0) | jnp.isnan(each))
    total = jnp.sum(jnp.where(counts, q * each, 0), axis=-1)
    return total + jnp.where(jnp.any(~offered & (q > 0), axis=-1), jnp.inf, 0)
