"""A module as a pure function of plain dictionaries: what every transform of this library works on."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxtricks import _compat, _jaxpr, _tree
from jaxtricks._types import ApplyFn, Key, Params, State

_REST = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))


def functional(model: nnx.Module) -> tuple[ApplyFn, Params, State]:
    """The model as (apply, params, state).

    y, state = apply(params, state, *inputs, train=True, key=key). `apply` is pure: use it under jit, grad,
    vmap, scan and jax.checkpoint. The model itself is not changed, and later changes of it are not seen.

    Args:
      model: any module. `train` sets what `model.train()` and `model.eval()` set (`deterministic`,
        `use_running_average`).

    Returns:
      apply: (params, state, *inputs, train: bool, key=None) -> (y, state). `key` is a typed PRNG key that
        replaces the model's own RNG keys, a different one for every stream; it may be None only if the
        call draws no random numbers.
      params: nested dict of all nnx.Param arrays, {"block": {0: {"kernel": ...}}}.
      state: nested dict of all other variables: batch statistics, caches, RNG counts. The returned state
        has the same structure; variables that a call creates (sown intermediates) are not in it.

    Raises:
      ValueError: (from apply) random numbers without `key`, or a tree of another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> apply, params, state = functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> y, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> sorted(params), sorted(state)
      (['bias', 'scale'], ['mean', 'var'])
    """
    model = nnx.clone(model)
    params, state = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, _REST))
    return _Functional(model).apply, params, state


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

    def __init__(self, model: nnx.Module):
        model.train()
        train, *_ = split = nnx.split(model, nnx.Param, nnx.RngKey, _REST)
        model.eval()
        self.graphs = {True: train, False: nnx.split(model, nnx.Param, nnx.RngKey, _REST)[0]}
        params, keys, rest = split[1:]
        # Shapes only: arrays that the caller donates or drops must not be kept alive here.
        self.params_like, self.keys_like, self.state_like = map(_abstract, (params, keys, rest))
        self.random = bool(jax.tree.leaves(self.keys_like))

    def apply(
        self, params: Params, state: State, *inputs: Any, train: bool, key: Key | None = None
    ) -> tuple[Any, State]:
        _check("params", params, self.params_like)
        _check("state", state, self.state_like)
        graph = self.graphs[static_train(train)]
        keys = self._keys(key)

        def run() -> tuple[Any, State]:
            return self._run(graph, keys, params, state, inputs)

        if key is None and self.random:
            _refuse_random(run)
        return run()

    def _run(
        self, graph: Any, keys: Any, params: Params, state: State, inputs: tuple[Any, ...]
    ) -> tuple[Any, State]:
        # Variables are made here, in the trace that uses them.
        module = nnx.merge(
            graph,
            _filled(self.params_like, params),
            jax.tree.unflatten(jax.tree.structure(self.keys_like), keys),
            _filled(self.state_like, state),
        )
        y = module(*inputs)
        return y, pruned(nnx.to_pure_dict(nnx.state(module, _REST)), state)

    def _keys(self, key: Key | None) -> list[Key]:
        """One key for every stream of the model, stacked streams included."""
        # Without a key it is never drawn from: see `_refuse_random`.
        key = jax.random.key(0) if key is None else checked_key(key)
        shapes = [leaf.shape for leaf in jax.tree.leaves(self.keys_like)]
        return [_split(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]


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
    """`train`, or an error if it is traced or no bool."""
    if not isinstance(train, bool):
        raise ValueError("functional: `train` must be a Python bool: make it static under jit")
    return train


def checked_key(key: Any) -> Key:
    """`key`, or an error if it is no typed PRNG key."""
    if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError("functional: `key` is no typed PRNG key; make it with jax.random.key")
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
