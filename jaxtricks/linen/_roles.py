"""Say what each axis of a linen module's parameters means, from the types of its layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxtricks import _layer_axes, _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._layer_axes import NONE, Axis
from jaxtricks._typing import Roles
from jaxtricks.linen._blocks import ConvNorm, PointwiseNorm
from jaxtricks.linen._layers import (
    CausalHead,
    CosineHead,
    DisAlignHead,
    ExtendedBatchNorm,
    LWSHead,
    NormedHead,
    WSConv,
)

# A key without a name: WeightNorm names its scales after the whole path of what it
# scales.
_KEY = jax.tree_util.DictKey("")

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)

NORMS = (
    nn.BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    ExtendedBatchNorm,
)
HEADS = (CausalHead, CosineHead, DisAlignHead, LWSHead, NormedHead)


@checked
def roles(
    module: nn.Module, *init_args: Any, **init_kwargs: Any
) -> roles_lib.Exact:
    """Return a rule for `roles=` that is exact for the layers of flax.linen and ours.

    The module is initialized abstractly (nothing is computed or allocated) and its
    layers are watched. Axes that nn.vmap and nn.scan add are "batch", wherever
    `variable_axes` puts them: sizes show where, and where they fit more than one place
    (twelve layers of twelve heads) a second abstract initialization asks the transforms
    themselves. Only a module that cannot be initialized with boxed parameters leaves it
    open then: the first place that fits is taken and `roles.describe` marks the leaf.

    Args:
      module: any linen module.
      *init_args: what `module.init` takes after the key: example inputs (shapes
        suffice), flags.
      **init_kwargs: the same, by name.

    Returns:
      (path, shape) -> roles for the paths of variables["params"]; None for parameters
      of unknown layers and for those that nn.map_variables stores in another shape than
      their layer uses. A parameter that two layers share has the roles of the first
      that is called. Every position of nn.ConvLocal is an independent copy: "batch".
      Below `nnx.bridge.ToLinen` the layers of nnx decide, wherever their sizes leave no
      doubt.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = roles(nn.Sequential([nn.Dense(4), nn.LayerNorm()]), jnp.ones((2, 3)))
      >>> rule("layers_0/kernel", (3, 4)), rule("layers_1/scale", (4,))
      (('in', 'out'), ('none',))
    """
    init = _Initialization(module, init_args, init_kwargs)
    axes: dict[str, tuple[Axis, ...]] = {}
    params = init(_recorder(axes))
    candidates: dict[str, list[Roles]] = {}
    for path, leaf in _tree.leaves_with_paths(params):
        placed = (
            _layer_axes.placements(axes[path], leaf.shape)
            if path in axes
            else []
        )
        if placed:
            candidates[path] = placed
    # Boxes tell for sure, but not every module can be initialized with them.
    ambiguous = [path for path, placed in candidates.items() if len(placed) > 1]
    tagged = tagged_roles(init, layer_roles) if ambiguous else {}
    table = {path: placed[0] for path, placed in candidates.items()}
    assumed = []
    for path in ambiguous:
        if tagged.get(path) in candidates[path]:
            table[path] = tagged[path]
        else:
            assumed.append(path)
    return roles_lib.exact(table, assumed)


class _Initialization:
    """Initializes a module abstractly, under an interceptor: init(interceptor) -> params."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any):
        self.module = module
        self.leaves, self.structure = jax.tree.flatten((args, kwargs))

    def __call__(self, interceptor: Callable[..., Any]) -> Any:
        traced = [x if isinstance(x, _ARRAYS) else None for x in self.leaves]

        # A new function every time: jax would not trace the same one twice.
        def start(key: Any, arrays: list[Any]) -> Any:
            pairs = zip(self.leaves, arrays, strict=True)
            leaves = [x if array is None else array for x, array in pairs]
            args, kwargs = jax.tree.unflatten(self.structure, leaves)
            return self.module.init(key, *args, **kwargs)

        with nn.intercept_methods(interceptor):
            variables = jax.eval_shape(start, jax.random.key(0), traced)
        return variables.get("params", {})


def _recorder(axes: dict[str, tuple[Axis, ...]]) -> Callable[..., Any]:
    """Return an interceptor that notes the axes of every layer, inside any transform."""

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        for name, (layer, leaf) in layer_roles(context, args, kwargs).items():
            path = "/".join((*context.module.path, name))
            axes.setdefault(path, tuple(zip(layer, _shape(leaf), strict=True)))
        return out

    return record


# Boxes that remember their roles through nn.vmap and nn.scan.


@jax.tree_util.register_pytree_with_keys_class
class Tag(nn.meta.AxisMetadata[Any]):
    """Holds a parameter, or the user's box around it, with its roles.

    The transforms of Flax tell every box which axis they add or take: that is where
    "batch" comes from.
    """

    def __init__(self, value: Any, roles: Roles):
        self.value, self.roles = value, roles

    def unbox(self) -> Any:
        """Return the parameter."""
        return self.value

    def replace_boxed(self, val: Any) -> "Tag":
        """Return a box of the same roles around another parameter."""
        return Tag(val, self.roles)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Tag":
        """Return the box with a stacked axis at `index`."""
        index %= len(self.roles) + 1
        roles = list(self.roles)
        roles.insert(index, "batch")
        # The box of the user, if any, is told too.
        value = nn.meta.add_axis(self.value, index, params)
        return Tag(value, tuple(roles))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Tag":
        """Return the box without the axis at `index`."""
        index %= len(self.roles)
        roles = list(self.roles)
        roles.pop(index)
        value = nn.meta.remove_axis(self.value, index, params)
        return Tag(value, tuple(roles))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], Roles]:
        """Flatten; the parameter is the only child."""
        return ((_KEY, self.value),), self.roles

    @classmethod
    def tree_unflatten(cls, roles: Roles, children: tuple[Any]) -> "Tag":
        """Undo flattening."""
        return cls(children[0], roles)


LayerRoles = dict[str, tuple[Roles, Any]]
"""{name of a parameter: (its roles, its value)} of one layer."""


def tagged_roles(
    init: Callable[[Callable[..., Any]], Any],
    layer_roles: Callable[..., LayerRoles],
) -> dict[str, Roles]:
    """Return {path: roles}, stacked axes included, by boxing the parameters.

    Args:
      init: init(interceptor) -> the tree of parameters.
      layer_roles: (context, args, kwargs) -> roles of a layer that has been called.
    """

    def tag(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        _attach(context.module, layer_roles(context, args, kwargs))
        return out

    try:
        params = init(tag)
    except Exception:
        # Of any kind: the code of the module works without our boxes, and met one.
        return {}
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=_is_tag
    ):
        if _is_tag(leaf):
            # The empty key of a box leaves an empty part in the path.
            table[_tree.path_str(path).replace("//", "/")] = leaf.roles
    return table


def _attach(module: nn.Module, layer: LayerRoles) -> None:
    """Box the parameters of a layer."""
    if not layer:
        return
    for name, value in module.variables.get("params", {}).items():

        def boxed(path: Any, x: Any, name: str = name) -> Any:
            full_path = _tree.path_str((jax.tree_util.DictKey(name), *path))
            if full_path not in layer or _is_tag(x):
                return x
            return Tag(x, layer[full_path][0])

        tree = jax.tree_util.tree_map_with_path(
            boxed, value, is_leaf=nn.meta.is_axis_metadata
        )
        if any(map(_is_tag, jax.tree.leaves(tree, is_leaf=_is_tag))):
            module.put_variable("params", name, tree)


def _is_tag(x: Any) -> bool:
    return isinstance(x, Tag)


# The axes of each type of layer.


def layer_roles(
    context: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerRoles:
    """Return the roles of one layer's parameters; empty for an unknown type.

    Args:
      context: what Flax tells an interceptor of the call.
      args: of the call, which is over.
      kwargs: of the call.
    """
    module = context.module
    if module.scope is None:  # a method that needs no variables
        return {}
    parameters = _parameters(module)
    ranks = {name: len(_shape(leaf)) for name, leaf in parameters.items()}
    roles_of = _roles_of(module, ranks)
    if isinstance(module, nn.Einsum) and context.method_name == "__call__":
        # Flax takes the equation of the module or that of the call, not both.
        in_call = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        roles_of = _layer_axes.einsum_roles(
            module.einsum_str or in_call,
            len(module.shape),
            ranks.get("bias", 0),
        )
    return {
        name: (roles_of[name], leaf)
        for name, leaf in parameters.items()
        if name in roles_of and len(roles_of[name]) == ranks[name]
    }


def _parameters(module: nn.Module) -> dict[str, Any]:
    """Return {name: array or box} of a module, without those of its submodules."""
    params = module.variables.get("params", {})
    # What a bridge has below it belongs to no other linen module.
    if not isinstance(module, nnx.bridge.ToLinen):
        params = {
            name: x for name, x in params.items() if not isinstance(x, Mapping)
        }
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=nn.meta.is_axis_metadata
    )
    return {_tree.path_str(path): leaf for path, leaf in leaves}


def _shape(leaf: Any) -> tuple[int, ...]:
    return np.shape(jax.tree.leaves(leaf)[0])  # of the array in a box


def _rank(value: Any) -> int:
    return len(value) if isinstance(value, Sequence) else 1


def _roles_of(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, Roles]:
    """Return {name: roles} by the type of the layer.

    Args:
      module: the layer.
      ranks: numbers of axes of its parameters.
    """
    match module:
        # OptimizedLSTMCell makes its matrices with DenseParams and joins them for the
        # product only.
        case nn.Dense() | nn.recurrent.DenseParams():
            return {"kernel": ("in", "out"), "bias": NONE}
        case nn.Conv() | WSConv():
            spatial = ("in",) * _rank(module.kernel_size)
            return {
                "kernel": (*spatial, "in", "out"),
                "bias": NONE,
                "gain": NONE,
            }
        case nn.ConvLocal():
            positions = ("batch",) * _rank(module.kernel_size)
            return {
                "kernel": (*positions, "in", "out"),
                "bias": (*positions, "none"),
            }
        case nn.ConvTranspose():
            spatial = ("in",) * _rank(module.kernel_size)
            last = ("out", "in") if module.transpose_kernel else ("in", "out")
            return {"kernel": (*spatial, *last), "bias": NONE}
        case nn.DenseGeneral():
            batch = ("batch",) * _rank(module.batch_dims)
            ins = ("in",) * _rank(module.axis)
            outs = _rank(module.features)
            return {
                "kernel": (*batch, *ins, *("out",) * outs),
                "bias": (*batch, *NONE * outs),
            }
        case ConvNorm() | PointwiseNorm():
            return {"gain": NONE}
        case nn.Embed():
            return {"embedding": ("in", "out")}
        case nn.WeightNorm():
            return {name: NONE * rank for name, rank in ranks.items()}
        case nn.PReLU():
            return {"negative_slope": ()}
        case nnx.bridge.ToLinen():
            return _bridged_roles(module)
    if isinstance(module, HEADS):
        return {n: ("in", "out") if r == 2 else NONE for n, r in ranks.items()}
    if isinstance(module, NORMS):
        return {name: NONE * ranks.get(name, 1) for name in ("scale", "bias")}
    return {}


def _bridged_roles(module: Any) -> dict[str, Roles]:
    """Return {path: roles} of an nnx module, where the sizes leave no doubt."""

    def make() -> Any:
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **module.kwargs, **rngs)

    # Abstractly, since linen has initialized it with other keys already.
    nodes = list(nnx.iter_graph(nnx.eval_shape(make)))
    # Flax yields a shared variable once, or (0.11.2) under every path: the first counts.
    paths: dict[int, str] = {}
    for path, value in nodes:
        if isinstance(value, nnx.Variable):
            paths.setdefault(id(value), "/".join(map(str, path)))
    table: dict[str, Roles] = {}
    for _, node in nodes:
        for name, axes in _layer_axes.layer_axes(node).items():
            variable = _layer_axes.named_parameter(node, name)
            if isinstance(variable, nnx.Variable):
                placed = _layer_axes.placements(axes, variable.shape)
                if len(placed) == 1:
                    table[paths[id(variable)]] = placed[0]
    return table
