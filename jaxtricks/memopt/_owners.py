"""Find the parameter that each array of an optimizer's state belongs to."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from jaxtricks import _tree
from jaxtricks._typing import Params


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A path as a leaf of a tree, because None is not a leaf."""

    path: str | None


def owners(tx: Any, state: Any, table: dict[str, Any]) -> list[str | None]:
    """Return the path of the parameter that each array of the state belongs to."""

    # Called with every subtree of the state that has the parameters' structure.
    def mark(tree: Any) -> Any:
        return _tree.map_with_path(
            lambda path, _: _Owner(_prefix(path, table)), tree
        )

    def leave(tree: Any) -> Any:
        return jax.tree.map(lambda _: _Owner(None), tree)

    try:
        marked = optax.tree_utils.tree_map_params(
            tx, mark, state, transform_non_params=leave, is_leaf=lambda _: True
        )
    # A transformation whose state is no such tree may fail in any way. Then the paths
    # inside the state decide.
    except Exception:
        return [
            _owner(path, table) for path, _ in _tree.leaves_with_paths(state)
        ]
    return [owner.path for owner in jax.tree.leaves(marked)]


def _prefix(path: str, table: dict[str, Any]) -> str | None:
    """Return the longest parameter path that the path begins with."""
    keys = path.split("/")
    starts = ("/".join(keys[:width]) for width in range(len(keys), -1, -1))
    return next((start for start in starts if start in table), None)


def _owner(path: str, table: dict[str, Any]) -> str | None:
    """Return the longest parameter path inside a path of the state."""
    keys = path.split("/")
    for width in range(len(keys), 0, -1):
        for start in range(len(keys) - width + 1):
            candidate = "/".join(keys[start : start + width])
            if candidate in table:
                return candidate
    return None


def shapes(params: Params) -> Params:
    """Return the parameters as shapes on one device."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype(x)), params
    )


def _dtype(x: Any) -> Any:
    if hasattr(x, "dtype"):
        return x.dtype
    return jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
