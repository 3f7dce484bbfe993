"""Residual convolution networks as chains of blocks, on 32 x 32 images of ten classes."""

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import remat_layers as layers
from benchmarks.remat_chains import Model


def resnet(blocks_a_stage: int = 2, width: int = 8, batch: int = 16) -> Model:
    """Three stages of post-activation blocks with batch statistics, on 32 x 32 images."""
    plan = _stages(width, blocks_a_stage)

    def block(stride: int) -> Callable[[Any, Any], Any]:
        def run(p: Any, x: Any) -> Any:
            h = jax.nn.relu(
                batch_norm(p["norm1"], layers.conv(x, p["conv1"], stride))
            )
            h = batch_norm(p["norm2"], layers.conv(h, p["conv2"]))
            return jax.nn.relu(
                h + (layers.conv(x, p["skip"], stride) if "skip" in p else x)
            )

        return run

    def batch_norm(p: Any, x: Any) -> Any:
        return layers.norm(p, x, (0, 1, 2))

    def draw(key: Any) -> tuple[Any, Any]:
        key, *keys = jax.random.split(key, len(plan) + 1)
        k1, k2, k3 = jax.random.split(key, 3)
        blocks = [
            _block_params(k, i, o, o)
            for k, (i, o, _) in zip(keys, plan, strict=True)
        ]
        embed = {
            "conv": layers.normal(k1, 3, 3, 3, width),
            "norm": layers.norm_params(width),
        }
        params = {
            "embed": embed,
            "blocks": blocks,
            "head": layers.normal(k2, 4 * width, 10),
        }
        return params, layers.images(k3, batch)

    return Model(
        "resnet",
        draw,
        tuple(block(stride) for *_, stride in plan),
        embed=lambda p, batch: jax.nn.relu(
            batch_norm(p["norm"], layers.conv(batch[0], p["conv"]))
        ),
        head=lambda p, x, batch: layers.cross_entropy(
            x.mean((1, 2)) @ p, batch[1]
        ),
    )


def preact(blocks_a_stage: int = 4, width: int = 16, batch: int = 8) -> Model:
    """Two stages of pre-activation blocks with statistics of groups, and pooling over all places."""
    plan = _stages(width, blocks_a_stage, count=2)

    def activate(p: Any, x: Any) -> Any:
        grouped = x.reshape(*x.shape[:-1], 4, -1)
        shaped = {name: a.reshape(4, -1) for name, a in p.items()}
        return jax.nn.relu(
            layers.norm(shaped, grouped, (1, 2, 4)).reshape(x.shape)
        )

    def block(stride: int) -> Callable[[Any, Any], Any]:
        def run(p: Any, x: Any) -> Any:
            h = layers.conv(activate(p["norm1"], x), p["conv1"], stride)
            h = layers.conv(activate(p["norm2"], h), p["conv2"])
            return h + (layers.conv(x, p["skip"], stride) if "skip" in p else x)

        return run

    def draw(key: Any) -> tuple[Any, Any]:
        key, *keys = jax.random.split(key, len(plan) + 1)
        k1, k2, k3 = jax.random.split(key, 3)
        blocks = [
            _block_params(k, i, o, i)
            for k, (i, o, _) in zip(keys, plan, strict=True)
        ]
        head = {
            "norm": layers.norm_params(2 * width),
            "w": layers.normal(k2, 2 * width, 10),
        }
        embed = layers.normal(k1, 3, 3, 3, width)
        return {"embed": embed, "blocks": blocks, "head": head}, layers.images(
            k3, batch
        )

    def head(p: Any, x: Any, batch: Any) -> Any:
        return layers.cross_entropy(
            activate(p["norm"], x).mean((1, 2)) @ p["w"], batch[1]
        )

    return Model(
        f"preact{len(plan)}",
        draw,
        tuple(block(stride) for *_, stride in plan),
        embed=lambda p, batch: layers.conv(batch[0], p),
        head=head,
    )


def _block_params(key: Any, fan_in: int, features: int, first_norm: int) -> Any:
    keys = jax.random.split(key, 3)
    p = {
        "norm1": layers.norm_params(first_norm),
        "norm2": layers.norm_params(features),
    }
    p |= {"conv1": layers.normal(keys[0], 3, 3, fan_in, features)}
    p |= {"conv2": layers.normal(keys[1], 3, 3, features, features)}
    if fan_in == features:
        return p
    return p | {"skip": layers.normal(keys[2], 1, 1, fan_in, features)}


def _stages(
    width: int, blocks: int, count: int = 3
) -> list[tuple[int, int, int]]:
    # (features in, out, stride) of every block; a stage but the first doubles features, halves the image.
    found = []
    for stage in range(count):
        for i in range(blocks):
            grow = stage > 0 and i == 0
            out = width * 2**stage
            found.append((out // 2 if grow else out, out, 2 if grow else 1))
    return found
