"""The losses of `losses` as pytrees: each has a loss per label, and a soft label averages it."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Key, Scalar
from jaxtricks.longtail._counts import as_mask, check_labels, class_indices, floating, same_shape
from jaxtricks.longtail._softmax import _are_hard
from jaxtricks.longtail.gap import expected, gaps, is_label, lowest, rows

PRIOR_EPS = 1e-9  # of LADE's log(pi + eps), which also defines a class without examples


@node
class LabelAwareSmoothing:
    """The loss of `label_aware_smoothing`: a pytree, and callable.

    Attributes:
      smoothing: [C] share of the label that goes to all classes evenly, by class of the label.
    """

    smoothing: Array

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example; as `SoftmaxLoss`."""
        z, q, inside = _inputs(logits, labels, where)
        e = _vector("label_aware_smoothing: `counts`", self.smoothing, z)
        each, offered = _cross_entropies(z)
        number = jnp.maximum(jnp.sum(offered, axis=-1, keepdims=True), 1).astype(z.dtype)
        mean = jnp.sum(jnp.where(offered, each / number, 0), axis=-1)
        loss = expected(q * (1 - e), each, offered) + jnp.sum(q * e, axis=-1) * mean
        return _finished(loss, inside, where)


@node
class Seesaw:
    """The loss of `seesaw`: a pytree, and callable.

    Attributes:
      counts: [C] training examples per class.
      p: exponent of the mitigation factor.
      q: exponent of the compensation factor.
    """

    counts: Array
    p: Scalar
    q: Scalar

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example; as `SoftmaxLoss`."""
        z, target, inside = _inputs(logits, labels, where)
        n = _vector("seesaw: `counts`", jnp.maximum(self.counts, 1), z)
        if inside is not None:
            return _finished(self._of_label(z, n, target), inside, where)
        one_hot = jnp.eye(z.shape[-1], dtype=z.dtype)
        each = jax.vmap(lambda label: self._of_label(z, n, rows(label, z)), out_axes=-1)(one_hot)
        return _finished(expected(target, each, ~jnp.isneginf(z)), None, where)

    def _of_label(self, z: Array, n: Array, one_hot: Array) -> Array:
        log_n, log_p = jnp.log(n), jax.lax.stop_gradient(jax.nn.log_softmax(z, axis=-1))

        def own(x: Array) -> Array:
            return jnp.sum(jnp.where(one_hot > 0, x, 0), axis=-1, keepdims=True)

        p, q = (jnp.asarray(x).astype(z.dtype) for x in (self.p, self.q))
        mitigation = p * jnp.minimum(log_n - own(log_n), 0)
        least = jnp.log(jnp.asarray(0.01, z.dtype))
        compensation = q * jnp.maximum(log_p - jnp.maximum(own(log_p), least), 0)
        others = jnp.where(one_hot > 0, lowest(z), z + mitigation + compensation)
        return jax.nn.softplus(jax.nn.logsumexp(others, axis=-1) - own(z)[..., 0])


@node
class Lade:
    """The loss of `lade`: a pytree, and callable.

    Attributes:
      counts: [C] training examples per class.
      lam: weight of the squared term inside the regulariser.
      alpha: weight of the regulariser.
    """

    counts: Array
    lam: Scalar
    alpha: Scalar

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example, each with the same regulariser of the whole batch added."""
        z, q, inside = _inputs(logits, labels, where)
        n = _vector("lade: `counts`", self.counts, z)
        prior = n / jnp.maximum(jnp.sum(n), 1)
        own = expected(q, *_cross_entropies(z + jnp.log(prior + PRIOR_EPS)))
        keep = jnp.ones(own.shape, bool) if where is None else as_mask(where, own.shape)
        keep = keep if inside is None else keep & inside
        rows = z.reshape(-1, z.shape[-1]), q.reshape(-1, z.shape[-1]), keep.reshape(-1)
        alpha = jnp.asarray(self.alpha).astype(z.dtype)
        return _finished(own + alpha * self._regulariser(*rows, prior.reshape(-1)), inside, where)

    def _regulariser(self, z: Array, q: Array, keep: Array, prior: Array) -> Array:
        finite = jnp.where(keep[:, None] & ~jnp.isneginf(z), z, 0)
        of_label = jnp.sum(q * finite, axis=0) / (jnp.sum(q, axis=0) + 1e-8)
        counted = jnp.where(keep[:, None], z, -jnp.inf)
        offered = ~jnp.all(jnp.isneginf(counted), axis=0)
        spread = jax.nn.logsumexp(jnp.where(offered[None], counted, 0), axis=0)
        spread -= jnp.log(jnp.maximum(jnp.sum(keep), 1).astype(z.dtype))
        uniform = jnp.asarray(1 / z.shape[-1] + PRIOR_EPS, z.dtype)
        spread += jnp.log(uniform) - jnp.log(prior + PRIOR_EPS)
        lam = jnp.asarray(self.lam).astype(z.dtype)
        bound = of_label - spread - lam * spread**2
        return -jnp.sum(jnp.where(offered, prior * bound, 0))


@node
class Equalization:
    """The loss of `equalization`: a pytree, and callable with a key.

    Attributes:
      counts: [C] training examples per class.
      gamma: probability that a rare class is left out of the softmax.
      threshold: share of the examples below which a class is rare.
    """

    counts: Array
    gamma: Scalar
    threshold: Scalar

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        key: Key,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example; as `SoftmaxLoss`, and `key` a typed PRNG key, new each step."""
        z, q, inside = _inputs(logits, labels, where)
        n = _vector("equalization: `counts`", self.counts, z)
        rare = n < jnp.asarray(self.threshold).astype(z.dtype) * jnp.sum(n)
        gamma = jnp.asarray(self.gamma).astype(z.dtype)
        left_out = rare & jax.random.bernoulli(key, gamma, z.shape)
        distance, offered = gaps(z, left_out)
        return _finished(expected(q, jax.nn.softplus(distance), offered), inside, where)


@node
class InfluenceBalanced:
    """The loss of `influence_balanced`: a pytree, and callable with features.

    Attributes:
      weights: [C] weight of each class, or None.
      alpha: scale of the loss.
      focal_gamma: exponent of the focal factor; 0 is none.
      eps: added to the influence.
    """

    weights: Array | None
    alpha: Scalar
    focal_gamma: Scalar
    eps: float = static()

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        features: Float[Array, "*batch D"],
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example; as `SoftmaxLoss`, and `features` [..., D] the head's input."""
        z, q, inside = _inputs(logits, labels, where)
        h = jnp.asarray(features).astype(z.dtype)
        h = same_shape("features", h, (*z.shape[:-1], h.shape[-1]))
        if where is not None:
            h = jnp.where(as_mask(where, z.shape[:-1])[..., None], h, 0)
        gap, offered = gaps(z)
        # ||p - onehot||_1 = 2 (1 - p_c), and 1 - p_c = sigmoid(gap) without cancellation.
        influence = 2 * jax.nn.sigmoid(gap) * jnp.sum(jnp.abs(h), axis=-1, keepdims=True)
        alpha, gamma = (jnp.asarray(x).astype(z.dtype) for x in (self.alpha, self.focal_gamma))
        each = jax.nn.softplus(gap) * jnp.exp(-gamma * jax.nn.softplus(-gap))
        each *= alpha / (influence + self.eps)
        if self.weights is not None:
            each *= _vector("influence_balanced: `weights`", self.weights, z)
        return _finished(expected(q, each, offered), inside, where)


def _inputs(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array, Array | None]:
    """The logits, the labels as probabilities, and which integer labels are classes at all."""
    z = floating(jnp.asarray(logits))
    z = jnp.where(jnp.isposinf(z), jnp.nan, z)  # certain of a class, and beyond correction
    labels = jnp.asarray(labels)
    where = None if where is None else as_mask(where, z.shape[:-1])
    if hard := _are_hard(labels, z):
        check_labels(labels, z.shape[-1], where)
        q = is_label(class_indices(labels), z)
    else:
        q = labels
    inside = jnp.any(q, axis=-1) if hard else None
    if where is not None:  # before the arithmetic: 0 times the gradient of a NaN is a NaN
        keep = where[..., None]
        z, q = jnp.where(keep, z, 0), jnp.where(keep, q, jnp.zeros((), q.dtype))
    return z, q.astype(z.dtype), inside


def _finished(loss: Array, inside: Array | None, where: Array | None) -> Array:
    if inside is not None:
        loss = jnp.where(inside, loss, 0)
    return loss if where is None else jnp.where(jnp.asarray(where), loss, 0)


def _cross_entropies(z: Array) -> tuple[Array, Array]:
    """-log softmax(z)_c for every c, exact where p_c rounds to 1, and where a class is offered."""
    distance, offered = gaps(z)
    return jax.nn.softplus(distance), offered


def _vector(name: str, values: Array, z: Array) -> Array:
    """[C] values in the dtype of the logits, with a leading axis for each of theirs."""
    if values.shape != z.shape[-1:]:
        raise ValueError(
            f"longtail.{name} has shape {values.shape} where the logits have {z.shape[-1]} "
            "classes: pass one number per class"
        )
    return rows(values.astype(z.dtype), z)
