"""Plan what the training step of a run recomputes to meet a budget; nothing is trained."""

import functools
import os
import pathlib

import jax
import numpy as np
from rich.console import Console

from jaxtricks import plot, remat
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import plots, rundir
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import Plan, UserError
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.rundir import RunDir, can_begin

PLAN, PICTURE = "plan.json", "plan.png"
# Where the command line says nothing.
_SIDE, _CLASSES, _CHARACTERS = 32, 10, 128


def main(cfg: Plan, command: str) -> None:
    """Plan and draw: what the command line calls."""
    plan = run(cfg, command)
    if cfg.out:
        plots.save(plot.plan(plan), pathlib.Path(cfg.out) / PICTURE)


def run(cfg: Plan, command: str = "") -> remat.Plan:
    """Plan a training step, print what it recomputes, and with `out` write the plan.

    Args:
      cfg: checked settings.
      command: the command line, for config.json.

    Raises:
      UserError: a budget that can't be met, or something else that the user can mend.
    """
    say = functools.partial(
        Console().print, highlight=False, markup=False, soft_wrap=True
    )
    if cfg.out:
        can_begin(cfg.out)
    Placement.of(cfg.parallel).check(cfg.micro_batch)
    data = described(cfg) if cfg.data == "auto" else train.load(cfg)
    shape = "x".join(map(str, data.shape))
    what = (
        f"windows of {cfg.text.context} characters"
        if data.kind == "text"
        else f"{shape} images"
    )
    say(f"{cfg.model}, {cfg.micro_batch} {what}, {len(data.classes)} classes")
    if cfg.topology is not None and jax.default_backend() != "tpu":
        try:
            variables = remat.libtpu_environment(cfg.topology)
        except ValueError as error:
            raise UserError(str(error)) from None
        # libtpu reads these when it is loaded. A program may decide on its environment,
        # where a library may not.
        for name, value in variables.items():
            os.environ.setdefault(name, value)
    step = step_lib.TrainStep(cfg, data)
    plan = step.plan(
        wrt=cfg.wrt, max_compiles=cfg.max_compiles, topology=cfg.topology
    )
    say(str(plan.describe()))
    if cfg.out:
        folder = RunDir(cfg.out, rundir.describe(cfg, command))
        folder.write_text(PLAN, plan.to_json() + "\n")
        say(f"plan: {folder.path / PLAN}")
    return plan


def described(cfg: Plan) -> data_lib.Data:
    """Return a data set without examples: what a training step depends on."""
    text = cfg.model == "transformer"
    side = cfg.size or _SIDE
    classes = cfg.classes or (_CHARACTERS if text else _CLASSES)
    # Shapes are all that a plan needs.
    empty = data_lib.Source(lambda i: ({}, 0), 0)
    return data_lib.Data(
        name="none",
        kind="text" if text else "image",
        train=empty,
        validation=None,
        test=empty,
        classes=tuple(map(str, range(classes))),
        shape=(cfg.text.context + 1,) if text else (side, side, cfg.channels),
        flip=cfg.channels == 3,
        counts=np.ones(classes, np.int64),
        notes=(),
    )
