"""A module as a pure function of plain dictionaries: what every transform of this library works on."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxtricks import _integers, _jaxpr, _tree, amp, remat
from jaxtricks._arguments import checked
from jaxtricks._partition import positional
from jaxtricks._typing import ApplyFn, Key, Params, State
from jaxtricks.nnx import _compat as nnx_compat
from jaxtricks.nnx import _flags
from jaxtricks.nnx._compat import is_node
from jaxtricks.remat._memory import shape

_REST = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))


@checked
def functional(
    model: nnx.Module, *, train_kwargs: _flags.TrainKwargs = None
) -> tuple[ApplyFn, Params, State]:
    """The model as (apply, params, state).

    y, state = apply(params, state, *inputs, train=True, key=key). `apply` is pure: use
    it under jit, grad, vmap, scan and jax.checkpoint. The model itself is not changed,
    and later changes of it are not seen.

    Args:
      model: any module. `train` sets what `model.train()` and `model.eval()` set
        (`deterministic`, `use_running_average`), attributes of the model's own such as
        `training`, and the flags of its call.
      train_kwargs: how the call is told to train: a function train -> keyword
        arguments, or the flags in training ({"is_test": False}; negated in evaluation).
        None = those of `train`, `training`, `is_training`, `is_train`, `deterministic`,
        `use_running_average` and `inference` that the call has and that the arguments
        of `apply` leave open.

    Returns:
      apply: (params, state, *inputs, train: bool, key=None, **kwargs) -> (y, state).
        `kwargs` are the call's own. `key` is a typed PRNG key that replaces the model's
        own RNG keys, a different one for every stream, and makes the `rngs` of a call
        that has such an argument; it may be None only if the call draws no random
        numbers.
      params: nested dict of all nnx.Param arrays, {"block": {0: {"kernel": ...}}}.
      state: nested dict of all other variables: batch statistics, caches, RNG counts.
        The returned state has the same structure; variables that a call creates (sown
        intermediates) are not in it.

    Raises:
      ValueError: (from apply) random numbers without `key`, a tree of another
        structure, or an argument of the call that looks like a flag (`is_test`) of
        which neither `train_kwargs` nor the caller speaks.

    Example:
      >>> import jax.numpy as jnp
      >>> apply, params, state = functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> y, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> sorted(params), sorted(state)
      (['bias', 'scale'], ['mean', 'var'])
    """
    model = nnx.clone(model)
    params, state = (
        nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, _REST)
    )
    return _Functional(model, train_kwargs).apply, params, state


@checked
def with_variables(model: nnx.Module, params: Params, state: State) -> Any:
    """The module with the variables that `apply` was trained with: the way back from `functional`.

    Args:
      model: the module that `functional` was given, or one like it; it is copied.
      params: as `functional` returned them, trained.
      state: the same.

    Raises:
      ValueError: a tree of another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> apply, params, state = functional(model)
      >>> _, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> with_variables(model, params, state).mean[...].tolist() == state["mean"].tolist()
      True
    """
    graph, old_params, keys, old_state = nnx.split(model, nnx.Param, nnx.RngKey, _REST)
    for name, given, like in (
        ("params", params, old_params),
        ("state", state, old_state),
    ):
        _check(name, given, like)
    return nnx.merge(
        graph, _filled(old_params, params), keys, _filled(old_state, state), copy=True
    )


class _Functional:
    """The static part of a model, and how to run it on given variables; changes the model's mode."""

    def __init__(self, model: nnx.Module, train_kwargs: _flags.TrainKwargs):
        self.kind = type(model)
        self.kwargs = _flags.mode_rule("nnx.functional", self.kind, train_kwargs)
        _set_mode(model, train=True)
        train, *_ = split = nnx.split(model, nnx.Param, nnx.RngKey, _REST)
        _set_mode(model, train=False)
        self.graphs = {
            True: train,
            False: nnx.split(model, nnx.Param, nnx.RngKey, _REST)[0],
        }
        params, keys, rest = split[1:]
        # Shapes only: arrays that the caller donates or drops must not be kept alive
        # here.
        self.params_like, self.keys_like, self.state_like = map(
            _abstract, (params, keys, rest)
        )
        self.random = bool(jax.tree.leaves(self.keys_like))

    def apply(
        self,
        params: Params,
        state: State,
        /,
        *inputs: Any,
        train: bool,
        key: Key | None = None,
        **kwargs: Any,
    ) -> tuple[Any, State]:
        _check("params", params, self.params_like)
        _check("state", state, self.state_like)
        graph = self.graphs[static_train(train)]
        keys, kwargs = self._keys(key), self.kwargs(train, inputs, kwargs)

        def run() -> tuple[Any, State]:
            rngs = call_rngs(self.kind, inputs, kwargs, key)
            return self._run(graph, keys, params, state, inputs, {**kwargs, **rngs})

        if key is None and self.random:
            _refuse_random(run)
        return run()

    def _run(
        self,
        graph: Any,
        keys: Any,
        params: Params,
        state: State,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, State]:
        # Variables are made here, in the trace that uses them.
        module = nnx.merge(
            graph,
            _filled(self.params_like, params),
            jax.tree.unflatten(jax.tree.structure(self.keys_like), keys),
            _filled(self.state_like, state),
        )
        y = module(*inputs, **kwargs)
        return y, pruned(nnx.to_pure_dict(nnx.state(module, _REST)), state)

    def _keys(self, key: Key | None) -> list[Key]:
        """One key for every stream of the model, stacked streams included."""
        # Without a key it is never drawn from: see `_refuse_random`.
        key = jax.random.key(0) if key is None else checked_key(key)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.keys_like)]
        return [
            _split(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)
        ]


def call_rngs(
    kind: type, inputs: Sequence[Any], kwargs: Mapping[str, Any], key: Key | None
) -> dict[str, Any]:
    """{"rngs": ...} for a call that takes nnx.Rngs and was given none; made in the trace that uses them.

    Without a key it is None where the call insists on the argument: then nothing may be
      drawn.
    """
    parameter = _flags.open_parameters(kind, inputs, kwargs).get("rngs")
    if parameter is None or (
        key is None and parameter.default is not inspect.Parameter.empty
    ):
        return {}
    # Another key than those of the model's own streams, which have the small numbers.
    return {
        "rngs": None if key is None else nnx.Rngs(jax.random.fold_in(key, 2**31 - 1))
    }


def _set_mode(model: nnx.Module, *, train: bool) -> None:
    """As `model.train()` and `model.eval()`, and flags of the model's own modules too."""
    # Not model.train(): an attribute of this name would be called.
    (nnx.Module.train if train else nnx.Module.eval)(model)
    for _, module in nnx_compat.modules(model):
        # Not by hasattr: every module has a method `train`.
        for name, value in _flags.attribute_flags(vars(module), train).items():
            setattr(module, name, value)


def _refuse_random(run: Callable[[], Any]) -> None:
    def arrays() -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(run()) if isinstance(leaf, jax.Array)]

    closed, _ = _jaxpr.trace(arrays)
    if any(map(_draws, _jaxpr.walk(closed.jaxpr))):
        raise ValueError(
            "nnx.functional: this call draws random numbers and needs `key`: pass "
            "key=jax.random.key(...), or train=False"
        )


def _check(name: str, tree: Any, like: Any) -> None:
    wanted = {path for path, _ in _tree.leaves_with_paths(like)}
    given = {path for path, _ in _tree.leaves_with_paths(tree)}
    if wanted != given:
        path = min(wanted ^ given)
        problem = "is missing" if path in wanted else "does not belong there"
        raise ValueError(
            f"nnx: in `{name}` {path!r} {problem}; pass a tree like the one functional returned"
        )


def _draws(eqn: Any) -> bool:
    return _jaxpr.primitive(eqn).startswith(
        ("random_bits", "random_fold_in", "random_split")
    )


def static_train(train: Any) -> bool:
    """`train`, or an error if it is traced or not a bool."""
    if not isinstance(train, bool):
        raise ValueError(
            "functional: `train` must be a Python bool: make it static under jit"
        )
    return train


def checked_key(key: Any) -> Key:
    """`key`, or an error if it is not a typed PRNG key."""
    if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(
            "functional: `key` is not a typed PRNG key; make it with jax.random.key"
        )
    return key


def _split(key: Key, shape: tuple[int, ...]) -> Key:
    return jax.random.split(key, shape) if shape else key


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def _filled(shapes: Any, values: Any) -> Any:
    state = jax.tree.map(lambda x: x, shapes)
    nnx.replace_by_pure_dict(state, values)
    return state


def pruned(tree: Any, like: Any) -> Any:
    """The part of a nested dict whose keys `like` has."""
    if not isinstance(like, dict):
        return tree
    return {key: pruned(tree[key], like[key]) for key in like}


# Transforms of pure functions, applied to functions of modules.


Fn = Callable[..., Any]


@checked
def recompute_grad(module: nnx.Module | Fn) -> Fn:
    """The module's call, recomputed in the backward pass; its variables are updated as ever.

    `remat.recompute_grad` takes functions of arrays. A module also writes its batch
    statistics and RNG counts, so its variables go in as arguments and come out as
    results.

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
    return _carried(remat.recompute_grad, module)


@checked
def autocast(
    fn: nnx.Module | Fn,
    policy: amp.Policy | str = "p=f32,c=bf16,o=f32",
    *,
    rules: Mapping[str, str] | None = None,
    scan_carry: Literal["keep", "auto"] = "keep",
) -> Fn:
    """`amp.autocast` of a module or of a function with modules among its arguments.

    The modules' batch statistics and RNG counts are updated as ever, in their own
    dtypes. It goes inside `nnx.jit` and `nnx.value_and_grad`.

    Args:
      fn: a module, a method of one, or a function; modules that it closes over are not
        updated.
      policy, rules, scan_carry: see `amp.autocast`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = autocast(lambda model, x: model(x).mean())(model, jnp.ones((2, 3)))
      >>> y.dtype, model.mean[...].dtype
      (dtype('float32'), dtype('float32'))
    """
    cast = functools.partial(
        amp.autocast, policy=policy, rules=rules, scan_carry=scan_carry
    )
    return _carried(cast, fn)


@checked
def checkpoint(
    fn: nnx.Module | Fn,
    *,
    save: str | Iterable[str] = (),
    offload: str | Iterable[str] = (),
    **jax_checkpoint_arguments: Any,
) -> Fn:
    """`remat.checkpoint` of a module or of a function with modules among its arguments.

    Args:
      fn: a module, or a function; see `recompute_grad`. save, offload,
      **jax_checkpoint_arguments: see `remat.checkpoint`; `static_argnums` is not among
        them: whatever is no array is static.

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
            "nnx.checkpoint takes no `static_argnums`: leave it out, arguments that are not arrays are static"
        )
    settings = {"save": save, "offload": offload, **jax_checkpoint_arguments}
    return _carried(functools.partial(remat.checkpoint, **settings), fn)


@checked
def plan(
    fn: Fn,
    *args: Any,
    budget_bytes: int | float | str,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> remat.Plan:
    """`remat.plan` of a loss with modules among its arguments, whose variables are updated as ever.

    Of the modules in `argnums` the nnx.Param are differentiated, as nnx.value_and_grad
    does.

    Args:
      fn: the scalar loss. *args: its arguments: modules, arrays, shapes; nothing is
      run. budget_bytes, argnums, has_aux, **settings: see `remat.plan`; `within` is not
      among them.

    Returns:
      Plan; its `fn` goes inside nnx.jit and nnx.value_and_grad.

    Raises:
      remat.BudgetInfeasible, ValueError: see `remat.plan`; and from `Plan.fn`, for
        modules that were built otherwise.

    Example:
      >>> import jax.numpy as jnp
      >>> model, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
      >>> found = plan(lambda model, x: model(x).sum(), model, x, budget_bytes="1MB")
      >>> nnx.grad(found.fn)(model, x).scale[...].shape
      (3,)
    """
    wanted = _integers.positions(argnums, len(args))
    return _planned(
        fn, _Parts.of(args, wanted), wanted, has_aux, budget_bytes, settings
    )


def _planned(
    fn: Fn,
    parts: "_Parts",
    wanted: Sequence[int],
    has_aux: bool,
    budget_bytes: int | float | str,
    settings: Mapping[str, Any],
) -> remat.Plan:
    if "within" in settings:
        raise ValueError(
            "nnx.plan takes no `within`: plan the loss alone, or a pure one of nnx.functional by remat.plan"
        )

    def pure(moving: Any, fixed: Any) -> Any:
        inner, given = parts.filled(moving, fixed)
        out = fn(*given)
        loss, aux = out if has_aux else (out, None)
        return loss, (aux, parts.changed(inner, moving))

    planned = remat.plan(
        pure,
        parts.moving,
        parts.fixed,
        budget_bytes=budget_bytes,
        has_aux=True,
        **settings,
    )

    @functools.wraps(fn)
    def updating(*args: Any, **kwargs: Any) -> Any:
        here = _Parts.of(positional(fn, args, kwargs, "nnx.plan"), wanted)
        if here.graph != parts.graph or here.structure != parts.structure:
            raise ValueError(
                "nnx.plan: the modules are not built as those that were planned: plan again after train(), "
                "eval() or a change of layers"
            )
        loss, (aux, state) = planned.fn(here.moving, here.fixed)
        nnx.update(here.nodes, state)
        return (loss, aux) if has_aux else loss

    return dataclasses.replace(planned, fn=updating)


@checked
def auto_remat(fn: Fn, budget_bytes: int | float | str, **settings: Any) -> Fn:
    """`remat.auto_remat` of a loss with modules among its arguments: `plan` at the first such call.

    Args:
      fn: the scalar loss.
      budget_bytes, **settings: of `plan`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = auto_remat(lambda model, x: model(x).sum(), "1MB")
      >>> loss(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((2, 3))).shape
      ()
    """
    found: dict[Any, remat.Plan] = {}
    argnums, has_aux = settings.pop("argnums", 0), settings.pop("has_aux", False)

    @functools.wraps(fn)
    def planned(*args: Any, **kwargs: Any) -> Any:
        args = positional(fn, args, kwargs, "nnx.auto_remat")
        wanted = _integers.positions(argnums, len(args))
        parts = _Parts.of(args, wanted)
        moving, fixed = jax.tree.map(shape, (parts.moving, parts.fixed))
        leaves, structure = jax.tree.flatten((moving, fixed))
        shapes = tuple((x.shape, x.dtype, x.weak_type) for x in leaves)
        signature = parts.graph, parts.structure, structure, shapes
        if signature not in found:
            parts = parts._replace(moving=moving, fixed=fixed)
            found[signature] = _planned(
                fn, parts, wanted, has_aux, budget_bytes, settings
            )
        return found[signature].fn(*args)

    return planned


class _Parts(NamedTuple):
    """Arguments taken apart: what is differentiated, what is not, and how they were put together.

    Attributes:
      nodes: the modules among the leaves, and whatever else has variables (`is_node`).
      graph: how they are built.
      structure: of the arguments, and which leaves are nodes.
      moving, fixed: (variables, other leaves).
    """

    nodes: tuple[Any, ...]
    graph: Any
    structure: Any
    moving: Any
    fixed: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], wanted: Sequence[int]) -> "_Parts":
        flat = [jax.tree.flatten(arg, is_leaf=is_node) for arg in args]
        places = [
            (x, i in wanted) for i, (leaves, _) in enumerate(flat) for x in leaves
        ]
        nodes = tuple(x for x, _ in places if is_node(x))
        moves = [is_wanted for x, is_wanted in places if is_node(x)]
        chosen = nnx.All(nnx.Param, lambda path, _: moves[path[0]])
        graph, params, rest = nnx.split(nodes, chosen, ...)
        others = [(None if is_node(x) else x, is_wanted) for x, is_wanted in places]
        split = [
            [x if side == w else None for x, w in others] for side in (True, False)
        ]
        kinds = tuple((is_node(x), w) for x, w in places)
        structure = tuple(tree for _, tree in flat), kinds
        return cls(nodes, graph, structure, (params, split[0]), (rest, split[1]))

    def filled(self, moving: Any, fixed: Any) -> tuple[tuple[Any, ...], list[Any]]:
        """Nodes of their own with these variables, and the arguments around them."""
        inner = nnx.merge(self.graph, moving[0], fixed[0], copy=True)
        trees, kinds = self.structure
        mine, given = iter(inner), []
        pairs = zip(kinds, moving[1], fixed[1], strict=True)
        leaves = iter([next(mine) if k else (x if w else y) for (k, w), x, y in pairs])
        for tree in trees:
            given.append(
                jax.tree.unflatten(tree, [next(leaves) for _ in range(tree.num_leaves)])
            )
        return inner, given

    def changed(self, inner: tuple[Any, ...], moving: Any) -> Any:
        """The variables that are not differentiated; ValueError if another one was written."""
        moves = [w for node, w in self.structure[1] if node]
        chosen = nnx.All(nnx.Param, lambda path, _: moves[path[0]])
        params, rest = nnx.state(inner, chosen, ...)
        before, after = jax.tree.leaves(moving[0]), jax.tree.leaves(params)
        if any(x is not y for x, y in zip(before, after, strict=True)):
            raise ValueError(
                "nnx.plan: the loss writes an nnx.Param that it is differentiated by: make it a variable of "
                "another type"
            )
        return rest


class _Carried(nnx.Module):
    """A module whose call is transformed; it may take its place in a model."""

    def __init__(self, transform: Callable[[Fn], Fn], module: Any):
        self.module = module
        self._transform = transform

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = lambda module, *args, **kwargs: module(*args, **kwargs)  # noqa: E731
        return _carried(self._transform, call)(self.module, *args, **kwargs)


def _carried(transform: Callable[[Fn], Fn], fn: Any) -> Fn:
    """fn under a transform; the variables of its modules go in as arguments and come out as results."""
    if is_node(fn):
        return _Carried(transform, fn)
    plain, bound, names = _unbound(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = (*bound, *args), {**names, **kwargs}
        leaves, structure = jax.tree.flatten(arguments, is_leaf=is_node)
        nodes = tuple(x for x in leaves if is_node(x))
        # What is no array is closed over: jax.checkpoint would make a traced array of a
        # flag.
        arrays = [x if _is_array(x) else None for x in leaves]
        graph, state = nnx.split(nodes)

        def pure(state: Any, arrays: Any) -> tuple[Any, Any]:
            inner = nnx.merge(graph, state, copy=True)
            mine = iter(inner)
            filled = [
                next(mine) if is_node(x) else (y if _is_array(x) else x)
                for x, y in zip(leaves, arrays, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, filled)
            return plain(*args, **kwargs), nnx.state(inner)

        out, state = transform(pure)(state, arrays)
        nnx.update(nodes, state)
        return out

    return call


def _unbound(fn: Fn) -> tuple[Fn, tuple[Any, ...], dict[str, Any]]:
    """A function and what it is bound to: the module of a method, the arguments of a partial."""
    if isinstance(fn, functools.partial):
        inner, args, kwargs = _unbound(fn.func)
        return inner, (*args, *fn.args), {**kwargs, **fn.keywords}
    owner = getattr(fn, "__self__", None)
    if inspect.ismethod(fn) and is_node(owner):
        return fn.__func__, (owner,), {}
    return fn, (), {}


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)
