"""Class-balanced sampling inside jit: stateless, with replacement, one key per draw."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxtricks._tree import node
from jaxtricks._types import Array, Key, Scalar
from jaxtricks.longtail.counts import Counts, as_vector, floating, seen


def class_probabilities(counts: Counts, power: Scalar = 0.0) -> Float[Array, "C"]:
    """Probability to draw each class: p_c ~ n_c^power.

    Args:
      counts: [C] training examples per class; may be traced.
      power: 1 as the data, 0.5 square root, 0 balanced, -1 reversed.

    Returns:
      [C] probabilities; 0 for a class without examples (all zero if no class has any).

    >>> class_probabilities([90, 10], 0.5)[1].round(3)
    Array(0.25, dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217, equation 1.
    """
    n = floating(as_vector("sampling.class_probabilities: `counts`", counts))
    power = jnp.asarray(power).astype(n.dtype)
    raw = jnp.where(seen(n), jnp.exp(power * jnp.log(jnp.where(seen(n), n, 1))), 0)
    total = jnp.sum(raw)
    return raw / jnp.where(total > 0, total, 1)


def progressive(counts: Counts, t: Scalar) -> Float[Array, "C"]:
    """From the data to balance: (1 - t) p_instance + t p_balanced.

    Args:
      counts: [C] training examples per class; may be traced.
      t: share of the run that is over, clipped to [0, 1]; may be traced.

    Returns:
      [C] probabilities; 0 for a class without examples.

    >>> progressive([90, 10], 0.5)[1].round(3)
    Array(0.3, dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    data, balanced = class_probabilities(counts, 1.0), class_probabilities(counts, 0.0)
    t = jnp.clip(jnp.asarray(t).astype(data.dtype), 0, 1)
    return (1 - t) * data + t * balanced


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


def table(labels: Int[Array, "N"], probabilities: Float[Array, "C"]) -> Table:
    """Sort the examples by class, once, on the host.

    Args:
      labels: [N] integers in [0, C), a host or device array (not traced).
      probabilities: [C] of each class, for example `class_probabilities(counts, 0)`.

    Returns:
      A pytree of N + 3 C numbers.

    Raises:
      ValueError: if a label is outside [0, C).
    """
    labels = np.asarray(labels).reshape(-1)
    probabilities = as_vector("sampling.table: `probabilities`", probabilities)
    probabilities = probabilities.astype(jnp.float32)
    num_classes = probabilities.shape[0]
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"longtail.sampling.table: `labels` must be in [0, {num_classes}), the length of "
            "`probabilities`: drop the others first"
        )
    counts = np.bincount(labels, minlength=num_classes)
    starts = np.cumsum(counts) - counts
    order = np.argsort(labels, kind="stable")
    order, starts, counts = (jnp.asarray(x.astype(np.int32)) for x in (order, starts, counts))
    return Table(order, starts, counts, probabilities)


def sample_indices(key: Key, table: Table, n: int) -> Int[Array, "n"]:
    """Draw n example indices: a class by its probability, then one of its examples uniformly.

    Stateless: fold the step (and the host) into the key, and a resumed run draws the same.

    Args:
      key: typed PRNG key.
      table: of `table`; its probabilities may be traced.
      n: how many; static.

    Returns:
      [n] int32 indices, with replacement. A class without examples is never drawn; where no class
      can be, the indices are -1.
    """
    class_key, example_key = jax.random.split(key)
    p = jnp.where(table.counts > 0, table.probabilities, 0)
    classes = jax.random.categorical(class_key, jnp.log(p), shape=(n,))
    size = jnp.maximum(table.counts[classes], 1)
    within = jax.random.randint(example_key, (n,), 0, size)
    indices = table.order[table.starts[classes] + within]
    return jnp.where(jnp.sum(p) > 0, indices, -1)
