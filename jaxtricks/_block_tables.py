"""Describe the re-parameterization blocks as tables, a row per branch, without Flax.

`jt.nnx` and `jt.linen` build their blocks from these tables.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Size = tuple[int, ...]
Mode = str
"""One of "branches" and "online"; see `jt.nnx.ACBlock`."""


class PointwiseSpec(NamedTuple):
    """A 1x1 convolution and its normalization in front of the kernel of a branch.

    Attributes:
      features: channels of its output.
      residual: whether its input is added to the output of the convolution, whose
        kernel then starts at zero.
    """

    features: int
    residual: bool


class BranchSpec(NamedTuple):
    """One row of a block's table: a branch that ends in a normalization.

    Attributes:
      name: of the branch among the variables of the block.
      kind: what comes before the normalization: a convolution, a mean over the window,
        or nothing.
      size: of its kernel or window, per spatial axis.
      dilation: of its kernel, beyond that of the block.
      first: what comes in front of its kernel, if anything.
      scale: initial scale of its normalization.
    """

    name: str
    kind: Literal["conv", "pool", "identity"]
    size: Size
    dilation: int = 1
    first: PointwiseSpec | None = None
    scale: float = 1.0

    @property
    def extent(self) -> Size:
        """Effective kernel size, dilation included."""
        return tuple(self.dilation * (k - 1) + 1 for k in self.size)

    @property
    def initial_gain(self) -> float:
        """Initial gain per channel where no normalization follows the branch."""
        # For white input the mean over n taps has a standard deviation of 1 / sqrt(n),
        # which a normalization would undo.
        return (
            math.prod(self.size) ** 0.5 if self.kind == "pool" else self.scale
        )


class BlockGeometry(NamedTuple):
    """Channels, window and strides that all branches of a block have.

    Attributes:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: of the window, which is that of the fused convolution.
      strides: per spatial axis.
      dilation: per spatial axis.
      groups: number of feature groups.
    """

    in_features: int
    out_features: int
    kernel_size: Size
    strides: Size
    dilation: Size
    groups: int

    @property
    def ones(self) -> Size:
        """The size of a 1x1 kernel."""
        return (1,) * len(self.kernel_size)

    @property
    def keeps_shape(self) -> bool:
        """Whether an identity branch has the shape of the other branches."""
        same_features = self.in_features == self.out_features
        return same_features and set(self.strides) == {1}

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel has a group to itself."""
        return self.groups == self.out_features


Table = tuple[BranchSpec, ...]
"""The branches of a block, the one with the largest kernel first."""


def asymmetric_branches(block: BlockGeometry, *, gamma_init: float) -> Table:
    """Return the table of ACBlock: the whole kernel, and one line along each axis."""
    size = block.kernel_size
    rows = [BranchSpec("square", "conv", size, scale=gamma_init)]
    names = ("depth", "vertical", "horizontal")[-len(size) :]
    for axis, name in enumerate(names):
        line = tuple(k if i == axis else 1 for i, k in enumerate(size))
        rows.append(BranchSpec(name, "conv", line, scale=gamma_init))
    return tuple(rows)


def repvgg_branches(block: BlockGeometry) -> Table:
    """Return the table of RepVGGBlock: KxK, 1x1, and the identity where it fits."""
    square = BranchSpec("square", "conv", block.kernel_size)
    point = BranchSpec("point", "conv", block.ones)
    return (square, point, *_identity(block))


def mobileone_branches(block: BlockGeometry, *, num_branches: int) -> Table:
    """Return the table of MobileOneBlock: several KxK, 1x1 if K > 1, and the identity.

    Raises:
      ValueError: `num_branches` is smaller than 1.
    """
    if num_branches < 1:
        raise ValueError(
            f"MobileOneBlock: `num_branches` is {num_branches}; give at least 1"
        )
    names = [f"square_{i}" for i in range(num_branches)]
    squares = [BranchSpec(name, "conv", block.kernel_size) for name in names]
    has_point = math.prod(block.kernel_size) > 1
    points = [BranchSpec("point", "conv", block.ones)] if has_point else []
    return (*squares, *points, *_identity(block))


def diverse_branches(
    block: BlockGeometry, *, internal_features: int | None
) -> Table:
    """Return the table of DiverseBranchBlock: KxK, 1x1, 1x1-average and 1x1-KxK.

    Args:
      block: geometry of the block.
      internal_features: channels between 1x1 and KxK; None = as many as the input has,
        depthwise twice that.

    Raises:
      ValueError: `internal_features` is not a multiple of the groups.
    """
    features = internal_features
    if features is None:
        features = block.in_features * (2 if block.is_depthwise else 1)
    if features < 1 or features % block.groups:
        raise ValueError(
            f"DiverseBranchBlock: `internal_features` is {features}; give a "
            f"multiple of the {block.groups} groups"
        )
    inner = PointwiseSpec(features, residual=features == block.in_features)
    size = block.kernel_size
    square = BranchSpec("square", "conv", size)
    sequence = BranchSpec("sequence", "conv", size, first=inner)
    if block.is_depthwise:
        # A 1x1 kernel per channel is a scale, which the normalizations have already.
        return (square, BranchSpec("pool", "pool", size), sequence)
    before_pool = PointwiseSpec(block.out_features, residual=False)
    point = BranchSpec("point", "conv", block.ones)
    pool = BranchSpec("pool", "pool", size, first=before_pool)
    return (square, point, pool, sequence)


DILATED_KERNELS = {
    5: ((3, 3), (1, 2)),
    7: ((5, 3, 3), (1, 2, 3)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
}
"""UniRepLKNet's {large kernel: (sizes, dilations) of the small kernels beside it}."""


def dilated_branches(
    block: BlockGeometry,
    *,
    kernel_sizes: Sequence[int] | None,
    dilates: Sequence[int] | None,
) -> Table:
    """Return the table of DilatedReparamBlock: a large kernel and dilated small ones.

    Args:
      block: geometry of the block.
      kernel_sizes: of the small kernels; None = those of the paper.
      dilates: their dilations; None = those of the paper.

    Raises:
      ValueError: only one of the two is given, a small kernel reaches beyond the large
        one, or the paper has no small kernels for this size.
    """
    large = block.kernel_size
    if kernel_sizes is None and dilates is None:
        if len(set(large)) != 1 or large[0] not in DILATED_KERNELS:
            raise ValueError(
                f"DilatedReparamBlock: no default for `kernel_size` {large}; "
                f"give one of {sorted(DILATED_KERNELS)} per axis, or "
                "`kernel_sizes` and `dilates`"
            )
        kernel_sizes, dilates = DILATED_KERNELS[large[0]]
    if (
        kernel_sizes is None
        or dilates is None
        or len(kernel_sizes) != len(dilates)
    ):
        raise ValueError(
            "DilatedReparamBlock: give `kernel_sizes` and `dilates` together, "
            "one dilation per size"
        )
    rows = [BranchSpec("large", "conv", large)]
    for i, (k, dilation) in enumerate(zip(kernel_sizes, dilates, strict=True)):
        reach = dilation * (k - 1) + 1
        if k < 1 or dilation < 1 or reach > min(large):
            raise ValueError(
                f"DilatedReparamBlock: a kernel of {k} with dilation "
                f"{dilation} reaches over {reach} inputs, the large kernel "
                f"over {large}; give smaller `kernel_sizes` or `dilates`"
            )
        size = (k,) * len(large)
        rows.append(BranchSpec(f"dilated_{i}", "conv", size, dilation))
    return tuple(rows)


def _identity(block: BlockGeometry) -> Table:
    if not block.keeps_shape:
        return ()
    return (BranchSpec("identity", "identity", block.ones),)


def check_mode(name: str, mode: str) -> None:
    """Raise ValueError unless the mode is "branches" or "online"."""
    if mode not in ("branches", "online"):
        raise ValueError(
            f"{name}: `mode` is {mode!r}; give 'branches' or 'online'"
        )
