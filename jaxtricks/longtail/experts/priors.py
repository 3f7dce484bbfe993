"""SADE: three experts for three test distributions, weighted at test time without labels."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import (
    Counts,
    as_mask,
    as_vector,
    at_least_rarest,
    floating,
    log_prior,
)
from jaxtricks.longtail.experts.diversity import aggregate
from jaxtricks.longtail.gap import rows
from jaxtricks.longtail.presets import cross_entropy

Compat = Literal["reference"] | None


@node
class Sade:
    """The loss of `sade`: a pytree, and callable.

    Attributes:
      offsets: [3, C] what is added to the logits of each expert.
    """

    offsets: Array

    @checked
    def __call__(
        self,
        logits: Float[Array, "E *batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example, summed over the experts; `logits` are [3, ..., C]."""
        z = floating(jnp.asarray(logits))
        offsets = self.offsets.astype(z.dtype)
        if (z.shape[0], z.shape[-1]) != offsets.shape:
            raise ValueError(
                f"longtail.experts.sade: `logits` have shape {z.shape} where the loss has 3 experts "
                f"and {offsets.shape[-1]} classes: pass [3, ..., C]"
            )

        def of_expert(z: Array, offset: Array) -> Array:
            return cross_entropy()(z + rows(offset, z), labels, where=where)

        return jnp.sum(jax.vmap(of_expert)(z, offsets), axis=0)


@checked
def sade(counts: Counts, *, tau: Scalar = 2.0, compat: Compat = None) -> Sade:
    """SADE: CE(z_1) + CE(z_2 + log pi) + CE(z_3 + log pi - tau log pi').

    The first expert learns the prior of the training set, the second a uniform one, the third an
    inverse one: pi' has the counts in reverse, the most frequent class that of the rarest. Classes
    with equal counts share evenly what they would get (the reference hands it out by position, so
    that they differ). A class without examples has prior 1e-12, and no part in the reversal.

    Args:
      counts: [C] training examples per class; may be traced.
      tau: strength of the inverse prior. May be traced.
      compat: "reference" for log(pi + 1e-9) and pi' by position.

    Returns:
      loss(logits [3, ..., C], labels [...] or [..., C], where=None) -> per-example [...]. Predict
      with `aggregate`, with equal weights or those of `fit_weights`.

    >>> each = sade([90, 10])(jnp.zeros((3, 2, 2)), jnp.array([0, 1]))
    >>> print(" ".join(f"{x:.2f}" for x in each))  # of a head and of a tail example
    0.80 9.59

    References:
      Zhang et al., Self-supervised aggregation of diverse experts, arXiv 2107.09249.
    """
    n = floating(as_vector("experts.sade: `counts`", counts))
    if compat == "reference":
        share = n / jnp.sum(n)
        own, inverse = (jnp.log(x + 1e-9) for x in (share, _by_position(share)))
    else:
        own, inverse = log_prior(n), jnp.log(_reversed(at_least_rarest(n)))
    inverse = jnp.asarray(tau).astype(n.dtype) * inverse
    return Sade(jnp.stack([jnp.zeros_like(own), own, own - inverse]))


def _by_position(share: Array) -> Array:
    """What the reference does: of equal counts the later class is the rarer one."""
    rank = jnp.argsort(jnp.argsort(share[::-1], stable=True), stable=True)[::-1]
    return jnp.sort(share)[share.shape[0] - 1 - rank]


def _reversed(n: Array) -> Array:
    """The shares in reverse order of size, the mean of theirs for classes with equal counts."""
    rising = jnp.sort(n)
    falling = rising[::-1]
    start, stop = (jnp.searchsorted(rising, n, side=side) for side in ("left", "right"))
    until = jnp.append(jnp.zeros((), n.dtype), jnp.cumsum(falling))
    mean = (until[stop] - until[start]) / (stop - start).astype(n.dtype)
    alone = stop - start == 1  # exact there: the difference of two large sums is not
    return jnp.where(alone, falling[start], mean) / jnp.sum(n)


@checked
def agreement(
    weights: Float[Array, "E"],
    first: Float[Array, "E *batch C"],
    second: Float[Array, "E *batch C"],
) -> Float[Array, "*batch"]:
    """How far two views of an example agree: the cosine of the two aggregated softmax outputs.

    Args:
      weights: [E] of the experts.
      first: [E, ..., C] logits of one view (augmentation) of each example.
      second: [E, ..., C] of another.

    Returns:
      [...] cosines in (0, 1], float32 or wider.
    """
    p, q = (jax.nn.softmax(aggregate(z, weights), axis=-1) for z in (first, second))
    norms = jnp.sum(p**2, axis=-1) * jnp.sum(q**2, axis=-1)
    return jnp.sum(p * q, axis=-1) / jnp.sqrt(norms)


@checked
def fit_weights(
    first: Float[Array, "E *batch C"],
    second: Float[Array, "E *batch C"],
    *,
    steps: int = 300,
    learning_rate: Scalar = 0.1,
    least: Scalar = 0.05,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "E"]:
    """Weights of the experts for an unlabelled test set: those under which two views agree most.

    The expert that fits the classes that occur is the most stable one on them. Gradient ascent on the
    mean `agreement` from equal weights, w = softmax(v), momentum 0.9, over all examples at once; it
    stops before the first step that would take a weight below `least`, as the reference does after
    an epoch.

    Args:
      first: [E, ..., C] logits of one augmentation of each test example.
      second: [E, ..., C] of another.
      steps: of the ascent; static.
      learning_rate: of the ascent. May be traced.
      least: no weight gets smaller; at most 1 / E. May be traced.
      where: [...] booleans; a masked example is left out.

    Returns:
      [E] weights that sum to 1, for `aggregate`.

    >>> sure = 9 * jnp.eye(4)
    >>> first, second = jnp.stack([sure, sure]), jnp.stack([sure, sure[::-1]])
    >>> weights = fit_weights(first, second)
    >>> bool(weights[0] > 0.9)
    True

    References:
      Zhang et al., Self-supervised aggregation of diverse experts, arXiv 2107.09249, section 4.3.
    """
    first, second = (floating(jnp.asarray(z)) for z in (first, second))
    batch = first.shape[1:-1]
    keep = jnp.ones(batch, bool) if where is None else as_mask(where, batch)
    first, second = (jnp.where(keep[None, ..., None], z, 0) for z in (first, second))
    number = jnp.maximum(jnp.sum(keep), 1).astype(first.dtype)
    rate, least = (jnp.asarray(x).astype(first.dtype) for x in (learning_rate, least))

    def loss(v: Array) -> Array:
        each = agreement(jax.nn.softmax(v), first, second)
        return -jnp.sum(jnp.where(keep, each, 0)) / number

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        v, velocity, going = carry
        velocity = 0.9 * velocity - rate * jax.grad(loss)(v)
        going &= jnp.all(jax.nn.softmax(v + velocity) >= least)
        return (jnp.where(going, v + velocity, v), velocity, going), None

    v = jnp.zeros(first.shape[0], first.dtype)
    (v, _, _), _ = jax.lax.scan(step, (v, v, jnp.ones((), bool)), length=steps)
    return jax.nn.softmax(v)
