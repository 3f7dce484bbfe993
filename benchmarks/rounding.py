"""Parameters in bfloat16: what rounding to the nearest loses, and what `stochastic_round` keeps.

Adafactor trains the transformer of `training`. Its state is float32 in every arm, the products are
float32 in every arm, and the batches are the same: the arms differ in how parameters are stored and
rounded. The rate is not tuned. It is shown small and large, because what is lost depends on it:
Adafactor's steps are relative to the weights, and a step below 1/512 of a weight is no step in bfloat16.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxtricks as jt
from benchmarks import text_task
from benchmarks.text_task import Arm, Task
from jaxtricks import _table

COMMAND = "python -m benchmarks.rounding"
RATES = (1e-3, 1e-2)  # peaks: below and above 1/512
LOSS_TARGET = 1.02  # of float32's


def arms(task: Task) -> dict[str, Arm]:
    """float32, bfloat16 rounded to the nearest, bfloat16 rounded at random."""

    def plain(rate: Any) -> optax.GradientTransformation:
        return jt.memopt.adafactor(
            rate, roles=task.roles, min_dim_size_to_factor=32
        )

    def rounded(rate: Any) -> optax.GradientTransformation:
        return optax.chain(plain(rate), jt.memopt.stochastic_round(0))

    return {
        "float32": Arm("float32", plain),
        "bfloat16": Arm("bfloat16, to the nearest", plain, jnp.bfloat16),
        "rounded": Arm("bfloat16, stochastic_round", rounded, jnp.bfloat16),
    }


def measure(
    task: Task, *, steps: int, batch: int, seeds: int
) -> list[dict[str, Any]]:
    """Figures of every arm at every rate."""
    params, rows = jax.eval_shape(lambda: task.init(0)), []
    for key, arm in arms(task).items():
        run = text_task.trainer(task, arm, steps=steps, batch=batch)
        size = sum(
            arm.dtype(0).dtype.itemsize * p.size
            for p in jax.tree.leaves(params)
        )
        for rate in RATES:
            runs = [run(seed, rate) for seed in range(seeds)]
            figures = text_task.summary(runs)
            name = {
                "key": key,
                "name": arm.name,
                "rate": rate,
                "param_bytes": size,
            }
            rows.append({**name, **figures})
    base = {row["rate"]: row for row in rows if row["key"] == "float32"}
    for row in rows:
        row["of_float32"] = {
            what: row[what]["mean"] / base[row["rate"]][what]["mean"]
            for what in ("train", "validation")
        }
    return rows


def table(rows: list[dict[str, Any]]) -> _table.Table:
    """One row an arm and rate."""
    headers = (
        "peak rate",
        "parameters",
        "training",
        "of float32's",
        "validation",
        "of float32's",
    )
    body = [
        (
            row["rate"],
            row["name"],
            text_task.spread(row["train"]),
            row["of_float32"]["train"],
            text_task.spread(row["validation"]),
            row["of_float32"]["validation"],
            row["param_bytes"],
        )
        for row in sorted(rows, key=lambda row: row["rate"])
    ]
    return _table.make((*headers, "bytes"), body)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The target for each rate: met or missed, beside what rounding to the nearest gives."""
    lines = []
    for rate in RATES:
        of = {
            r["key"]: r["of_float32"]["validation"]
            for r in rows
            if r["rate"] == rate
        }
        met = "met" if of["rounded"] <= LOSS_TARGET else "MISSED"
        lines.append(
            f"rate {rate:g}: stochastic_round's validation loss at most {LOSS_TARGET} of float32's: {met} "
            f"({of['rounded']:.4f}); to the nearest {of['bfloat16']:.4f}"
        )
    return lines


def main() -> None:
    """Train, print the table, save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    task = text_task.make_task()
    rows = measure(task, **vars(given))
    settings = {
        **vars(given),
        "model": text_task.model_settings(),
        "rates": RATES,
    }
    about = text_task.about(COMMAND)
    text_task.save("rounding", {**about, "settings": settings, "rows": rows})
    print(f"\n{about['hardware']}\n{about['versions']}")
    print(
        f"{given.steps} steps of {given.batch} x {text_task.CONTEXT} characters, n = {given.seeds} seeds, "
        "mean +- std; nats per character; warm-up, then a cosine to zero\n"
    )
    print(table(rows), *verdicts(rows), sep="\n")


if __name__ == "__main__":
    main()
