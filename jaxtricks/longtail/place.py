"""Where the head of a model is among its parameters, and copies of them with other leaves there."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxtricks import _tree
from jaxtricks._typing import Array, Params

Keys = tuple[Any, ...]

Mask = Any
"""A tree like the parameters, of Python bools: what optax.partition and optax.masked take."""


class Head(NamedTuple):
    """Where a head is: the key paths of its layer, kernel, bias and everything that trains with it."""

    layer: Keys
    kernel: Keys
    bias: Keys | None
    all: frozenset[Keys]
    value: Any

    @property
    def classes(self) -> int:
        """C."""
        return self.value.shape[1]


def find(name: str, params: Params, head: str) -> Head:
    """The one kernel that `head` names, [D, C], or an error with the paths there are."""
    leaves = _named_leaves(name, params)
    inside = [keys for keys in leaves if _matches(head, keys)]
    kernels = [keys for keys in inside if keys[-1] == "kernel" or re.fullmatch(head, path_of(keys))]
    if len(kernels) > 1:  # "head/.*" matches the bias in full, too
        kernels = [keys for keys in kernels if keys[-1] == "kernel"] or kernels
    if len(kernels) != 1:
        some = kernels or [keys for keys in leaves if keys[-1] == "kernel"] or list(leaves)
        raise ValueError(
            f"longtail.decoupling.{name}: `head` {head!r} matches {len(kernels) or 'no'} "
            f"kernel{'s' * (len(kernels) != 1)}, and must match one of {_listed(some)}"
        )
    kernel = kernels[0]
    if len(leaves[kernel].shape) != 2:
        raise ValueError(
            f"longtail.decoupling.{name}: the kernel {path_of(kernel)!r} has shape "
            f"{leaves[kernel].shape}, not [D, C]: pass the path of the classifier as `head`"
        )
    bias = (*kernel[:-1], "bias")
    bias = bias if bias in leaves else None
    everything = frozenset(inside) | {kernel} | ({bias} if bias else set())
    return Head(kernel[:-1], kernel, bias, everything, leaves[kernel])


def _named_leaves(name: str, params: Params) -> dict[Keys, Any]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
            raise ValueError(
                f"longtail.decoupling.{name}: `params` is no nested dict at {_tree.path_str(path)!r}: "
                'pass variables["params"] of linen or the params of jt.nnx.functional'
            )
        if not path or not hasattr(leaf, "shape"):
            raise ValueError(
                f"longtail.decoupling.{name}: `params` is a {type(params).__name__} with a leaf that is not "
                "an array: give a nested dict of arrays"
            )
        leaves[tuple(key.key for key in path)] = leaf
    return leaves


def _matches(pattern: str, keys: Keys) -> bool:
    return any(re.fullmatch(pattern, path_of(keys[:n])) for n in range(1, len(keys) + 1))


def path_of(keys: Keys) -> str:
    """Keys joined by "/"."""
    return "/".join(map(str, keys))


def _listed(paths: list[Keys], most: int = 12) -> str:
    names = [repr(path_of(keys)) for keys in paths]
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def get(tree: Any, keys: Keys) -> Any:
    """The subtree at a key path."""
    for key in keys:
        tree = tree[key]
    return tree


def replaced(tree: Any, new: Mapping[Keys, Any]) -> Any:
    """The tree with other subtrees at some key paths; nothing is changed in place."""
    if () in new:
        return new[()]
    out = dict(tree)
    for first in dict.fromkeys(keys[0] for keys in new):
        below = {keys[1:]: value for keys, value in new.items() if keys[0] == first}
        out[first] = below[()] if () in below else replaced(tree[first], below)
    return out


def beside(name: str, params: Params, found: Head, new: dict[str, Array]) -> tuple[Params, Mask]:
    """(params with new leaves in the head's layer, mask of those); none may be there already."""
    for key in new:
        if key in get(params, found.layer):
            raise ValueError(
                f"longtail.decoupling.{name}: there is a {key!r} beside {path_of(found.kernel)!r} "
                "already: pass the params of the first stage"
            )
    paths = {(*found.layer, key): value for key, value in new.items()}
    out = replaced(params, paths)
    return out, mask(out, frozenset(paths))


def mask(params: Params, train: frozenset[Keys]) -> Mask:
    """True at some key paths, False elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: tuple(key.key for key in path) in train, params
    )
