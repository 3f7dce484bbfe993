"""ACNet's and RepVGG's blocks: branches that train in parallel and deploy as one convolution."""

import math
from collections.abc import Sequence

from flax import nnx

from jaxtricks import _integers
from jaxtricks.nnx._branches import Branch, Branched, Factory, Maker, Mode, Size
from jaxtricks.reparam import _nodes


class ACBlock(Branched):
    """Asymmetric convolution block: KxK, Kx1 and 1xK branches, each with its normalization, summed.

    y = norm(conv_KxK(x)) + norm(conv_Kx1(x)) + norm(conv_1xK(x)), with three axes a
    cube and one line per axis. It stands for a convolution *and* its normalization. The
    small kernels are centred on the KxK kernel's centre tap and derive their padding
    from it, so that `fused()` is exact for every stride, padding, dilation, group count
    and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: (kh, kw) or (kd, kh, kw), of the KxK branch and of the fused
        convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions, called like nnx.Conv: nnx.Conv,
        WSConv, or a partial.
      norm: factory of the normalizations, called norm(features, scale_init=...,
        rngs=...): nnx.BatchNorm, ExtendedBatchNorm, or a partial.
      gamma_init: initial scale of the branches' normalizations (online: of their
        gains).
      mode: "branches", or "online" for one convolution a step: a gain per channel in
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
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3. Hu, Feng, Hua, Lai,
      Huang, Gong, Xu, "Online Convolutional Re-parameterization", CVPR 2022 (the online
      mode).
    """

    least_axes = 2

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: _nodes.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        gamma_init: float = 1.0,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        self.gamma_init = gamma_init
        # pylint: disable=duplicate-code # what every Branched takes is handed on
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def _make(self, make: Maker) -> None:
        for name, size in lines(self.kernel_size).items():
            setattr(self, name, make.branch(size, scale=self.gamma_init))

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of the square branch and of the lines."""
        return [
            (size, getattr(self, name))
            for name, size in lines(self.kernel_size).items()
        ]


class RepVGGBlock(Branched):
    """RepVGG's block: KxK, 1x1 and identity branches, each with its normalization, summed.

    y = norm(conv_KxK(x)) + norm(conv_1x1(x)) + norm(x), the last where it has the shape
    of the others: with as many features in as out, and stride 1. It stands for a
    convolution *and* its normalization; networks put an activation behind it. The 1x1
    kernel and the identity lie at the KxK kernel's centre tap, so that `fused()` is
    exact for every stride, padding, dilation, group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis, of the KxK branch
        and of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions, called like nnx.Conv: nnx.Conv,
        WSConv, or a partial.
      norm: factory of the normalizations, called norm(features, rngs=...):
        nnx.BatchNorm, ExtendedBatchNorm, or a partial.
      mode: "branches" or "online", as in `ACBlock`.
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

    def _make(self, make: Maker) -> None:
        self.square = make.branch(self.kernel_size)
        self.point = make.branch((1,) * len(self.kernel_size))
        self.identity = make.identity()

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of the KxK, 1x1 and, where there is one, identity branch."""
        ones = (1,) * len(self.kernel_size)
        parts = [(self.kernel_size, self.square), (ones, self.point)]
        return parts if self.identity is None else [*parts, (ones, self.identity)]


def lines(kernel_size: Size) -> dict[str, Size]:
    """Kernel sizes of the square branch and of one line per axis."""
    names = ("depth", "vertical", "horizontal")[-len(kernel_size) :]
    along = {
        name: tuple(k if i == axis else 1 for i, k in enumerate(kernel_size))
        for axis, name in enumerate(names)
    }
    return {"square": kernel_size, **along}


# The blocks of Diverse Branch Block, MobileOne and UniRepLKNet.


DILATED = {
    5: ((3, 3), (1, 2)),
    7: ((5, 3, 3), (1, 2, 3)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
}
"""UniRepLKNet's kernel sizes and dilations beside a large kernel."""


class DiverseBranchBlock(Branched):
    """Diverse branch block: KxK, 1x1, 1x1-average and 1x1-KxK branches, normalized and summed.

    y = norm(conv_KxK(x)) + norm(conv_1x1(x)) + norm(mean(norm(conv_1x1(x))))
        + norm(conv_KxK(norm(conv_1x1(x)))).

    The map between the two parts of a branch is padded with its own value on zero
    input, by the running statistics as they are after the step and without gradient: so
    `fused()` is exact in evaluation. The first 1x1 kernel of the last branch is W + I
    with W = 0 at first where it keeps the number of channels. Depthwise (as many groups
    as outputs), there is no 1x1 branch and the average is of the input.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a
        partial.
      norm: factory of the normalizations, called norm(features, rngs=...), with running
        statistics: nnx.BatchNorm, ExtendedBatchNorm, or a partial.
      internal_features: channels between 1x1 and KxK; None = in_features, depthwise
        twice that.
      mode: "branches" or "online", as in `ACBlock`.
      rngs: keys; "params" is used.

    Variables: {square, point, sequence}/conv/kernel, {pool,
    sequence}/first/conv/kernel, and norm/{scale, bias, mean, var} beside each kernel
    and in pool; in online mode gain in place of each norm, and norm/.

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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: _nodes.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        internal_features: int | None = None,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        self.internal_features = internal(
            in_features, out_features, feature_group_count, internal_features
        )
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def _make(self, make: Maker) -> None:
        depthwise = self.feature_group_count == self.out_features
        inside = self.internal_features
        self.square = make.branch(self.kernel_size)
        self.point = None if depthwise else make.branch((1,) * len(self.kernel_size))
        self.pool = make.pool(
            None if depthwise else make.first(self.out_features, residual=False)
        )
        first = make.first(inside, residual=inside == self.in_features)
        self.sequence = make.branch(self.kernel_size, first=first)

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of the KxK, 1x1 (if any), average and 1x1-KxK branch."""
        ones = (1,) * len(self.kernel_size)
        point = [] if self.point is None else [(ones, self.point)]
        size = self.kernel_size
        return [(size, self.square), *point, (size, self.pool), (size, self.sequence)]


class MobileOneBlock(Branched):
    """MobileOne's block: several KxK branches, a 1x1 branch and the identity, normalized and summed.

    y = sum_i norm_i(conv_KxK_i(x)) + norm(conv_1x1(x)) + norm(x); the 1x1 branch where
    K > 1, the identity where it has the shape of the others. It stands for a
    convolution *and* its normalization.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a
        partial.
      norm: factory of the normalizations, called norm(features, rngs=...):
        nnx.BatchNorm, ExtendedBatchNorm, or a partial.
      num_branches: number of KxK branches.
      mode: "branches" or "online", as in `ACBlock`.
      rngs: keys; "params" is used.

    Variables: {square_0, ..., point}/conv/kernel, {square_0, ..., point,
    identity}/norm/{scale, bias, mean, var}; in online mode gain in place of each norm,
    and norm/{scale, bias, mean, var}.

    Raises:
      ValueError: no branches, a kernel size without one to three axes, or padding that
        is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = MobileOneBlock(4, 4, (3, 3), num_branches=2, feature_group_count=4, rngs=nnx.Rngs(0))
      >>> len(block.parts()), block.fused().kernel.shape
      (4, (3, 3, 1, 4))

    References:
      Vasu, Gabriel, Zhu, Tuzel, Ranjan, "MobileOne", arXiv 2206.04040, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: _nodes.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        num_branches: int = 4,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        if num_branches < 1:
            raise ValueError(
                f"MobileOneBlock: `num_branches` is {num_branches}; give at least 1"
            )
        self.num_branches = num_branches
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def _make(self, make: Maker) -> None:
        for i in range(self.num_branches):
            setattr(self, f"square_{i}", make.branch(self.kernel_size))
        ones = (1,) * len(self.kernel_size)
        self.point = make.branch(ones) if math.prod(self.kernel_size) > 1 else None
        self.identity = make.identity()

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of the KxK branches, and of the 1x1 and identity branch if any."""
        ones = (1,) * len(self.kernel_size)
        squares = [
            (self.kernel_size, getattr(self, f"square_{i}"))
            for i in range(self.num_branches)
        ]
        small = [(ones, b) for b in (self.point, self.identity) if b is not None]
        return squares + small


class DilatedReparamBlock(Branched):
    """UniRepLKNet's block: a large kernel and dilated small ones, each with its normalization, summed.

    y = norm(conv_KxK(x)) + sum_i norm_i(conv_{k_i, dilation d_i}(x)), depthwise unless
    said otherwise. A dilated kernel is a large one with zeros between its taps, so that
    the sum is one KxK convolution.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis, of the large
        kernel.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the large kernel.
      kernel_dilation: of all branches, an int or one per spatial axis.
      feature_group_count: groups; None = depthwise, in_features.
      conv: factory of the convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a
        partial.
      norm: factory of the normalizations, called norm(features, rngs=...):
        nnx.BatchNorm, ExtendedBatchNorm, or a partial.
      kernel_sizes: of the small kernels; None = the paper's for 5, 7, 9, 11, 13, 15 and
        17.
      dilates: their dilations; None = the paper's.
      mode: "branches" or "online", as in `ACBlock`.
      rngs: keys; "params" is used.

    Variables: {large, dilated_0, ...}/conv/kernel and /norm/{scale, bias, mean, var};
    in online mode gain in place of each norm, and norm/{scale, bias, mean, var}.

    Raises:
      ValueError: small kernels that reach beyond the large one, as many dilations as
        sizes not given, or a kernel size for which the paper has none.

    Example:
      >>> import jax.numpy as jnp
      >>> block = DilatedReparamBlock(4, 4, (7, 7), rngs=nnx.Rngs(0))
      >>> len(block.parts()), block.fused().kernel.shape
      (4, (7, 7, 1, 4))

    References:
      Ding, Zhang, Ge, Zhao, Song, Yue, Shan, "UniRepLKNet", arXiv 2311.15599, section
      3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: _nodes.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int | None = None,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        kernel_sizes: Sequence[int] | None = None,
        dilates: Sequence[int] | None = None,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        self.small = small_kernels(kernel_size, kernel_sizes, dilates)
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count or in_features,
            conv=conv,
            norm=norm,
            mode=mode,
            rngs=rngs,
        )

    def _make(self, make: Maker) -> None:
        axes = len(self.kernel_size)
        self.large = make.branch(self.kernel_size)
        for i, (k, d) in enumerate(self.small):
            setattr(self, f"dilated_{i}", make.branch((k,) * axes, dilation=d))

    def parts(self) -> list[tuple[Size, Branch]]:
        """(effective kernel size, branch) of the large and the dilated branches."""
        axes = len(self.kernel_size)
        small = [
            ((d * (k - 1) + 1,) * axes, getattr(self, f"dilated_{i}"))
            for i, (k, d) in enumerate(self.small)
        ]
        return [(self.kernel_size, self.large), *small]


def internal(ins: int, outs: int, groups: int, given: int | None) -> int:
    """Channels between the 1x1 and the KxK kernel of a diverse branch block."""
    features = (2 * ins if groups == outs else ins) if given is None else given
    if features < 1 or features % groups:
        raise ValueError(
            f"DiverseBranchBlock: `internal_features` is {features}; give a multiple of the {groups} groups"
        )
    return features


def small_kernels(
    kernel_size: int | Sequence[int],
    sizes: Sequence[int] | None,
    dilates: Sequence[int] | None,
) -> tuple[tuple[int, int], ...]:
    """(size, dilation) of every kernel beside the large one."""
    large = _integers.listed(kernel_size)
    if sizes is None and dilates is None:
        if len(set(large)) != 1 or large[0] not in DILATED:
            raise ValueError(
                f"DilatedReparamBlock: no default for `kernel_size` {kernel_size}; give one of "
                f"{sorted(DILATED)} per axis, or `kernel_sizes` and `dilates`"
            )
        sizes, dilates = DILATED[large[0]]
    if sizes is None or dilates is None or len(sizes) != len(dilates):
        raise ValueError(
            "DilatedReparamBlock: give `kernel_sizes` and `dilates` together, one dilation per size"
        )
    small = tuple(zip(sizes, dilates, strict=True))
    for k, d in small:
        if k < 1 or d < 1 or d * (k - 1) + 1 > min(large):
            raise ValueError(
                f"DilatedReparamBlock: a kernel of {k} with dilation {d} reaches over {d * (k - 1) + 1} "
                f"inputs, the large kernel over {kernel_size}; give smaller `kernel_sizes` or `dilates`"
            )
    return small
