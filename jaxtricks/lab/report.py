"""Write report.md of a run, for a reader who has never heard of the project. Imports no jax."""

import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from jaxtricks import _table
from jaxtricks.lab import rundir
from jaxtricks.lab.config import Tricks
from jaxtricks.lab.rundir import Run, look, writing

__all__ = [
    "counted",
    "group_sizes",
    "hardware",
    "machine_line",
    "markdown",
    "write",
]

GROUPS = ("many", "medium", "few")
SPLITS = {"train": "training", "validation": "validation", "test": "the test"}
REPORT = "report.md"
_PICTURES = {
    "curves.png": "Loss and accuracy over the steps",
    "groups.png": "Accuracy of the many-, medium- and few-shot classes",
}
_LISTED = 20  # classes up to which every count is listed
# Thresholds of the groups; below 100 classes they are thirds.
_MANY, _FEW, _RANKED = 100, 20, 100


def group_sizes(counts: Sequence[int]) -> dict[str, int]:
    """Count the many-, medium- and few-shot classes, grouped as the evaluation of a run does.

    Args:
      counts: training images of each class.

    Returns:
      {"many", "medium", "few": classes}: thirds by count, or above 100 and below 20
      images where there are 100 classes or more.
    """
    if len(counts) < _RANKED:
        many = few = len(counts) // 3
    else:
        many, few = (
            sum(n > _MANY for n in counts),
            sum(n < _FEW for n in counts),
        )
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
        path.write_text(markdown(run, pictures))


def markdown(run: Run, pictures: Sequence[str]) -> str:
    """Return report.md of one run.

    Args:
      run: as read, finished or not.
      pictures: file names beside the report.

    Returns:
      Markdown; what the run does not say is left out.
    """
    parts = [
        f"# {_title(run)}",
        _command(run.about),
        _what(run),
        _tricks(run),
        "## Result",
        _unfinished(run),
        _quality(run),
        _skipped(run),
        *(f"![{_PICTURES.get(name, name)}]({name})" for name in pictures),
        "## Cost",
        _costs(run),
        "## How it was run",
        _origin(run.about),
        _again(run.about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(run: Run) -> str:
    model, name = (
        look(run.about, "config", "model"),
        look(run.about, "data", "name"),
    )
    title = f"{model or 'A model'} on {name or 'unknown data'}"
    if len(run.tricks) > 2:
        return f"{title}, with {len(run.tricks)} tricks"
    return f"{title}, with {' and '.join(run.tricks)}" if run.tricks else title


def _command(about: dict[str, Any]) -> str:
    command, started = look(about, "command"), look(about, "started")
    when = f" (started {started})" if started else ""
    return f"Command{when}:\n\n```\n{command}\n```" if command else ""


def _what(run: Run) -> str:
    data = look(run.about, "data") or {}
    # Notes begin in lower case and end without a full stop: they are printed line by
    # line too.
    notes = [str(note).strip().rstrip(".") for note in data.get("notes") or ()]
    sentences = [_task(run, data)]
    if not run.is_text:
        sentences.append(_counts(data))
    sentences += [f"{note[:1].upper()}{note[1:]}." for note in notes if note]
    sentences.append(_length(run))
    return " ".join(filter(None, sentences))


def _task(run: Run, data: dict[str, Any]) -> str:
    shape = "x".join(map(str, data.get("shape") or ()))
    if run.is_text:
        goal, unit = "predict the next character of", "windows of characters"
    else:
        goal = (
            f"tell {len(data.get('classes') or ()) or 'the'} classes apart in"
        )
        unit = f"images of {shape}" if shape else "images"
    # Runs of older versions may lack any of the fields.
    sizes = [
        f"{data[name]:,} for {use}"
        for name, use in SPLITS.items()
        if data.get(name)
    ]
    model, name = (
        look(run.about, "config", "model") or "model",
        data.get("name") or "its data",
    )
    return (
        f"The {model} learned to {goal} `{name}`: {', '.join([unit, *sizes])}."
    )


def _counts(data: dict[str, Any]) -> str:
    counts, classes = data.get("counts") or (), data.get("classes") or ()
    if not counts:
        return ""
    if len(counts) == len(classes) <= _LISTED:
        pairs = (
            f"{name}: {n:,}" for name, n in zip(classes, counts, strict=True)
        )
        return f"Training images by class: {', '.join(pairs)}."
    return f"A class has {min(counts):,} to {max(counts):,} training images."


def _length(run: Run) -> str:
    config = look(run.about, "config") or {}
    steps, batch, rate = (
        config.get(name) for name in ("steps", "batch", "learning_rate")
    )
    if not steps or not batch:
        return ""
    unit = "windows" if run.is_text else "images"
    peak = f", learning rate {rate:g} at its peak" if rate else ""
    return f"Training takes {steps:,} steps of {batch} {unit}{peak}, seed {config.get('seed', '?')}."


def _tricks(run: Run) -> str:
    if not run.tricks:
        return "No trick is on: this is plain training."
    helps = {
        field.name: field.metadata["help"]
        for field in dataclasses.fields(Tricks)
    }
    lines = [f"- {key}: {helps[key]}" for key in run.tricks]
    return "\n".join(
        [
            "Tricks that are on (`jaxtricks explain NAME` tells more):",
            "",
            *lines,
        ]
    )


def _unfinished(run: Run) -> str:
    if run.finished:
        return ""
    total = look(run.about, "config", "steps") or "?"
    text = f"**Not finished:** {run.done} of {total} steps are logged, the test split is not measured."
    values = []
    for name in ("loss", "accuracy", "balanced_accuracy"):
        newest = run.newest(f"val_{name}")
        if newest is not None:
            values.append(f"{name.replace('_', ' ')} {newest:.4g}")
    return (
        f"{text} Newest on the validation split: {', '.join(values)}."
        if values
        else text
    )


def _quality(run: Run) -> str:
    splits = {
        name: run.result[name] for name in SPLITS if look(run.result, name)
    }
    if not splits:
        return ""
    if run.is_text:
        headers = (
            "split",
            "nats per character",
            "bits per character",
            "next character right %",
        )
        body = [
            (name, *_text_cells(summary)) for name, summary in splits.items()
        ]
        legend = (
            "Nats and bits per character are the same loss in two units (1 nat "
            "is 1.443 bits): lower is better, and a uniform guess among K "
            "characters scores log2 K bits."
        )
    else:
        names = ("accuracy", "balanced_accuracy", *GROUPS)
        headers = (
            "split",
            "accuracy %",
            "balanced %",
            *(f"{group} %" for group in GROUPS),
        )
        cells = {
            name: map(_percent, map(s.get, names)) for name, s in splits.items()
        }
        body = [(name, *values) for name, values in cells.items()]
        legend = _legend(look(run.about, "data", "counts") or ())
    sample = "A large training split is measured on a sample."
    return f"{_table.make(headers, body).markdown()}\n\n{legend} {sample}"


def _skipped(run: Run) -> str:
    count = run.result.get("skipped_records")
    if not count:
        return ""
    return (
        f"{count} images broke while the run read them and were skipped: in "
        "training another image of the class took the place of each, and the "
        "evaluations are without them."
    )


def _text_cells(summary: dict[str, Any]) -> tuple[str, ...]:
    nats = summary.get("loss")
    units = () if nats is None else (f"{nats:.4f}", f"{nats / math.log(2):.4f}")
    # Where the loss overflowed there is no figure.
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
        "Balanced accuracy is the mean over the classes of each class's "
        "accuracy, so that rare classes weigh as much as common ones; many, "
        "medium and few are that mean over "
        f"{by}{f' ({sizes})' if counts else ''}."
    )


def _costs(run: Run) -> str:
    result, size = run.result, _table.format_bytes
    bytes_read = result.get("bytes_read")
    per_step = (
        bytes_read / run.done if bytes_read is not None and run.done else None
    )
    rows: list[tuple[str, Callable[[Any], str | None], Any]] = [
        ("parameters", "{:,}".format, result.get("parameters")),
        ("optimizer state", size, result.get("state_bytes")),
        ("temporaries of the compiled step", size, result.get("temp_bytes")),
        ("peak of the planned step", _planned, result.get("plan")),
        ("mesh", _mesh, result.get("mesh")),
        ("sent between devices in a step", _sent, result.get("mesh")),
        ("time of a step, median", "{:.2f} ms".format, run.step_ms),
        ("examples per second", "{:,.0f}".format, run.examples_per_s),
        ("read from the data per step", size, per_step),
    ]
    body = []
    for name, form, value in rows:
        text = None if value is None else form(value)
        if text is not None:  # what was not measured has no row
            body.append((name, text))
    return (
        _table.make(("cost", "value"), body).markdown()
        if body
        else "Nothing is measured yet."
    )


def _planned(plan: dict[str, Any]) -> str | None:
    figures = (
        "peak_bytes",
        "unplanned_peak_bytes",
        "budget_bytes",
        "extra_flops",
    )
    if any(plan.get(name) is None for name in figures):
        return None
    peak, unplanned, asked = (
        _table.format_bytes(plan[name]) for name in figures[:3]
    )
    return f"{peak} of {unplanned} (budget {asked}), {plan['extra_flops']:+.1%} operations"


def _mesh(mesh: dict[str, Any]) -> str | None:
    if any(
        mesh.get(name) is None
        for name in ("axes", "processes", "device_state_bytes")
    ):
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


def _origin(about: dict[str, Any]) -> str:
    versions = look(about, "versions") or {}
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    # A run that was stopped has a session for each time that it went on.
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
        f"{len(devices)} x {hardware.get('kind') or devices[0]}"
        if devices
        else "",
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
        "To go on from the newest checkpoint, if it was "
        f"stopped:\n\n```\n{resume}\n```\n\n"
        "config.json beside this report holds every setting, defaults included."
    )


def _without(words: Sequence[str], flag: str, option: str) -> list[str]:
    # The option's value is the next word, or joined to it.
    rest, is_value = [], False
    for word in words:
        if (
            not is_value
            and word not in (flag, option)
            and not word.startswith(f"{option}=")
        ):
            rest.append(word)
        is_value = word == option
    return rest


# Parts that other reports have too.


def counted(number: int, noun: str) -> str:
    """Write "1 seed" or "2 seeds"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def hardware() -> str:
    """Describe this machine and its versions in one line."""
    return machine_line(rundir.hardware(), rundir.versions())


def machine_line(machine: dict[str, Any], versions: dict[str, str]) -> str:
    """Write what `rundir.hardware` and `rundir.versions` return in one line."""
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "numpy")
    )
    return (
        f"{machine['kind']}, {machine['cores']} cores, {machine['machine']}, "
        f"Python {versions['python']}, {packages}"
    )
