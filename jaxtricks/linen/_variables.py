"""Read and write the variables of one layer in the collections of a linen module."""

from collections.abc import Mapping
from typing import Any

import flax
from flax import linen as nn

COLLECTIONS = ("params", "batch_stats")


def layer_path(module: nn.Module) -> str:
    """Return the path of a bound module."""
    return "/".join(module.path)


def bound_variables(module: nn.Module) -> dict[str, Any]:
    """Return the variables of a bound module, as plain dictionaries without boxes."""
    return at_path(module.variables, "")


def at_path(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return {"params": ..., "batch_stats": ...} of the layer at a path, without boxes."""
    layer = {}
    for collection in COLLECTIONS:
        tree = variables.get(collection, {})
        for name in filter(None, path.split("/")):
            tree = tree.get(name, {})
        layer[collection] = nn.meta.unbox(flax.core.unfreeze(tree))
    return layer


def copied(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return new dictionaries with the same arrays and boxes."""

    def copy(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {name: copy(value) for name, value in tree.items()}

    return copy(variables)


def replace_at(
    variables: dict[str, Any], path: str, layer: Mapping[str, Any]
) -> None:
    """Write the variables of the layer at a path, in place of those that are there."""
    for collection in COLLECTIONS:
        values = layer.get(collection) or {}
        if not values and collection not in variables:
            continue
        if not path:
            variables[collection] = dict(values)
            continue
        *parents, last = path.split("/")
        tree = variables.setdefault(collection, {})
        for name in parents:
            tree = tree.setdefault(name, {})
        # All of it goes: a block has other names than the layer before it.
        tree.pop(last, None)
        if values:
            tree[last] = dict(values)


def without_empty(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables without dictionaries that hold nothing."""

    pruned = {}
    for name, value in variables.items():
        if isinstance(value, Mapping):
            value = without_empty(value)
            if not value:
                continue
        pruned[name] = value
    return pruned
