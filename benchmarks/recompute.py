"""Memory and arithmetic of recomputation: ours, jax.checkpoint, and none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _table, remat


def table() -> _table.Table:
    """Temporaries and FLOPs of the gradient of a deep network."""
    weights, x = arguments()
    wraps = {"plain": lambda f: f, "jax.checkpoint": jax.checkpoint}
    wraps["remat.recompute_grad"] = remat.recompute_grad
    reports = {
        name: remat.memory_analysis(deep_mlp(wrap), weights, x)
        for name, wrap in wraps.items()
    }
    body = [
        (n, _table.format_bytes(r.temp), f"{r.flops:.3e}")
        for n, r in reports.items()
    ]
    return _table.make(("16-layer MLP, 4 groups", "temporaries", "flops"), body)


def arguments(layers: int = 16) -> tuple[list[Any], Any]:
    """(weights, input) of `deep_mlp`, or of another number of layers of its size."""
    return [jnp.ones((128, 128))] * layers, jnp.ones((1024, 128))


def deep_mlp(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """value_and_grad of 16 layers in 4 wrapped groups."""

    def loss(weights: list[Any], x: Any) -> Any:
        for i in range(0, 16, 4):

            def block(ws: list[Any], x: Any) -> Any:
                for w in ws:
                    x = jnp.tanh(x @ w)
                return x

            x = wrap(block)(weights[i : i + 4], x)
        return (x**2).mean()

    return jax.value_and_grad(loss)
