"""List the modules of a model by path, and replace some of them."""

from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx


def modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield (path, module) of every module, itself included.

    A shared module comes once for each of its paths.
    """
    visited: set[int] = set()

    def walk(
        value: Any, path: tuple[str, ...]
    ) -> Iterator[tuple[str, nnx.Module]]:
        if isinstance(value, nnx.Module):
            yield "/".join(path), value
            if id(value) in visited:
                return
            visited.add(id(value))
        for name, child in _children(value):
            yield from walk(child, (*path, name))

    return walk(model, ())


def replaced(
    model: nnx.Module, changes: Mapping[int, nnx.Module]
) -> nnx.Module:
    """Return the model with some modules replaced wherever they are referred to.

    The model itself is changed.

    Args:
      model: any module; its submodules may be attributes or lie in lists, tuples and
        dicts.
      changes: {id(old module): new module}.
    """
    owners = {id(module): module for _, module in modules(model)}
    # A new module may refer to old ones, if it is a variant of the one that it replaces.
    owners |= {id(module): module for module in changes.values()}
    for module in owners.values():
        for name, value in _attributes(module):
            new = _with_changes(value, changes)
            if new is not value:
                # Containers are marked as data: nnx refuses plain lists of modules.
                is_module = isinstance(new, nnx.Module)
                setattr(module, name, new if is_module else nnx.data(new))
    return changes.get(id(model), model)


def _attributes(module: nnx.Module) -> list[tuple[str, Any]]:
    items = vars(module).items()
    return [
        (name, value) for name, value in items if not name.startswith("_pytree")
    ]


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, nnx.Module):
        return _attributes(value)
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, list | tuple):
        return [(str(i), child) for i, child in enumerate(value)]
    return []


def _with_changes(value: Any, changes: Mapping[int, nnx.Module]) -> Any:
    """Return a module's replacement, or a container of them; `value` if nothing changes."""
    if isinstance(value, nnx.Module):
        return changes.get(id(value), value)
    children = [child for _, child in _children(value)]
    new = [_with_changes(child, changes) for child in children]
    if all(a is b for a, b in zip(children, new, strict=True)):
        return value
    if isinstance(value, Mapping):
        return type(value)(zip(value, new, strict=True))  # pyrefly: ignore
    is_named_tuple = hasattr(value, "_fields")
    return type(value)(*new) if is_named_tuple else type(value)(new)
