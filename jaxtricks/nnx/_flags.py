"""How a model is told to train or to evaluate: the arguments of its call, and attributes of its modules."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TrainKwargs = Callable[[bool], Mapping[str, Any]] | Mapping[str, bool] | None

FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "is_train": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}
"""{name of a flag: its value in training}."""

_LOOKS = re.compile(
    r"(^|_)(train|training|test|testing|eval|evaluate|evaluation|infer|inference)(_|$)"
)


def mode_rule(
    name: str, kind: type, train_kwargs: TrainKwargs
) -> Callable[[bool, Sequence[Any], Mapping[str, Any]], dict[str, Any]]:
    """(train, inputs, kwargs) -> all keyword arguments of the call; what the caller passed itself wins.

    Args:
      name: of the public function, for the error.
      kind: class of the model.
      train_kwargs: as `functional` takes it; None = the call's own flags.
    """
    if callable(train_kwargs):
        return lambda train, inputs, kwargs: {**train_kwargs(train), **kwargs}
    if train_kwargs is None:
        return lambda train, inputs, kwargs: {
            **call_flags(kind, train, inputs, kwargs),
            **kwargs,
        }
    if any(not isinstance(value, bool) for value in train_kwargs.values()):
        raise ValueError(
            f"{name}: `train_kwargs` {train_kwargs} has a value that is not a bool; pass a function "
            "train -> keyword arguments"
        )
    fixed = dict(train_kwargs)
    return lambda train, inputs, kwargs: {
        **{flag: value == train for flag, value in fixed.items()},
        **kwargs,
    }


def call_flags(
    kind: type, train: bool, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, bool]:
    """The flags of a call that its arguments leave open, set for this mode.

    Raises:
      ValueError: an open argument that looks like a flag by a name that is not known.
    """
    names = open_parameters(kind, inputs, kwargs)
    for name, parameter in names.items():
        if (
            name not in FLAGS
            and isinstance(parameter.default, bool)
            and _LOOKS.search(name)
        ):
            raise ValueError(
                f"the call of {kind.__name__} has an argument `{name}` that looks like a flag of training "
                "but is not known: give it, in `example_kwargs` to fuse, or say in `train_kwargs` what it is"
            )
    return {
        flag: value == train
        for flag, value in FLAGS.items()
        if _is_switch(names.get(flag))
    }


def has_flags(kind: type) -> bool:
    """Whether the call itself can be told to train."""
    names = open_parameters(kind, (), {})
    return any(_is_switch(names.get(flag)) for flag in FLAGS)


def open_parameters(
    kind: type, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    """The parameters of a class's call that these arguments leave to their defaults, by name."""
    try:
        signature = inspect.signature(kind.__call__)
        given = signature.bind_partial(None, *inputs, **kwargs).arguments
    except (TypeError, ValueError):  # the call itself will say what is wrong with them
        return {}
    return {name: p for name, p in signature.parameters.items() if name not in given}


def attribute_flags(attributes: Mapping[str, Any], train: bool) -> dict[str, bool]:
    """Those of a module's attributes that are flags, set for this mode."""
    return {
        flag: value == train
        for flag, value in FLAGS.items()
        if isinstance(attributes.get(flag), bool)
    }


def _is_switch(parameter: inspect.Parameter | None) -> bool:
    if parameter is None:
        return False
    default = parameter.default
    return default is parameter.empty or default is None or isinstance(default, bool)
