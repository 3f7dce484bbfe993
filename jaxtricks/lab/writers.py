"""Write metrics to TensorBoard and Weights & Biases, each imported when asked for."""

import dataclasses
import importlib
import json
import math
import pathlib
import uuid
from typing import Any, Protocol, runtime_checkable

from jaxtricks.lab.config import Train, UserError

_ID_FILE = "wandb.json"
_MODULES = {"wandb": "wandb", "tensorboard": "tensorboardX"}


@runtime_checkable
class Writer(Protocol):
    """A place to which metrics are written while a run goes on."""

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Record the metrics of one step; what is not a finite number is left out."""

    def close(self) -> None:
        """Hand over everything that is still buffered."""


class TensorBoard:
    """Events in a folder for `tensorboard --logdir`.

    Args:
      folder: where the event files go; a resumed run adds one beside those it has.
      start: steps done already. TensorBoard hides what earlier files say about later
        steps.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(self, folder: pathlib.Path, start: int = 0):
        module = _load(_MODULES["tensorboard"], "tensorboard", "--tensorboard")
        self._writer = module.SummaryWriter(
            str(folder),
            purge_step=start + 1,  # the first step that this run writes
            flush_secs=1,  # a killed run has then lost nothing from before its newest checkpoint
            filename_suffix=f".{start}",  # names are to the second: never write over the run before
        )

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Add a scalar per metric; NaN, infinities and None are left out."""
        for name, value in _finite(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is queued, and end the writer's thread."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; its id is stored in the folder, so that resuming continues the same run.

    W&B can't be told to forget the last steps of a run (its rewind is a preview that
    needs the service's consent), so a resumed run writes only steps that W&B does not
    have; there remain the points from between the checkpoint and the interruption,
    which the resumed run would compute again from the same state.

    Args:
      project: name of the W&B project.
      folder: the run directory; W&B writes its files to folder/wandb.
      config: settings to show beside the run.
      resume_step: steps done already; 0 starts a new W&B run.

    Raises:
      UserError: wandb is not installed, or can't start (no login, no network).
    """

    def __init__(
        self,
        project: str,
        folder: pathlib.Path,
        config: dict[str, Any],
        resume_step: int = 0,
    ):
        wandb = _load(_MODULES["wandb"], "wandb", "--wandb")
        self._file = folder / _ID_FILE
        self._position = _stored(self._file) if resume_step else _new_run()
        self._save()
        try:
            self._run = wandb.init(
                project=project,
                dir=str(folder),
                id=self._position["id"],
                resume="allow",
                config=config,
                allow_val_change=True,  # --resume itself is a setting that changed
            )
        except wandb.Error as error:
            raise UserError(
                f"--wandb {project} can't start "
                f"({' '.join(str(error).split())}): run `wandb login`, set "
                "WANDB_MODE=offline, or drop it"
            ) from error
        # The server knows what reached it; offline only the file does.
        if not self._run.offline:
            self._position["next"] = self._run.step

    def write(self, step: int, metrics: dict[str, float | None]) -> None:
        """Log the metrics, unless W&B has this step; NaN, infinities and None are left out."""
        finite = _finite(metrics)
        if not finite or step < self._position["next"]:
            return
        self._run.log(finite, step=step)
        self._position["next"] = step + 1
        self._save()

    def close(self) -> None:
        """Upload the rest and finish the W&B run."""
        self._run.finish()

    def _save(self) -> None:
        self._file.write_text(json.dumps(self._position) + "\n")


def check(cfg: Train) -> None:
    """Raise UserError if a writer that a run asks for is not installed."""
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, name):
            _load(_MODULES[name], name, f"--{name}")


def open_writers(
    cfg: Train, folder: pathlib.Path, start_step: int = 0
) -> list[Writer]:
    """Open the writers that a run asks for.

    Args:
      cfg: settings; `tensorboard` and `wandb` say which.
      folder: the run directory.
      start_step: steps done already, 0 for a new run.

    Returns:
      Writers: call `write` at every logged step, then `close`.

    Raises:
      UserError: a package is not installed, or W&B can't start.
    """
    writers: list[Writer] = []
    if cfg.wandb:
        writers.append(
            WandB(cfg.wandb, folder, dataclasses.asdict(cfg), start_step)
        )
    if cfg.tensorboard:
        writers.append(TensorBoard(folder / "tensorboard", start_step))
    return writers


def _load(module: str, extra: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag} needs {module} ({error}): pip install 'jaxtricks[{extra}]'"
        ) from error


def _new_run() -> dict[str, Any]:
    """Return the id of a W&B run, and the first step that it does not have."""
    return {"id": uuid.uuid4().hex, "next": 0}


def _stored(file: pathlib.Path) -> dict[str, Any]:
    try:
        position = json.loads(file.read_text())
        return {"id": str(position["id"]), "next": int(position["next"])}
    except (OSError, ValueError, KeyError, TypeError):
        # First started without --wandb, or stopped before it wrote.
        return _new_run()


def _finite(metrics: dict[str, float | None]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if value is not None and math.isfinite(value)
    }
