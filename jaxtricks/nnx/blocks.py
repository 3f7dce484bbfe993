"""ACNet's and RepVGG's blocks: branches that train in parallel and deploy as one convolution."""

from collections.abc import Sequence

from flax import nnx

from jaxtricks.nnx._branches import Branched, Factory, Maker, Mode
from jaxtricks.nnx.parts import Branch, Size
from jaxtricks.reparam import geometry


class ACBlock(Branched):
    """Asymmetric convolution block: KxK, Kx1 and 1xK branches, each with its normalization, summed.

    y = norm(conv_KxK(x)) + norm(conv_Kx1(x)) + norm(conv_1xK(x)), with three axes a cube and one line per
    axis. It stands for a convolution *and* its normalization. The small kernels are centred on the KxK
    kernel's centre tap and derive their padding from it, so that `fused()` is exact for every stride,
    padding, dilation, group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: (kh, kw) or (kd, kh, kw), of the KxK branch and of the fused convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a partial.
      norm: factory of the normalizations, called norm(features, scale_init=..., rngs=...): nnx.BatchNorm,
        ExtendedBatchNorm, or a partial.
      gamma_init: initial scale of the branches' normalizations (online: of their gains).
      mode: "branches", or "online" for one convolution a step: a gain per channel in each branch, the
        kernels added, and one normalization behind.
      rngs: keys; "params" is used.

    Variables: {square, vertical, horizontal}/conv/kernel and /norm/{scale, bias, mean, var}, with three axes
    depth/ too; in online mode /gain in place of each norm, and norm/{scale, bias, mean, var}.

    Raises:
      ValueError: a kernel size without two or three axes, or padding that is not zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> block = ACBlock(3, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 8, 8, 3))).shape
      (1, 4, 4, 8)

    References:
      Ding, Guo, Ding, Han, "ACNet", arXiv 1908.03930, section 3. Hu, Feng, Hua, Lai, Huang, Gong, Xu,
      "Online Convolutional Re-parameterization", CVPR 2022 (the online mode).
    """

    least_axes = 2

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
        return [(size, getattr(self, name)) for name, size in lines(self.kernel_size).items()]


class RepVGGBlock(Branched):
    """RepVGG's block: KxK, 1x1 and identity branches, each with its normalization, summed.

    y = norm(conv_KxK(x)) + norm(conv_1x1(x)) + norm(x), the last where it has the shape of the others: with
    as many features in as out, and stride 1. It stands for a convolution *and* its normalization; networks
    put an activation behind it. The 1x1 kernel and the identity lie at the KxK kernel's centre tap, so that
    `fused()` is exact for every stride, padding, dilation, group count and input size.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis, of the KxK branch and of the fused
        convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions, called like nnx.Conv: nnx.Conv, WSConv, or a partial.
      norm: factory of the normalizations, called norm(features, rngs=...): nnx.BatchNorm,
        ExtendedBatchNorm, or a partial.
      mode: "branches" or "online", as in `ACBlock`.
      rngs: keys; "params" is used.

    Variables: {square, point}/conv/kernel, {square, point, identity}/norm/{scale, bias, mean, var}; in
    online mode {square, point, identity}/gain and norm/{scale, bias, mean, var}.

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
