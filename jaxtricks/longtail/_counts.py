"""Count the examples of each class, and read labels, masks and class vectors."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from jaxtricks import _dtypes, _sharding
from jaxtricks._arguments import checked
from jaxtricks._typing import Array

Counts = Real[Array, "C"] | Sequence[Any]
"""Training examples per class, [C]; may be traced, so a change of counts needs no new trace."""

UNSEEN_LOG_PRIOR = math.log(1e-12)
"""Stand-in for log 0: negligible in any softmax, yet finite, as are its gradients."""


@checked
def class_counts(
    labels: Integer[Array, "..."] | Sequence[int] | Sequence[str],
    num_classes: int | np.integer,
    *,
    names: Sequence[str] | None = None,
) -> Integer[Array, "C"]:
    """Count the examples of each class: n_c = #{i : labels_i = c}.

    Counting by label value is what keeps the prior in the order of the logits; a
    directory listing sorts class "10" before class "2". Pass the class names to have
    their order checked.

    Args:
      labels: integer class indices of any shape; values outside [0, num_classes) are
        not counted. With names, they may be names.
      num_classes: C, the length of the result.
      names: [C] name of each logit. Integer labels and names like "0", "1", "10", "2"
        raise: label 2 is then class "10" in one place and class "2" in another.

    Returns:
      [C] counts: NumPy int64 for host labels, int32 on device for JAX arrays (works
      under jit).

    Raises:
      ValueError: if num_classes < 1, the labels are not integers, or the names are not
        C different ones, lack one that is a label, or are numbered out of order.

    >>> class_counts([0, 2, 2, 1, 2], 4).tolist()
    [1, 1, 3, 0]
    >>> class_counts(["cat", "dog", "dog"], 2, names=["dog", "cat"]).tolist()
    [2, 1]
    """
    if num_classes < 1:
        raise ValueError(
            "longtail.class_counts needs `num_classes` >= 1: pass the number of logits"
        )
    if names is not None:
        labels = _by_name(labels, names, int(num_classes))
    xp = np if isinstance(labels, Sequence | np.ndarray) else jnp
    labels = xp.asarray(labels)
    num_classes = int(num_classes)
    if labels.size and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            "longtail.class_counts needs integer `labels`, got "
            f"{labels.dtype}: cast them"
        )
    if xp is np:
        # NumPy does not compare the 4 bits of ml_dtypes.
        if labels.dtype.kind not in "iu":
            labels = labels.astype(np.int64)
        inside = labels[(labels >= 0) & (labels < num_classes)].astype(np.int64)
        return np.bincount(inside, minlength=num_classes)
    return _sharding.replicated(
        functools.partial(_counted, num_classes=num_classes), labels
    )


def _counted(labels: Array, *, num_classes: int) -> Array:
    labels = class_indices(labels)
    # A negative index would wrap around.
    target = jnp.where(labels < 0, num_classes, labels)
    return (
        jnp.zeros(num_classes, jnp.int32)
        .at[target.reshape(-1)]
        .add(1, mode="drop")
    )


def _by_name(labels: Any, names: Sequence[str], num_classes: int) -> Any:
    """Return labels as indices into the names, which are checked."""
    names = [str(name) for name in names]
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ValueError(
            f"longtail.class_counts: `names` are {len(names)}, "
            f"{len(set(names))} of them different, for {num_classes} classes: "
            "give every class a number"
        )
    if (
        not isinstance(labels, jnp.ndarray)
        and np.asarray(labels).dtype.kind in "USO"
    ):
        index = {name: c for c, name in enumerate(names)}
        flat = [str(label) for label in np.asarray(labels).reshape(-1)]
        if unknown := sorted(set(flat) - set(names)):
            raise ValueError(
                f"longtail.class_counts: {unknown[0]!r} is among the `labels` "
                "and not among the `names`: add it"
            )
        return np.array([index[label] for label in flat], np.int64)
    if names != _in_order(names):
        c = next(
            c for c, name in enumerate(_in_order(names)) if name != names[c]
        )
        raise ValueError(
            f"longtail.class_counts: `names` has {names[c]!r} in place {c}, "
            "which is the order of strings, not of numbers: sort them by "
            "number, or count labels that are names"
        )
    return labels


def _in_order(names: list[str]) -> list[str]:
    """Order numbered names by number; leave others in the user's order."""
    parts = [re.split(r"(\d+)", name) for name in names]
    # "class_7": what stands around the number is the same in all of them.
    numbered = all(len(p) == 3 and p[::2] == parts[0][::2] for p in parts)
    return (
        sorted(names, key=lambda n: int(re.split(r"(\d+)", n)[1]))
        if numbered
        else names
    )


def as_vector(name: str, values: object) -> Array:
    """Check a [C] sequence or array: one-dimensional, nothing negative or NaN.

    Values inside jit are not checked.
    """
    vector = jnp.asarray(values)
    if vector.ndim != 1:
        raise ValueError(
            f"longtail.{name} must be one number per class, got shape {vector.shape}"
        )
    seen_values = known(values if isinstance(values, np.ndarray) else vector)
    if seen_values is not None and np.any(bad := ~(seen_values >= 0)):
        c = int(np.argmax(bad))
        raise ValueError(
            f"longtail.{name} is {seen_values[c]} for class {c}: pass numbers "
            "that are not negative, 0 for a class without examples"
        )
    return vector


def known(values: Any) -> np.ndarray | None:
    """Return the values on the host, or None inside jit and for global arrays."""
    if isinstance(values, jax.core.Tracer):
        return None
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        return None
    return np.asarray(values)


def check_labels(labels: Any, num_classes: int, where: Any = None) -> None:
    """Raise for a label that is neither a class nor masked; inside jit nothing is checked.

    Raises:
      ValueError: there is one.
    """
    values = known(labels)
    mask = True if where is None else known(where)
    if values is None or mask is None:
        return
    outside = ((values < 0) | (values >= num_classes)) & mask
    if np.any(outside):
        raise ValueError(
            f"longtail: `labels` has {values[outside][0]} where the logits "
            f"have {num_classes} classes: mask it with `where`, or correct it"
        )


def class_indices(labels: Any) -> Array:
    """Return labels as int32; -1 where int32 cannot hold the label.

    Of a narrower dtype the number of classes may be out of range: uint8 labels of 256
    classes.
    """
    labels = jnp.asarray(labels)
    if jnp.iinfo(labels.dtype).max > jnp.iinfo(jnp.int32).max:
        fits = (labels >= 0) & (labels <= jnp.iinfo(jnp.int32).max)
        labels = jnp.where(fits, labels, jnp.zeros((), labels.dtype)).astype(
            jnp.int32
        )
        return jnp.where(fits, labels, -1)
    return labels.astype(jnp.int32)


def as_mask(where: Any, batch: tuple[int, ...]) -> Array:
    """Return which examples count, as booleans: all for None, integers that are not 0.

    Raises:
      ValueError: there is not one per example: broadcast, it would change the loss.
    """
    if where is None:
        return jnp.ones(batch, bool)
    return same_shape("where", where, batch).astype(bool)


def same_shape(name: str, values: Any, shape: tuple[int, ...]) -> Array:
    """Return the values as an array; raise unless they have this shape.

    Raises:
      ValueError: it has another one.
    """
    array = jnp.asarray(values)
    if array.shape != tuple(shape):
        raise ValueError(
            f"longtail: `{name}` has shape {array.shape} where {tuple(shape)} "
            "fits the logits: pass one entry per example"
        )
    return array


def are_classes(labels: Any, num_classes: int) -> Array:
    """Return which integer labels are in [0, C), bool [...]; [] True for probabilities."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return jnp.ones((), bool)
    index = class_indices(labels)
    return (index >= 0) & (index < num_classes)


def floating(values: Array) -> Array:
    """Convert to float32, or keep float64.

    Raises:
      ValueError: the values are not real numbers.
    """
    if not (
        jnp.issubdtype(values.dtype, jnp.integer) or _dtypes.is_floating(values)
    ):
        raise ValueError(
            f"longtail: an argument is an array of {values.dtype}: give real numbers"
        )
    return values.astype(
        values.dtype if values.dtype == jnp.float64 else jnp.float32
    )


def has_examples(counts: Real[Array, "C"]) -> Bool[Array, "C"]:
    """Return which classes have examples."""
    return counts > 0


def log_prior(counts: Real[Array, "C"]) -> Float[Array, "C"]:
    """Compute log(n_c / sum n), and UNSEEN_LOG_PRIOR for a class without examples."""
    counts = floating(counts)
    positive = jnp.where(has_examples(counts), counts, 1)
    log_share = jnp.log(positive) - jnp.log(
        jnp.maximum(jnp.sum(jnp.where(has_examples(counts), counts, 0)), 1)
    )
    return jnp.where(has_examples(counts), log_share, UNSEEN_LOG_PRIOR)


def at_least_rarest(counts: Real[Array, "C"]) -> Float[Array, "C"]:
    """Give classes without examples the count of the rarest class that has some."""
    counts = floating(counts)
    rarest = jnp.min(jnp.where(has_examples(counts), counts, jnp.inf))
    # No class has an example: 1 leaves every prior and margin defined.
    rarest = jnp.where(jnp.isfinite(rarest), rarest, 1)
    return jnp.where(has_examples(counts), counts, rarest)


# From per-example losses to one number, with an explicit denominator.


@checked
def reduce_loss(
    per_example: Float[Array, "*batch"],
    weights: Real[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
    kind: Literal["mean", "weighted_mean", "sum"] = "mean",
) -> Float[Array, ""]:
    """Reduce per-example losses: sum w l over N, over sum w, or over 1.

    "mean" is sum(w l) / N (what Cui's TensorFlow code does), "weighted_mean" is sum(w
    l) / sum(w) (what torch does with class weights), "sum" is sum(w l). The weights are
    applied here, so give it the unweighted loss: `reduce_loss(cross_entropy()(z, y),
    w[y], "weighted_mean")`; a loss that has class weights already needs none here.

    Args:
      per_example: [...] losses of any shape.
      weights: [...] weight of every example, a mask of the ones that count, or None for
        ones.
      kind: "mean", "weighted_mean" or "sum".

    Returns:
      A scalar in float32 or wider; 0 where there is nothing to average. An example of
      weight 0 contributes nothing, whatever its loss.

    Raises:
      ValueError: for another kind.

    >>> reduce_loss(jnp.array([1.0, 3.0]), jnp.array([3.0, 1.0]), "weighted_mean")
    Array(1.5, dtype=float32)
    """
    if kind not in ("mean", "weighted_mean", "sum"):
        raise ValueError(
            f'longtail.reduce_loss: `kind` is {kind!r}: pass "mean", "weighted_mean" or "sum"'
        )
    losses = floating(jnp.asarray(per_example))
    w = jnp.ones_like(losses)
    if weights is not None:
        w = same_shape("weights", weights, losses.shape).astype(losses.dtype)
    total = jnp.sum(jnp.where(w != 0, w * losses, 0))
    if kind == "sum":
        return total
    over = (
        jnp.sum(w)
        if kind == "weighted_mean"
        else jnp.asarray(losses.size, losses.dtype)
    )
    return total / jnp.where(over != 0, over, 1)
