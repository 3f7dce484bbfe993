"""Fuse branches into one convolution, solve for branches, and bound the error."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _dtypes, _integers
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.reparam import _nodes
from jaxtricks.reparam._apply import (
    apply,
    check_features,
    norm_factor,
    pool_kernel,
)
from jaxtricks.reparam._nodes import (
    AvgPool,
    Conv,
    Identity,
    Node,
    Norm,
    Scale,
    Sequential,
    Sum,
    extent,
    features_in,
    largest,
    rank,
    reference,
    spatial_index,
)
from jaxtricks.reparam._nodes import reference as window_of


@checked
def fuse(node: Node, kernel_size: int | Sequence[int] | None = None) -> Conv:
    """Fuse the branches into the one convolution that equals them.

    apply(node, x, **how) == apply(fuse(node), x, **how), up to rounding, for any
    stride, padding and dilation. With t = scale / sqrt(var + eps):

        Conv then Norm      K t,  (b - mean) t + bias
        1x1 then KxK        sum_m K1[i, m] K2[..., m, o],  sum_m b1[m] K2[..., m, o] + b2
        Sum                 kernels zero-padded to one size, centre tap k // 2 on
                            centre tap, and added

    It is differentiable: a penalty on the fused kernel is a penalty on the branches.

    Args:
      node: a tree of nodes.
      kernel_size: size of the result (an int or one per spatial axis), at least that of
        the largest branch, which is the default. `padding` then refers to it.

    Returns:
      Conv(kernel, bias or None, groups), dilation 1, float32 or better. `groups` is the
      largest number that every branch allows (a depthwise branch beside a dense one
      becomes dense).

    Raises:
      ValueError: two nodes with a kernel larger than 1 in a Sequential, channels that
        do not fit, or a node that does not say how many channels or spatial axes there
        are.

    Example:
      >>> fused = fuse(Sum(Conv(jnp.ones((3, 3, 2, 2))), Identity(2)))
      >>> fused.kernel.shape, float(fused.kernel[1, 1, 0, 0]), float(fused.kernel[1, 1, 0, 1])
      ((3, 3, 2, 2), 2.0, 1.0)

    References:
      Ding, Zhang, Han, Ding, "Diverse Branch Block", arXiv 2103.13425.
    """
    axes = rank(node)
    has_sizes = kernel_size is not None and not _integers.is_integer(
        kernel_size
    )
    if axes is None and has_sizes:
        axes = len(tuple(kernel_size))
    features = features_in(node)
    if axes is None or features is None:
        raise ValueError(
            "reparam.fuse: the node says neither by a Conv nor otherwise how "
            f"many {'spatial axes' if axes is None else 'channels'} there are; "
            "give `kernel_size` as a tuple, and put an Identity(features) in "
            "front"
        )
    # Fuse in float32 at least: rounding then stays below that of the convolution.
    dtype = _dtypes.wide_dtype(*jax.tree.leaves(node))
    node = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), node)
    size = reference(node, axes, kernel_size)
    return _embed(_fold(node, features, _Kind(axes, dtype)), size)


class _Kind(NamedTuple):
    """Number of spatial axes and dtype of all convolutions in one fusion."""

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
            # Frozen statistics make it a depthwise 1x1 convolution.
            return _normalized(
                _diagonal(jnp.ones_like(node.mean), kind.axes), node
            )
    raise ValueError(
        f"reparam.fuse: {type(node).__name__} is not a node; use Conv, Norm, "
        "AvgPool, ..."
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
    # (b - mean) t and not b t - mean t, whose terms may be large and close.
    shift = (
        -norm.mean if conv.bias is None else conv.bias - norm.mean
    ) * factor
    return Conv(_scaled(conv.kernel, factor), _plus(shift, bias), conv.groups)


def _compose(a: Conv, b: Conv) -> Conv:
    """Compose b after a: one of them is 1x1, and b pads with a's value on zeros."""
    # A factor per channel needs no product of kernels, and keeps the groups of a.
    if _is_diagonal(b):
        factor = b.kernel.reshape(-1)
        bias = None if a.bias is None else a.bias * factor
        return Conv(_scaled(a.kernel, factor), _plus(bias, b.bias), a.groups)
    # Before b a factor scales the input channels of its kernel.
    if _is_diagonal(a):
        kernel = _by_group(b)
        factor = a.kernel.reshape(b.groups, -1).T[..., None]
        scaled = (kernel * _lift(factor, kernel)).reshape(b.kernel.shape)
        return Conv(scaled, _plus(_bias_through(a.bias, b), b.bias), b.groups)
    # Two different groupings have a common one: the greatest common divisor.
    groups = math.gcd(a.groups, b.groups)
    a = _regroup(a, groups)
    b = _regroup(b, groups)
    ka = _by_group(a)
    kb = _by_group(b)
    # One of the two has spatial axes of length 1, which broadcast.
    size = largest([ka.shape[:-3], kb.shape[:-3]])
    ka = jnp.broadcast_to(ka, size + ka.shape[-3:])
    kb = jnp.broadcast_to(kb, size + kb.shape[-3:])
    # Accelerators would round the factors to bfloat16 otherwise.
    highest = jax.lax.Precision.HIGHEST
    kernel = jnp.einsum("...igm,...mgo->...igo", ka, kb, precision=highest)
    kernel = kernel.reshape(*size, kernel.shape[-3], -1)
    return Conv(kernel, _plus(_bias_through(a.bias, b), b.bias), groups)


def _bias_through(bias: Array | None, conv: Conv) -> Array | None:
    """Return what a convolution computes from a constant input."""
    if bias is None:
        return None
    kernel = _by_group(conv)
    # A constant input meets the sum of the taps at every position, because the border
    # is padded with the constant too.
    total = jnp.sum(kernel, axis=tuple(range(kernel.ndim - 3)))
    highest = jax.lax.Precision.HIGHEST
    parts = bias.reshape(conv.groups, -1)
    return jnp.einsum("gm,mgo->go", parts, total, precision=highest).reshape(-1)


def _add(convs: Sequence[Conv]) -> Conv:
    if len({c.kernel.shape[-1] for c in convs}) > 1:
        outs = [c.kernel.shape[-1] for c in convs]
        raise ValueError(
            f"reparam.Sum: the branches give {outs} channels; they must agree"
        )
    groups = functools.reduce(math.gcd, [c.groups for c in convs])
    size = largest([c.kernel.shape[:-2] for c in convs])
    convs = [_embed(_regroup(c, groups), size) for c in convs]
    kernel = functools.reduce(jnp.add, [c.kernel for c in convs])
    return Conv(
        kernel, functools.reduce(_plus, [c.bias for c in convs]), groups
    )


def _embed(conv: Conv, size: tuple[int, ...]) -> Conv:
    """Pad the kernel with zeros, centre tap on centre tap."""
    small = conv.kernel.shape[:-2]
    if small == size:
        return conv
    ones = (1,) * len(size)
    pads = _nodes.place(((0, 0),) * len(size), small, size, ones)
    config = [(low, high, 0) for low, high in pads] + [(0, 0, 0)] * 2
    zero = jnp.zeros((), conv.kernel.dtype)
    return Conv(jax.lax.pad(conv.kernel, zero, config), conv.bias, conv.groups)


def _spread(conv: Conv, axes: int) -> Array:
    """Write out the kernel's dilation as zeros."""
    inner = _nodes.per_axis("dilation", conv.dilation, axes)
    config = [(0, 0, d - 1) for d in inner] + [(0, 0, 0)] * 2
    return jax.lax.pad(conv.kernel, jnp.zeros((), conv.kernel.dtype), config)


def _regroup(conv: Conv, groups: int) -> Conv:
    """Return the same convolution with fewer groups: block-diagonal inside each."""
    if conv.groups == groups:
        return conv
    ratio = conv.groups // groups
    kernel = conv.kernel
    *size, fan_in, out = kernel.shape
    blocks = kernel.reshape(*size, 1, fan_in, groups, ratio, out // conv.groups)
    # Zeros between the merged groups keep them independent.
    eye = jnp.eye(ratio, dtype=kernel.dtype).reshape(ratio, 1, 1, ratio, 1)
    blocks = blocks * _lift(eye, blocks)
    return Conv(blocks.reshape(*size, ratio * fan_in, out), conv.bias, groups)


def _by_group(conv: Conv) -> Array:
    """Reshape to [*size, in / groups, groups, out / groups]."""
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


# One convolution into branches that compute it.


# Nodes that a kernel can be solved through: a factor and an offset per channel.
_AFFINE = (Norm, Scale, Identity)


@checked
def unfuse(conv: Conv, like: Node) -> Node:
    """Return branches of the structure of `like` that compute a convolution.

    Re-training starts from them.

    Every branch of `like` stays as it is except the one with the largest kernel, whose
    convolution becomes

        kernel = (K - fuse(others).kernel) / t

    with t the factor of the normalization behind it; its last bias takes the remainder.
    fuse(unfuse(conv, like)) == conv, up to rounding, whatever the other branches and
    statistics are. The factor t must not be 0.

    Args:
      conv: Conv(kernel [*size, in / groups, out], bias or None), of the size of the
        branches' window.
      like: a Sum of branches, or one branch; the largest is a Conv, with Norm and Scale
        behind it or not.

    Returns:
      A node with the structure of `like`, float32 or better.

    Raises:
      ValueError: another kernel size or number of channels, a largest branch that is
        grouped more finely than the convolution or another branch, dilated, or has
        something in front of its Conv, or a bias that no branch can take.

    Example:
      >>> norm = Norm(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.zeros(2))
      >>> like = Sum(Sequential(Conv(jnp.ones((3, 3, 2, 2))), norm), Identity(2))
      >>> conv = Conv(jnp.full((3, 3, 2, 2), 0.5), jnp.ones(2))
      >>> bool(jnp.allclose(fuse(unfuse(conv, like)).kernel, 0.5))
      True

    References:
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3.3, read backwards.
    """
    dtype = _dtypes.wide_dtype(*jax.tree.leaves((conv, like)))
    conv, like = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (conv, like)
    )
    branches = list(like.nodes) if isinstance(like, Sum) else [like]
    at = _free(branches)
    is_sequence = isinstance(branches[at], Sequential)
    first, *behind = branches[at].nodes if is_sequence else [branches[at]]
    # The other branches, and what the free one adds with a kernel of zeros.
    empty = Conv(jnp.zeros_like(first.kernel), first.bias, first.groups)
    rest = fuse(
        Sum(*branches[:at], Sequential(empty, *behind), *branches[at + 1 :])
    )
    _check(conv, first, rest)
    minus = Scale(-jnp.ones(rest.kernel.shape[-1], dtype))
    missing = fuse(Sum(conv, Sequential(rest, minus)))
    solved = _solve(missing, first, behind)
    branches[at] = Sequential(*solved) if is_sequence else solved[0]
    return Sum(*branches) if isinstance(like, Sum) else branches[0]


def _free(branches: Sequence[Node]) -> int:
    """Return the position of the branch to solve for: most taps, least groups, first."""

    def reach(i: int) -> tuple[int, int]:
        node = branches[i]
        conv = node.nodes[0] if isinstance(node, Sequential) else node
        behind = node.nodes[1:] if isinstance(node, Sequential) else ()
        simple = isinstance(conv, Conv) and all(
            isinstance(n, _AFFINE) for n in behind
        )
        return (
            (math.prod(conv.kernel.shape[:-2]), -conv.groups)
            if simple
            else (0, 0)
        )

    at = max(range(len(branches)), key=reach)
    if reach(at) == (0, 0):
        raise ValueError(
            "reparam.unfuse: no branch of `like` is a Conv with nothing but "
            "Norm, Scale or Identity behind it, and no other can be solved "
            "for; add one"
        )
    return at


def _check(conv: Conv, first: Conv, rest: Conv) -> None:
    axes = first.kernel.ndim - 2
    window = rest.kernel.shape[:-2]
    size = first.kernel.shape[:-2]
    if conv.kernel.ndim - 2 != axes or extent(conv, axes) != window:
        raise ValueError(
            "reparam.unfuse: `conv` has the kernel "
            f"{tuple(conv.kernel.shape[:-2])} (dilation {conv.dilation}) and "
            f"the branches {tuple(window)}; give one of that size, as "
            "fuse(conv, size) makes of a smaller one"
        )
    if size != window:
        raise ValueError(
            "reparam.unfuse: the largest undilated branch has the kernel "
            f"{tuple(size)} and the branches together {tuple(window)}; no "
            "branch reaches every tap"
        )
    channels = [
        (c.kernel.shape[-2] * c.groups, c.kernel.shape[-1])
        for c in (conv, first)
    ]
    if channels[0] != channels[1]:
        raise ValueError(
            f"reparam.unfuse: `conv` maps {channels[0][0]} channels to "
            f"{channels[0][1]}, the branches {channels[1][0]} to "
            f"{channels[1][1]}; they must agree"
        )
    if conv.groups % first.groups or rest.groups != first.groups:
        raise ValueError(
            f"reparam.unfuse: the largest branch has {first.groups} groups, "
            f"`conv` {conv.groups} and all branches together {rest.groups}; it "
            "can only compensate for branches of its groups"
        )


def _solve(missing: Conv, first: Conv, behind: Sequence[Node]) -> list[Node]:
    """Solve for the branch whose kernel and last bias give the remainder."""
    nodes = []
    # From the output to the input: the last bias there is takes the missing bias, and
    # the factors behind the Conv divide the missing kernel.
    after = jnp.ones(first.kernel.shape[-1], first.kernel.dtype)
    lack = missing.bias
    for node in reversed(behind):
        if (
            isinstance(node, Norm)
            and node.bias is not None
            and lack is not None
        ):
            node = dataclasses.replace(node, bias=node.bias + lack / after)
            lack = None
        after = after * _factor(node)
        nodes.append(node)
    bias = first.bias
    if lack is not None and bias is not None:
        bias = bias + lack / after
        lack = None
    if lack is not None:
        raise ValueError(
            "reparam.unfuse: neither the Conv nor a Norm of the largest branch "
            "has a bias, which the convolution or another branch needs; give "
            "its Norm one"
        )
    kernel = missing.kernel / after.reshape(
        (1,) * (missing.kernel.ndim - 1) + (-1,)
    )
    return [Conv(kernel, bias, first.groups), *reversed(nodes)]


def _factor(node: Node) -> Array | float:
    match node:
        case Norm():
            return norm_factor(node)[0]
        case Scale():
            return node.gain
    return 1.0


# A bound on the rounding between branches and their fused convolution.


FACTOR = 16
"""Measured errors are 0.4 to 4.8 times u S; the rest allows other summation orders."""


@checked
def error_bound(
    node: Node,
    x: Float[Array, "..."],
    *,
    strides: int | Sequence[int] = 1,
    padding: _nodes.Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    kernel_size: int | Sequence[int] | None = None,
    fused: Conv | None = None,
) -> Float[Array, ""]:
    """Bound how far branches and fused convolution may differ on this input.

    A larger difference is a mistake, not rounding.

    16 u (S_fused + sum_b S_b), u the unit roundoff of x's dtype (float32 2^-24,
    bfloat16 2^-8). S of a convolution is the largest entry of conv(|x|, |K|) + |b|; S
    of a branch the same with the absolute values of everything in it, |x| + |mean|
    where it subtracts a mean. The bound is relative to the terms that are summed: where
    branches cancel it exceeds the output, and so does the rounding.

    Args:
      node: a tree of nodes.
      x: [N, *spatial, C], the input on which the two are compared.
      strides: as in `apply`.
      padding: of the window.
      dilation: of the window.
      kernel_size: of the window; None = the largest effective kernel in the node.
      fused: the fused convolution; None = fuse(node, kernel_size).

    Returns:
      A scalar, float32 or better.

    Raises:
      ValueError: what `apply` and `fuse` raise.

    Example:
      >>> x = jnp.ones((1, 4, 4, 2))
      >>> branches = Sum(Conv(jnp.ones((3, 3, 2, 2))), Identity(2))
      >>> bool(error_bound(branches, x) == 16 * 2**-24 * (19 + 18 + 1))
      True

    References:
      Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    """
    x = jnp.asarray(x)
    size = window_of(node, x.ndim - 2, kernel_size)
    fused = fuse(node, size) if fused is None else fused
    # Wider than x: sums of absolute values overflow sixteen bits before the output
    # does.
    wide = jnp.abs(jnp.asarray(x, _dtypes.wide_dtype(x)))
    how: dict[str, Any] = dict(
        strides=strides, padding=padding, dilation=dilation
    )

    def largest(part: Node) -> Array:
        return jnp.max(apply(magnitude(part), wide, kernel_size=size, **how))

    branches = node.nodes if isinstance(node, Sum) else (node,)
    total = sum(map(largest, branches), largest(fused))
    return FACTOR * float(jnp.finfo(x.dtype).eps) / 2 * total


def magnitude(node: Node) -> Node:
    """Return the node whose output on |x| sums the absolute values of all terms."""

    def size(values: Array | None) -> Array | None:
        return None if values is None else jnp.abs(values)

    match node:
        case Sum():
            return Sum(*map(magnitude, node.nodes))
        case Sequential():
            return Sequential(*map(magnitude, node.nodes))
        case Conv():
            return Conv(
                jnp.abs(node.kernel),
                size(node.bias),
                node.groups,
                node.dilation,
            )
        case Scale():
            return Scale(jnp.abs(node.gain))
        case Norm():
            mean = -jnp.abs(node.mean)  # it is subtracted
            return Norm(
                mean, node.var, size(node.scale), size(node.bias), node.epsilon
            )
        case AvgPool() | Identity():
            return node
    raise ValueError(
        f"reparam: {type(node).__name__} is not a node; use Conv, Norm, AvgPool, ..."
    )
