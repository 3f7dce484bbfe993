"""Propagate unit variance through networks without normalization."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxtricks import _compat
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Key, Scalar


@dataclasses.dataclass(frozen=True)
class ScaledActivation:
    """Multiply an activation by a constant; hashable, so that jit caches hit.

    Attributes:
      fn: the activation.
      gain: the constant.
    """

    fn: Callable[[Any], Any]
    gain: float

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return fn(x) * gain, in the dtype of fn(x)."""
        return self.fn(x) * self.gain


@checked
def scaled_activation(fn: Callable[[Any], Any]) -> ScaledActivation:
    """Scale an activation so that standard normal inputs give outputs of variance one.

    gain = 1 / sqrt(Var[fn(z)]), z ~ N(0, 1); relu: sqrt(2 / (1 - 1/pi)) = 1.71285855...

    A kernel standardized by the "nfnet" or "timm" preset preserves variance, so every
    layer then passes on the variance that it receives.

    Args:
      fn: elementwise, of JAX arrays: jax.nn.relu, jax.nn.silu, a lambda. It is
        evaluated once, here, in float64; the variance is an integral over the normal
        density, not a sample.

    Returns:
      A function x -> fn(x) * gain that keeps x's dtype; its attribute `gain` is the
      number.

    Raises:
      ValueError: fn is constant, not finite, or not elementwise.

    Example:
      >>> relu = scaled_activation(jax.nn.relu)
      >>> round(relu.gain, 6), relu(jnp.ones(2, jnp.bfloat16)).dtype.name
      (1.712859, 'bfloat16')

    References:
      Brock, De, Smith, "Characterizing signal propagation", arXiv 2101.08692, section
      4.1.
    """
    z, density = _normal_quadrature()
    # Evaluate in float64 at once, whatever the caller's settings and transformations.
    # jit is needed because custom_jvp functions would otherwise be traced there.
    with jax.ensure_compile_time_eval(), _compat.enable_x64():
        y = np.asarray(jax.jit(fn)(jnp.asarray(z)), np.float64)
    if y.shape != z.shape:
        raise ValueError(
            f"weightstd.scaled_activation: fn turns shape {z.shape} into "
            f"{y.shape}; give an elementwise one"
        )
    variance = float(np.sum(density * np.square(y - np.sum(density * y))))
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(
            "weightstd.scaled_activation: the variance of fn's output is "
            f"{variance} for normal inputs; give an activation that is finite "
            "and not constant"
        )
    return ScaledActivation(fn, 1 / math.sqrt(variance))


def _normal_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes [n] and weights [n] of integrals against the normal density.

    Gauss-Legendre on panels of width 1/32; the weights sum to 1. Activations have kinks
    and jumps at 0, 1, 3 or 6, which are panel ends, so that each panel sees a smooth
    function; Gauss-Hermite would not converge there. A kink inside a panel costs 1e-7.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    width = 1 / 32
    panels = np.arange(-12, 12, width)  # the density at 12 is 2e-32
    z = (panels[:, None] + width * (nodes + 1) / 2).ravel()
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    return z, density * np.tile(weights * width / 2, len(panels))


class ResidualScale(NamedTuple):
    """Scales of one residual block y = shortcut + alpha * branch(beta * act(x)).

    Attributes:
      alpha: of the branch's output.
      beta: of the branch's input; 1 / sqrt(variance that x is expected to have).
    """

    alpha: float
    beta: float


@checked
def residual_scales(
    depths: Sequence[int], alpha: float = 0.2
) -> list[tuple[ResidualScale, ...]]:
    """Compute alpha and beta of every block of a normalizer-free residual network.

    The first block of a stage is its transition: its shortcut is a convolution of
    beta * act(x), so that the variance after it is 1 + alpha^2 whatever came before.
    Every other block adds alpha^2:

        variance = 1
        block i of a stage: beta = 1 / sqrt(variance)
                            variance = (1 if i == 0 else variance) + alpha^2

    The transition block itself is scaled by the variance that it receives.

    Args:
      depths: blocks of each stage.
      alpha: scale of every branch.

    Returns:
      For each stage, a tuple of ResidualScale(alpha, beta).

    Raises:
      ValueError: a negative depth.

    Example:
      >>> [[round(scale.beta, 4) for scale in stage] for stage in residual_scales((2, 2))]
      [[1.0, 0.9806], [0.9623, 0.9806]]

    References:
      Brock, De, Smith, Simonyan, arXiv 2102.06171, section 2.
    """
    if min(depths, default=0) < 0:
        raise ValueError(
            f"weightstd.residual_scales: `depths` is {depths}; give the number "
            "of blocks per stage"
        )
    variance = 1.0
    stages = []
    for depth in depths:
        blocks = []
        for i in range(depth):
            blocks.append(ResidualScale(alpha, 1 / math.sqrt(variance)))
            # The transition's shortcut is normalized, so its variance starts again.
            variance = (1.0 if i == 0 else variance) + alpha * alpha
        stages.append(tuple(blocks))
    return stages


@checked
def stochastic_depth(
    key: Key, x: Float[Array, "N ..."], rate: Scalar
) -> Float[Array, "N ..."]:
    """Drop whole examples of a residual branch in training: y = shortcut + result.

    result_n = x_n with probability 1 - rate, else 0, independently for every example.

    The result is not divided by 1 - rate, as in DeepMind's nfnets: evaluation adds x as
    it is, which is then not the mean of training. For that mean (timm's DropPath) pass
    x / (1 - rate).

    Args:
      key: PRNG key of this call and layer.
      x: the branch [N, ...].
      rate: probability of dropping, in [0, 1]; may be traced. Networks raise it
        linearly with depth.

    Returns:
      An array like x.

    Raises:
      ValueError: a rate outside [0, 1] (where it is a Python number).

    Example:
      >>> stochastic_depth(jax.random.key(0), jnp.ones((6, 1)), 0.5).ravel().tolist()
      [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]

    References:
      Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth", arXiv
      1603.09382.
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(
            f"weightstd.stochastic_depth: `rate` is {rate}; give one in [0, 1]"
        )
    # One draw per example, broadcast over its other axes.
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(key, 1 - jnp.asarray(rate, jnp.float32), shape)
    return jnp.where(keep, x, jnp.zeros((), x.dtype))
