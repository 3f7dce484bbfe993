"""A linen module some of whose layers are computed by plain ones."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
from flax import linen as nn

from jaxtricks import _dtypes
from jaxtricks._arguments import checked
from jaxtricks._typing import ApplyFn, Key, Params, State
from jaxtricks.linen._layers import ExtendedBatchNorm
from jaxtricks.nnx import _conv, _flags, _functional


@dataclasses.dataclass(frozen=True)
class Original:
    """Holds an unbound module."""

    module: nn.Module


class Fused(nn.Module):
    """What `jt.linen.fuse` returns: the module with other layers, under the same paths.

    Its variables are those of a network of plain layers. Where the module would call a
    fused layer, the convolution with the kernel and bias at the layer's path runs; a
    folded normalization passes its input on.

    Attributes:
      original: the module; wrapped, since flax would give a module that is a field
        another path.
      convs: (path, strides and so on as pairs) of the layers that are convolutions now.
      folded: (path, dtype of its output) of the normalizations that are part of a layer
        now.
      biased: paths of linear layers and transposed convolutions that have taken one up:
        they are called with a bias.
    """

    original: Original
    convs: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    folded: tuple[tuple[str, str], ...] = ()
    biased: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The original module."""
        return self.original.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original computes in evaluation mode."""
        convs, folded = dict(self.convs), dict(self.folded)

        def plain(call: Any, inputs: Any, flags: Any, context: Any) -> Any:
            layer, path = context.module, layer_path(context.module)
            if context.method_name != "__call__":
                return call(*inputs, **flags)
            if path in folded:
                return _first(inputs, flags).astype(folded[path])
            if path in self.biased:
                params = {
                    n: layer.get_variable("params", n) for n in ("kernel", "bias")
                }
                alone = layer.clone(use_bias=True, parent=None)
                return alone.apply({"params": params}, *inputs, **flags)
            if path not in convs:
                return call(*inputs, **flags)
            kernel, bias = (layer.get_variable("params", n) for n in ("kernel", "bias"))
            x, how = _first(inputs, flags), dict(convs[path])
            dtype = _dtypes.common_dtype(x, kernel, bias, given=how.pop("dtype"))
            return _conv.convolution(x, kernel, bias, dtype=dtype, **how)

        with nn.intercept_methods(plain):
            return self.module.apply(self.variables, *args, **kwargs)


def _first(inputs: Any, kwargs: Any) -> Any:
    """The input of a layer's call, which may be given by name."""
    return inputs[0] if inputs else next(iter(kwargs.values()))


def layer_path(module: nn.Module) -> str:
    """The path of a bound module."""
    return "/".join(module.path)


# A linen module as a pure function of plain dictionaries.


STATISTICS = "batch_stats"
# What flax raises where a module writes or makes a variable of a collection that is not
# mutable.
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
    train_kwargs: _flags.TrainKwargs = None,
) -> tuple[ApplyFn, Params, State]:
    """The module as (apply, params, state), as `jt.nnx.functional` gives it.

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
        `kwargs` are the call's own; `key` is a typed PRNG key for all RNG streams and
        may be None only if the call draws no random numbers. In training every
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
    call = _Call(module, train_kwargs)
    state = {name: _plain(tree) for name, tree in variables.items() if name != "params"}

    def apply(
        params: Params,
        state: State,
        /,
        *inputs: Any,
        train: bool,
        key: Key | None = None,
        **kwargs: Any,
    ) -> tuple[Any, State]:
        rngs = None if key is None else _rngs(_functional.checked_key(key))
        variables = {"params": params, **state}
        try:
            y, updated = call(
                _functional.static_train(train), variables, inputs, kwargs, rngs
            )
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                "linen.functional: this call draws random numbers and needs `key`: pass "
                f"key=jax.random.key(...), or train=False ({error})"
            ) from None
        return y, _functional.pruned({**state, **_plain(updated)}, state)

    return apply, _plain(variables.get("params", {})), state


class _Call:
    """The call of a module, which is told to train or to evaluate."""

    def __init__(self, module: nn.Module, train_kwargs: _flags.TrainKwargs):
        kind = type(original(module))
        self.kwargs = _flags.mode_rule("linen.functional", kind, train_kwargs)
        self.modules = {train: in_mode(module, train) for train in (True, False)}
        self.finds_flags = train_kwargs is None
        # Then only the collections that are mutable can tell it. What is fused need not
        # be told.
        self.has_none = (
            self.finds_flags
            and not isinstance(module, Fused)
            and self.modules[True] is self.modules[False]
            and not _flags.has_flags(kind)
        )

    def __call__(
        self, train: bool, variables: Any, inputs: Any, kwargs: Any, rngs: Any
    ) -> tuple[Any, Any]:
        """(output, updated variables)."""
        modes: dict[str, bool] = {}
        kwargs = self.kwargs(train, inputs, kwargs)

        def run(mutable: list[str]) -> tuple[Any, Any]:
            with nn.intercept_methods(functools.partial(_note_mode, modes)):
                return self.modules[train].apply(
                    variables, *inputs, rngs=rngs, mutable=mutable, **kwargs
                )

        if train:
            out = run([name for name in variables if name != "params"])
        else:
            out, written = evaluated(run, variables)
            if self.finds_flags and STATISTICS in written:
                raise ValueError(
                    f"linen.functional: with train=False the call still updates {STATISTICS!r}, so it "
                    "trains: pass `train_kwargs`, which says by what arguments the module evaluates"
                )
        if self.has_none:
            _check_modes(train, modes)
        return out


def evaluated(
    run: Callable[[list[str]], tuple[Any, Any]], variables: Mapping[str, Any]
) -> tuple[tuple[Any, Any], set[str]]:
    """(run(mutable), mutable) with no collection mutable but those that the call writes.

    Modules that train where their statistics are mutable evaluate then; a cache of
    decoding is written.
    """
    written: set[str] = set()
    while True:
        try:
            return run(sorted(written)), written
        except _IMMUTABLE as error:
            # The error has the name in its text alone.
            others = [
                name for name in variables if name != "params" and name not in written
            ]
            new = {name for name in others if f'collection "{name}"' in str(error)}
            if not new:
                raise
            written |= new


def in_mode(module: nn.Module, train: bool) -> nn.Module:
    """The module with those of its attributes set that are flags and that its call does not have."""
    if isinstance(module, Fused):
        inner = in_mode(module.module, train)
        return (
            module if inner is module.module else module.clone(original=Original(inner))
        )
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__}
    own = _flags.attribute_flags(fields, train)
    parameters = _flags.open_parameters(type(module), (), {})
    changes: dict[str, Any] = {
        n: value for n, value in own.items() if n not in parameters
    }
    return module.clone(**changes) if changes else module


def original(module: nn.Module) -> nn.Module:
    """The module that was fused, or the module itself."""
    while isinstance(module, Fused):
        module = module.module
    return module


def layer_trains(
    layer: Any, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool | None:
    """Whether a normalization or dropout trains in this call; None for other layers."""
    if isinstance(layer, nn.BatchNorm | ExtendedBatchNorm):
        flag, at = "use_running_average", 1
    elif isinstance(layer, nn.Dropout) and layer.rate > 0:
        flag, at = "deterministic", 1
    else:
        return None
    value = kwargs.get(flag, inputs[at] if len(inputs) > at else None)
    value = getattr(layer, flag) if value is None else value
    return value is not True


def _note_mode(
    modes: dict[str, bool], call: Any, inputs: Any, kwargs: Any, context: Any
) -> Any:
    trains = layer_trains(context.module, inputs, kwargs)
    if context.method_name == "__call__" and trains is not None:
        modes["/".join(context.module.path)] = trains
    return call(*inputs, **kwargs)


def _check_modes(train: bool, modes: Mapping[str, bool]) -> None:
    """Raise if `train` did not reach the layers: all evaluate in training, or one trains in evaluation."""
    wrong = [path for path, trains in modes.items() if trains != train]
    if wrong and (not train or len(wrong) == len(modes)):
        raise ValueError(
            f"linen.functional: {min(wrong)!r} {'evaluates' if train else 'trains'} with train={train}, "
            "since neither an argument of the module's call nor an attribute of it is a known flag: pass "
            "`train_kwargs`, or {} if it is meant to stay so"
        )


def _rngs(key: Key) -> dict[str, Key]:
    # Streams of other names fall back on "params" in linen.
    return {
        name: jax.random.fold_in(key, i)
        for i, name in enumerate(("params", "dropout", "default"))
    }


def _plain(tree: Any) -> Any:
    return flax.core.unfreeze(tree)
