"""The loss scale beside the optimizer alone, and what it takes to trace and compile with autocast."""

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtricks as jt
from benchmarks import common
from benchmarks import language_model as lm
from jaxtricks import _table, _tree

ROUNDS = 30
BUILDS = 5
SIZE = lm.Size(layers=6, width=64, heads=4, length=32, batch=2, vocabulary=64)


def pairs() -> dict[str, tuple[Any, Any]]:
    """name -> (ours, the peer's)."""
    adam = optax.adam(1e-3)
    return {
        "dynamic_loss_scale(adam) / adam": (
            jt.amp.dynamic_loss_scale(adam),
            adam,
        )
    }


def table() -> _table.Table:
    """Time, compile time and state bytes of one update."""
    params = common.draw(common.transformer(6))
    rows = []
    for name, (ours, peer) in pairs().items():
        runs, seconds, sizes = zip(
            *(compiled_update(tx, params) for tx in (ours, peer)), strict=True
        )
        times = common.in_turn(
            dict(zip(("ours", "peer"), runs, strict=True)), ROUNDS
        )
        ratio = float(np.median(times["ours"] / times["peer"]))
        rows.append(
            (name, ratio, seconds[0] / seconds[1], f"{sizes[0]} / {sizes[1]}")
        )
    return _table.make(
        ("ours / peer", "time", "compile time", "state bytes"), rows
    )


def compiled_update(tx: Any, params: Any) -> tuple[Any, float, int]:
    """(run one update, seconds to trace and compile it, bytes of state)."""
    grads = jax.tree.map(lambda p: p * 1e-2, params)
    state = tx.init(params)
    start = time.perf_counter()
    update = jax.jit(tx.update).lower(grads, state, params).compile()
    seconds = time.perf_counter() - start
    return (
        lambda: jax.block_until_ready(update(grads, state, params)),
        seconds,
        _tree.nbytes(state),
    )


def build_table() -> _table.Table:
    """CPU seconds to trace, and to lower and compile, as ratios: medians of builds taken in turn."""
    rows = []
    for form in lm.FORMS:
        args = lm.shapes(SIZE, form != "unrolled")
        loss, hand = lm.loss(SIZE, form), lm.loss(SIZE, form, jnp.bfloat16)
        cast = jt.amp.autocast(loss)
        ways = {
            "loss": loss,
            "hand": jax.grad(hand),
            "cast loss": cast,
            "cast": jax.grad(cast),
        }
        ways["cast grad"] = jt.amp.autocast(jax.grad(loss))
        builds = [
            {n: build(fn, args) for n, fn in ways.items()}
            for _ in range(BUILDS)
        ]
        traced, compiled = (
            {n: float(np.median([b[n][i] for b in builds])) for n in ways}
            for i in (0, 1)
        )
        rows.append(
            (
                form,
                traced["cast loss"] / traced["loss"],
                *(
                    t[n] / t["hand"]
                    for t in (traced, compiled)
                    for n in ("cast", "cast grad")
                ),
            )
        )
    ratios = ("grad(autocast)", "autocast(grad)")
    headers = ["decoder, 6 layers", "trace: autocast(loss) / loss"]
    headers += [
        f"{what}: {way} / by hand"
        for what in ("trace", "compile")
        for way in ratios
    ]
    return _table.make(tuple(headers), rows)


def build(fn: Callable[..., Any], args: Any) -> tuple[float, float]:
    """CPU seconds to trace fn, and to lower and compile it, from nothing."""
    jax.clear_caches()
    gc.collect()
    gc.disable()  # whose turn a collection falls into is chance
    start = time.process_time()
    traced = jax.jit(fn).trace(*args)
    middle = time.process_time()
    traced.lower().compile()
    end = time.process_time()
    gc.enable()
    return middle - start, end - middle
