"""Save and restore checkpoints with Orbax: in the background, in place when whole, the newest few."""

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from jaxtricks import _dtypes, _tree
from jaxtricks._typing import Array
from jaxtricks.lab import rundir
from jaxtricks.lab.config import UserError
from jaxtricks.lab.distributed import Hosts, is_first

T = TypeVar("T")

_STEP = re.compile("0|[1-9][0-9]{0,17}")
SUMS = "sha256.json"
"""In every checkpoint: the SHA-256 of its files, by name."""


class Restored(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
      step: steps done.
      state: the tree, placed like the one it was restored for.
      host: the JSON that was saved with it.
    """

    step: int
    state: Any
    host: Any


class Checkpoints:
    """The checkpoints of a run: FOLDER/STEP/{state,host}.

    `state` is a flat dict {path: array} ("params/head/kernel"), which anyone's
    `ocp.StandardCheckpointer().restore(...)` reads; PRNG keys are stored as their data.
    `host` is JSON. A checkpoint gets its name only when it is whole and has the
    checksums of its files; what killed writers left behind is removed on opening.
    Several hosts write and read one checkpoint together, on a disk that they share.

    Args:
      folder: where; created if missing.
      keep: how many of the newest stay.
      hosts: that share them; None is this process alone.

    Raises:
      UserError: the folder can't be created.
    """

    def __init__(
        self, folder: pathlib.Path, keep: int, hosts: Hosts | None = None
    ):
        import orbax.checkpoint as ocp

        self._end_quiet = _quiet()
        self._hosts = hosts or Hosts()
        self._folder, self._args = folder.absolute(), ocp.args
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Skips the metadata of each step: nothing here reads it, and a damaged one
            # would end the run.
            lightweight_initialize=True,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_checksums,
                # Else threads, and the process with them, wait ten minutes for a
                # directory that can't be created.
                create_directories_asynchronously=False,
            ),
        )

        def open_manager() -> Any:
            # Orbax would do this in the background, where it may meet the next writer.
            for leftover in (
                self._folder.glob("*.orbax-checkpoint-tmp")
                if is_first()
                else ()
            ):
                shutil.rmtree(leftover)
            return ocp.CheckpointManager(self._folder, options=options)

        self._manager = self._writing(open_manager)

    def save(self, step: int, state: Any, host: Any) -> None:
        """Save in the background; arrays are copied first, so that the state may be donated.

        Args:
          step: steps done.
          state: any tree of arrays.
          host: any JSON value.

        Raises:
          UserError: this checkpoint, or the one before it, could not be written.
        """
        arrays = _stored(state)
        host = {
            "host": host,
            "layout": {path: _layout(x) for path, x in arrays.items()},
        }
        items = self._args.Composite(
            state=self._args.StandardSave(arrays),
            host=self._args.JsonSave(host),
        )
        self._writing(lambda: self._manager.save(step, args=items, force=True))

    def restore(
        self, like: Any, tell: Callable[[str], None] = print
    ) -> Restored | None:
        """Return the newest checkpoint that can be read; None if there is none at all.

        Args:
          like: a tree of the same structure, with the shardings to restore to.
          tell: called with a sentence for every checkpoint that is passed over. It is
            moved out of the way (checkpoints-unreadable/STEP), so that nothing is lost
            and that step can be written again.

        Raises:
          UserError: the checkpoint is of another model, or none can be read.
        """
        steps = self._hosts.on_first(self._steps)
        for step in steps:
            # One host reads for the sums; all read what they need only if these are
            # right.
            damage = self._hosts.on_first(
                lambda step=step: _damage(self._folder / str(step))
            )
            restored, reason = (
                (None, damage) if damage else self._try(step, like)
            )
            reasons = list(filter(None, self._hosts.gather(reason)))
            if not reasons:
                return restored
            tell(
                f"checkpoint {self._folder / str(step)} can't be read ({reasons[0]})"
            )
            self._hosts.on_first(lambda step=step: self._set_aside(step))
            self._manager.reload()
        if steps:
            raise UserError(
                f"no checkpoint in {self._folder} can be read: give another "
                "--out to start anew"
            )
        return None

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises:
          UserError: it could not be written.
        """
        try:
            self._writing(self._manager.wait_until_finished)
            self._manager.close()
        finally:
            self._end_quiet()

    def _try(self, step: int, like: Any) -> tuple[Restored | None, str]:
        try:
            return self._read(step, like), ""
        except UserError:
            raise
        except (
            Exception
        ) as error:  # Orbax, TensorStore and json each raise other errors
            return None, _reason(error)

    def _read(self, step: int, like: Any) -> Restored:
        args, arrays = self._args, _stored(like)
        host = self._manager.restore(
            step, args=args.Composite(host=args.JsonRestore())
        )["host"]
        self._check_layout(
            step,
            host["layout"],
            {path: _layout(x) for path, x in arrays.items()},
        )
        targets = jax.tree.map(_target, arrays)
        items = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(targets))
        )
        return Restored(step, _rebuilt(like, items["state"]), host["host"])

    def _check_layout(
        self, step: int, saved: dict[str, str], target: dict[str, str]
    ) -> None:
        for path in sorted(saved.keys() | target.keys()):
            if saved.get(path) != target.get(path):
                there, here = (
                    layout.get(path, "nothing") for layout in (saved, target)
                )
                raise UserError(
                    f"checkpoint {self._folder / str(step)} is of another "
                    f"model: {path} is {there} in it and {here} here; give the "
                    "settings that it was saved with, or another --out"
                )

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, newest first, readable or not."""
        names = [
            p.name
            for p in self._folder.iterdir()
            if p.is_dir() and _STEP.fullmatch(p.name)
        ]
        return sorted(map(int, names), reverse=True)

    def _write_checksums(self) -> None:
        # Orbax calls this when all is written but the name; the directory still has its
        # temporary one. All hosts have written by then.
        for path in self._folder.iterdir() if is_first() else ():
            if path.is_dir() and not path.name.isdecimal():
                (path / SUMS).write_text(json.dumps(_checksums(path)))

    def _set_aside(self, step: int) -> None:
        aside = self._folder.with_name(self._folder.name + "-unreadable")
        aside.mkdir(exist_ok=True)
        same_step = [
            p for p in aside.iterdir() if p.name.split(".")[0] == str(step)
        ]
        name = f"{step}.{len(same_step)}" if same_step else str(step)
        (self._folder / str(step)).rename(aside / name)

    def _writing(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except Exception as error:  # a full disk: OSError here, ValueError from TensorStore there
            # What the threads of that write leave undone is told when Python collects
            # it, which may be after the checkpoints are closed.
            self._end_quiet = lambda: None
            raise UserError(
                f"can't write checkpoints to {self._folder} "
                f"({_reason(error)}): free space or give another --out; what "
                "was saved before is whole, and --resume goes on from there"
            ) from error


def _stored(state: Any) -> dict[str, Array]:
    """Return {path: array} without typed keys and without arrays of size zero, which Orbax refuses."""
    arrays = {path: _plain(x) for path, x in _tree.by_path(state).items()}
    return {path: x for path, x in arrays.items() if x.size}


def _rebuilt(like: Any, arrays: dict[str, Any]) -> Any:
    def leaf(path: str, x: Array) -> Array:
        new = arrays.get(path, x)
        return (
            jax.random.wrap_key_data(new, impl=jax.random.key_impl(x))
            if _dtypes.is_key(x)
            else new
        )

    return _tree.map_with_path(leaf, like)


def _plain(x: Array) -> Array:
    return jax.random.key_data(x) if _dtypes.is_key(x) else x


def _target(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _layout(x: Array) -> str:
    return f"{x.dtype} {list(x.shape)}"


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    checksums = {}
    # The items only: Orbax touches its metadata beside them after the last moment for
    # sums.
    for path in folder.glob("*/**/*"):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            checksums[path.relative_to(folder).as_posix()] = digest
    return checksums


def _damage(folder: pathlib.Path) -> str:
    """Say what is wrong with the files of a checkpoint; "" if nothing is."""
    try:
        saved, actual = (
            rundir.parse((folder / SUMS).read_bytes()),
            _checksums(folder),
        )
        if not isinstance(saved, dict):
            return f"{SUMS} is damaged"
    except Exception as error:  # no file, or not JSON
        return _reason(error)
    for name in sorted(saved.keys() | actual.keys()):
        if saved.get(name) != actual.get(name):
            return f"{name} is {'damaged' if name in actual else 'missing'}"
    return ""


def _reason(error: Exception) -> str:
    # TensorStore tells at length which of its files met what, and ends with
    # [os_error_code='28'].
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def _quiet() -> Callable[[], None]:
    """Leave what is said in one sentence here to that sentence; return how to end that.

    Orbax logs tracebacks through absl, and what its threads can't finish through
    asyncio; after a failure TensorStore's threads still call an event loop that Orbax
    has closed, which only `sys.unraisablehook` hears of.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    previous = sys.unraisablehook
    # A write that fails while others wait leaves their coroutines unstarted, which a
    # warning says when they are collected: this filter stays.
    warnings.filterwarnings(
        "ignore", "coroutine .*write_.* was never awaited", RuntimeWarning
    )

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    for logger in loggers:
        logger.addFilter(_is_critical)

    def end() -> None:
        sys.unraisablehook = previous
        for logger in loggers:
            logger.removeFilter(_is_critical)

    return end


def _is_critical(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.CRITICAL
