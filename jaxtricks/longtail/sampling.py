"""Sample example indices inside jit, by class probability or in cycles."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, UInt32

from jaxtricks._arguments import checked
from jaxtricks._random_bits import mixed, permuted
from jaxtricks._tree import node
from jaxtricks._typing import Array, Key, Scalar
from jaxtricks.longtail import weights
from jaxtricks.longtail._counts import (
    Counts,
    as_vector,
    floating,
    has_examples,
)

__all__ = [
    "Table",
    "class_aware_indices",
    "class_probabilities",
    "deferred",
    "effective_number",
    "progressive",
    "sample_indices",
    "table",
]

Shard = tuple[Scalar, int]
"""(index, number): one host's or device's part of a draw; the index may be traced."""


@node
class Table:
    """Examples by class, for `sample_indices`. The probabilities may be replaced at any step.

    Attributes:
      order: [N] int32, example indices sorted by class.
      starts: [C] int32, where each class begins in order.
      counts: [C] int32, how many examples it has.
      probabilities: [C] float32, of each class.
    """

    order: Array
    starts: Array
    counts: Array
    probabilities: Array


@checked
def table(
    labels: Integer[Array, "N"], probabilities: Float[Array, "C"]
) -> Table:
    """Sort the examples by class, once, on the host.

    Args:
      labels: [N] integers in [0, C), a host or device array (not traced).
      probabilities: [C] of each class, for example `class_probabilities(counts, 0)`;
        they are normalized over the classes that have examples.

    Returns:
      A pytree of N + 3 C numbers. `dataclasses.replace(table, probabilities=...)`
      changes the probabilities, inside jit too.

    Raises:
      ValueError: if there are no labels, one is outside [0, C), or a probability
        negative or NaN.
    """
    labels = np.asarray(labels).reshape(-1)
    if not labels.size:
        raise ValueError(
            "longtail.sampling.table: `labels` are empty: there is nothing to draw"
        )
    probabilities = as_vector("sampling.table: `probabilities`", probabilities)
    probabilities = probabilities.astype(jnp.float32)
    num_classes = probabilities.shape[0]
    if not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"longtail.sampling.table: `labels` must be in [0, {num_classes}), "
            "the length of `probabilities`: drop the others first"
        )
    counts = np.bincount(labels, minlength=num_classes)
    starts = np.cumsum(counts) - counts
    order = np.argsort(labels, kind="stable")
    order = jnp.asarray(order.astype(np.int32))
    starts = jnp.asarray(starts.astype(np.int32))
    counts = jnp.asarray(counts.astype(np.int32))
    return Table(order, starts, counts, probabilities)


@checked
def sample_indices(
    key: Key, table: Table, n: int, *, shard: Shard | None = None
) -> Integer[Array, "m"]:
    """Draw n example indices: a class by its probability, then one of its examples uniformly.

    Stateless: fold the step into the key, and a resumed run draws the same. On several
    hosts all use the same key and each passes its `shard`: the parts together are the
    draw of one host, so the probabilities are exact over all of them. Probabilities are
    held in parts of 2^-31.

    Args:
      key: typed PRNG key, the same on every host.
      table: of `table`; its probabilities may be traced.
      n: how many, over all shards; static.
      shard: (index, number) to return that part only; the index may be traced
        (lax.axis_index).

    Returns:
      [n] int32 indices, or [n / number] of the shard, with replacement. A class without
      examples is never drawn; where no class can be, the indices are -1.

    Raises:
      ValueError: if the shards do not divide n, or the probabilities do not fit the
        table.
    """
    first, m = _part("sample_indices", n, shard)
    class_key, example_key = jax.random.split(key)
    ends = jnp.cumsum(_parts(table))
    total = ends[-1]
    at = jax.random.randint(
        class_key, (n,), 0, jnp.maximum(total, 1), dtype=jnp.uint32
    )
    classes = jnp.searchsorted(ends, at, side="right").astype(jnp.int32)
    # Clipped, for tables where there is nothing to draw.
    classes = jnp.minimum(classes, ends.shape[0] - 1)
    within = jax.random.randint(
        example_key, (n,), 0, jnp.maximum(table.counts[classes], 1)
    )
    # All is drawn by global position and then cut, so that the parts are those of one
    # draw.
    places = jax.lax.dynamic_slice_in_dim(
        table.starts[classes] + within, first, m
    )
    return jnp.where(total > 0, table.order[places], -1)


@checked
def class_aware_indices(
    key: Key,
    table: Table,
    n: int,
    step: Scalar,
    *,
    per_class: int = 1,
    shard: Shard | None = None,
) -> Integer[Array, "m"]:
    """Sample `per_class` examples of class after class, without replacement.

    The classes that have examples come in a new order each time all have had their
    turn, and the examples of each in a new order each time all have been drawn: over
    any stretch two classes differ by at most `per_class` draws, and two examples of a
    class by one. Nothing is stored: draw step * n + i is a function of the key, so a
    run resumes at any step.

    Args:
      key: typed PRNG key of the run, the same at every step and on every host.
      table: of `table`; its probabilities are not used.
      n: how many, over all shards; static.
      step: number of this draw, from 0; may be traced. step * n must stay below 2^32.
      per_class: draws in a row from one class; 4 in the recipe of cRT.
      shard: (index, number) to return that part only; the index may be traced.

    Returns:
      [n] int32 indices, or [n / number] of the shard; -1 where no class has examples.

    Raises:
      ValueError: if the shards do not divide n, or per_class < 1.

    References:
      Kang et al., Decoupling, arXiv 1910.09217 (ClassAwareSampler of its code, after
      Shen et al., Relay backpropagation, arXiv 1512.05830).
    """
    if per_class < 1:
        raise ValueError(
            "longtail.sampling.class_aware_indices needs `per_class` >= 1"
        )
    first, m = _part("class_aware_indices", n, shard)
    seeds = jax.random.bits(key, (2,))
    start = jnp.asarray(step).astype(jnp.uint32) * np.uint32(n) + first.astype(
        jnp.uint32
    )
    turn, draw = jnp.divmod(
        start + jnp.arange(m, dtype=jnp.uint32), np.uint32(per_class)
    )
    present = table.counts > 0
    num_present = jnp.sum(present, dtype=jnp.uint32)
    cycle, place = jnp.divmod(turn, jnp.maximum(num_present, 1))
    place = permuted(place, jnp.maximum(num_present, 1), mixed(seeds[0], cycle))
    classes = jnp.argsort(~present, stable=True)[place]
    size = jnp.maximum(table.counts[classes], 1).astype(jnp.uint32)
    pass_, within = jnp.divmod(cycle * np.uint32(per_class) + draw, size)
    # A new permutation per class and pass, so that no order repeats.
    class_seed = mixed(seeds[1], classes.astype(jnp.uint32))
    within = permuted(within, size, mixed(class_seed, pass_))
    indices = table.order[table.starts[classes] + within.astype(jnp.int32)]
    return jnp.where(num_present > 0, indices, -1)


def _parts(table: Table) -> UInt32[Array, "C"]:
    """Return probabilities in units of 2^-31, uint32.

    Their running sums are exact; those of floats are not.
    """
    if table.probabilities.shape != table.counts.shape:
        raise ValueError(
            f"longtail.sampling: `table` has {table.counts.shape[0]} classes "
            f"and probabilities of shape {table.probabilities.shape}: give one "
            "per class"
        )
    is_possible = (table.counts > 0) & (table.probabilities > 0)
    p = jnp.where(is_possible, table.probabilities, 0)
    total = jnp.sum(p)
    parts = (p / jnp.where(total > 0, total, 1) * 2.0**31).astype(jnp.uint32)
    # At least one unit, so that a rare class can be drawn.
    return jnp.where(p > 0, jnp.maximum(parts, 1), 0)


def _part(name: str, n: int, shard: Shard | None) -> tuple[Array, int]:
    """Return (first position, number of positions) of the shard."""
    index, number = (0, 1) if shard is None else shard
    if number < 1 or n % number:
        raise ValueError(
            f"longtail.sampling.{name}: `n` is {n}, which {number} shards do "
            "not divide: it counts the draws of all shards"
        )
    if isinstance(index, int) and not 0 <= index < number:
        raise ValueError(
            f"longtail.sampling.{name}: `shard` is {shard}: 0 <= index < number"
        )
    m = n // number
    return jnp.asarray(index).astype(jnp.int32) * m, m


# Class probabilities, as functions of the counts and of the step; `table` and
# `sample_indices` draw by them.


@checked
def class_probabilities(
    counts: Counts, power: Scalar = 0.0
) -> Float[Array, "C"]:
    """Return the probability to draw each class: p_c ~ n_c^power.

    Args:
      counts: [C] training examples per class; may be traced.
      power: 1 as the data, 0.5 square root, 0 balanced, -1 reversed (the second branch
        of BBN).

    Returns:
      [C] probabilities; 0 for a class without examples (all zero if no class has any).

    >>> class_probabilities([90, 10], 0.5)[1].round(3)
    Array(0.25, dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217, equation
      1.
    """
    n = floating(as_vector("sampling.class_probabilities: `counts`", counts))
    power = jnp.asarray(power).astype(n.dtype)
    raw = jnp.where(
        has_examples(n),
        jnp.exp(power * jnp.log(jnp.where(has_examples(n), n, 1))),
        0,
    )
    return _normalized(raw)


@checked
def progressive(counts: Counts, t: Scalar) -> Float[Array, "C"]:
    """Move from the data's distribution to balance: (1 - t) p_instance + t p_balanced.

    Args:
      counts: [C] training examples per class; may be traced.
      t: share of the run that is over, clipped to [0, 1]; may be traced
        (`weights.ramp`). Over E epochs the Decoupling code takes e / (E - 1) and
        BagofTricks (e + 1) / E, e from 0.

    Returns:
      [C] probabilities; 0 for a class without examples.

    >>> progressive([90, 10], 0.5)[1].round(3)
    Array(0.3, dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    data = class_probabilities(counts, 1.0)
    balanced = class_probabilities(counts, 0.0)
    t = jnp.clip(jnp.asarray(t).astype(data.dtype), 0, 1)
    return (1 - t) * data + t * balanced


@checked
def effective_number(
    counts: Counts, beta: Scalar = 0.9999
) -> Float[Array, "C"]:
    """Return class probabilities by inverse effective numbers.

    p_c ~ n_c (1 - beta) / (1 - beta^n_c)

    Args:
      counts: [C] training examples per class; may be traced.
      beta: in [0, 1); 0 draws as the data, -> 1 balanced.

    Returns:
      [C] probabilities; 0 for a class without examples.

    Raises:
      ValueError: if beta is a number outside [0, 1).

    >>> effective_number([5000, 50], 0.9999)[0].round(3)
    Array(0.559, dtype=float32)

    References:
      Cao et al., LDAM, arXiv 1906.07413 (the "Resample" rule of its code).
    """
    n = floating(as_vector("sampling.effective_number: `counts`", counts))
    return _normalized(
        jnp.where(has_examples(n), n, 0) * weights.effective_number(n, beta)
    )


@checked
def deferred(
    counts: Counts, step: Scalar, start: Scalar, power: Scalar = 0.0
) -> Float[Array, "C"]:
    """Sample as the data until `start`, then by p_c ~ n_c^power.

    Args:
      counts: [C] training examples per class; may be traced.
      step: current step, counted from 0; may be traced.
      start: first step of the second phase; may be traced.
      power: of the second phase, as in `class_probabilities`.

    Returns:
      [C] probabilities; 0 for a class without examples.

    >>> deferred([90, 10], 160, 160)
    Array([0.5, 0.5], dtype=float32)

    References:
      Cao et al., LDAM, arXiv 1906.07413; Zhang et al., Bag of tricks, AAAI 2021.
    """
    data = class_probabilities(counts, 1.0)
    after = class_probabilities(counts, power)
    return weights.deferred(step, start, data, after)


def _normalized(raw: Array) -> Float[Array, "C"]:
    total = jnp.sum(raw)
    return raw / jnp.where(total > 0, total, 1)
