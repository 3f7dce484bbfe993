"""A run directory: never overwritten, resumable, every file whole or absent."""

import contextlib
import json
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from jaxtricks.lab import jsons, recorded
from jaxtricks.lab.config import UserError

CONFIG, METRICS, TIMING, RESULT = "config.json", "metrics.jsonl", "timing.jsonl", "result.json"
# Settings that change no number of a run; the others must be those that it began with.
FREE = {"out", "resume", "save_every", "keep", "tensorboard", "wandb", "check_data"}
FREE |= {"mesh", "fsdp", "coordinator", "processes", "process"}  # or none beyond rounding


class RunDir:
    """Creates a run directory, or goes on in one.

    Args:
      path: the directory.
      about: what config.json says.
      resume: go on where config.json is there already.

    Attributes:
      path: the directory.
      resumed: whether it held a run before.

    Raises:
      UserError: it can't be made, holds something else, or holds a run of other settings or data; nothing is
        changed then.
    """

    def __init__(self, path: str, about: dict[str, Any], *, resume: bool = False):
        self.path = pathlib.Path(path)
        if self.path.is_file():
            raise UserError(f"--out {path} is a file: give a directory to create")
        self.resumed = resume and (self.path / CONFIG).exists()
        if self.resumed:
            check_same(path, self._before(), about)
            return
        # One that was killed while it wrote its first file has not begun.
        begun = f".{CONFIG}.partial"
        if self.path.exists() and any(p.name != begun for p in self.path.iterdir()):
            holds = "holds no run to resume" if resume else "already holds a run"
            cure = "give another" if resume else "give another or remove it, or go on with --resume"
            raise UserError(f"--out {path} {holds}: {cure}")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write(CONFIG, about)

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
            with writing(self.path / name) as path, open(path, "a") as file:
                file.write(json.dumps(finite({"step": step, **row})) + "\n")

    def begin_again(self, step: int, session: dict[str, Any]) -> None:
        """Cut the logs after `step`, and note in config.json who goes on from there."""
        for name in (METRICS, TIMING):
            if (self.path / name).exists():
                self.write_text(name, _lines_until(self.path / name, step))
        before = self._before()
        before.setdefault("resumed", []).append({"step": step, **session})
        self.write(CONFIG, before)

    def _before(self) -> dict[str, Any]:
        path = self.path / CONFIG
        try:
            before = jsons.parse(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read ({error}): give another --out") from error
        problem = recorded.misfit(before, recorded.FRAME)
        if problem or before.get("config") is None:
            raise UserError(f"{path} is of no run ({problem or 'no config'}): give another --out")
        return {name: value for name, value in before.items() if value is not None}


def check_writable(path: str) -> None:
    """Try to write where a run directory is or will be; leaves nothing behind.

    Raises:
      UserError: nothing can be written there.
    """
    folder = pathlib.Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    with writing(pathlib.Path(path)):
        if folder.is_dir():  # what `RunDir` says of a file is more to the point
            with tempfile.TemporaryFile(dir=folder):
                pass


def check_same(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError with the first difference in settings or data."""
    now = json.loads(json.dumps(finite(now)))
    old, new = _flat(before.get("config", {})), _flat(now["config"])
    for name in new:
        if name not in FREE and old.get(name) != new[name]:
            raise UserError(
                f"--resume: {path} was begun with {_flag(name, old.get(name))}, not "
                f"{_flag(name, new[name])}: give the same settings or another --out"
            )
    old, new = _flat(before.get("data", {})), _flat(now.get("data", {}))
    for name in new:
        if name != "notes" and old.get(name) != new[name]:
            raise UserError(
                f"--resume: the data set has changed since {path} was begun ({name}: {old.get(name)} then, "
                f"{new[name]} now): restore it or give another --out"
            )


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Say in one sentence what could not be written and why.

    Raises:
      UserError: for any OSError inside.
    """
    try:
        yield path
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"can't write {path} ({reason}): free space or give a writable --out; checkpoints that were "
            "saved before are whole"
        ) from error


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


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else "--no-" + flag[2:]
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
