"""Test metrics of long-tailed classifiers from one confusion state, updated under jit."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxtricks._tree import node
from jaxtricks._types import Array, Scalar
from jaxtricks.longtail.counts import Counts, as_vector, floating

ECE_BINS = 15


@node
class State:
    """What was seen so far. States add: psum them over devices, tree.map(add) over hosts.

    Attributes:
      confusion: [C, C + 1] int32, examples of class i predicted as j; the last column counts rows
        whose logits were not numbers.
      bin_count: [B] int32, examples per bin of confidence.
      bin_correct: [B] int32, correct ones among them.
      bin_confidence: [B] float32, sum of their confidences.
    """

    confusion: Array
    bin_count: Array
    bin_correct: Array
    bin_confidence: Array


def init(num_classes: int, *, bins: int = ECE_BINS) -> State:
    """Empty state: C (C + 1) + 3 B numbers.

    Args:
      num_classes: C.
      bins: bins of confidence for the calibration error.

    Returns:
      The state for `update`.

    Raises:
      ValueError: if num_classes or bins is below 1.
    """
    if num_classes < 1 or bins < 1:
        raise ValueError("longtail.metrics.init needs `num_classes` and `bins` >= 1")
    zeros = jnp.zeros(bins, jnp.int32)
    return State(
        confusion=jnp.zeros((num_classes, num_classes + 1), jnp.int32),
        bin_count=zeros,
        bin_correct=zeros,
        bin_confidence=jnp.zeros(bins, jnp.float32),
    )


def update(
    state: State,
    logits: Float[Array, "*batch C"],
    labels: Int[Array, "*batch"],
    where: Bool[Array, "*batch"] | None = None,
) -> State:
    """Count one batch; the prediction is the largest logit, the confidence its softmax.

    Args:
      state: of `init` or an earlier update.
      logits: [..., C]. A row with a NaN counts as wrong, and as of no class.
      labels: [...] integers; one outside [0, C) is not counted.
      where: [...] True for the examples that count (the padding of a last batch does not).

    Returns:
      The new state.

    Raises:
      ValueError: if the logits do not have the classes of the state.
    """
    num_classes = state.confusion.shape[0]
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"longtail.metrics.update: `logits` have {logits.shape[-1]} classes, the state has "
            f"{num_classes}: call init({logits.shape[-1]})"
        )
    z = jnp.asarray(logits).astype(jnp.float32)
    confidence = jnp.max(jax.nn.softmax(z, axis=-1), axis=-1)
    is_number = jnp.isfinite(confidence)
    prediction = jnp.where(is_number, jnp.argmax(z, axis=-1).astype(jnp.int32), num_classes)
    return update_predictions(state, prediction, jnp.where(is_number, confidence, 0), labels, where)


def update_predictions(
    state: State,
    predictions: Int[Array, "*batch"],
    confidence: Float[Array, "*batch"],
    labels: Int[Array, "*batch"],
    where: Bool[Array, "*batch"] | None = None,
) -> State:
    """`update` for predictions that are no argmax of logits (ensembles, nearest class mean).

    Args:
      state: of `init` or an earlier update.
      predictions: [...] classes in [0, C); C is "none", and wrong.
      confidence: [...] in [0, 1]. Bins are closed on the right; exactly 0 is in no bin.
      labels: [...] integers; one outside [0, C) is not counted.
      where: [...] True for the examples that count.

    Returns:
      The new state.
    """
    num_classes, bins = state.confusion.shape[0], state.bin_count.shape[0]
    labels, predictions = (
        jnp.asarray(x).astype(jnp.int32).reshape(-1) for x in (labels, predictions)
    )
    counted = (labels >= 0) & (labels < num_classes)
    if where is not None:
        counted &= jnp.asarray(where).reshape(-1)
    row = jnp.where(counted, labels, num_classes)  # out of range: dropped by the scatter
    confidence = jnp.asarray(confidence).astype(jnp.float32).reshape(-1)
    edges = jnp.asarray(np.linspace(0, 1, bins + 1), jnp.float32)
    bin_index = jnp.searchsorted(edges, confidence, side="left").astype(jnp.int32) - 1
    bin_index = jnp.where(counted & (bin_index >= 0), bin_index, bins)
    correct = (labels == predictions).astype(jnp.int32)
    return State(
        confusion=jnp.asarray(state.confusion).at[row, predictions].add(1, mode="drop"),
        bin_count=jnp.asarray(state.bin_count).at[bin_index].add(1, mode="drop"),
        bin_correct=jnp.asarray(state.bin_correct).at[bin_index].add(correct, mode="drop"),
        bin_confidence=jnp.asarray(state.bin_confidence).at[bin_index].add(confidence, mode="drop"),
    )


def summary(
    state: State,
    counts: Counts,
    *,
    many: Scalar = 100,
    few: Scalar = 20,
    split: Literal["threshold", "rank"] = "threshold",
) -> dict[str, Float[Array, "..."]]:
    """Accuracies per class and per group of classes, and the calibration error.

    Groups are means of per-class accuracies. split="threshold": many has more than `many` training
    examples, few has fewer than `few`, medium is the rest. With few classes or small counts that
    leaves groups empty; split="rank" takes thirds of the classes by training count instead (C // 3
    many and C // 3 few; of equal counts the earlier class is the larger).

    Args:
      state: of `update`.
      counts: [C] TRAINING examples per class; may be traced.
      many: threshold above which a class is many-shot.
      few: threshold below which a class is few-shot.
      split: "threshold" or "rank".

    Returns:
      {"accuracy", "balanced_accuracy", "many", "medium", "few", "ece": scalars,
      "per_class": [C]}, float32. A class without test examples is NaN and in no mean; an empty
      group is NaN, and so is everything before the first update.

    Raises:
      ValueError: if counts does not fit the state, or for another split.
    """
    counts = floating(as_vector("metrics.summary: `counts`", counts))
    if counts.shape[0] != state.confusion.shape[0]:
        raise ValueError(
            f"longtail.metrics.summary: `counts` has {counts.shape[0]} classes, the state has "
            f"{state.confusion.shape[0]}: pass one number per class"
        )
    correct = jnp.diagonal(state.confusion).astype(jnp.float32)
    total = jnp.sum(state.confusion, axis=1).astype(jnp.float32)
    per_class = _ratio(correct, total)
    groups = _groups(counts, many, few, split)
    means = {name: _mean(per_class, member & (total > 0)) for name, member in groups.items()}
    return {
        "accuracy": _ratio(jnp.sum(correct), jnp.sum(total)),
        "balanced_accuracy": _mean(per_class, total > 0),
        **means,
        "ece": _calibration_error(state),
        "per_class": per_class,
    }


def _groups(counts: Array, many: Scalar, few: Scalar, split: str) -> dict[str, Bool[Array, "C"]]:
    if split == "threshold":
        high, low = (jnp.asarray(x).astype(counts.dtype) for x in (many, few))
        is_many, is_few = counts > high, counts < low
    elif split == "rank":
        rank = jnp.argsort(jnp.argsort(-counts, stable=True), stable=True)
        third = counts.shape[0] // 3
        is_many, is_few = rank < third, rank >= counts.shape[0] - third
    else:
        raise ValueError(
            f'longtail.metrics.summary: `split` is {split!r}: pass "threshold" or "rank"'
        )
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


def _calibration_error(state: State) -> Float[Array, ""]:
    gap = jnp.abs(state.bin_correct.astype(jnp.float32) - state.bin_confidence)
    return _ratio(jnp.sum(gap), jnp.sum(state.bin_count).astype(jnp.float32))


def _mean(values: Array, member: Array) -> Float[Array, ""]:
    return _ratio(jnp.sum(jnp.where(member, values, 0)), jnp.sum(member).astype(jnp.float32))


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.nan)
