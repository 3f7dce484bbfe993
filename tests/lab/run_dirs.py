"""What tests compare of run directories."""

import pathlib

from jaxtricks.lab import rundir


def log_of(out):
    return (pathlib.Path(out) / rundir.METRICS).read_bytes()


def steps_of(out):
    """Of its checkpoints."""
    return sorted(int(p.name) for p in (pathlib.Path(out) / "checkpoints").iterdir())
