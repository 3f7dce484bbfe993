"""What the files of a run directory may say, and how values of other kinds are noticed. Imports no jax."""

import dataclasses
import reprlib
import types
import typing
from typing import Any, Literal

from jaxtricks.lab.config import Train

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
RESULT: dict[str, Any] = {
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
