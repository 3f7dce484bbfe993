"""Blocks of branches, each a convolution and a normalization: what they share."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import reparam, weightstd
from jaxtricks._types import Array
from jaxtricks.nnx import _compat
from jaxtricks.nnx.conv import WSConv, hashable_padding
from jaxtricks.reparam import geometry

Factory = Callable[..., Any]
Size = tuple[int, int]


class Branch(nnx.Module):
    """A convolution without padding or bias, then a normalization; or a normalization alone.

    Attributes:
      conv: nnx.Conv or WSConv; None for the identity.
      norm: what normalizes its output.
    """

    def __init__(self, conv: Any, norm: Any):
        self.conv = conv
        self.norm = norm

    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """norm(conv(x)); the input is padded already."""
        mode = {} if use_running_average is None else {"use_running_average": use_running_average}
        return self.norm(x if self.conv is None else self.conv(x), **mode)

    def node(self) -> reparam.Sequential | reparam.Norm:
        """The branch with its current statistics."""
        norm = frozen_norm(self.norm)
        if self.conv is None:
            return norm
        kernel, bias = effective_kernel(self.conv)
        return reparam.Sequential(
            reparam.Conv(kernel, bias, groups=self.conv.feature_group_count), norm
        )


class Branched(nnx.Module):
    """A sum of branches that share one window; subclasses make them and list them in `parts`.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: (kh, kw), of the window and of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the window.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.

    Raises:
      ValueError: a kernel size without two axes, or padding that is not zeros.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] | None,
        padding: geometry.Padding,
        kernel_dilation: int | Sequence[int] | None,
        feature_group_count: int,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = two_axes(kernel_size, type(self).__name__)
        self.strides = geometry.per_axis("strides", strides or 1, 2)
        self.padding = hashable_padding(padding)
        self.kernel_dilation = geometry.per_axis("kernel_dilation", kernel_dilation or 1, 2)
        self.feature_group_count = feature_group_count
        # Padding that no branch can derive its own from fails here, not in the first step.
        size = self.kernel_size
        geometry.resolve(self.padding, size, size, self.strides, self.kernel_dilation)

    def convolution(self, conv: Factory, size: Size, rngs: nnx.Rngs) -> Any:
        """A branch's convolution; it expects an input that is padded already."""
        return conv(
            self.in_features,
            self.out_features,
            size,
            strides=self.strides,
            padding="VALID",
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            use_bias=False,
            rngs=rngs,
        )

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of every branch, the one with the largest kernel first."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "..."], use_running_average: bool | None = None
    ) -> Float[Array, "..."]:
        """[..., H, W, in_features] -> [..., H', W', out_features].

        Args:
          x: the input.
          use_running_average: overrides the normalizations' own setting for this call.
        """
        sizes, branches = zip(*self.parts(), strict=True)
        inputs = geometry.branch_inputs(
            x,
            self.kernel_size,
            sizes,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
        )
        outputs = [b(i, use_running_average) for b, i in zip(branches, inputs, strict=True)]
        return functools.reduce(operator.add, outputs)

    def branches(self) -> reparam.Sum:
        """The block as a node of `reparam`, with its current statistics (evaluation mode).

        reparam.apply(block.branches(), x, strides=block.strides, padding=block.padding,
        dilation=block.kernel_dilation) is the block's output.

        Raises:
          ValueError: a normalization without running statistics.
        """
        return reparam.Sum(*(branch.node() for _, branch in self.parts()))

    def fused(self) -> nnx.Conv:
        """A plain nnx.Conv that computes what the block computes in evaluation mode.

        Raises:
          ValueError: a normalization without running statistics.
        """
        merged = reparam.fuse(self.branches(), self.kernel_size)
        (_, first), *_ = self.parts()
        conv: Any = nnx.Conv(
            self.in_features,
            self.out_features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            dtype=getattr(first.conv, "dtype", None),
            param_dtype=merged.kernel.dtype,
            rngs=nnx.Rngs(0),
        )
        conv.kernel[...] = merged.kernel
        conv.bias[...] = jnp.zeros_like(conv.bias[...]) if merged.bias is None else merged.bias
        return conv


def two_axes(kernel_size: int | Sequence[int], name: str = "ACBlock") -> Size:
    """(kh, kw), or an error that names the block."""
    size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(size) != 2:
        raise ValueError(f"{name}: `kernel_size` is {kernel_size}; give (height, width)")
    return size[0], size[1]


def effective_kernel(conv: Any) -> tuple[Array, Array | None]:
    """(kernel, bias) of the plain convolution that a layer computes."""
    bias = _compat.read(conv.bias)
    if isinstance(conv, WSConv):
        return conv.standardized_kernel(), bias
    kernel = conv.kernel[...]
    if getattr(conv, "mask", None) is not None:
        kernel = kernel * conv.mask
    hook = getattr(conv, "conv_general_dilated", jax.lax.conv_general_dilated)
    if isinstance(hook, weightstd.Hook):
        kernel = hook.kernel(kernel)
    elif hook is not jax.lax.conv_general_dilated:
        raise ValueError(
            f"nnx: a {type(conv).__name__} with its own `conv_general_dilated` does not fuse: what it "
            "computes is not known"
        )
    return kernel, bias


def frozen_norm(norm: Any) -> reparam.Norm:
    """The normalization with its running statistics."""
    if not (hasattr(norm, "mean") and hasattr(norm, "var")):
        raise ValueError(
            f"nnx: {type(norm).__name__} has no running statistics and does not fuse; use nnx.BatchNorm "
            "or ExtendedBatchNorm"
        )
    scale, bias = _compat.read(norm.scale), _compat.read(norm.bias)
    return reparam.Norm(norm.mean[...], norm.var[...], scale, bias, norm.epsilon)
