"""Compare finished and unfinished runs side by side. Imports no jax."""

import itertools
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtricks import KEYS, _table
from jaxtricks.lab import plots, rundir
from jaxtricks.lab.config import Compare, UserError
from jaxtricks.lab.rundir import FREE, Run, look

_WIDTH = 100  # columns of a terminal
_WORD = 30  # characters of a word there
# Columns that are settings, not figures.
_WORDS = ("data", "model", "tricks", "seed")


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


def main(cfg: Compare) -> None:
    """Print the table and draw the picture: what the command line calls."""
    runs = [rundir.read(path) for path in cfg.runs]
    print(for_terminal(runs))
    if cfg.picture:
        cure = "give a --picture that ends in .png, in a folder that can be written to"
        plots.save(plots.compare(points(runs)), pathlib.Path(cfg.picture), cure)


def table(runs: Sequence[Run]) -> _table.Table:
    """Make a row per run; below it what the runs differ in and what to beware of.

    Args:
      runs: as read by `rundir.read`.

    Returns:
      A table whose quality columns are those that apply to some run: the test split of
      finished runs, the best marked "*", and the newest validation figure of the
      others, marked "val".

    Raises:
      UserError: there are no runs.
    """
    if not runs:
        raise UserError(
            "nothing to compare: name the directories of one or more runs"
        )
    columns = _columns(runs)
    notes = [*_legend(columns), *_differences(runs), *_warnings(runs)]
    return _table.make(
        tuple(columns), tuple(zip(*columns.values(), strict=True)), notes
    )


def for_terminal(runs: Sequence[Run]) -> str:
    """Write the table in 100 columns: what all runs share stands above, long names lose their middle.

    Args:
      runs: as read by `rundir.read`.

    Returns:
      The text to print.

    Raises:
      UserError: there are no runs.
    """
    full = table(runs)
    columns = dict(zip(full.headers, zip(*full.rows, strict=True), strict=True))
    shared = {
        name: columns.pop(name)[0]
        for name in _WORDS
        if len(set(columns[name])) == 1
    }
    columns["run"] = tuple(_short_names(columns["run"]))
    words = {}
    for name in _WORDS:
        if name in columns:
            words[name] = tuple(_shorten(x, _WORD) for x in columns.pop(name))
    run_names = columns.pop("run")
    figures = dict(_right(header, cells) for header, cells in columns.items())
    parts = [
        _text(part) for part in _fitting({"run": run_names, **figures, **words})
    ]
    if shared:
        who = "All runs" if len(runs) > 1 else "Run"
        settings = ", ".join(
            f"{name} {_table.cell(value)}" for name, value in shared.items()
        )
        parts.insert(0, textwrap.fill(f"{who}: {settings}", _WIDTH))
    if full.notes:
        notes = [
            textwrap.fill(note, _WIDTH, subsequent_indent="  ")
            for note in full.notes
        ]
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def points(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what `plots.compare` draws.

    Args:
      runs: as read by `rundir.read`.

    Returns:
      A dict per run: name; text, whether it modelled text; rows of metrics.jsonl; test,
      the summary of the test split, {} while unfinished; step_ms, None if not measured.
    """
    dicts = []
    for name, run in zip(_short_names(names(runs)), runs, strict=True):
        test = look(run.result, "test") or {}
        point = {
            "name": name,
            "text": run.is_text,
            "rows": run.rows,
            "test": test,
        }
        dicts.append({**point, "step_ms": run.step_ms})
    return dicts


def names(runs: Sequence[Run]) -> list[str]:
    """Return the shortest ends of the runs' paths that tell them apart."""
    paths = [run.path.resolve().parts for run in runs]
    different = len(set(paths))
    depth, ends = 0, [""]
    while len(set(ends)) < different or depth == 0:
        depth += 1
        ends = ["/".join(parts[-depth:]) for parts in paths]
    return ends


def tricks(run: Run) -> str:
    """Name the tricks that were on, as in "agc+echo", "all - agc" or "-"."""
    # Ablations leave one out: "all - agc" is shorter than the nine others.
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
        cells = _cells(quality, runs)
        if any(cells):
            columns[quality.header] = [cell or "-" for cell in cells]
    columns["step ms"] = [
        "-" if x.step_ms is None else f"{x.step_ms:.2f}" for x in runs
    ]
    states = [run.result.get("state_bytes") for run in runs]
    columns["state KiB"] = [
        "-" if x is None else f"{x / 1024:.1f}" for x in states
    ]
    columns["seed"] = [setting.get("seed") for setting in settings]
    return columns


def _cells(quality: _Quality, runs: Sequence[Run]) -> list[str]:
    """Return the column; "" where there is nothing to say."""
    measured = [_tested(quality, run) for run in runs]
    # A run alone is not the best of its column.
    finished = [x for x in measured if x is not None]
    best = quality.best(finished) if len(finished) > 1 else None
    cells = []
    for run, x in zip(runs, measured, strict=True):
        if x is not None:
            mark = "*" if x == best else ""
            cells.append(f"{quality.form(x)}{mark}")
            continue
        newest = None
        if not run.finished and run.is_text == quality.of_text:
            newest = run.newest(f"val_{quality.metric}")
        cells.append("" if newest is None else f"val {quality.form(newest)}")
    return cells


def _tested(quality: _Quality, run: Run) -> float | None:
    if run.is_text != quality.of_text:
        return None
    return look(run.result, "test", quality.metric)


def _steps(run: Run) -> str:
    total = look(run.about, "config", "steps")
    return (
        str(total) if run.finished and total else f"{run.done}/{total or '?'}"
    )


def _legend(columns: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    cells = [cell for q in _QUALITIES for cell in columns.get(q.header, ())]
    if any("*" in cell for cell in cells):
        yield "*: the best of its column on the test split."
    if any("val" in cell for cell in cells):
        yield "val: not finished; the newest figure of the validation split, out of the running for *."


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a sentence for each setting that is not a column and differs between the runs."""
    by_name = dict(zip(names(runs), map(_settings, runs), strict=True))
    all_settings = dict.fromkeys(itertools.chain(*by_name.values()))
    for setting in all_settings:
        if setting in (*_WORDS, "steps"):
            continue
        runs_of: dict[str, list[str]] = {}
        for name, settings in by_name.items():
            if setting in settings:
                value = _written(settings[setting])
                runs_of.setdefault(value, []).append(name)
        if len(runs_of) > 1:
            who = [
                f"{value} ({', '.join(users)})"
                for value, users in runs_of.items()
            ]
            yield f"{setting}: {', '.join(who)}."


def _warnings(runs: Sequence[Run]) -> Iterator[str]:
    if _differ(runs, "data", ("name", "test", "classes")):
        yield "The runs have different data: their figures are of different test sets."
    elif _differ(runs, "config", ("seed",)):
        yield "The seeds differ, and with them the test split where the data set brings none."
    if _differ(runs, "hardware", ("kind", "cores", "machine")):
        yield "The runs were on different hardware: their step times say little about the settings."


def _differ(runs: Sequence[Run], section: str, names: Sequence[str]) -> bool:
    first = runs[0]
    for run in runs:
        for name in names:
            if look(run.about, section, name) != look(
                first.about, section, name
            ):
                return True
    return False


def _settings(run: Run) -> dict[str, Any]:
    """Return settings by name, those of the text model only where it was used."""
    config = dict(look(run.about, "config") or {})
    data = look(run.about, "data", "name") or config.get("data")
    # Nested settings are shown by their names on the command line.
    text = (config.pop("text", None) or {}) if run.is_text else {}
    settings = {**config, **text, "data": data, "tricks": tricks(run)}
    return {
        name: value
        for name, value in settings.items()
        if name not in FREE | {"text"}
    }


def _written(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else _table.cell(value)
    )


def _right(header: str, cells: Sequence[str]) -> tuple[str, list[str]]:
    """Align a column to the right; the marks of the best stand beside it."""
    if any(cell.endswith("*") for cell in cells):
        padded = [cell if cell.endswith("*") else f"{cell} " for cell in cells]
    else:
        padded = list(cells)
    width = max(map(len, (header, *padded)))
    return header.rjust(width), [cell.rjust(width) for cell in padded]


def _shorten(value: Any, width: int) -> Any:
    """Drop the middle of a long text; other values stay as they are."""
    if not isinstance(value, str) or len(value) <= width:
        return value
    tail = (width - 1) // 2
    return f"{value[: width - 1 - tail]}…{value[-tail:]}"


def _short_names(names: Sequence[str]) -> list[str]:
    """Shorten names as far as they differ."""
    for width in (24, 36, 48):
        short = [_shorten(name, width) for name in names]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def _text(columns: Mapping[str, Sequence[Any]]) -> str:
    return str(
        _table.make(tuple(columns), tuple(zip(*columns.values(), strict=True)))
    )


def _fitting(
    columns: Mapping[str, Sequence[Any]],
) -> list[dict[str, Sequence[Any]]]:
    """Split the columns into tables that fit the terminal, each beginning with the runs."""
    names = {"run": columns["run"]}
    tables = [names]
    for name, cells in columns.items():
        wider = {**tables[-1], name: cells}
        if (
            max(map(len, _text(wider).splitlines())) > _WIDTH
            and tables[-1] != names
        ):
            tables.append({**names, name: cells})
        else:
            tables[-1] = wider
    return tables
