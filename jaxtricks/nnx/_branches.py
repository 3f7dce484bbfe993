"""Blocks of branches, each a convolution and a normalization: what they share."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _integers, _tree, reparam
from jaxtricks._typing import Array
from jaxtricks.nnx import start
from jaxtricks.nnx._conv import convolution, hashable_padding
from jaxtricks.nnx.parts import Branch, First, Pool, Size, frozen_norm
from jaxtricks.nnx.plain import plain_conv
from jaxtricks.reparam import geometry

Factory = Callable[..., Any]
Mode = str


class Branched(nnx.Module):
    """A sum of branches that share one window; subclasses make them and list them in `parts`.

    In mode "branches" each branch has its normalization. In mode "online" it has a gain per channel instead,
    every step makes one kernel of all branches, and `norm` stands behind the one convolution.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one size per spatial axis, of the window and of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the window.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions.
      norm: factory of the normalizations.
      mode: "branches" or "online".
      rngs: keys; "params" is used.

    Raises:
      ValueError: a kernel size without one to three axes, or padding that is not zeros.
    """

    least_axes = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: geometry.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_features(name, in_features, out_features, feature_group_count)
        check_mode(name, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = window(kernel_size, name, self.least_axes)
        axes = len(self.kernel_size)
        self.strides = geometry.per_axis("strides", strides or 1, axes)
        self.padding = hashable_padding(padding)
        self.kernel_dilation = geometry.per_axis("kernel_dilation", kernel_dilation or 1, axes)
        self.feature_group_count = feature_group_count
        self.mode = mode
        # Padding that no branch can derive its own from fails here, not in the first step.
        size = self.kernel_size
        geometry.resolve(self.padding, size, size, self.strides, self.kernel_dilation)
        self._make(Maker(self, conv, norm, rngs))
        self.norm = norm(out_features, rngs=rngs) if mode == "online" else None

    def _make(self, make: "Maker") -> None:
        """Set the branches as attributes."""
        raise NotImplementedError

    def parts(self) -> list[tuple[Size, Branch]]:
        """(effective kernel size, branch) of every branch, the one with the largest kernel first."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "..."], use_running_average: bool | None = None
    ) -> Float[Array, "..."]:
        """[..., *spatial, in_features] -> [..., *spatial', out_features].

        Args:
          x: the input.
          use_running_average: overrides the normalizations' own setting for this call.
        """
        if self.norm is not None:
            mode = (
                {} if use_running_average is None else {"use_running_average": use_running_average}
            )
            return self.norm(self._one_convolution(x), **mode)
        size, dilation = self.kernel_size, self.kernel_dilation
        spatial = x.shape[x.ndim - len(size) - 1 : -1]
        pads = geometry.resolve(self.padding, spatial, size, self.strides, dilation)
        outputs = [
            branch(x, geometry.place(pads, size, own, dilation), use_running_average)
            for own, branch in self.parts()
        ]
        return functools.reduce(operator.add, outputs)

    def _sum(self) -> reparam.Sum:
        return reparam.Sum(*(branch.node() for _, branch in self.parts()))

    def _one_convolution(self, x: Array) -> Array:
        """All branches as one convolution, before the one normalization."""
        merged = reparam.fuse(self._sum(), self.kernel_size)
        (_, first), *_ = self.parts()
        return convolution(
            x,
            merged.kernel,
            merged.bias,
            dtype=_tree.common_dtype(x, first.conv.kernel[...], given=first.conv.dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=merged.groups,
            precision=first.conv.precision,
        )

    def branches(self) -> reparam.Sum | reparam.Sequential:
        """The block as a node of `reparam`, with its current statistics (evaluation mode).

        reparam.apply(block.branches(), x, strides=block.strides, padding=block.padding,
        dilation=block.kernel_dilation) is the block's output.

        Returns:
          A Sum of the branches; in online mode that and the normalization behind it.

        Raises:
          ValueError: a normalization without running statistics.
        """
        branches = self._sum()
        if self.norm is None:
            return branches
        return reparam.Sequential(branches, frozen_norm(self.norm))

    def fused(self) -> nnx.Conv:
        """A plain nnx.Conv that computes what the block computes in evaluation mode.

        Raises:
          ValueError: a normalization without running statistics.
        """
        return plain_conv(self, reparam.fuse(self.branches(), self.kernel_size))

    def start_from(
        self, kernel: Float[Array, "..."], bias: Float[Array, " out"] | None = None
    ) -> None:
        """Set the variables so that in evaluation the block computes conv(x, kernel) + bias.

        Running statistics become those of white input of unit variance (mean 0, variance the sum of squares
        of what comes before the normalization), so that training starts close to the same function. Of B
        branches each but the first gets 1/B of the output's standard deviation; the first, with the
        largest kernel, gets what is missing (`reparam.unfuse`).

        Args:
          kernel: [*kernel_size, in / groups, out].
          bias: [out]; None = zeros.

        Raises:
          ValueError: another shape, standardized kernels (whose mean is always 0), or normalizations
            without scale, bias or running statistics.
        """
        start.start_from(self, kernel, bias)


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the branches of one block."""

    block: Branched
    conv: Factory
    norm: Factory
    rngs: nnx.Rngs

    def branch(
        self, size: Size, *, dilation: int = 1, first: First | None = None, scale: float = 1.0
    ) -> Branch:
        """A convolution of this size, and what stands behind it."""
        ins = self.block.in_features if first is None else first.features
        layer = self._convolution(ins, size, dilation)
        return self._branch(layer, scale, first=first, dilation=dilation)

    def identity(self) -> Branch | None:
        """A normalization alone; None unless it has the shape of the others."""
        block = self.block
        same = block.in_features == block.out_features and set(block.strides) == {1}
        return self._branch(None, 1.0) if same else None

    def pool(self, first: First | None) -> Branch:
        """An average over the window."""
        block = self.block
        layer = Pool(block.kernel_size, block.strides, block.kernel_dilation)
        # In online mode the gain makes of white input what a normalization would.
        count = functools.reduce(operator.mul, block.kernel_size)
        scale = count**0.5 if block.mode == "online" else 1.0
        return self._branch(layer, scale, first=first)

    def first(self, features: int, *, residual: bool) -> First:
        """A 1x1 convolution in front; with `residual` it starts as the identity."""
        block, axes = self.block, len(self.block.kernel_size)
        init = {"kernel_init": nnx.initializers.zeros_init()} if residual else {}
        layer = self.conv(
            block.in_features,
            features,
            (1,) * axes,
            padding="VALID",
            feature_group_count=block.feature_group_count,
            use_bias=False,
            rngs=self.rngs,
            **init,
        )
        return First(layer, *self._behind(features, 1.0), residual)

    def _branch(self, layer: Any, scale: float, **how: Any) -> Branch:
        features = self.block.out_features
        return Branch(layer, *self._behind(features, scale), features=features, **how)

    def _behind(self, features: int, scale: float) -> tuple[Any, Any]:
        """(normalization, None), or in online mode (None, gain)."""
        if self.block.mode == "online":
            return None, nnx.Param(jnp.full(features, scale, jnp.float32))
        init = {} if scale == 1.0 else {"scale_init": nnx.initializers.constant(scale)}
        return self.norm(features, rngs=self.rngs, **init), None

    def _convolution(self, ins: int, size: Size, dilation: int) -> Any:
        """It expects an input that is padded already."""
        block = self.block
        return self.conv(
            ins,
            block.out_features,
            size,
            strides=block.strides,
            padding="VALID",
            kernel_dilation=tuple(d * dilation for d in block.kernel_dilation),
            feature_group_count=block.feature_group_count,
            use_bias=False,
            rngs=self.rngs,
        )


def window(kernel_size: int | Sequence[int], name: str, least: int = 1) -> Size:
    """One size per spatial axis, or an error that names the block."""
    size = _integers.listed(kernel_size)
    if not least <= len(size) <= 3:
        raise ValueError(
            f"{name}: `kernel_size` is {kernel_size}; give {least} to 3 sizes, such as (height, width)"
        )
    return geometry.per_axis("kernel_size", size, len(size))


def check_mode(name: str, mode: str) -> None:
    """Raise if the mode is unknown."""
    if mode not in ("branches", "online"):
        raise ValueError(f"{name}: `mode` is {mode!r}; give 'branches' or 'online'")


def check_features(name: str, ins: int, outs: int, groups: int) -> None:
    """Raise if the groups do not divide the channels."""
    if groups < 1 or ins % groups or outs % groups:
        raise ValueError(
            f"{name}: `feature_group_count` {groups} divides not both {ins} and {outs} features"
        )
