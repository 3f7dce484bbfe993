"""Parameters that remember their roles through nn.vmap and nn.scan, as boxes of flax."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jaxtricks import _tree
from jaxtricks._typing import Roles

# A key without a name: WeightNorm names its scales after the whole path of what it scales.
_KEY = jax.tree_util.DictKey("")


@jax.tree_util.register_pytree_with_keys_class
class Tag(nn.meta.AxisMetadata[Any]):
    """A parameter, or the user's own box around it, with its roles.

    The transforms of flax tell every box which axis they add or take: that is where "batch" comes from.
    """

    def __init__(self, value: Any, roles: Roles):
        self.value, self.roles = value, roles

    def unbox(self) -> Any:
        """The parameter."""
        return self.value

    def replace_boxed(self, val: Any) -> "Tag":
        """The same roles for another parameter."""
        return Tag(val, self.roles)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Tag":
        """An axis of copies at `index`."""
        index %= len(self.roles) + 1
        roles = (*self.roles[:index], "batch", *self.roles[index:])
        return Tag(nn.meta.add_axis(self.value, index, params), roles)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Tag":
        """Without the axis at `index`."""
        index %= len(self.roles)
        roles = (*self.roles[:index], *self.roles[index + 1 :])
        return Tag(nn.meta.remove_axis(self.value, index, params), roles)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Roles]:
        """The parameter is the only child."""
        return ((_KEY, self.value),), self.roles

    @classmethod
    def tree_unflatten(cls, roles: Roles, children: tuple[Any]) -> "Tag":
        """Inverse of flattening."""
        return cls(children[0], roles)


def read(
    init: Callable[[Callable[..., Any]], Any], layer_roles: Callable[..., dict[str, Any]]
) -> dict[str, Roles]:
    """{path: roles}, stacked axes included, from an initialization whose parameters are tagged.

    Args:
      init: init(interceptor) -> the tree of parameters.
      layer_roles: (context, args, kwargs) -> {name: (roles, value)} of a layer that has been called.
    """

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        _attach(context.module, layer_roles(context, args, kwargs))
        return out

    try:
        params = init(watch)
    except Exception:  # of any kind: the module's own code, which works without our boxes, met one
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_tag)
    tags = ((_tree.path_str(path), leaf) for path, leaf in leaves)
    return {path.replace("//", "/"): tag.roles for path, tag in tags if _is_tag(tag)}


def _attach(module: nn.Module, own: dict[str, tuple[Roles, Any]]) -> None:
    for name, value in module.variables.get("params", {}).items() if own else ():
        boxed = jax.tree_util.tree_map_with_path(
            lambda path, x, name=name: _boxed(x, own.get(_join(name, path))),
            value,
            is_leaf=nn.meta.is_axis_metadata,
        )
        if any(map(_is_tag, jax.tree.leaves(boxed, is_leaf=_is_tag))):
            module.put_variable("params", name, boxed)


def _join(name: str, path: tuple[Any, ...]) -> str:
    return _tree.path_str((jax.tree_util.DictKey(name), *path))


def _boxed(x: Any, found: tuple[Roles, Any] | None) -> Any:
    return x if found is None or _is_tag(x) else Tag(x, found[0])


def _is_tag(x: Any) -> bool:
    return isinstance(x, Tag)
