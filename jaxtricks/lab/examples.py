"""From a batch on the device to what the model takes: (inputs, labels), augmented in training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks._typing import Array, Key
from jaxtricks.lab import data as data_lib

Examples = Callable[[Any, Key | None], tuple[Array, Array]]
"""(batch, key) -> (inputs, labels); augmented if there is a key."""


def examples_of(data: data_lib.Data) -> Examples:
    """How batches of this data set become inputs and labels."""
    return text_examples if data.kind == "text" else image_examples(data)


def text_examples(batch: Any, key: Key | None) -> tuple[Array, Array]:
    """{"text" [N, T + 1]} -> (characters [N, T], the next ones [N, T])."""
    return batch["text"][:, :-1], batch["text"][:, 1:]


def image_examples(data: data_lib.Data) -> Examples:
    """({"image" uint8, "label"}, key) -> (float images in [-1, 1], labels); augmented if there is a key."""
    pad = max(1, data.shape[0] // 8)

    def examples(batch: Any, key: Key | None) -> tuple[Array, Array]:
        images = batch["image"]
        if key is not None:
            images = augment(key, images, pad=pad, flip=data.flip)
        return to_float(images), batch["label"]

    return examples


def to_float(images: Array) -> Array:
    """uint8 [0, 255] -> float32 [-1, 1]; float64 where jax has it on."""
    return jnp.asarray(images).astype(float) / 127.5 - 1


def augment(key: Key, images: Array, *, pad: int, flip: bool) -> Array:
    """Random shift by up to `pad` pixels and, if flip, mirror: uint8 [N, H, W, C], on device."""
    n, height, width, channels = images.shape
    shift_key, flip_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (n, 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")

    def crop(image: Array, shift: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*shift, 0), (height, width, channels))

    images = jax.vmap(crop)(padded, shifts)
    if not flip:
        return images
    mirror = jax.random.bernoulli(flip_key, 0.5, (n, 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)
