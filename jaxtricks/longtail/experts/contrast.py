"""PaCo: supervised contrast with a queue of features and a learnable centre for each class."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import (
    Counts,
    are_classes,
    as_mask,
    as_vector,
    class_indices,
    floating,
    log_prior,
)
from jaxtricks.longtail._stateful import Axis
from jaxtricks.longtail.gap import floor, rows

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
        """An empty queue."""
        labels = jnp.full(self.queue, NOBODY, jnp.int32)
        return PacoState(jnp.zeros((self.queue, self.num_features), float), labels)

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
          logits: [B, C] products of the features with the learnable centres (a linear layer).
          labels: [B] integers in [0, C).
          features: [B, D] of one view, of length 1.
          keys: [B, D] of another view, of length 1, by the momentum encoder. Gradients flow into
            them here; they end at the queue.
          where: [B] booleans; a masked example costs 0 and is compared with nothing.

        Returns:
          [B] losses, and the new state. 0 for a label outside [0, C).

        Raises:
          ValueError: where the shapes do not fit.
        """
        z = floating(jnp.asarray(logits))
        self._check(z, features, keys)
        keep = jnp.ones(z.shape[:1], bool) if where is None else as_mask(where, z.shape[:1])
        z, f, k = (jnp.where(keep[:, None], x.astype(z.dtype), 0) for x in (z, features, keys))
        inside = are_classes(labels, z.shape[-1])
        y = jnp.where(keep & inside, class_indices(labels), NOBODY)
        state = PacoState(jnp.asarray(state.features), jnp.asarray(state.labels).astype(jnp.int32))
        others = jnp.concatenate([f, k, state.features.astype(z.dtype)])
        loss = self._loss(z, f, y, others, jnp.concatenate([y, y, state.labels]))
        loss = jnp.where(inside, loss, 0)
        return jnp.where(keep, loss, 0), self._enqueue(state, k, y)

    def _loss(self, z: Array, f: Array, y: Array, others: Array, theirs: Array) -> Array:
        """sum_j w_ij (lse_i - s_ij) / sum_j w_ij over centres and examples, without oneself."""
        parameters = (self.alpha, self.beta, self.gamma, self.temperature, self.center_temperature)
        alpha, beta, gamma, t, centre_t = (jnp.asarray(x).astype(z.dtype) for x in parameters)
        scores = jnp.concatenate(
            [(z + rows(self._log_prior(z), z)) / centre_t, f @ others.T / t], 1
        )
        scores = jnp.maximum(scores, floor(scores))
        mine = jnp.arange(len(y))[:, None] == jnp.arange(len(theirs))[None]
        somebody = (theirs[None] != NOBODY) & ~mine
        same = jnp.where(somebody & (y[:, None] == theirs[None]), alpha, 0)
        own = jnp.where(y[:, None] == jnp.arange(z.shape[-1], dtype=y.dtype)[None], beta, 0)
        weights = jnp.concatenate([own, same], axis=1)
        offset = jnp.where(somebody, jnp.log(gamma), floor(z))
        offset = jnp.concatenate([jnp.zeros_like(z), jnp.maximum(offset, floor(z))], axis=1)
        total = jax.nn.logsumexp(self._with_epsilon(scores + offset, scores), axis=1, keepdims=True)
        sum_ = jnp.sum(weights, axis=1)
        return jnp.sum(weights * (total - scores), axis=1) / jnp.where(sum_ > 0, sum_, 1)

    def _log_prior(self, z: Array) -> Array:
        n = self.counts.astype(z.dtype)
        if n.shape != z.shape[-1:]:
            raise ValueError(
                f"longtail.experts.paco: `counts` has {n.shape[0]} classes where the logits have "
                f"{z.shape[-1]}: pass one number per class"
            )
        return jnp.log(n / jnp.sum(n) + 1e-9) if self.compat == "reference" else log_prior(n)

    def _with_epsilon(self, terms: Array, scores: Array) -> Array:
        """The terms of the denominator; the reference adds 1e-12 of the largest score to them."""
        if self.compat is None:
            return terms
        top = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
        return jnp.concatenate([terms, top + math.log(1e-12)], axis=1)

    def _enqueue(self, state: PacoState, keys: Array, labels: Array) -> PacoState:
        keys = jax.lax.stop_gradient(keys).astype(state.features.dtype)
        if self.axis_name is not None:
            keys, labels = (_gathered(x, self.axis_name) for x in (keys, labels))
        features = jnp.concatenate([keys, state.features])[: self.queue]
        return PacoState(features, jnp.concatenate([labels, state.labels])[: self.queue])

    def _check(self, z: Array, features: Array, keys: Array) -> None:
        wanted = (z.shape[0], self.num_features)
        for name, x in (("features", features), ("keys", keys)):
            if x.shape != wanted:
                raise ValueError(
                    f"longtail.experts.paco: `{name}` has shape {x.shape} where {wanted} fits the "
                    "logits and `num_features`: pass one row per example"
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
    """PaCo: cross entropy over the classes' centres and the other examples at once.

    loss_i = -sum_j w_ij log(e^s_ij / (sum_c e^s_ic + gamma sum_{k != i} e^s_ik)) / sum_j w_ij, with
    s_ic = (z_ic + log pi_c) / center_temperature for the centres and s_ik = f_i . f_k / temperature
    for the examples: the batch, its keys and the queue. w is beta for the own centre and alpha for
    the examples of the own class, so that a class with few of those is not outweighed.

    Args:
      counts: [C] training examples per class; may be traced.
      num_features: D.
      queue: K, keys that are kept; may be smaller than a batch.
      alpha: weight of an example of the same class: 0.05 on ImageNet-LT, 0.01 on CIFAR-100-LT. May
        be traced, like beta, gamma and the temperatures.
      beta: weight of the own centre.
      gamma: weight of the examples in the denominator; 0 (with alpha 0) is balanced softmax.
      temperature: of the features: 0.2 on ImageNet-LT, 0.05 on CIFAR-LT.
      center_temperature: of the centres ("supt").
      axis_name: mapped axes whose keys fill one queue, inside shard_map or a named vmap.
      compat: "reference" for log(pi + 1e-9), and 1e-12 of the largest score, that of an example
        with itself included, in the denominator: at low temperatures that is no small number.

    Returns:
      A pair: init(), update(state, logits [B, C], labels [B], features= [B, D], keys= [B, D],
      where=None) -> (per-example [B], state). The queue starts empty (the reference fills it with
      random features and labels).

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
            f"longtail.experts.paco needs `num_features` and `queue` >= 1, got {num_features} and "
            f"{queue}: pass the width of the features and the length of the queue"
        )
    n = as_vector("experts.paco: `counts`", counts)
    weights = (alpha, beta, gamma, temperature, center_temperature)
    return Paco(n, *weights, int(num_features), int(queue), axis_name, compat)


def _gathered(x: Array, axis_name: Axis) -> Array:
    """[n B, ...] of all devices. By a sum, so that shard_map knows the result is the same everywhere."""
    size = jax.lax.psum(1, axis_name)
    mine = jnp.arange(size) == jax.lax.axis_index(axis_name)
    mine = mine.reshape((-1,) + (1,) * x.ndim)
    every = jax.lax.psum(jnp.where(mine, x[None], jnp.zeros((), x.dtype)), axis_name)
    return every.reshape(-1, *x.shape[1:])
