"""A run directory read back, finished or not. Imports no jax."""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtricks import KEYS
from jaxtricks.lab import jsons, recorded
from jaxtricks.lab.config import UserError
from jaxtricks.lab.rundir import CONFIG, METRICS, RESULT, TIMING


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
    for name, value, kind in ((CONFIG, about, recorded.ABOUT), (RESULT, result, recorded.RESULT)):
        if problem := recorded.misfit(value, kind):
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
        value = jsons.parse(file.read_bytes()) if file.is_file() else {}
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
        row = jsons.parse(line)
    except ValueError:
        return None
    return (
        row
        if isinstance(look(row, "step"), int) and not recorded.misfit(row, recorded.ROW)
        else None
    )
