"""Build the losses of the literature: presets of `softmax_loss`, and others."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Key, Scalar
from jaxtricks.longtail import weights as class_weights
from jaxtricks.longtail._counts import (
    Counts,
    as_mask,
    as_vector,
    at_least_rarest,
    check_labels,
    class_indices,
    floating,
    same_shape,
)
from jaxtricks.longtail._softmax import (
    SoftmaxLoss,
    add_log_prior,
    are_hard,
    expected,
    gaps,
    is_label,
    lowest,
    margin,
    rows,
    scale,
    softmax_loss,
    temper,
)
from jaxtricks.longtail.heads import check_normed


@checked
def cross_entropy() -> SoftmaxLoss:
    """Build plain softmax cross entropy.

    -log softmax(z)_y

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].

    >>> cross_entropy()(jnp.zeros((1, 2)), jnp.array([0])).round(4)
    Array([0.6931], dtype=float32)
    """
    return softmax_loss()


@checked
def weighted(weights: Counts) -> SoftmaxLoss:
    """Build cross entropy weighted by the label's class.

    -w_y log softmax(z)_y

    Args:
      weights: [C] class weights, for example `weights.inverse_frequency(counts)`.

    Returns:
      A per-example loss; divide by N or by sum w_y with `reduce_loss`: the peers
      disagree.

    The weights may be learned, as in Meta-Weight-Net: differentiate the loss on a small
    balanced set through one step of the optimizer. Here it wants less of the head and
    more of the tail.

    >>> import jax, optax
    >>> tx, y, balanced = optax.sgd(1.0), jnp.array([0, 0, 0, 1]), jnp.array([0, 1])
    >>> def loss(params, weights, y):
    ...     return weighted(weights)(jnp.stack([params] * len(y)), y).mean()
    >>> def meta_loss(weights, params):
    ...     gradients = jax.grad(loss)(params, weights, y)
    ...     updates, _ = tx.update(gradients, tx.init(params), params)
    ...     return loss(optax.apply_updates(params, updates), jnp.ones(2), balanced)
    >>> print(jax.grad(meta_loss)(jnp.ones(2), jnp.zeros(2)).round(2))
    [ 0.09 -0.03]

    References:
      Shu et al., Meta-Weight-Net, arXiv 1902.07379.
    """
    return softmax_loss(weights=weights)


@checked
def focal(gamma: Scalar, weights: Counts | None = None) -> SoftmaxLoss:
    """Build the softmax focal loss.

    -w_y (1 - p_y)^gamma log p_y

    Args:
      gamma: exponent, >= 0; 1 and 2 are common. Its gradient is finite for gamma < 1
        too.
      weights: [C] class weights, or None. They scale the loss only, and do not bend
        p_y.

    Returns:
      A per-example loss.

    References:
      Lin et al., Focal loss for dense object detection, arXiv 1708.02002, equation 5.
    """
    return softmax_loss(weights=weights, focal_gamma=gamma)


@checked
def class_balanced(counts: Counts, beta: Scalar = 0.9999) -> SoftmaxLoss:
    """Build cross entropy weighted by inverse effective numbers of examples.

    w_c ~ (1 - beta) / (1 - beta^n_c)

    Args:
      counts: [C] training examples per class; may be traced.
      beta: in [0, 1); 0 is plain cross entropy, -> 1 is inverse frequency.

    Returns:
      A per-example loss; its weights sum to C.

    References:
      Cui et al., Class-balanced loss based on effective number of samples, arXiv
      1901.05555.
    """
    return softmax_loss(weights=class_weights.effective_number(counts, beta))


@checked
def ldam(
    counts: Counts, max_margin: Scalar = 0.5, s: Scalar = 30.0
) -> SoftmaxLoss:
    """Build the label-distribution-aware margin loss.

    CE(s (z - m_y e_y)), m_c = max_margin (n_min / n_c)^(1/4)

    The logits must be cosines in [-1, 1] (a head with normalised rows and no bias): on
    plain logits s = 30 is far too large, and eager calls with s > 1 warn. Inside jit
    they do not, since a callback would keep the step from `remat.plan` and from JAX's
    cache of compiled programs: call `heads.check_normed` on the logits there, for as
    long as you want to be warned.

    For its deferred re-weighting compose it: `softmax_loss(margin(m), scale(30.),
    weights=w)`.

    Args:
      counts: [C] training examples per class; may be traced.
      max_margin: margin of the rarest class, in units of a cosine.
      s: inverse temperature.

    Returns:
      A per-example loss.

    References:
      Cao et al., Learning imbalanced datasets with label-distribution-aware margin
      loss, arXiv 1906.07413, equations 11-13.
    """
    n = at_least_rarest(as_vector("ldam: `counts`", counts))
    top = jnp.asarray(max_margin).astype(n.dtype)
    margins = top * jnp.exp((jnp.log(jnp.min(n)) - jnp.log(n)) / 4)
    loss = softmax_loss(margin(margins), scale(s))
    if isinstance(s, jax.core.Tracer) or np.asarray(s) <= 1:
        return loss
    return _OfCosines(loss.transforms, loss.weights, loss.focal_gamma)


@checked
def balanced_softmax(counts: Counts) -> SoftmaxLoss:
    """Build balanced softmax, which is `logit_adjusted` at tau = 1.

    CE(z + log n)

    Train with it and predict with the raw logits: adjusting them again with
    `posthoc.adjust` would count the prior twice.

    Args:
      counts: [C] training examples per class; may be traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].

    >>> loss = balanced_softmax([90, 10])
    >>> loss(jnp.zeros((2, 2)), jnp.array([0, 1])).round(4)
    Array([0.1054, 2.3026], dtype=float32)

    References:
      Ren et al., Balanced meta-softmax for long-tailed visual recognition, arXiv
      2007.10740.
    """
    return softmax_loss(add_log_prior(counts, 1.0))


@checked
def logit_adjusted(counts: Counts, tau: Scalar = 1.0) -> SoftmaxLoss:
    """Build logit-adjusted cross entropy.

    CE(z + tau log pi), pi = n / sum n

    Train with it and predict with the raw logits; the test-time
    counterpart is `posthoc.adjust`, never together with this one.

    Args:
      counts: [C] training examples per class; may be traced.
      tau: strength; 0 is plain cross entropy. May be traced, differentiated and
        vmapped.

    Returns:
      A per-example loss.

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation
      10.
    """
    return softmax_loss(add_log_prior(counts, tau))


@checked
def vs(counts: Counts, gamma: Scalar = 0.3, tau: Scalar = 1.0) -> SoftmaxLoss:
    """Build the vector-scaling loss.

    CE(z / Delta + tau log pi), Delta_c = (n_max / n_c)^gamma

    Args:
      counts: [C] training examples per class; may be traced.
      gamma: strength of the multiplicative part; 0 leaves `logit_adjusted`.
      tau: strength of the additive part; 0 leaves `cdt`.

    Returns:
      A per-example loss.

    References:
      Kini et al., Label-imbalanced and group-sensitive classification under
      overparameterization, arXiv 2103.01550.
    """
    return softmax_loss(temper(counts, gamma), add_log_prior(counts, tau))


@checked
def cdt(counts: Counts, gamma: Scalar) -> SoftmaxLoss:
    """Build the loss with class-dependent temperatures.

    CE(z / Delta), Delta_c = (n_max / n_c)^gamma

    Args:
      counts: [C] training examples per class; may be traced.
      gamma: strength; 0 is plain cross entropy.

    Returns:
      A per-example loss.

    References:
      Ye et al., Identifying and compensating for feature deviation, arXiv 2001.01385.
    """
    return softmax_loss(temper(counts, gamma))


@node
class _OfCosines(SoftmaxLoss):
    """A loss that warns of logits that cannot be cosines."""

    def __call__(
        self, logits: Array, labels: Array, *, where: Any = None
    ) -> Array:
        loss = super().__call__(logits, labels, where=where)
        if not any(isinstance(a, jax.core.Tracer) for a in (logits, where)):
            check_normed(logits, where)
        return loss


# The losses that are not a logit transform, as pytrees: each has a loss per label,
# which a soft label averages.


# Of LADE's log(pi + eps), which also defines a class without examples.
PRIOR_EPS = 1e-9


@node
class LabelAwareSmoothing:
    """The loss of `label_aware_smoothing`: a pytree, and callable.

    Attributes:
      smoothing: [C] share of the label that goes to all classes evenly, by class of the
        label.
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
        """Compute the loss of every example, as `SoftmaxLoss` does."""
        z, q, inside = read_inputs(logits, labels, where)
        e = _vector("label_aware_smoothing: `counts`", self.smoothing, z)
        each, offered = _cross_entropies(z)
        number = jnp.maximum(
            jnp.sum(offered, axis=-1, keepdims=True), 1
        ).astype(z.dtype)
        mean = jnp.sum(jnp.where(offered, each / number, 0), axis=-1)
        loss = (
            expected(q * (1 - e), each, offered)
            + jnp.sum(q * e, axis=-1) * mean
        )
        return finish(loss, inside, where)


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
        """Compute the loss of every example, as `SoftmaxLoss` does."""
        z, target, inside = read_inputs(logits, labels, where)
        # A class without examples counts as one with a single example.
        n = _vector("seesaw: `counts`", jnp.maximum(self.counts, 1), z)
        if inside is not None:
            return finish(self._of_label(z, n, target), inside, where)
        # Soft labels: the loss of every class, weighted by its probability.
        one_hot = jnp.eye(z.shape[-1], dtype=z.dtype)
        each = jax.vmap(
            lambda label: self._of_label(z, n, rows(label, z)), out_axes=-1
        )(one_hot)
        return finish(expected(target, each, ~jnp.isneginf(z)), None, where)

    def _of_label(self, z: Array, n: Array, one_hot: Array) -> Array:
        log_n = jnp.log(n)
        # The scores weigh the loss; no gradient flows through them, as in the paper.
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(z, axis=-1))

        def at_label(x: Array) -> Array:
            return jnp.sum(jnp.where(one_hot > 0, x, 0), axis=-1, keepdims=True)

        p = jnp.asarray(self.p).astype(z.dtype)
        q = jnp.asarray(self.q).astype(z.dtype)
        mitigation = p * jnp.minimum(log_n - at_label(log_n), 0)
        # The reference's floor under the score of the label.
        least = jnp.log(jnp.asarray(0.01, z.dtype))
        compensation = q * jnp.maximum(
            log_p - jnp.maximum(at_label(log_p), least), 0
        )
        others = jnp.where(
            one_hot > 0, lowest(z), z + mitigation + compensation
        )
        return jax.nn.softplus(
            jax.nn.logsumexp(others, axis=-1) - at_label(z)[..., 0]
        )


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
        """Compute the loss of every example plus the regulariser of the batch."""
        z, q, inside = read_inputs(logits, labels, where)
        n = _vector("lade: `counts`", self.counts, z)
        prior = n / jnp.maximum(jnp.sum(n), 1)
        each = expected(q, *_cross_entropies(z + jnp.log(prior + PRIOR_EPS)))
        keep = as_mask(where, each.shape)
        keep = keep if inside is None else keep & inside
        rows = (
            z.reshape(-1, z.shape[-1]),
            q.reshape(-1, z.shape[-1]),
            keep.reshape(-1),
        )
        alpha = jnp.asarray(self.alpha).astype(z.dtype)
        return finish(
            each + alpha * self._regulariser(*rows, prior.reshape(-1)),
            inside,
            where,
        )

    def _regulariser(
        self, z: Array, q: Array, keep: Array, prior: Array
    ) -> Array:
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
        """Compute the loss of every example; `key` is a PRNG key, new in each step."""
        z, q, inside = read_inputs(logits, labels, where)
        n = _vector("equalization: `counts`", self.counts, z)
        rare = n < jnp.asarray(self.threshold).astype(z.dtype) * jnp.sum(n)
        gamma = jnp.asarray(self.gamma).astype(z.dtype)
        left_out = rare & jax.random.bernoulli(key, gamma, z.shape)
        distance, offered = gaps(z, left_out)
        return finish(
            expected(q, jax.nn.softplus(distance), offered), inside, where
        )


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
        """Compute the loss of every example; `features` [..., D] are the head's input."""
        z, q, inside = read_inputs(logits, labels, where)
        h = jnp.asarray(features).astype(z.dtype)
        h = same_shape("features", h, (*z.shape[:-1], h.shape[-1]))
        if where is not None:
            h = jnp.where(as_mask(where, z.shape[:-1])[..., None], h, 0)
        gap, offered = gaps(z)
        # ||p - onehot||_1 = 2 (1 - p_c), and 1 - p_c = sigmoid(gap) without
        # cancellation.
        influence = (
            2
            * jax.nn.sigmoid(gap)
            * jnp.sum(jnp.abs(h), axis=-1, keepdims=True)
        )
        alpha = jnp.asarray(self.alpha).astype(z.dtype)
        gamma = jnp.asarray(self.focal_gamma).astype(z.dtype)
        each = jax.nn.softplus(gap) * jnp.exp(-gamma * jax.nn.softplus(-gap))
        each *= alpha / (influence + self.eps)
        if self.weights is not None:
            each *= _vector("influence_balanced: `weights`", self.weights, z)
        return finish(expected(q, each, offered), inside, where)


def read_inputs(
    logits: Array, labels: Array, where: Array | None
) -> tuple[Array, Array, Array | None]:
    """Return logits, labels as probabilities, and which labels are classes at all."""
    z = floating(jnp.asarray(logits))
    # A logit of +inf is certain of a class, and beyond correction.
    z = jnp.where(jnp.isposinf(z), jnp.nan, z)
    labels = jnp.asarray(labels)
    where = None if where is None else as_mask(where, z.shape[:-1])
    if hard := are_hard(labels, z):
        check_labels(labels, z.shape[-1], where)
        q = is_label(class_indices(labels), z)
    else:
        q = labels
    inside = jnp.any(q, axis=-1) if hard else None
    # Before the arithmetic: 0 times the gradient of a NaN is a NaN.
    if where is not None:
        keep = where[..., None]
        z = jnp.where(keep, z, 0)
        q = jnp.where(keep, q, jnp.zeros((), q.dtype))
    return z, q.astype(z.dtype), inside


def finish(loss: Array, inside: Array | None, where: Array | None) -> Array:
    if inside is not None:
        loss = jnp.where(inside, loss, 0)
    return loss if where is None else jnp.where(jnp.asarray(where), loss, 0)


def _cross_entropies(z: Array) -> tuple[Array, Array]:
    """Return -log softmax(z)_c for every c, and which classes are offered.

    It is exact where p_c rounds to 1.
    """
    distance, offered = gaps(z)
    return jax.nn.softplus(distance), offered


def _vector(name: str, values: Array, z: Array) -> Array:
    """Return [C] values in the logits' dtype, with their leading axes."""
    if values.shape != z.shape[-1:]:
        raise ValueError(
            f"longtail.{name} has shape {values.shape} where the logits have "
            f"{z.shape[-1]} classes: pass one number per class"
        )
    return rows(values.astype(z.dtype), z)


# Their factories.


Shape = Literal["concave", "linear", "convex", "exp"]


@checked
def label_aware_smoothing(
    counts: Counts,
    head: Scalar = 0.4,
    tail: Scalar = 0.1,
    shape: Shape = "concave",
    power: Scalar = 1.0,
) -> LabelAwareSmoothing:
    """Build label smoothing whose strength depends on the class of the label.

    (1 - e_y)(-log p_y) + e_y mean_c(-log p_c)

    e rises from tail to head: e = tail + (head - tail) f(r), with
    r = (n - n_min) / (n_max - n_min) and f by shape:

    concave: sin(pi r / 2)
    linear: r
    convex: 1 - cos(pi r / 2)
    exp: r^power

    For the second stage of a decoupled training. A class without examples is smoothed
    like the rarest one; with balanced counts every class is, by `tail` (the reference
    divides 0 by 0 there).

    Args:
      counts: [C] training examples per class; may be traced.
      head: smoothing of the most frequent class, in [0, 1].
      tail: smoothing of the rarest class, in [0, 1].
      shape: "concave", "linear", "convex" or "exp".
      power: exponent of "exp", > 0.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].
      A class of logit -inf has no part in the mean.

    Raises:
      ValueError: for another shape.

    >>> loss = label_aware_smoothing([90, 10], head=0.3, tail=0.0)
    >>> loss(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])).round(4)
    Array([0.4269, 2.1269], dtype=float32)

    References:
      Zhong et al., Improving calibration for long-tailed recognition, arXiv 2104.00466.
    """
    n = at_least_rarest(as_vector("label_aware_smoothing: `counts`", counts))
    span = jnp.max(n) - jnp.min(n)
    r = (n - jnp.min(n)) / jnp.where(span > 0, span, 1)
    if shape == "concave":
        rise = jnp.sin(jnp.pi / 2 * r)
    elif shape == "linear":
        rise = r
    elif shape == "convex":
        rise = 1 - jnp.cos(jnp.pi / 2 * r)
    elif shape == "exp":
        exponent = jnp.asarray(power).astype(n.dtype)
        rise = jnp.where(
            r > 0, jnp.exp(exponent * jnp.log(jnp.where(r > 0, r, 1))), 0
        )
    else:
        raise ValueError(
            f'longtail.label_aware_smoothing: `shape` is {shape!r}: pass "concave", "linear", '
            '"convex" or "exp"'
        )
    low = jnp.asarray(tail).astype(n.dtype)
    high = jnp.asarray(head).astype(n.dtype)
    return LabelAwareSmoothing(low + (high - low) * rise)


@checked
def seesaw(counts: Counts, p: Scalar = 0.8, q: Scalar = 2.0) -> Seesaw:
    """Build the seesaw loss.

    -log(e^z_y / (e^z_y + sum_{j != y} S_yj e^z_j))

    S_yj = min(1, n_j / n_y)^p max(1, s_j / max(s_y, 0.01))^q with s = softmax(z), held
    constant. The first factor spares rare classes, the second one takes that back where
    they win wrongly. Counts below 1 are taken as 1. With balanced counts only the
    second factor is left.

    Args:
      counts: [C] training examples per class, or those so far; may be traced.
      p: exponent of the mitigation factor; 0 is none. May be traced.
      q: exponent of the compensation factor; 0 is none. May be traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].
      Soft labels need O(C^2) memory per example, hard ones O(C).

    >>> seesaw([90, 10])(jnp.zeros((2, 2)), jnp.array([0, 1])).round(4)
    Array([0.1591, 0.6931], dtype=float32)

    References:
      Wang et al., Seesaw loss for long-tailed instance segmentation, arXiv 2008.10032.
    """
    return Seesaw(as_vector("seesaw: `counts`", counts), p, q)


@checked
def lade(counts: Counts, lam: Scalar = 0.01, alpha: Scalar = 0.1) -> Lade:
    """Build the LADE loss, with a regulariser R of the whole batch.

    CE(z + log(pi + 1e-9)) + alpha R

    R = -sum_c pi_c (E_c - S_c - lam S_c^2), E_c the mean of z_c over the examples of
    class c, S_c = log mean_i exp z_ic - log(pi_c + 1e-9) + log(1/C + 1e-9). It drives
    the logits to a log-likelihood ratio, so that any test prior can be added:
    `posthoc.shift_prior`.

    Args:
      counts: [C] training examples per class; may be traced. A class without any has no
        part in R.
      lam: weight of the squared term; 0.01 on CIFAR, 0.5 on ImageNet-LT. May be traced.
      alpha: weight of R; 0.1 on CIFAR, 0.05 on ImageNet-LT. May be traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].
      Every example holds all of R, so their mean is the loss of the paper; R is over
      all leading axes and the examples that are not masked. Under vmap each slice has
      its own.

    >>> lade([1, 1], alpha=0.0)(jnp.zeros((1, 2)), jnp.array([0])).round(4)
    Array([0.6931], dtype=float32)

    References:
      Hong et al., Disentangling label distribution for long-tailed visual recognition,
      arXiv 2012.00321.
    """
    return Lade(as_vector("lade: `counts`", counts), lam, alpha)


@checked
def equalization(
    counts: Counts, gamma: Scalar = 0.9, threshold: Scalar = 4.3e-4
) -> Equalization:
    """Build the softmax equalization loss.

    -log(e^z_y / sum_j w_j e^z_j), w_j = 1 - b_j [pi_j < threshold][j != y]

    b ~ Bernoulli(gamma) for every example and class: rare classes are mostly spared
    from being pushed down by the others. An example whose other classes are all left
    out costs 0.

    Args:
      counts: [C] training examples per class; may be traced.
      gamma: probability to leave a rare class out; 0 is plain cross entropy. May be
        traced.
      threshold: share of the examples below which a class is rare; 4.3e-4 on
        ImageNet-LT, 0.005 on CIFAR-LT.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], key=, where=None) -> per-example
      [...].

    >>> import jax
    >>> loss = equalization([90, 10], gamma=1.0, threshold=0.2)
    >>> loss(jnp.zeros((2, 2)), jnp.array([0, 1]), key=jax.random.key(0)).round(4)
    Array([0.    , 0.6931], dtype=float32)

    References:
      Tan et al., Equalization loss for long-tailed object recognition, arXiv
      2003.05176.
    """
    return Equalization(
        as_vector("equalization: `counts`", counts), gamma, threshold
    )


@checked
def influence_balanced(
    weights: Counts | None = None,
    *,
    alpha: Scalar = 1000.0,
    focal_gamma: Scalar = 0.0,
    eps: float = 1e-3,
) -> InfluenceBalanced:
    """Build the influence-balanced loss.

    w_y (1 - p_y)^focal_gamma (-log p_y) alpha / (||p - y||_1 ||h||_1 + eps)

    h is the input of the last layer. The divisor is differentiated like the rest. Train
    with plain cross entropy first (half of the run in the paper): it is a loss for the
    second phase.

    Args:
      weights: [C] class weights, for example `weights.inverse_frequency(counts)`, or
        None.
      alpha: scale of the loss. May be traced.
      focal_gamma: exponent of the focal factor; 0 is none. Class weights do not bend
        p_y.
      eps: bounds the factor of an example that is learned already, at alpha / eps.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], features= [..., D], where=None) ->
      per-example [...]. It can be differentiated by the features too.

    >>> loss = influence_balanced(alpha=1.0)
    >>> each = loss(jnp.zeros((1, 2)), jnp.array([0]), features=jnp.ones((1, 3)))
    >>> print(f"{each[0]:.3f}")
    0.231

    References:
      Park et al., Influence-balanced loss for imbalanced visual classification, arXiv
      2110.02444.
    """
    w = (
        None
        if weights is None
        else as_vector("influence_balanced: `weights`", weights)
    )
    return InfluenceBalanced(w, alpha, focal_gamma, eps)
