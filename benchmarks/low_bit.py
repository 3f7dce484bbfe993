"""AdamW with its state in 32, 8 and 4 bits, and in 7 bytes a parameter: losses of a small transformer.

The batches are the same for every arm, the products are float32 in every arm, and the rate is the one that
`training` found best for AdamW in float32: nothing is tuned for the narrow states.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxtricks as jt
from benchmarks import text_task
from benchmarks.text_task import Arm
from jaxtricks import _table, _tree

COMMAND = "python -m benchmarks.low_bit"
RESULTS = pathlib.Path(__file__).parent / "results" / "low_bit.md"
LIMITS = {"8 bits": 1.005, "4 bits": 1.01, "adamw7": 1.005}  # of float32's


def arms() -> dict[str, Arm]:
    """AdamW in float32, its state in 8 and in 4 bits, and adamw7."""

    def low_bit(bits: int) -> Any:
        return lambda rate: jt.memopt.low_bit(optax.adamw(rate), bits=bits)

    return {
        "float32": Arm("AdamW, float32", optax.adamw),
        "8 bits": Arm("low_bit(AdamW), 8 bits", low_bit(8)),
        "4 bits": Arm("low_bit(AdamW), 4 bits", low_bit(4)),
        "adamw7": Arm(
            "adamw7, bfloat16 parameters", jt.memopt.adamw7, jnp.bfloat16
        ),
    }


def rows(rate: float, *, steps: int, batch: int, seeds: int) -> dict[str, Any]:
    """Figures of every arm."""
    task, found = text_task.make_task(), {}
    for key, arm in arms().items():
        run = text_task.trainer(task, arm, steps=steps, batch=batch)
        params = _tree_of(task, arm.dtype)
        count = sum(p.size for p in jax.tree.leaves(params))
        held = _tree.nbytes(params) + jt.memopt.state_bytes(arm.tx(0.0), params)
        found[key] = {
            "name": arm.name,
            "bytes": held / count,
            **text_task.summary([run(seed, rate) for seed in range(seeds)]),
        }
    return found


def _tree_of(task: text_task.Task, dtype: Any) -> Any:
    return jax.eval_shape(
        lambda: jax.tree.map(lambda p: p.astype(dtype), task.init(0))
    )


def table(found: dict[str, Any]) -> _table.Table:
    """One row an arm."""
    base = found["float32"]
    headers = ("optimizer", "bytes/param", "training", "of float32's")
    body = [
        (
            row["name"],
            row["bytes"],
            text_task.spread(row["train"]),
            row["train"]["mean"] / base["train"]["mean"],
            text_task.spread(row["validation"]),
            row["validation"]["mean"] / base["validation"]["mean"],
        )
        for row in found.values()
    ]
    notes = []
    for key, limit in LIMITS.items():
        of = found[key]["validation"]["mean"] / base["validation"]["mean"]
        met = "met" if of <= limit else "MISSED"
        notes.append(
            f"{found[key]['name']}: validation loss at most {limit} of float32's: "
            f"{met} ({of:.4f})"
        )
    return _table.make((*headers, "validation", "of float32's"), body, notes)


def main() -> None:
    """Train, print the table, write it with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    rate = text_task.load("training")["rows"]["adamw"]["rate"]
    found = rows(rate, steps=given.steps, batch=given.batch, seeds=given.seeds)
    about = text_task.about(COMMAND)
    text = (
        f"{about['hardware']}\n{about['versions']}\n\n"
        f"{given.steps} steps of {given.batch} x {text_task.CONTEXT} characters at a peak rate of {rate:g}, "
        f"n = {given.seeds} seeds, mean +- std; nats per character. "
        "Bytes are those of parameter and state, without the gradient.\n\n"
        f"{table(found)}\n"
    )
    print(text)
    if given.out:
        given.out.write_text(f"`{COMMAND}`\n\n```\n{text}```\n")


if __name__ == "__main__":
    main()
