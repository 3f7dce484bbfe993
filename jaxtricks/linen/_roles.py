"""Parameters that remember their roles through nn.vmap and nn.scan, as boxes of flax."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxtricks import _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Roles
from jaxtricks.linen._layers import (
    CausalHead,
    CosineHead,
    DisAlignHead,
    ExtendedBatchNorm,
    LWSHead,
    NormedHead,
    WSConv,
)
from jaxtricks.nnx import _roles

# A key without a name: WeightNorm names its scales after the whole path of what it
# scales.
_KEY = jax.tree_util.DictKey("")


@jax.tree_util.register_pytree_with_keys_class
class Tag(nn.meta.AxisMetadata[Any]):
    """A parameter, or the user's own box around it, with its roles.

    The transforms of flax tell every box which axis they add or take: that is where
      "batch" comes from.
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
    init: Callable[[Callable[..., Any]], Any],
    layer_roles: Callable[..., dict[str, Any]],
) -> dict[str, Roles]:
    """{path: roles}, stacked axes included, from an initialization whose parameters are tagged.

    Args:
      init: init(interceptor) -> the tree of parameters.
      layer_roles: (context, args, kwargs) -> {name: (roles, value)} of a layer that has
        been called.
    """

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        _attach(context.module, layer_roles(context, args, kwargs))
        return out

    try:
        params = init(watch)
    except (
        Exception
    ):  # of any kind: the module's own code, which works without our boxes, met one
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


# What each axis of a linen module's parameters means, from the types of its own layers.


_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
NORMS = (
    nn.BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    ExtendedBatchNorm,
)


@checked
def roles(module: nn.Module, *init_args: Any, **init_kwargs: Any) -> roles_lib.Exact:
    """A rule for `roles=` (memopt, agc) that is exact for the layers of flax.linen and of this library.

    The module is initialized abstractly (nothing is computed or allocated) and its
    layers are watched. Axes that nn.vmap and nn.scan add are "batch", wherever
    `variable_axes` puts them: sizes show where, and where they fit more than one place
    (twelve layers of twelve heads) a second abstract initialization asks the transforms
    themselves. Only a module that cannot be initialized with boxed parameters leaves it
    open then: the first place that fits is taken and `roles.describe` marks the leaf.

    Args:
      module: any linen module. *init_args: what `module.init` takes after the key:
      example inputs (shapes suffice), flags. **init_kwargs: the same, by name.

    Returns:
      (path, shape) -> roles for the paths of variables["params"]; None for parameters
      of unknown layers and for those that nn.map_variables stores in another shape than
      their layer sees. A parameter that two layers share has the roles of the first
      that is called. Every position of nn.ConvLocal is an independent copy: "batch".
      Below `nnx.bridge.ToLinen`, `jt.nnx.roles` decides; what it could only assume is
      None here.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = roles(nn.Sequential([nn.Dense(4), nn.LayerNorm()]), jnp.ones((2, 3)))
      >>> rule("layers_0/kernel", (3, 4)), rule("layers_1/scale", (4,))
      (('in', 'out'), ('none',))
    """

    leaves, structure = jax.tree.flatten((init_args, init_kwargs))
    traced = [x if isinstance(x, _ARRAYS) else None for x in leaves]

    def init(watch: Callable[..., Any]) -> Any:
        def start(
            key: Any, arrays: list[Any]
        ) -> Any:  # a new one: jax would not trace it twice
            filled = [
                a if a is not None else x for x, a in zip(leaves, arrays, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, filled)
            return module.init(key, *args, **kwargs)

        with nn.intercept_methods(watch):
            return jax.eval_shape(start, jax.random.key(0), traced).get("params", {})

    found: dict[str, tuple[_roles.Axis, ...]] = {}
    shapes = {p: x.shape for p, x in _tree.leaves_with_paths(init(_watcher(found)))}
    possible = {
        path: fits
        for path, shape in shapes.items()
        if path in found and (fits := _roles.placements(found[path], shape))
    }
    unclear = [path for path, fits in possible.items() if len(fits) > 1]
    tagged = read(init, layer_roles) if unclear else {}
    known = {path: fits[0] for path, fits in possible.items()}
    known |= {
        path: tagged[path] for path in unclear if tagged.get(path) in possible[path]
    }
    return roles_lib.exact(
        known, [path for path in unclear if tagged.get(path) not in possible[path]]
    )


def _watcher(found: dict[str, tuple[_roles.Axis, ...]]) -> Callable[..., Any]:
    """An interceptor that notes what the layers say of their own parameters, inside any transform."""

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        for name, (words, leaf) in layer_roles(context, args, kwargs).items():
            path = "/".join((*context.module.path, name))
            found.setdefault(path, tuple(zip(words, _shape(leaf), strict=True)))
        return out

    return watch


def layer_roles(
    context: Any, args: tuple[Any, ...], kwargs: Any
) -> dict[str, tuple[Roles, Any]]:
    """{name: (roles, value)} of one layer's own parameters; empty for an unknown type.

    Args:
      context: what flax tells an interceptor of the call.
      args: of the call, which is over.
      kwargs: of the call.
    """
    module = context.module
    if module.scope is None:  # a method that needs no variables
        return {}
    own = _own(module)
    words = _words(module, {name: len(_shape(leaf)) for name, leaf in own.items()})
    if isinstance(module, nn.Einsum) and context.method_name == "__call__":
        words = _einsum(
            module,
            len(_shape(own["bias"])) if "bias" in own else 0,
            *args[1:],
            **kwargs,
        )
    return {
        name: (words[name], leaf)
        for name, leaf in own.items()
        if name in words and len(words[name]) == len(_shape(leaf))
    }


def _einsum(
    module: nn.Einsum, bias: int, einsum_str: str | None = None, **_: Any
) -> Any:
    equation = module.einsum_str or einsum_str  # flax takes either, not both
    return _roles.einsum_roles(equation, len(module.shape), bias)


def _own(module: nn.Module) -> dict[str, Any]:
    """{name: array or box} of a module's parameters without those of its children."""
    params = module.variables.get("params", {})
    if not isinstance(module, nnx.bridge.ToLinen):  # all that is below it is its own
        params = {name: x for name, x in params.items() if not isinstance(x, Mapping)}
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=nn.meta.is_axis_metadata
    )
    return {_tree.path_str(path): leaf for path, leaf in leaves}


def _shape(leaf: Any) -> tuple[int, ...]:
    return np.shape(jax.tree.leaves(leaf)[0])  # of the array in a box


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _words(module: nn.Module, ranks: dict[str, int]) -> dict[str, Roles]:
    """{name: roles} by the type of the layer; `ranks` are those of its parameters."""
    match module:
        # OptimizedLSTMCell makes its matrices with DenseParams and joins them for the
        # product only.
        case nn.Dense() | nn.recurrent.DenseParams():
            return {"kernel": ("in", "out"), "bias": _roles.NONE}
        case CausalHead() | CosineHead() | DisAlignHead() | LWSHead() | NormedHead():
            return {
                name: ("in", "out") if rank == 2 else _roles.NONE
                for name, rank in ranks.items()
            }
        case nn.Conv() | WSConv():
            spatial = ("in",) * len(_tuple(module.kernel_size))
            return {
                "kernel": (*spatial, "in", "out"),
                "bias": _roles.NONE,
                "gain": _roles.NONE,
            }
        case nn.ConvLocal():
            positions = ("batch",) * len(_tuple(module.kernel_size))
            return {"kernel": (*positions, "in", "out"), "bias": (*positions, "none")}
        case nn.ConvTranspose():
            spatial = ("in",) * len(_tuple(module.kernel_size))
            last = ("out", "in") if module.transpose_kernel else ("in", "out")
            return {"kernel": (*spatial, *last), "bias": _roles.NONE}
        case nn.DenseGeneral():
            sizes = (module.batch_dims, module.axis, module.features)
            batch, ins, outs = (len(_tuple(s)) for s in sizes)
            lead = ("batch",) * batch
            return {
                "kernel": (*lead, *("in",) * ins, *("out",) * outs),
                "bias": (*lead, *_roles.NONE * outs),
            }
        case nn.Embed():
            return {"embedding": ("in", "out")}
        case nn.WeightNorm():
            return {name: _roles.NONE * rank for name, rank in ranks.items()}
        case nn.PReLU():
            return {"negative_slope": ()}
        case nnx.bridge.ToLinen():
            return _bridged(module)
    if isinstance(module, NORMS):
        return {name: _roles.NONE * ranks.get(name, 1) for name in ("scale", "bias")}
    return {}


def _bridged(module: Any) -> dict[str, Roles]:
    def make() -> Any:
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **module.kwargs, **rngs)

    rule = _roles.roles(nnx.eval_shape(make))
    return {
        path: roles for path, roles in rule.table.items() if path not in rule.assumed
    }
