"""Losses of every kind of program that mixed precision meets: name -> (loss(params, batch), arguments)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
import optax
from benchmarks import language_model as lm
from benchmarks.amp_peers import mlp
from flax import linen, nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

BATCH, WIDTH = 8, 16
Case = tuple[Callable[..., Any], tuple[Any, Any]]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    """Normal numbers."""
    return scale * jax.random.normal(jax.random.key(seed), shape)


def kernels(n: int, seed: int = 1) -> Any:
    """[n, WIDTH, WIDTH], which keep the size of what they multiply."""
    return draw(n, WIDTH, WIDTH, seed=seed, scale=WIDTH**-0.5)


def perceptron() -> Case:
    """Products, biases, softmax."""
    labels = jnp.arange(BATCH) % WIDTH
    return mlp, ([(k, 0.1 * draw(WIDTH)) for k in kernels(3)], (draw(BATCH, WIDTH), labels))


class _CNN(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.BatchNorm(use_running_average=False)(linen.Conv(8, (3, 3))(x))
        x = linen.max_pool(linen.relu(x), (3, 3), (2, 2))  # windows overlap
        x = linen.GroupNorm(2)(linen.Conv(16, (3, 3), feature_group_count=4)(x))
        x = linen.avg_pool(linen.swish(x), (2, 2), (1, 1))
        gate = linen.Dense(16)(x.mean((1, 2)))
        x = (x * linen.sigmoid(gate)[:, None, None]).max((1, 2))
        return linen.Dense(4)(x)


def cnn() -> Case:
    """linen with `mutable=`: batch and group norms, pools, grouped convolution, a gate over space."""
    model, x = _CNN(), draw(4, 8, 8, 2)
    variables = model.init(jax.random.key(0), x)

    def loss(params: Any, batch: Any) -> Any:
        logits, new = model.apply(
            {**variables, "params": params}, batch[0], mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean() + 0 * sum(x.sum() for x in jax.tree.leaves(new))

    return loss, (variables["params"], (x, jnp.arange(4)))


def transformer(form: str) -> Case:
    """Causal attention, RMS norms, GELU, tied embeddings; unrolled, scanned, recomputed."""
    size = lm.Size(layers=2, width=16, heads=2, length=8, batch=2, vocabulary=32)
    return lm.loss(size, form), lm.draw(size, form != "unrolled")


def lstm() -> Case:
    """An nnx recurrent network: a scan whose carry is multiplied."""
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, WIDTH, rngs=nnx.Rngs(0)))
    apply, params, state = jt.nnx.functional(rnn)

    def loss(params: Any, batch: Any) -> Any:
        return (apply(params, state, batch, train=True, key=jax.random.key(0))[0] ** 2).mean()

    return loss, (params, draw(2, 6, 8))


def custom_rules() -> Case:
    """custom_vjp with an integer argument, custom_jvp; products in their rules; checkpoint in scan."""

    @functools.partial(jax.custom_vjp)
    def layer(x: Any, w: Any, times: int) -> Any:
        return jnp.tanh(x @ w) * times

    def forward(x: Any, w: Any, times: int) -> Any:
        y = layer(x, w, times)
        return y, (x, w, y, times)

    def backward(saved: Any, g: Any) -> Any:
        x, w, y, times = saved
        g = g * (1 - (y / times) ** 2) * times
        return g @ w.T, x.T @ g, None

    layer.defvjp(forward, backward)

    @jax.custom_jvp
    def square(w: Any) -> Any:
        return w @ w

    @square.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        (w,), (t,) = primals, tangents
        return square(w), w @ t + t @ w

    def loss(params: Any, batch: Any) -> Any:
        step = jax.checkpoint(lambda x, w: (layer(x, square(w), 2), None))
        return (lax.scan(step, batch, params)[0] ** 2).mean()

    return loss, (kernels(3), draw(BATCH, WIDTH))


def mixture_of_experts() -> Case:
    """Top-1 routing: softmax, top_k, dispatch by gather and by one-hot products."""

    def loss(params: Any, x: Any) -> Any:
        mix, router, experts = params
        x = jnp.tanh(x @ mix)
        gates, chosen = lax.top_k(jax.nn.softmax(x @ router), 1)
        order = jnp.argsort(chosen[:, 0])
        x = x[order]
        onehot = jax.nn.one_hot(chosen[order, 0], len(experts))
        y = jnp.einsum("be,bd,edf->bf", onehot, x, experts)
        return ((y * gates[order]) ** 2).mean()

    return loss, ((kernels(1)[0], draw(WIDTH, 4), kernels(4)), draw(BATCH, WIDTH))


def masked_attention() -> Case:
    """jax.nn.dot_product_attention with a mask of lengths, and dropout."""

    def loss(params: Any, batch: Any) -> Any:
        x, lengths = batch
        q, k, v = (jnp.reshape(x @ w, (*x.shape[:2], 2, 8)) for w in params)
        mask = (jnp.arange(x.shape[1]) < lengths[:, None])[:, None, None]
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        keep = jax.random.bernoulli(jax.random.key(7), 0.9, y.shape)
        return (jnp.where(keep, y / 0.9, 0) ** 2).mean()

    return loss, (kernels(3), (draw(2, 6, WIDTH), jnp.array([4, 6])))


def data_parallel() -> Case:
    """shard_map over four devices, a scan inside, the mean over all of them."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    def loss(params: Any, x: Any) -> Any:
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)
        return lax.pmean((x**2).mean(), "data")

    return loss, (kernels(2), draw(BATCH, WIDTH))


def tensor_parallel() -> Case:
    """shard_map, the hidden features split over four devices, a sum over them after the second product."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    columns, rows, whole = PartitionSpec(None, "model"), PartitionSpec("model"), PartitionSpec()
    specs = (columns, rows), whole

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=whole)
    def loss(params: Any, x: Any) -> Any:
        up, down = params
        x = x + lax.psum(jax.nn.gelu(x @ up) @ down, "model")
        return (x**2).mean()

    return loss, (tuple(kernels(2)), draw(BATCH, WIDTH))


def control_flow() -> Case:
    """cond with a product in one branch, and a loop of constant length."""

    def loss(w: Any, x: Any) -> Any:
        x = lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: jnp.tanh(x), x)
        return (lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w), x) ** 2).mean()

    return loss, (kernels(1)[0], jnp.abs(draw(BATCH, WIDTH)))


def sorting_and_pooling() -> Case:
    """What is exact in any dtype but whose derivative sums."""

    def loss(w: Any, x: Any) -> Any:
        y = x @ w
        picked = y[jnp.array([0, 0, 1, 2])]
        return (jnp.sort(y, 0)[:3] ** 2).mean() + (y.max(1) ** 2).mean() + (picked**2).mean()

    return loss, (kernels(1)[0], draw(BATCH, WIDTH))


CASES: dict[str, Callable[[], Case]] = {
    "MLP": perceptron,
    "CNN": cnn,
    **{f"transformer, {form}": functools.partial(transformer, form) for form in lm.FORMS},
    "LSTM": lstm,
    "custom rules": custom_rules,
    "mixture of experts": mixture_of_experts,
    "masked attention": masked_attention,
    "data parallel": data_parallel,
    "tensor parallel": tensor_parallel,
    "control flow": control_flow,
    "sorting and pooling": sorting_and_pooling,
}
