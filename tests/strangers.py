"""Models as people write them, without a thought of this library: shapes of flax's examples and others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtricks import _tree


class CNN(nnx.Module):
    """The digits example: dropout between convolution and normalization, pooling, two dense layers."""

    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(8, 12, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(12, rngs=rngs)
        self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(12 * 2 * 2, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1; the projection only where the shape changes."""

    def __init__(self, ins, features, strides, *, conv, norm, rngs):
        self.conv0 = conv(ins, features, (1, 1), rngs=rngs)
        self.norm0 = norm(features, rngs=rngs)
        self.conv1 = conv(features, features, (3, 3), strides=strides, rngs=rngs)
        self.norm1 = norm(features, rngs=rngs)
        self.conv2 = conv(features, 2 * features, (1, 1), rngs=rngs)
        self.norm2 = norm(2 * features, scale_init=nnx.initializers.constant(0.5), rngs=rngs)
        if strides != (1, 1) or ins != 2 * features:
            self.conv_proj = conv(ins, 2 * features, (1, 1), strides=strides, rngs=rngs)
            self.norm_proj = norm(2 * features, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm0(self.conv0(x)))
        y = nnx.relu(self.norm1(self.conv1(y)))
        y = self.norm2(self.conv2(y))
        if hasattr(self, "conv_proj"):
            x = self.norm_proj(self.conv_proj(x))
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """The ImageNet example: a strided stem with explicit padding, max pooling, bottlenecks in a list."""

    def __init__(self, *, rngs, features=(4, 8)):
        conv = functools.partial(nnx.Conv, use_bias=False)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)
        self.conv_init = conv(3, 6, (7, 7), strides=(2, 2), padding=[(3, 3), (3, 3)], rngs=rngs)
        self.bn_init = norm(6, rngs=rngs)
        blocks, ins = [], 6
        for i, width in enumerate(features):
            for j in range(2):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                blocks.append(Bottleneck(ins, width, strides, conv=conv, norm=norm, rngs=rngs))
                ins = 2 * width
        self.blocks = nnx.data(blocks)
        self.head = nnx.Linear(ins, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn_init(self.conv_init(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class PreActivation(nnx.Module):
    """Normalization in front of the convolution; only the last pair is a convolution's own."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv1 = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        return x + self.norm2(self.conv1(nnx.relu(self.norm1(x))))


class Shared(nnx.Module):
    """One convolution under two names, in a list, a dict and a tuple."""

    def __init__(self, *, rngs):
        self.one = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.same = self.one
        self.parts = nnx.data(
            {
                "list": [nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs), nnx.relu],
                "pair": (self.one, nnx.BatchNorm(4, rngs=rngs)),
            }
        )

    def __call__(self, x):
        y = self.same(nnx.relu(self.one(x)))
        for layer in (*self.parts["list"], *self.parts["pair"]):
            y = layer(y)
        return y


def made(kind):
    """A model of this class with random parameters; drawn here, since compiling initializers takes longer."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        name = path.rsplit("/", 1)[1]
        if name == "kernel":
            values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            spread = 0.3 if name in ("scale", "bias") else 0.0
            values = rng.normal(float(name in ("scale", "var")), spread, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graph, _tree.map_with_path(fill, state))


def trained(model, x, steps=3):
    """The model with moved running statistics, in evaluation mode."""
    model.train()
    step = nnx.jit(lambda model, x: (model(x), None)[1])
    for i in range(steps):
        step(model, x + 0.1 * i)
    model.eval()
    return model


class LinenResNet(nn.Module):
    """The linen example's habits: compact, partials, `train` in the call."""

    features: tuple[int, ...] = (4, 8)

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = conv(6, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for i, width in enumerate(self.features):
            y = nn.relu(norm()(conv(width, (3, 3), (i + 1, i + 1))(x)))
            y = norm(scale_init=nn.initializers.constant(0.5))(conv(2 * width, (1, 1))(y))
            x = norm(name=f"norm_proj_{i}")(
                conv(2 * width, (1, 1), (i + 1, i + 1), name=f"conv_proj_{i}")(x)
            )
            x = nn.relu(x + y)
        return nn.Dense(5)(jnp.mean(x, (1, 2)))
