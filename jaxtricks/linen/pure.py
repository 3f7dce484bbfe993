"""A linen module as a pure function of plain dictionaries."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
from flax import linen as nn

from jaxtricks._types import ApplyFn, Key, Params, State
from jaxtricks.linen.fused import Fused
from jaxtricks.nnx import pure


def functional(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    train_kwargs: Callable[[bool], Mapping[str, Any]] | Mapping[str, bool] | None = None,
) -> tuple[ApplyFn, Params, State]:
    """The module as (apply, params, state), as `jt.nnx.functional` gives it.

    Args:
      module: any linen module.
      variables: what `module.init` returned.
      train_kwargs: how the module is told to train: a function train -> keyword arguments of its call, or
        the flags in training ({"deterministic": False}; negated in evaluation). None = those of `train`,
        `training`, `is_training`, `deterministic` and `use_running_average` that the call has.

    Returns:
      apply: (params, state, *inputs, train: bool, key=None) -> (y, state); `key` is a typed PRNG key for
        all RNG streams and may be None only if the call draws no random numbers.
      params: variables["params"] as nested dicts.
      state: {collection: ...} of all other variables; the returned state has the same structure.

    Raises:
      ValueError: (from apply) random numbers without `key`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.linen import ExtendedBatchNorm
      >>> norm = ExtendedBatchNorm()
      >>> apply, params, state = functional(norm, norm.init(jax.random.key(0), jnp.ones((2, 3))))
      >>> y, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> sorted(params), sorted(state["batch_stats"])
      (['bias', 'scale'], ['mean', 'var'])
    """
    flags = _train_kwargs(module, train_kwargs)
    state = {name: _plain(tree) for name, tree in variables.items() if name != "params"}

    def apply(
        params: Params, state: State, *inputs: Any, train: bool, key: Key | None = None
    ) -> tuple[Any, State]:
        kwargs = flags(pure.static_train(train))
        rngs = None if key is None else _rngs(pure.checked_key(key))
        try:
            y, updated = module.apply(
                {"params": params, **state}, *inputs, rngs=rngs, mutable=list(state), **kwargs
            )
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                "linen.functional: this call draws random numbers and needs `key`: pass "
                f"key=jax.random.key(...), or train=False ({error})"
            ) from None
        return y, pure.pruned({**state, **_plain(updated)}, state)

    return apply, _plain(variables.get("params", {})), state


def eval_kwargs(module: nn.Module) -> dict[str, Any]:
    """The keyword arguments that tell a module's call to evaluate."""
    return dict(_train_kwargs(module, None)(False))


def _train_kwargs(module: nn.Module, given: Any) -> Callable[[bool], Mapping[str, Any]]:
    if callable(given):
        return given
    if given is None:
        known = {"train": True, "training": True, "is_training": True}
        known |= {"deterministic": False, "use_running_average": False}
        while isinstance(module, Fused):
            module = module.module
        has = inspect.signature(type(module).__call__).parameters
        given = {name: value for name, value in known.items() if name in has}
    if any(not isinstance(value, bool) for value in given.values()):
        raise ValueError(
            f"linen.functional: `train_kwargs` {given} has a value that is no bool; pass a function "
            "train -> keyword arguments"
        )
    return lambda train: {name: value == train for name, value in given.items()}


def _rngs(key: Key) -> dict[str, Key]:
    # Streams of other names fall back on "params" in linen.
    return {
        name: jax.random.fold_in(key, i) for i, name in enumerate(("params", "dropout", "default"))
    }


def _plain(tree: Any) -> Any:
    return flax.core.unfreeze(tree)
