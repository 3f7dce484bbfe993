"""Blocks and clipping on real images: seven experiments with small networks, seeds and tuned rates.

The data are class folders train/CLASS and test/CLASS of 32 x 32 images (CIFAR-10, say), in a zip or a
directory. Every arm that has several candidate rates is tried with each on a seed that is not among those
reported; the best validation accuracy wins. Results are saved after every arm.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import image_task, network_arms, text_task
from benchmarks.image_task import Arm
from benchmarks.network_arms import EXPERIMENTS, Experiment
from jaxtricks import _table

COMMAND = "python -m benchmarks.networks --data cifar10.zip"
RESULTS = pathlib.Path(__file__).parent / "results" / "networks.json"
PER_CLASS = {"train": 2000, "validation": 100, "test": 300}
TUNING_SEED, SEEDS = 100, 3


def measure(
    task: image_task.Task,
    arms: dict[str, Arm],
    rows: Any,
    save: Callable[[], None],
    *,
    seeds: int,
) -> None:
    """Tune and train every arm that has no row yet."""
    for key, arm in arms.items():
        if key in rows:
            continue
        run = image_task.trainer(task, arm)
        tried = (
            [run(TUNING_SEED, rate) for rate in arm.rates]
            if len(arm.rates) > 1
            else []
        )
        if arm.like is not None:
            rate = rows[arm.like[0]]["rate"] * arm.like[1]
        else:
            best = max(
                tried,
                key=lambda r: (not r["diverged"], r["validation"]),
                default=None,
            )
            rate = arm.rates[0] if best is None else best["rate"]
        runs = [run(seed, rate) for seed in range(seeds)]
        about = {
            "name": arm.name,
            "batch": arm.batch,
            "steps": arm.steps,
            "rate": rate,
        }
        rows[key] = {**about, "runs": runs, "tried": tried}
        save()


def spread(values: list[Any], digits: int = 2) -> str | None:
    """Mean +- sample standard deviation of those that are not None."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    deviation = np.std(known, ddof=1) if len(known) > 1 else float("nan")
    return f"{np.mean(known):.{digits}f} +- {deviation:.{digits}f}"


def table(rows: dict[str, Any], experiment: Experiment) -> _table.Table:
    """One row an arm; columns that no arm fills are left out."""
    lines = [cells(row) for row in rows.values()]
    kept = [
        name
        for name in lines[0]
        if any(line[name] is not None for line in lines)
    ]
    body = [[line[name] for name in kept] for line in lines]
    return _table.make(kept, body, (*experiment.notes, *candidates(rows)))


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """What the table says of one arm; None where it does not apply."""
    runs = row["runs"]
    reached = [r["reached"] for r in runs if r.get("reached")]
    fused = [r for r in runs if "difference" in r]
    return {
        "arm": row["name"],
        "batch": row["batch"],
        "steps": row["steps"],
        "rate": f"{row['rate']:.3g}",
        "training loss": spread([r["loss"] for r in runs], 3),
        "test %": spread([100 * r["test"] for r in runs]),
        "diverged": f"{sum(r['diverged'] for r in runs)} of {len(runs)}",
        "steps to target": f"{spread(reached, 0)} ({len(reached)} of {len(runs)})"
        if reached
        else None,
        "difference": max((r["difference"] for r in fused), default=None),
        "largest logit": max((r["largest"] for r in fused), default=None),
        "changed": sum(r["other_predictions"] for r in fused)
        if fused
        else None,
    }


def candidates(rows: dict[str, Any]) -> list[str]:
    """A sentence for each arm whose rate was tuned."""
    return [
        f"{row['name']}, batch {row['batch']}: {row['rate']:g} was the best of "
        + ", ".join(
            f"{r['rate']:g} ({100 * r['validation']:.1f} %)"
            for r in row["tried"]
        )
        + " on the tuning seed."
        for row in rows.values()
        if row["tried"]
    ]


def settings(seeds: int) -> dict[str, Any]:
    """What all experiments share."""
    return {
        "images": {f"{name} per class": n for name, n in PER_CLASS.items()},
        "size": "16 x 16, means of 2 x 2 pixels",
        "augmentation": f"mirror images, shifts of up to {image_task.SHIFT} pixels",
        "optimizer": "SGD, Nesterov momentum 0.9, no weight decay; warm-up over a tenth, then a cosine",
        "clipping": network_arms.CLIPPING,
        "epsilon": network_arms.EPSILON,
        "remembered": network_arms.REMEMBERED,
        "seeds": seeds,
        "tuning_seed": TUNING_SEED,
    }


def markdown(found: dict[str, Any]) -> str:
    """All tables."""
    about, given = found["about"], found["settings"]
    lines = [
        f"Networks: `{about['command']}`",
        f"{about['hardware']}; {about['versions']}",
    ]
    lines.append(
        f"Mean +- sample standard deviation of {given['seeds']} seeds; rates tried on another one. Few "
        f"images and few steps: differences between arms, not records.\n{given}"
    )
    for name, rows in found["experiments"].items():
        experiment = EXPERIMENTS[name]()
        lines += [
            f"## {experiment.title} (`--only {name}`)",
            table(rows, experiment).markdown(),
        ]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Train, print the tables, save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument(
        "--only",
        choices=EXPERIMENTS,
        help="run this one again, keep the others",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the arms that are finished"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--images", type=int, help="seen in every run, to try the script"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args()
    old = (
        json.loads(given.out.read_text())["experiments"]
        if given.out.exists()
        else {}
    )
    if not given.resume:
        old = {k: v for k, v in old.items() if given.only not in (None, k)}
    found = {
        "about": text_task.about(COMMAND),
        "settings": settings(given.seeds),
        "experiments": old,
    }

    def save() -> None:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(markdown(found))

    task = image_task.make_task(given.data, PER_CLASS)
    size = {"size": given.images} if given.images else {}
    for name, make in EXPERIMENTS.items():
        if given.only in (None, name):
            rows = found["experiments"].setdefault(name, {})
            measure(task, make(**size).arms, rows, save, seeds=given.seeds)
    print(markdown(found))


if __name__ == "__main__":
    main()
