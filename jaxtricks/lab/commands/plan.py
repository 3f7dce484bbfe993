"""Plan what the training step of a run recomputes to meet a budget; nothing is trained."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxtricks import _table, plot, remat
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
_CACHE_CURE = "free space or give a writable --cache"


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
    if cfg.cache:
        _check_cache(cfg.cache)
    start = cfg.start
    Placement.of(cfg.parallel).check(start.micro_batch)
    data = described(cfg) if cfg.data == "auto" else train.load(cfg)
    shape = "x".join(map(str, data.shape))
    what = (
        f"windows of {cfg.text.context} characters"
        if data.kind == "text"
        else f"{shape} images"
    )
    if cfg.batch != "max":
        what = f"{cfg.micro_batch} {what}"
    say(f"{cfg.model}, {what}, {len(data.classes)} classes")
    if cfg.topology is not None and jax.default_backend() != "tpu":
        try:
            variables = remat.libtpu_environment(cfg.topology)
        except ValueError as error:
            raise UserError(str(error)) from None
        # libtpu reads these when it is loaded. A program may decide on its environment,
        # where a library may not.
        for name, value in variables.items():
            os.environ.setdefault(name, value)
    step = step_lib.TrainStep(start, data)
    plan = _planned(cfg, step)
    if cfg.batch != "max":
        say(str(plan.describe()))
    else:
        # Its sizes are micro-batches.
        say(str(dataclasses.replace(plan, sizes=()).describe()))
        say(str(_sizes(plan, cfg.accumulate)))
        say(_largest(plan, cfg.accumulate))
    if cfg.out:
        folder = RunDir(cfg.out, rundir.describe(cfg, command))
        folder.write_text(PLAN, plan.to_json() + "\n")
        say(f"plan: {folder.path / PLAN}")
    return plan


def _check_cache(cache: str) -> None:
    if os.path.exists(cache) and not os.path.isdir(cache):
        raise UserError(f"--cache {cache} is a file: give a folder")
    rundir.check_writable(cache, _CACHE_CURE)


def _planned(cfg: Plan, step: step_lib.TrainStep) -> remat.Plan:
    settings: dict[str, Any] = {}
    if cfg.batch == "max":
        settings = {
            "batch": cfg.batch,
            "batch_step": cfg.multiple // cfg.accumulate,
            "max_extra_flops": cfg.max_extra,
        }
    try:
        return step.plan(
            wrt=cfg.wrt,
            max_compiles=cfg.max_compiles,
            topology=cfg.topology,
            host_bandwidth=cfg.host_bandwidth,
            cache=cfg.cache or None,
            **settings,
        )
    except OSError as error:
        if not cfg.cache:
            raise
        reason = error.strerror or error
        raise UserError(
            f"can't write {cfg.cache} ({reason}): {_CACHE_CURE}"
        ) from error


def _sizes(plan: remat.Plan, accumulate: int) -> _table.Table:
    """Return the table of the sizes that were compiled.

    Args:
      plan: with sizes of a micro-batch.
      accumulate: micro-batches of a batch.
    """
    rows = [
        (
            accumulate * batch,
            _table.format_bytes(figure),
            f"{extra:+.1%}",
            f"{per_example:.3e}",
            "yes" if fits else "no",
        )
        for batch, figure, extra, per_example, fits in plan.sizes
    ]
    headers = ("batch", plan.wrt, "FLOPs", "FLOPs per example", "fits")
    return _table.make(headers, rows)


def _largest(plan: remat.Plan, accumulate: int) -> str:
    """Say which batch is the largest, and what it costs."""
    assert plan.batch is not None
    largest = f"largest batch: {accumulate * plan.batch}"
    if accumulate > 1:
        largest += f" ({accumulate} micro-batches of {plan.batch})"
    peak, budget = map(_table.format_bytes, (plan.peak, plan.budget))
    return (
        f"{largest}, {plan.wrt} {peak} of a budget of {budget}, "
        f"{plan.extra_flops:+.1%} FLOPs, "
        f"{plan.flops / plan.batch:.3e} FLOPs per example"
    )


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
