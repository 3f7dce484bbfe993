"""Apply transforms of pure functions to modules, whose variables are updated as ever.

A module writes its batch statistics and RNG counts while it is called. Here its
variables go into the transformed function as arguments and come out as results.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxtricks import _integers, amp, remat
from jaxtricks._arguments import checked
from jaxtricks._partition import positional
from jaxtricks.nnx._compat import is_node
from jaxtricks.remat._memory import shape

Fn = Callable[..., Any]
Transform = Callable[[Fn], Fn]


@checked
def recompute_grad(module: nnx.Module | Fn) -> Fn:
    """Return the module's call, recomputed in the backward pass.

    See `remat.recompute_grad`, which takes functions of arrays.

    Args:
      module: any module, a method of one, or a function with modules (or nnx.Rngs,
        metrics, variables) among its arguments; call the result inside the transformed
        function, where the modules live.

    Returns:
      For a module, one that holds it as `module` and may take its place in a model;
      else a function. Its call has the signature of the module's (or of the function).

    Example:
      >>> import jax.numpy as jnp
      >>> block = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> recompute_grad(block)(jnp.ones((2, 3))).shape
      (2, 3)
    """
    return _with_variables_carried(remat.recompute_grad, module)


@checked
def autocast(
    fn: nnx.Module | Fn,
    policy: amp.Policy | str = "p=f32,c=bf16,o=f32",
    *,
    rules: Mapping[str, str] | None = None,
    scan_carry: Literal["layers", "auto", "keep"] = "layers",
    scaling: Literal["tensor", "row", "block32"] = "tensor",
) -> Fn:
    """Return `amp.autocast` of a module, or of a function with modules as arguments.

    Batch statistics and RNG counts stay in their dtypes. It goes inside `nnx.jit` and
    `nnx.value_and_grad`.

    Args:
      fn: a module, a method of one, or a function; modules that it closes over are not
        updated.
      policy: see `amp.autocast`.
      rules: see `amp.autocast`.
      scan_carry: see `amp.autocast`.
      scaling: see `amp.autocast`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = autocast(lambda model, x: model(x).mean())(model, jnp.ones((2, 3)))
      >>> y.dtype, model.mean[...].dtype
      (dtype('float32'), dtype('float32'))
    """
    cast = functools.partial(
        amp.autocast,
        policy=policy,
        rules=rules,
        scan_carry=scan_carry,
        scaling=scaling,
    )
    return _with_variables_carried(cast, fn)


@checked
def checkpoint(
    fn: nnx.Module | Fn,
    *,
    save: str | Iterable[str] = (),
    offload: str | Iterable[str] = (),
    **jax_checkpoint_arguments: Any,
) -> Fn:
    """Return `remat.checkpoint` of a module, or of a function with modules as arguments.

    Args:
      fn: a module, or a function; see `recompute_grad`.
      save: see `remat.checkpoint`.
      offload: see `remat.checkpoint`.
      **jax_checkpoint_arguments: see `remat.checkpoint`; `static_argnums` is not among
        them: whatever is not an array is static.

    Raises:
      ValueError: for `static_argnums`; and see `remat.checkpoint`.

    Example:
      >>> import jax.numpy as jnp
      >>> block = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> checkpoint(block)(jnp.ones((2, 3))).shape
      (2, 3)
    """
    if "static_argnums" in jax_checkpoint_arguments:
        raise ValueError(
            "nnx.checkpoint takes no `static_argnums`: leave it out, arguments "
            "that are not arrays are static"
        )
    settings = {"save": save, "offload": offload, **jax_checkpoint_arguments}
    transform = functools.partial(remat.checkpoint, **settings)
    return _with_variables_carried(transform, fn)


class _Transformed(nnx.Module):
    """A module whose call is transformed; it may take the module's place in a model."""

    def __init__(self, transform: Transform, module: Any):
        self.module = module
        self._transform = transform

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        transformed = _with_variables_carried(self._transform, call)
        return transformed(self.module, *args, **kwargs)


def _with_variables_carried(transform: Transform, fn: Any) -> Fn:
    """Return fn under a transform of pure functions."""
    if is_node(fn):
        return _Transformed(transform, fn)
    function, bound_args, bound_kwargs = _unbound(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = (*bound_args, *args), {**bound_kwargs, **kwargs}
        leaves, structure = jax.tree.flatten(arguments, is_leaf=is_node)
        nodes = tuple(x for x in leaves if is_node(x))
        # What is not an array is closed over: jax.checkpoint would trace flags.
        arrays = [x if _is_array(x) else None for x in leaves]
        # All nodes at once, so that variables they share stay shared.
        graph, state = nnx.split(nodes)

        def pure(state: Any, arrays: Any) -> tuple[Any, Any]:
            inner_nodes = nnx.merge(graph, state, copy=True)
            remaining = iter(inner_nodes)
            inner_leaves = []
            for leaf, array in zip(leaves, arrays, strict=True):
                if is_node(leaf):
                    inner_leaves.append(next(remaining))
                else:
                    inner_leaves.append(array if _is_array(leaf) else leaf)
            args, kwargs = jax.tree.unflatten(structure, inner_leaves)
            return function(*args, **kwargs), nnx.state(inner_nodes)

        out, state = transform(pure)(state, arrays)
        nnx.update(nodes, state)
        return out

    return call


def _unbound(fn: Fn) -> tuple[Fn, tuple[Any, ...], dict[str, Any]]:
    """Return a function, and the arguments that it is bound to.

    They are the module of a method, and the arguments of a partial.
    """
    if isinstance(fn, functools.partial):
        inner, args, kwargs = _unbound(fn.func)
        return inner, (*args, *fn.args), {**kwargs, **fn.keywords}
    owner = getattr(fn, "__self__", None)
    if inspect.ismethod(fn) and is_node(owner):
        return fn.__func__, (owner,), {}
    return fn, (), {}


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


# Plans of a loss with modules among its arguments.


@checked
def plan(
    fn: Fn,
    *args: Any,
    budget_bytes: int | float | str,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> remat.Plan:
    """Return `remat.plan` of a loss with modules among its arguments.

    Of the modules in `argnums` the nnx.Param are differentiated, as nnx.value_and_grad
    does.

    Args:
      fn: the scalar loss.
      *args: its arguments: modules, arrays, shapes; nothing is run.
      budget_bytes: see `remat.plan`.
      argnums: see `remat.plan`.
      has_aux: see `remat.plan`.
      **settings: see `remat.plan`; `within` and `batch` are not among them.

    Returns:
      Plan; its `fn` goes inside nnx.jit and nnx.value_and_grad.

    Raises:
      remat.BudgetInfeasible, ValueError: see `remat.plan`; and from `Plan.fn`, for
        modules of another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> model, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
      >>> planned = plan(lambda model, x: model(x).sum(), model, x, budget_bytes="1MB")
      >>> nnx.grad(planned.fn)(model, x).scale[...].shape
      (3,)
    """
    positions = _integers.positions(argnums, len(args))
    arguments = _SplitArguments.of(args, positions)
    return _planned(fn, arguments, positions, has_aux, budget_bytes, settings)


@checked
def auto_remat(fn: Fn, budget_bytes: int | float | str, **settings: Any) -> Fn:
    """Return `remat.auto_remat` of a loss with modules: `plan` at the first such call.

    Args:
      fn: the scalar loss.
      budget_bytes: see `plan`.
      **settings: see `plan`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = auto_remat(lambda model, x: model(x).sum(), "1MB")
      >>> loss(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((2, 3))).shape
      ()
    """
    plans: dict[Any, remat.Plan] = {}
    argnums, has_aux = (
        settings.pop("argnums", 0),
        settings.pop("has_aux", False),
    )

    @functools.wraps(fn)
    def planned(*args: Any, **kwargs: Any) -> Any:
        args = positional(fn, args, kwargs, "nnx.auto_remat")
        positions = _integers.positions(argnums, len(args))
        arguments = _SplitArguments.of(args, positions).with_shapes()
        # Like the cache of jax.jit: one plan for each structure and shapes.
        leaves, structure = jax.tree.flatten(
            (arguments.moving, arguments.fixed)
        )
        shapes = tuple((x.shape, x.dtype, x.weak_type) for x in leaves)
        signature = arguments.graph, arguments.structure, structure, shapes
        if signature not in plans:
            plans[signature] = _planned(
                fn, arguments, positions, has_aux, budget_bytes, settings
            )
        return plans[signature].fn(*args)

    return planned


def _planned(
    fn: Fn,
    arguments: "_SplitArguments",
    positions: Sequence[int],
    has_aux: bool,
    budget_bytes: int | float | str,
    settings: Mapping[str, Any],
) -> remat.Plan:
    # A whole step would have to carry the modules through the user's function.
    if settings.keys() & {"within", "batch"}:
        raise ValueError(
            "nnx.plan takes no `within` and no `batch`: plan the loss alone, or a "
            "pure one of nnx.functional by remat.plan"
        )

    def pure(moving: Any, fixed: Any) -> Any:
        inner_nodes, inner_args = arguments.merged(moving, fixed)
        out = fn(*inner_args)
        loss, aux = out if has_aux else (out, None)
        return loss, (aux, arguments.updated_state(inner_nodes, moving))

    pure_plan = remat.plan(
        pure,
        arguments.moving,
        arguments.fixed,
        budget_bytes=budget_bytes,
        has_aux=True,
        **settings,
    )

    @functools.wraps(fn)
    def updating(*args: Any, **kwargs: Any) -> Any:
        args = positional(fn, args, kwargs, "nnx.plan")
        actual = _SplitArguments.of(args, positions)
        # The graph has modes and sizes: another one is another program.
        is_same = actual.graph == arguments.graph
        if not is_same or actual.structure != arguments.structure:
            raise ValueError(
                "nnx.plan: the modules are not built as those that were "
                "planned: plan again after train(), eval() or a change of "
                "layers"
            )
        loss, (aux, state) = pure_plan.fn(actual.moving, actual.fixed)
        nnx.update(actual.nodes, state)
        return (loss, aux) if has_aux else loss

    return dataclasses.replace(pure_plan, fn=updating)


class _SplitArguments(NamedTuple):
    """Arguments split into what is differentiated and what is not.

    Attributes:
      nodes: the modules among the leaves, and whatever else has variables (`is_node`).
      graph: how they are built.
      structure: of the arguments, and for each leaf whether it is a node and whether it
        is differentiated.
      moving: (variables, other leaves) that are differentiated.
      fixed: the same of the rest.
    """

    nodes: tuple[Any, ...]
    graph: Any
    structure: Any
    moving: Any
    fixed: Any

    @classmethod
    def of(
        cls, args: tuple[Any, ...], positions: Sequence[int]
    ) -> "_SplitArguments":
        # An argument is differentiated as a whole, with all nodes inside it.
        trees, leaves, moves = [], [], []
        for i, arg in enumerate(args):
            arg_leaves, tree = jax.tree.flatten(arg, is_leaf=is_node)
            trees.append(tree)
            leaves += arg_leaves
            moves += [i in positions] * len(arg_leaves)
        kinds = tuple(
            (is_node(x), m) for x, m in zip(leaves, moves, strict=True)
        )
        nodes = tuple(x for x in leaves if is_node(x))
        graph, params, rest = nnx.split(nodes, _differentiated(kinds), ...)
        others = [None if is_node(x) else x for x in leaves]
        pairs = list(zip(others, moves, strict=True))
        moving = [x if m else None for x, m in pairs]
        fixed = [None if m else x for x, m in pairs]
        structure = tuple(trees), kinds
        return cls(nodes, graph, structure, (params, moving), (rest, fixed))

    def with_shapes(self) -> "_SplitArguments":
        """Return the arguments with shapes in place of arrays."""
        moving, fixed = jax.tree.map(shape, (self.moving, self.fixed))
        return self._replace(moving=moving, fixed=fixed)

    def merged(
        self, moving: Any, fixed: Any
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """Return new nodes with these variables, and the arguments around them."""
        nodes = nnx.merge(self.graph, moving[0], fixed[0], copy=True)
        trees, kinds = self.structure
        remaining = iter(nodes)
        leaves = []
        for (node, moves), x, y in zip(kinds, moving[1], fixed[1], strict=True):
            if node:
                leaves.append(next(remaining))
            else:
                leaves.append(x if moves else y)
        args, start = [], 0
        for tree in trees:
            stop = start + tree.num_leaves
            args.append(jax.tree.unflatten(tree, leaves[start:stop]))
            start = stop
        return nodes, args

    def updated_state(self, nodes: tuple[Any, ...], moving: Any) -> Any:
        """Return the variables that are not differentiated.

        Raises:
          ValueError: one that is differentiated has been written.
        """
        params, rest = nnx.state(nodes, _differentiated(self.structure[1]), ...)
        before, after = jax.tree.leaves(moving[0]), jax.tree.leaves(params)
        # A variable that is not written is the same tracer before and after.
        if any(x is not y for x, y in zip(before, after, strict=True)):
            raise ValueError(
                "nnx.plan: the loss writes an nnx.Param that it is "
                "differentiated by: make it a variable of another type"
            )
        return rest


def _differentiated(kinds: Sequence[tuple[bool, bool]]) -> Any:
    """Return an nnx filter of the parameters of the nodes that are differentiated."""
    node_moves = [moves for node, moves in kinds if node]
    return nnx.All(nnx.Param, lambda path, _: node_moves[path[0]])
