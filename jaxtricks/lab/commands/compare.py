"""The `compare` command: finished and unfinished runs side by side. Imports no jax."""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtricks import KEYS, _table
from jaxtricks.lab.config import UserError
from jaxtricks.lab.rundir import FREE, Run, look

_WIDTH = 100  # columns of a terminal
_WORD = 30  # characters kept of a word there
_WORDS = ("data", "model", "tricks", "seed")  # columns that are settings, not figures


class _Quality(NamedTuple):
    header: str
    metric: str
    of_text: bool
    form: Callable[[float], str]
    best: Callable[..., float]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


_QUALITIES = (
    _Quality("test acc. %", "accuracy", False, _percent, max),
    _Quality("bal. %", "balanced_accuracy", False, _percent, max),
    _Quality("few %", "few", False, _percent, max),
    _Quality("nats/char", "loss", True, "{:.4f}".format, min),
)


def table(runs: Sequence[Run]) -> _table.Table:
    """One row a run; below it what the runs differ in and what to beware of.

    Args:
      runs: as read by `runs.read`.

    Returns:
      A table whose quality columns are those that apply to some run: the test split of finished runs, the
      best marked "*", and the newest validation figure of the others, marked "val".

    Raises:
      UserError: there are no runs.
    """
    if not runs:
        raise UserError("nothing to compare: name the directories of one or more runs")
    columns = _columns(runs)
    notes = [*_legend(columns), *_differences(runs), *_warnings(runs)]
    return _table.make(tuple(columns), tuple(zip(*columns.values(), strict=True)), notes)


def for_terminal(runs: Sequence[Run]) -> str:
    """The table in 100 columns: what all runs share is said once, long names lose their middle.

    Args:
      runs: as read by `runs.read`.

    Returns:
      The text to print.

    Raises:
      UserError: there are no runs.
    """
    full = table(runs)
    columns = dict(zip(full.headers, zip(*full.rows, strict=True), strict=True))
    shared = {name: columns.pop(name)[0] for name in _WORDS if len(set(columns[name])) == 1}
    columns["run"] = tuple(_short_names(columns["run"]))
    words = {
        name: tuple(_shorten(x, _WORD) for x in columns.pop(name))
        for name in _WORDS
        if name in columns
    }
    figures = dict(_right(*column) for column in columns.items() if column[0] != "run")
    tables = _fitting({"run": columns["run"], **figures, **words})
    said = ", ".join(f"{name} {_table.cell(value)}" for name, value in shared.items())
    intro = (
        [textwrap.fill(f"{'All runs' if len(runs) > 1 else 'Run'}: {said}", _WIDTH)] if said else []
    )
    notes = [textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in full.notes]
    return "\n\n".join([*intro, *map(_text, tables), *(["\n".join(notes)] if notes else [])])


def points(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What `plot.compare` draws.

    Args:
      runs: as read by `runs.read`.

    Returns:
      A dict a run: name; text, whether it modelled text; rows of metrics.jsonl; test, the summary of the
      test split, {} while unfinished; step_ms, None if not measured.
    """
    return [
        {
            "name": name,
            "text": run.is_text,
            "rows": run.rows,
            "test": look(run.result, "test") or {},
            "step_ms": run.step_ms,
        }
        for name, run in zip(_short_names(names(runs)), runs, strict=True)
    ]


def names(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    depths = range(1, max(map(len, parts)) + 1)
    candidates = (["/".join(part[-depth:]) for part in parts] for depth in depths)
    return next(ends for ends in candidates if len(set(ends)) == len(set(parts)))


def tricks(run: Run) -> str:
    """The tricks that were on, as in "agc+echo", "all - agc" or "-"."""
    off = [key for key in KEYS if key not in run.tricks]
    if len(off) <= 2:
        return " - ".join(["all", *off])
    return "+".join(run.tricks) or "-"


def _columns(runs: Sequence[Run]) -> dict[str, Sequence[Any]]:
    columns: dict[str, Sequence[Any]] = {"run": names(runs)}
    settings = [_settings(run) for run in runs]
    for name in ("data", "model", "tricks"):
        columns[name] = [str(setting.get(name) or "?") for setting in settings]
    columns["steps"] = [_steps(run) for run in runs]
    for quality in _QUALITIES:
        if any(cells := _cells(quality, runs)):
            columns[quality.header] = [cell or "-" for cell in cells]
    columns["step ms"] = ["-" if x.step_ms is None else f"{x.step_ms:.2f}" for x in runs]
    states = [run.result.get("state_bytes") for run in runs]
    columns["state KiB"] = ["-" if x is None else f"{x / 1024:.1f}" for x in states]
    columns["seed"] = [setting.get("seed") for setting in settings]
    return columns


def _cells(quality: _Quality, runs: Sequence[Run]) -> list[str]:
    """The column; "" where there is nothing to say."""
    measured = [_tested(quality, run) for run in runs]
    known = [x for x in measured if x is not None]
    best = quality.best(known) if len(known) > 1 else None
    cells = []
    for run, x in zip(runs, measured, strict=True):
        newest = None if run.finished or run.is_text != quality.of_text else _newest(quality, run)
        if x is not None:
            cells.append(quality.form(x) + ("*" if x == best else ""))
        else:
            cells.append("" if newest is None else f"val {quality.form(newest)}")
    return cells


def _tested(quality: _Quality, run: Run) -> float | None:
    return look(run.result, "test", quality.metric) if run.is_text == quality.of_text else None


def _newest(quality: _Quality, run: Run) -> float | None:
    return run.newest(f"val_{quality.metric}")


def _steps(run: Run) -> str:
    total = look(run.about, "config", "steps")
    return str(total) if run.finished and total else f"{run.done}/{total or '?'}"


def _legend(columns: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    cells = [cell for q in _QUALITIES for cell in columns.get(q.header, ())]
    if any("*" in cell for cell in cells):
        yield "*: the best of its column on the test split."
    if any("val" in cell for cell in cells):
        yield "val: not finished; the newest figure of the validation split, out of the running for *."


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """A sentence for each setting that is no column and differs between the runs that have it."""
    settings = [_settings(run) for run in runs]
    for setting in dict.fromkeys(itertools.chain(*settings)):
        runs_of: dict[str, list[str]] = {}
        for name, values in zip(names(runs), settings, strict=True):
            if setting in values:
                runs_of.setdefault(_say(values[setting]), []).append(name)
        if setting not in (*_WORDS, "steps") and len(runs_of) > 1:
            who = (f"{value} ({', '.join(having)})" for value, having in runs_of.items())
            yield f"{setting}: {', '.join(who)}."


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    if _differ(
        runs, lambda run: [look(run.about, "data", key) for key in ("name", "test", "classes")]
    ):
        yield "The runs have different data: their figures are of different test sets."
    elif _differ(runs, lambda run: look(run.about, "config", "seed")):
        yield "The seeds differ, and with them the test split where the data set brings none of its own."
    if _differ(
        runs, lambda run: [look(run.about, "hardware", k) for k in ("kind", "cores", "machine")]
    ):
        yield "The runs were on different hardware: their step times say little about the settings."


def _differ(runs: Sequence[Run], key: Callable[[Run], Any]) -> bool:
    return any(key(run) != key(runs[0]) for run in runs)


def _settings(run: Run) -> dict[str, Any]:
    """Settings by name, those of the text model only where it was used; the data by what was found."""
    config = dict(look(run.about, "config") or {})
    data = look(run.about, "data", "name") or config.get("data")
    text = (config.pop("text", None) or {}) if run.is_text else {}
    settings = {**config, **text, "data": data, "tricks": tricks(run)}
    return {name: value for name, value in settings.items() if name not in FREE | {"text"}}


def _say(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else _table.cell(value)


def _right(header: str, cells: Sequence[str]) -> tuple[str, list[str]]:
    """Digits below digits: the marks of the best stand beside the column."""
    marked = any(cell.endswith("*") for cell in cells)
    padded = [cell if cell.endswith("*") or not marked else f"{cell} " for cell in cells]
    width = max(map(len, (header, *padded)))
    return header.rjust(width), [cell.rjust(width) for cell in padded]


def _shorten(value: Any, width: int) -> Any:
    """Text without its middle; what is no text stays as it is."""
    if not isinstance(value, str) or len(value) <= width:
        return value
    tail = (width - 1) // 2
    return f"{value[: width - 1 - tail]}…{value[-tail:]}"


def _short_names(names: Sequence[str]) -> list[str]:
    """As short as possible while they differ."""
    for width in (24, 36, 48):
        short = [_shorten(name, width) for name in names]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def _text(columns: Mapping[str, Sequence[Any]]) -> str:
    return str(_table.make(tuple(columns), tuple(zip(*columns.values(), strict=True))))


def _fitting(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Sequence[Any]]]:
    """The columns in tables that fit the terminal, each beginning with the runs."""
    names = {"run": columns["run"]}
    tables = [names]
    for name, cells in columns.items():
        wider = {**tables[-1], name: cells}
        if max(map(len, _text(wider).splitlines())) > _WIDTH and tables[-1] != names:
            tables.append({**names, name: cells})
        else:
            tables[-1] = wider
    return tables
