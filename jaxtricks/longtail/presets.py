"""The losses of the literature, each one line of the algebra."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail import weights as class_weights
from jaxtricks.longtail._counts import Counts, as_vector, at_least_rarest
from jaxtricks.longtail._softmax import (
    SoftmaxLoss,
    add_log_prior,
    margin,
    scale,
    softmax_loss,
    temper,
)
from jaxtricks.longtail.kernels import check_normed


@checked
def cross_entropy() -> SoftmaxLoss:
    """Plain softmax cross entropy: -log softmax(z)_y.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].

    >>> cross_entropy()(jnp.zeros((1, 2)), jnp.array([0])).round(4)
    Array([0.6931], dtype=float32)
    """
    return softmax_loss()


@checked
def weighted(weights: Counts) -> SoftmaxLoss:
    """Cross entropy times the weight of the label's class: -w_y log softmax(z)_y.

    Args:
      weights: [C] class weights, for example `weights.inverse_frequency(counts)`.

    Returns:
      A per-example loss; divide by N or by sum w_y with `reduce`: the peers disagree.

    The weights may be learned, as in Meta-Weight-Net: differentiate the loss on a small balanced
    set through one step of the optimizer. Here it wants less of the head and more of the tail.

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
    """Softmax focal loss: -w_y (1 - p_y)^gamma log p_y.

    Args:
      gamma: exponent, >= 0; 1 and 2 are common. Its gradient is finite for gamma < 1 too.
      weights: [C] class weights, or None. They scale the loss only, and do not bend p_y.

    Returns:
      A per-example loss.

    References:
      Lin et al., Focal loss for dense object detection, arXiv 1708.02002, equation 5.
    """
    return softmax_loss(weights=weights, focal_gamma=gamma)


@checked
def class_balanced(counts: Counts, beta: Scalar = 0.9999) -> SoftmaxLoss:
    """Cross entropy weighted by the inverse effective number of examples, (1-beta)/(1-beta^n).

    Args:
      counts: [C] training examples per class; may be traced.
      beta: in [0, 1); 0 is plain cross entropy, -> 1 is inverse frequency.

    Returns:
      A per-example loss; its weights sum to C.

    References:
      Cui et al., Class-balanced loss based on effective number of samples, arXiv 1901.05555.
    """
    return softmax_loss(weights=class_weights.effective_number(counts, beta))


@checked
def ldam(counts: Counts, max_margin: Scalar = 0.5, s: Scalar = 30.0) -> SoftmaxLoss:
    """Label-distribution-aware margin: CE(s (z - m_y e_y)), m_c = max_margin (n_min/n_c)^(1/4).

    The logits must be cosines in [-1, 1] (a head with normalised rows and no bias): on plain logits
    s = 30 is far too large, and eager calls with s > 1 warn. Inside jit they do not, since a callback
    would keep the step from `remat.plan` and from JAX's cache of compiled programs: call
    `heads.check_normed` on the logits there, for as long as you want to be warned.

    For its deferred re-weighting compose it: `softmax_loss(margin(m), scale(30.), weights=w)`.

    Args:
      counts: [C] training examples per class; may be traced.
      max_margin: margin of the rarest class, in units of a cosine.
      s: inverse temperature.

    Returns:
      A per-example loss.

    References:
      Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss,
      arXiv 1906.07413, equations 11-13.
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
    """Balanced softmax: CE(z + log n), which is `logit_adjusted` at tau = 1.

    Train with it and predict with the raw logits: adjusting them again with `posthoc.adjust` would
    count the prior twice.

    Args:
      counts: [C] training examples per class; may be traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].

    >>> loss = balanced_softmax([90, 10])
    >>> loss(jnp.zeros((2, 2)), jnp.array([0, 1])).round(4)
    Array([0.1054, 2.3026], dtype=float32)

    References:
      Ren et al., Balanced meta-softmax for long-tailed visual recognition, arXiv 2007.10740.
    """
    return softmax_loss(add_log_prior(counts, 1.0))


@checked
def logit_adjusted(counts: Counts, tau: Scalar = 1.0) -> SoftmaxLoss:
    """Logit-adjusted cross entropy: CE(z + tau log pi), pi = n / sum n.

    Train with it and predict with the raw logits; the test-time twin is `posthoc.adjust`, never
    together with this one.

    Args:
      counts: [C] training examples per class; may be traced.
      tau: strength; 0 is plain cross entropy. May be traced, differentiated and vmapped.

    Returns:
      A per-example loss.

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation 10.
    """
    return softmax_loss(add_log_prior(counts, tau))


@checked
def vs(counts: Counts, gamma: Scalar = 0.3, tau: Scalar = 1.0) -> SoftmaxLoss:
    """Vector scaling: CE(z / Delta + tau log pi), Delta_c = (n_max / n_c)^gamma.

    Args:
      counts: [C] training examples per class; may be traced.
      gamma: strength of the multiplicative part; 0 leaves `logit_adjusted`.
      tau: strength of the additive part; 0 leaves `cdt`.

    Returns:
      A per-example loss.

    References:
      Kini et al., Label-imbalanced and group-sensitive classification under overparameterization,
      arXiv 2103.01550.
    """
    return softmax_loss(temper(counts, gamma), add_log_prior(counts, tau))


@checked
def cdt(counts: Counts, gamma: Scalar) -> SoftmaxLoss:
    """Class-dependent temperatures: CE(z / Delta), Delta_c = (n_max / n_c)^gamma.

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
    """A loss that warns where what it is given cannot be cosines."""

    def __call__(self, logits: Array, labels: Array, *, where: Any = None) -> Array:
        loss = super().__call__(logits, labels, where=where)
        if not any(isinstance(a, jax.core.Tracer) for a in (logits, where)):
            check_normed(logits, where)
        return loss
