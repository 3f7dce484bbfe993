"""What the transforms of this room share: leaves by path, state dtypes, hyper-parameters."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _dtypes, _sharding, _tree, roles
from jaxtricks._arguments import known_number
from jaxtricks._typing import Array, Params, Roles, ScalarOrSchedule


def checked(name: str, params: Params) -> dict[str, Array]:
    """{path: array} of the parameters; raises for what is no real floating array."""
    table = {path: _as_array(leaf) for path, leaf in _tree.by_path(params).items()}
    for path, leaf in table.items():
        if not _dtypes.is_floating(leaf):
            raise ValueError(
                f"memopt.{name}: the parameter {path!r} is {leaf.dtype}: hide it with optax.masked"
            )
    return table


def roles_by_path(rule: Any, params: Params) -> dict[str, Roles | None]:
    """{path: roles or None}; strict rules are checked on the way."""
    arrays = jax.tree.map(_as_array, params)
    return dict(zip(_tree.by_path(params), roles.leaf_roles(rule, arrays), strict=True))


def arranged(nodes: Iterable[Any], params: Params) -> Any:
    """The parameters' tree with a node of the state in place of every leaf.

    Args:
      nodes: arrays, or small pytrees of them; in flattening order.
      params: any pytree.
    """
    left = iter(nodes)

    def place(x: Any) -> Any:
        if not _is_variable(x):
            return next(left)
        (held,) = jax.tree.leaves(x, is_leaf=lambda y: y is not x)
        node = jax.tree.map(lambda _: next(left), held)
        # flax 0.11 lets Variables of an optimizer hold single arrays only, and what
        # shards the parameter does not fit parts of it: what is no array takes the
        # Variable's place.
        return jax.tree.map(lambda _: node, x) if hasattr(node, "shape") else node

    return jax.tree.map(place, params, is_leaf=_is_variable)


def nodes_by_path(tree: Any, is_node: Callable[[Any], bool]) -> dict[str, Any]:
    """{path of the parameter: node} of a tree made by `arranged`; nothing for None."""
    return _tree.by_path(tree, is_node)


def replaced(tree: Any, is_node: Callable[[Any], bool], table: dict[str, Any]) -> Any:
    """The tree with the nodes of the table, which are in the order of `nodes_by_path`."""
    return jax.tree.unflatten(
        jax.tree.structure(tree, is_leaf=is_node), list(table.values())
    )


def lookup(name: str, table: dict[str, Any], path: str, what: str) -> Any:
    """table[path], or a sentence."""
    if path not in table:
        raise ValueError(
            f"memopt.{name}: {path!r} has a gradient but {what} has no such entry: "
            "call tx.init(params) and tx.update(grads, state, params) with the same tree; if the "
            "model has changed since (converted, fused), rebuild the optimizer"
        )
    return table[path]


def update_dtype(g: Any, p: Any) -> Any:
    """Dtype of the update: the wider of gradient and parameter."""
    return _dtypes.common_dtype(g, p)


def zeros(leaf: Any, without: tuple[int, ...] = (), dtype: Any = None) -> Array:
    """Zeros shaped as the leaf without some axes, on the devices and in the shards where the leaf is.

    Args:
      leaf: array, tracer or shape.
      without: axes that are left out.
      dtype: None = that of the leaf, float32 at least.
    """
    dtype = _dtypes.wide_dtype(leaf) if dtype is None else dtype
    if on_one_device(leaf):
        return jnp.zeros(
            [n for i, n in enumerate(leaf.shape) if i not in without], dtype
        )
    return _zeros_placed(leaf, without=without, dtype=np.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("without", "dtype"), inline=True)
def _zeros_placed(leaf: Any, *, without: tuple[int, ...], dtype: Any) -> Array:
    # The sum over zeros that are sharded as the leaf has the leaf's sharding without
    # these axes.
    zeros = _sharding.zeros_like(leaf, dtype)
    return jnp.sum(zeros, axis=without) if without else zeros


def on_one_device(leaf: Any) -> bool:
    """Whether the leaf is known to lie on one device: no tracer, no shards."""
    devices = getattr(getattr(leaf, "sharding", None), "device_set", ())
    return not isinstance(leaf, jax.core.Tracer) and len(devices) <= 1


def reread(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays, of which XLA's CPU backend does not know that they are the same.

    What two reductions share (g^2, say) it would compute once, write to memory whole,
    and read back twice. On other backends the arrays as they are: there the compiler
    fuses the two.
    """
    return jax.lax.platform_dependent(
        *arrays,
        cpu=lambda *xs: jax.lax.optimization_barrier(xs),
        default=lambda *xs: xs,
    )


def value(x: ScalarOrSchedule, count: Any, dtype: Any) -> Array:
    """A number, array or schedule at step `count`, in the dtype of the state it meets."""
    return jnp.asarray(x(count) if callable(x) else x).astype(dtype)


def optional(x: ScalarOrSchedule | None, count: Any, dtype: Any) -> Array | None:
    """`value`, None for None."""
    return None if x is None else value(x, count, dtype)


def is_zero(x: Any) -> bool:
    """Whether a hyper-parameter is fixed at zero: a plain number, not an array or schedule.

    An array may become anything later (optax.inject_hyperparams), so what it needs is
    kept.
    """
    return x is None or (isinstance(x, int | float | np.generic) and bool(x == 0))


def check_number(
    name: str, argument: str, x: Any, low: float, high: float = float("inf")
) -> None:
    """Raise if a plain number lies outside [low, high]; arrays and schedules pass."""
    number = known_number(x)
    if number is not None and not low <= number <= high:
        limit = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
        raise ValueError(f"memopt.{name}: `{argument}` is {x}: give a number {limit}")


def decayed(mask: Any, params: Params) -> set[str]:
    """Paths of the parameters that weight decay applies to."""
    if mask is None:
        return set(_tree.by_path(params))
    if callable(mask) and len(inspect.signature(mask).parameters) == 2:
        return {
            p for p, x in _tree.by_path(params).items() if mask(p, tuple(jnp.shape(x)))
        }
    tree = mask(params) if callable(mask) else mask
    full = jax.tree.map(lambda on, part: jax.tree.map(lambda _: on, part), tree, params)
    return {path for path, on in _tree.leaves_with_paths(full) if bool(on)}


def _is_variable(x: Any) -> bool:
    """Whether x is a Variable of flax.nnx, which this room does not import."""
    return hasattr(type(x), "get_metadata") and hasattr(type(x), "value")


def _as_array(x: Any) -> Any:
    return x if hasattr(x, "shape") else jnp.asarray(x)
