"""Blocks whose branches train in parallel and deploy as one convolution.

ACNet, RepVGG, Diverse Branch Block, MobileOne and UniRepLKNet: each is a table of
branches (`_block_tables`), which `ReparamBlock` builds.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _block_tables, _dtypes, _layer_functions, _layers, reparam
from jaxtricks._block_tables import (
    BlockGeometry,
    BranchSpec,
    Mode,
    PointwiseSpec,
)
from jaxtricks._layer_functions import BranchNodes, Padding, Pads
from jaxtricks._layers import Factory
from jaxtricks._typing import Array
from jaxtricks.nnx._conv import conv_node, is_standardized, plain_conv
from jaxtricks.nnx._norm import frozen_norm
from jaxtricks.reparam._nodes import zero_pad

# Branches.


class AveragePool(nnx.Module):
    """Mean over windows of an input that is padded already."""

    def __init__(self, block: BlockGeometry):
        self.size = block.kernel_size
        self.strides = block.strides
        self.dilation = block.dilation

    def __call__(self, x: Array) -> Array:
        """Map [..., *spatial, C] to [..., *spatial', C]."""
        return _layers.average_pool(x, self.size, self.strides, self.dilation)


class PointwiseNorm(nnx.Module):
    """1x1 convolution and normalization in front of the kernel of a branch.

    Its output is padded with its value on zero input, from the running statistics as
    they are after this step and without gradient: then branch and fused convolution
    agree at the border too.

    Attributes:
      conv: nnx.Conv or WSConv of kernel size 1.
      norm: normalizes its output; None in online mode.
      gain: [C] in place of `norm`; None in mode "branches".
      residual: whether the input is added to the output of the convolution.
      features: channels of the output; `jt.nnx.roles` reads it.
    """

    def __init__(self, conv: Any, norm: Any, gain: Any, residual: bool):
        self.conv = conv
        self.norm = norm
        self.gain = gain
        self.residual = residual
        self.features = conv.out_features

    def __call__(self, x: Array, pads: Pads, mode: dict[str, bool]) -> Array:
        """Return the normalized conv(x), padded."""
        y = self.conv(x)
        # In the dtype of the convolution, as a bias would be added.
        if self.residual:
            y = y + x.astype(y.dtype)
        y = self.norm(y, **mode)
        return _layer_functions.pad_with_zero_response(
            y, pads, frozen_norm(self.norm)
        )


class ConvNorm(nnx.Module):
    """A branch: a convolution without bias, or a pooling, or nothing; then a norm.

    Attributes:
      conv: nnx.Conv, WSConv or AveragePool, without padding; None for the identity.
      norm: normalizes its output; None in online mode.
      gain: [C] in place of `norm`; None in mode "branches".
      first: what stands in front of the convolution, or None.
      dilation: of the convolution beyond that of the block.
      features: channels of the output; `jt.nnx.roles` reads it.
    """

    def __init__(
        self,
        conv: Any,
        norm: Any,
        gain: Any,
        *,
        first: PointwiseNorm | None,
        dilation: int,
        features: int,
    ):
        self.conv = conv
        self.norm = norm
        self.gain = gain
        self.first = first
        self.dilation = dilation
        self.features = features

    def __call__(self, x: Array, pads: Pads, mode: dict[str, bool]) -> Array:
        """Return norm(conv(x)), with x padded by `pads`."""
        if self.first is None:
            x = zero_pad(x, pads)
        else:
            x = self.first(x, pads, mode)
        if self.conv is not None:
            x = self.conv(x)
        return self.norm(x, **mode)

    def nodes(self) -> BranchNodes:
        """Return the parts of the branch as nodes, with their current statistics."""
        # The strides are the block's: `reparam.apply` takes them beside the node.
        linear = None
        if isinstance(self.conv, AveragePool):
            linear = reparam.AvgPool(self.conv.size)
        elif self.conv is not None:
            linear = conv_node(self.conv, self.dilation)
        affine = _affine(self)
        if self.first is None:
            return BranchNodes(linear, affine)
        first = self.first
        return BranchNodes(
            linear,
            affine,
            conv_node(first.conv),
            _affine(first),
            first.residual,
        )

    def set_nodes(self, nodes: BranchNodes) -> None:
        """Write kernels and statistics that `nodes()` had."""
        _write_norm(self.norm, nodes.affine)
        if self.first is not None:
            _write_norm(self.first.norm, nodes.first_affine)


def _affine(part: Any) -> reparam.Norm | reparam.Scale:
    if part.norm is None:
        return reparam.Scale(part.gain[...])
    return frozen_norm(part.norm)


def _write_norm(norm: Any, node: reparam.Norm) -> None:
    for name in ("mean", "var", "scale", "bias"):
        getattr(norm, name)[...] = getattr(node, name)


# Blocks.


class ReparamBlock(nnx.Module):
    """A sum of branches that share one window, on whose centre tap each is placed.

    In mode "branches" each branch has its normalization. In mode "online" it has a gain
    per channel instead, every step merges all branches into one kernel, and `norm`
    stands behind the one convolution. Subclasses say in `table` which branches.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis, of the window and
        of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the window.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a
        partial of either.
      norm: factory of the normalizations, called norm(features, rngs=...):
        nnx.BatchNorm, ExtendedBatchNorm, or a partial of either.
      mode: "branches" or "online".
      rngs: keys; "params" is used.

    Raises:
      ValueError: a kernel size without one to three axes, or padding that is not zeros.
    """

    # Of the kernel; lines along each axis need two, for example.
    least_axes = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        block = _layer_functions.block_geometry(
            name,
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            groups=feature_group_count,
            least_axes=self.least_axes,
        )
        _block_tables.check_mode(name, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = block.kernel_size
        self.strides = block.strides
        self.padding = _layers.hashable_padding(padding)
        self.kernel_dilation = block.dilation
        self.feature_group_count = feature_group_count
        self.mode = mode
        # The attributes are set: `table` of a subclass may read all of them.
        builder = _Builder(block, conv, norm, mode, rngs)
        for spec in self.table():
            setattr(self, spec.name, builder.branch(spec))
        # Behind the sum of all branches, so that one convolution serves a step.
        self.norm = norm(out_features, rngs=rngs) if mode == "online" else None

    @property
    def geometry(self) -> BlockGeometry:
        """Channels, window and strides of all branches."""
        return BlockGeometry(
            self.in_features,
            self.out_features,
            self.kernel_size,
            self.strides,
            self.kernel_dilation,
            self.feature_group_count,
        )

    def table(self) -> _block_tables.Table:
        """Return the rows of the block's table, the one with the largest kernel first."""
        raise NotImplementedError

    def named_branches(self) -> dict[str, ConvNorm]:
        """Return the branches by name, in the order of the table."""
        return {spec.name: getattr(self, spec.name) for spec in self.table()}

    @property
    def largest_conv(self) -> Any:
        """The convolution with the largest kernel."""
        return getattr(self, self.table()[0].name).conv

    def __call__(
        self, x: Float[Array, "..."], use_running_average: bool | None = None
    ) -> Float[Array, "..."]:
        """Map [..., *spatial, in_features] to [..., *spatial', out_features].

        Args:
          x: the input.
          use_running_average: overrides the setting of the normalizations for this call.
        """
        # Without an argument each normalization keeps to its attribute.
        mode = {}
        if use_running_average is not None:
            mode["use_running_average"] = use_running_average
        if self.norm is not None:
            return self.norm(self._one_convolution(x), **mode)
        block = self.geometry
        # A dilated branch has its extent, not its size, centred on the window.
        outputs = []
        for spec in self.table():
            pads = _layer_functions.branch_pads(
                x, self.padding, block, spec.extent
            )
            outputs.append(getattr(self, spec.name)(x, pads, mode))
        return functools.reduce(operator.add, outputs)

    def _one_convolution(self, x: Array) -> Array:
        conv = self.largest_conv
        return _layer_functions.one_convolution(
            x,
            self._branch_nodes(),
            self.geometry,
            padding=self.padding,
            dtype=_dtypes.common_dtype(
                x, conv.kernel[...], override=conv.dtype
            ),
            precision=conv.precision,
        )

    def _branch_nodes(self) -> list[BranchNodes]:
        return [branch.nodes() for branch in self.named_branches().values()]

    def node(self) -> reparam.Sum | reparam.Sequential:
        """Return the block as a node of `reparam`, with its current statistics.

        The output of the block in evaluation is

            reparam.apply(
                block.node(),
                x,
                strides=block.strides,
                padding=block.padding,
                dilation=block.kernel_dilation,
            )

        Returns:
          A Sum of the branches; in online mode that and the normalization behind it.

        Raises:
          ValueError: a normalization without running statistics.
        """
        norm = None if self.norm is None else frozen_norm(self.norm)
        return _layer_functions.block_node(self._branch_nodes(), norm)

    def fused(self) -> nnx.Conv:
        """Return a plain nnx.Conv that computes what the block computes in evaluation.

        Raises:
          ValueError: a normalization without running statistics.
        """
        merged = reparam.fuse(self.node(), self.kernel_size)
        return plain_conv(self.largest_conv, self, merged)

    def start_from(
        self,
        kernel: Float[Array, "..."],
        bias: Float[Array, " out"] | None = None,
    ) -> None:
        """Set the variables so that in evaluation the block computes conv(x, kernel) + bias.

        The running statistics become those of white input of unit variance (mean 0,
        variance the sum of squares of what comes before the normalization), so that
        training starts close to the same function. Of B branches each but the first
        gets 1/B of the output's standard deviation; the first, with the largest kernel,
        gets what is missing (`reparam.unfuse`).

        Args:
          kernel: [*kernel_size, in / groups, out].
          bias: [out]; None = zeros.

        Raises:
          ValueError: another shape, standardized kernels (whose mean is always 0), or
            normalizations without scale, bias or running statistics.
        """
        name = f"{type(self).__name__}.start_from"
        # Standardizing removes the mean of every filter, whatever is written here.
        if is_standardized(self.largest_conv):
            raise ValueError(f"{name}: {_layer_functions.STANDARDIZED_START}")
        branches = self.named_branches()
        norms = [branch.norm for branch in branches.values()]
        if self.norm is not None:
            norms = [self.norm]
        _layer_functions.check_startable(
            name, [(type(norm).__name__, frozen_norm(norm)) for norm in norms]
        )
        nodes, norm_node = _layer_functions.start_from_convolution(
            self._branch_nodes(),
            None if self.norm is None else frozen_norm(self.norm),
            kernel,
            bias,
            self.geometry,
        )
        self.largest_conv.kernel[...] = nodes[0].linear.kernel
        # In online mode the gains stay as they are, and so do the other branches.
        if norm_node is not None:
            _write_norm(self.norm, norm_node)
            return
        for branch, branch_nodes in zip(branches.values(), nodes, strict=True):
            branch.set_nodes(branch_nodes)


class _Builder:
    """Builds the branches of one block from the rows of its table."""

    def __init__(
        self,
        block: BlockGeometry,
        conv: Factory,
        norm: Factory,
        mode: Mode,
        rngs: nnx.Rngs,
    ):
        self.block = block
        self.conv = conv
        self.norm = norm
        self.mode = mode
        self.rngs = rngs

    def branch(self, spec: BranchSpec) -> ConvNorm:
        # In this order, which decides what each layer draws from `rngs`.
        first = None if spec.first is None else self._pointwise(spec.first)
        layer = None
        if spec.kind == "conv":
            layer = self._convolution(spec)
        elif spec.kind == "pool":
            layer = AveragePool(self.block)
        features = self.block.out_features
        norm, gain = self._norm_or_gain(features, spec.scale, spec.initial_gain)
        return ConvNorm(
            layer,
            norm,
            gain,
            first=first,
            dilation=spec.dilation,
            features=features,
        )

    def _convolution(self, spec: BranchSpec) -> Any:
        block = self.block
        first = spec.first
        return self.conv(
            block.in_features if first is None else first.features,
            block.out_features,
            spec.size,
            strides=block.strides,
            padding="VALID",  # its input is padded already
            kernel_dilation=tuple(d * spec.dilation for d in block.dilation),
            feature_group_count=block.groups,
            use_bias=False,
            rngs=self.rngs,
        )

    def _pointwise(self, spec: PointwiseSpec) -> PointwiseNorm:
        init = {}
        if spec.residual:
            # kernel + identity starts as the identity.
            init["kernel_init"] = nnx.initializers.zeros_init()
        conv = self.conv(
            self.block.in_features,
            spec.features,
            self.block.ones,
            padding="VALID",
            feature_group_count=self.block.groups,
            use_bias=False,
            rngs=self.rngs,
            **init,
        )
        norm, gain = self._norm_or_gain(spec.features, 1.0, 1.0)
        return PointwiseNorm(conv, norm, gain, spec.residual)

    def _norm_or_gain(
        self, features: int, scale: float, initial_gain: float
    ) -> tuple[Any, Any]:
        if self.mode == "online":
            return None, nnx.Param(
                jnp.full(features, initial_gain, jnp.float32)
            )
        init = {}
        # Not passed otherwise: a partial may bind another initializer.
        if scale != 1.0:
            init["scale_init"] = nnx.initializers.constant(scale)
        return self.norm(features, rngs=self.rngs, **init), None


class ACBlock(ReparamBlock):
    """Asymmetric convolution block: KxK, Kx1 and 1xK branches, each normalized, summed.

    y = norm(conv_KxK(x)) + norm(conv_Kx1(x)) + norm(conv_1xK(x)), with three axes a
    cube and one line per axis. It stands for a convolution *and* its normalization. The
    small kernels are centred on the centre tap of the KxK kernel and derive their
    padding from it, so that `fused()` is exact for every stride, padding, dilation,
    group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: (kh, kw) or (kd, kh, kw), of the KxK branch and of the fused
        convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a
        partial of either.
      norm: factory of the normalizations, called norm(features, scale_init=...,
        rngs=...): nnx.BatchNorm, ExtendedBatchNorm, or a partial of either.
      gamma_init: initial scale of the normalizations of the branches (online: of their
        gains).
      mode: "branches", or "online" for one convolution per step: a gain per channel in
        each branch, the kernels added, and one normalization behind.
      rngs: keys; "params" is used.

    Variables: {square, vertical, horizontal}/conv/kernel and /norm/{scale, bias, mean,
      var}, with three axes depth/ too; in online mode /gain in place of each norm, and
      norm/{scale, bias, mean, var}.

    Raises:
      ValueError: a kernel size without two or three axes, or padding that is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = ACBlock(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 8, 8, 3))).shape
      (1, 4, 4, 8)

    References:
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3.
      Hu, Feng, Hua, Lai, Huang, Gong, Xu, "Online Convolutional Re-parameterization",
      CVPR 2022 (the online mode).
    """

    least_axes = 2

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        gamma_init: float = 1.0,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        self.gamma_init = gamma_init
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def table(self) -> _block_tables.Table:
        """Return the rows of the whole kernel and of one line along each axis."""
        return _block_tables.asymmetric_branches(
            self.geometry, gamma_init=self.gamma_init
        )


class RepVGGBlock(ReparamBlock):
    """RepVGG's block: KxK, 1x1 and identity branches, each normalized, summed.

    y = norm(conv_KxK(x)) + norm(conv_1x1(x)) + norm(x), the last where it has the shape
    of the others: with as many features in as out, and stride 1. It stands for a
    convolution *and* its normalization; networks put an activation behind it. The 1x1
    kernel and the identity lie at the centre tap of the KxK kernel, so that `fused()`
    is exact for every stride, padding, dilation, group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis; (3, 3) if absent.
      strides, padding, kernel_dilation, feature_group_count, conv, norm, mode: as in
        `ACBlock`.
      rngs: keys; "params" is used.

    Variables: {square, point}/conv/kernel, {square, point, identity}/norm/{scale, bias,
      mean, var}; in online mode {square, point, identity}/gain and norm/{scale, bias,
      mean, var}.

    Raises:
      ValueError: a kernel size without one to three axes, or padding that is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = RepVGGBlock(8, 8, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 6, 6, 8))).shape, block.fused().kernel.shape
      ((1, 6, 6, 8), (3, 3, 8, 8))

    References:
      Ding, Zhang, Ma, Han, Ding, Sun, "RepVGG", arXiv 2101.03697, section 3.
    """

    identity = None  # unless it has the shape of the others

    def table(self) -> _block_tables.Table:
        """Return the rows of the KxK, 1x1 and, where it fits, identity branch."""
        return _block_tables.repvgg_branches(self.geometry)


class DiverseBranchBlock(ReparamBlock):
    """Diverse branch block: KxK, 1x1, 1x1-average and 1x1-KxK branches, summed.

    y = norm(conv_KxK(x)) + norm(conv_1x1(x)) + norm(mean(norm(conv_1x1(x))))
        + norm(conv_KxK(norm(conv_1x1(x)))).

    The map between the two parts of a branch is padded with its value on zero input, by
    the running statistics as they are after the step and without gradient: so `fused()`
    is exact in evaluation. The first 1x1 kernel of the last branch is W + I with W = 0
    at first where it keeps the number of channels. Depthwise (as many groups as
    outputs), there is no 1x1 branch and the average is of the input.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides, padding, kernel_dilation, feature_group_count, conv, norm, mode: as in
        `ACBlock`; `norm` needs running statistics.
      internal_features: channels between 1x1 and KxK; None = in_features, depthwise
        twice that.
      rngs: keys; "params" is used.

    Variables: {square, point, sequence}/conv/kernel,
      {pool, sequence}/first/conv/kernel, and norm/{scale, bias, mean, var} beside each
      kernel and in pool; in online mode gain in place of each norm, and norm/.

    Raises:
      ValueError: a kernel size without one to three axes, padding that is not zeros, or
        groups that do not divide the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> block = DiverseBranchBlock(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 6, 6, 4))).shape, block.fused().kernel.shape
      ((2, 3, 3, 8), (3, 3, 4, 8))

    References:
      Ding, Zhang, Han, Ding, "Diverse Branch Block", arXiv 2103.13425, section 3.
    """

    point = None  # if depthwise

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        internal_features: int | None = None,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        self.internal_features = internal_features
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def table(self) -> _block_tables.Table:
        """Return the rows of the KxK, 1x1 (if any), average and 1x1-KxK branch."""
        return _block_tables.diverse_branches(
            self.geometry, internal_features=self.internal_features
        )


class MobileOneBlock(ReparamBlock):
    """MobileOne's block: several KxK branches, a 1x1 branch and the identity, summed.

    y = sum_i norm_i(conv_KxK_i(x)) + norm(conv_1x1(x)) + norm(x); the 1x1 branch where
    K > 1, the identity where it has the shape of the others. It stands for a
    convolution *and* its normalization.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides, padding, kernel_dilation, feature_group_count, conv, norm, mode: as in
        `ACBlock`.
      num_branches: number of KxK branches.
      rngs: keys; "params" is used.

    Variables: {square_0, ..., point}/conv/kernel, {square_0, ..., point,
      identity}/norm/{scale, bias, mean, var}; in online mode gain in place of each
      norm, and norm/{scale, bias, mean, var}.

    Raises:
      ValueError: no branches, a kernel size without one to three axes, or padding that
        is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = MobileOneBlock(4, 4, (3, 3), num_branches=2, feature_group_count=4, rngs=nnx.Rngs(0))
      >>> list(block.named_branches()), block.fused().kernel.shape
      (['square_0', 'square_1', 'point', 'identity'], (3, 3, 1, 4))

    References:
      Vasu, Gabriel, Zhu, Tuzel, Ranjan, "MobileOne", arXiv 2206.04040, section 3.
    """

    point = identity = None  # unless the table has them

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        num_branches: int = 4,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        self.num_branches = num_branches
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def table(self) -> _block_tables.Table:
        """Return the rows of the KxK branches, and of the 1x1 and identity branch if any."""
        return _block_tables.mobileone_branches(
            self.geometry, num_branches=self.num_branches
        )


class DilatedReparamBlock(ReparamBlock):
    """UniRepLKNet's block: a large kernel and dilated small ones, each normalized, summed.

    y = norm(conv_KxK(x)) + sum_i norm_i(conv_{k_i, dilation d_i}(x)), depthwise by
    default. A dilated kernel is a large one with zeros between its taps, so that the
    sum is one KxK convolution.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis, of the large
        kernel.
      strides, padding, kernel_dilation, conv, norm, mode: as in `ACBlock`.
      feature_group_count: groups; None = depthwise, in_features.
      kernel_sizes: of the small kernels; None = the paper's for 5, 7, 9, 11, 13, 15 and
        17.
      dilates: their dilations; None = the paper's.
      rngs: keys; "params" is used.

    Variables: {large, dilated_0, ...}/conv/kernel and /norm/{scale, bias, mean, var};
      in online mode gain in place of each norm, and norm/{scale, bias, mean, var}.

    Raises:
      ValueError: small kernels that reach beyond the large one, another number of
        dilations than of sizes, or a kernel size for which the paper has none.

    Example:
      >>> import jax.numpy as jnp
      >>> block = DilatedReparamBlock(4, 4, (7, 7), rngs=nnx.Rngs(0))
      >>> len(block.named_branches()), block.fused().kernel.shape
      (4, (7, 7, 1, 4))

    References:
      Ding, Zhang, Ge, Zhao, Song, Yue, Shan, "UniRepLKNet", arXiv 2311.15599, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int | None = None,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        kernel_sizes: Sequence[int] | None = None,
        dilates: Sequence[int] | None = None,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        # Tuples: nnx compares static attributes, and lists are not hashable.
        self.kernel_sizes = (
            None if kernel_sizes is None else tuple(kernel_sizes)
        )
        self.dilates = None if dilates is None else tuple(dilates)
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count or in_features,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def table(self) -> _block_tables.Table:
        """Return the rows of the large and the dilated branches."""
        return _block_tables.dilated_branches(
            self.geometry, kernel_sizes=self.kernel_sizes, dilates=self.dilates
        )
