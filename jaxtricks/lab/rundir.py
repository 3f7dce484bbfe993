"""Write, resume and read run directories: one writer, never overwritten, every file whole or absent.

Nothing here imports jax before a run begins: reading and comparing runs is quick.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import operator
import os
import pathlib
import platform
import re
import statistics
import subprocess
import tempfile
import types
import typing
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Annotated, Any, NamedTuple

import jaxtricks as jt
from jaxtricks import KEYS
from jaxtricks.lab.config import Train, UserError, flag

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, METRICS, TIMING, RESULT = (
    "config.json",
    "metrics.jsonl",
    "timing.jsonl",
    "result.json",
)
LOCK = ".lock"
# Settings that change no number of a run, or none beyond rounding; the others must stay
# what they were.
FREE = {
    "out",
    "resume",
    "save_every",
    "keep",
    "tensorboard",
    "wandb",
    "check_data",
}
FREE |= {"mesh", "fsdp", "coordinator", "processes", "process"}
# A run that was killed while it wrote its first file has not begun.
_LEFTOVERS = {f".{CONFIG}.partial", LOCK}
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "grain",
    "orbax-checkpoint",
    "numpy",
)
MAX_DEPTH = 64
"""JSON values nested more deeply are refused: whatever walks them would run out of stack."""


class RunDir:
    """Creates a run directory, or goes on in one, and keeps other processes out until it is closed.

    Args:
      path: the directory.
      about: what config.json says.
      resume: go on where config.json is there already; None for commands that can't go
        on.
      lock: whether this process is the one that writes; of several hosts, one is.

    Attributes:
      path: the directory.
      resumed: whether it held a run before.
      note: a sentence, if that run was begun with other versions; "" if not.

    Raises:
      UserError: it can't be created, holds something else, is written by another
        process, or holds a run of other settings or data; nothing is changed then.
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
        descriptor = _lock(self.path) if lock else None
        self._release = weakref.finalize(self, _unlock, descriptor)
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

    def close(self) -> None:
        """Let other processes in."""
        self._release()

    def write(self, name: str, value: Any) -> None:
        """Replace a JSON file as a whole."""
        self.write_text(name, json.dumps(finite(value), indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file as a whole."""
        with writing(self.path / name) as path:
            partial = path.with_name(f".{name}.partial")
            partial.write_text(text)
            partial.replace(path)

    def log(
        self, step: int, metrics: dict[str, float], timing: dict[str, float]
    ) -> None:
        """Add a line to metrics.jsonl, and one to timing.jsonl (times live only there)."""
        for name, row in ((METRICS, metrics), (TIMING, timing)):
            with (
                writing(self.path / name, in_mid_run=True) as path,
                open(path, "a") as file,
            ):
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
    """Return what config.json says.

    Raises:
      UserError: it can't be read, or is not of a run.
    """
    file = path / CONFIG
    try:
        before = parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} can't be read ({error}): give another --out"
        ) from error
    problem = misfit(before, _begun_schema())
    if problem or before.get("config") is None:
        raise UserError(
            f"{file} is not of a run ({problem or 'no config'}): give another --out"
        )
    return {name: value for name, value in before.items() if value is not None}


def can_begin(path: str, *, resume: bool | None = None) -> bool:
    """Return whether a run goes on in the directory (rather than begins there).

    Raises:
      UserError: neither can be, or nothing can be written there; nothing is left
        behind.
    """
    folder = pathlib.Path(path)
    if os.path.isfile(path):
        raise UserError(f"--out {path} is a file: give a directory to create")
    goes_on = bool(resume) and os.path.isfile(folder / CONFIG)
    if os.path.isdir(path) and not goes_on:
        with writing(folder):
            names = {entry.name for entry in folder.iterdir()} - _LEFTOVERS
        if names:
            raise UserError(f"--out {path} {_obstacle(folder, resume)}")
    check_writable(path)
    return goes_on


def _obstacle(folder: pathlib.Path, resume: bool | None) -> str:
    """Say what is in the way, and what to do."""
    about = None
    with contextlib.suppress(OSError, ValueError):
        if (folder / CONFIG).is_file():
            about = parse((folder / CONFIG).read_bytes())
    if not isinstance(about, dict) or "command" not in about:
        run = "run to resume" if resume else "run of jaxtricks"
        return f"is not empty and holds no {run}: give another"
    cure = "give another or remove it" + (
        ", or go on with --resume" if resume is False else ""
    )
    return f"already holds a run: {cure}"


def check_writable(path: str, cure: str = "") -> None:
    """Try to write where a run directory is or will be; leave nothing behind.

    Args:
      path: the directory.
      cure: what to do if nothing can be written, as in `writing`.

    Raises:
      UserError: nothing can be written there.
    """
    folder = pathlib.Path(path).absolute()
    with writing(pathlib.Path(path), cure=cure):
        while not folder.exists():
            folder = folder.parent
        # What `can_begin` says of a file is more to the point.
        if folder.is_dir():
            with tempfile.TemporaryFile(dir=folder):
                pass


def check_same(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError with the first difference in settings or data.

    A setting that a run of an older version does not have is the default of this one.
    """
    now = json.loads(json.dumps(finite(now)))
    old, new = _flat(before.get("config", {})), _flat(now["config"])
    defaults = json.loads(
        json.dumps(finite(_flat(dataclasses.asdict(Train()))))
    )
    old = {name: value for name, value in defaults.items() if name in new} | old
    for name in new:
        if name not in FREE and old.get(name) != new[name]:
            raise UserError(
                f"--resume: {path} was begun with "
                f"{_option(name, old.get(name))}, not "
                f"{_option(name, new[name])}: give the same settings or "
                "another --out"
            )
    for name in old.keys() - new.keys():
        raise UserError(
            f"--resume: {path} was begun with {_option(name, old[name])}, "
            "which this version of jaxtricks does not know: use the one that "
            f"began it ({_version(before)}), or give another --out"
        )
    old, new = _flat(before.get("data", {})), _flat(now.get("data", {}))
    for name in new:
        if name != "notes" and old.get(name, new[name]) != new[name]:
            raise UserError(
                f"--resume: the data set has changed since {path} was begun "
                f"({name}: {old.get(name)} then, {new[name]} now): restore it "
                "or give another --out"
            )


def _option(name: str, value: Any) -> str:
    """Write a setting as on the command line."""
    option = flag(name)
    if isinstance(value, bool):
        return option if value else "--no-" + option[2:]
    return f"{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings, which have different names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat


def _version(about: dict[str, Any]) -> str:
    versions = about.get("versions")
    return (
        str(versions.get("jaxtricks", "?"))
        if isinstance(versions, dict)
        else "?"
    )


def _other_versions(
    path: str, before: dict[str, Any], now: dict[str, Any]
) -> str:
    """Return a sentence on packages that are not those that a run began with."""
    then, here = before.get("versions"), now.get("versions")
    if not isinstance(then, dict) or not isinstance(here, dict):
        return ""
    others = [
        f"{k} {then[k]} (now {v})"
        for k, v in here.items()
        if then.get(k, v) != v
    ]
    if not others:
        return ""
    newer = _numbers(_version(before)) > _numbers(_version(now))
    by = "a newer jaxtricks than this, with " if newer else ""
    return f"{path} was begun with {by}{', '.join(others)}: its figures may come out different"


def _numbers(version: str) -> list[int]:
    return [int(number[:9]) for number in re.findall(r"\d+", version)[:3]]


def _lines_until(path: pathlib.Path, step: int) -> str:
    """Return the lines of a log up to a step, as they were written."""
    lines = []
    for line in path.read_bytes().splitlines(keepends=True):
        # A killed writer may leave half a line.
        with contextlib.suppress(ValueError):
            row = parse(line)
            if (
                isinstance(row, dict)
                and isinstance(row.get("step"), int)
                and row["step"] <= step
            ):
                lines.append(line.decode())
    return "".join(lines)


# One writer.


@contextlib.contextmanager
def only_writer(path: pathlib.Path) -> Iterator[None]:
    """Lock other processes out of a run directory.

    Raises:
      UserError: one is writing there.
    """
    descriptor = _lock(path)
    try:
        yield
    finally:
        _unlock(descriptor)


def _lock(folder: pathlib.Path) -> int | None:
    """Open a file that locks other processes out while it is open: the system closes it with the process."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # where nothing can be written, that is said later on
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = (
            os.read(descriptor, 200).decode(errors="replace").strip()
            or "another process"
        )
        os.close(descriptor)
        raise UserError(
            f"{folder} is being written by {who}: wait until it ends, or give "
            "another --out"
        ) from error
    except OSError:  # a disk without locks
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.write(
            descriptor, f"process {os.getpid()} on {platform.node()}\n".encode()
        )
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


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
        saved = (
            "; checkpoints that were saved before are whole"
            if in_mid_run
            else ""
        )
        cure = cure or "free space or give a writable --out"
        raise UserError(
            f"can't write {path} ({reason}): {cure}{saved}"
        ) from error


# JSON that may be damaged or come from somebody else.


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Python's parser, as msgspec takes no names that are not UTF-8, which file systems
    have.

    Raises:
      ValueError: it isn't JSON, not in UTF-8, or nested more than 64 deep.
    """
    too_deep = f"it is nested more than {MAX_DEPTH} deep"
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8")
        )
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for parent in level for x in _children(parent)]
        if not level:
            return value
    raise ValueError(too_deep)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return (
        None if isinstance(value, float) and not math.isfinite(value) else value
    )


def misfit(value: Any, schema: Any) -> str:
    """Return where a JSON value does not fit a schema, as msgspec says it; "" if it does."""
    import msgspec

    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def schema(name: str, fields: Mapping[str, Any]) -> Any:
    """Make the schema of an object: its fields may be absent or null and have others beside them.

    Args:
      name: of the type.
      fields: name -> type: int, float, str, bool, a dataclass, or lists, tuples, dicts
        and unions of them.
    """
    import msgspec

    optional = [
        (key, _bounded(kind) | None, None) for key, kind in fields.items()
    ]
    return msgspec.defstruct(name, optional)


def _bounded(kind: Any) -> Any:
    """Bound the numbers of a type: a JSON integer may have thousands of digits."""
    import msgspec

    if kind is int:
        return Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
    if kind is float:  # float32 ends below 1e39
        return Annotated[float, msgspec.Meta(ge=-1e39, le=1e39)]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return schema(kind.__name__, typing.get_type_hints(kind))
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple, dict):
        bounded = tuple(x if x is ... else _bounded(x) for x in members)
        return types.GenericAlias(origin, bounded)
    if members and origin is not typing.Literal:
        return functools.reduce(operator.or_, map(_bounded, members))
    return kind


@functools.cache
def _begun_schema() -> Any:
    """Return the schema of what every command's config.json has."""
    data = schema("Data", {"left_out": list[str]})
    fields = {"config": dict, "data": data, "resumed": list[dict[str, Any]]}
    return schema("Begun", fields)


@functools.cache
def _schemas() -> tuple[Any, Any, Any]:
    """Return the schemas of config.json, of result.json, and of a line of a log."""
    strings, whole_numbers = list[str], list[int]
    hardware = {"devices": strings, "kind": str, "cores": int, "machine": str}
    session = {
        "step": int,
        "command": str,
        "started": str,
        "versions": dict[str, str],
        "hardware": schema("Hardware", hardware),
        "git": schema("Git", {"commit": str, "branch": str, "dirty": bool}),
    }
    data = dict.fromkeys(("name", "kind"), str)
    data |= dict.fromkeys(("train", "validation", "test"), int)
    data |= dict.fromkeys(("classes", "notes", "left_out"), strings)
    data |= dict.fromkeys(("counts", "shape"), whole_numbers)
    sessions = types.GenericAlias(list, (schema("Session", session),))
    about = {
        **session,
        "config": Train,
        "data": schema("Data", data),
        "resumed": sessions,
    }
    summary = ("loss", "accuracy", "balanced_accuracy", "many", "medium", "few")
    split = schema("Summary", dict.fromkeys(summary, float))
    plan = dict.fromkeys(
        ("peak_bytes", "unplanned_peak_bytes", "budget_bytes"), int
    )
    mesh = dict.fromkeys(
        ("processes", "device_parameter_bytes", "device_state_bytes"), int
    )
    mesh |= dict.fromkeys(("sent", "sent_bytes"), dict[str, int])
    result = dict.fromkeys(("train", "validation", "test"), split)
    result |= dict.fromkeys(
        ("parameters", "state_bytes", "temp_bytes", "bytes_read"), int
    )
    result |= {
        "kind": str,
        "skipped_records": int,
        "plan": schema("Plan", {**plan, "extra_flops": float}),
        "mesh": schema("Mesh", {**mesh, "axes": str}),
    }
    row = types.GenericAlias(dict, (str, _bounded(float) | None))
    return schema("About", about), schema("Result", result), row


# A run directory read back.


class Run(NamedTuple):
    """A run directory as read, finished or not; what is missing there is empty here.

    Attributes:
      path: the directory.
      about: config.json.
      rows: metrics.jsonl, one dict per logged step, steps increasing.
      timing: timing.jsonl, one dict per window of steps.
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
        return (
            look(self.about, "data", "kind") or self.result.get("kind")
        ) == "text"

    @property
    def tricks(self) -> tuple[str, ...]:
        """Keys of the tricks that were on."""
        return tuple(
            key for key in KEYS if look(self.about, "config", "tricks", key)
        )

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
        times = []
        for row in self.timing[1:]:
            if row.get("seconds") and row.get("steps"):
                times.append(1e3 * row["seconds"] / row["steps"])
        return statistics.median(times) if times else None

    @property
    def examples_per_s(self) -> float | None:
        """Rate of a step of median time."""
        batch, milliseconds = look(self.about, "config", "batch"), self.step_ms
        return 1e3 * batch / milliseconds if batch and milliseconds else None

    def newest(self, name: str) -> float | None:
        """Return the newest finite value of a metric."""
        for row in reversed(self.rows):
            value = row.get(name)
            if value is not None and math.isfinite(value):
                return value
        return None


def read(path: str | pathlib.Path) -> Run:
    """Read a run directory, finished or not.

    Args:
      path: --out of `jaxtricks train`.

    Returns:
      The run. Lines that a killed run left torn are skipped; of steps that a resumed
      run went through twice, the later line counts.

    Raises:
      UserError: the path is no run, or an ablation, or says what no run would.
    """
    folder = pathlib.Path(path)
    about = _json(folder / CONFIG)
    config = about.get("config")
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is no run: give a directory of `jaxtricks train --out`"
        )
    if "seeds" in config:
        raise UserError(
            f"{path} is an ablation, whose runs are compared in "
            f"{folder / 'report.md'}: give a directory of `jaxtricks train "
            "--out`"
        )
    result = _json(folder / RESULT)
    about_schema, result_schema, _ = _schemas()
    for name, value, kind in (
        (CONFIG, about, about_schema),
        (RESULT, result, result_schema),
    ):
        problem = misfit(value, kind)
        if problem:
            raise UserError(
                f"{folder / name} is damaged ({problem}): restore it, or leave "
                "out the run"
            )
    return Run(
        folder, about, _rows(folder / METRICS), _rows(folder / TIMING), result
    )


def look(value: Any, *keys: str) -> Any:
    """Return value[keys[0]][keys[1]]...; None where a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _json(file: pathlib.Path) -> dict[str, Any]:
    # Absent, torn, or not JSON: all the same to a reader. A pipe would be waited for.
    try:
        value = parse(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    # Half characters, of names that are not UTF-8, could not be printed.
    return json.loads(
        json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    )


def _rows(file: pathlib.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lines = (
        file.read_text(errors="replace").splitlines() if file.is_file() else ()
    )
    for row in filter(None, map(_row, lines)):
        # A resumed run goes through steps again.
        while rows and rows[-1]["step"] > row["step"]:
            rows.pop()
        same_step = (
            rows.pop() if rows and rows[-1]["step"] == row["step"] else {}
        )
        rows.append({**same_step, **row})
    return rows


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = parse(line)
    except ValueError:
        return None
    *_, row_schema = _schemas()
    sound = isinstance(look(row, "step"), int) and not misfit(row, row_schema)
    return row if sound else None


# What a run directory says of the command: settings, versions, hardware, git state,
# data.


def describe(cfg: Any, command: str, data: Any = None) -> dict[str, Any]:
    """Return config.json of a run, whose data is a `data.Data` or None."""
    about = {**session(command), "config": dataclasses.asdict(cfg)}
    return about if data is None else {**about, "data": data.description()}


def session(command: str) -> dict[str, Any]:
    """Return the command, when, with which versions, on what."""
    return {
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "versions": versions(),
        "hardware": hardware(),
        "git": git(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, this library, and what it stands on."""
    here = {"python": platform.python_version(), "jaxtricks": jt.__version__}
    return {
        **here,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def hardware() -> dict[str, Any]:
    """Return devices and machine."""
    import jax

    devices = jax.devices()
    return {
        "devices": [str(d) for d in devices],
        "kind": f"{devices[0].platform} ({devices[0].device_kind})",
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def git() -> dict[str, Any] | None:
    """Return the state of the project that the command was run in; None outside of one."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    branch = _git("rev-parse", "--abbrev-ref", "HEAD")
    changes = _git("status", "--porcelain", "-uno")
    return {"commit": commit, "branch": branch, "dirty": bool(changes)}


def _git(*args: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", *args],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
