"""Handle pytrees: paths, sizes, and small frozen dataclasses that are pytrees."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np
import optax

from jaxtricks import _dtypes

T = TypeVar("T")

STATIC = {"static": True}
"""Metadata of a dataclass field that is part of the tree's structure, not a leaf."""


def path_str(key_path: tuple[Any, ...]) -> str:
    """Join a key path as "a/b/0/kernel"; drop a final "value" (of an nnx Variable)."""
    names = [_name(key) for key in key_path]
    if names and names[-1] == "value":
        names.pop()
    return "/".join(names)


def _name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_masked(x: Any) -> bool:
    """Return whether x is the placeholder of optax.masked."""
    return isinstance(x, optax.MaskedNode)


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """List (path, leaf) in flattening order; None and MaskedNode are not leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_str(path), leaf) for path, leaf in leaves]


def by_path(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Return {path: leaf} in flattening order.

    Raises:
      ValueError: two leaves have the same path (a key that contains "/").
    """
    leaves = leaves_with_paths(tree, is_leaf)
    table = dict(leaves)
    if len(table) < len(leaves):
        paths = [path for path, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"two leaves have the path {twice!r}: rename a key that contains '/'"
        )
    return table


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map fn(path, leaf, *others) over trees, with the paths of `leaves_with_paths`."""
    return jax.tree_util.tree_map_with_path(
        lambda p, *xs: fn(path_str(p), *xs), tree, *rest
    )


def has_masked(tree: Any) -> bool:
    """Return whether optax.masked hides a leaf of the tree."""
    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def nbytes(tree: Any) -> int:
    """Count the bytes of all array leaves, from their shapes alone."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(x: Any) -> int:
    if not hasattr(x, "shape"):
        x = np.asarray(x)
    if _dtypes.is_key(x):
        x = jax.eval_shape(
            jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype)
        )
    count = math.prod(x.shape)
    # A byte each to NumPy, but two share one on every device.
    if x.dtype in (jax.numpy.int4, jax.numpy.uint4):
        return math.ceil(count / 2)
    return count * np.dtype(x.dtype).itemsize


def static(**kwargs: Any) -> Any:
    """Declare a dataclass field as part of the tree's structure (hashable, not a leaf)."""
    return dataclasses.field(metadata=STATIC, **kwargs)


@dataclass_transform(
    frozen_default=True, field_specifiers=(static, dataclasses.field)
)
def node(cls: type[T]) -> type[T]:
    """Make cls a frozen dataclass and a pytree; fields declared by `static()` are structure.

    Unflattening bypasses `__init__`: checks in `__post_init__` are for people, and
    would break tree.map and vmap, which put shapes, None and objects where arrays were.
    Nodes compare and hash by identity, since the arrays inside do neither: a node that
    is callable can be jitted.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyrefly: ignore
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    meta = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(x: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(x, n) for n in data), tuple(
            getattr(x, n) for n in meta
        )

    def flatten_with_keys(x: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, aux = flatten(x)
        keys = map(jax.tree_util.GetAttrKey, data)
        return tuple(zip(keys, children, strict=True)), aux

    def unflatten(aux: tuple[Any, ...], children: Iterable[Any]) -> T:
        x = object.__new__(cls)
        for name, value in zip(data + meta, (*children, *aux), strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(
        cls, flatten_with_keys, unflatten, flatten
    )
    return cls
