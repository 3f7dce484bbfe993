"""What `make claims` measures itself: bytes from shapes, compiled programs, and times in one process."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtricks as jt
from benchmarks import common, recompute
from benchmarks import language_model as lm
from benchmarks.claims_evidence import Figures, ratio

SIZE = lm.Size(layers=3, width=128, heads=4, length=64, batch=8, vocabulary=256)
ROUNDS = 15
DEPTHS = 16, 64


def state(name: str) -> Figures:
    """Bytes of optimizer state a parameter beside AdamW's, from shapes."""
    params, txs = common.transformer(12), common.optimizers()
    each = (
        jt.memopt.state_bytes(txs[key], params) / common.count(params)
        for key in (name, common.BASE)
    )
    return ratio(*each)


def compiled_loss() -> Figures:
    """Temporaries of value and gradient of a decoder on this machine, autocast to float32, MiB."""
    args = lm.shapes(SIZE, False)

    def temp(fn: Callable[..., Any]) -> float:
        return (
            common.temp_bytes(
                jax.jit(jax.value_and_grad(fn)).lower(*args).compile()
            )
            / 2**20
        )

    loss = lm.loss(SIZE)
    return ratio(temp(jt.amp.autocast(loss)), temp(loss))


@functools.cache
def times() -> dict[str, np.ndarray]:
    """Seconds of value and gradient of a decoder in every round: op by op, compiled, compiled and cast."""
    args, loss = lm.draw(SIZE, False), lm.loss(SIZE)
    ways = {
        "eager": jax.value_and_grad(loss),
        "jit": jax.jit(jax.value_and_grad(loss)),
        "autocast": jax.jit(jax.value_and_grad(jt.amp.autocast(loss))),
    }
    runs = {
        name: lambda f=f: jax.block_until_ready(f(*args))
        for name, f in ways.items()
    }
    common.in_turn(runs, 2)  # compiles
    return common.in_turn(runs, ROUNDS)


def timed(ours: str, base: str) -> Figures:
    """Median of the ratios in the same round; milliseconds, mean and deviation over the rounds."""
    found = times()
    text = (
        f"{1e3 * t.mean():.1f} +- {1e3 * t.std(ddof=1):.1f}"
        for t in (found[ours], found[base])
    )
    return Figures(
        *text, float(np.median(found[ours] / found[base])), None, ROUNDS
    )


def recomputed() -> Figures:
    """Temporaries of the gradient of 16 layers in 4 groups, MiB."""
    args = recompute.arguments()
    wraps = (jt.remat.recompute_grad, lambda f: f)
    found = (
        jt.remat.memory_analysis(recompute.deep_mlp(wrap), *args).temp
        for wrap in wraps
    )
    return ratio(*(temp / 2**20 for temp in found))


def growth(segments: str) -> Figures:
    """How temporaries of a gradient grow from 16 to 64 layers, recomputed in segments; MiB."""

    def temp(layers: int) -> float:
        run = jt.remat.sequential(
            [lambda w, x: jnp.tanh(x @ w)] * layers, segments
        )
        # By the weights: those gradients are results. By x alone they would count as temporaries.
        gradient = jax.grad(lambda ws, x: (run(ws, x) ** 2).mean())
        return (
            jt.remat.memory_analysis(
                gradient, *recompute.arguments(layers)
            ).temp
            / 2**20
        )

    few, many = map(temp, DEPTHS)
    return ratio(many, few)
