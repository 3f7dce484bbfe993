"""One kernel, standardized: the four conventions in circulation."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _integers, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar


class Preset(NamedTuple):
    """One convention: how epsilon enters, whether fan-in does, and how variance is counted.

    Attributes:
      mode: "clamp" = rsqrt(max(var * fan_in, eps)), "var" = 1 / sqrt(var + eps), "std" = 1 / (std + eps).
      eps: the convention's own epsilon.
      by_fan_in: whether the result is also divided by sqrt(fan_in).
      ddof: 1 divides the variance by fan_in - 1 instead of fan_in.
    """

    mode: Literal["clamp", "var", "std"]
    eps: float
    by_fan_in: bool
    ddof: int = 0


PRESETS = {
    "nfnet": Preset("clamp", 1e-4, by_fan_in=True),
    "timm": Preset("var", 1e-6, by_fan_in=True),
    "bit": Preset("std", 1e-5, by_fan_in=False),
    "qiao": Preset("std", 1e-5, by_fan_in=False, ddof=1),
}


@checked
def standardize(
    kernel: Float[Array, "..."],
    gain: Scalar | Float[Array, "..."] | None = None,
    *,
    preset: str = "nfnet",
    eps: float | None = None,
    out_axis: int | Sequence[int] = -1,
) -> Float[Array, "..."]:
    """Kernel with zero mean and fixed variance per output channel.

    w_hat = (w - mean) * s * gain, mean and var over everything but the output axis, N = fan_in:

        nfnet   s = 1 / sqrt(max(var * N, eps))       eps 1e-4, a clamp
        timm    s = 1 / (sqrt(var + eps) * sqrt(N))   eps 1e-6 (ScaledStdConv2d)
        bit     s = 1 / (sqrt(var) + eps)             eps 1e-5
        qiao    s = 1 / (sqrt(var) + eps)             eps 1e-5, var divided by N - 1

    Args:
      kernel: [..., out]; for grouped convolutions the input axis already holds in_features / groups.
      gain: one factor per output channel [out], or a scalar; None = 1.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the preset's epsilon, in the same place of the formula.
      out_axis: the axis (or axes: a Keras depthwise kernel (kh, kw, C, M) has two) that is not reduced.

    Returns:
      An array like the kernel. A channel whose weights are all equal gives zeros, with finite gradients.

    Raises:
      ValueError: unknown preset, a gain of the wrong shape, or a fan-in of one (depthwise 1x1).

    Example:
      >>> w = standardize(jnp.arange(12.0).reshape(2, 2, 1, 3))
      >>> bool(jnp.allclose(w.sum((0, 1, 2)), 0, atol=1e-6)), bool(jnp.allclose((w**2).sum((0, 1, 2)), 1))
      (True, True)

    References:
      Brock, De, Smith, arXiv 2101.08692; Qiao et al., arXiv 1903.10520.
    """
    rule = checked_preset(preset, eps)
    kernel = jnp.asarray(kernel)
    _tree.check_floating("weightstd.standardize: `kernel`", kernel)
    kept = _kept_axes(kernel, out_axis)
    reduced = tuple(i for i in range(kernel.ndim) if i not in kept)
    fan_in = math.prod(kernel.shape[i] for i in reduced)
    if fan_in < 2:
        raise ValueError(
            f"weightstd.standardize: a kernel of shape {tuple(kernel.shape)} has fan-in {fan_in}, which "
            "standardizing would turn to zero; leave it out (a depthwise 1x1 convolution?)"
        )
    w = jnp.asarray(kernel, _tree.wide_dtype(kernel))
    # Relative to one of its own weights a constant channel is exactly zero, and a large mean costs nothing.
    # The result does not depend on that weight, so no gradient needs to flow through it.
    one = tuple(slice(None) if i in kept else slice(1) for i in range(w.ndim))
    w = w - jax.lax.stop_gradient(w[one])
    w = w - jnp.mean(w, axis=reduced, keepdims=True)
    factor = _factor(jnp.sum(w * w, axis=reduced, keepdims=True), fan_in, rule)
    if gain is not None:
        factor = factor * _gain_like(gain, kernel, kept, w.dtype)
    return (w * factor).astype(kernel.dtype)


def checked_preset(name: str, eps: float | None) -> Preset:
    """The preset with this name and its epsilon, or an error that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"weightstd: `preset` is {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name] if eps is None else PRESETS[name]._replace(eps=eps)


def _kept_axes(kernel: Array, out_axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = _integers.listed(out_axis)
    if any(not -kernel.ndim <= i < kernel.ndim for i in axes):
        raise ValueError(
            f"weightstd.standardize: `out_axis` {out_axis} is no axis of a kernel of shape "
            f"{tuple(kernel.shape)}"
        )
    return tuple(sorted(i % kernel.ndim for i in axes))


def _factor(squares: Array, fan_in: int, rule: Preset) -> Array:
    """Scale per output channel from the sum of squared deviations (= var * fan_in)."""
    if rule.mode == "clamp":
        return jax.lax.rsqrt(jnp.maximum(squares, rule.eps))
    var = squares / (fan_in - rule.ddof)
    if rule.mode == "var":
        factor = jax.lax.rsqrt(var + rule.eps)
    else:
        # sqrt has no derivative at 0: a constant channel takes the branch without one.
        positive = var > 0
        std = jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1.0)), 0.0)
        factor = 1 / (std + rule.eps)
    return factor / math.sqrt(fan_in) if rule.by_fan_in else factor


def _gain_like(gain: Any, kernel: Array, kept: tuple[int, ...], dtype: Any) -> Array:
    gain = jnp.asarray(gain, dtype)
    expected = tuple(kernel.shape[i] for i in kept)
    if gain.shape not in ((), expected):
        raise ValueError(
            f"weightstd.standardize: `gain` has shape {gain.shape}; give one factor per output "
            f"channel, {expected}, or a scalar"
        )
    if gain.ndim == 0:
        return gain
    return gain.reshape([n if i in kept else 1 for i, n in enumerate(kernel.shape)])
