"""A convolution or a block, and the normalization behind it, if any: what fuses into one nnx.Conv."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtricks import _jaxpr, _tree, reparam
from jaxtricks._types import Array
from jaxtricks.nnx import surgery
from jaxtricks.nnx.branch import Branched
from jaxtricks.nnx.conv import pad_by_mode
from jaxtricks.nnx.norm import ExtendedBatchNorm
from jaxtricks.nnx.parts import conv_node, frozen_norm
from jaxtricks.nnx.plain import largest_conv, layer_dtypes, plain_conv
from jaxtricks.remat import measure
from jaxtricks.reparam import geometry

NORMS = (nnx.BatchNorm, ExtendedBatchNorm)


class Unit(NamedTuple):
    """What one plain convolution can stand for in evaluation mode.

    Attributes:
      layer: path of the convolution.
      conv: nnx.Conv, WSConv or a block.
      norm: the normalization of its output, or None.
      norm_layer: its path.
    """

    layer: str
    conv: Any
    norm: Any = None
    norm_layer: str | None = None

    def __call__(self, x: Array) -> Array:
        """What the model computes."""
        y = self.conv(x)
        return y if self.norm is None else self.norm(y, use_running_average=True)

    def node(self) -> Any:
        """The unit in the branch algebra, with its running statistics."""
        if isinstance(self.conv, Branched):
            node = self.conv.branches()
        else:
            node = conv_node(self.conv)
        return node if self.norm is None else reparam.Sequential(node, frozen_norm(self.norm))

    def check(self) -> None:
        """Raise if the unit is in training mode, if its statistics say nothing yet, or if it is stacked."""
        if largest_conv(self.conv).kernel[...].ndim != self.rank + 2:
            raise ValueError(
                f"{self.layer!r} is stacked (nnx.vmap): fuse one layer, or its `branches()`"
            )
        norms = {
            surgery.below(self.layer) + path: module
            for path, module in surgery.modules(self.conv)
            if isinstance(module, NORMS)
        }
        if self.norm is not None:
            norms[str(self.norm_layer)] = self.norm
        for path, norm in norms.items():
            if norm.use_running_average is not True:
                raise ValueError(
                    f"{path!r} is in training mode, in which it is no fixed function: evaluate first "
                    "(model.eval() in nnx, train=False or use_running_average=True in linen)"
                )
        if norms and all(map(_untouched, norms.values())):
            raise ValueError(
                f"the statistics of {min(norms)!r} were never updated (mean 0, variance 1): train the "
                "model, or load them with its parameters, before it is fused"
            )

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.conv.kernel_size)

    def probe(self) -> Array:
        """An input to compare on where no example is given."""
        extents = _extents(self.conv)
        shape = (2, *(2 * n + 3 for n in extents), self.conv.in_features)
        return jnp.asarray(
            np.random.default_rng(0).normal(size=shape), _dtype(self.conv, jnp.float32)
        )

    def fused(self, x: Array) -> tuple[nnx.Conv, reparam.FusedLayer]:
        """The plain convolution, and how it compares with the unit on x [..., *spatial, in_features].

        Raises:
          ValueError: they differ by more than rounding allows.
        """
        x = jnp.asarray(x, _dtype(self.conv, x.dtype)).reshape(
            (-1, *x.shape[x.ndim - self.rank - 1 :])
        )
        size, dilation = self.conv.kernel_size, _per_axis(self.conv, "kernel_dilation")
        node = self.node()
        merged = reparam.fuse(node, size)
        plain = plain_conv(self.conv, merged)
        padded, padding = pad_by_mode(x, self.conv.padding, size, dilation)
        with jax.default_matmul_precision("highest"):
            error = largest_difference(self(x), plain(x))
            bound = reparam.error_bound(
                node,
                padded,
                strides=_per_axis(self.conv, "strides"),
                padding=padding,
                dilation=dilation,
                kernel_size=size,
                fused=merged,
            )
        layers = (self.conv,) if self.norm is None else (self.conv, self.norm)
        found = reparam.FusedLayer(
            self.layer,
            len(self.conv.parts()) if isinstance(self.conv, Branched) else 1,
            error,
            float(bound),
            sum(map(variables, layers)),
            variables(plain),
            flops(self, x),
            flops(plain, x),
        )
        return plain, within_bound(found)


def within_bound(found: reparam.FusedLayer) -> reparam.FusedLayer:
    """The comparison itself, or an error if it shows another function."""
    # Not "error > bound": that would let NaN pass.
    if not found.max_error <= found.bound:
        raise ValueError(
            f"fused and unfused {found.layer or 'model'!r} differ by {found.max_error:.3g}, where rounding "
            f"allows {found.bound:.3g}: it is not fused; please report this with the layer"
        )
    return found


def largest_difference(a: Any, b: Any) -> float:
    """max |a - b| over all floating leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [
        (jnp.asarray(x, _tree.wide_dtype(x, y)), jnp.asarray(y, _tree.wide_dtype(x, y)))
        for x, y in pairs
    ]
    return max((float(jnp.max(jnp.abs(x - y))) for x, y in wide if x.size), default=0.0)


def variables(module: nnx.Module) -> int:
    """Number of parameters and running statistics."""
    return count(nnx.state(module, (nnx.Param, nnx.BatchStat)))


def count(tree: Any) -> int:
    """Number of entries of all arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops(fn: Any, *inputs: Any) -> int:
    """Floating-point operations of fn(*inputs)."""
    return measure.flops(_jaxpr.trace(fn, *inputs)[0].jaxpr)


def _untouched(norm: Any) -> bool:
    return bool(jnp.all(norm.mean[...] == 0) & jnp.all(norm.var[...] == 1))


def _dtype(conv: Any, dtype: Any) -> Any:
    return layer_dtypes(conv).compute or dtype


def _per_axis(conv: Any, name: str) -> tuple[int, ...]:
    return geometry.per_axis(name, getattr(conv, name) or 1, len(conv.kernel_size))


def _extents(conv: Any) -> list[int]:
    dilation = _per_axis(conv, "kernel_dilation")
    return [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, dilation, strict=True)]
