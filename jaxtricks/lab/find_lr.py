"""The `lr-find` command: a learning-rate range test of the run that the same options would train."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxtricks import cyclical
from jaxtricks.lab import about, loop, planning, train
from jaxtricks.lab.config import LrFind
from jaxtricks.lab.feed import Feed
from jaxtricks.lab.rundir import RunDir

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
    data = train.load(cfg)
    folder = RunDir(cfg.out, about.of_run(cfg, command, data))
    train.introduce(data, say)
    # AdamW and Adafactor as composed here are proportional to the rate, so that 1 can be scaled.
    program, _ = planning.prepare(cfg, data, rate=1.0)
    state = program.start(cfg.seed, data.counts)

    @jax.jit
    def step(state: loop.TrainState, batch: Any, rate: Any) -> tuple[loop.TrainState, Any]:
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


def markdown(found: cyclical.RangeTest, name: str, command: str) -> str:
    """The report."""
    return f"""# Learning-rate range test on {name}

Command: `{command or "jaxtricks lr-find"}`

{sentence(found)}. One short training whose rate rises at every step; take the peak of a schedule at or a
few times above the suggestion, and well below where the loss turns up.

![Loss against learning rate]({PICTURE})
"""
