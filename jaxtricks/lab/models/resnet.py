"""A small ResNet in Flax NNX whose parts can be swapped: convolution, normalization, blocks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

import jaxtricks.nnx as jnnx
from jaxtricks._typing import Array


class ConvNorm(nnx.Module):
    """Convolution, then normalization: the unit that `reparam` replaces by a block of branches."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        strides: int = 1,
        conv: Callable[..., Any] = nnx.Conv,
        norm: Callable[..., Any] = nnx.BatchNorm,
        rngs: nnx.Rngs,
    ):
        self.conv = conv(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = norm(out_features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Map [N, H, W, in_features] to [N, H', W', out_features]."""
        return self.norm(self.conv(x))


def activated(unit: Callable[[Array], Array], x: Array) -> Array:
    """Return relu(unit(x)) in the dtype of x.

    Newer versions of Flax's BatchNorm return float32 for bfloat16 inputs, because they
    count its running statistics; what follows would then silently compute in float32.
    """
    return nnx.relu(unit(x)).astype(x.dtype)


class Block(nnx.Module):
    """y = relu(unit(relu(unit(x))) + shortcut(x)), the basic residual block."""

    row_parallel = ("second",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int,
        unit: Callable[..., Any],
        pointwise: Callable[..., Any],
        rngs: nnx.Rngs,
    ):
        self.first = unit(
            in_features, out_features, (3, 3), strides=strides, rngs=rngs
        )
        self.second = unit(
            out_features, out_features, (3, 3), strides=1, rngs=rngs
        )
        changes = strides != 1 or in_features != out_features
        # A 1x1 convolution where the shape changes; elsewhere the input passes as it
        # is.
        self.shortcut = (
            pointwise(
                in_features, out_features, (1, 1), strides=strides, rngs=rngs
            )
            if changes
            else None
        )

    def __call__(self, x: Array) -> Array:
        """Map [N, H, W, in_features] to [N, H', W', out_features]."""
        y = activated(self.first, x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(self.second(y) + shortcut).astype(x.dtype)


class ResNet(nnx.Module):
    """Residual network for small images (He et al., arXiv 1512.03385, section 4.2).

    Args:
      in_channels: C of the images [N, H, W, C].
      num_classes: outputs.
      widths: channels of each stage; every stage after the first halves the resolution.
      blocks: residual blocks a stage.
      unit: factory (in_features, out_features, kernel_size, *, strides, rngs) of what
        stands for convolution plus normalization with a 3x3 kernel.
      pointwise: the same for the 1x1 shortcuts.
      recompute: keep only each block's input for the backward pass and run the block
        again there.
    """

    # The loss needs all the logits of an example in one place.
    unsplit = ("head",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 1,
        unit: Callable[..., Any] = ConvNorm,
        pointwise: Callable[..., Any] = ConvNorm,
        recompute: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stem = unit(in_channels, widths[0], (3, 3), strides=1, rngs=rngs)
        stages = []
        features = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                strides = 2 if i > 0 and j == 0 else 1
                block = Block(
                    features,
                    width,
                    strides=strides,
                    unit=unit,
                    pointwise=pointwise,
                    rngs=rngs,
                )
                stages.append(block)
                features = width
        self.stages = nnx.data(stages)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)
        self.recompute = recompute

    def __call__(self, x: Array) -> Array:
        """Map images [N, H, W, C] to logits [N, num_classes], computed in the dtype of the images."""
        x = activated(self.stem, x)
        for block in self.stages:
            x = jnnx.recompute_grad(block)(x) if self.recompute else block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
