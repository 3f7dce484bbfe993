"""Find a learning rate: a range test of the run that the same options would train."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxtricks import cyclical, plot
from jaxtricks.lab import plots, rundir
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import LrFind
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.rundir import RunDir, can_begin
from jaxtricks.lab.trainer import Feed

PICTURE = "lr_range.png"


def main(cfg: LrFind, command: str) -> None:
    """Sweep and draw: what the command line calls."""
    sweep = run(cfg, command)
    plots.save(plot.lr_range(sweep), pathlib.Path(cfg.out) / PICTURE)


def run(cfg: LrFind, command: str = "") -> cyclical.RangeTest:
    """Sweep the rate, print the suggestion, leave range.json and report.md behind.

    Args:
      cfg: checked settings.
      command: the command line, for config.json.

    Returns:
      The result of `cyclical.lr_range_test`.

    Raises:
      UserError: something that the user can mend.
    """
    say = functools.partial(
        Console().print, highlight=False, markup=False, soft_wrap=True
    )
    # One update per rate: a sweep has no use for averages over updates.
    cfg = dataclasses.replace(cfg, ema=0.0, accumulate=1)
    can_begin(cfg.out)
    Placement.of(cfg.parallel).check(cfg.micro_batch)
    data = train.load(cfg)
    # AdamW and Adafactor as composed here are proportional to the rate, so that 1 can
    # be scaled.
    train_step, _ = step_lib.prepare(cfg, data, rate=1.0)
    folder = RunDir(cfg.out, rundir.describe(cfg, command, data))
    train.introduce(data, say)
    state = train_step.start(cfg.seed, data.counts)

    @jax.jit
    def step(
        state: step_lib.TrainState, batch: Any, rate: Any
    ) -> tuple[step_lib.TrainState, Any]:
        state, metrics = train_step.step(state, batch, rate)
        return state, metrics["loss"]

    sweep = cyclical.lr_range_test(
        step,
        state,
        Feed(cfg, data, train_step.placement),
        lo=cfg.lo,
        hi=cfg.hi,
        num_steps=cfg.rates,
        smoothing=0.9,
    )
    lists = {
        name: np.asarray(x).tolist() for name, x in sweep._asdict().items()
    }
    folder.write("range.json", lists)
    folder.write_text("report.md", markdown(sweep, data.name, command))
    say(sentence(sweep))
    say(advice(sweep))
    return sweep


def sentence(sweep: cyclical.RangeTest) -> str:
    """Return what the sweep says about the rate."""
    low, high = float(sweep.lrs[0]), float(sweep.lrs[-1])
    if math.isnan(float(sweep.suggestion)):
        return f"the loss never fell between {low:.2g} and {high:.2g}: try other --lo and --hi"
    return (
        f"suggested --learning-rate {float(sweep.suggestion):.2g}: there the "
        f"loss falls fastest ({len(sweep.lrs)} rates, {low:.2g} to {high:.2g})"
    )


def advice(sweep: cyclical.RangeTest) -> str:
    """Return where to put the peak of a schedule, by where this loss turned up."""
    if math.isnan(float(sweep.suggestion)):
        return "Nothing is known of a good rate."
    at = int(np.nanargmin(np.asarray(sweep.smoothed)))
    lowest, peak = (
        float(sweep.lrs[at]),
        "Take the peak of a schedule at or below the suggestion",
    )
    if at == len(sweep.lrs) - 1:
        return f"{peak}: the loss still fell at {lowest:.2g}, so a sweep with a higher --hi may suggest more."
    if lowest < float(sweep.suggestion):
        return f"Take the peak of a schedule below {lowest:.2g}, where the smoothed loss was lowest."
    return f"{peak}: the smoothed loss was lowest at {lowest:.2g}, and rose above that."


def markdown(sweep: cyclical.RangeTest, name: str, command: str) -> str:
    """Write the report."""
    return f"""# Learning-rate range test on {name}

Command: `{command or "jaxtricks lr-find"}`

{sentence(sweep)}. It was one short training whose rate rose at every step.

{advice(sweep)}

![Loss against learning rate]({PICTURE})
"""
