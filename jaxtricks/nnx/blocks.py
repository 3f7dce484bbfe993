"""Blocks of branches that train in parallel and deploy as one convolution."""

from collections.abc import Sequence

from flax import nnx

from jaxtricks.nnx.branch import Branch, Branched, Factory, Size, two_axes
from jaxtricks.reparam import geometry

__all__ = ["ACBlock", "RepVGGBlock", "lines", "two_axes"]


class ACBlock(Branched):
    """Asymmetric convolution block: KxK, Kx1 and 1xK branches, each with its normalization, summed.

    y = norm(conv_KxK(x)) + norm(conv_Kx1(x)) + norm(conv_1xK(x)). It stands for a convolution *and* its
    normalization. The small kernels are centred on the KxK kernel's centre tap and derive their padding
    from it, so that `fused()` is exact for every stride, padding, dilation, group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: (kh, kw), of the KxK branch and of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a partial.
      norm: factory of the normalizations, called norm(features, scale_init=..., rngs=...): nnx.BatchNorm,
        ExtendedBatchNorm, or a partial.
      gamma_init: initial scale of the normalizations.
      rngs: keys; "params" is used.

    Variables: {square, vertical, horizontal}/conv/kernel and /norm/{scale, bias, mean, var}.

    Raises:
      ValueError: a kernel size without two axes, or padding that is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = ACBlock(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 8, 8, 3))).shape
      (1, 4, 4, 8)

    References:
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: geometry.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        gamma_init: float = 1.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
        )

        def branch(size: Size) -> Branch:
            layer = self.convolution(conv, size, rngs)
            scale_init = nnx.initializers.constant(gamma_init)
            return Branch(layer, norm(out_features, scale_init=scale_init, rngs=rngs))

        self.square, self.vertical, self.horizontal = map(branch, lines(self.kernel_size))

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of the square, vertical and horizontal branch."""
        branches = (self.square, self.vertical, self.horizontal)
        return list(zip(lines(self.kernel_size), branches, strict=True))


class RepVGGBlock(Branched):
    """RepVGG's block: KxK, 1x1 and identity branches, each with its normalization, summed.

    y = norm(conv_KxK(x)) + norm(conv_1x1(x)) + norm(x), the last where it has the shape of the others: with
    as many features in as out, and stride 1. It stands for a convolution *and* its normalization; networks
    put an activation behind it. The 1x1 kernel and the identity lie at the KxK kernel's centre tap, so that
    `fused()` is exact for every stride, padding, dilation, group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: (kh, kw), of the KxK branch and of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a partial.
      norm: factory of the normalizations, called norm(features, rngs=...): nnx.BatchNorm,
        ExtendedBatchNorm, or a partial.
      rngs: keys; "params" is used.

    Variables: {square, point}/conv/kernel, {square, point, identity}/norm/{scale, bias, mean, var}.

    Raises:
      ValueError: a kernel size without two axes, or padding that is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = RepVGGBlock(8, 8, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 6, 6, 8))).shape, block.fused().kernel.shape
      ((1, 6, 6, 8), (3, 3, 8, 8))

    References:
      Ding, Zhang, Ma, Han, Ding, Sun, "RepVGG", arXiv 2101.03697, section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: geometry.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
        )

        def branch(size: Size) -> Branch:
            return Branch(self.convolution(conv, size, rngs), norm(out_features, rngs=rngs))

        self.square, self.point = branch(self.kernel_size), branch((1, 1))
        passes = in_features == out_features and self.strides == (1, 1)
        self.identity = Branch(None, norm(out_features, rngs=rngs)) if passes else None

    def parts(self) -> list[tuple[Size, Branch]]:
        """(kernel size, branch) of the KxK, 1x1 and, where there is one, identity branch."""
        parts = [(self.kernel_size, self.square), ((1, 1), self.point)]
        return parts if self.identity is None else [*parts, ((1, 1), self.identity)]


def lines(kernel_size: Size) -> list[Size]:
    """Kernel sizes of the square, vertical and horizontal branch."""
    height, width = kernel_size
    return [(height, width), (height, 1), (1, width)]
