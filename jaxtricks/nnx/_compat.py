"""Every difference between the flax versions we support (0.11.2 and newer), in one place."""

from collections.abc import Iterator
from typing import Any

from flax import nnx


def read(variable: Any) -> Any:
    """The array of an nnx Variable; None for an absent one."""
    return None if variable is None else variable[...]


def modules(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Module]]:
    """(path, module) of every module, itself included; `nnx.iter_modules` is absent in 0.11.2."""
    for path, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Module):
            yield path, value


# Absent in 0.11.2: InstanceNorm.
NORMS: tuple[type, ...] = tuple(
    getattr(nnx, name)
    for name in ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
    if hasattr(nnx, name)
)
