"""The `train` command: one run with a progress bar, logs and a final table."""

from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxtricks import _table
from jaxtricks.lab import compose, loop
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.config import Train

_SPLITS = ("balanced_accuracy", "many", "medium", "few")
_QUICK = 1024  # test images behind the figure in the progress bar


def run(cfg: Train, command: str = "") -> dict[str, Any]:
    """Train, evaluate, print a table, and leave a run directory behind.

    Args:
      cfg: checked settings.
      command: the command line, for config.json.

    Returns:
      {"train": summary, "test": summary} with accuracies in [0, 1].
    """
    console = Console()
    data = data_lib.load(cfg.data, imbalance=cfg.imbalance, seed=cfg.seed)
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    place = loop.Placement.over(cfg.devices)
    folder = loop.RunDir(cfg.out, cfg, command)
    console.print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images, "
        f"{len(data.classes)} classes, counts {', '.join(map(str, counts))}"
    )
    program = loop.build(cfg, data)
    state = jax.device_put(program.init(cfg.seed, counts), place.state)
    step = jax.jit(program.step, donate_argnums=0)
    batches = data_lib.pipeline(
        data.train,
        batch=cfg.batch,
        seed=cfg.seed,
        transform=compose.build_reads(cfg),
        to_device=lambda batch: jax.device_put(batch, place.batch),
    )
    evaluate = loop.Evaluator(program, len(data.classes))
    with _progress(console) as progress:
        task = progress.add_task(
            "training", total=cfg.steps, balanced=float("nan"), loss=float("nan")
        )
        every = max(1, cfg.steps // 5 // cfg.log_every) * cfg.log_every
        done, balanced = 0, float("nan")
        while done < cfg.steps:
            n = min(every, cfg.steps - done)

            def log(i: int, metrics: dict[str, float], start: int = done) -> None:
                folder.log(start + i, metrics)
                progress.update(task, completed=start + i, loss=metrics["loss"])

            state = loop.fit(step, state, batches, n, log_every=cfg.log_every, log=log)
            done += n
            balanced = evaluate(state, data.test, _QUICK)["balanced_accuracy"]
            progress.update(task, balanced=balanced)
    splits = {"train": data.train, "test": data.test}
    result = {name: evaluate(state, split) for name, split in splits.items()}
    folder.write("result.json", {**result, "bytes_read": data.train.bytes_read})
    console.print(str(summary_table(result)), highlight=False)
    console.print(f"run directory: {folder.path}", highlight=False)
    return result


def summary_table(result: dict[str, Any]) -> _table.Table:
    """Balanced accuracy of each split, overall and over the many/medium/few-shot classes."""
    rows = [
        (name, summary["accuracy"], *(summary[key] for key in _SPLITS))
        for name, summary in result.items()
    ]
    return _table.make(("split", "accuracy", "balanced", "many", "medium", "few"), rows)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  balanced accuracy {task.fields[balanced]:.3f}"),
        console=console,
    )
