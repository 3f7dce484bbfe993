"""A module as a pure function of plain dictionaries: what every transform of this library works on."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxtricks import _compat, _jaxpr, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import ApplyFn, Key, Params, State
from jaxtricks.nnx import _compat as nnx_compat
from jaxtricks.nnx import _flags

_REST = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))


@checked
def functional(
    model: nnx.Module, *, train_kwargs: _flags.TrainKwargs = None
) -> tuple[ApplyFn, Params, State]:
    """The model as (apply, params, state).

    y, state = apply(params, state, *inputs, train=True, key=key). `apply` is pure: use it under jit, grad,
    vmap, scan and jax.checkpoint. The model itself is not changed, and later changes of it are not seen.

    Args:
      model: any module. `train` sets what `model.train()` and `model.eval()` set (`deterministic`,
        `use_running_average`), attributes of the model's own such as `training`, and the flags of its call.
      train_kwargs: how the call is told to train: a function train -> keyword arguments, or the flags in
        training ({"is_test": False}; negated in evaluation). None = those of `train`, `training`,
        `is_training`, `is_train`, `deterministic`, `use_running_average` and `inference` that the call has
        and that the arguments of `apply` leave open.

    Returns:
      apply: (params, state, *inputs, train: bool, key=None, **kwargs) -> (y, state). `kwargs` are the
        call's own. `key` is a typed PRNG key that replaces the model's own RNG keys, a different one for
        every stream, and makes the `rngs` of a call that has such an argument; it may be None only if the
        call draws no random numbers.
      params: nested dict of all nnx.Param arrays, {"block": {0: {"kernel": ...}}}.
      state: nested dict of all other variables: batch statistics, caches, RNG counts. The returned state
        has the same structure; variables that a call creates (sown intermediates) are not in it.

    Raises:
      ValueError: (from apply) random numbers without `key`, a tree of another structure, or an argument of
        the call that looks like a flag (`is_test`) of which neither `train_kwargs` nor the caller speaks.

    Example:
      >>> import jax.numpy as jnp
      >>> apply, params, state = functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> y, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> sorted(params), sorted(state)
      (['bias', 'scale'], ['mean', 'var'])
    """
    model = nnx.clone(model)
    params, state = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, _REST))
    return _Functional(model, train_kwargs).apply, params, state


@checked
def filled(model: nnx.Module, params: Params, state: State) -> Any:
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
      >>> filled(model, params, state).mean[...].tolist() == state["mean"].tolist()
      True
    """
    graph, old_params, keys, old_state = nnx.split(model, nnx.Param, nnx.RngKey, _REST)
    for name, given, like in (("params", params, old_params), ("state", state, old_state)):
        _check(name, given, like)
    return nnx.merge(graph, _filled(old_params, params), keys, _filled(old_state, state), copy=True)


class _Functional:
    """The static part of a model, and how to run it on given variables; changes the model's mode."""

    def __init__(self, model: nnx.Module, train_kwargs: _flags.TrainKwargs):
        self.kind = type(model)
        self.kwargs = _flags.mode_rule("nnx.functional", self.kind, train_kwargs)
        _set_mode(model, train=True)
        train, *_ = split = nnx.split(model, nnx.Param, nnx.RngKey, _REST)
        _set_mode(model, train=False)
        self.graphs = {True: train, False: nnx.split(model, nnx.Param, nnx.RngKey, _REST)[0]}
        params, keys, rest = split[1:]
        # Shapes only: arrays that the caller donates or drops must not be kept alive here.
        self.params_like, self.keys_like, self.state_like = map(_abstract, (params, keys, rest))
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
        return [_split(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]


def call_rngs(
    kind: type, inputs: Sequence[Any], kwargs: Mapping[str, Any], key: Key | None
) -> dict[str, Any]:
    """{"rngs": ...} for a call that takes nnx.Rngs and was given none; made in the trace that uses them.

    Without a key it is None where the call insists on the argument: then nothing may be drawn.
    """
    parameter = _flags.open_parameters(kind, inputs, kwargs).get("rngs")
    if parameter is None or (key is None and parameter.default is not inspect.Parameter.empty):
        return {}
    # Another key than those of the model's own streams, which have the small numbers.
    return {"rngs": None if key is None else nnx.Rngs(jax.random.fold_in(key, 2**31 - 1))}


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
    return _compat.primitive(eqn).startswith(("random_bits", "random_fold_in", "random_split"))


def static_train(train: Any) -> bool:
    """`train`, or an error if it is traced or not a bool."""
    if not isinstance(train, bool):
        raise ValueError("functional: `train` must be a Python bool: make it static under jit")
    return train


def checked_key(key: Any) -> Key:
    """`key`, or an error if it is not a typed PRNG key."""
    if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError("functional: `key` is not a typed PRNG key; make it with jax.random.key")
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
