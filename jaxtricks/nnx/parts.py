"""What blocks are made of: a branch, what may stand in front of its kernel, and how both become nodes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtricks import _tree, reparam, weightstd
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat
from jaxtricks.nnx._conv import WSConv
from jaxtricks.reparam import geometry
from jaxtricks.reparam._apply import norm_factor

Size = tuple[int, ...]


class Pool(nnx.Module):
    """Mean over windows of an input that is padded already.

    Attributes:
      size: of the window, and so on, one per spatial axis.
    """

    def __init__(self, size: Size, strides: Size, dilation: Size):
        self.size = size
        self.strides = strides
        self.dilation = dilation

    def __call__(self, x: Array) -> Array:
        """[..., *spatial, C] -> [..., *spatial', C]."""
        return average_pool(x, self.size, self.strides, self.dilation)


class First(nnx.Module):
    """1x1 convolution and normalization in front of a branch's kernel.

    Its output is padded with its own value on zero input, from the running statistics as they are after
    this step and without gradient: then branch and fused convolution agree at the border too.

    Attributes:
      conv: nnx.Conv or WSConv of kernel size 1.
      norm: what normalizes its output; None in online mode.
      gain: [C] in its place; None in mode "branches".
      residual: whether the input is added to the convolution's output (kernel + identity).
    """

    def __init__(self, conv: Any, norm: Any, gain: Any, residual: bool):
        self.conv = conv
        self.norm = norm
        self.gain = gain
        self.residual = residual
        self.features = conv.out_features

    def __call__(self, x: Array, pads: geometry.Pads, mode: dict[str, bool]) -> Array:
        """Normalized conv(x), padded."""
        y = self.conv(x)
        y = self.norm(y + x.astype(y.dtype) if self.residual else y, **mode)
        return with_border(y, pads, frozen_norm(self.norm))

    def nodes(self) -> list[reparam._nodes.Node]:
        """Convolution and normalization."""
        conv = conv_node(self.conv)
        if self.residual:
            conv = reparam.Sum(conv, reparam.Identity(self.features))
        return [conv, _affine(self)]


class Branch(nnx.Module):
    """A convolution without bias (or a pooling, or nothing), then a normalization.

    Attributes:
      conv: nnx.Conv, WSConv or Pool, without padding; None for the identity.
      norm: what normalizes its output; None in online mode.
      gain: [C] in its place; None in mode "branches".
      first: what stands in front of the convolution, or None.
      dilation: of the convolution beyond that of the window.
      features: channels of the output; `jt.nnx.roles` reads it.
    """

    def __init__(
        self,
        conv: Any,
        norm: Any,
        gain: Any = None,
        *,
        first: First | None = None,
        dilation: int = 1,
        features: int,
    ):
        self.conv = conv
        self.norm = norm
        self.gain = gain
        self.first = first
        self.dilation = dilation
        self.features = features

    def __call__(
        self, x: Array, pads: geometry.Pads, use_running_average: bool | None = None
    ) -> Array:
        """norm(conv(x)), x padded by `pads`."""
        mode = {} if use_running_average is None else {"use_running_average": use_running_average}
        x = geometry.zero_pad(x, pads) if self.first is None else self.first(x, pads, mode)
        return self.norm(x if self.conv is None else self.conv(x), **mode)

    def linear(self) -> list[reparam._nodes.Node]:
        """What comes before the branch's own normalization."""
        nodes: list[Any] = [] if self.first is None else self.first.nodes()
        if isinstance(self.conv, Pool):
            nodes.append(reparam.AvgPool(self.conv.size))
        elif self.conv is not None:
            nodes.append(conv_node(self.conv, self.dilation))
        return nodes

    def node(self) -> reparam._nodes.Node:
        """The branch with its current statistics."""
        nodes = [*self.linear(), _affine(self)]
        return reparam.Sequential(*nodes) if len(nodes) > 1 else nodes[0]


def _affine(part: Any) -> reparam._nodes.Node:
    return reparam.Scale(part.gain[...]) if part.norm is None else frozen_norm(part.norm)


def conv_node(conv: Any, dilation: int = 1) -> reparam.Conv:
    """The convolution that a layer computes."""
    kernel, bias = effective_kernel(conv)
    return reparam.Conv(kernel, bias, conv.feature_group_count, dilation)


def average_pool(x: Array, size: Size, strides: Size, dilation: Size) -> Array:
    """Mean over windows, without padding; any number of leading axes."""
    lead = (1,) * (x.ndim - len(size) - 1)
    window, steps, gaps = ((*lead, *v, 1) for v in (size, strides, dilation))
    zero = x.dtype.type(0)  # a constant, or the sum has no gradient under jit
    total = jax.lax.reduce_window(x, zero, jax.lax.add, window, steps, "VALID", None, gaps)
    return total / jnp.asarray(math.prod(size), x.dtype)


def with_border(y: Array, pads: geometry.Pads, norm: reparam.Norm) -> Array:
    """y with what `norm` makes of zeros around its spatial axes; negative pads crop."""
    norm = jax.tree.map(lambda v: v.astype(_tree.wide_dtype(v)), norm)
    factor, bias = norm_factor(norm)
    value = -norm.mean * factor
    value = jax.lax.stop_gradient(value if bias is None else value + bias).astype(y.dtype)
    inside = jnp.ones((1,) * (y.ndim - len(pads) - 1) + y.shape[y.ndim - len(pads) - 1 : -1] + (1,))
    inside = geometry.zero_pad(inside, pads) > 0
    value = value.reshape((1,) * (y.ndim - 1) + (-1,))
    return jnp.where(inside, geometry.zero_pad(y, pads), value)


def unpacked(factory: Any) -> tuple[Any, dict[str, Any]]:
    """(what a factory is a partial of, the keyword arguments bound to it)."""
    keywords: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        factory, keywords = factory.func, {**factory.keywords, **keywords}
    return factory, keywords


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
