"""Describe branches as nodes, and place small kernels inside large ones."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _dtypes, _integers, _tree
from jaxtricks._typing import Array

Pads = tuple[tuple[int, int], ...]
Padding = str | int | Sequence[int | Sequence[int]]


def per_axis(
    name: str, value: int | Sequence[int], rank: int
) -> tuple[int, ...]:
    """Return one positive integer per spatial axis."""
    values = _integers.plain(value)
    values = (values,) * rank if isinstance(values, int) else values
    if len(values) != rank or any(v < 1 for v in values):
        raise ValueError(
            f"reparam: `{name}` is {value}; give a positive integer or one per "
            f"spatial axis ({rank})"
        )
    return values


def resolve(
    padding: Padding,
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> Pads:
    """Return explicit (low, high) padding for a kernel size and an input size."""
    rank = len(kernel)
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CAUSAL" and rank == 1:
            return ((extents[0] - 1, 0),)
        if name not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                f"reparam: `padding` {padding!r} has no zero-padded "
                "equivalent; use 'SAME', 'VALID' or (low, high) pairs"
            )
        pads = jax.lax.padtype_to_pads(spatial, extents, strides, name)
        return tuple((int(low), int(high)) for low, high in pads)
    pairs = (
        (padding,) * rank if _integers.is_integer(padding) else tuple(padding)
    )
    pads = tuple((p, p) if _integers.is_integer(p) else tuple(p) for p in pairs)
    if len(pads) != rank or any(len(p) != 2 for p in pads):
        raise ValueError(
            f"reparam: `padding` {padding} needs one (low, high) pair per spatial axis"
        )
    return tuple((int(low), int(high)) for low, high in pads)


def place(
    pads: Pads,
    outer: Sequence[int],
    inner: Sequence[int],
    dilation: Sequence[int],
) -> Pads:
    """Return the padding that puts the inner kernel's centre tap on the outer's.

    low' = low - d (K//2 - k//2)
    high' = high - d ((K-1-K//2) - (k-1-k//2))

    Both kernels then read the same input under the same output, for every stride.
    Negative numbers crop.
    """

    def after(size: int) -> int:
        return size - 1 - size // 2

    return tuple(
        (
            low - d * (big // 2 - small // 2),
            high - d * (after(big) - after(small)),
        )
        for (low, high), big, small, d in zip(
            pads, outer, inner, dilation, strict=True
        )
    )


def zero_pad(x: Array, pads: Pads) -> Array:
    """Pad the spatial axes of x [..., *spatial, C] with zeros; negative pads crop."""
    if all(p == (0, 0) for p in pads):
        return x
    lead = x.ndim - len(pads) - 1
    config = (
        [(0, 0, 0)] * lead
        + [(low, high, 0) for low, high in pads]
        + [(0, 0, 0)]
    )
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def convolve(
    x: Array,
    kernel: Array,
    *,
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
    groups: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """Convolve x [..., *spatial, I] with a kernel [*size, I / groups, O].

    Any number of leading axes; negative pads crop.
    """
    rank = kernel.ndim - 2
    if any(side < 0 for pair in pads for side in pair):
        # Backends disagree on negative padding inside a convolution. Pad both sides at
        # once, because a small branch of a cropped window may read nothing but the
        # padding of the other side.
        x = zero_pad(x, pads)
        pads = ((0, 0),) * rank
    # A convolution takes one batch axis: merge the leading ones, and split them after.
    lead = x.shape[: x.ndim - rank - 1]
    spatial = x.shape[x.ndim - rank - 1 :]
    y = jax.lax.conv_general_dilated(
        jnp.reshape(x, (-1, *spatial)) if len(lead) != 1 else jnp.asarray(x),
        jnp.asarray(kernel),
        tuple(strides),
        pads,
        rhs_dilation=tuple(dilation),
        dimension_numbers=channels_last(rank),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape((*lead, *y.shape[1:])) if len(lead) != 1 else y


def channels_last(rank: int) -> jax.lax.ConvDimensionNumbers:
    """Return the layouts N..C and ..IO for `rank` spatial axes."""
    images = (0, rank + 1, *range(1, rank + 1))
    kernels = (rank + 1, rank, *range(rank))
    return jax.lax.ConvDimensionNumbers(images, kernels, images)


# The branch algebra: the nodes of a branch, and what each says about its shape.


Node = Any
"""Conv, Norm, AvgPool, Identity, Scale, Sequential or Sum."""


@_tree.node
class Conv:
    """Convolution with zero-padded input: y = K * x + bias.

    Attributes:
      kernel: [*size, in / groups, out].
      bias: [out] or None.
      groups: feature groups, output channels contiguous by group as in JAX.
      dilation: of this branch alone (an int or one per axis); multiplies the dilation
        of `apply`.

    Example:
      >>> import jax.numpy as jnp
      >>> Conv(jnp.ones((3, 3, 4, 8)), dilation=2).dilation
      2
    """

    kernel: Array
    bias: Array | None = None
    groups: int = _tree.static(default=1)
    dilation: int | tuple[int, ...] = _tree.static(default=1)

    def __post_init__(self) -> None:
        _set(self, "dilation", _integers.plain(self.dilation))
        shape = getattr(self.kernel, "shape", None)
        if shape is None:
            return
        _dtypes.check_floating("reparam.Conv: `kernel`", self.kernel)
        if len(shape) < 3 or shape[-1] % self.groups:
            raise ValueError(
                f"reparam.Conv: `kernel` of shape {tuple(shape)} with "
                f"{self.groups} groups; give [*size, in / groups, out] with "
                "out divisible by groups"
            )
        per_axis("dilation", self.dilation, len(shape) - 2)
        if getattr(self.bias, "shape", shape[-1:]) != shape[-1:]:
            raise ValueError(
                f"reparam.Conv: `bias` needs the shape {tuple(shape[-1:])}"
            )


@_tree.node
class Norm:
    """Normalization with frozen statistics: (x - mean) / sqrt(var + epsilon) * scale + bias.

    Attributes:
      mean: [C].
      var: [C], or [] (extended batch normalization).
      scale: [C] or None for ones.
      bias: [C] or None for zeros.
      epsilon: inside the root.
    """

    mean: Array
    var: Array
    scale: Array | None = None
    bias: Array | None = None
    epsilon: float = _tree.static(default=1e-5)


@_tree.node
class AvgPool:
    """Mean over a window that counts padded zeros.

    Attributes:
      size: of the window, an int or one per spatial axis.
    """

    size: int | tuple[int, ...] = _tree.static()

    def __post_init__(self) -> None:
        _set(self, "size", _integers.plain(self.size))


@_tree.node
class Identity:
    """The input itself.

    Attributes:
      features: number of channels.
    """

    features: int = _tree.static()


@_tree.node
class Scale:
    """x * gain.

    Attributes:
      gain: [C].
    """

    gain: Array


@_tree.node
class Sequential:
    """Nodes one after the other; at most one may have a kernel larger than 1.

    Attributes:
      nodes: from the input to the output.
    """

    nodes: tuple[Node, ...]

    def __init__(self, *nodes: Node):
        _set(self, "nodes", _some("Sequential", nodes))


@_tree.node
class Sum:
    """The sum of branches that all see the same input.

    Attributes:
      nodes: the branches.
    """

    nodes: tuple[Node, ...]

    def __init__(self, *nodes: Node):
        _set(self, "nodes", _some("Sum", nodes))


def rank(node: Node) -> int | None:
    """Return the number of spatial axes; None where no node says."""
    match node:
        case Conv():
            return node.kernel.ndim - 2
        # A single integer fits any number of axes.
        case AvgPool() if not isinstance(node.size, int):
            return len(node.size)
        case Sequential() | Sum():
            candidates = {r for r in map(rank, node.nodes) if r is not None}
            if len(candidates) > 1:
                raise ValueError(
                    f"reparam: nodes with {sorted(candidates)} spatial axes in "
                    f"one {_name(node)}"
                )
            return candidates.pop() if candidates else None
    return None


def extent(node: Node, axes: int) -> tuple[int, ...]:
    """Return the effective kernel size, inner dilation included, per axis."""
    match node:
        case Conv():
            inner = per_axis("dilation", node.dilation, axes)
            sizes = zip(node.kernel.shape[:-2], inner, strict=True)
            return tuple(d * (k - 1) + 1 for k, d in sizes)
        case AvgPool():
            return per_axis("size", node.size, axes)
        case Sum():
            return largest([extent(n, axes) for n in node.nodes])
        case Sequential():
            spatial_index(node, axes)  # refuse two nodes with large kernels
            return largest([extent(n, axes) for n in node.nodes])
        case Norm() | Identity() | Scale():
            return (1,) * axes
    raise ValueError(
        f"reparam: {_name(node)} is not a node; use Conv, Norm, AvgPool, Identity, ..."
    )


def spatial_index(node: Sequential, axes: int) -> int | None:
    """Return the position of the one node with a kernel above 1, or None."""
    candidates = [
        i for i, n in enumerate(node.nodes) if math.prod(extent(n, axes)) > 1
    ]
    if len(candidates) > 1:
        names = " and ".join(_name(node.nodes[i]) for i in candidates)
        raise ValueError(
            f"reparam.Sequential: {names} both have a kernel larger than 1; "
            "such a pair is not a convolution of either size under padding: "
            "keep them apart"
        )
    return candidates[0] if candidates else None


def features_in(node: Node) -> int | None:
    """Return the channels that the node takes; None for any number."""
    match node:
        case Conv():
            return node.kernel.shape[-2] * node.groups
        case Norm():
            return node.mean.shape[-1]
        case Identity():
            return node.features
        case Scale():
            return node.gain.shape[-1]
        case Sum():
            return _first(map(features_in, node.nodes))
        case Sequential():
            # Nodes that keep the number of channels pass the question on to the next.
            for n in node.nodes:
                features = features_in(n)
                if features is not None:
                    return features
    return None


def largest(sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the largest size per axis."""
    return functools.reduce(lambda a, b: tuple(map(max, a, b)), sizes)


def reference(
    node: Node, axes: int, kernel_size: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Return the kernel size that padding refers to, by default the node's extent."""
    node_extent = extent(node, axes)
    if kernel_size is None:
        return node_extent
    size = per_axis("kernel_size", kernel_size, axes)
    if largest([node_extent, size]) != size:
        raise ValueError(
            f"reparam: `kernel_size` {size} is smaller than a branch's kernel, "
            f"{node_extent}"
        )
    return size


def _first(values: Any) -> int | None:
    return next((v for v in values if v is not None), None)


def _some(name: str, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    if not nodes:
        raise ValueError(f"reparam.{name} needs at least one node")
    return nodes


def _name(node: Node) -> str:
    return type(node).__name__


def _set(node: Node, name: str, value: Any) -> None:
    object.__setattr__(node, name, value)
