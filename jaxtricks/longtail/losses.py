"""Losses that are no logit transform: smoothing, seesaw, LADE, equalization, influence balance."""

from typing import Literal

import jax.numpy as jnp

from jaxtricks._arguments import checked
from jaxtricks._typing import Scalar
from jaxtricks.longtail._counts import Counts, as_vector, at_least_rarest
from jaxtricks.longtail._losses import (
    Equalization,
    InfluenceBalanced,
    LabelAwareSmoothing,
    Lade,
    Seesaw,
)

Shape = Literal["concave", "linear", "convex", "exp"]


@checked
def label_aware_smoothing(
    counts: Counts,
    head: Scalar = 0.4,
    tail: Scalar = 0.1,
    shape: Shape = "concave",
    power: Scalar = 1.0,
) -> LabelAwareSmoothing:
    """Label smoothing by class of the label: (1 - e_y)(-log p_y) + e_y mean_c(-log p_c).

    e rises from tail to head with r = (n - n_min) / (n_max - n_min): concave tail + (head - tail)
    sin(pi r / 2), linear r, convex 1 - cos(pi r / 2), exp r^power. For the second stage of a
    decoupled training. A class without examples is smoothed like the rarest one; with balanced
    counts every class is, by `tail` (the reference divides 0 by 0 there).

    Args:
      counts: [C] training examples per class; may be traced.
      head: smoothing of the most frequent class, in [0, 1].
      tail: smoothing of the rarest class, in [0, 1].
      shape: "concave", "linear", "convex" or "exp".
      power: exponent of "exp", > 0.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...]. A class of
      logit -inf has no part in the mean.

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
        rise = jnp.where(r > 0, jnp.exp(exponent * jnp.log(jnp.where(r > 0, r, 1))), 0)
    else:
        raise ValueError(
            f'longtail.label_aware_smoothing: `shape` is {shape!r}: pass "concave", "linear", '
            '"convex" or "exp"'
        )
    low, high = (jnp.asarray(x).astype(n.dtype) for x in (tail, head))
    return LabelAwareSmoothing(low + (high - low) * rise)


@checked
def seesaw(counts: Counts, p: Scalar = 0.8, q: Scalar = 2.0) -> Seesaw:
    """Seesaw loss: -log(e^z_y / (e^z_y + sum_{j != y} S_yj e^z_j)).

    S_yj = min(1, n_j / n_y)^p max(1, s_j / max(s_y, 0.01))^q with s = softmax(z), held constant.
    The first factor spares rare classes, the second one takes that back where they win wrongly.
    Counts below 1 are taken as 1. With balanced counts only the second factor is left.

    Args:
      counts: [C] training examples per class, or those seen so far; may be traced.
      p: exponent of the mitigation factor; 0 is none. May be traced.
      q: exponent of the compensation factor; 0 is none. May be traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...]. Soft labels
      need O(C^2) memory per example, hard ones O(C).

    >>> seesaw([90, 10])(jnp.zeros((2, 2)), jnp.array([0, 1])).round(4)
    Array([0.1591, 0.6931], dtype=float32)

    References:
      Wang et al., Seesaw loss for long-tailed instance segmentation, arXiv 2008.10032.
    """
    return Seesaw(as_vector("seesaw: `counts`", counts), p, q)


@checked
def lade(counts: Counts, lam: Scalar = 0.01, alpha: Scalar = 0.1) -> Lade:
    """LADE: CE(z + log(pi + 1e-9)) + alpha R, R a regulariser of the whole batch.

    R = -sum_c pi_c (E_c - S_c - lam S_c^2), E_c the mean of z_c over the examples of class c,
    S_c = log mean_i exp z_ic - log(pi_c + 1e-9) + log(1/C + 1e-9). It drives the logits to a
    log-likelihood ratio, so that any test prior can be added: `posthoc.shift_prior`.

    Args:
      counts: [C] training examples per class; may be traced. A class without any has no part in R.
      lam: weight of the squared term; 0.01 on CIFAR, 0.5 on ImageNet-LT. May be traced.
      alpha: weight of R; 0.1 on CIFAR, 0.05 on ImageNet-LT. May be traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...]. Every
      example holds all of R, so their mean is the loss of the paper; R is over all leading axes
      and the examples that are not masked. Under vmap each slice has its own.

    >>> lade([1, 1], alpha=0.0)(jnp.zeros((1, 2)), jnp.array([0])).round(4)
    Array([0.6931], dtype=float32)

    References:
      Hong et al., Disentangling label distribution for long-tailed visual recognition,
      arXiv 2012.00321.
    """
    return Lade(as_vector("lade: `counts`", counts), lam, alpha)


@checked
def equalization(counts: Counts, gamma: Scalar = 0.9, threshold: Scalar = 4.3e-4) -> Equalization:
    """Softmax equalization: -log(e^z_y / sum_j w_j e^z_j), w_j = 1 - b_j [pi_j < threshold][j != y].

    b ~ Bernoulli(gamma) for every example and class: rare classes are mostly spared from being
    pushed down by the others. An example whose other classes are all left out costs 0.

    Args:
      counts: [C] training examples per class; may be traced.
      gamma: probability to leave a rare class out; 0 is plain cross entropy. May be traced.
      threshold: share of the examples below which a class is rare; 4.3e-4 on ImageNet-LT, 0.005 on
        CIFAR-LT.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], key=, where=None) -> per-example [...].

    >>> import jax
    >>> loss = equalization([90, 10], gamma=1.0, threshold=0.2)
    >>> loss(jnp.zeros((2, 2)), jnp.array([0, 1]), key=jax.random.key(0)).round(4)
    Array([0.    , 0.6931], dtype=float32)

    References:
      Tan et al., Equalization loss for long-tailed object recognition, arXiv 2003.05176.
    """
    return Equalization(as_vector("equalization: `counts`", counts), gamma, threshold)


@checked
def influence_balanced(
    weights: Counts | None = None,
    *,
    alpha: Scalar = 1000.0,
    focal_gamma: Scalar = 0.0,
    eps: float = 1e-3,
) -> InfluenceBalanced:
    """Influence-balanced loss: w_y (1 - p_y)^focal_gamma (-log p_y) alpha / (||p - y||_1 ||h||_1 + eps).

    h is the input of the last layer. The divisor is differentiated like the rest. Train with plain
    cross entropy first (half of the run in the paper): it is a loss for the second phase.

    Args:
      weights: [C] class weights, for example `weights.inverse_frequency(counts)`, or None.
      alpha: scale of the loss. May be traced.
      focal_gamma: exponent of the focal factor; 0 is none. Class weights do not bend p_y.
      eps: bounds the factor of an example that is learned already, at alpha / eps.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], features= [..., D], where=None) ->
      per-example [...]. It can be differentiated by the features too.

    >>> loss = influence_balanced(alpha=1.0)
    >>> each = loss(jnp.zeros((1, 2)), jnp.array([0]), features=jnp.ones((1, 3)))
    >>> print(f"{each[0]:.3f}")
    0.231

    References:
      Park et al., Influence-balanced loss for imbalanced visual classification, arXiv 2110.02444.
    """
    w = None if weights is None else as_vector("influence_balanced: `weights`", weights)
    return InfluenceBalanced(w, alpha, focal_gamma, eps)
