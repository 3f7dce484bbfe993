"""Turn a module into a pure function of plain dictionaries, and back."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxtricks import _jaxpr, _layers, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import ApplyFn, Key, Params, State
from jaxtricks.nnx import _compat as nnx_compat

_REST = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))


@checked
def functional(
    model: nnx.Module, *, train_kwargs: _layers.TrainKwargs = None
) -> tuple[ApplyFn, Params, State]:
    """Return the model as (apply, params, state).

    y, state = apply(params, state, *inputs, train=True, key=key). `apply` is pure: use
    it under jit, grad, vmap, scan and jax.checkpoint. The model itself is not changed,
    and later changes of it have no effect.

    Args:
      model: any module. `train` sets what `model.train()` and `model.eval()` set
        (`deterministic`, `use_running_average`), attributes of its modules such as
        `training`, and the flags of its call.
      train_kwargs: how the call is told to train: a function train -> keyword
        arguments, or the flags in training ({"is_test": False}; negated in evaluation).
        None = those of `train`, `training`, `is_training`, `is_train`, `deterministic`,
        `use_running_average` and `inference` that the call has and that the arguments
        of `apply` leave open.

    Returns:
      apply: (params, state, *inputs, train: bool, key=None, **kwargs) -> (y, state).
        `kwargs` are those of the call. `key` is a typed PRNG key that replaces the RNG
        keys of the model, a different one for every stream, and makes the `rngs` of a
        call that has such an argument; it may be None only if the call draws no random
        numbers.
      params: nested dict of all nnx.Param arrays, {"block": {0: {"kernel": ...}}}.
      state: nested dict of all other variables: batch statistics, caches, RNG counts.
        The returned state has the same structure; variables that a call creates (sown
        intermediates) are not in it.

    Raises:
      ValueError: (from apply) random numbers without `key`, a tree of another
        structure, or an argument of the call that looks like a flag (`is_test`) which
        neither `train_kwargs` nor the caller names.

    Example:
      >>> import jax.numpy as jnp
      >>> apply, params, state = functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> y, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> sorted(params), sorted(state)
      (['bias', 'scale'], ['mean', 'var'])
    """
    model = nnx.clone(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = nnx.to_pure_dict(nnx.state(model, _REST))
    return _Functional(model, train_kwargs).apply, params, state


@checked
def with_variables(model: nnx.Module, params: Params, state: State) -> Any:
    """Return the module with trained variables: the way back from `functional`.

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
    graph, old_params, keys, old_state = nnx.split(
        model, nnx.Param, nnx.RngKey, _REST
    )
    _check_structure("params", params, old_params)
    _check_structure("state", state, old_state)
    return nnx.merge(
        graph,
        _with_values(old_params, params),
        keys,
        _with_values(old_state, state),
        copy=True,
    )


class _Functional:
    """Holds the static part of a model, and runs it on the variables of the caller.

    It sets the mode of the model that it is given.
    """

    def __init__(self, model: nnx.Module, train_kwargs: _layers.TrainKwargs):
        self.cls = type(model)
        self.kwargs = _layers.mode_rule(
            "nnx.functional", self.cls, train_kwargs
        )
        _set_mode(model, train=True)
        train_graph, params, keys, rest = nnx.split(
            model, nnx.Param, nnx.RngKey, _REST
        )
        _set_mode(model, train=False)
        eval_graph, *_ = nnx.split(model, nnx.Param, nnx.RngKey, _REST)
        self.graphs = {True: train_graph, False: eval_graph}
        # Shapes only: arrays that the caller donates or drops must not stay alive here.
        self.params_like = _abstract(params)
        self.keys_like = _abstract(keys)
        self.state_like = _abstract(rest)
        self.has_streams = bool(jax.tree.leaves(self.keys_like))

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
        _check_structure("params", params, self.params_like)
        _check_structure("state", state, self.state_like)
        graph = self.graphs[_layers.static_train(train)]
        # The keys of the model are not in its state: the caller's replaces them.
        keys, kwargs = self._keys(key), self.kwargs(train, inputs, kwargs)

        def run() -> tuple[Any, State]:
            rngs = call_rngs(self.cls, inputs, kwargs, key)
            return self._run(
                graph, keys, params, state, inputs, {**kwargs, **rngs}
            )

        if key is None and self.has_streams:
            _refuse_random_numbers(run)
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
        # The variables are created here, in the trace that uses them.
        module: Any = nnx.merge(
            graph,
            _with_values(self.params_like, params),
            jax.tree.unflatten(jax.tree.structure(self.keys_like), keys),
            _with_values(self.state_like, state),
        )
        # Whatever the call creates is dropped: the state keeps its structure.
        y = module(*inputs, **kwargs)
        new_state = nnx.to_pure_dict(nnx.state(module, _REST))
        return y, _layers.pruned(new_state, state)

    def _keys(self, key: Key | None) -> list[Key]:
        """Return one key for every stream of the model, stacked streams included."""
        # Nothing is drawn from the stand-in: see `_refuse_random_numbers`.
        key = jax.random.key(0) if key is None else _layers.checked_key(key)
        keys = []
        for i, leaf in enumerate(jax.tree.leaves(self.keys_like)):
            stream = jax.random.fold_in(key, i)
            keys.append(
                jax.random.split(stream, leaf.shape) if leaf.shape else stream
            )
        return keys


def call_rngs(
    cls: type, inputs: Sequence[Any], kwargs: Mapping[str, Any], key: Key | None
) -> dict[str, Any]:
    """Return {"rngs": ...} for a call that takes nnx.Rngs and is not given any.

    Without a key it is None where the call insists on the argument: nothing may be
    drawn then. Call this in the trace that uses the streams.
    """
    parameter = _layers.open_parameters(cls, inputs, kwargs).get("rngs")
    if parameter is None:
        return {}
    if key is None:
        is_required = parameter.default is inspect.Parameter.empty
        return {"rngs": None} if is_required else {}
    # Not one of the keys of the model's streams, which have the small numbers.
    return {"rngs": nnx.Rngs(jax.random.fold_in(key, 2**31 - 1))}


def _set_mode(model: nnx.Module, *, train: bool) -> None:
    """Set the mode, as `model.train()` does, and flags that are attributes."""
    # Not model.train(), since the model may have an attribute of this name.
    (nnx.Module.train if train else nnx.Module.eval)(model)
    for _, module in nnx_compat.modules(model):
        # Not by hasattr, since every module has a method `train`.
        for name, value in _layers.attribute_flags(vars(module), train).items():
            setattr(module, name, value)


def _refuse_random_numbers(run: Callable[[], Any]) -> None:
    def arrays() -> list[Any]:
        return [
            leaf
            for leaf in jax.tree.leaves(run())
            if isinstance(leaf, jax.Array)
        ]

    closed, _ = _jaxpr.trace(arrays)
    if any(map(_draws, _jaxpr.walk(closed.jaxpr))):
        raise ValueError(
            "nnx.functional: this call draws random numbers and needs `key`: "
            "pass key=jax.random.key(...), or train=False"
        )


def _draws(eqn: Any) -> bool:
    prefixes = ("random_bits", "random_fold_in", "random_split")
    return _jaxpr.primitive(eqn).startswith(prefixes)


def _check_structure(name: str, tree: Any, like: Any) -> None:
    expected = {path for path, _ in _tree.leaves_with_paths(like)}
    actual = {path for path, _ in _tree.leaves_with_paths(tree)}
    if expected != actual:
        path = min(expected ^ actual)
        problem = "is missing" if path in expected else "does not belong there"
        raise ValueError(
            f"nnx: in `{name}` {path!r} {problem}; pass a tree like the one "
            "functional returned"
        )


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def _with_values(shapes: Any, values: Any) -> Any:
    state = jax.tree.map(lambda x: x, shapes)  # a copy
    nnx.replace_by_pure_dict(state, values)
    return state
