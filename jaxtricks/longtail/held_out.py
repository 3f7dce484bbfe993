"""Held-out examples and losses of them in which every class weighs the same; what `posthoc` fits by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks._typing import Array
from jaxtricks.longtail._counts import (
    Counts,
    are_classes,
    as_mask,
    as_vector,
    class_indices,
    floating,
    log_prior,
    seen,
)


class HeldOut(NamedTuple):
    """Held-out examples in a row, [N, C], [N] and [N], and the counts [C]; every class weighs the same."""

    logits: Array
    labels: Array
    member: Array
    counts: Array


def held_out(
    name: str, logits: Array, labels: Array, counts: Counts, where: Array | None
) -> HeldOut:
    """The examples that count; what the others hold is replaced."""
    z, y = floating(jnp.asarray(logits)), class_indices(labels).reshape(-1)
    n = as_vector(f"posthoc.{name}: `counts`", counts).astype(z.dtype)
    check_classes(name, "counts", n, z)
    batch = z.shape[:-1]
    z = z.reshape(-1, z.shape[-1])
    inside = are_classes(y, z.shape[-1])
    y = jnp.where(inside, y, 0)
    keep = inside & seen(n)[y]
    keep = keep if where is None else keep & as_mask(where, batch).reshape(-1)
    return HeldOut(jnp.where(keep[:, None], z, 0), y, keep, n)


def balanced(values: Array, held: HeldOut) -> Array:
    """The mean over the classes that have examples of the mean value of their examples."""
    size = held.counts.shape[0]
    kept = held.member.astype(values.dtype)
    total = jnp.zeros(size, values.dtype).at[held.labels].add(jnp.where(held.member, values, 0))
    members = jnp.zeros(size, values.dtype).at[held.labels].add(kept)
    means = total / jnp.maximum(members, 1)
    return jnp.sum(means) / jnp.maximum(jnp.sum(members > 0), 1).astype(values.dtype)


def centered_shift(counts: Array) -> tuple[Array, Array]:
    """(classes that take part, -log prior less its mean): balanced counts leave tau nothing to do."""
    known = seen(counts)
    offered = known | ~jnp.any(known)
    shift = jnp.where(known, -log_prior(counts), 0)
    center = jnp.sum(shift) / jnp.maximum(jnp.sum(known), 1).astype(shift.dtype)
    return offered, jnp.where(known, shift - center, 0)


def balanced_cross_entropy(
    theta: Array, z: Array, shift: Array, offered: Array, held: HeldOut
) -> tuple[Array, Array, Array]:
    """Value, gradient and Hessian by theta of the balanced cross entropy of theta_0 z + theta_1 shift."""
    scores = jnp.where(offered[None], theta[0] * z + theta[1] * shift[None], -jnp.inf)
    log_p, own = jax.nn.log_softmax(scores, axis=-1), held.labels[:, None]
    p, a = jnp.exp(log_p), shift[None]
    mean_z, mean_a = jnp.sum(p * z, -1), jnp.sum(p * a, -1)
    dz, da = z - mean_z[:, None], a - mean_a[:, None]  # centred: no difference of large squares
    at_label = jnp.take_along_axis(z, own, -1)[:, 0], shift[held.labels]
    terms = (
        -jnp.take_along_axis(log_p, own, -1)[:, 0],
        mean_z - at_label[0],
        mean_a - at_label[1],
        *(jnp.sum(p * x, -1) for x in (dz * dz, dz * da, da * da)),
    )
    value, *gradient, zz, za, aa = (balanced(term, held) for term in terms)
    return value, jnp.stack(gradient), jnp.stack([zz, za, za, aa]).reshape(2, 2)


def check_classes(function: str, name: str, values: Array, z: Array) -> None:
    """An error unless there is one number per logit."""
    if values.shape[0] != z.shape[-1]:
        raise ValueError(
            f"longtail.posthoc.{function}: `{name}` has {values.shape[0]} classes where the logits "
            f"have {z.shape[-1]}: pass one number per class"
        )
