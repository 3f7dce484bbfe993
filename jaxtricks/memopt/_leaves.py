"""Share what Adafactor and SM3 need: leaves by path, state arrays, hyper-parameters."""

import contextlib
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
    """Return {path: array} of the parameters; raise unless all are real floating."""
    table = {
        path: _as_array(leaf) for path, leaf in _tree.by_path(params).items()
    }
    for path, leaf in table.items():
        if not _dtypes.is_floating(leaf):
            raise ValueError(
                f"memopt.{name}: the parameter {path!r} is {leaf.dtype}: hide "
                "it with optax.masked"
            )
    return table


def roles_by_path(rule: Any, params: Params) -> dict[str, Roles | None]:
    """Return {path: roles or None}; check strict rules."""
    arrays = jax.tree.map(_as_array, params)
    leaf_roles = roles.leaf_roles(rule, arrays)
    return dict(zip(_tree.by_path(params), leaf_roles, strict=True))


def tree_like(nodes: Iterable[Any], params: Params) -> Any:
    """Build a tree like the parameters, with a node of the state per leaf.

    Args:
      nodes: arrays, or small pytrees of arrays; in flattening order.
      params: any pytree.
    """
    remaining = iter(nodes)

    def place(x: Any) -> Any:
        if not is_variable(x):
            return next(remaining)
        node = jax.tree.map(lambda _: next(remaining), _content(x))
        # flax 0.11 allows single arrays alone in an optimizer's Variables, and the
        # parameter's sharding does not fit parts of it. So an array goes into the
        # Variable, and a tuple of arrays takes its place.
        if hasattr(node, "shape"):
            return jax.tree.map(lambda _: node, x)
        return node

    return jax.tree.map(place, params, is_leaf=is_variable)


def without_variables(tree: Any) -> Any:
    """Return the tree with what the Variables of flax.nnx hold in their places."""
    return jax.tree.map(
        lambda x: _content(x) if is_variable(x) else x,
        tree,
        is_leaf=is_variable,
    )


def without_empty_variables(tree: Any) -> Any:
    """Return the tree without the Variables that hold no array but MaskedNode or None.

    flax 0.11 allows none of these in an optimizer.
    """

    def unwrap(x: Any) -> Any:
        is_empty = is_variable(x) and not jax.tree.leaves(x)
        return _content(x) if is_empty else x

    return jax.tree.map(unwrap, tree, is_leaf=is_variable)


def with_nodes(
    tree: Any, is_node: Callable[[Any], bool], table: dict[str, Any]
) -> Any:
    """Return the tree with these nodes, in the order of `_tree.by_path`."""
    structure = jax.tree.structure(tree, is_leaf=is_node)
    return jax.tree.unflatten(structure, list(table.values()))


def wide(tree: Any) -> Any:
    """Return the tree with floating arrays in float32, or float64 where they are."""

    def widen(x: Any) -> Any:
        x = _as_array(x)
        if not _dtypes.is_floating(x):
            return x
        return x.astype(_dtypes.wide_dtype(x))

    return jax.tree.map(widen, tree)


def promotion_of_optax() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which optax runs: strict promotion refuses its arithmetic.

    It raises floats to the power of counts, for example.
    """
    return jax.numpy_dtype_promotion("standard")


def lookup(name: str, table: dict[str, Any], path: str, what: str) -> Any:
    """Return table[path], or raise a sentence that says what to do."""
    if path not in table:
        raise ValueError(
            f"memopt.{name}: {path!r} has a gradient but {what} has no such "
            "entry: call tx.init(params) and tx.update(grads, state, params) "
            "with the same tree; if the model has changed since (convert, "
            "fuse), rebuild the optimizer"
        )
    return table[path]


def zeros(leaf: Any, without: tuple[int, ...] = (), dtype: Any = None) -> Array:
    """Create zeros shaped and sharded as the leaf, without some axes.

    Args:
      leaf: array, tracer or shape.
      without: axes to leave out.
      dtype: None = that of the leaf, float32 at least.
    """
    dtype = _dtypes.wide_dtype(leaf) if dtype is None else dtype
    if on_one_device(leaf):
        shape = [n for i, n in enumerate(leaf.shape) if i not in without]
        return jnp.zeros(shape, dtype)
    return _zeros_placed(leaf, without=without, dtype=np.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("without", "dtype"), inline=True)
def _zeros_placed(leaf: Any, *, without: tuple[int, ...], dtype: Any) -> Array:
    # Summing zeros sharded as the leaf yields the leaf's sharding without these axes.
    zeros = _sharding.zeros_like(leaf, dtype)
    return jnp.sum(zeros, axis=without) if without else zeros


def on_one_device(leaf: Any) -> bool:
    """Return whether the leaf is known to lie on one device; tracers are not."""
    devices = getattr(getattr(leaf, "sharding", None), "device_set", ())
    return not isinstance(leaf, jax.core.Tracer) and len(devices) <= 1


def opaque_copies(*arrays: Array) -> tuple[Array, ...]:
    """Return the same arrays, as values that XLA's CPU backend cannot identify.

    It would compute what two reductions share (g^2, say) once, write it to memory whole
    and read it twice. Other backends fuse the two, so there the arrays pass unchanged.
    """
    return jax.lax.platform_dependent(
        *arrays,
        cpu=lambda *xs: jax.lax.optimization_barrier(xs),
        default=lambda *xs: xs,
    )


def value(x: ScalarOrSchedule, count: Any, dtype: Any) -> Array:
    """Evaluate a number, array or schedule at step `count`, in a dtype."""
    return jnp.asarray(x(count) if callable(x) else x).astype(dtype)


def optional(
    x: ScalarOrSchedule | None, count: Any, dtype: Any
) -> Array | None:
    """Return `value`, or None for None."""
    return None if x is None else value(x, count, dtype)


def is_zero(x: Any) -> bool:
    """Return whether a hyper-parameter is fixed at zero: None or a plain 0.

    An array may change later (optax.inject_hyperparams), so its buffer must exist.
    """
    return x is None or (
        isinstance(x, int | float | np.generic) and bool(x == 0)
    )


def check_number(
    name: str, argument: str, x: Any, low: float, high: float = float("inf")
) -> None:
    """Raise if a plain number lies outside [low, high]; arrays and schedules pass."""
    number = known_number(x)
    if number is not None and not low <= number <= high:
        limit = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
        raise ValueError(
            f"memopt.{name}: `{argument}` is {x}: give a number {limit}"
        )


def decayed_paths(mask: Any, params: Params) -> set[str]:
    """Return the paths of the parameters that weight decay applies to."""
    if mask is None:
        return set(_tree.by_path(params))
    if callable(mask) and len(inspect.signature(mask).parameters) == 2:
        leaves = _tree.by_path(params).items()
        return {
            path for path, leaf in leaves if mask(path, tuple(jnp.shape(leaf)))
        }
    tree = mask(params) if callable(mask) else mask
    # A mask may be a prefix of the tree: spread its entries over the leaves below.
    full = jax.tree.map(
        lambda on, part: jax.tree.map(lambda _: on, part), tree, params
    )
    return {path for path, on in _tree.leaves_with_paths(full) if bool(on)}


def is_variable(x: Any) -> bool:
    """Return whether x is a Variable of flax.nnx, which is not imported here."""
    return hasattr(type(x), "get_metadata") and hasattr(type(x), "value")


def _content(variable: Any) -> Any:
    (content,) = jax.tree.leaves(variable, is_leaf=lambda x: x is not variable)
    return content


def _as_array(x: Any) -> Any:
    return x if hasattr(x, "shape") else jnp.asarray(x)
