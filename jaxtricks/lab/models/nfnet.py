"""A residual network that trains without any normalization."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxtricks.nnx as jnnx
from jaxtricks import weightstd
from jaxtricks._typing import Array, Key

Activation = Callable[[Array], Array]

# Kernels with zero mean and variance 1 / fan_in, and a gain and a bias for every output
# channel.
WSConv = functools.partial(jnnx.WSConv, use_bias=True)


class NFBlock(nnx.Module):
    """y = shortcut + alpha * skip_gain * conv(act(conv(beta * act(x)))), the pre-activation block.

    The shortcut is x where the shape stays, else a 1x1 convolution of beta * act(x).
    skip_gain starts at 0: at first the network is its shortcuts alone, and every branch
    grows as far as it helps.
    """

    row_parallel = ("second",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int,
        scale: weightstd.ResidualScale,
        conv: Callable[..., Any],
        act: Activation,
        rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.first = conv(
            in_features, out_features, (3, 3), strides=strides, rngs=rngs
        )
        self.second = conv(
            out_features, out_features, (3, 3), strides=1, rngs=rngs
        )
        changes = strides != 1 or in_features != out_features
        self.shortcut = (
            conv(in_features, out_features, (1, 1), strides=strides, rngs=rngs)
            if changes
            else None
        )
        self.skip_gain = nnx.Param(jnp.zeros(()))
        self.alpha, self.beta = scale
        self.act = act
        self.rate = rate

    def __call__(self, x: Array, key: Key | None = None) -> Array:
        """Map [N, H, W, in_features] to [N, H', W', out_features]; with a key, branches are dropped."""
        out = self.act(x) * self.beta
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.second(self.act(self.first(out)))
        if key is not None and self.rate:
            out = weightstd.stochastic_depth(key, out, self.rate)
        return shortcut + out * (self.alpha * self.skip_gain[...])


class NFNet(nnx.Module):
    """Normalizer-free residual network for small images (Brock et al., arXiv 2101.08692, section 4).

    Nothing depends on the batch, and without stochastic depth training computes what
    evaluation computes. What normalization did is done in advance: kernels are
    standardized, activations keep the variance of their inputs, and every block knows
    the variance that it receives. Train it with adaptive gradient clipping (`agc`).

    Args:
      in_channels: C of the images [N, H, W, C].
      num_classes: outputs.
      widths: channels of each stage; every stage after the first halves the resolution.
      blocks: residual blocks a stage.
      conv: factory (in_features, out_features, kernel_size, *, strides, rngs) of the
        convolutions.
      activation: elementwise; it is scaled to unit variance here.
      alpha: scale of every branch.
      drop_rate: stochastic depth in training: of n blocks the i-th (from 0) drops its
        branch, for every example by itself, with probability drop_rate * i / n. Keys
        come from the stream "dropout".
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
        conv: Callable[..., Any] = WSConv,
        activation: Activation = jax.nn.relu,
        alpha: float = 0.2,
        drop_rate: float = 0.0,
        recompute: bool = False,
        rngs: nnx.Rngs,
    ):
        if not 0 <= drop_rate <= 1:
            raise ValueError(
                f"NFNet: `drop_rate` is {drop_rate}; give one in [0, 1]"
            )
        self.act = weightstd.scaled_activation(activation)
        self.stem = conv(in_channels, widths[0], (3, 3), strides=1, rngs=rngs)
        layers = []
        features = widths[0]
        scales = weightstd.residual_scales([blocks] * len(widths), alpha)
        for i, (width, stage) in enumerate(zip(widths, scales, strict=True)):
            for j, scale in enumerate(stage):
                strides = 2 if i > 0 and j == 0 else 1
                block = NFBlock(
                    features,
                    width,
                    strides=strides,
                    scale=scale,
                    conv=conv,
                    act=self.act,
                    rate=drop_rate * len(layers) / (blocks * len(widths)),
                    rngs=rngs,
                )
                layers.append(block)
                features = width
        self.blocks = nnx.data(layers)
        # Nothing normalizes what reaches the head, so it starts small: all classes
        # equally likely.
        small = nnx.initializers.normal(0.01)
        self.head = nnx.Linear(
            features, num_classes, kernel_init=small, rngs=rngs
        )
        self.recompute = recompute
        self.deterministic = False  # set by model.train() and model.eval()
        self.rngs = rngs.dropout.fork() if drop_rate else None

    def __call__(self, x: Array) -> Array:
        """Map images [N, H, W, C] to logits [N, num_classes], computed in the dtype of the images."""
        x = self.stem(x)
        draw = None if self.deterministic else self.rngs
        for block in self.blocks:
            run = jnnx.recompute_grad(block) if self.recompute else block
            x = run(x, None if draw is None else draw())
        return self.head(jnp.mean(self.act(x), axis=(1, 2)))
