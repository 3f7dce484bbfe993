"""What classifier heads do to their kernels, and a check of what they give; reached as `heads.*`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import as_mask, floating


@checked
def tau_normalize(kernel: Float[Array, "D C"], tau: Scalar) -> Float[Array, "D C"]:
    """Divide each class's weights by a power of their norm: w_c / ||w_c||^tau.

    For a trained kernel, whose norms follow the class counts. Choose tau in [0, 2] on held-out data
    by balanced accuracy; the reference drops the bias.

    Args:
      kernel: [D, C], a column per class; a zero column stays zero.
      tau: 0 changes nothing, 1 makes unit columns. May be traced, differentiated and vmapped.

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
def max_norm_radius(kernel: Float[Array, "D C"], threshold: Scalar = 0.1) -> Float[Array, ""]:
    """The radius for `max_norm`: r = min_c ||w_c|| + threshold (max_c ||w_c|| - min_c ||w_c||).

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
    low, high = jnp.min(norms), jnp.max(norms)
    return low + jnp.asarray(threshold).astype(norms.dtype) * (high - low)


@checked
def max_norm(kernel: Float[Array, "D C"], radius: Scalar) -> Float[Array, "D C"]:
    """Project each class's weights into a ball: w_c min(1, radius / ||w_c||). After every update.

    Args:
      kernel: [D, C], a column per class.
      radius: of the ball, in units of the weights. May be traced.

    Returns:
      [D, C] in float32 or wider.

    >>> max_norm(jnp.array([[3.0, 0.5]]), 1.0)
    Array([[1. , 0.5]], dtype=float32)

    References:
      Alshammari et al., Long-tailed recognition via weight balancing, arXiv 2203.14197, equation 4.
    """
    w = floating(jnp.asarray(kernel))
    norms, radius = norm(w, axis=0), jnp.asarray(radius).astype(w.dtype)
    outside = norms > radius
    return w * jnp.where(outside, radius / jnp.where(outside, norms, 1), 1)


@checked
def check_normed(
    logits: Float[Array, "*batch C"], where: Bool[Array, "*batch"] | None = None
) -> None:
    """Warn where logits cannot be cosines, which `ldam` needs: max |z| > 1.

    LDAM multiplies its logits by s = 30. On those of a plain linear layer that saturates the softmax,
    the loss jumps and the weights soon are NaN. A loss sees arrays, not layers: so `ldam` checks what it
    is given eagerly, and a jitted step can call this. There the check is a callback on the host
    (jax.debug.callback), in every step in which a logit is out of range.

    Args:
      logits: [..., C] as they go into the loss.
      where: [...] booleans; a masked example is not checked.

    Warns:
      UserWarning: if a logit is beyond [-1, 1] by more than bfloat16 rounds, or not a number.

    >>> check_normed(jnp.array([[0.9, -1.0]]))
    """
    if any(isinstance(a, jax.core.Tracer) for a in (logits, where)):
        size = jnp.abs(floating(jnp.asarray(logits)))
        if where is not None:
            size = jnp.where(as_mask(where, size.shape[:-1])[..., None], size, 0)
        outside = jnp.any(~(size <= _ROUNDED_ONE))
        # XLA's maximum on CPU passes over a NaN.
        largest = jnp.where(jnp.isnan(jnp.sum(size)), jnp.nan, jnp.max(size, initial=0))
        jax.lax.cond(outside, lambda x: jax.debug.callback(_warn, x), lambda x: None, largest)
        return
    z = np.asarray(logits, np.float64)
    if where is not None:
        z = z[np.asarray(as_mask(where, z.shape[:-1]))]
    largest = np.max(np.abs(z), initial=0.0)
    if not largest <= _ROUNDED_ONE:
        _warn(largest)


_ROUNDED_ONE = 1.01
"""What a cosine may be in bfloat16."""


def _warn(largest: Any) -> None:
    warnings.warn(
        f"longtail.ldam: the largest |logit| is {float(largest):.3g}, so these are not cosines and "
        "s = 30 would blow them up: end the model in a normalised head without bias "
        "(longtail.heads.normed, jt.nnx.NormedHead, jt.linen.NormedHead), or pass s=1",
        stacklevel=4,
    )


@checked
def norm(x: Array, axis: int = -1) -> Array:
    """The norm along an axis, kept; its gradient at 0 is 0, not NaN."""
    square = jnp.sum(x**2, axis=axis, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


@checked
def unit(x: Array, axis: int = -1) -> Array:
    """x divided by its norm along an axis; 0 stays 0."""
    length = norm(x, axis)
    return x / jnp.where(length > 0, length, 1)
