"""Is it worth stacking equal leaves into one and updating the stack? The same step, measured both ways."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtricks as jt
from benchmarks import common
from jaxtricks import _table

HEADERS = ("stacked / leaf by leaf", "step", "step min", "trace+compile")


def makers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """name -> maker of an optimizer that takes `roles`."""
    return {
        "memopt.adafactor": lambda roles=None: jt.memopt.adafactor(
            1e-3, roles=roles
        ),
        "memopt.sm3": lambda roles=None: jt.memopt.sm3(1e-3, roles=roles),
    }


def stacked(make: Callable[..., Any]) -> optax.GradientTransformation:
    """The optimizer on stacks of equal leaves (the new axis is "batch"), its update unstacked."""
    tx = make(roles=_roles)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        stacks, state = tx.update(_stack(updates), state, _stack(params))
        leaves, structure = jax.tree.flatten(updates)
        rows = {name: iter(list(stack)) for name, stack in stacks.items()}
        return jax.tree.unflatten(
            structure, [next(rows[_name(x)]) for x in leaves]
        ), state

    return optax.GradientTransformation(
        lambda params: tx.init(_stack(params)), update
    )


def table(params: Any, rounds: int, builds: int) -> _table.Table:
    """Ratios of time, stacked to leaf by leaf."""
    arrays = common.draw(params)
    rows = []
    for name, make in makers().items():
        txs = {"leaf by leaf": make(), "stacked": stacked(make)}
        runs = {
            key: common.stepper(
                common.compile_step(tx, params), tx, arrays, arrays
            )
            for key, tx in txs.items()
        }
        times = common.in_turn(runs, rounds)
        one, other = times["stacked"], times["leaf by leaf"]
        build = common.build_ratios(txs, params, builds, base="leaf by leaf")[
            "stacked"
        ]
        rows.append(
            (
                name,
                float(np.median(one / other)),
                float(one.min() / other.min()),
                build,
            )
        )
    return _table.make(HEADERS, rows)


def _stack(tree: Any) -> dict[str, Any]:
    groups: dict[str, list[Any]] = {}
    for x in jax.tree.leaves(tree):
        groups.setdefault(_name(x), []).append(x)
    return {name: jnp.stack(xs) for name, xs in groups.items()}


def _name(x: Any) -> str:
    return "x".join(map(str, x.shape))


def _roles(path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("batch", "in", "out") if len(shape) == 3 else ("batch", "none")
