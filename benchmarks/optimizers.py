"""Optimizers beside optax's and beside AdamW: step time, memory traffic, temporaries, build time, state.

Ratios of time are between rows of one process, run in turn; bytes are XLA's own counts and exact.
"""

from typing import Any

import numpy as np

from benchmarks import common, grouping
from jaxtricks import _table
from jaxtricks.lab.report import hardware

ROUNDS, BUILDS = 40, 5
HEADERS = (
    "optimizer",
    "step",
    "step min",
    "bytes/param",
    "temp MiB",
    "build",
    "build, 289 leaves",
    "state/param",
)


def rows(rounds: int, builds: int) -> list[tuple[Any, ...]]:
    """One row an optimizer; see `HEADERS`. Step and build are ratios to AdamW's."""
    params, txs = common.transformer(12), common.optimizers()
    compiled = {
        name: common.compile_step(tx, params) for name, tx in txs.items()
    }
    costs = {
        name: common.cost(compiled[name], tx, params)
        for name, tx in txs.items()
    }
    times = step_times(txs, compiled, params, rounds)
    build, deep = build_times(txs, params, builds)
    base = times[common.BASE]
    return [
        (
            name,
            float(np.median(times[name] / base)),
            float(times[name].min() / base.min()),
            c.accessed,
            c.temp / 2**20,
            build[name],
            deep.get(name),
            c.state,
        )
        for name, c in costs.items()
    ]


def build_times(
    txs: Any, params: Any, builds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios for 12 layers and for 24; int8 takes minutes: built once, and not for 24 layers."""
    plain = {name: tx for name, tx in txs.items() if "int8" not in name}
    coded = {
        name: tx
        for name, tx in txs.items()
        if name not in plain or name == common.BASE
    }
    ratios = common.build_ratios(coded, params, 1) | common.build_ratios(
        plain, params, builds
    )
    return ratios, common.build_ratios(
        plain, common.transformer(24), max(1, builds // 2)
    )


def step_times(
    txs: Any, compiled: Any, params: Any, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of every optimizer's step in every round."""
    arrays = common.draw(params)
    runs = {
        name: common.stepper(compiled[name], tx, arrays, arrays)
        for name, tx in txs.items()
    }
    return common.in_turn(runs, rounds)


def heading(command: str, rounds: int = ROUNDS, builds: int = BUILDS) -> str:
    """What was run, on what, how often."""
    return (
        f"Optimizers: `{command}`\n\n{hardware()}.\n\n"
        "Parameters: a 12-layer transformer of width 256, float32, 145 leaves, 10.5 M; 289 leaves: 24\n"
        "layers. step: update and apply_updates, params and state donated: median over "
        f"{rounds} rounds of the\n"
        "ratio to AdamW's in the same round, and the ratio of the smallest times. build: trace and compile,\n"
        f"ratio of the medians of {builds} ({max(1, builds // 2)} for 289 leaves, 1 for int8).\n"
        "bytes/param: XLA's bytes accessed; state/param: bytes. Last: equal leaves stacked, updated and\n"
        "unstacked, as ratios to leaf by leaf."
    )


def tables(rounds: int = ROUNDS, builds: int = BUILDS) -> list[_table.Table]:
    """The rows, and whether stacking equal leaves would pay."""
    main = _table.make(HEADERS, rows(rounds, builds))
    return [main, grouping.table(common.transformer(12), rounds, builds)]


def main() -> None:
    """Measure and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments(
        "benchmarks.optimizers", rounds=ROUNDS, builds=BUILDS
    )
    found = tables(args.rounds, args.builds)
    common.publish(found, heading(command, args.rounds, args.builds), args.out)


if __name__ == "__main__":
    main()
