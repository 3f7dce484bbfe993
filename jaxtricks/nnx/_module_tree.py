"""The modules of a model by path, and a model with some of them exchanged."""

from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx


def modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """(path, module) of every module, itself included; one that is shared comes once for every path."""
    seen: set[int] = set()

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, nnx.Module]]:
        if isinstance(value, nnx.Module):
            yield "/".join(path), value
            if id(value) in seen:
                return
            seen.add(id(value))
        for name, child in _children(value):
            yield from walk(child, (*path, name))

    return walk(model, ())


def below(path: str) -> str:
    """What the paths of everything inside the module at `path` begin with."""
    return f"{path}/" if path else ""


def replaced(model: nnx.Module, changes: Mapping[int, nnx.Module]) -> nnx.Module:
    """The model with the modules of these ids exchanged wherever they are referred to; it is changed itself.

    Args:
      model: any module; its submodules may be attributes or lie in lists, tuples and
        dicts.
      changes: {id(old module): new module}.
    """
    if id(model) in changes:
        return changes[id(model)]
    owners = {id(module): module for _, module in modules(model)}
    for module in owners.values():
        for name, value in _attributes(module):
            new = _exchanged(value, changes)
            if new is not value:
                # Said of containers: a plain list that holds modules would be refused.
                setattr(
                    module, name, new if isinstance(new, nnx.Module) else nnx.data(new)
                )
    return model


def _attributes(module: nnx.Module) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_pytree")
    ]


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, nnx.Module):
        return _attributes(value)
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, list | tuple):
        return [(str(i), child) for i, child in enumerate(value)]
    return []


def _exchanged(value: Any, changes: Mapping[int, nnx.Module]) -> Any:
    """The value itself if nothing in it changes."""
    if isinstance(value, nnx.Module):
        return changes.get(id(value), value)
    children = [child for _, child in _children(value)]
    new = [_exchanged(child, changes) for child in children]
    if all(a is b for a, b in zip(children, new, strict=True)):
        return value
    if isinstance(value, Mapping):
        return type(value)(zip(value, new, strict=True))  # pyrefly: ignore
    return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
