"""The loss scale beside the optimizer alone."""

import time
from typing import Any

import jax
import numpy as np
import optax

import jaxtricks as jt
from jaxtricks import _table, _tree
from tests.bench import common

ROUNDS = 30


def pairs() -> dict[str, tuple[Any, Any]]:
    """name -> (ours, the peer's)."""
    adam = optax.adam(1e-3)
    return {"dynamic_loss_scale(adam) / adam": (jt.amp.dynamic_loss_scale(adam), adam)}


def table() -> _table.Table:
    """Time, compile time and state bytes of one update."""
    params = common.draw(common.transformer(6))
    rows = []
    for name, (ours, peer) in pairs().items():
        runs, seconds, sizes = zip(
            *(compiled_update(tx, params) for tx in (ours, peer)), strict=True
        )
        times = common.in_turn(dict(zip(("ours", "peer"), runs, strict=True)), ROUNDS)
        ratio = float(np.median(times["ours"] / times["peer"]))
        rows.append((name, ratio, seconds[0] / seconds[1], f"{sizes[0]} / {sizes[1]}"))
    return _table.make(("ours / peer", "time", "compile time", "state bytes"), rows)


def compiled_update(tx: Any, params: Any) -> tuple[Any, float, int]:
    """(run one update, seconds to trace and compile it, bytes of state)."""
    grads = jax.tree.map(lambda p: p * 1e-2, params)
    state = tx.init(params)
    start = time.perf_counter()
    update = jax.jit(tx.update).lower(grads, state, params).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(update(grads, state, params)), seconds, _tree.nbytes(state)
