"""What a run directory says about itself: settings, versions, hardware, git state, data."""

import dataclasses
import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any

import jax

import jaxtricks as jt
from jaxtricks.lab import data as data_lib

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


def of_run(cfg: Any, command: str, data: data_lib.Data | None = None) -> dict[str, Any]:
    """config.json of a run."""
    about = {**session(command), "config": dataclasses.asdict(cfg)}
    return about if data is None else {**about, "data": of_data(data)}


def of_data(data: data_lib.Data) -> dict[str, Any]:
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
