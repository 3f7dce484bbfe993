"""Prints one table: time, compile time and bytes of our transforms as ratios to the peer's."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtricks as jt
from jaxtricks import _table, _tree, remat
from jaxtricks.lab.report import hardware

ROUNDS = 30


def optimizer_pairs() -> dict[str, tuple[Any, Any]]:
    """name -> (ours, the peer's)."""
    return {
        "agc / optax.adaptive_grad_clip": (
            jt.agc.adaptive_grad_clip(0.01),
            optax.adaptive_grad_clip(0.01),
        ),
        "adafactor / optax.adafactor": (jt.memopt.adafactor(1e-3), optax.adafactor(1e-3)),
        "sm3 / optax.sm3": (jt.memopt.sm3(1e-1), optax.sm3(1e-1, momentum=0.0)),
        "dynamic_loss_scale(adam) / adam": (
            jt.amp.dynamic_loss_scale(optax.adam(1e-3)),
            optax.adam(1e-3),
        ),
    }


def transformer_tree(layers: int = 6, width: int = 256) -> dict[str, Any]:
    """Parameters shaped like a small transformer's."""
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width)}
    shapes |= {"down": (4 * width, width), "scale": (width,), "bias": (width,)}
    keys = iter(jax.random.split(jax.random.key(0), layers * len(shapes)))
    return {
        f"layer_{i}": {k: 0.02 * jax.random.normal(next(keys), s) for k, s in shapes.items()}
        for i in range(layers)
    }


def compiled_update(tx: Any, params: Any) -> tuple[Callable[[], Any], float, int]:
    """(run one update, seconds to trace and compile it, bytes of state)."""
    grads = jax.tree.map(lambda p: p * 1e-2, params)
    state = tx.init(params)
    start = time.perf_counter()
    update = jax.jit(tx.update).lower(grads, state, params).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(update(grads, state, params)), seconds, _tree.nbytes(state)


def median_ratio(ours: Callable[[], Any], peer: Callable[[], Any]) -> float:
    """Median over rounds of time(ours) / time(peer), taken in turn."""
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for run in (ours, peer):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios))


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


def main() -> None:
    """Print the tables."""
    params = transformer_tree()
    rows = []
    for name, (ours, peer) in optimizer_pairs().items():
        run, seconds, size = compiled_update(ours, params)
        peer_run, peer_seconds, peer_size = compiled_update(peer, params)
        ratio = median_ratio(run, peer_run)
        rows.append((name, ratio, seconds / peer_seconds, f"{size} / {peer_size}"))
    print(f"{hardware()}; {ROUNDS} rounds in turn, medians\n")
    print(_table.make(("ours / peer", "time", "compile time", "state bytes"), rows), end="\n\n")
    weights = [jnp.ones((128, 128))] * 16
    x = jnp.ones((1024, 128))
    wraps = {"plain": lambda f: f, "jax.checkpoint": jax.checkpoint}
    wraps["remat.recompute_grad"] = remat.recompute_grad
    reports = {name: remat.memory(deep_mlp(wrap), weights, x) for name, wrap in wraps.items()}
    body = [(n, _table.format_bytes(r.temp), f"{r.flops:.3e}") for n, r in reports.items()]
    print(_table.make(("16-layer MLP, 4 groups", "temporaries", "flops"), body))


if __name__ == "__main__":
    main()
