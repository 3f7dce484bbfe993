"""How far a fused convolution may lie from its branches by rounding alone."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.reparam import geometry
from jaxtricks.reparam._apply import apply
from jaxtricks.reparam._fuse import fuse
from jaxtricks.reparam._nodes import AvgPool, Conv, Identity, Node, Norm, Scale, Sequential, Sum
from jaxtricks.reparam._nodes import reference as window_of

FACTOR = 16
"""Measured errors are 0.4 to 4.8 times u S; the rest is room for other orders of summation."""


@checked
def error_bound(
    node: Node,
    x: Float[Array, "..."],
    *,
    strides: int | Sequence[int] = 1,
    padding: geometry.Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    kernel_size: int | Sequence[int] | None = None,
    fused: Conv | None = None,
) -> Float[Array, ""]:
    """How far apart branches and fused convolution may be on this input: more is a mistake, not rounding.

    16 u (S_fused + sum_b S_b), u the unit roundoff of x's dtype (float32 2^-24, bfloat16 2^-8). S of a
    convolution is the largest entry of conv(|x|, |K|) + |b|; S of a branch the same with the absolute
    values of everything in it, |x| + |mean| where it subtracts a mean. The bound is relative to the terms
    that are summed: where branches cancel it exceeds the output, and so does the rounding.

    Args:
      node: a tree of nodes.
      x: [N, *spatial, C], the input on which the two are compared.
      strides: as in `apply`, and so are the next three.
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
    # Wider than x: sums of absolute values overflow sixteen bits before the output does.
    wide = jnp.abs(jnp.asarray(x, _tree.wide_dtype(x)))
    how: dict[str, Any] = dict(strides=strides, padding=padding, dilation=dilation)

    def largest(part: Node) -> Array:
        return jnp.max(apply(magnitude(part), wide, kernel_size=size, **how))

    total = sum(map(largest, node.nodes if isinstance(node, Sum) else (node,)), largest(fused))
    return FACTOR * float(jnp.finfo(x.dtype).eps) / 2 * total


def magnitude(node: Node) -> Node:
    """The node whose output on |x| is the sum of the absolute values of all terms."""

    def size(values: Array | None) -> Array | None:
        return None if values is None else jnp.abs(values)

    match node:
        case Sum():
            return Sum(*map(magnitude, node.nodes))
        case Sequential():
            return Sequential(*map(magnitude, node.nodes))
        case Conv():
            return Conv(jnp.abs(node.kernel), size(node.bias), node.groups, node.dilation)
        case Scale():
            return Scale(jnp.abs(node.gain))
        case Norm():
            mean = -jnp.abs(node.mean)  # it is subtracted
            return Norm(mean, node.var, size(node.scale), size(node.bias), node.epsilon)
        case AvgPool() | Identity():
            return node
    raise ValueError(f"reparam: {type(node).__name__} is no node; use Conv, Norm, AvgPool, ...")
