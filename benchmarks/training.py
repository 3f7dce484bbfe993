"""AdamW, Adafactor and SM3 train the same small transformer: losses, and bytes of state.

Every optimizer has the same number of candidate peak rates, tried at full length on a seed that is not
among those reported; the lowest validation loss wins. SM3 with int8 momentum takes the rate of SM3.
"""

import argparse
from typing import Any

import jax
import optax

import jaxtricks as jt
from benchmarks import text_task
from benchmarks.text_task import Arm, Task
from jaxtricks import _table

COMMAND = "python -m benchmarks.training"
RATES = {
    "adamw": (1e-3, 2e-3, 4e-3, 8e-3),
    "adafactor": (1e-2, 2e-2, 4e-2, 8e-2),
    "sm3": (0.0075, 0.015, 0.03, 0.06),
}
# At first SM3 had (0.03, 0.06, 0.12, 0.24). The smallest won, so its candidates were moved and the SM3
# arms run again, with `--only sm3`; the others' first candidates had their best inside.
FIRST_SM3 = (0.03, 0.06, 0.12, 0.24)
TUNING_SEED = 100
LOSS_TARGET = 1.02  # of AdamW's
STATE_TARGET = {"adafactor": 0.005, "sm3": 0.5}


def arms(task: Task) -> dict[str, Arm]:
    """The optimizers by the key of their rates; "sm3 int8" has those of sm3."""

    def adafactor(rate: Any) -> optax.GradientTransformation:
        return jt.memopt.adafactor(
            rate, roles=task.roles, min_dim_size_to_factor=32
        )

    def sm3(dtype: str | None) -> Any:
        return lambda rate: jt.memopt.sm3(
            rate, momentum=0.9, momentum_dtype=dtype, roles=task.roles
        )

    return {
        "adamw": Arm("AdamW", optax.adamw),
        "adafactor": Arm("Adafactor, no momentum", adafactor),
        "sm3": Arm("SM3, momentum in float32", sm3(None)),
        "sm3 int8": Arm("SM3, momentum in int8", sm3("int8")),
    }


def measure(
    task: Task, found: Any, *, steps: int, batch: int, seeds: int
) -> dict[str, Any]:
    """Tune and train every arm that is not among those found: {key: figures}."""
    params = jax.eval_shape(lambda: task.init(0))
    for key, arm in arms(task).items():
        if key in found:
            continue
        run = text_task.trainer(task, arm, steps=steps, batch=batch)
        if key in RATES:
            tried = {
                rate: run(TUNING_SEED, rate).validation for rate in RATES[key]
            }
            rate = min(tried, key=tried.get)
        else:
            tried, rate = {}, found["sm3"]["rate"]
        found[key] = {
            "name": arm.name,
            "rate": rate,
            "tried": [
                {"rate": r, "validation": loss} for r, loss in tried.items()
            ],
            "state_bytes": jt.memopt.state_bytes(arm.tx(0.0), params),
            **text_task.summary([run(seed, rate) for seed in range(seeds)]),
        }
    return found


def with_ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Add what every figure is of AdamW's."""
    base = found["adamw"]
    for row in found.values():
        row["of_adamw"] = {
            "train": row["train"]["mean"] / base["train"]["mean"],
            "validation": row["validation"]["mean"]
            / base["validation"]["mean"],
            "state": row["state_bytes"] / base["state_bytes"],
        }
    return found


def table(found: dict[str, Any]) -> _table.Table:
    """One row an optimizer."""
    headers = (
        "optimizer",
        "rate",
        "training",
        "of AdamW's",
        "validation",
        "of AdamW's",
    )
    rows = [
        (
            row["name"],
            row["rate"],
            text_task.spread(row["train"]),
            row["of_adamw"]["train"],
            text_task.spread(row["validation"]),
            row["of_adamw"]["validation"],
            row["state_bytes"],
            row["of_adamw"]["state"],
        )
        for row in found.values()
    ]
    return _table.make((*headers, "state bytes", "of AdamW's"), rows)


def verdicts(found: dict[str, Any]) -> list[str]:
    """Each target: met or missed, with the figure."""
    lines = []
    for key in found:
        if key == "adamw":
            continue
        row, of = found[key], found[key]["of_adamw"]
        for what in ("train", "validation"):
            lines.append(
                f"{row['name']}: {what} loss at most {LOSS_TARGET} of AdamW's: "
                f"{_met(of[what] <= LOSS_TARGET)} ({of[what]:.4f})"
            )
        limit = STATE_TARGET[key.split()[0]]
        met = _met(of["state"] <= limit)
        lines.append(
            f"{row['name']}: state at most {limit} of AdamW's: {met} ({of['state']:.4f})"
        )
    return lines


def edges(found: dict[str, Any]) -> list[str]:
    """A sentence for each optimizer whose best rate is the first or last of its candidates."""
    return [
        f"{found[key]['name']}: the best rate {found[key]['rate']:g} is the "
        f"{'smallest' if found[key]['rate'] == rates[0] else 'largest'} candidate"
        for key, rates in RATES.items()
        if found[key]["rate"] in (rates[0], rates[-1])
    ]


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"


def kept(only: str | None, size: dict[str, int]) -> dict[str, Any]:
    """The rows of the results file that are not run again."""
    if only is None:
        return {}
    saved = text_task.load("training")
    if any(saved["settings"][name] != value for name, value in size.items()):
        raise SystemExit(
            f"the results are of {saved['settings']}: run all of them again"
        )
    return {
        key: row for key, row in saved["rows"].items() if key.split()[0] != only
    }


def main() -> None:
    """Train, print the table, save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", choices=RATES, help="run this one again and keep the others"
    )
    given = parser.parse_args()
    size = {"steps": given.steps, "batch": given.batch, "seeds": given.seeds}
    settings = {**size, "model": text_task.model_settings(), "rates": RATES}
    task = text_task.make_task()
    found = with_ratios(measure(task, kept(given.only, size), **size))
    about = text_task.about(COMMAND)
    text_task.save("training", {**about, "settings": settings, "rows": found})
    print(f"\n{about['hardware']}\n{about['versions']}")
    print(
        f"{given.steps} steps of {given.batch} x {text_task.CONTEXT} characters, n = {given.seeds} seeds, "
        "mean +- std; nats per character; warm-up, then a cosine to zero;\n"
        f"{len(RATES['adamw'])} peak rates tried for each on seed {TUNING_SEED}: {RATES};\n"
        f"SM3 had {FIRST_SM3} at first, and the smallest won\n"
    )
    print(table(found), *verdicts(found), *edges(found), sep="\n")


if __name__ == "__main__":
    main()
