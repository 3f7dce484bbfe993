"""Layers of the networks of `remat_models`."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def normal(key: Any, *shape: int) -> Any:
    """A kernel whose outputs have about the deviation of its inputs."""
    return jax.random.normal(key, shape) * math.prod(shape[:-1]) ** -0.5


def norm_params(width: int) -> dict[str, Any]:
    """Scale and bias of `norm`."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def norm(p: Any, x: Any, axes: Any = -1) -> Any:
    """Mean 0 and deviation 1 over the axes, then scale and bias."""
    centered = x - x.mean(axes, keepdims=True)
    variance = (centered**2).mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt(variance + 1e-5) * p["scale"] + p["bias"]


def dense(p: Any, x: Any) -> Any:
    """A matrix product and a bias."""
    return x @ p["w"] + p["b"]


def conv(x: Any, kernel: Any, stride: int = 1) -> Any:
    """A convolution of images [batch, height, width, features]."""
    strides, dims = (stride, stride), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=dims
    )


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Mean negative log-likelihood of integer labels."""
    return -jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[..., None], -1
    ).mean()


def images(key: Any, batch: int) -> tuple[Any, Any]:
    """(noise [batch, 32, 32, 3], labels of ten classes)."""
    k1, k2 = jax.random.split(key)
    return jax.random.normal(k1, (batch, 32, 32, 3)), jax.random.randint(
        k2, (batch,), 0, 10
    )


def patches(images: Any, count: int) -> Any:
    """Square patches, flattened: [batch, 32, 32, 3] -> [batch, count, features]."""
    n = math.isqrt(count)
    x = images.reshape(len(images), n, 32 // n, n, 32 // n, 3)
    return jnp.swapaxes(x, 2, 3).reshape(len(images), count, -1)
