"""Keep plans in a folder, by what they were made for."""

import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jaxlib

from jaxtricks.remat._plan import Plan, plan_from_json


class Cache:
    """A folder of plans.

    Args:
      folder: where; created when the first plan is written.

    Raises:
      ValueError: it is a file.
    """

    def __init__(self, folder: str | pathlib.Path):
        self._folder = pathlib.Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"cache is {folder}, a file: give a folder")

    def read(self, key: Any, fn: Callable[..., Any]) -> Plan[..., Any] | None:
        """Return the plan of this key; None if there is none that can be read."""
        try:
            return plan_from_json(self._path(key).read_text(), fn)
        except (OSError, ValueError):
            # Absent, or of another version: it is planned and written anew.
            return None

    def write(self, key: Any, plan: Plan[..., Any]) -> None:
        """Write a plan, whole or not at all."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = pathlib.Path(folder) / path.name
            whole.write_text(plan.to_json() + "\n")
            whole.replace(path)

    def _path(self, key: Any) -> pathlib.Path:
        # Another compiler, or another chip, assigns other buffers.
        whole = (
            key,
            jax.__version__,
            jaxlib.__version__,
            jax.default_backend(),
            jax.devices()[0].device_kind,
        )
        text = json.dumps(whole, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return self._folder / f"{name}.json"
