"""Branches into one convolution."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _integers, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.reparam import geometry
from jaxtricks.reparam._apply import check_features, norm_factor, pool_kernel
from jaxtricks.reparam._nodes import (
    AvgPool,
    Conv,
    Identity,
    Node,
    Norm,
    Scale,
    Sequential,
    Sum,
    features_in,
    largest,
    rank,
    reference,
    spatial_index,
)


@checked
def fuse(node: Node, kernel_size: int | Sequence[int] | None = None) -> Conv:
    """The one convolution that equals the branches, for any stride, padding and dilation.

    apply(node, x, **how) == apply(fuse(node), x, **how), up to rounding. With t = scale / sqrt(var + eps):

        Conv then Norm      K t,  (b - mean) t + bias
        1x1 then KxK        sum_m K1[i, m] K2[..., m, o],  sum_m b1[m] K2[..., m, o] + b2
        Sum                 kernels zero-padded to one size around the centre tap k // 2, and added

    It is differentiable: a penalty on the fused kernel is a penalty on the branches.

    Args:
      node: a tree of nodes.
      kernel_size: size of the result (an int or one per spatial axis), at least that of the largest branch,
        which is the default. `padding` then refers to it.

    Returns:
      Conv(kernel, bias or None, groups), dilation 1, float32 or better. `groups` is the largest number that
      every branch allows (a depthwise branch beside a dense one becomes dense).

    Raises:
      ValueError: two nodes with a kernel larger than 1 in a Sequential, channels that do not fit, or a
        node that does not say how many channels or spatial axes there are.

    Example:
      >>> fused = fuse(Sum(Conv(jnp.ones((3, 3, 2, 2))), Identity(2)))
      >>> fused.kernel.shape, float(fused.kernel[1, 1, 0, 0]), float(fused.kernel[1, 1, 0, 1])
      ((3, 3, 2, 2), 2.0, 1.0)

    References:
      Ding, Zhang, Han, Ding, "Diverse Branch Block", arXiv 2103.13425.
    """
    axes = rank(node)
    if axes is None and kernel_size is not None and not _integers.is_integer(kernel_size):
        axes = len(tuple(kernel_size))
    features = features_in(node)
    if axes is None or features is None:
        raise ValueError(
            "reparam.fuse: the node says neither by a Conv nor otherwise how many "
            f"{'spatial axes' if axes is None else 'channels'} there are; give `kernel_size` as a tuple, "
            "and put an Identity(features) in front"
        )
    dtype = _tree.wide_dtype(*jax.tree.leaves(node))
    node = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), node)
    size = reference(node, axes, kernel_size)
    return _embed(_fold(node, features, _Kind(axes, dtype)), size)


class _Kind(NamedTuple):
    """What every convolution of one fusion has in common."""

    axes: int
    dtype: Any


def _fold(node: Node, features: int, kind: _Kind) -> Conv:
    check_features(node, features)
    match node:
        case Conv():
            return Conv(_spread(node, kind.axes), node.bias, node.groups)
        case AvgPool():
            return pool_kernel(node, features, *kind)
        case Sum():
            return _add([_fold(n, features, kind) for n in node.nodes])
        case Sequential():
            return _chain(node, features, kind)
        case Identity():
            return _diagonal(jnp.ones(features, kind.dtype), kind.axes)
        case Scale():
            return _diagonal(node.gain, kind.axes)
        case Norm():
            return _normalized(_diagonal(jnp.ones_like(node.mean), kind.axes), node)
    raise ValueError(
        f"reparam.fuse: {type(node).__name__} is no node; use Conv, Norm, AvgPool, ..."
    )


def _chain(node: Sequential, features: int, kind: _Kind) -> Conv:
    spatial_index(node, kind.axes)
    first, *rest = node.nodes
    folded = _fold(first, features, kind)
    for n in rest:
        channels = folded.kernel.shape[-1]
        if isinstance(n, Norm):
            check_features(n, channels)
            folded = _normalized(folded, n)
        else:
            folded = _compose(folded, _fold(n, channels, kind))
    return folded


def _normalized(conv: Conv, norm: Norm) -> Conv:
    factor, bias = norm_factor(norm)
    # (b - mean) t, not b t - mean t: the two may be large and close.
    shift = (-norm.mean if conv.bias is None else conv.bias - norm.mean) * factor
    return Conv(_scaled(conv.kernel, factor), _plus(shift, bias), conv.groups)


def _compose(a: Conv, b: Conv) -> Conv:
    """b after a; one of them is 1x1, and b's input is padded with a's value on zeros."""
    if _is_diagonal(b):
        factor = b.kernel.reshape(-1)
        bias = None if a.bias is None else a.bias * factor
        return Conv(_scaled(a.kernel, factor), _plus(bias, b.bias), a.groups)
    if _is_diagonal(a):
        kernel = _by_group(b)
        factor = a.kernel.reshape(b.groups, -1).T[..., None]
        scaled = (kernel * _lift(factor, kernel)).reshape(b.kernel.shape)
        return Conv(scaled, _plus(_bias_through(a.bias, b), b.bias), b.groups)
    groups = math.gcd(a.groups, b.groups)
    a, b = _regroup(a, groups), _regroup(b, groups)
    ka, kb = _by_group(a), _by_group(b)
    # One of the two has spatial axes of length 1, which broadcast.
    size = largest([ka.shape[:-3], kb.shape[:-3]])
    ka = jnp.broadcast_to(ka, size + ka.shape[-3:])
    kb = jnp.broadcast_to(kb, size + kb.shape[-3:])
    highest = jax.lax.Precision.HIGHEST
    kernel = jnp.einsum("...igm,...mgo->...igo", ka, kb, precision=highest)
    kernel = kernel.reshape(*size, kernel.shape[-3], -1)
    return Conv(kernel, _plus(_bias_through(a.bias, b), b.bias), groups)


def _bias_through(bias: Array | None, conv: Conv) -> Array | None:
    """What a convolution makes of a constant input."""
    if bias is None:
        return None
    kernel = _by_group(conv)
    total = jnp.sum(kernel, axis=tuple(range(kernel.ndim - 3)))
    highest = jax.lax.Precision.HIGHEST
    parts = bias.reshape(conv.groups, -1)
    return jnp.einsum("gm,mgo->go", parts, total, precision=highest).reshape(-1)


def _add(convs: Sequence[Conv]) -> Conv:
    if len({c.kernel.shape[-1] for c in convs}) > 1:
        outs = [c.kernel.shape[-1] for c in convs]
        raise ValueError(f"reparam.Sum: the branches give {outs} channels; they must agree")
    groups = functools.reduce(math.gcd, [c.groups for c in convs])
    size = largest([c.kernel.shape[:-2] for c in convs])
    convs = [_embed(_regroup(c, groups), size) for c in convs]
    kernel = functools.reduce(jnp.add, [c.kernel for c in convs])
    return Conv(kernel, functools.reduce(_plus, [c.bias for c in convs]), groups)


def _embed(conv: Conv, size: tuple[int, ...]) -> Conv:
    """Zeros around the kernel, centre tap on centre tap."""
    small = conv.kernel.shape[:-2]
    if small == size:
        return conv
    ones = (1,) * len(size)
    pads = geometry.place(((0, 0),) * len(size), small, size, ones)
    config = [(low, high, 0) for low, high in pads] + [(0, 0, 0)] * 2
    zero = jnp.zeros((), conv.kernel.dtype)
    return Conv(jax.lax.pad(conv.kernel, zero, config), conv.bias, conv.groups)


def _spread(conv: Conv, axes: int) -> Array:
    """The kernel with its own dilation written out as zeros."""
    inner = geometry.per_axis("dilation", conv.dilation, axes)
    config = [(0, 0, d - 1) for d in inner] + [(0, 0, 0)] * 2
    return jax.lax.pad(conv.kernel, jnp.zeros((), conv.kernel.dtype), config)


def _regroup(conv: Conv, groups: int) -> Conv:
    """The same convolution with fewer groups: block-diagonal inside each."""
    if conv.groups == groups:
        return conv
    ratio = conv.groups // groups
    kernel = conv.kernel
    *size, fan_in, out = kernel.shape
    blocks = kernel.reshape(*size, 1, fan_in, groups, ratio, out // conv.groups)
    eye = jnp.eye(ratio, dtype=kernel.dtype).reshape(ratio, 1, 1, ratio, 1)
    blocks = blocks * _lift(eye, blocks)
    return Conv(blocks.reshape(*size, ratio * fan_in, out), conv.bias, groups)


def _by_group(conv: Conv) -> Array:
    """[*size, in / groups, groups, out / groups]."""
    *size, fan_in, out = conv.kernel.shape
    return conv.kernel.reshape(*size, fan_in, conv.groups, out // conv.groups)


def _diagonal(values: Array, axes: int) -> Conv:
    channels = values.shape[-1]
    return Conv(values.reshape((1,) * axes + (1, channels)), groups=channels)


def _is_diagonal(conv: Conv) -> bool:
    *size, fan_in, out = conv.kernel.shape
    return math.prod(size) == 1 and fan_in == 1 and out == conv.groups


def _scaled(kernel: Array, factor: Array) -> Array:
    return kernel * factor.reshape((1,) * (kernel.ndim - 1) + (-1,))


def _lift(values: Array, like: Array) -> Array:
    return values.reshape((1,) * (like.ndim - values.ndim) + values.shape)


def _plus(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
