"""Networks whose activations fill the memory, each as a chain of blocks (`remat_chains.Model`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import remat_convnets
from benchmarks import remat_layers as layers
from benchmarks.remat_chains import Model, scanned


def models() -> dict[str, Callable[[], Model]]:
    """name -> what makes the model of every table."""
    return {
        "mlp16": lambda: mlp(16),
        "tf12": transformer,
        "resnet": remat_convnets.resnet,
        "scan64": lambda: mlp(64, stacked=True),
        "rnn40": rnn,
        "mixer10": mixer,
        "preact8": remat_convnets.preact,
    }


def mlp(
    n: int, width: int = 128, batch: int = 1024, *, stacked: bool = False
) -> Model:
    """tanh layers and a squared error; `stacked` runs them by `lax.scan`."""

    def draw(key: Any) -> tuple[Any, Any]:
        key, *keys = jax.random.split(key, n + 1)
        cells = [
            {"w": layers.normal(k, width, width), "b": jnp.zeros(width)}
            for k in keys
        ]
        blocks = (
            jax.tree.map(lambda *a: jnp.stack(a), *cells) if stacked else cells
        )
        x, y = jax.random.normal(key, (2, batch, width))
        return {"embed": (), "blocks": blocks, "head": ()}, (x, y)

    def layer(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"] + p["b"])

    return Model(
        f"{'scan' if stacked else 'mlp'}{n}",
        draw,
        (layer,) * n,
        embed=lambda p, batch: batch[0],
        head=lambda p, x, batch: jnp.mean((x - batch[1]) ** 2),
        chain=scanned() if stacked else Model.chain,
    )


def transformer(
    n: int = 12,
    width: int = 128,
    length: int = 128,
    batch: int = 8,
    heads: int = 4,
    vocabulary: int = 256,
) -> Model:
    """A causal decoder with pre-norm layers."""

    def layer_params(key: Any) -> Any:
        keys, d = jax.random.split(key, 4), width
        return {
            "norm1": layers.norm_params(d),
            "norm2": layers.norm_params(d),
            "qkv": layers.normal(keys[0], d, 3 * d),
            "out": layers.normal(keys[1], d, d),
            "up": {
                "w": layers.normal(keys[2], d, 4 * d),
                "b": jnp.zeros(4 * d),
            },
            "down": {"w": layers.normal(keys[3], 4 * d, d), "b": jnp.zeros(d)},
        }

    def draw(key: Any) -> tuple[Any, Any]:
        key, *keys = jax.random.split(key, n + 1)
        k1, k2, k3, k4 = jax.random.split(key, 4)
        embed = {
            "token": layers.normal(k1, vocabulary, width),
            "place": layers.normal(k2, length, width),
        }
        head = {
            "norm": layers.norm_params(width),
            "w": layers.normal(k3, width, vocabulary),
        }
        tokens = jax.random.randint(k4, (batch, length + 1), 0, vocabulary)
        return {
            "embed": embed,
            "blocks": [layer_params(k) for k in keys],
            "head": head,
        }, tokens

    def attention(p: Any, x: Any) -> Any:
        q, k, v = jnp.split(
            (x @ p["qkv"]).reshape(batch, length, heads, -1), 3, -1
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        return (
            jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
            @ p["out"]
        )

    def layer(p: Any, x: Any) -> Any:
        x = x + attention(p, layers.norm(p["norm1"], x))
        return x + layers.dense(
            p["down"],
            jax.nn.gelu(layers.dense(p["up"], layers.norm(p["norm2"], x))),
        )

    return Model(
        f"tf{n}",
        draw,
        (layer,) * n,
        embed=lambda p, tokens: p["token"][tokens[:, :-1]] + p["place"],
        head=lambda p, x, tokens: layers.cross_entropy(
            layers.norm(p["norm"], x) @ p["w"], tokens[:, 1:]
        ),
    )


def rnn(steps: int = 40, width: int = 128, batch: int = 256) -> Model:
    """An unrolled gated recurrent unit that classifies a sequence; the steps share their weights."""

    def draw(key: Any) -> tuple[Any, Any]:
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        cell = {
            "gates": {
                "w": layers.normal(k1, 2 * width, 2 * width),
                "b": jnp.zeros(2 * width),
            }
        }
        cell |= {
            "new": {
                "w": layers.normal(k2, 2 * width, width),
                "b": jnp.zeros(width),
            }
        }
        inputs = jax.random.normal(k4, (steps, batch, width))
        params = {
            "embed": (),
            "blocks": cell,
            "head": layers.normal(k3, width, 10),
        }
        return params, (inputs, jax.random.randint(k5, (batch,), 0, 10))

    def step(p: Any, h: Any) -> Any:
        cell, x = p
        both = jnp.concatenate([x, h], -1)
        reset, update = jnp.split(
            jax.nn.sigmoid(layers.dense(cell["gates"], both)), 2, -1
        )
        new = jnp.tanh(
            layers.dense(cell["new"], jnp.concatenate([x, reset * h], -1))
        )
        return update * h + (1 - update) * new

    return Model(
        f"rnn{steps}",
        draw,
        (step,) * steps,
        embed=lambda p, batch: jnp.zeros(batch[0].shape[1:]),
        head=lambda p, h, batch: layers.cross_entropy(h @ p, batch[1]),
        feed=lambda cell, batch: [(cell, x) for x in batch[0]],
    )


def mixer(
    n: int = 10, width: int = 64, patches: int = 64, batch: int = 8
) -> Model:
    """An MLP-mixer: a network across the patches, then one across the features."""

    def pair(key: Any, d: int, hidden: int) -> Any:
        up, down = jax.random.split(key)
        wide = {"w": layers.normal(up, d, hidden), "b": jnp.zeros(hidden)}
        return {
            "up": wide,
            "down": {"w": layers.normal(down, hidden, d), "b": jnp.zeros(d)},
        }

    def layer_params(key: Any) -> Any:
        k1, k2 = jax.random.split(key)
        p = {
            "patches": pair(k1, patches, 2 * patches),
            "features": pair(k2, width, 4 * width),
        }
        return p | {
            "norm1": layers.norm_params(width),
            "norm2": layers.norm_params(width),
        }

    def draw(key: Any) -> tuple[Any, Any]:
        key, *keys = jax.random.split(key, n + 1)
        k1, k2, k3 = jax.random.split(key, 3)
        embed = layers.normal(k1, 3 * 32 * 32 // patches, width)
        head = {
            "norm": layers.norm_params(width),
            "w": layers.normal(k2, width, 10),
        }
        params = {
            "embed": embed,
            "blocks": [layer_params(k) for k in keys],
            "head": head,
        }
        return params, layers.images(k3, batch)

    def mlp(p: Any, x: Any) -> Any:
        return layers.dense(p["down"], jax.nn.gelu(layers.dense(p["up"], x)))

    def layer(p: Any, x: Any) -> Any:
        mixed = mlp(
            p["patches"], jnp.swapaxes(layers.norm(p["norm1"], x), 1, 2)
        )
        x = x + jnp.swapaxes(mixed, 1, 2)
        return x + mlp(p["features"], layers.norm(p["norm2"], x))

    return Model(
        f"mixer{n}",
        draw,
        (layer,) * n,
        embed=lambda p, images: layers.patches(images[0], patches) @ p,
        head=lambda p, x, images: layers.cross_entropy(
            layers.norm(p["norm"], x).mean(1) @ p["w"], images[1]
        ),
    )
