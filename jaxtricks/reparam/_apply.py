"""Apply branches one by one, with frozen statistics."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _dtypes
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.reparam import _nodes
from jaxtricks.reparam._nodes import (
    AvgPool,
    Conv,
    Identity,
    Node,
    Norm,
    Padding,
    Pads,
    Scale,
    Sequential,
    Sum,
    extent,
    features_in,
    rank,
    reference,
    spatial_index,
)


class _Place(NamedTuple):
    """A window of size `kernel`, padded by `pads`, on whose centre tap a node is placed."""

    pads: Pads
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    precision: Any

    def of(self, size: tuple[int, ...]) -> Pads:
        return _nodes.place(self.pads, self.kernel, size, self.dilation)

    def pointwise(self) -> "_Place":
        ones = (1,) * len(self.kernel)
        return _Place(((0, 0),) * len(ones), ones, ones, ones, self.precision)


@checked
def apply(
    node: Node,
    x: Float[Array, "..."],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    kernel_size: int | Sequence[int] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Apply the branches, with frozen statistics.

    All branches are centred on the centre tap (k // 2) of one window of size
    `kernel_size`; `padding` is that of the window, and each branch derives its own from
    it. A stride belongs to the one node of a Sequential that has a kernel larger than
    1; the input of that node is padded with what the nodes before it make of zeros.

    Args:
      node: a tree of nodes.
      x: [N, *spatial, C].
      strides: of the window, an int or one per spatial axis.
      padding: "SAME", "VALID", an int, or a (low, high) pair per spatial axis; negative
        numbers crop.
      dilation: distance of the window's taps; the dilation of a Conv multiplies it.
      kernel_size: size of the window; None = the largest effective kernel in the node.
      precision: of the convolutions, as in `jax.lax`.

    Returns:
      [N, *spatial', C'] of x's dtype, computed in float32 or better.

    Raises:
      ValueError: two nodes with a kernel larger than 1 in a Sequential, a window
        smaller than a branch, or channels that do not fit.

    Example:
      >>> branches = Sum(Conv(jnp.ones((3, 3, 2, 2))), Identity(2))
      >>> apply(branches, jnp.ones((1, 4, 4, 2)), strides=2).shape
      (1, 2, 2, 2)

    References:
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3.
    """
    x = jnp.asarray(x)
    axes = rank(node)
    axes = x.ndim - 2 if axes is None else axes
    if x.ndim != axes + 2:
        raise ValueError(
            f"reparam.apply: x of shape {tuple(x.shape)} for nodes with {axes} "
            "spatial axes; give [N, *spatial, C]"
        )
    dtype = _dtypes.wide_dtype(x, *jax.tree.leaves(node))
    node = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), node)
    window = reference(node, axes, kernel_size)
    strides = _nodes.per_axis("strides", strides, axes)
    dilation = _nodes.per_axis("dilation", dilation, axes)
    pads = _nodes.resolve(padding, x.shape[1:-1], window, strides, dilation)
    place = _Place(pads, window, strides, dilation, precision)
    return _run(node, jnp.asarray(x, dtype), place).astype(x.dtype)


def _run(node: Node, x: Array, place: _Place) -> Array:
    match node:
        case Sum():
            return functools.reduce(
                operator.add, [_run(n, x, place) for n in node.nodes]
            )
        case Sequential():
            return _sequence(node, x, place)
        case Conv():
            return _conv(node, x, place)
        case AvgPool():
            return _conv(
                pool_kernel(node, x.shape[-1], len(place.kernel), x.dtype),
                x,
                place,
            )
    return _affine(node, _pick(x, place))


def _sequence(node: Sequential, x: Array, place: _Place) -> Array:
    axes = len(place.kernel)
    at = spatial_index(node, axes)
    if at is None:
        at = next(
            (i for i, n in enumerate(node.nodes) if isinstance(n, Conv)), 0
        )
    if at:
        # Padding the input, not the intermediate, gives the latter its value on zero
        # input.
        size = extent(node.nodes[at], axes)
        x = _nodes.zero_pad(x, place.of(size))
        place = place._replace(pads=((0, 0),) * axes, kernel=size)
    for i, n in enumerate(node.nodes):
        x = _run(n, x, place if i == at else place.pointwise())
    return x


def _conv(node: Conv, x: Array, place: _Place) -> Array:
    axes = len(place.kernel)
    check_features(node, x.shape[-1])
    inner = _nodes.per_axis("dilation", node.dilation, axes)
    y = _nodes.convolve(
        x,
        node.kernel,
        strides=place.strides,
        pads=place.of(extent(node, axes)),
        dilation=tuple(map(operator.mul, inner, place.dilation)),
        groups=node.groups,
        precision=place.precision,
    )
    return y if node.bias is None else y + _row(node.bias, y)


def _pick(x: Array, place: _Place) -> Array:
    """Return what a 1x1 kernel of this placement reads."""
    x = _nodes.zero_pad(x, place.of((1,) * len(place.kernel)))
    return x[(slice(None), *(slice(None, None, s) for s in place.strides))]


def _affine(node: Node, x: Array) -> Array:
    check_features(node, x.shape[-1])
    match node:
        case Identity():
            return x
        case Scale():
            return x * _row(node.gain, x)
        case Norm():
            factor, bias = norm_factor(node)
            y = (x - _row(node.mean, x)) * _row(factor, x)
            return y if bias is None else y + _row(bias, x)
    raise ValueError(
        f"reparam: {type(node).__name__} is not a node; use Conv, Norm, AvgPool, ..."
    )


def norm_factor(node: Norm) -> tuple[Array, Array | None]:
    """Return scale / sqrt(var + epsilon) of shape [C], and the bias."""
    root = jnp.sqrt(node.var + node.epsilon)
    scale = jnp.ones_like(node.mean) if node.scale is None else node.scale
    return scale / (root if root.ndim else root.reshape(1)), node.bias


def pool_kernel(node: AvgPool, features: int, axes: int, dtype: Any) -> Conv:
    """Return an average pooling as a depthwise convolution."""
    size = _nodes.per_axis("size", node.size, axes)
    count = functools.reduce(operator.mul, size)
    return Conv(
        jnp.full((*size, 1, features), 1 / count, dtype), groups=features
    )


def check_features(node: Node, features: int) -> None:
    """Raise if the node takes another number of channels."""
    known = features_in(node)
    if known is not None and known != features:
        raise ValueError(
            f"reparam: {type(node).__name__} takes {known} channels but "
            f"receives {features}"
        )


def _row(values: Array, x: Array) -> Array:
    return values.reshape((1,) * (x.ndim - 1) + (-1,))
