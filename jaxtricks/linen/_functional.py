"""Turn a linen module into a pure function of plain dictionaries."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
from flax import linen as nn

from jaxtricks import _layers
from jaxtricks._arguments import checked
from jaxtricks._typing import ApplyFn, Key, Params, State
from jaxtricks.linen._layers import ExtendedBatchNorm
from jaxtricks.linen._substitution import (
    SubstitutedModule,
    original,
    substituted,
)
from jaxtricks.linen._variables import layer_path

STATISTICS = "batch_stats"
# What Flax raises where a module writes or creates a variable of a collection that is
# not mutable.
_IMMUTABLE = (
    flax.errors.ModifyScopeVariableError,
    flax.errors.ScopeVariableNotFoundError,
    flax.errors.ScopeCollectionNotFound,
)


@checked
def functional(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    train_kwargs: _layers.TrainKwargs = None,
) -> tuple[ApplyFn, Params, State]:
    """Return the module as (apply, params, state), like `jt.nnx.functional`.

    Args:
      module: any linen module.
      variables: what `module.init` returned.
      train_kwargs: how the module is told to train: a function train -> keyword
        arguments of its call, or the flags in training ({"is_test": False}; negated in
        evaluation). None = those of `train`, `training`, `is_training`, `is_train`,
        `deterministic`, `use_running_average` and `inference` that the call has and the
        arguments of `apply` leave open, else that are attributes of the module.

    Returns:
      apply: (params, state, *inputs, train: bool, key=None, **kwargs) -> (y, state).
        `kwargs` are those of the call; `key` is a typed PRNG key for all RNG streams
        and may be None only if the call draws no random numbers. In training every
        collection of `state` is mutable, in evaluation those alone that the call
        writes, such as a cache: a module may decide by `is_mutable_collection`.
      params: variables["params"] as nested dicts.
      state: {collection: ...} of all other variables; the returned state has the same
        structure.

    Raises:
      ValueError: (from apply) random numbers without `key`, or, without `train_kwargs`,
        a `train` that does not reach the module: statistics that move in evaluation, or
        no flag by which it could.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.linen import ExtendedBatchNorm
      >>> norm = ExtendedBatchNorm()
      >>> apply, params, state = functional(norm, norm.init(jax.random.key(0), jnp.ones((2, 3))))
      >>> y, state = apply(params, state, jnp.ones((2, 3)), train=True)
      >>> sorted(params), sorted(state["batch_stats"])
      (['bias', 'scale'], ['mean', 'var'])
    """
    # The modules for both modes are built once, not in every step.
    call = _Call(module, train_kwargs)
    initial_state = {
        name: flax.core.unfreeze(tree)
        for name, tree in variables.items()
        if name != "params"
    }

    def apply(
        params: Params,
        state: State,
        /,
        *inputs: Any,
        train: bool,
        key: Key | None = None,
        **kwargs: Any,
    ) -> tuple[Any, State]:
        train = _layers.static_train(train)
        rngs = None if key is None else _rngs(_layers.checked_key(key))
        variables = {"params": params, **state}
        try:
            y, updated = call(train, variables, inputs, kwargs, rngs)
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                "linen.functional: this call draws random numbers and needs "
                f"`key`: pass key=jax.random.key(...), or train=False ({error})"
            ) from None
        return y, _layers.pruned(
            {**state, **flax.core.unfreeze(updated)}, state
        )

    return apply, flax.core.unfreeze(variables.get("params", {})), initial_state


class _Call:
    """The call of a module, which is told to train or to evaluate."""

    def __init__(self, module: nn.Module, train_kwargs: _layers.TrainKwargs):
        cls = type(original(module))
        self.kwargs = _layers.mode_rule("linen.functional", cls, train_kwargs)
        self.modules = {
            train: in_mode(module, train) for train in (True, False)
        }
        self.finds_flags = train_kwargs is None
        # Without flags only the collections that are mutable tell the module to train;
        # a fused one does not train at all.
        is_fused = isinstance(module, SubstitutedModule) and module.is_fused
        has_attribute_flags = self.modules[True] is not self.modules[False]
        self.has_no_flags = (
            self.finds_flags
            and not is_fused
            and not has_attribute_flags
            and not _layers.has_flags(cls)
        )

    def __call__(
        self, train: bool, variables: Any, inputs: Any, kwargs: Any, rngs: Any
    ) -> tuple[Any, Any]:
        """Return the output and the updated variables."""
        modes: dict[str, bool] = {}
        kwargs = self.kwargs(train, inputs, kwargs)

        def run(mutable: list[str]) -> tuple[Any, Any]:
            with nn.intercept_methods(functools.partial(_note_mode, modes)):
                return self.modules[train].apply(
                    variables, *inputs, rngs=rngs, mutable=mutable, **kwargs
                )

        # A module may decide by what is mutable, so evaluation starts with nothing.
        if train:
            out = run([name for name in variables if name != "params"])
        else:
            out, written = evaluated(run, variables)
            if self.finds_flags and STATISTICS in written:
                raise ValueError(
                    "linen.functional: with train=False the call still updates "
                    f"{STATISTICS!r}, so it trains: pass `train_kwargs`, which "
                    "says by what arguments the module evaluates"
                )
        if self.has_no_flags:
            _check_modes(train, modes)
        return out


def evaluated(
    run: Callable[[list[str]], tuple[Any, Any]], variables: Mapping[str, Any]
) -> tuple[tuple[Any, Any], set[str]]:
    """Return (run(mutable), mutable), where only what the call writes is mutable.

    Modules that train where their statistics are mutable evaluate then; a cache of
    decoding is written.
    """
    written: set[str] = set()
    while True:
        try:
            return run(sorted(written)), written
        except _IMMUTABLE as error:
            # The error has the name of the collection in its text alone.
            others = {name for name in variables if name != "params"} - written
            new = {
                name for name in others if f'collection "{name}"' in str(error)
            }
            if not new:
                raise
            written |= new


def in_mode(module: nn.Module, train: bool) -> nn.Module:
    """Return the module with the flags set that are attributes, and not of its call."""
    if isinstance(module, SubstitutedModule):
        inner = in_mode(original(module), train)
        if inner is original(module):
            return module
        return substituted(inner, module.layers, is_fused=module.is_fused)
    # A flag that the call has too is the call's to set.
    fields = {
        name: getattr(module, name) for name in module.__dataclass_fields__
    }
    parameters = _layers.open_parameters(type(module), (), {})
    flags = _layers.attribute_flags(fields, train)
    changes: dict[str, Any] = {
        n: v for n, v in flags.items() if n not in parameters
    }
    return module.clone(**changes) if changes else module


def layer_trains(
    layer: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """Return whether a normalization or dropout trains in a call; None for others."""
    if isinstance(layer, nn.BatchNorm | ExtendedBatchNorm):
        flag = "use_running_average"
    elif isinstance(layer, nn.Dropout) and layer.rate > 0:
        flag = "deterministic"
    else:
        return None
    value = kwargs.get(flag, inputs[1] if len(inputs) > 1 else None)
    value = getattr(layer, flag) if value is None else value
    return value is not True


def _note_mode(
    modes: dict[str, bool], call: Any, inputs: Any, kwargs: Any, context: Any
) -> Any:
    trains = layer_trains(context.module, inputs, kwargs)
    if context.method_name == "__call__" and trains is not None:
        modes[layer_path(context.module)] = trains
    return call(*inputs, **kwargs)


def _check_modes(train: bool, modes: Mapping[str, bool]) -> None:
    """Raise if `train` did not reach the layers.

    That is if all evaluate in training, or one trains in evaluation.
    """
    wrong = [path for path, trains in modes.items() if trains != train]
    if wrong and (not train or len(wrong) == len(modes)):
        does = "evaluates" if train else "trains"
        raise ValueError(
            f"linen.functional: {min(wrong)!r} {does} with train={train}, "
            "since neither "
            "an argument of the module's call nor an attribute of it is a known flag: "
            "pass `train_kwargs`, or {} if it is meant to stay so"
        )


def _rngs(key: Key) -> dict[str, Key]:
    # Streams of other names fall back on "params" in linen.
    names = ("params", "dropout", "default")
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}
