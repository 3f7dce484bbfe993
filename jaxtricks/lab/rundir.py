"""JSON that may be damaged or come from somebody else. Imports no jax."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import re
import reprlib
import statistics
import subprocess
import tempfile
import types
import typing
import weakref
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jaxtricks as jt
from jaxtricks import KEYS
from jaxtricks.lab.config import Train, UserError, flag

MAX_DEPTH = 64
"""Values nested more deeply are refused: whatever walks them would run out of stack."""


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it isn't JSON, not in UTF-8, or nested more than 64 deep.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for parent in level for x in _inside(parent)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _inside(value: Any) -> list[Any]:
    return (
        list(value.values())
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    )


# --------------------------------------------------------------------------------------------------
# What the files of a run directory may say, and how values of other kinds are noticed. Imports no jax.
# --------------------------------------------------------------------------------------------------


MAX_NUMBER = 1e39
"""No figure of a run is larger (float32 ends below); a JSON integer may have thousands of digits."""

_SUMMARY = dict.fromkeys(("loss", "accuracy", "balanced_accuracy", "many", "medium", "few"), float)
_SESSION: dict[str, Any] = {
    "step": int,
    "command": str,
    "started": str,
    "versions": dict[str, str],
    "hardware": {"devices": list[str], "kind": str, "cores": int, "machine": str},
    "git": {"commit": str, "branch": str, "dirty": bool},
}
FRAME: dict[str, Any] = {"config": {}, "data": {"left_out": list[str]}, "resumed": [{}]}
"""What every command's config.json has in common: name -> kind, as `misfit` takes it."""
ABOUT: dict[str, Any] = _SESSION | {
    "config": Train,
    "data": {
        **dict.fromkeys(("name", "kind"), str),
        **dict.fromkeys(("train", "validation", "test"), int),
        **dict.fromkeys(("classes", "notes", "left_out"), list[str]),
        **dict.fromkeys(("counts", "shape"), list[int]),
    },
    "resumed": [_SESSION],
}
"""config.json of a run."""
RESULT_KINDS: dict[str, Any] = {
    "kind": str,
    **dict.fromkeys(("train", "validation", "test"), _SUMMARY),
    **dict.fromkeys(
        ("parameters", "state_bytes", "temp_bytes", "bytes_read", "skipped_records"), int
    ),
    "plan": {
        **dict.fromkeys(("peak_bytes", "unplanned_peak_bytes", "budget_bytes"), int),
        "extra_flops": float,
    },
    "mesh": {
        "axes": str,
        **dict.fromkeys(("processes", "device_parameter_bytes", "device_state_bytes"), int),
        **dict.fromkeys(("sent", "sent_bytes"), dict[str, int]),
    },
}
"""result.json."""
ROW = dict[str, float]
"""A line of metrics.jsonl or timing.jsonl."""


def misfit(value: Any, kind: Any, name: str = "it") -> str | None:
    """Where a JSON value is of another kind than it should be, as "data/counts/0 is 'x'"; None if nowhere.

    Args:
      value: as parsed.
      kind: int, float (of integers too), str, bool, [kind], list[kind], tuple[kind, ...], dict[str, kind],
        a union, a Literal, or a dict or dataclass of kinds, whose names may be absent or null and have
        others beside them.
      name: of the value.
    """
    if dataclasses.is_dataclass(kind):
        kind = typing.get_type_hints(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _said(value, name) if all(misfit(value, k) for k in inner) else None
    if isinstance(kind, list):
        origin, inner = list, kind
    if origin is Literal:
        return _said(value, name) if value not in inner else None
    if origin in (list, tuple) and isinstance(value, list):
        parts = [(i, x, inner[0]) for i, x in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        parts = [(k, x, inner[1]) for k, x in value.items() if x is not None]
    elif isinstance(kind, dict) and isinstance(value, dict):
        parts = [(k, value[k], kind[k]) for k in kind if value.get(k) is not None]
    else:
        return None if isinstance(kind, type) and _is(value, kind) else _said(value, name)
    front = "" if name == "it" else f"{name}/"
    return next(filter(None, (misfit(x, k, f"{front}{part}") for part, x, k in parts)), None)


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        kinds = int if kind is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    return isinstance(value, kind)


def _said(value: Any, name: str) -> str:
    return f"{name} is {reprlib.repr(value)}"


# --------------------------------------------------------------------------------------------------
# A run directory: never overwritten, written by one process, resumable, every file whole or absent.
# --------------------------------------------------------------------------------------------------


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
        before = parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read ({error}): give another --out") from error
    problem = misfit(before, FRAME)
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
            row = parse(line)
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
        about = parse((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else None
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


# --------------------------------------------------------------------------------------------------
# A run directory read back, finished or not. Imports no jax.
# --------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run directory as read; what is missing there is empty here.

    Attributes:
      path: the directory.
      about: config.json.
      rows: metrics.jsonl, one dict a logged step, steps increasing.
      timing: timing.jsonl, one dict a window of steps.
      result: result.json; {} while the run is unfinished.
    """

    path: pathlib.Path
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def is_text(self) -> bool:
        """Whether the run modelled text rather than classified images."""
        return (look(self.about, "data", "kind") or self.result.get("kind")) == "text"

    @property
    def tricks(self) -> tuple[str, ...]:
        """Keys of the tricks that were on."""
        return tuple(key for key in KEYS if look(self.about, "config", "tricks", key))

    @property
    def done(self) -> int:
        """Steps logged."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether the test split was measured."""
        return bool(look(self.result, "test"))

    @property
    def step_ms(self) -> float | None:
        """Median time of a step in ms over the windows but the first, which has the compilation in it."""
        windows = [(row.get("seconds"), row.get("steps")) for row in self.timing[1:]]
        return _median([1e3 * seconds / steps for seconds, steps in windows if seconds and steps])

    @property
    def examples_per_s(self) -> float | None:
        """Rate of a step of median time."""
        batch, milliseconds = look(self.about, "config", "batch"), self.step_ms
        return 1e3 * batch / milliseconds if batch and milliseconds else None

    def newest(self, name: str) -> float | None:
        """The newest finite value of a metric."""
        values = (row.get(name) for row in reversed(self.rows))
        return next((x for x in values if x is not None and math.isfinite(x)), None)


def read(path: str | pathlib.Path) -> Run:
    """Read a run directory, finished or not.

    Args:
      path: what `jaxtricks train --out` made.

    Returns:
      The run. Lines that a killed run left torn are skipped; of steps that a resumed run went through
      twice, the later line counts.

    Raises:
      UserError: the path is no run, or an ablation, or says what no run would.
    """
    folder = pathlib.Path(path)
    about = _json(folder / CONFIG)
    config = about.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{path} is no run: give a directory that `jaxtricks train --out` made")
    if "seeds" in config:
        raise UserError(
            f"{path} is an ablation, which compares its own runs in {folder / 'report.md'}: "
            "give a directory that `jaxtricks train --out` made"
        )
    result = _json(folder / RESULT)
    for name, value, kind in ((CONFIG, about, ABOUT), (RESULT, result, RESULT_KINDS)):
        if problem := misfit(value, kind):
            raise UserError(
                f"{folder / name} is damaged ({problem}): restore it, or leave out the run"
            )
    return Run(folder, about, _lines(folder / METRICS), _lines(folder / TIMING), result)


def look(value: Any, *keys: str) -> Any:
    """value[keys[0]][keys[1]]...; None where a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _median(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return statistics.median(known) if known else None


def _json(file: pathlib.Path) -> dict[str, Any]:
    # Not there, torn, or no JSON: all the same to a reader. A pipe would be waited for.
    try:
        value = parse(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    # Half characters, of names that are not UTF-8, could not be printed.
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _lines(file: pathlib.Path) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else ()
    for row in filter(None, map(_row, lines)):
        while kept and kept[-1]["step"] > row["step"]:  # a resumed run goes through steps again
            kept.pop()
        same = kept.pop() if kept and kept[-1]["step"] == row["step"] else {}
        kept.append({**same, **row})
    return kept


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = parse(line)
    except ValueError:
        return None
    return row if isinstance(look(row, "step"), int) and not misfit(row, ROW) else None


# --------------------------------------------------------------------------------------------------
# What a run directory says about itself: settings, versions, hardware, git state, data.
# --------------------------------------------------------------------------------------------------


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")


def session(command: str) -> dict[str, Any]:
    """The command, when, with which versions, on what."""
    return {
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "git": git(),
    }


def of_run(cfg: Any, command: str, data: Any | None = None) -> dict[str, Any]:
    """config.json of a run."""
    about = {**session(command), "config": dataclasses.asdict(cfg)}
    return about if data is None else {**about, "data": of_data(data)}


def of_data(data: Any) -> dict[str, Any]:
    """The data set as it was found; resuming compares it."""
    return {
        "name": data.name,
        "kind": data.kind,
        "train": len(data.train),
        "validation": 0 if data.validation is None else len(data.validation),
        "test": len(data.test),
        "classes": list(data.classes),
        "counts": [int(n) for n in data.counts],
        "shape": list(data.shape),
        "notes": list(data.notes),
        "left_out": list(data.left_out),
    }


def versions() -> dict[str, str]:
    """Of Python, this library, and what it stands on."""
    here = {"python": platform.python_version(), "jaxtricks": jt.__version__}
    return {**here, **{name: version(name) for name in _PACKAGES}}


def hardware() -> dict[str, Any]:
    """Devices and machine."""
    import jax

    devices = jax.devices()
    return {
        "devices": [str(d) for d in devices],
        "kind": f"{devices[0].platform} ({devices[0].device_kind})",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def git() -> dict[str, Any] | None:
    """State of the project that the command was run in; None outside of one."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    branch, changes = (
        _git("rev-parse", "--abbrev-ref", "HEAD"),
        _git("status", "--porcelain", "-uno"),
    )
    return {"commit": commit, "branch": branch, "dirty": bool(changes)}


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
