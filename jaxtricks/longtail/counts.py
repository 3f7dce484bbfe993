"""How many examples each class has, and what follows from it alone."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from jaxtricks._types import Array

Counts = Num[Array, "C"] | Sequence[Any]
"""Training examples per class, [C]; may be traced, so a change of counts needs no new trace."""

UNSEEN_LOG_PRIOR = math.log(1e-12)
"""What stands for log 0: out of the softmax for every purpose, yet finite, as are its gradients."""


def class_counts(
    labels: Int[Array, "..."] | Sequence[Any], num_classes: int | np.integer
) -> Int[Array, "C"]:
    """Number of examples of each class: n_c = #{i : labels_i = c}.

    Counting by label value is what keeps the prior in the order of the logits; a directory listing
    sorts class "10" before class "2".

    Args:
      labels: integer class indices of any shape; values outside [0, num_classes) are not counted.
      num_classes: C, the length of the result.

    Returns:
      [C] counts: NumPy int64 for host labels, int32 on device for JAX arrays (works under jit).

    Raises:
      ValueError: if num_classes < 1 or the labels are not integers.

    >>> class_counts([0, 2, 2, 1, 2], 4).tolist()
    [1, 1, 3, 0]
    """
    if num_classes < 1:
        raise ValueError(
            "longtail.class_counts needs `num_classes` >= 1: pass the number of logits"
        )
    xp = np if isinstance(labels, Sequence | np.ndarray) else jnp
    labels, num_classes = xp.asarray(labels).reshape(-1), int(num_classes)
    if labels.size and not xp.issubdtype(labels.dtype, xp.integer):
        raise ValueError(
            f"longtail.class_counts needs integer `labels`, got {labels.dtype}: cast them"
        )
    if xp is np:
        inside = labels[(labels >= 0) & (labels < num_classes)].astype(np.int64)
        return np.bincount(inside, minlength=num_classes)
    target = jnp.where(labels < 0, num_classes, labels)  # a negative index would wrap around
    return jnp.zeros(num_classes, jnp.int32).at[target].add(1, mode="drop")


def as_vector(name: str, values: object) -> Array:
    """Any [C] sequence or array, checked to be one-dimensional."""
    vector = jnp.asarray(values)
    if vector.ndim != 1:
        raise ValueError(f"longtail.{name} must be one number per class, got shape {vector.shape}")
    return vector


def floating(values: Array) -> Array:
    """float32, or float64 where the values have it already."""
    return values.astype(values.dtype if values.dtype == jnp.float64 else jnp.float32)


def seen(counts: Num[Array, "C"]) -> Bool[Array, "C"]:
    """Classes that have examples."""
    return counts > 0


def log_prior(counts: Num[Array, "C"]) -> Float[Array, "C"]:
    """log(n_c / sum n), and UNSEEN_LOG_PRIOR for a class without examples."""
    counts = floating(counts)
    positive = jnp.where(seen(counts), counts, 1)
    log_share = jnp.log(positive) - jnp.log(
        jnp.maximum(jnp.sum(jnp.where(seen(counts), counts, 0)), 1)
    )
    return jnp.where(seen(counts), log_share, UNSEEN_LOG_PRIOR)


def at_least_rarest(counts: Num[Array, "C"]) -> Float[Array, "C"]:
    """The counts, where a class without examples is treated like the rarest class that has some."""
    counts = floating(counts)
    rarest = jnp.min(jnp.where(seen(counts), counts, jnp.inf))
    rarest = jnp.where(jnp.isfinite(rarest), rarest, 1)
    return jnp.where(seen(counts), counts, rarest)
