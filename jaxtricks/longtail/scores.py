"""Accuracies of classes -> the one-number scores of long-tailed classification."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar

Split = Literal["threshold", "rank"]


@checked
def groups(
    counts: Float[Array, "C"], many: Scalar, few: Scalar, split: Split
) -> dict[str, Bool[Array, "C"]]:
    """Which classes are many-, medium- and few-shot.

    Raises:
      ValueError: for another split.
    """
    if split == "threshold":
        high, low = (jnp.asarray(x).astype(counts.dtype) for x in (many, few))
        is_many, is_few = counts > high, counts < low
    elif split == "rank":
        rank = jnp.argsort(jnp.argsort(-counts, stable=True), stable=True)
        third = counts.shape[0] // 3
        is_many, is_few = rank < third, rank >= counts.shape[0] - third
    else:
        raise ValueError(f'longtail.metrics: `split` is {split!r}: pass "threshold" or "rank"')
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


@checked
def scores(
    correct: Float[Array, "C"],
    total: Float[Array, "C"],
    members: dict[str, Bool[Array, "C"]],
    weight: Float[Array, "C"],
) -> dict[str, Float[Array, ""]]:
    """Means over the classes that have test examples, each class counted `weight` times.

    Args:
      correct: [C] right predictions.
      total: [C] test examples.
      members: of `groups`.
      weight: [C] how often a class counts: ones, or the draws of a bootstrap over classes.
    """
    per_class = ratio(correct, total)
    weight = jnp.where(total > 0, weight, 0)
    counted, all_classes = weight > 0, jnp.sum(weight)
    balanced = ratio(jnp.sum(jnp.where(counted, weight * per_class, 0)), all_classes)
    log_mean = ratio(jnp.sum(jnp.where(counted, weight * jnp.log(per_class), 0)), all_classes)
    # One class that is never right makes both of these means 0: log 0 and 1/0 are infinite.
    inverse_mean = ratio(jnp.sum(jnp.where(counted, weight / per_class, 0)), all_classes)
    means = {
        name: ratio(
            jnp.sum(jnp.where(counted & member, weight * per_class, 0)),
            jnp.sum(jnp.where(member, weight, 0)),
        )
        for name, member in members.items()
    }
    return {
        "accuracy": ratio(jnp.sum(weight * correct), jnp.sum(weight * total)),
        "balanced_accuracy": balanced,
        "balanced_error": 1 - balanced,
        "geometric_mean": jnp.exp(log_mean),
        "harmonic_mean": 1 / inverse_mean,
        **means,
    }


@checked
def calibration_error(
    count: Integer[Array, "C B"],
    correct: Integer[Array, "C B"],
    confidence: Float[Array, "C B"],
    member: Bool[Array, "C"],
) -> Float[Array, ""]:
    """sum_b |right predictions - confidences| / examples, over the examples of the member classes."""
    count, correct, confidence = (
        jnp.sum(jnp.where(member[:, None], x, 0), axis=0).astype(jnp.float32)
        for x in (count, correct, confidence)
    )
    return ratio(jnp.sum(jnp.abs(correct - confidence)), jnp.sum(count))


@checked
def ratio(a: Array, b: Array) -> Array:
    """a / b, NaN where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.nan)
