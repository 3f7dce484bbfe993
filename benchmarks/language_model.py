"""A decoder in plain JAX, written twice over: as one writes it in float32, and cast by hand to bfloat16."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Loss = Callable[[Any, Any], Any]
FORMS = "unrolled", "scan", "remat"  # ways to write the layers


class Size(NamedTuple):
    """Layers, features, heads, length of the text, examples in a batch, vocabulary."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    length: int = 256
    batch: int = 8
    vocabulary: int = 1024


def shapes(size: Size, stacked: bool) -> tuple[Any, Any]:
    """(parameters, tokens int32 [batch, length + 1]) as shapes; `stacked` puts the layers into one leaf."""
    d = size.width
    table = {
        "qkv": (d, 3 * d),
        "out": (d, d),
        "up": (d, 4 * d),
        "down": (4 * d, d),
    }
    table |= {
        "up_bias": (4 * d,),
        "down_bias": (d,),
        "norm1": (d,),
        "norm2": (d,),
    }

    def leaves(*lead: int) -> dict[str, Any]:
        return {
            n: jax.ShapeDtypeStruct((*lead, *s), jnp.float32)
            for n, s in table.items()
        }

    layers = (
        leaves(size.layers)
        if stacked
        else [leaves() for _ in range(size.layers)]
    )
    embedding = jax.ShapeDtypeStruct((size.vocabulary, d), jnp.float32)
    params = {
        "embedding": embedding,
        "layers": layers,
        "norm": jax.ShapeDtypeStruct((d,), jnp.float32),
    }
    return params, jax.ShapeDtypeStruct(
        (size.batch, size.length + 1), jnp.int32
    )


def draw(size: Size, stacked: bool, seed: int = 0) -> tuple[Any, Any]:
    """The same as arrays."""
    params, tokens = shapes(size, stacked)
    leaves, structure = jax.tree.flatten_with_path(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        jnp.ones(x.shape)
        if "norm" in jax.tree_util.keystr(path)
        else 0.05 * jax.random.normal(k, x.shape)
        for k, (path, x) in zip(keys, leaves, strict=True)
    ]
    inputs = jax.random.randint(keys[0], tokens.shape, 0, size.vocabulary)
    return jax.tree.unflatten(structure, arrays), inputs


def loss(size: Size, form: str = "unrolled", low: Any = None) -> Loss:
    """(params, tokens) -> nats per token.

    Args:
      size: of the model.
      form: "unrolled", "scan" over stacked layers, or "remat": the same, each layer recomputed.
      low: the dtype of the hand cast: weights and activations low; the statistics of norms, the softmax
        and the loss in float32, rounded after. None casts nothing.
    """
    down = (lambda x: x) if low is None else (lambda x: x.astype(low))
    up = (lambda x: x) if low is None else (lambda x: x.astype(jnp.float32))

    def norm(x: Any, scale: Any) -> Any:
        x = up(x)
        return down(
            x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale
        )

    def attention(x: Any, p: Any) -> Any:
        b, t, d = x.shape
        q, k, v = jnp.split(
            (x @ down(p["qkv"])).reshape(b, t, size.heads, -1), 3, -1
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // size.heads) ** -0.5
        mask = jnp.tril(jnp.ones((t, t), bool))
        weights = down(jax.nn.softmax(jnp.where(mask, up(scores), -1e9)))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(
            b, t, d
        ) @ down(p["out"])

    def layer(x: Any, p: Any) -> Any:
        x = x + attention(norm(x, p["norm1"]), p)
        h = jax.nn.gelu(
            norm(x, p["norm2"]) @ down(p["up"]) + down(p["up_bias"])
        )
        return x + h @ down(p["down"]) + down(p["down_bias"])

    def run(params: Any, tokens: Any) -> Any:
        x = down(params["embedding"])[tokens[:, :-1]]
        if form == "unrolled":
            for p in params["layers"]:
                x = layer(x, p)
        else:
            step = jax.checkpoint(layer) if form == "remat" else layer
            x, _ = jax.lax.scan(
                lambda x, p: (step(x, p), None), x, params["layers"]
            )
        logits = up(norm(x, params["norm"]) @ down(params["embedding"]).T)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), tokens[:, 1:, None], -1
        )
        return -jnp.mean(picked)

    return run
