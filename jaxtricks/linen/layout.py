"""What each axis of a linen module's parameters means, from the types of its own layers."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from jaxtricks import _tree, axes
from jaxtricks._types import PathRule, Roles
from jaxtricks.linen.layers import ExtendedBatchNorm, WSConv
from jaxtricks.nnx import layout

NORMS = (
    nn.BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    ExtendedBatchNorm,
)


def roles(module: nn.Module, *init_args: Any, **init_kwargs: Any) -> PathRule:
    """A rule for `axes=` (memopt, agc) that is exact for the layers of flax.linen and of this library.

    The module is initialized abstractly (nothing is computed or allocated) and its layers are watched.

    Args:
      module: any linen module. Axes that nn.vmap and nn.scan add are "batch", wherever they are put;
        where sizes leave more than one possibility, the leading one.
      *init_args: what `module.init` takes after the key: example inputs (shapes suffice).
      **init_kwargs: the same, by name.

    Returns:
      (path, shape) -> roles for the paths of variables["params"]; None for parameters of unknown layers.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = roles(nn.Sequential([nn.Dense(4), nn.LayerNorm()]), jnp.ones((2, 3)))
      >>> rule("layers_0/kernel", (3, 4)), rule("layers_1/scale", (4,))
      (('in', 'out'), ('none',))
    """
    found: dict[str, tuple[Roles, Any]] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        module = context.module
        own = dict(_tree.leaves_with_paths(module.variables.get("params", {})))
        for name, layout_ in _layer_roles(module, own).items():
            if name in own:
                found["/".join((*module.path, name))] = layout_, own[name].shape
        return out

    def init(key: Any, args: Any) -> Any:
        return module.init(key, *args, **init_kwargs)

    with nn.intercept_methods(watch):
        variables = jax.eval_shape(init, jax.random.key(0), init_args)
    shapes = {p: x.shape for p, x in _tree.leaves_with_paths(variables.get("params", {}))}
    return axes.exact(
        {path: _lifted(*found[path], shape) for path, shape in shapes.items() if path in found}
    )


def _lifted(roles: Roles, inner: tuple[int, ...], outer: tuple[int, ...]) -> Roles:
    """Roles of a stacked parameter: "batch" where nn.scan or nn.vmap has put its axes."""
    extra = len(outer) - len(inner)
    for new in itertools.combinations(range(len(outer)), extra):
        if tuple(n for i, n in enumerate(outer) if i not in new) == tuple(inner):
            rest = iter(roles)
            return tuple("batch" if i in new else next(rest) for i in range(len(outer)))
    return roles


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _layer_roles(module: nn.Module, own: dict[str, Any]) -> dict[str, Roles]:
    """{name: roles} of one layer's own parameters; empty for an unknown type."""
    match module:
        case nn.Dense():
            return {"kernel": ("in", "out"), "bias": layout.NONE}
        case nn.Conv() | WSConv():
            spatial = ("in",) * len(_tuple(module.kernel_size))
            return {"kernel": (*spatial, "in", "out"), "bias": layout.NONE, "gain": layout.NONE}
        case nn.ConvTranspose():
            spatial = ("in",) * len(_tuple(module.kernel_size))
            last = ("out", "in") if module.transpose_kernel else ("in", "out")
            return {"kernel": (*spatial, *last), "bias": layout.NONE}
        case nn.DenseGeneral():
            sizes = (module.batch_dims, module.axis, module.features)
            return layout.general_roles(*(len(_tuple(s)) for s in sizes))
        case nn.Einsum():
            kernel = layout.einsum_roles(module.einsum_str, len(module.shape))
            return {**kernel, "bias": layout.NONE * own["bias"].ndim} if "bias" in own else kernel
        case nn.Embed():
            return {"embedding": ("in", "out")}
        case nnx.bridge.ToLinen():
            return _bridged_roles(module)
    return {"scale": layout.NONE, "bias": layout.NONE} if isinstance(module, NORMS) else {}


def _bridged_roles(module: Any) -> dict[str, Roles]:
    def make() -> Any:
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **module.kwargs, **rngs)

    return layout.table(nnx.eval_shape(make))
