"""A decoder trained with fully sharded parameters on any mesh of one axis; what `scale` compiles.

The layers are stacked and run by `lax.scan`. Parameters, gradients and optimizer state lie in equal
shares on all devices, as the batch does; a layer's weights are gathered when it runs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxtricks as jt

AXIS = "data"
MATRICES = "q", "k", "v", "o", "gate", "up", "down"
ROLES = jt.roles.by_path(
    {
        rf"layers/({'|'.join(MATRICES)})": (
            "in",
            "out",
        ),  # the leading axis of layers is "batch"
        "embedding|head": ("in", "out"),
        "layers/norm[12]|norm": ("none",),
    }
)
Loss = Callable[[Any, Any], Any]


class Size(NamedTuple):
    """Layers, features, features of the gated network, heads, length of the text, vocabulary."""

    layers: int
    width: int
    hidden: int
    heads: int
    length: int = 2048
    vocabulary: int = 32000


def shapes(size: Size, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The parameters as shapes."""
    d, h, v = size.width, size.hidden, size.vocabulary
    layer = dict.fromkeys("qkvo", (d, d)) | {
        "gate": (d, h),
        "up": (d, h),
        "down": (h, d),
    }
    layer |= {"norm1": (d,), "norm2": (d,)}
    table = {"embedding": (v, d), "head": (d, v), "norm": (d,)}
    made = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    stacked = {
        name: made((size.layers, *shape)) for name, shape in layer.items()
    }
    return {"layers": stacked} | {
        name: made(shape) for name, shape in table.items()
    }


def draw(size: Size, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The same as arrays: norms 1, the rest normal with deviation 0.02."""
    leaves, structure = jax.tree.flatten_with_path(shapes(size, dtype))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        jnp.ones(x.shape, dtype)
        if "norm" in jax.tree_util.keystr(path)
        else (0.02 * jax.random.normal(key, x.shape)).astype(dtype)
        for key, (path, x) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def specs(params: Any) -> Any:
    """Where the parameters lie: the first axis that counts no layers is cut over all devices."""
    return {
        name: jax.tree.map(lambda _: P(None, AXIS), leaf)
        if name == "layers"
        else P(AXIS)
        for name, leaf in params.items()
    }


def loss(
    size: Size,
    mesh: Mesh,
    recompute: Callable[[Any], Any] = lambda layer: layer,
) -> Loss:
    """(params, tokens [batch, length + 1]) -> nats per token.

    Args:
      size: of the model.
      mesh: the devices, along `AXIS`.
      recompute: wraps the layer, (x, weights) -> x. Activations have the dtype of the parameters; norms,
        softmax, rotations and loss are computed in float32.
    """
    gathered = functools.partial(jax.tree.map, _gathering(mesh))

    def attention(x: Any, p: Any) -> Any:
        b, t, d = x.shape
        q, k, v = (
            (x @ p[name]).reshape(b, t, size.heads, -1) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", _rotated(q), _rotated(k)).astype(
            jnp.float32
        )
        scores = scores * (d // size.heads) ** -0.5
        causal = jnp.tril(jnp.ones((1, 1, t, t), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(
            x.dtype
        )
        return (
            jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, d) @ p["o"]
        )

    def layer(x: Any, p: Any) -> Any:
        p = gathered(p)
        x = x + attention(_normed(x, p["norm1"]), p)
        h = _normed(x, p["norm2"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return _placed(x, mesh, P(AXIS))

    def run(params: Any, tokens: Any) -> Any:
        x = _placed(
            gathered(params["embedding"])[tokens[:, :-1]], mesh, P(AXIS)
        )
        again = recompute(layer)
        x, _ = jax.lax.scan(
            lambda x, p: (again(x, p), None), x, params["layers"]
        )
        logits = _normed(x, gathered(params["norm"])) @ gathered(params["head"])
        terms = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(terms, tokens[:, 1:, None], -1))

    return run


def step(tx: Any, fn: Loss) -> Callable[..., Any]:
    """(params, state, tokens) -> (params, state, loss) of a training step."""

    def run(params: Any, state: Any, tokens: Any) -> Any:
        value, grads = jax.value_and_grad(fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return run


def layout(tx: Any, params: Any, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Shardings of parameters, optimizer state and tokens."""
    laid = specs(params)
    found = laid, jt.memopt.state_specs(tx, params, laid), P(AXIS)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), found)


def jitted(tx: Any, params: Any, mesh: Mesh) -> Callable[[Loss], Any]:
    """loss -> its training step, jitted: everything cut over the mesh, params and state donated."""
    ins = layout(tx, params, mesh)
    outs = (*ins[:2], NamedSharding(mesh, P()))

    def within(fn: Loss) -> Any:
        return jax.jit(
            step(tx, fn),
            in_shardings=ins,
            out_shardings=outs,
            donate_argnums=(0, 1),
        )

    return within


def arguments(
    tx: Any, params: Any, tokens: Any, mesh: Mesh
) -> tuple[Any, Any, Any]:
    """(params, state, tokens) of the step, as shapes in their places."""
    state = jax.eval_shape(tx.init, params)

    def place(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(
        place, (params, state, tokens), layout(tx, params, mesh)
    )


def _gathering(mesh: Mesh) -> Callable[[Any], Any]:
    """A share of one parameter -> all of it; the gradient is summed into shares, never held whole."""

    @jax.custom_vjp
    def gather(x: Any) -> Any:
        return _placed(x, mesh, P())

    gather.defvjp(
        lambda x: (gather(x), None), lambda _, g: (_placed(g, mesh, P(AXIS)),)
    )
    return gather


def _placed(x: Any, mesh: Mesh, spec: P) -> Any:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _normed(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * size * scale.astype(jnp.float32)[None, None]).astype(x.dtype)


def _rotated(x: Any) -> Any:
    """Rotary positions of [batch, length, heads, features]."""
    half = x.shape[-1] // 2
    rate = 10000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[None, :, None, None] * rate[None, None, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(
        x.dtype
    )
