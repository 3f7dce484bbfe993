"""A decoder-only transformer over characters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxtricks.nnx as jnnx
from jaxtricks import _dtypes
from jaxtricks._typing import Array

# Of embeddings and the head: logits are near 0 at first.
_SMALL = nnx.initializers.normal(0.02)


def _kernel_init(variance: float = 1.0) -> nnx.Initializer:
    """Initialize with variance / fan_in: at any width a product has `variance` times that of its input."""
    return nnx.initializers.variance_scaling(variance, "fan_in", "normal")


def _widened(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Look up in float32 or better: the gradient of a row is the sum over all its occurrences."""
    return tuple(x.astype(_dtypes.wide_dtype(x)) for x in arrays)


class Attention(nnx.Module):
    """Causal self-attention; one product makes queries, keys and values of all heads."""

    row_parallel = ("out",)

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.qkv = linear(features, 3 * features, kernel_init=_kernel_init())
        self.out = linear(features, features, kernel_init=out_init)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, T, features] to [N, T, features]; position t sees positions up to t."""
        n, t, features = x.shape
        # Heads first: a product that is split over devices is split by heads.
        q, k, v = jnp.moveaxis(
            self.qkv(x).reshape(n, t, self.heads, 3, -1), 3, 0
        )
        y = causal_attention(q, k, v)
        return self.out(y.reshape(n, t, features))


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return softmax(q k^T / sqrt(D)) v over earlier positions, [N, T, heads, D] each.

    Products are in the dtype of the inputs in both passes, and the softmax is in
    float32 or better. `jax.nn.dot_product_attention` keeps float32 scores, whose
    gradients then multiply in float32.
    """
    t, depth = q.shape[1], q.shape[-1]
    scores = jnp.einsum("nqhd,nkhd->nhqk", q * depth**-0.5, k)
    earlier = jnp.tril(jnp.ones((1, 1, t, t), bool))
    weights = jax.nn.softmax(
        jnp.where(earlier, scores.astype(_dtypes.wide_dtype(scores)), -jnp.inf)
    )
    return jnp.einsum("nhqk,nkhd->nqhd", weights.astype(v.dtype), v)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block."""

    row_parallel = ("contract",)

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = Attention(
            features, heads, out_init=out_init, rngs=rngs
        )
        self.mlp_norm = nnx.LayerNorm(features, rngs=rngs)
        self.expand = linear(features, 4 * features, kernel_init=_kernel_init())
        self.contract = linear(4 * features, features, kernel_init=out_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, T, features] to [N, T, features]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(nnx.gelu(self.expand(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """Language model over characters or other tokens (GPT-2's layout: Radford et al., 2019).

    Args:
      vocab_size: tokens.
      context: longest sequence.
      features: width of the residual stream.
      layers: blocks.
      heads: attention heads; they divide the features.
      recompute: keep only each block's input for the backward pass and run the block
        again there.

    Raises:
      ValueError: heads that do not divide the features.
    """

    # The loss needs all the logits of an example in one place.
    unsplit = ("head",)

    def __init__(
        self,
        vocab_size: int,
        *,
        context: int = 128,
        features: int = 128,
        layers: int = 4,
        heads: int = 4,
        recompute: bool = False,
        rngs: nnx.Rngs,
    ):
        if features % heads:
            raise ValueError(
                f"Transformer: {heads} `heads` do not divide {features} `features`"
            )
        embed = functools.partial(
            nnx.Embed, embedding_init=_SMALL, promote_dtype=_widened, rngs=rngs
        )
        self.tokens = embed(vocab_size, features)
        self.positions = embed(context, features)
        # 2 * layers branches add up in the stream: each starts with its share of the
        # variance.
        out_init = _kernel_init(1 / (2 * layers))
        blocks = [
            Block(features, heads, out_init=out_init, rngs=rngs)
            for _ in range(layers)
        ]
        self.blocks = nnx.data(blocks)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(
            features, vocab_size, use_bias=False, kernel_init=_SMALL, rngs=rngs
        )
        self.context = context
        self.recompute = recompute

    def __call__(self, tokens: Array) -> jax.Array:
        """Map tokens int [N, T], T <= context, to logits [N, T, vocab_size] in the parameters' dtype.

        logits[n, t] are those of token t + 1, from tokens 0 to t.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"Transformer: {length} tokens in a context of {self.context}"
            )
        x = (
            self.tokens(jnp.asarray(tokens))
            + self.positions(jnp.arange(length))[None]
        )
        # What follows the lookup is in the dtype of the table.
        x = x.astype(self.tokens.embedding[...].dtype)
        for block in self.blocks:
            x = jnnx.recompute_grad(block)(x) if self.recompute else block(x)
        return self.head(self.norm(x))
