"""A run directory: never overwritten, written by one process, resumable, every file whole or absent."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import re
import tempfile
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from jaxtricks.lab import jsons, recorded
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.errors import flag

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, METRICS, TIMING, RESULT = "config.json", "metrics.jsonl", "timing.jsonl", "result.json"
LOCK = ".lock"
# Settings that change no number of a run; the others must be those that it began with.
FREE = {"out", "resume", "save_every", "keep", "tensorboard", "wandb", "check_data"}
FREE |= {"mesh", "fsdp", "coordinator", "processes", "process"}  # or none beyond rounding
# One that was killed while it wrote its first file has not begun.
_NOT_BEGUN = {f".{CONFIG}.partial", LOCK}


class RunDir:
    """Creates a run directory, or goes on in one, and keeps other processes out until it is closed.

    Args:
      path: the directory.
      about: what config.json says.
      resume: go on where config.json is there already; None for commands that can't go on.
      lock: whether this process is the one that writes; of several hosts, one is.

    Attributes:
      path: the directory.
      resumed: whether it held a run before.
      note: a sentence, if that run was begun with other versions; "" if not.

    Raises:
      UserError: it can't be made, holds something else, is written by another process, or holds a run of
        other settings or data; nothing is changed then.
    """

    def __init__(
        self,
        path: str,
        about: dict[str, Any],
        *,
        resume: bool | None = None,
        lock: bool = True,
    ):
        self.path, self.note = pathlib.Path(path), ""
        self.resumed = can_begin(path, resume=resume)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        held = _lock(self.path) if lock else None
        self.close = _no_action if held is None else weakref.finalize(self, os.close, held)
        try:
            # Another process may have begun and ended in between.
            self.resumed = can_begin(path, resume=resume)
            if self.resumed:
                before = begun_with(self.path)
                check_same(path, before, about)
                self.note = _other_versions(path, before, about)
            else:
                self.write(CONFIG, about)
                if resume:
                    self.note = f"--resume: nothing was begun in {path} yet, so this begins there"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, name: str, value: Any) -> None:
        """A JSON file, replaced as a whole."""
        self.write_text(name, json.dumps(finite(value), indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A text file, replaced as a whole."""
        with writing(self.path / name) as path:
            partial = path.with_name(f".{name}.partial")
            partial.write_text(text)
            partial.replace(path)

    def log(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """A line of metrics.jsonl, and one of timing.jsonl (times live only there)."""
        for name, row in ((METRICS, metrics), (TIMING, timing)):
            with writing(self.path / name, in_mid_run=True) as path, open(path, "a") as file:
                file.write(json.dumps(finite({"step": step, **row})) + "\n")

    def begin_again(self, step: int, session: dict[str, Any]) -> None:
        """Cut the logs after `step`, and note in config.json who goes on from there."""
        for name in (METRICS, TIMING):
            if (self.path / name).exists():
                self.write_text(name, _lines_until(self.path / name, step))
        before = begun_with(self.path)
        before.setdefault("resumed", []).append({"step": step, **session})
        self.write(CONFIG, before)


def begun_with(path: pathlib.Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
      UserError: it can't be read, or is of no run.
    """
    file = path / CONFIG
    try:
        before = jsons.parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): give another --out") from error
    problem = recorded.misfit(before, recorded.FRAME)
    if problem or before.get("config") is None:
        raise UserError(f"{file} is of no run ({problem or 'no config'}): give another --out")
    return {name: value for name, value in before.items() if value is not None}


def can_begin(path: str, *, resume: bool | None = None) -> bool:
    """Whether a run goes on in the directory (rather than begins there).

    Raises:
      UserError: neither can be, or nothing can be written there; nothing is left behind.
    """
    folder = pathlib.Path(path)
    if os.path.isfile(path):
        raise UserError(f"--out {path} is a file: give a directory to create")
    goes_on = bool(resume) and os.path.isfile(folder / CONFIG)
    if os.path.isdir(path) and not goes_on:
        with writing(folder):
            names = {entry.name for entry in folder.iterdir()} - _NOT_BEGUN
        if names:
            raise UserError(f"--out {path} {_holding(folder, resume)}")
    check_writable(path)
    return goes_on


def check_writable(path: str) -> None:
    """Try to write where a run directory is or will be; leaves nothing behind.

    Raises:
      UserError: nothing can be written there.
    """
    folder = pathlib.Path(path).absolute()
    with writing(pathlib.Path(path)):
        while not folder.exists():
            folder = folder.parent
        if folder.is_dir():  # what `can_begin` says of a file is more to the point
            with tempfile.TemporaryFile(dir=folder):
                pass


def check_same(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError with the first difference in settings or data.

    A setting that a run of an older version does not have is the default of this one.
    """
    now = json.loads(json.dumps(finite(now)))
    old, new = _flat(before.get("config", {})), _flat(now["config"])
    old = {name: value for name, value in _defaults().items() if name in new} | old
    for name in new:
        if name not in FREE and old.get(name) != new[name]:
            raise UserError(
                f"--resume: {path} was begun with {_flag(name, old.get(name))}, not "
                f"{_flag(name, new[name])}: give the same settings or another --out"
            )
    for name in old.keys() - new.keys():
        raise UserError(
            f"--resume: {path} was begun with {_flag(name, old[name])}, which this version of jaxtricks "
            f"does not know: use the one that began it ({_version(before)}), or give another --out"
        )
    old, new = _flat(before.get("data", {})), _flat(now.get("data", {}))
    for name in new:
        if name != "notes" and old.get(name, new[name]) != new[name]:
            raise UserError(
                f"--resume: the data set has changed since {path} was begun ({name}: {old.get(name)} then, "
                f"{new[name]} now): restore it or give another --out"
            )


@contextlib.contextmanager
def only_writer(path: pathlib.Path) -> Iterator[None]:
    """Keep other processes out of a run directory.

    Raises:
      UserError: one is writing there.
    """
    held = _lock(path)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def writing(
    path: pathlib.Path,
    *,
    in_mid_run: bool = False,
    cure: str = "",
) -> Iterator[pathlib.Path]:
    """Say in one sentence what could not be written, why, and what to do.

    Raises:
      UserError: for any OSError inside, and for a path that no file can have.
    """
    try:
        yield path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        saved = "; checkpoints that were saved before are whole" if in_mid_run else ""
        cure = cure or "free space or give a writable --out"
        raise UserError(f"can't write {path} ({reason}): {cure}{saved}") from error


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: pathlib.Path, step: int) -> str:
    """The lines of a log up to a step, as they were written."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a killed writer may leave half a line
            row = jsons.parse(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                kept.append(line.decode())
    return "".join(kept)


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by their own names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat


def _holding(folder: pathlib.Path, resume: bool | None) -> str:
    """What is in the way, and what to do."""
    try:
        about = jsons.parse((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else None
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or "command" not in about:
        run = "run to resume" if resume else "run of jaxtricks"
        return f"is not empty and holds no {run}: give another"
    cure = "give another or remove it" + (", or go on with --resume" if resume is False else "")
    return f"already holds a run: {cure}"


def _lock(folder: pathlib.Path) -> int | None:
    """A file that keeps other processes out while it is open: the system closes it with its process."""
    if fcntl is None:
        return None
    try:
        held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # where nothing can be written, that is said later on
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.read(held, 200).decode(errors="replace").strip() or "another process"
        os.close(held)
        raise UserError(
            f"{folder} is being written by {who}: wait until it ends, or give another --out"
        ) from error
    except OSError:  # a disk without locks
        os.close(held)
        return None
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(held, 0)
        os.write(held, f"process {os.getpid()} on {platform.node()}\n".encode())
    return held


def _no_action() -> None:
    pass


def _version(about: dict[str, Any]) -> str:
    versions = about.get("versions")
    return str(versions.get("jaxtricks", "?")) if isinstance(versions, dict) else "?"


def _other_versions(path: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """A sentence on packages that are not those that a run began with."""
    then, here = before.get("versions"), now.get("versions")
    if not isinstance(then, dict) or not isinstance(here, dict):
        return ""
    others = [f"{k} {then[k]} (now {v})" for k, v in here.items() if then.get(k, v) != v]
    if not others:
        return ""
    newer = _ordered(_version(before)) > _ordered(_version(now))
    by = "a newer jaxtricks than this, with " if newer else ""
    return f"{path} was begun with {by}{', '.join(others)}: its figures may come out different"


def _ordered(version: str) -> list[int]:
    return [int(number[:9]) for number in re.findall(r"\d+", version)[:3]]


def _defaults() -> dict[str, Any]:
    return json.loads(json.dumps(finite(_flat(dataclasses.asdict(Train())))))


def _flag(name: str, value: Any) -> str:
    option = flag(name)
    if isinstance(value, bool):
        return option if value else "--no-" + option[2:]
    return f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"
