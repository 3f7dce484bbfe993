"""What keeps the copies of an element equal: read-only leaves, containers of their own, checks."""

import sys
import zlib
from typing import Any

import jax
import numpy as np

_CONTAINERS = (dict, list, tuple)
_ATOMS = frozenset((int, float, complex, bool, str, bytes, type(None)))


def freeze(x: Any) -> Any:
    """The element with read-only views of its numpy leaves: a change would reach later copies."""
    kind = type(x)
    if kind in _ATOMS:
        return x
    if kind is np.ndarray:
        return _freeze_leaf(x)
    if kind is dict:
        return {k: v if type(v) in _ATOMS else freeze(v) for k, v in x.items()}
    return jax.tree.map(_freeze_leaf, x)


def fresh(x: Any) -> Any:
    """The same leaves in dicts and lists of its own, so that each copy may fill them anew."""
    kind = type(x)
    if kind is np.ndarray or kind in _ATOMS:
        return x
    if kind is dict:
        for value in x.values():
            if type(value) in _CONTAINERS:
                return {k: fresh(v) for k, v in x.items()}
        return x.copy()
    if kind is list or kind is tuple:
        return kind([fresh(v) for v in x])
    if isinstance(x, tuple) and hasattr(kind, "_fields"):
        return kind(*(fresh(v) for v in x))
    return x


def nbytes(x: Any) -> int:
    """Bytes of an element's leaves."""
    leaves = jax.tree.leaves(x)
    return sum(leaf.nbytes if hasattr(leaf, "nbytes") else sys.getsizeof(leaf) for leaf in leaves)


class Watch:
    """Looks at one element when it is read, and again when its second copy goes out."""

    def __init__(self, ordinal: int, element: Any):
        leaves = jax.tree.leaves(element)
        self._on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        self._ordinal = ordinal
        self._seen = _fingerprint(leaves)

    def check(self, ordinal: int, copy: int, element: Any) -> bool:
        """Raise if a later copy is not what was read; whether it has to be asked again."""
        if self._on_device and any(
            isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(element)
        ):
            raise ValueError(
                f"echo: the arrays of element {ordinal} were deleted before copy {copy} went out: don't "
                "donate the batch (donate_argnums) where the same one comes again"
            )
        if ordinal == self._ordinal and _fingerprint(jax.tree.leaves(element)) != self._seen:
            raise ValueError(
                f"echo: `source` has changed the arrays of element {ordinal} after giving them, as one "
                "that reuses a buffer does: let it give copies, by x.copy()"
            )
        return self._on_device or ordinal < self._ordinal


def _fingerprint(leaves: list[Any]) -> list[int]:
    return [
        zlib.crc32(x.tobytes())
        for x in leaves
        if isinstance(x, np.ndarray) and not x.dtype.hasobject
    ]


def _freeze_leaf(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.flags.writeable:
        x = x.view()
        x.flags.writeable = False
    return x
