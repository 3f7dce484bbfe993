"""report.md of a single run. Imports no jax."""

import math
import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from jaxtricks import _table
from jaxtricks.lab.config import Tricks, docs
from jaxtricks.lab.rundir import Run, look, read, writing

__all__ = ["Run", "group_sizes", "markdown", "read", "write"]

GROUPS = ("many", "medium", "few")
SPLITS = {"train": "training", "validation": "validation", "test": "the test"}
REPORT = "report.md"
_PICTURES = {
    "curves.png": "Loss and accuracy over the steps",
    "groups.png": "Accuracy of the many-, medium- and few-shot classes",
}
_LISTED = 20  # classes up to which every count is listed
_MANY, _FEW, _RANKED = 100, 20, 100  # thresholds of the groups; below 100 classes they are thirds


def group_sizes(counts: Sequence[int]) -> dict[str, int]:
    """How many classes are many-, medium- and few-shot, grouped as the evaluation of a run does.

    Args:
      counts: training images of each class.

    Returns:
      {"many", "medium", "few": classes}: thirds by count, or above 100 and below 20 images where there
      are 100 classes or more.
    """
    if len(counts) < _RANKED:
        many = few = len(counts) // 3
    else:
        many, few = sum(n > _MANY for n in counts), sum(n < _FEW for n in counts)
    return {"many": many, "medium": len(counts) - many - few, "few": few}


def write(run: Run, pictures: Sequence[str]) -> None:
    """Put report.md into a run's directory.

    Args:
      run: as read.
      pictures: file names beside the report.

    Raises:
      UserError: it can't be written.
    """
    with writing(run.path / REPORT) as path:
        path.write_text(markdown(run.about, run.rows, run.timing, run.result, pictures))


def markdown(
    about: dict[str, Any],
    rows: list[dict[str, Any]],
    timing: list[dict[str, Any]],
    result: dict[str, Any],
    pictures: Sequence[str],
) -> str:
    """report.md of one run, for a reader who has never seen the project.

    Args:
      about: config.json.
      rows: of metrics.jsonl.
      timing: of timing.jsonl.
      result: result.json; {} for an unfinished run.
      pictures: file names beside the report.

    Returns:
      Markdown; what is not known is left out.
    """
    run = Run(pathlib.Path(), about, rows, timing, result)
    parts = [
        f"# {_title(run)}",
        _command(about),
        _what(run),
        _tricks(run),
        "## Result",
        _unfinished(run),
        _quality(run),
        _skipped(run),
        *(f"![{_PICTURES.get(name, name)}]({name})" for name in pictures),
        "## Cost",
        _costs(run),
        "## How it was made",
        _made(about),
        _again(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(run: Run) -> str:
    model, name = look(run.about, "config", "model"), look(run.about, "data", "name")
    on = " and ".join(run.tricks) if len(run.tricks) < 3 else f"{len(run.tricks)} tricks"
    return f"{model or 'A model'} on {name or 'unknown data'}" + (f", with {on}" if on else "")


def _command(about: dict[str, Any]) -> str:
    command, started = look(about, "command"), look(about, "started")
    when = f" (started {started})" if started else ""
    return f"Command{when}:\n\n```\n{command}\n```" if command else ""


def _what(run: Run) -> str:
    data = look(run.about, "data") or {}
    notes = (str(note).strip().rstrip(".") for note in data.get("notes") or ())
    notes = (f"{note[:1].upper()}{note[1:]}." for note in notes if note)
    counts = "" if run.is_text else _counts(data)
    sentences = (_task(run, data), counts, *notes, _length(run))
    return " ".join(sentence for sentence in sentences if sentence)


def _task(run: Run, data: dict[str, Any]) -> str:
    shape = "x".join(map(str, data.get("shape") or ()))
    if run.is_text:
        goal, unit = "predict the next character of", "windows of characters"
    else:
        goal = f"tell {len(data.get('classes') or ()) or 'the'} classes apart in"
        unit = f"images of {shape}" if shape else "images"
    sizes = [f"{data[name]:,} for {use}" for name, use in SPLITS.items() if data.get(name)]
    model, name = look(run.about, "config", "model") or "model", data.get("name") or "its data"
    return f"The {model} learned to {goal} `{name}`: {', '.join([unit, *sizes])}."


def _counts(data: dict[str, Any]) -> str:
    counts, classes = data.get("counts") or (), data.get("classes") or ()
    if not counts:
        return ""
    if len(counts) == len(classes) <= _LISTED:
        pairs = (f"{name}: {n:,}" for name, n in zip(classes, counts, strict=True))
        return f"Training images by class: {', '.join(pairs)}."
    return f"A class has {min(counts):,} to {max(counts):,} training images."


def _length(run: Run) -> str:
    config = look(run.about, "config") or {}
    steps, batch, rate = (config.get(name) for name in ("steps", "batch", "learning_rate"))
    if not steps or not batch:
        return ""
    unit = "windows" if run.is_text else "images"
    peak = f", learning rate {rate:g} at its peak" if rate else ""
    return (
        f"Training takes {steps:,} steps of {batch} {unit}{peak}, seed {config.get('seed', '?')}."
    )


def _tricks(run: Run) -> str:
    if not run.tricks:
        return "No trick is on: this is plain training."
    what = docs(Tricks)
    lines = [f"- {key}: {what[key]}" for key in run.tricks]
    return "\n".join(["Tricks that are on (`jaxtricks explain NAME` tells more):", "", *lines])


def _unfinished(run: Run) -> str:
    if run.finished:
        return ""
    total = look(run.about, "config", "steps") or "?"
    text = (
        f"**Not finished:** {run.done} of {total} steps are logged, the test split is not measured."
    )
    known = {name: run.newest(f"val_{name}") for name in ("loss", "accuracy", "balanced_accuracy")}
    values = [f"{k.replace('_', ' ')} {x:.4g}" for k, x in known.items() if x is not None]
    return f"{text} Newest on the validation split: {', '.join(values)}." if values else text


def _quality(run: Run) -> str:
    splits = {name: run.result[name] for name in SPLITS if look(run.result, name)}
    if not splits:
        return ""
    if run.is_text:
        headers = ("split", "nats per character", "bits per character", "next character right %")
        body = [(name, *_text_cells(summary)) for name, summary in splits.items()]
        legend = (
            "Nats and bits per character are the same loss in two units (1 nat is 1.443 bits): lower is "
            "better, and a uniform guess among K characters scores log2 K bits."
        )
    else:
        names = ("accuracy", "balanced_accuracy", *GROUPS)
        headers = ("split", "accuracy %", "balanced %", *(f"{group} %" for group in GROUPS))
        cells = {name: map(_percent, map(s.get, names)) for name, s in splits.items()}
        body = [(name, *values) for name, values in cells.items()]
        legend = _legend(look(run.about, "data", "counts") or ())
    sample = "A large training split is measured on a sample."
    return f"{_table.make(headers, body).markdown()}\n\n{legend} {sample}"


def _skipped(run: Run) -> str:
    count = run.result.get("skipped_records")
    if not count:
        return ""
    return (
        f"{count} images broke while the run read them and were skipped: in training another image of the "
        "class took the place of each, and the evaluations are without them."
    )


def _text_cells(summary: dict[str, Any]) -> tuple[str, ...]:
    nats = summary.get("loss")
    units = () if nats is None else (f"{nats:.4f}", f"{nats / math.log(2):.4f}")
    return (*(units or ("-", "-")), _percent(summary.get("accuracy")))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _legend(counts: Sequence[int]) -> str:
    by = (
        "thirds of the classes by training images, the largest first"
        if len(counts) < _RANKED
        else f"classes of more than {_MANY}, {_MANY} to {_FEW} and fewer than {_FEW} training images"
    )
    sizes = ", ".join(f"{n} {name}" for name, n in group_sizes(counts).items())
    return (
        "Balanced accuracy is the mean over the classes of each class's accuracy, so that rare classes "
        f"weigh as much as common ones; many, medium and few are that mean over {by}"
        f"{f' ({sizes})' if counts else ''}."
    )


def _costs(run: Run) -> str:
    result, done = run.result, run.done
    costs = {
        "parameters": _say("{:,}".format, result.get("parameters")),
        "optimizer state": _say(_table.format_bytes, result.get("state_bytes")),
        "temporaries of the compiled step": _say(_table.format_bytes, result.get("temp_bytes")),
        "peak of the planned step": _say(_planned, result.get("plan")),
        "mesh": _say(_mesh, result.get("mesh")),
        "sent between devices in a step": _say(_sent, result.get("mesh")),
        "time of a step, median": _say("{:.2f} ms".format, run.step_ms),
        "examples per second": _say("{:,.0f}".format, run.examples_per_s),
        "read from the data per step": _say(
            lambda n: _table.format_bytes(n / done), result.get("bytes_read") if done else None
        ),
    }
    body = [(name, value) for name, value in costs.items() if value is not None]
    return _table.make(("cost", "value"), body).markdown() if body else "Nothing is measured yet."


def _planned(plan: dict[str, Any]) -> str | None:
    figures = ("peak_bytes", "unplanned_peak_bytes", "budget_bytes", "extra_flops")
    if any(plan.get(name) is None for name in figures):
        return None
    peak, unplanned, asked = (_table.format_bytes(plan[name]) for name in figures[:3])
    return f"{peak} of {unplanned} (budget {asked}), {plan['extra_flops']:+.1%} operations"


def _mesh(mesh: dict[str, Any]) -> str | None:
    if any(mesh.get(name) is None for name in ("axes", "processes", "device_state_bytes")):
        return None
    held = _table.format_bytes(mesh["device_state_bytes"])
    hosts = f", {mesh['processes']} processes" if mesh["processes"] > 1 else ""
    return f"{mesh['axes']}{hosts}; {held} of optimizer state a device"


def _sent(mesh: dict[str, Any]) -> str:
    sizes = mesh.get("sent_bytes") or {}
    return "; ".join(
        f"{count} {kind}, {_table.format_bytes(sizes.get(kind) or 0)}"
        for kind, count in (mesh.get("sent") or {}).items()
    )


def _say(form: Callable[[Any], str | None], value: Any) -> str | None:
    return None if value is None else form(value)


def _made(about: dict[str, Any]) -> str:
    versions = look(about, "versions") or {}
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    again = (
        f"went on after step {session.get('step', '?')} ({session.get('started', '?')})"
        for session in look(about, "resumed") or ()
    )
    lines = (
        names,
        _hardware(look(about, "hardware") or {}),
        _git(look(about, "git") or {}),
        *again,
    )
    return "\n".join(f"- {line}" for line in lines if line)


def _hardware(hardware: dict[str, Any]) -> str:
    devices, cores = hardware.get("devices") or (), hardware.get("cores")
    parts = (
        f"{len(devices)} x {hardware.get('kind') or devices[0]}" if devices else "",
        f"{cores} processor cores" if cores else "",
        str(hardware.get("machine") or ""),
    )
    return ", ".join(part for part in parts if part)


def _git(git: dict[str, Any]) -> str:
    if not git.get("commit"):
        return "not in a git repository"
    branch = f" on {git['branch']}" if git.get("branch") else ""
    dirty = ", with changes that were not committed" if git.get("dirty") else ""
    return f"git commit {git['commit']}{branch}{dirty}"


def _again(about: dict[str, Any]) -> str:
    command, out = look(about, "command"), look(about, "config", "out")
    if not command or not out:
        return "config.json holds every setting."
    try:
        words = _without(shlex.split(command), "--resume", "--out")
    except ValueError:  # a quotation without an end: not written by us
        return "config.json holds every setting."
    repeat = shlex.join([*words, "--out", f"{out.rstrip('/')}-again"])
    resume = shlex.join([*words, "--out", out, "--resume"])
    return (
        f"To repeat it in a new directory:\n\n```\n{repeat}\n```\n\n"
        f"To go on from the newest checkpoint, if it was stopped:\n\n```\n{resume}\n```\n\n"
        "config.json beside this report holds every setting, defaults included."
    )


def _without(words: Sequence[str], flag: str, option: str) -> list[str]:
    # The option's value is the next word, or joined to it.
    kept, is_value = [], False
    for word in words:
        if not is_value and word not in (flag, option) and not word.startswith(f"{option}="):
            kept.append(word)
        is_value = word == option
    return kept
