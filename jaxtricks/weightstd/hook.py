"""The hook that standardizes the kernels of flax's own convolutions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.weightstd.kernel import checked_preset, standardize


@dataclasses.dataclass(frozen=True)
class Hook:
    """A convolution that standardizes its kernel; equal settings are equal, so jit caches hit.

    Attributes:
      gain: see `standardized`.
      preset: see `standardized`.
      eps: see `standardized`.
    """

    gain: float | None
    preset: str
    eps: float | None

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: Any,
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        **kwargs: Any,
    ) -> Array:
        """`lax.conv_general_dilated` of the standardized kernel."""
        numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        out_axis = numbers.rhs_spec[0]
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(self.kernel(rhs, out_axis))
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, numbers, **kwargs
        )

    def kernel(self, kernel: Array, out_axis: int = -1) -> Array:
        """What the convolution uses in place of `kernel`."""
        return standardize(kernel, self.gain, preset=self.preset, eps=self.eps, out_axis=out_axis)


@checked
def standardized(
    *, gain: float | None = None, preset: str = "nfnet", eps: float | None = None
) -> Hook:
    """A `conv_general_dilated=` argument for flax convolutions that standardizes their kernels.

    Args:
      gain: one fixed factor (an activation's gain, say); for learnable gains use `jt.nnx.WSConv`.
      preset: see `standardize`.
      eps: see `standardize`.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`; it finds the output axis from the
      dimension numbers.

    Raises:
      ValueError: unknown preset.

    Example:
      >>> numbers = ("NHWC", "HWIO", "NHWC")
      >>> conv, x, w = standardized(), jnp.ones((1, 4, 4, 2)), jnp.arange(54.0).reshape(3, 3, 2, 3)
      >>> conv(x, w, (1, 1), "VALID", dimension_numbers=numbers).shape
      (1, 2, 2, 3)
    """
    checked_preset(preset, eps)
    return Hook(gain, preset, eps)
