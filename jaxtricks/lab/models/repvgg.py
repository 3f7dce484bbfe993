"""A plain stack of blocks that train as three branches and deploy as one convolution each."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

import jaxtricks.nnx as jnnx
from jaxtricks._typing import Array
from jaxtricks.lab.models.resnet import activated


class Layer(nnx.Module):
    """relu(block(x)); `block` is branches in training and, once fused, a convolution."""

    def __init__(self, block: Any):
        self.block = block

    def __call__(self, x: Array) -> Array:
        """Map [N, H, W, in_features] to [N, H', W', out_features]."""
        return activated(self.block, x)


class RepVGG(nnx.Module):
    """Plain convolutional network without shortcuts (Ding et al., arXiv 2101.03697, section 3).

    Args:
      in_channels: C of the images [N, H, W, C].
      num_classes: outputs.
      widths: channels of each stage; every stage after the first halves the resolution.
      blocks: blocks a stage, beside the one that reads the image.
      block: factory (in_features, out_features, *, strides, rngs) of blocks;
        `jt.nnx.fuse` deploys them.
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
        block: Callable[..., Any] = jnnx.RepVGGBlock,
        recompute: bool = False,
        rngs: nnx.Rngs,
    ):
        layers = [Layer(block(in_channels, widths[0], strides=1, rngs=rngs))]
        features = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                strides = 2 if i > 0 and j == 0 else 1
                layers.append(
                    Layer(block(features, width, strides=strides, rngs=rngs))
                )
                features = width
        self.layers = nnx.data(layers)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)
        self.recompute = recompute

    def __call__(self, x: Array) -> Array:
        """Map images [N, H, W, C] to logits [N, num_classes], computed in the dtype of the images."""
        for layer in self.layers:
            x = jnnx.recompute_grad(layer)(x) if self.recompute else layer(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
