"""The `lr-find` command: a learning-rate range test of the run that the same options would train."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxtricks import cyclical
from jaxtricks.lab import rundir
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import LrFind
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.rundir import RunDir, can_begin
from jaxtricks.lab.trainer import Feed

PICTURE = "lr_range.png"


def run(cfg: LrFind, command: str = "") -> cyclical.RangeTest:
    """Sweep the rate, print the suggestion, leave range.json and report.md behind.

    Args:
      cfg: checked settings.
      command: the command line, for config.json.

    Returns:
      What `cyclical.lr_range_test` saw.

    Raises:
      UserError: something that the person can mend.
    """
    say = functools.partial(Console().print, highlight=False, markup=False, soft_wrap=True)
    # One update a rate: a sweep has no use for averages over updates.
    cfg = dataclasses.replace(cfg, ema=0.0, accumulate=1)
    can_begin(cfg.out)
    Placement.of(cfg.parallel).check(cfg.micro_batch)
    data = train.load(cfg)
    # AdamW and Adafactor as composed here are proportional to the rate, so that 1 can be scaled.
    program, _ = step_lib.prepare(cfg, data, rate=1.0)
    folder = RunDir(cfg.out, rundir.of_run(cfg, command, data))
    train.introduce(data, say)
    state = program.start(cfg.seed, data.counts)

    @jax.jit
    def step(state: step_lib.TrainState, batch: Any, rate: Any) -> tuple[step_lib.TrainState, Any]:
        state, metrics = program.step(state, batch, rate)
        return state, metrics["loss"]

    found = cyclical.lr_range_test(
        step,
        state,
        Feed(cfg, data, program.place),
        lo=cfg.lo,
        hi=cfg.hi,
        num_steps=cfg.rates,
        smoothing=0.9,
    )
    folder.write(
        "range.json", {name: np.asarray(x).tolist() for name, x in found._asdict().items()}
    )
    folder.write_text("report.md", markdown(found, data.name, command))
    say(sentence(found))
    say(advice(found))
    return found


def sentence(found: cyclical.RangeTest) -> str:
    """What the sweep says about the rate."""
    low, high = float(found.lrs[0]), float(found.lrs[-1])
    if math.isnan(float(found.suggestion)):
        return f"the loss never fell between {low:.2g} and {high:.2g}: try other --lo and --hi"
    return (
        f"suggested --learning-rate {float(found.suggestion):.2g}: there the loss falls fastest "
        f"({len(found.lrs)} rates, {low:.2g} to {high:.2g})"
    )


def advice(found: cyclical.RangeTest) -> str:
    """Where to put the peak of a schedule, by where this loss turned up."""
    if math.isnan(float(found.suggestion)):
        return "Nothing is known of a good rate."
    at = int(np.nanargmin(np.asarray(found.smoothed)))
    lowest, peak = float(found.lrs[at]), "Take the peak of a schedule at or below the suggestion"
    if at == len(found.lrs) - 1:
        return f"{peak}: the loss still fell at {lowest:.2g}, so a sweep with a higher --hi may suggest more."
    if lowest < float(found.suggestion):
        return (
            f"Take the peak of a schedule below {lowest:.2g}, where the smoothed loss was lowest."
        )
    return f"{peak}: the smoothed loss was lowest at {lowest:.2g}, and rose above that."


def markdown(found: cyclical.RangeTest, name: str, command: str) -> str:
    """The report."""
    return f"""# Learning-rate range test on {name}

Command: `{command or "jaxtricks lr-find"}`

{sentence(found)}. It was one short training whose rate rose at every step.

{advice(found)}

![Loss against learning rate]({PICTURE})
"""
