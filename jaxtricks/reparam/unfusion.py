"""One convolution into branches that compute it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtricks import _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.reparam._apply import norm_factor
from jaxtricks.reparam._fuse import fuse
from jaxtricks.reparam._nodes import Conv, Identity, Node, Norm, Scale, Sequential, Sum, extent

_AFFINE = (Norm, Scale, Identity)


@checked
def unfuse(conv: Conv, like: Node) -> Node:
    """Branches of the structure of `like` that compute a given convolution: where re-training starts.

    Every branch of `like` stays as it is except the one with the largest kernel: its convolution becomes

        kernel = (K - fuse(others).kernel) / t,   t the factor of the normalization behind it,

    and its last bias takes what is missing. fuse(unfuse(conv, like)) == conv, up to rounding, whatever the
    other branches and statistics are. The factor t must not be 0.

    Args:
      conv: Conv(kernel [*size, in / groups, out], bias or None), of the size of the branches' window.
      like: a Sum of branches, or one branch; the largest is a Conv, with Norm and Scale behind it or not.

    Returns:
      A node with the structure of `like`, float32 or better.

    Raises:
      ValueError: another kernel size or number of channels, a largest branch that is grouped more finely
        than the convolution or another branch, dilated, or has something in front of its Conv, or a bias
        that no branch can take.

    Example:
      >>> norm = Norm(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.zeros(2))
      >>> like = Sum(Sequential(Conv(jnp.ones((3, 3, 2, 2))), norm), Identity(2))
      >>> conv = Conv(jnp.full((3, 3, 2, 2), 0.5), jnp.ones(2))
      >>> bool(jnp.allclose(fuse(unfuse(conv, like)).kernel, 0.5))
      True

    References:
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3.3, read backwards.
    """
    dtype = _tree.wide_dtype(*jax.tree.leaves((conv, like)))
    conv, like = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (conv, like))
    branches = list(like.nodes) if isinstance(like, Sum) else [like]
    at = _free(branches)
    whole = branches[at] if isinstance(branches[at], Sequential) else Sequential(branches[at])
    first, *behind = whole.nodes
    empty = Conv(jnp.zeros_like(first.kernel), first.bias, first.groups)
    rest = fuse(Sum(*branches[:at], Sequential(empty, *behind), *branches[at + 1 :]))
    _check(conv, first, rest)
    minus = Scale(-jnp.ones(rest.kernel.shape[-1], dtype))
    missing = fuse(Sum(conv, Sequential(rest, minus)))
    made = _solve(missing, first, behind)
    branches[at] = Sequential(*made) if isinstance(branches[at], Sequential) else made[0]
    return Sum(*branches) if isinstance(like, Sum) else branches[0]


def _free(branches: Sequence[Node]) -> int:
    """Position of the branch to solve for: most taps, then least groups, then the first."""

    def reach(i: int) -> tuple[int, int]:
        node = branches[i]
        conv = node.nodes[0] if isinstance(node, Sequential) else node
        behind = node.nodes[1:] if isinstance(node, Sequential) else ()
        simple = isinstance(conv, Conv) and all(isinstance(n, _AFFINE) for n in behind)
        return (math.prod(conv.kernel.shape[:-2]), -conv.groups) if simple else (0, 0)

    at = max(range(len(branches)), key=reach)
    if reach(at) == (0, 0):
        raise ValueError(
            "reparam.unfuse: no branch of `like` is a Conv with nothing but Norm, Scale or Identity behind "
            "it, and no other can be solved for; add one"
        )
    return at


def _check(conv: Conv, first: Conv, rest: Conv) -> None:
    axes = first.kernel.ndim - 2
    window, size = rest.kernel.shape[:-2], first.kernel.shape[:-2]
    if conv.kernel.ndim - 2 != axes or extent(conv, axes) != window:
        raise ValueError(
            f"reparam.unfuse: `conv` has the kernel {tuple(conv.kernel.shape[:-2])} (dilation "
            f"{conv.dilation}) and the branches {tuple(window)}; give one of that size, as "
            "fuse(conv, size) makes of a smaller one"
        )
    if size != window:
        raise ValueError(
            f"reparam.unfuse: the largest undilated branch has the kernel {tuple(size)} and the branches "
            f"together {tuple(window)}; no branch reaches every tap"
        )
    channels = [(c.kernel.shape[-2] * c.groups, c.kernel.shape[-1]) for c in (conv, first)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"reparam.unfuse: `conv` maps {channels[0][0]} channels to {channels[0][1]}, the branches "
            f"{channels[1][0]} to {channels[1][1]}; they must agree"
        )
    if conv.groups % first.groups or rest.groups != first.groups:
        raise ValueError(
            f"reparam.unfuse: the largest branch has {first.groups} groups, `conv` {conv.groups} and all "
            f"branches together {rest.groups}; it can only make up for what has its own groups"
        )


def _solve(missing: Conv, first: Conv, behind: Sequence[Node]) -> list[Node]:
    """The branch whose kernel and last bias give what is missing."""
    nodes, after = [], jnp.ones(first.kernel.shape[-1], first.kernel.dtype)
    lack = missing.bias
    for node in reversed(behind):
        if isinstance(node, Norm) and node.bias is not None and lack is not None:
            node = dataclasses.replace(node, bias=node.bias + lack / after)
            lack = None
        after = after * _factor(node)
        nodes.append(node)
    bias = first.bias
    if lack is not None and bias is not None:
        bias, lack = bias + lack / after, None
    if lack is not None:
        raise ValueError(
            "reparam.unfuse: neither the Conv nor a Norm of the largest branch has a bias, which the "
            "convolution or another branch needs; give its Norm one"
        )
    kernel = missing.kernel / after.reshape((1,) * (missing.kernel.ndim - 1) + (-1,))
    return [Conv(kernel, bias, first.groups), *reversed(nodes)]


def _factor(node: Node) -> Array | float:
    match node:
        case Norm():
            return norm_factor(node)[0]
        case Scale():
            return node.gain
    return 1.0
