"""Train several classifiers over one trunk, and losses with several branches.

Experts are heads with a leading axis. Any trunk serves, and any head, vmapped over
stacked parameters:

    logits = jax.vmap(heads.normed, in_axes=(None, 0))(features, kernels)  # [E, ..., C]

The losses take all logits [E, ..., C] and return per-example losses [...], summed over
the experts; `aggregate` makes one prediction of them. `bbn` has two branches that see
different examples instead, and `paco` a branch that compares features.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail import weights
from jaxtricks.longtail._counts import (
    Counts,
    are_classes,
    as_mask,
    as_vector,
    at_least_rarest,
    class_indices,
    floating,
    log_prior,
)
from jaxtricks.longtail._losses import cross_entropy
from jaxtricks.longtail._softmax import floor, rows
from jaxtricks.longtail._stateful import Axis
from jaxtricks.longtail.distill import Loss, kl_divergence

__all__ = [
    "aggregate",
    "agreement",
    "bbn",
    "divergence",
    "fit_weights",
    "paco",
    "ride",
    "sade",
]


# RIDE: experts that are each trained on the labels, and pushed away from their mean.


@checked
def aggregate(
    logits: Float[Array, "E *batch C"], weights: Float[Array, "E"] | None = None
) -> Float[Array, "*batch C"]:
    """Average the experts' logits: sum_e w_e z_e, or their mean.

    Args:
      logits: [E, ..., C].
      weights: [E], which should sum to 1 (`fit_weights`), or None.

    Returns:
      [..., C] logits in float32 or wider; -inf where any expert of positive weight says
      so.

    Raises:
      ValueError: if there is not one weight per expert.

    >>> aggregate(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
    Array([2., 0.], dtype=float32)
    """
    z = floating(jnp.asarray(logits))
    if weights is None:
        return jnp.mean(z, axis=0)
    w = jnp.asarray(weights).astype(z.dtype)
    if w.shape != z.shape[:1]:
        raise ValueError(
            f"longtail.experts.aggregate: `weights` has shape {w.shape} for "
            f"{z.shape[0]} experts: pass one number per expert"
        )
    w = w.reshape(w.shape + (1,) * (z.ndim - 1))
    return jnp.sum(jnp.where(w != 0, w * z, 0), axis=0)


@checked
def divergence(
    logits: Float[Array, "E *batch C"],
    temperature: Scalar | Float[Array, "C"] = 1.0,
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Measure how far the experts are from their mean.

    mean(T)^2 sum_e KL(softmax(zbar/T) || softmax(z_e/T))

    zbar is the mean of the logits. It is held constant; the gradient through it sums to
    zero anyway.

    Args:
      logits: [E, ..., C].
      temperature: T > 0, or [C] one for each class. May be traced.
      where: [...] booleans; a masked example has divergence 0, whatever it holds.

    Returns:
      [...] divergences in float32 or wider, >= 0.
    """
    z = floating(jnp.asarray(logits))
    if where is not None:
        z = jnp.where(as_mask(where, z.shape[1:-1])[None, ..., None], z, 0)
    t = jnp.asarray(temperature).astype(z.dtype)
    mean = jax.lax.stop_gradient(jnp.mean(z, axis=0, keepdims=True))
    z, mean = (
        x / t.reshape((1,) * (z.ndim - t.ndim) + t.shape) for x in (z, mean)
    )
    each = jax.vmap(lambda expert: kl_divergence(mean[0], expert))(z)
    return jnp.mean(t) ** 2 * jnp.sum(each, axis=0)


@node
class Ride:
    """The loss of `ride`: a pytree where its base is one, and callable.

    Attributes:
      base: the loss of each expert.
      diversity: factor of the divergence; below 0 it drives the experts apart.
      temperature: scalar or [C], of the divergence.
    """

    base: Loss
    diversity: Scalar
    temperature: Scalar | Array

    @checked
    def __call__(
        self,
        logits: Float[Array, "E *batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Compute the loss of every example, summed over experts; `logits` [E, ..., C]."""
        total = jnp.sum(
            jax.vmap(lambda z: self.base(z, labels, where=where))(logits),
            axis=0,
        )
        apart = divergence(logits, self.temperature, where=where).astype(
            total.dtype
        )
        apart = jnp.where(are_classes(labels, logits.shape[-1]), apart, 0)
        return total + jnp.asarray(self.diversity).astype(total.dtype) * apart


@checked
def ride(
    base: Loss | None = None,
    counts: Counts | None = None,
    *,
    diversity: Scalar = -0.2,
    temperature: Scalar = 1.0,
    reweight: Scalar = 0.05,
) -> Ride:
    """Build the RIDE loss.

    sum_e base(z_e, y) + diversity mean(T)^2 KL(softmax(zbar / T) || softmax(z_e / T))

    With counts the temperature of class c is T_c = temperature v_c / max v, v_c = C
    pi_c r + 1 - r, r = reweight: the experts may differ more on rare classes. The
    reference turns that on together with the class weights of its base loss, at epoch
    160 of 200.

    Args:
      base: loss(logits [..., C], labels, where=) of each expert, any of the room; None
        is cross entropy. The reference has LDAM on logits that its cosine heads have
        scaled by s already: `ldam(counts, max_margin=0.5 * s, s=1.0)`.
      counts: [C] training examples per class, or None for one temperature. May be
        traced.
      diversity: factor of the divergence; -0.2 is the reference's default, -0.45 its
        CIFAR setting. May be traced.
      temperature: T > 0. May be traced.
      reweight: r in [0, 1), how much the temperature follows the counts. May be traced.

    Returns:
      loss(logits [E, ..., C], labels [...] or [..., C], where=None) -> per-example
      [...]. It is not bounded below: a diversity of -1 diverges.

    >>> loss = ride(diversity=0.0)
    >>> loss(jnp.zeros((3, 1, 2)), jnp.array([0])).round(4)
    Array([2.0794], dtype=float32)

    References:
      Wang et al., Long-tailed recognition by routing diverse distribution-aware
      experts, arXiv 2010.01809.
    """
    base = cross_entropy() if base is None else base
    if counts is None:
        return Ride(base, diversity, temperature)
    n = floating(as_vector("experts.ride: `counts`", counts))
    r = jnp.asarray(reweight).astype(n.dtype)
    top = jnp.asarray(temperature).astype(n.dtype)
    v = n.shape[0] * r * n / jnp.maximum(jnp.sum(n), 1) + 1 - r
    return Ride(base, diversity, top * v / jnp.max(v))


# BBN: two branches, one on examples as they come and one on reversed sampling, mixed by
# a schedule.


@node
class Bbn:
    """The loss of `bbn` and its mixer: a pytree where its base is one, and callable.

    Attributes:
      total: steps of the schedule.
      base: the loss of each branch.
    """

    total: Scalar
    base: Loss

    def share(self, step: Scalar) -> Float[Array, ""]:
        """Return a = 1 - (step / total)^2 of the conventional branch; 0 from total on."""
        return weights.bbn(step, self.total)

    @checked
    def mix(
        self,
        conventional: Float[Array, "*batch D"],
        reversed_: Float[Array, "*batch D"],
        step: Scalar | None = None,
    ) -> Float[Array, "*batch F"]:
        """Concatenate the branches' features: 2 [a f_c, (1 - a) f_r].

        A linear head on it is the sum of two heads, 2 a W_c f_c + 2 (1 - a) W_r f_r.

        Args:
          conventional: [..., D] features of that branch.
          reversed_: [..., D] features of the other one.
          step: current step, counted from 0; None at test time, where a = 1/2.

        Returns:
          [..., 2 D] in the dtype of the features.
        """
        a = jnp.asarray(0.5) if step is None else self.share(step)
        parts = [
            2 * a.astype(conventional.dtype) * conventional,
            2 * (1 - a).astype(reversed_.dtype) * reversed_,
        ]
        return jnp.concatenate(parts, axis=-1)

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        reversed_labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        step: Scalar,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Compute a base(z, y_c) + (1 - a) base(z, y_r) of every pair of examples.

        Args:
          logits: [..., C] of the mixed features.
          labels: [...] or [..., C], of the examples that the conventional branch saw.
          reversed_labels: the same for the other branch.
          step: current step, counted from 0; may be traced.
          where: [...] booleans; a masked pair costs 0.

        Returns:
          [...] losses in float32 or wider.
        """
        first = self.base(logits, labels, where=where)
        second = self.base(logits, reversed_labels, where=where)
        a = self.share(step).astype(first.dtype)
        return a * first + (1 - a) * second


@checked
def bbn(total: Scalar, base: Loss | None = None) -> Bbn:
    """Build the mixer and loss of a bilateral-branch network.

    a = 1 - (t / total)^2

    One branch sees examples as they come, the other as a sampler with class
    probabilities ~ 1 / n_c draws them. Training goes from the first to the second. The
    branches share the trunk but for their last block.

    Args:
      total: steps of the run, counted as `step` is (steps or epochs). The reference
        stretches 90 and 180 epochs to 100 and 200, so that the last ones are not the
        reversed branch's alone. May be traced.
      base: loss(logits [..., C], labels, where=) of each branch; None is cross entropy.

    Returns:
      A pytree: `.mix(f_c, f_r, step)`, `.share(step)`, and loss(logits, labels,
      reversed_labels, step=, where=None) -> per-example [...].

    >>> branch = bbn(200)
    >>> branch.mix(jnp.ones(1), jnp.ones(1), step=100)
    Array([1.5, 0.5], dtype=float32)
    >>> branch(jnp.array([[2.0, 0.0]]), jnp.array([0]), jnp.array([1]), step=200).round(3)
    Array([2.127], dtype=float32)

    References:
      Zhou et al., BBN, arXiv 1912.02413.
    """
    return Bbn(total, cross_entropy() if base is None else base)


# PaCo: supervised contrast with a queue of features and a learnable centre for each
# class.


NOBODY = -1
"""Label of an entry that is compared with nothing: an empty place, or a masked example."""


@node
class PacoState:
    """The queue of `paco`.

    Attributes:
      features: [K, D] keys of earlier batches, the newest first.
      labels: [K] int32 their classes; -1 is an empty place.
    """

    features: Array
    labels: Array


@node
class Paco:
    """The pair of `paco`: a pytree.

    Attributes:
      counts: [C] training examples per class.
      alpha: weight of the pairs of examples.
      beta: weight of the pair of example and centre.
      gamma: weight of the examples in the denominator.
      temperature: of the products of features.
      center_temperature: of the logits of the centres.
      num_features: D.
      queue: K.
      axis_name: mapped axes whose keys are gathered, or None.
      compat: "reference" for its epsilons.
    """

    counts: Array
    alpha: Scalar
    beta: Scalar
    gamma: Scalar
    temperature: Scalar
    center_temperature: Scalar
    num_features: int = static()
    queue: int = static()
    axis_name: Axis = static()
    compat: Literal["reference"] | None = static()

    def init(self) -> PacoState:
        """Return an empty queue."""
        labels = jnp.full(self.queue, NOBODY, jnp.int32)
        return PacoState(
            jnp.zeros((self.queue, self.num_features), float), labels
        )

    @checked
    def update(
        self,
        state: PacoState,
        logits: Float[Array, "B C"],
        labels: Integer[Array, "B"],
        *,
        features: Float[Array, "B D"],
        keys: Float[Array, "B D"],
        where: Bool[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B"], PacoState]:
        """Compare the batch with itself, its keys and the queue; then put the keys into the queue.

        Args:
          state: of `init` or the last update.
          logits: [B, C] products of the features with the learnable centres (a linear
            layer).
          labels: [B] integers in [0, C).
          features: [B, D] of one view, of length 1.
          keys: [B, D] of another view, of length 1, by the momentum encoder. Gradients
            flow into them here; they end at the queue.
          where: [B] booleans; a masked example costs 0 and is compared with nothing.

        Returns:
          [B] losses, and the new state. 0 for a label outside [0, C).

        Raises:
          ValueError: where the shapes do not fit.
        """
        z = floating(jnp.asarray(logits))
        self._check(z, features, keys)
        keep = as_mask(where, z.shape[:1])
        z, f, k = (
            jnp.where(keep[:, None], x.astype(z.dtype), 0)
            for x in (z, features, keys)
        )
        inside = are_classes(labels, z.shape[-1])
        # A masked example is nobody's positive and never enters the queue as one.
        y = jnp.where(keep & inside, class_indices(labels), NOBODY)
        state = PacoState(
            jnp.asarray(state.features),
            jnp.asarray(state.labels).astype(jnp.int32),
        )
        # Contrast with both views of the batch and with the queue.
        others = jnp.concatenate([f, k, state.features.astype(z.dtype)])
        loss = self._loss(
            z, f, y, others, jnp.concatenate([y, y, state.labels])
        )
        loss = jnp.where(inside, loss, 0)
        return jnp.where(keep, loss, 0), self._enqueue(state, k, y)

    def _loss(
        self, z: Array, f: Array, y: Array, others: Array, theirs: Array
    ) -> Array:
        """Compute sum_j w_ij (lse_i - s_ij) / sum_j w_ij over centres and examples."""
        parameters = (
            self.alpha,
            self.beta,
            self.gamma,
            self.temperature,
            self.center_temperature,
        )
        alpha, beta, gamma, t, centre_t = (
            jnp.asarray(x).astype(z.dtype) for x in parameters
        )
        scores = jnp.concatenate(
            [(z + rows(self._log_prior(z), z)) / centre_t, f @ others.T / t], 1
        )
        # Finite everywhere: a weight of 0 times -inf would be NaN.
        scores = jnp.maximum(scores, floor(scores))
        # An example is not its own positive.
        mine = jnp.arange(len(y))[:, None] == jnp.arange(len(theirs))[None]
        somebody = (theirs[None] != NOBODY) & ~mine
        same = jnp.where(somebody & (y[:, None] == theirs[None]), alpha, 0)
        centre_weights = jnp.where(
            y[:, None] == jnp.arange(z.shape[-1], dtype=y.dtype)[None], beta, 0
        )
        weights = jnp.concatenate([centre_weights, same], axis=1)
        # log gamma weighs the examples in the denominator; the centres weigh 1.
        offset = jnp.where(somebody, jnp.log(gamma), floor(z))
        offset = jnp.concatenate(
            [jnp.zeros_like(z), jnp.maximum(offset, floor(z))], axis=1
        )
        total = jax.nn.logsumexp(
            self._with_epsilon(scores + offset, scores), axis=1, keepdims=True
        )
        # Without a positive the weights sum to 0, and so does the numerator.
        sum_ = jnp.sum(weights, axis=1)
        return jnp.sum(weights * (total - scores), axis=1) / jnp.where(
            sum_ > 0, sum_, 1
        )

    def _log_prior(self, z: Array) -> Array:
        n = self.counts.astype(z.dtype)
        if n.shape != z.shape[-1:]:
            raise ValueError(
                f"longtail.experts.paco: `counts` has {n.shape[0]} classes "
                f"where the logits have {z.shape[-1]}: pass one number per "
                "class"
            )
        return (
            jnp.log(n / jnp.sum(n) + 1e-9)
            if self.compat == "reference"
            else log_prior(n)
        )

    def _with_epsilon(self, terms: Array, scores: Array) -> Array:
        """Add the reference's 1e-12 of the largest score to the denominator's terms."""
        if self.compat is None:
            return terms
        top = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
        return jnp.concatenate([terms, top + math.log(1e-12)], axis=1)

    def _enqueue(
        self, state: PacoState, keys: Array, labels: Array
    ) -> PacoState:
        keys = jax.lax.stop_gradient(keys).astype(state.features.dtype)
        if self.axis_name is not None:
            keys = _gathered(keys, self.axis_name)
            labels = _gathered(labels, self.axis_name)
        features = jnp.concatenate([keys, state.features])[: self.queue]
        return PacoState(
            features, jnp.concatenate([labels, state.labels])[: self.queue]
        )

    def _check(self, z: Array, features: Array, keys: Array) -> None:
        wanted = (z.shape[0], self.num_features)
        for name, x in (("features", features), ("keys", keys)):
            if x.shape != wanted:
                raise ValueError(
                    f"longtail.experts.paco: `{name}` has shape {x.shape} "
                    f"where {wanted} fits the logits and `num_features`: pass "
                    "one row per example"
                )


@checked
def paco(
    counts: Counts,
    num_features: int,
    *,
    queue: int = 1024,
    alpha: Scalar = 0.05,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 0.2,
    center_temperature: Scalar = 1.0,
    axis_name: Axis = None,
    compat: Literal["reference"] | None = None,
) -> Paco:
    """Build PaCo: cross entropy over class centres and other examples at once.

    loss_i = -sum_j w_ij log(e^s_ij / Z_i) / sum_j w_ij
    Z_i = sum_c e^s_ic + gamma sum_{k != i} e^s_ik
    s_ic = (z_ic + log pi_c) / center_temperature
    s_ik = f_i . f_k / temperature

    c are the centres, and k the examples: the batch, its keys and the queue. w is beta
    for the centre of the example's class and alpha for its other examples, so that a
    class with few of those is not outweighed.

    Args:
      counts: [C] training examples per class; may be traced.
      num_features: D.
      queue: K, number of stored keys; may be smaller than a batch.
      alpha: weight of an example of the same class: 0.05 on ImageNet-LT, 0.01 on
        CIFAR-100-LT. May be traced, like beta, gamma and the temperatures.
      beta: weight of the class centre.
      gamma: weight of the examples in the denominator; 0 (with alpha 0) is balanced
        softmax.
      temperature: of the features: 0.2 on ImageNet-LT, 0.05 on CIFAR-LT.
      center_temperature: of the centres ("supt").
      axis_name: mapped axes whose keys fill one queue, inside shard_map or a named
        vmap.
      compat: "reference" for log(pi + 1e-9), and 1e-12 of the largest score, that of an
        example with itself included, in the denominator: at low temperatures that is no
        small number.

    Returns:
      A pair: init(), update(state, logits [B, C], labels [B], features= [B, D],
      keys= [B, D], where=None) -> (per-example [B], state). The queue starts empty (the
      reference fills it with random features and labels).

    Raises:
      ValueError: if num_features or queue is below 1.

    >>> loss = paco([90, 10], 2, queue=4, alpha=0.0, gamma=0.0)
    >>> each, state = loss.update(
    ...     loss.init(), jnp.zeros((1, 2)), jnp.array([1]), features=jnp.eye(2)[:1], keys=jnp.eye(2)[:1]
    ... )
    >>> print(each.round(4), state.labels)
    [2.3026] [ 1 -1 -1 -1]

    References:
      Cui et al., Parametric contrastive learning, arXiv 2107.12028.
    """
    if num_features < 1 or queue < 1:
        raise ValueError(
            "longtail.experts.paco needs `num_features` and `queue` >= 1, got "
            f"{num_features} and {queue}: pass the width of the features and "
            "the length of the queue"
        )
    n = as_vector("experts.paco: `counts`", counts)
    weights = (alpha, beta, gamma, temperature, center_temperature)
    return Paco(n, *weights, int(num_features), int(queue), axis_name, compat)


def _gathered(x: Array, axis_name: Axis) -> Array:
    """Return [n B, ...] of all devices.

    A sum, so that shard_map knows that the result is replicated.
    """
    size = jax.lax.psum(1, axis_name)
    mine = jnp.arange(size) == jax.lax.axis_index(axis_name)
    mine = mine.reshape((-1,) + (1,) * x.ndim)
    every = jax.lax.psum(
        jnp.where(mine, x[None], jnp.zeros((), x.dtype)), axis_name
    )
    return every.reshape(-1, *x.shape[1:])


# SADE: three experts for three test distributions, weighted at test time without
# labels.


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
        """Compute the loss of every example, summed over experts; `logits` [3, ..., C]."""
        z = floating(jnp.asarray(logits))
        offsets = self.offsets.astype(z.dtype)
        if (z.shape[0], z.shape[-1]) != offsets.shape:
            raise ValueError(
                f"longtail.experts.sade: `logits` have shape {z.shape} where "
                f"the loss has 3 experts and {offsets.shape[-1]} classes: pass "
                "[3, ..., C]"
            )

        def of_expert(z: Array, offset: Array) -> Array:
            return cross_entropy()(z + rows(offset, z), labels, where=where)

        return jnp.sum(jax.vmap(of_expert)(z, offsets), axis=0)


@checked
def sade(counts: Counts, *, tau: Scalar = 2.0, compat: Compat = None) -> Sade:
    """Build the SADE loss.

    CE(z_1) + CE(z_2 + log pi) + CE(z_3 + log pi - tau log pi')

    The first expert learns the prior of the training set, the second a uniform one, the
    third an inverse one: pi' has the counts in reverse, the most frequent class that of
    the rarest. Classes with equal counts share evenly what they would get (the
    reference hands it out by position, so that they differ). A class without examples
    has prior 1e-12, and no part in the reversal.

    Args:
      counts: [C] training examples per class; may be traced.
      tau: strength of the inverse prior. May be traced.
      compat: "reference" for log(pi + 1e-9) and pi' by position.

    Returns:
      loss(logits [3, ..., C], labels [...] or [..., C], where=None) -> per-example
      [...]. Predict with `aggregate`, with equal weights or those of `fit_weights`.

    >>> each = sade([90, 10])(jnp.zeros((3, 2, 2)), jnp.array([0, 1]))
    >>> print(" ".join(f"{x:.2f}" for x in each))  # of a head and of a tail example
    0.80 9.59

    References:
      Zhang et al., Self-supervised aggregation of diverse experts, arXiv 2107.09249.
    """
    n = floating(as_vector("experts.sade: `counts`", counts))
    if compat == "reference":
        share = n / jnp.sum(n)
        prior = jnp.log(share + 1e-9)
        inverse = jnp.log(_by_position(share) + 1e-9)
    else:
        prior = log_prior(n)
        inverse = jnp.log(_reversed(at_least_rarest(n)))
    inverse = jnp.asarray(tau).astype(n.dtype) * inverse
    return Sade(jnp.stack([jnp.zeros_like(prior), prior, prior - inverse]))


def _by_position(share: Array) -> Array:
    """Reverse the shares as the reference does: of equal counts the later is rarer."""
    rank = jnp.argsort(jnp.argsort(share[::-1], stable=True), stable=True)[::-1]
    return jnp.sort(share)[share.shape[0] - 1 - rank]


def _reversed(n: Array) -> Array:
    """Reverse the shares by size; classes of equal counts share their mean."""
    rising = jnp.sort(n)
    falling = rising[::-1]
    start = jnp.searchsorted(rising, n, side="left")
    stop = jnp.searchsorted(rising, n, side="right")
    until = jnp.append(jnp.zeros((), n.dtype), jnp.cumsum(falling))
    mean = (until[stop] - until[start]) / (stop - start).astype(n.dtype)
    # Exact, where the difference of two large sums is not.
    alone = stop - start == 1
    return jnp.where(alone, falling[start], mean) / jnp.sum(n)


@checked
def agreement(
    weights: Float[Array, "E"],
    first: Float[Array, "E *batch C"],
    second: Float[Array, "E *batch C"],
) -> Float[Array, "*batch"]:
    """Measure how far two views of an example agree: the cosine of their softmax.

    Args:
      weights: [E] of the experts.
      first: [E, ..., C] logits of one view (augmentation) of each example.
      second: [E, ..., C] of another.

    Returns:
      [...] cosines in (0, 1], float32 or wider.
    """
    p = jax.nn.softmax(aggregate(first, weights), axis=-1)
    q = jax.nn.softmax(aggregate(second, weights), axis=-1)
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
    """Fit the experts' weights on unlabelled data, so that two views agree most.

    The expert that fits the classes that occur is the most stable one on them. Gradient
    ascent on the mean `agreement` from equal weights, w = softmax(v), momentum 0.9,
    over all examples at once; it stops before the first step that would take a weight
    below `least`, as the reference does after an epoch.

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
      Zhang et al., Self-supervised aggregation of diverse experts, arXiv 2107.09249,
      section 4.3.
    """
    first = floating(jnp.asarray(first))
    second = floating(jnp.asarray(second))
    batch = first.shape[1:-1]
    keep = as_mask(where, batch)
    first = jnp.where(keep[None, ..., None], first, 0)
    second = jnp.where(keep[None, ..., None], second, 0)
    number = jnp.maximum(jnp.sum(keep), 1).astype(first.dtype)
    rate = jnp.asarray(learning_rate).astype(first.dtype)
    least = jnp.asarray(least).astype(first.dtype)

    def loss(v: Array) -> Array:
        each = agreement(jax.nn.softmax(v), first, second)
        return -jnp.sum(jnp.where(keep, each, 0)) / number

    def step(
        carry: tuple[Array, Array, Array], _: None
    ) -> tuple[tuple[Array, Array, Array], None]:
        v, velocity, going = carry
        velocity = 0.9 * velocity - rate * jax.grad(loss)(v)
        going &= jnp.all(jax.nn.softmax(v + velocity) >= least)
        return (jnp.where(going, v + velocity, v), velocity, going), None

    v = jnp.zeros(first.shape[0], first.dtype)
    (v, _, _), _ = jax.lax.scan(step, (v, v, jnp.ones((), bool)), length=steps)
    return jax.nn.softmax(v)
