"""Measure accuracy per class, in one jitted confusion state."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxtricks import _sharding
from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Key, Scalar
from jaxtricks.longtail._counts import (
    Counts,
    as_vector,
    class_indices,
    floating,
)

__all__ = [
    "State",
    "bootstrap",
    "init",
    "merge",
    "relative_accuracy",
    "summary",
    "update",
    "update_predictions",
]

Split = Literal["threshold", "rank"]


@checked
def groups(
    counts: Float[Array, "C"], many: Scalar, few: Scalar, split: Split
) -> dict[str, Bool[Array, "C"]]:
    """Return which classes are many-, medium- and few-shot.

    Raises:
      ValueError: for another split.
    """
    if split == "threshold":
        high = jnp.asarray(many).astype(counts.dtype)
        low = jnp.asarray(few).astype(counts.dtype)
        is_many = counts > high
        is_few = counts < low
    elif split == "rank":
        rank = jnp.argsort(jnp.argsort(-counts, stable=True), stable=True)
        third = counts.shape[0] // 3
        is_many = rank < third
        is_few = rank >= counts.shape[0] - third
    else:
        raise ValueError(
            f'longtail.metrics: `split` is {split!r}: pass "threshold" or "rank"'
        )
    return {"many": is_many, "medium": ~(is_many | is_few), "few": is_few}


@checked
def scores(
    correct: Float[Array, "C"],
    total: Float[Array, "C"],
    members: dict[str, Bool[Array, "C"]],
    weight: Float[Array, "C"],
) -> dict[str, Float[Array, ""]]:
    """Average over the classes that have test examples, each counted `weight` times.

    Args:
      correct: [C] right predictions.
      total: [C] test examples.
      members: of `groups`.
      weight: [C] how often a class counts: ones, or the draws of a bootstrap over
        classes.
    """
    per_class = ratio(correct, total)
    weight = jnp.where(total > 0, weight, 0)
    counted = weight > 0
    all_classes = jnp.sum(weight)
    balanced = ratio(
        jnp.sum(jnp.where(counted, weight * per_class, 0)), all_classes
    )
    log_mean = ratio(
        jnp.sum(jnp.where(counted, weight * jnp.log(per_class), 0)), all_classes
    )
    # One class that is never right makes both of these means 0: log 0 and 1/0 are
    # infinite.
    inverse_mean = ratio(
        jnp.sum(jnp.where(counted, weight / per_class, 0)), all_classes
    )
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
    """Compute the calibration error over examples of the member classes.

    sum_b |correct predictions - confidences| / examples
    """
    count = jnp.sum(jnp.where(member[:, None], count, 0), axis=0).astype(
        jnp.float32
    )
    correct = jnp.sum(jnp.where(member[:, None], correct, 0), axis=0).astype(
        jnp.float32
    )
    confidence = jnp.sum(
        jnp.where(member[:, None], confidence, 0), axis=0
    ).astype(jnp.float32)
    return ratio(jnp.sum(jnp.abs(correct - confidence)), jnp.sum(count))


@checked
def ratio(a: Array, b: Array) -> Array:
    """Return a / b, NaN where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.nan)


# Test metrics of long-tailed classifiers from one confusion state, updated under jit.


ECE_BINS = 15


@node
class State:
    """Counts over the examples so far; add states by `merge` or lax.psum.

    Attributes:
      confusion: [C, C + 1] int32, examples of class i predicted as j; the last column
        counts rows whose logits were not numbers.
      class_bin_count: [C, B] int32, examples per class and bin of confidence.
      class_bin_correct: [C, B] int32, correct ones among them.
      class_bin_confidence: [C, B] float32, sum of their confidences.
      out_of_range: [] int32, unmasked labels that are not a class.
    """

    confusion: Array
    class_bin_count: Array
    class_bin_correct: Array
    class_bin_confidence: Array
    out_of_range: Array

    @property
    def bin_count(self) -> Integer[Array, "B"]:
        """Return the number of examples per confidence bin, [B]."""
        return jnp.sum(self.class_bin_count, axis=0)

    @property
    def bin_correct(self) -> Integer[Array, "B"]:
        """Return the number of correct ones among them, [B]."""
        return jnp.sum(self.class_bin_correct, axis=0)

    @property
    def bin_confidence(self) -> Float[Array, "B"]:
        """Return the sum of their confidences, [B]."""
        return jnp.sum(self.class_bin_confidence, axis=0)


@checked
def init(num_classes: int, *, bins: int = ECE_BINS) -> State:
    """Return an empty state: C (C + 1) + 3 C B numbers.

    Args:
      num_classes: C.
      bins: bins of confidence for the calibration error.

    Returns:
      The state for `update`.

    Raises:
      ValueError: if num_classes or bins is below 1.
    """
    if num_classes < 1 or bins < 1:
        raise ValueError(
            "longtail.metrics.init needs `num_classes` and `bins` >= 1"
        )
    shape = (num_classes, bins)
    return State(
        confusion=jnp.zeros((num_classes, num_classes + 1), jnp.int32),
        class_bin_count=jnp.zeros(shape, jnp.int32),
        class_bin_correct=jnp.zeros(shape, jnp.int32),
        class_bin_confidence=jnp.zeros(shape, jnp.float32),
        out_of_range=jnp.int32(0),
    )


@checked
def update(
    state: State,
    logits: Float[Array, "*batch C"],
    labels: Integer[Array, "*batch"],
    where: Bool[Array, "*batch"] | None = None,
) -> State:
    """Count one batch; the prediction is the largest logit, the confidence its softmax.

    Args:
      state: of `init` or an earlier update.
      logits: [..., C]. A row with a NaN counts as wrong.
      labels: [...] integers; one outside [0, C) counts in `out_of_range` alone.
      where: [...] True for the examples that count (the padding of a last batch does
        not).

    Returns:
      The new state.

    Raises:
      ValueError: if the logits do not have the classes of the state.
    """
    num_classes = state.confusion.shape[0]
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"longtail.metrics.update: `logits` have {logits.shape[-1]} "
            f"classes, the state has {num_classes}: call "
            f"init({logits.shape[-1]})"
        )
    z = floating(jnp.asarray(logits)).astype(jnp.float32)
    confidence = jnp.max(jax.nn.softmax(z, axis=-1), axis=-1)
    is_number = jnp.isfinite(confidence)
    prediction = jnp.where(
        is_number, jnp.argmax(z, axis=-1).astype(jnp.int32), num_classes
    )
    return update_predictions(
        state, prediction, jnp.where(is_number, confidence, 0), labels, where
    )


@checked
def update_predictions(
    state: State,
    predictions: Integer[Array, "*batch"],
    confidence: Float[Array, "*batch"],
    labels: Integer[Array, "*batch"],
    where: Bool[Array, "*batch"] | None = None,
) -> State:
    """Update the state with predictions that are not an argmax of logits.

    Args:
      state: of `init` or an earlier update.
      predictions: [...] classes in [0, C); C is "none", and wrong.
      confidence: [...] in [0, 1]. Bins are closed on the right; exactly 0 is in no bin.
      labels: [...] integers; one outside [0, C) counts in `out_of_range` alone.
      where: [...] True for the examples that count.

    Returns:
      The new state.
    """
    counted = np.ones((), bool) if where is None else where
    return _sharding.replicated(
        _updated, state, predictions, confidence, labels, counted
    )


def _updated(
    state: State,
    predictions: Array,
    confidence: Array,
    labels: Array,
    counted: Array,
) -> State:
    num_classes, bins = state.class_bin_count.shape
    labels = class_indices(labels).reshape(-1)
    predictions = class_indices(predictions).reshape(-1)
    counted = jnp.broadcast_to(counted, jnp.shape(confidence)).reshape(-1)
    inside = (labels >= 0) & (labels < num_classes)
    # The scatter drops rows out of range.
    row = jnp.where(inside & counted, labels, num_classes)
    confidence = jnp.asarray(confidence).astype(jnp.float32).reshape(-1)
    # Counting edges below a confidence gives bins closed on the right.
    edges = jnp.asarray(np.linspace(0, 1, bins + 1), jnp.float32)
    column = (
        jnp.sum(edges[None] < confidence[:, None], axis=1, dtype=jnp.int32) - 1
    )
    column = jnp.where(column >= 0, column, bins)
    correct = (labels == predictions).astype(jnp.int32)

    # Integers, so that states of any order of batches are equal bit by bit.
    def add(to: Array, column: Array, what: Array | int) -> Array:
        return jnp.asarray(to).at[row, column].add(what, mode="drop")

    return State(
        confusion=add(state.confusion, predictions, 1),
        class_bin_count=add(state.class_bin_count, column, 1),
        class_bin_correct=add(state.class_bin_correct, column, correct),
        class_bin_confidence=add(
            state.class_bin_confidence, column, confidence
        ),
        out_of_range=state.out_of_range
        + jnp.sum(~inside & counted, dtype=jnp.int32),
    )


@checked
def merge(*states: State) -> State:
    """Add states, of several hosts or parts of a test set.

    Args:
      *states: of the same number of classes and bins; device or host arrays.
    """
    return jax.tree.map(
        lambda *x: functools.reduce(jnp.add, map(jnp.asarray, x)), *states
    )


@checked
def summary(
    state: State,
    counts: Counts,
    *,
    many: Scalar = 100,
    few: Scalar = 20,
    split: Split = "threshold",
) -> dict[str, Float[Array, "..."]]:
    """Compute accuracy per class and per group, and the calibration error.

    Groups are means of per-class accuracies. split="threshold": many has more than
    `many` training examples, few has fewer than `few`, medium is the rest. With few
    classes or small counts that leaves groups empty; split="rank" takes thirds of the
    classes by training count instead (C // 3 many and C // 3 few; of equal counts the
    earlier class is the larger).

    Args:
      state: of `update`.
      counts: [C] TRAINING examples per class; may be traced.
      many: threshold above which a class is many-shot.
      few: threshold below which a class is few-shot.
      split: "threshold" or "rank".

    Returns:
      float32: "accuracy", "balanced_accuracy" and "balanced_error" (1 - it),
      "geometric_mean" and "harmonic_mean" of the per-class accuracies (0 as soon as one
      class is never right), "many", "medium", "few", "ece" and "ece_many",
      "ece_medium", "ece_few" (of the examples of these classes), "out_of_range" (share
      of the rows whose label was not a class): scalars; "per_class": [C]. A class without
      test examples is NaN and in no mean; an empty group is NaN, and so is everything
      before the first update.

    Raises:
      ValueError: if counts does not fit the state, or for another split.

    References:
      Calibration error: Guo et al., arXiv 1706.04599, equation 3, bins closed on the
      right. Groups: Liu et al., arXiv 1904.05160.
    """
    correct, total = _per_class(state)
    members = groups(_fitting(counts, state), many, few, split)
    bins = (
        state.class_bin_count,
        state.class_bin_correct,
        state.class_bin_confidence,
    )
    everyone = {"": jnp.ones_like(total, bool)}
    errors = {
        f"ece_{name}" if name else "ece": calibration_error(*bins, member)
        for name, member in {**everyone, **members}.items()
    }
    outside = state.out_of_range.astype(jnp.float32)
    return {
        **scores(correct, total, members, jnp.ones_like(total)),
        **errors,
        "out_of_range": ratio(outside, outside + jnp.sum(total)),
        "per_class": ratio(correct, total),
    }


@checked
def bootstrap(
    key: Key,
    state: State,
    counts: Counts,
    *,
    unit: Literal["example", "class"] = "example",
    samples: int = 1000,
    level: float = 0.95,
    many: Scalar = 100,
    few: Scalar = 20,
    split: Split = "threshold",
) -> dict[str, Float[Array, "2"]]:
    """Compute percentile bootstrap intervals of `summary`, from the counts alone.

    unit="example" draws the test examples of each class again (right predictions are
    binomial): how far a new test set of these classes would move the score.
    unit="class" draws the classes again: how much hangs on which classes there are.

    Args:
      key: typed PRNG key.
      state: of `update`.
      counts: [C] TRAINING examples per class; may be traced.
      unit: "example" or "class".
      samples: bootstrap draws; memory is samples * C numbers.
      level: share of the draws inside the interval.
      many, few, split: of `summary`.

    Returns:
      For each score of one number but the calibration errors: [2] low and high end; NaN
      where the score is.

    Raises:
      ValueError: if counts does not fit the state, samples < 1, or level is not between
        0 and 1.

    References:
      Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 13.
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(
            "longtail.metrics.bootstrap needs `samples` >= 1 and 0 < `level` < "
            "1: 1000 and 0.95 are usual"
        )
    correct, total = _per_class(state)
    members = groups(_fitting(counts, state), many, few, split)
    ones = jnp.ones((samples, total.shape[0]), jnp.float32)
    if unit == "example":
        # Resampling the examples of a class is a binomial draw of its correct ones.
        share = jnp.clip(jnp.nan_to_num(ratio(correct, total)), 0, 1)
        drawn = jax.random.binomial(key, ones * total[None], ones * share[None])
        values = jax.vmap(lambda c: scores(c, total, members, ones[0]))(drawn)
    else:
        weights = _class_draws(key, total > 0, samples)
        values = jax.vmap(lambda w: scores(correct, total, members, w))(weights)
    tails = jnp.array([(1 - level) / 2, (1 + level) / 2], jnp.float32)
    return {
        name: jnp.nanquantile(value, tails) for name, value in values.items()
    }


@checked
def relative_accuracy(accuracy: Scalar, *upper: Scalar) -> Float[Array, ""]:
    """Return A_r = A_t / A_u, with A_u the larger of the upper references.

    Args:
      accuracy: A_t, of the method trained on the long-tailed set.
      *upper: accuracies of the same backbone trained with cross entropy on
        `data.balanced_counterpart(counts)`, and of the method itself trained on it.

    Returns:
      float32 [].

    Raises:
      ValueError: without an upper reference.

    >>> relative_accuracy(45.5, 57.3, 56.0).round(3)
    Array(0.794, dtype=float32)

    References:
      Zhang et al., Deep long-tailed learning: a survey, arXiv 2110.04596, section 4.1.
    """
    if not upper:
        raise ValueError(
            "longtail.metrics.relative_accuracy needs `upper`: an accuracy "
            "when balanced"
        )
    best = functools.reduce(
        jnp.maximum, (jnp.asarray(x).astype(jnp.float32) for x in upper)
    )
    return jnp.asarray(accuracy).astype(jnp.float32) / best


def _per_class(state: State) -> tuple[Array, Array]:
    """Return (correct predictions, test examples) per class."""
    correct = jnp.diagonal(state.confusion).astype(jnp.float32)
    return correct, jnp.sum(state.confusion, axis=1).astype(jnp.float32)


def _fitting(counts: Counts, state: State) -> Float[Array, "C"]:
    counts = floating(as_vector("metrics: `counts`", counts))
    if counts.shape[0] != state.confusion.shape[0]:
        raise ValueError(
            f"longtail.metrics: `counts` has {counts.shape[0]} classes, the "
            f"state has {state.confusion.shape[0]}: pass one number per class"
        )
    return counts


def _class_draws(
    key: Key, present: Array, samples: int
) -> Float[Array, "samples C"]:
    """Draw as many examples as there are, with replacement; count them by class."""
    num_classes = present.shape[0]
    many = jnp.sum(present, dtype=jnp.int32)
    draws = jax.random.randint(
        key, (samples, num_classes), 0, jnp.maximum(many, 1)
    )
    # Ignore draws beyond the number of present classes, which varies under jit.
    used = jnp.arange(num_classes)[None] < many
    classes = jnp.where(
        used, jnp.argsort(~present, stable=True)[draws], num_classes
    )
    zeros = jnp.zeros(num_classes, jnp.float32)
    return jax.vmap(lambda c: zeros.at[c].add(1, mode="drop"))(classes)
