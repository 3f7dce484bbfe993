"""Hide the differences between the versions of Flax that we support, 0.11.2 and newer."""

from collections.abc import Iterator
from typing import Any

from flax import nnx


def read(variable: Any) -> Any:
    """Return the array of an nnx Variable; None for an absent one."""
    return None if variable is None else variable[...]


def is_node(x: Any) -> bool:
    """Return whether x has variables that a call may write.

    That is a module, nnx.Rngs, a metric, an optimizer or a variable. They are pytrees
    too: jax would take them apart and lose what is written.
    """
    return isinstance(x, nnx.Pytree | nnx.Variable)


def modules(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Module]]:
    """Yield (path, module) of every module, itself included.

    `nnx.iter_modules` is absent in 0.11.2.
    """
    for path, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Module):
            yield path, value


def variable_paths(model: nnx.Module) -> dict[int, tuple[Any, ...]]:
    """Return {id: path} of every variable; of a shared one the first path, as nnx.state.

    `nnx.iter_graph` yields a shared variable once, in 0.11.2 under every path.
    """
    paths: dict[int, tuple[Any, ...]] = {}
    for path, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Variable):
            paths.setdefault(id(value), path)
    return paths


def partition_names(variable: nnx.Variable) -> tuple[Any, ...] | None:
    """Return the names of a variable's axes for sharding, or None.

    The metadata is called "sharding_names" in 0.11.2.
    """
    metadata = variable.get_metadata()
    names = metadata.get("out_sharding") or metadata.get("sharding_names")
    return tuple(names) if names else None


# Absent in 0.11.2: InstanceNorm.
NORMS: tuple[type, ...] = tuple(
    getattr(nnx, name)
    for name in ("BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm")
    if hasattr(nnx, name)
)
