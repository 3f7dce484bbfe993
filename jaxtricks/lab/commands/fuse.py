"""Fuse a run's model into plain convolutions, in files that need nothing of this library."""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from rich.console import Console

import jaxtricks as jt
from jaxtricks import _tree
from jaxtricks._typing import Array
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import rundir
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.checkpoint import Checkpoints
from jaxtricks.lab.commands import train
from jaxtricks.lab.config import (
    Fuse,
    Parallel,
    Text,
    Train,
    Tricks,
    UserError,
    check_outside,
)
from jaxtricks.lab.rundir import CONFIG, RunDir, can_begin, only_writer, writing
from jaxtricks.lab.step import to_float

WEIGHTS, PROGRAM, REPORT = "model.safetensors", "model.stablehlo", "fuse.json"
_ROUNDS = 30


class Artifact(NamedTuple):
    """A model as a function of its weights and of images.

    Attributes:
      weights: {path: array}.
      program: the serialized StableHLO of (weights, images uint8 [b, H, W, C]) ->
        logits [b, classes].
    """

    weights: dict[str, np.ndarray]
    program: bytes


def main(cfg: Fuse, command: str) -> None:
    """Fuse: what the command line calls."""
    run(cfg, command)


def run(cfg: Fuse, command: str = "") -> dict[str, Any]:
    """Fuse a run's model, compare the two, and write weights, program and report.

    Args:
      cfg: checked settings.
      command: the command line, for the report.

    Returns:
      What fuse.json says.

    Raises:
      UserError: something that the user can mend.
    """
    say = functools.partial(
        Console().print, highlight=False, markup=False, soft_wrap=True
    )
    source = rundir.read(cfg.run)
    settings = settings_of(source)
    if settings.model == "transformer":
        raise UserError(
            f"{cfg.run} is a transformer, which has no convolution to fuse"
        )
    out = cfg.out or str(source.path / "fused")
    check_outside(out, data=settings.data, root=settings.root)
    can_begin(out)
    data = train.load(
        dataclasses.replace(settings, resume=True, out=str(source.path))
    )
    # Whoever opens checkpoints removes what a killed writer left behind, or one that is
    # still at work.
    with only_writer(source.path):
        model = restored(settings, data, source.path, say)
    folder = RunDir(out, rundir.session(command))
    # Of the test split: what the model is deployed for.
    images = next(data_lib.eval_batches(data.test, cfg.batch))["image"]
    try:
        fused, report = jt.nnx.fuse(
            model, example=to_float(jnp.asarray(images))
        )
    except ValueError as error:  # statistics that were never updated, say
        raise UserError(str(error)) from error
    say(str(report))
    artifact = exported(fused, images)
    write(artifact, folder.path)
    result = compared(model, fused, artifact, images) | _report(report)
    folder.write(REPORT, result)
    say(
        f"largest difference of the logits: fused {result['difference']:.2g}, "
        f"from the files {result['difference_of_files']:.2g}; {cfg.batch} "
        f"images: {result['ms_before']:.2f} ms before, "
        f"{result['ms_after']:.2f} ms after "
        f"({result['ms_after'] / result['ms_before']:.2f}x)"
    )
    say(
        f"{folder.path / WEIGHTS} and {folder.path / PROGRAM}; to run them "
        f"without jaxtricks:\n{USE}"
    )
    return result


USE = f"""  from jax import export
  from safetensors.numpy import load_file
  program = export.deserialize(open("{PROGRAM}", "rb").read())
  logits = program.call(load_file("{WEIGHTS}"), images)  # images: uint8 [N, H, W, C]"""


def settings_of(source: rundir.Run) -> Train:
    """Return the settings of a run, on one device, recomputation off.

    Raises:
      UserError: settings of another version, or that can't be meant.
    """
    fields: dict[str, Any] = dict(source.about["config"])
    try:
        fields["tricks"] = Tricks(**{**fields["tricks"], "remat": False})
        fields["text"] = Text(**fields["text"])
        fields["parallel"] = Parallel()
        fields["widths"] = tuple(fields["widths"])
        settings = Train(**fields)
        settings.check()
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source.path / CONFIG} does not have the settings of this "
            f"version ({error}): use the version that wrote it"
        ) from error
    return settings


def restored(
    cfg: Train,
    data: data_lib.Data,
    path: pathlib.Path,
    say: Callable[[str], None],
) -> Any:
    """Return the model of the newest checkpoint in evaluation mode, averaged where the run averaged."""
    folder = path / "checkpoints"
    missing = UserError(
        f"{path} has no checkpoint: train with --save-every below --steps"
    )
    if not folder.is_dir():  # opening the checkpoints would create it
        raise missing
    step = step_lib.TrainStep(cfg, data)
    like = step.start(cfg.seed, data.counts)
    checkpoints = Checkpoints(folder, cfg.keep)
    checkpoint = checkpoints.restore(like, say)
    checkpoints.close()
    if checkpoint is None:
        raise missing
    say(f"step {checkpoint.step} of {path}")
    model = step_lib.build_model(
        cfg, data.shape[-1], len(data.classes), like.key
    )
    model = jt.nnx.with_variables(
        model, step.averaged(checkpoint.state), checkpoint.state.model_state
    )
    model.eval()
    return model


def exported(model: nnx.Module, images: Array) -> Artifact:
    """Export the model as weights and a program for CPU, GPU and TPU, with any number of images."""
    graph, state, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    weights = {path: np.asarray(x) for path, x in _tree.by_path(state).items()}

    def predict(weights: dict[str, Array], images: Array) -> Array:
        filled = _tree.map_with_path(lambda path, _: weights[path], state)
        return nnx.merge(graph, filled, rest, copy=True)(
            to_float(images)
        ).astype(jnp.float32)

    # b is symbolic: the program takes any number of images.
    shape = export.symbolic_shape("b," + ",".join(map(str, images.shape[1:])))
    program = export.export(jax.jit(predict), platforms=("cpu", "cuda", "tpu"))(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights),
        jax.ShapeDtypeStruct(shape, jnp.uint8),
    )
    return Artifact(weights, bytes(program.serialize()))


def write(artifact: Artifact, folder: pathlib.Path) -> None:
    """Write the two files."""
    from safetensors.numpy import save

    for name, content in (
        (WEIGHTS, save(artifact.weights)),
        (PROGRAM, artifact.program),
    ):
        with writing(folder / name) as path:
            path.write_bytes(content)


def compared(
    model: Any, fused: Any, artifact: Artifact, images: Array
) -> dict[str, Any]:
    """Return differences of logits, and times of both models, one after the other in every round."""
    x = to_float(jnp.asarray(images))
    calls = {"before": _call(model), "after": _call(fused)}
    logits = {
        name: np.asarray(call(x), np.float32) for name, call in calls.items()
    }
    from_files = export.deserialize(bytearray(artifact.program)).call(
        artifact.weights, images
    )
    times: dict[str, list[float]] = {name: [] for name in calls}
    # In turn, so that drift of the machine hits both alike.
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(x))
            times[name].append(1e3 * (time.perf_counter() - start))
    before, after = logits["before"], logits["after"]
    same_class = before.argmax(-1) == after.argmax(-1)
    return {
        "difference": float(np.abs(before - after).max()),
        "difference_of_files": float(
            np.abs(before - np.asarray(from_files)).max()
        ),
        "same_class": float(same_class.mean()),
        "ms_before": statistics.median(times["before"]),
        "ms_after": statistics.median(times["after"]),
    }


def _call(model: nnx.Module) -> Callable[[Array], Array]:
    """Jit the model; its variables are arguments, or XLA would compute with them in advance."""
    apply, params, state = jt.nnx.functional(model)
    run = jax.jit(functools.partial(apply, train=False))
    return lambda x: run(params, state, x)[0]


def _report(report: jt.reparam.FuseReport) -> dict[str, Any]:
    layers = [{**row._asdict(), "ratio": row.ratio} for row in report.layers]
    whole = None if report.model is None else report.model._asdict()
    return {"layers": layers, "model": whole, "kept": dict(report.kept)}
