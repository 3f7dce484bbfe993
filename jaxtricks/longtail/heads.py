"""Compute the logits of classifier heads from features and kernels."""

import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import as_mask, class_indices, floating

__all__ = [
    "Centroids",
    "centroids",
    "cosine",
    "disalign",
    "lws",
    "ncm",
    "normed",
    "tau_normalize",
    "tde",
]


@checked
def tau_normalize(
    kernel: Float[Array, "D C"], tau: Scalar
) -> Float[Array, "D C"]:
    """Divide each class's weights by a power of their norm: w_c / ||w_c||^tau.

    For a trained kernel, whose norms follow the class counts. Choose tau in [0, 2] on
    held-out data by balanced accuracy; the reference drops the bias.

    Args:
      kernel: [D, C], a column per class; a zero column stays zero.
      tau: 0 changes nothing, 1 makes unit columns. May be traced, differentiated and
        vmapped.

    Returns:
      [D, C] in float32 or wider.

    >>> tau_normalize(jnp.array([[4.0, 1.0]]), 0.5).round(4)
    Array([[2., 1.]], dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    w = floating(jnp.asarray(kernel))
    square = jnp.sum(w**2, axis=0, keepdims=True)
    log_norm = jnp.log(jnp.where(square > 0, square, 1)) / 2
    return w * jnp.exp(-jnp.asarray(tau).astype(w.dtype) * log_norm)


@checked
def max_norm_radius(
    kernel: Float[Array, "D C"], threshold: Scalar = 0.1
) -> Float[Array, ""]:
    """Return the radius for `max_norm`.

    r = min_c ||w_c|| + threshold (max_c ||w_c|| - min_c ||w_c||)

    Taken once, from the kernel that training starts with, as the reference does.

    Args:
      kernel: [D, C], a column per class.
      threshold: 0 is the smallest norm, 1 the largest. May be traced.

    Returns:
      [] radius in float32 or wider.

    References:
      Alshammari et al., Long-tailed recognition via weight balancing, arXiv 2203.14197.
    """
    norms = norm(floating(jnp.asarray(kernel)), axis=0)
    low = jnp.min(norms)
    high = jnp.max(norms)
    return low + jnp.asarray(threshold).astype(norms.dtype) * (high - low)


@checked
def max_norm(
    kernel: Float[Array, "D C"], radius: Scalar
) -> Float[Array, "D C"]:
    """Project each class's weights into a ball, after every update.

    w_c min(1, radius / ||w_c||)

    Args:
      kernel: [D, C], a column per class.
      radius: of the ball, in units of the weights. May be traced.

    Returns:
      [D, C] in float32 or wider.

    >>> max_norm(jnp.array([[3.0, 0.5]]), 1.0)
    Array([[1. , 0.5]], dtype=float32)

    References:
      Alshammari et al., Long-tailed recognition via weight balancing, arXiv 2203.14197,
      equation 4.
    """
    w = floating(jnp.asarray(kernel))
    norms = norm(w, axis=0)
    radius = jnp.asarray(radius).astype(w.dtype)
    outside = norms > radius
    return w * jnp.where(outside, radius / jnp.where(outside, norms, 1), 1)


@checked
def check_normed(
    logits: Float[Array, "*batch C"], where: Bool[Array, "*batch"] | None = None
) -> None:
    """Warn where logits cannot be cosines, which `ldam` needs: max |z| > 1.

    LDAM multiplies its logits by s = 30. On those of a plain linear layer that
    saturates the softmax, the loss jumps and the weights soon are NaN. A loss sees
    arrays, not layers: so `ldam` checks its arguments eagerly, and a jitted step can
    call this. There the check is a callback on the host (jax.debug.callback), in every
    step in which a logit is out of range.

    Args:
      logits: [..., C] as they go into the loss.
      where: [...] booleans; a masked example is not checked.

    Warns:
      UserWarning: a logit is beyond [-1, 1] by more than bfloat16 rounds, or NaN.

    >>> check_normed(jnp.array([[0.9, -1.0]]))
    """
    if any(isinstance(a, jax.core.Tracer) for a in (logits, where)):
        size = jnp.abs(floating(jnp.asarray(logits)))
        if where is not None:
            size = jnp.where(
                as_mask(where, size.shape[:-1])[..., None], size, 0
            )
        outside = jnp.any(~(size <= _ROUNDED_ONE))
        # XLA's maximum on CPU passes over a NaN.
        largest = jnp.where(
            jnp.isnan(jnp.sum(size)), jnp.nan, jnp.max(size, initial=0)
        )
        jax.lax.cond(
            outside,
            lambda x: jax.debug.callback(_warn, x),
            lambda x: None,
            largest,
        )
        return
    z = np.asarray(logits, np.float64)
    if where is not None:
        z = z[np.asarray(as_mask(where, z.shape[:-1]))]
    largest = np.max(np.abs(z), initial=0.0)
    if not largest <= _ROUNDED_ONE:
        _warn(largest)


_ROUNDED_ONE = 1.01
"""Largest cosine that rounding to bfloat16 may give."""


def _warn(largest: Any) -> None:
    warnings.warn(
        f"longtail.ldam: the largest |logit| is {float(largest):.3g}, so these "
        "are not cosines and s = 30 would blow them up: end the model in a "
        "normalised head without bias (longtail.heads.normed, "
        "jt.nnx.NormedHead, jt.linen.NormedHead), or pass s=1",
        stacklevel=4,
    )


@checked
def norm(x: Array, axis: int = -1) -> Array:
    """Compute the norm along an axis of size 1 after it; its gradient at 0 is 0."""
    square = jnp.sum(x**2, axis=axis, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


@checked
def unit(x: Array, axis: int = -1) -> Array:
    """Divide x by its norm along an axis; 0 stays 0."""
    length = norm(x, axis)
    return x / jnp.where(length > 0, length, 1)


# Classifier heads for long-tailed data, as functions of arrays; a kernel is [D, C], as
# in Flax.


Kind = Literal["un", "l2n", "cl2n"]


@checked
def cosine(
    x: Float[Array, "*batch D"], kernel: Float[Array, "D C"], s: Scalar = 16.0
) -> Float[Array, "*batch C"]:
    """Compute squashed cosine logits: s ||x|| / (1 + ||x||) cos(x, w_c).

    Args:
      x: [..., D] features.
      kernel: [D, C], a column per class; a zero column gives logit 0.
      s: scale of the logits. May be traced.

    Returns:
      [..., C] logits in float32 or wider.

    >>> cosine(jnp.array([[3.0, 4.0]]), jnp.eye(2), s=6.0)
    Array([[3., 4.]], dtype=float32)

    References:
      Liu et al., Large-scale long-tailed recognition in an open world, arXiv
      1904.05160.
    """
    x = floating(jnp.asarray(x))
    squashed = x / (1 + norm(x))
    return jnp.asarray(s).astype(x.dtype) * _product(
        "cosine", squashed, _unit_columns(kernel, x)
    )


@checked
def normed(
    x: Float[Array, "*batch D"], kernel: Float[Array, "D C"], s: Scalar = 1.0
) -> Float[Array, "*batch C"]:
    """Compute cosine logits: s cos(x, w_c).

    Use s = 1 with `ldam`, which has its scale.

    Args:
      x: [..., D] features; a zero row has logits 0.
      kernel: [D, C], a column per class; a zero column gives logit 0.
      s: scale of the logits. May be traced.

    Returns:
      [..., C] logits in float32 or wider; for s = 1 in [-1, 1].

    >>> normed(jnp.array([[2.0, 0.0]]), jnp.eye(2))
    Array([[1., 0.]], dtype=float32)

    References:
      Cao et al., LDAM, arXiv 1906.07413.
    """
    x = floating(jnp.asarray(x))
    cosines = _product("normed", unit(x), _unit_columns(kernel, x))
    return jnp.asarray(s).astype(x.dtype) * cosines


@checked
def lws(
    logits: Float[Array, "*batch C"], scales: Float[Array, "C"]
) -> Float[Array, "*batch C"]:
    """Scale logits per class: f_c z_c.

    Train f alone, from ones, on class-balanced batches.

    Args:
      logits: [..., C] of the frozen head, its bias included.
      scales: [C], the parameters.

    Returns:
      [..., C] logits in float32 or wider.

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    z = floating(jnp.asarray(logits))
    return z * _row("lws: `scales`", scales, z)


@node
class Centroids:
    """Class means for `ncm`; the result of `centroids`.

    Attributes:
      means: [C, D] mean feature of each class, after the normalisation.
      present: [C] classes that have examples.
      center: [D] mean of all features, before it.
      kind: "un", "l2n" or "cl2n".
    """

    means: Array
    present: Array
    center: Array
    kind: Kind = static()


@checked
def centroids(
    features: Float[Array, "N D"],
    labels: Integer[Array, "N"],
    num_classes: int,
    kind: Kind = "cl2n",
    where: Bool[Array, "N"] | None = None,
) -> Centroids:
    """Compute the mean feature of each class, for `ncm`.

    Args:
      features: [N, D] of the training examples.
      labels: [N] integers; an example whose label is not in [0, C) counts in the center
        only.
      num_classes: C; static.
      kind: "un" as they are, "l2n" divided by their norm, "cl2n" centred first (the
        default of the reference).
      where: [N] booleans; a masked example is left out.

    Returns:
      A pytree.

    Raises:
      ValueError: for another kind.

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    if kind not in ("un", "l2n", "cl2n"):
        raise ValueError(
            f'longtail.heads.centroids: `kind` is {kind!r}: pass "un", "l2n" or "cl2n"'
        )
    x = floating(jnp.asarray(features))
    y = class_indices(labels)
    keep = as_mask(where, y.shape)
    # Replace rather than multiply: a masked row may hold NaN.
    x = jnp.where(keep[:, None], x, 0)
    center = jnp.sum(x, axis=0) / jnp.maximum(jnp.sum(keep), 1).astype(x.dtype)
    member = (
        y[:, None] == jnp.arange(num_classes, dtype=jnp.int32)[None]
    ) & keep[:, None]
    total = jnp.sum(member, axis=0)
    # One product sums the features of all classes.
    sums = member.astype(x.dtype).T @ _normalized(x, center, kind)
    return Centroids(
        sums / jnp.maximum(total, 1).astype(x.dtype)[:, None],
        total > 0,
        center,
        kind,
    )


@checked
def ncm(
    x: Float[Array, "*batch D"],
    centroids: Centroids,
    metric: Literal["l2", "dot"] = "l2",
) -> Float[Array, "*batch C"]:
    """Compute nearest-class-mean logits.

    z_c = -||x' - mu_c||^2, or x' . mu_c / D, with x' normalized as the means were

    Args:
      x: [..., D] features.
      centroids: of the function of that name.
      metric: "l2" or "dot".

    Returns:
      [..., C] logits in float32 or wider; -inf for a class without examples.

    Raises:
      ValueError: for another metric.

    >>> features = jnp.array([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]])
    >>> means = centroids(features, jnp.array([0, 0, 1]), 3, "un")
    >>> ncm(jnp.array([1.0, 2.0]), means)
    Array([ -1., -25., -inf], dtype=float32)

    References:
      Kang et al., Decoupling representation and classifier, arXiv 1910.09217.
    """
    if metric not in ("l2", "dot"):
        raise ValueError(
            f'longtail.heads.ncm: `metric` is {metric!r}: pass "l2" or "dot"'
        )
    x = floating(jnp.asarray(x))
    means = centroids.means.astype(x.dtype)
    center = centroids.center.astype(x.dtype)
    x = _normalized(x, center, centroids.kind)
    if metric == "l2":
        z = -jnp.sum(
            (x[..., None, :] - means.reshape((1,) * (x.ndim - 1) + means.shape))
            ** 2,
            -1,
        )
    else:
        z = x @ means.T / x.shape[-1]
    return jnp.where(
        centroids.present.reshape((1,) * (z.ndim - 1) + (-1,)), z, -jnp.inf
    )


@checked
def disalign(
    logits: Float[Array, "*batch C"],
    confidence: Float[Array, "*batch"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
) -> Float[Array, "*batch C"]:
    """Calibrate logits adaptively.

    (1 + sigma a_c) z_c + sigma b_c, sigma = sigmoid(confidence)

    Train a, b and the confidence layer alone, on top of a frozen model. With a = b = 0
    it changes nothing; the reference starts from a = 1, b = 0 and confidence weights
    0.1.

    Args:
      logits: [..., C] of the frozen head.
      confidence: [...] a linear function of the features, x @ v + v0.
      scale: [C], a.
      bias: [C], b.

    Returns:
      [..., C] logits in float32 or wider.

    References:
      Zhang et al., Distribution alignment, arXiv 2103.16370.
    """
    z = floating(jnp.asarray(logits))
    sigma = jax.nn.sigmoid(jnp.asarray(confidence).astype(z.dtype))[..., None]
    a = _row("disalign: `scale`", scale, z)
    b = _row("disalign: `bias`", bias, z)
    return (1 + sigma * a) * z + sigma * b


@checked
def tde(
    x: Float[Array, "*batch D"],
    kernel: Float[Array, "D C"],
    direction: Float[Array, "D"] | None = None,
    *,
    heads: int = 2,
    tau: Scalar = 16.0,
    gamma: Scalar = 1 / 32,
    alpha: Scalar = 3.0,
) -> Float[Array, "*batch C"]:
    """Compute the logits of a de-confounded head.

    tau/K sum_k (x_k/|x_k| - alpha cos(x_k, d_k) d_k/|d_k|) . w_k/(|w_k| + gamma)

    Train without `direction`; at test time pass the running mean of the features,

    m <- mu m + mean(x)

    with the momentum mu of the optimizer: the part of a feature that momentum alone
    explains is then subtracted.

    Args:
      x: [..., D] features, split into K equal parts.
      kernel: [D, C], a column per class, split likewise.
      direction: [D], or None for no subtraction; a zero part subtracts nothing.
      heads: K; static.
      tau: scale of the logits. May be traced.
      gamma: keeps large norms of w from being divided out in full. May be traced.
      alpha: strength of the subtraction; 3 on ImageNet-LT, 1.5 on CIFAR-100-LT. May be
        traced.

    Returns:
      [..., C] logits in float32 or wider.

    Raises:
      ValueError: if D is not a multiple of heads.

    References:
      Tang et al., Long-tailed classification by keeping the good and removing the bad
      momentum causal effect, arXiv 2009.12991.
    """
    x = floating(jnp.asarray(x))
    if heads < 1 or x.shape[-1] % heads:
        raise ValueError(
            f"longtail.heads.tde: `heads` is {heads}, which does not divide "
            f"the {x.shape[-1]} features: pass a divisor"
        )
    tau = jnp.asarray(tau).astype(x.dtype)
    gamma = jnp.asarray(gamma).astype(x.dtype)
    alpha = jnp.asarray(alpha).astype(x.dtype)
    part = unit(x.reshape((*x.shape[:-1], heads, -1)))
    if direction is not None:
        d = unit(jnp.asarray(direction).astype(x.dtype).reshape(heads, -1))
        d = d.reshape((1,) * (x.ndim - 1) + d.shape)
        part = part - alpha * jnp.sum(part * d, axis=-1, keepdims=True) * d
    w = jnp.asarray(kernel).astype(x.dtype)
    w = w.reshape((heads, -1, w.shape[-1]))
    w = w / (norm(w, axis=1) + gamma)
    return (
        tau
        / heads
        * _product("tde", part.reshape(x.shape), w.reshape(kernel.shape))
    )


def _unit_columns(kernel: Array, x: Array) -> Array:
    return unit(jnp.asarray(kernel).astype(x.dtype), axis=0)


def _product(name: str, x: Array, kernel: Array) -> Array:
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"longtail.heads.{name}: `kernel` has {kernel.shape[0]} rows for "
            f"{x.shape[-1]} features: pass [D, C]"
        )
    return x @ kernel


def _row(name: str, values: Array, z: Array) -> Array:
    values = jnp.asarray(values).astype(z.dtype)
    if values.shape != z.shape[-1:]:
        raise ValueError(
            f"longtail.heads.{name} has shape {values.shape} where the logits "
            f"have {z.shape[-1]} classes: pass one number per class"
        )
    return values.reshape((1,) * (z.ndim - 1) + values.shape)


def _normalized(x: Array, center: Array, kind: Kind) -> Array:
    if kind == "un":
        return x
    if kind == "cl2n":
        x = x - center.reshape((1,) * (x.ndim - 1) + center.shape)
    return unit(x)
