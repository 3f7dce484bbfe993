"""Five published architectures, small, as chains of blocks (`remat_chains.Model`).

The blocks mark what MaxText's named policies save: `NAMES` lists the policies of each.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from benchmarks import remat_layers as layers
from benchmarks.remat_chains import Model

_QKV, _ATTENTION = ("qkv_proj",), ("qkv_proj", "out_proj")
_TRANSFORMER = {
    "save_qkv_proj": _QKV,
    "save_out_proj": ("out_proj",),
    "save_dot_except_mlp": _ATTENTION,
    "save_dot_except_mlpwi": (*_ATTENTION, "mlpwo"),
    "minimal": (*_ATTENTION, "mlpwi", "mlpwo"),
    "minimal_with_context": (*_ATTENTION, "mlpwi", "mlpwo", "context"),
}
# model -> {policy: names of what it saves}
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "vit": _TRANSFORMER,
    "dit": _TRANSFORMER,
    "qwen3": _TRANSFORMER,
    "griffin": {
        "save mixer": ("mixer",),
        "save mixer, mlpwi": ("mixer", "mlpwi"),
    },
    "convnext": {"save conv": ("conv",), "save conv, mlpwi": ("conv", "mlpwi")},
}


def models() -> dict[str, Callable[[], Model]]:
    """name -> what makes the model."""
    return {
        "vit": vit,
        "convnext": convnext,
        "griffin": griffin,
        "dit": dit,
        "qwen3": qwen3,
    }


def vit(
    n: int = 6,
    width: int = 128,
    patches: int = 64,
    batch: int = 16,
    heads: int = 4,
) -> Model:
    """A vision transformer: Dosovitskiy et al., arXiv 2010.11929."""

    def block_params(key: Any) -> Any:
        return _attention_params(key, width) | {
            "norm1": layers.norm_params(width),
            "norm2": layers.norm_params(width),
        }

    def block(p: Any, x: Any) -> Any:
        x = x + _attention(p, layers.norm(p["norm1"], x), heads)
        return x + _mlp(p, layers.norm(p["norm2"], x))

    def draw(key: Any) -> tuple[Any, Any]:
        k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
        embed = {
            "patch": _dense_params(k1, 3 * 32 * 32 // patches, width),
            "class": layers.normal(k2, 1, width),
            "place": layers.normal(k3, patches + 1, width),
        }
        head = _dense_params(k4, width, 10) | {
            "norm": layers.norm_params(width)
        }
        return _params(embed, block_params, k5, n, head), layers.images(
            k6, batch
        )

    def embed(p: Any, images: Any) -> Any:
        x = layers.dense(p["patch"], layers.patches(images[0], patches))
        first = jnp.broadcast_to(p["class"], (len(x), 1, width))
        return jnp.concatenate([first, x], 1) + p["place"]

    return Model(
        f"vit{n}",
        draw,
        (block,) * n,
        embed=embed,
        head=lambda p, x, images: layers.cross_entropy(
            layers.dense(p, layers.norm(p["norm"], x)[:, 0]), images[1]
        ),
    )


def convnext(blocks_a_stage: int = 3, width: int = 32, batch: int = 8) -> Model:
    """Two stages of depthwise convolutions and inverted bottlenecks: Liu et al., arXiv 2201.03545."""
    widths = [width] * blocks_a_stage + [2 * width] * blocks_a_stage

    def block_params(key: Any, d: int, first: bool) -> Any:
        k1, k2, k3 = jax.random.split(key, 3)
        p = _mlp_params(k1, d) | {
            "conv": layers.normal(k2, 7, 7, 1, d),
            "norm": layers.norm_params(d),
            "scale": jnp.full(d, 0.1),
        }
        if first:
            p["down_norm"] = layers.norm_params(d // 2)
            p["down_conv"] = layers.normal(k3, 2, 2, d // 2, d)
        return p

    def block(p: Any, x: Any) -> Any:
        if "down_conv" in p:
            x = layers.conv(layers.norm(p["down_norm"], x), p["down_conv"], 2)
        h = jax.lax.conv_general_dilated(
            x,
            p["conv"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
        h = checkpoint_name(h, "conv")
        return x + p["scale"] * _mlp(p, layers.norm(p["norm"], h))

    def draw(key: Any) -> tuple[Any, Any]:
        k1, k2, k3, *keys = jax.random.split(key, 3 + len(widths))
        blocks = [
            block_params(k, d, i == blocks_a_stage)
            for i, (k, d) in enumerate(zip(keys, widths, strict=True))
        ]
        embed = {
            "conv": layers.normal(k1, 2, 2, 3, width),
            "norm": layers.norm_params(width),
        }
        head = _dense_params(k2, 2 * width, 10) | {
            "norm": layers.norm_params(2 * width)
        }
        params = {"embed": embed, "blocks": blocks, "head": head}
        return params, layers.images(k3, batch)

    return Model(
        f"convnext{len(widths)}",
        draw,
        (block,) * len(widths),
        embed=lambda p, images: layers.norm(
            p["norm"], layers.conv(images[0], p["conv"], 2)
        ),
        head=lambda p, x, images: layers.cross_entropy(
            layers.dense(p, layers.norm(p["norm"], x.mean((1, 2)))), images[1]
        ),
    )


def griffin(
    n: int = 5,
    width: int = 128,
    length: int = 64,
    batch: int = 16,
    heads: int = 4,
    window: int = 32,
    vocabulary: int = 256,
) -> Model:
    """Two gated linear recurrences, one local attention, and so on: De et al., arXiv 2402.19427."""

    def block_params(key: Any, mixer: Callable[[Any], Any]) -> Any:
        k1, k2, k3, k4 = jax.random.split(key, 4)
        return {
            "norm1": jnp.zeros(width),
            "norm2": jnp.zeros(width),
            "mixer": mixer(k1),
            "gate": layers.normal(k2, width, 3 * width),
            "up": layers.normal(k3, width, 3 * width),
            "down": layers.normal(k4, 3 * width, width),
        }

    def recurrent_params(key: Any) -> Any:
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        return {
            "in": layers.normal(k1, width, 2 * width),
            "conv": layers.normal(k2, 4, width),
            "a": _dense_params(k3, width, width),
            "x": _dense_params(k4, width, width),
            "decay": jnp.linspace(-2.0, 1.0, width),
            "out": layers.normal(k5, width, width),
        }

    def recurrent(p: Any, x: Any) -> Any:
        gate, h = jnp.split(x @ p["in"], 2, -1)
        padded = jnp.pad(h, ((0, 0), (3, 0), (0, 0)))
        h = sum(padded[:, i : i + length] * p["conv"][i] for i in range(4))
        # The recurrence h_t = a_t h_(t-1) + sqrt(1 - a_t^2) (input gate x_t).
        rate = jax.nn.sigmoid(layers.dense(p["a"], h))
        entry = jax.nn.sigmoid(layers.dense(p["x"], h))
        log_a = -8.0 * jax.nn.softplus(p["decay"]) * rate
        b = jnp.sqrt(-jnp.expm1(2 * log_a) + 1e-6) * entry * h
        _, h = jax.lax.associative_scan(_chained, (jnp.exp(log_a), b), axis=1)
        return (jax.nn.gelu(gate) * h) @ p["out"]

    def attention_params(key: Any) -> Any:
        k1, k2 = jax.random.split(key)
        return {
            "qkv": layers.normal(k1, width, width + 2 * width // heads),
            "out": layers.normal(k2, width, width),
        }

    def attention(p: Any, x: Any) -> Any:
        # One pair of key and value for all heads.
        d = width // heads
        q, k, v = jnp.split(x @ p["qkv"], (width, width + d), -1)
        q, k = (
            _rotated(q.reshape(batch, length, heads, d)),
            _rotated(k[:, :, None]),
        )
        place = jnp.arange(length)
        distance = place[:, None] - place
        near = (distance >= 0) & (distance < window)
        scores = jnp.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) * d**-0.5
        weights = jax.nn.softmax(jnp.where(near, scores, -1e9))
        y = jnp.einsum("bhqk,bkd->bqhd", weights, v)
        return y.reshape(x.shape) @ p["out"]

    def block(mixer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(p: Any, x: Any) -> Any:
            mixed = mixer(p["mixer"], _rms_norm(p["norm1"], x))
            x = x + checkpoint_name(mixed, "mixer")
            h = _rms_norm(p["norm2"], x)
            up = jax.nn.gelu(h @ p["gate"]) * (h @ p["up"])
            return x + checkpoint_name(up, "mlpwi") @ p["down"]

        return run

    is_attention = [i % 3 == 2 for i in range(n)]

    def draw(key: Any) -> tuple[Any, Any]:
        k1, k2, k3, *keys = jax.random.split(key, n + 3)
        blocks = [
            block_params(k, attention_params if a else recurrent_params)
            for k, a in zip(keys, is_attention, strict=True)
        ]
        head = {
            "norm": jnp.zeros(width),
            "w": layers.normal(k1, width, vocabulary),
        }
        embed = 0.1 * jax.random.normal(k2, (vocabulary, width))
        tokens = jax.random.randint(k3, (batch, length + 1), 0, vocabulary)
        return {"embed": embed, "blocks": blocks, "head": head}, tokens

    return Model(
        f"griffin{n}",
        draw,
        tuple(block(attention if a else recurrent) for a in is_attention),
        embed=lambda p, tokens: p[tokens[:, :-1]] * width**0.5,
        head=lambda p, x, tokens: layers.cross_entropy(
            _rms_norm(p["norm"], x) @ p["w"], tokens[:, 1:]
        ),
    )


def dit(
    n: int = 6,
    width: int = 128,
    patches: int = 64,
    batch: int = 16,
    heads: int = 4,
) -> Model:
    """A diffusion transformer, norms set by time and label: Peebles and Xie, arXiv 2212.09748.

    The paper starts the modulations at zero; here they are drawn, so that no gradient is.
    """
    features = 3 * 32 * 32 // patches

    def block_params(key: Any) -> Any:
        k1, k2 = jax.random.split(key)
        return _attention_params(k1, width) | {
            "modulation": _dense_params(k2, width, 6 * width)
        }

    def block(p: Any, carry: Any) -> Any:
        x, condition = carry
        modulation = layers.dense(p["modulation"], jax.nn.silu(condition))
        a, b, c, d, e, f = jnp.split(modulation[:, None], 6, -1)
        x = x + c * _attention(p, _modulated(x, a, b), heads)
        return x + f * _mlp(p, _modulated(x, d, e)), condition

    def draw(key: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, 10)
        embed = {
            "patch": _dense_params(keys[0], features, width),
            "place": layers.normal(keys[1], patches, width),
            "time1": _dense_params(keys[2], width, width),
            "time2": _dense_params(keys[3], width, width),
            "label": jax.random.normal(keys[4], (10, width)),
        }
        head = {
            "modulation": _dense_params(keys[5], width, 2 * width),
            "out": _dense_params(keys[6], width, features),
        }
        batch_of = {
            "images": layers.images(keys[7], batch),
            "noise": jax.random.normal(keys[8], (batch, patches, features)),
            "time": jnp.linspace(0.05, 0.95, batch),
        }
        return _params(embed, block_params, keys[9], n, head), batch_of

    def embed(p: Any, batch: Any) -> Any:
        images, labels = batch["images"]
        clean = layers.patches(images, patches)
        t = batch["time"][:, None]
        mixed = jnp.cos(t)[..., None] * clean
        mixed = mixed + jnp.sin(t)[..., None] * batch["noise"]
        rates = jnp.exp(-math.log(1e4) * jnp.linspace(0, 1, width // 2))
        waves = 1000 * t * rates
        waves = jnp.concatenate([jnp.cos(waves), jnp.sin(waves)], -1)
        time = jax.nn.silu(layers.dense(p["time1"], waves))
        condition = layers.dense(p["time2"], time) + p["label"][labels]
        return layers.dense(p["patch"], mixed) + p["place"], condition

    def head(p: Any, carry: Any, batch: Any) -> Any:
        x, condition = carry
        modulation = layers.dense(p["modulation"], jax.nn.silu(condition))
        shift, scale = jnp.split(modulation[:, None], 2, -1)
        noise = layers.dense(p["out"], _modulated(x, shift, scale))
        return jnp.mean((noise - batch["noise"]) ** 2)

    return Model(f"dit{n}", draw, (block,) * n, embed=embed, head=head)


def qwen3(
    n: int = 6,
    width: int = 128,
    length: int = 128,
    batch: int = 8,
    heads: int = 8,
    pairs: int = 2,
    vocabulary: int = 256,
) -> Model:
    """A decoder with grouped queries, norms of queries and keys: Qwen3, arXiv 2505.09388."""
    d = 2 * width // heads  # heads are wider than width / heads, as published

    def block_params(key: Any) -> Any:
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        return {
            "norm1": jnp.zeros(width),
            "norm2": jnp.zeros(width),
            "q_norm": jnp.zeros(d),
            "k_norm": jnp.zeros(d),
            "q": layers.normal(k1, width, heads * d),
            "kv": layers.normal(k2, width, 2 * pairs * d),
            "out": layers.normal(k3, heads * d, width),
            "wi": layers.normal(k4, width, 2 * 3 * width),
            "wo": layers.normal(k5, 3 * width, width),
        }

    def attention(p: Any, x: Any) -> Any:
        q = checkpoint_name(x @ p["q"], "qkv_proj")
        k, v = jnp.split(checkpoint_name(x @ p["kv"], "qkv_proj"), 2, -1)
        q = q.reshape(batch, length, heads, d)
        k, v = (a.reshape(batch, length, pairs, d) for a in (k, v))
        q = _rotated(_rms_norm(p["q_norm"], q))
        k = _rotated(_rms_norm(p["k_norm"], k))
        q = q.reshape(batch, length, pairs, heads // pairs, d)
        scores = jnp.einsum("bqpgd,bkpd->bpgqk", q, k) * d**-0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        y = jnp.einsum("bpgqk,bkpd->bqpgd", weights, v)
        y = checkpoint_name(y.reshape(batch, length, heads * d), "context")
        return checkpoint_name(y @ p["out"], "out_proj")

    def block(p: Any, x: Any) -> Any:
        x = x + attention(p, _rms_norm(p["norm1"], x))
        wide = checkpoint_name(_rms_norm(p["norm2"], x) @ p["wi"], "mlpwi")
        gate, up = jnp.split(wide, 2, -1)
        return x + checkpoint_name((jax.nn.silu(gate) * up) @ p["wo"], "mlpwo")

    def draw(key: Any) -> tuple[Any, Any]:
        k1, k2, k3, k4 = jax.random.split(key, 4)
        embed = 0.1 * jax.random.normal(k1, (vocabulary, width))
        head = {
            "norm": jnp.zeros(width),
            "w": layers.normal(k2, width, vocabulary),
        }
        tokens = jax.random.randint(k3, (batch, length + 1), 0, vocabulary)
        return _params(embed, block_params, k4, n, head), tokens

    return Model(
        f"qwen{n}",
        draw,
        (block,) * n,
        embed=lambda p, tokens: p[tokens[:, :-1]],
        head=lambda p, x, tokens: layers.cross_entropy(
            _rms_norm(p["norm"], x) @ p["w"], tokens[:, 1:]
        ),
    )


# Parts that several of them share.


def _params(
    embed: Any, block_params: Callable[[Any], Any], key: Any, n: int, head: Any
) -> Any:
    blocks = [block_params(k) for k in jax.random.split(key, n)]
    return {"embed": embed, "blocks": blocks, "head": head}


def _dense_params(key: Any, fan_in: int, width: int) -> Any:
    return {"w": layers.normal(key, fan_in, width), "b": jnp.zeros(width)}


def _mlp_params(key: Any, width: int) -> Any:
    k1, k2 = jax.random.split(key)
    return {
        "wi": _dense_params(k1, width, 4 * width),
        "wo": _dense_params(k2, 4 * width, width),
    }


def _mlp(p: Any, x: Any) -> Any:
    wide = checkpoint_name(layers.dense(p["wi"], x), "mlpwi")
    return checkpoint_name(layers.dense(p["wo"], jax.nn.gelu(wide)), "mlpwo")


def _attention_params(key: Any, width: int) -> Any:
    """Parameters of `_attention` and `_mlp`."""
    k1, k2, k3 = jax.random.split(key, 3)
    return _mlp_params(k1, width) | {
        "qkv": _dense_params(k2, width, 3 * width),
        "out": _dense_params(k3, width, width),
    }


def _attention(p: Any, x: Any, heads: int) -> Any:
    """Attention of all tokens to all."""
    batch, length, width = x.shape
    qkv = checkpoint_name(layers.dense(p["qkv"], x), "qkv_proj")
    q, k, v = jnp.split(qkv.reshape(batch, length, heads, -1), 3, -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    y = checkpoint_name(y.reshape(x.shape), "context")
    return checkpoint_name(layers.dense(p["out"], y), "out_proj")


def _rms_norm(scale: Any, x: Any) -> Any:
    mean_square = (x**2).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * (1 + scale)


def _modulated(x: Any, shift: Any, scale: Any) -> Any:
    """A norm without parameters, its scale and bias given."""
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * (1 + scale) + shift


def _rotated(x: Any) -> Any:
    """Rotary positions of [batch, length, heads, features]: Su et al., arXiv 2104.09864."""
    half = x.shape[-1] // 2
    rates = 1e4 ** (-jnp.arange(half) / half)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None]
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _chained(first: Any, second: Any) -> Any:
    """One linear map after the other."""
    a1, b1 = first
    a2, b2 = second
    return a2 * a1, a2 * b1 + b2
