"""Share what layers of flax.nnx and flax.linen have in common, without importing Flax.

`jt.nnx` and `jt.linen` build their modules from these functions and tables, so that the
meaning of a train flag and the rules of `convert` stand in one place. What also needs a
function of a room is in `_layer_functions`, the tables of blocks in `_block_tables`.
"""

import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _dtypes, _integers
from jaxtricks._typing import Array, Key

Size = tuple[int, ...]
Initializer = Callable[..., Any]
Factory = Callable[..., Any]


def check_groups(name: str, ins: int, outs: int, groups: int) -> None:
    """Raise ValueError unless `groups` divides both numbers of features."""
    if groups < 1 or ins % groups or outs % groups:
        raise ValueError(
            f"{name}: `feature_group_count` is {groups}, which does not divide "
            f"both {ins} and {outs} features"
        )


# Arguments of convolutions.


def conv_kernel_shape(
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """Return [*kernel_size, in / groups, out], the shape of WSConv's kernel."""
    check_groups("WSConv", in_features, out_features, groups)
    size = _integers.listed(kernel_size)
    return (*size, in_features // groups, out_features)


def hashable_padding(padding: str | int | Sequence[Any]) -> Any:
    """Return the padding with tuples in place of lists, to be a static attribute."""
    if isinstance(padding, str):
        return padding
    if _integers.is_integer(padding):
        return _integers.plain(padding)
    return tuple(map(_integers.plain, padding))


def unit_variance_init() -> Initializer:
    """Return normal initialization with variance 1 / fan_in.

    It is that of normalizer-free networks for convolutions; the columns of a head's
    kernel then have norms near 1.
    """
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def unwrap_partial(factory: Factory) -> tuple[Factory, dict[str, Any]]:
    """Return what a factory is a `functools.partial` of, and the bound keywords."""
    keywords: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        # An outer partial wins over the one that it wraps.
        keywords = {**factory.keywords, **keywords}
        factory = factory.func
    return factory, keywords


def parameters_of(factory: Factory) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function or of a class's constructor, by name.

    For a class that passes **kwargs on, those of its base classes are included.
    """
    if not isinstance(factory, type):
        return inspect.signature(factory).parameters
    collected: dict[str, inspect.Parameter] = {}
    # `inspect.signature` of a module class would describe the metaclass.
    for cls in factory.__mro__:
        init = vars(cls).get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters
        collected = {**parameters, **collected}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return collected


# Running statistics and the arithmetic of heads.


def statistics_dtype(param_dtype: Any) -> Any:
    """Return float32, or float64 where the parameters are float64."""
    return _dtypes.wide_dtype(jax.ShapeDtypeStruct((), param_dtype))


def use_running_statistics(
    in_call: bool | None, in_module: bool | None, name: str
) -> bool:
    """Return the setting of the call, or that of the module where the call has none.

    Args:
      in_call: `use_running_average` of the call.
      in_module: `use_running_average` of the module.
      name: of the layer, for the error.

    Raises:
      ValueError: neither is set.
    """
    setting = in_module if in_call is None else in_call
    if setting is None:
        raise ValueError(
            f"{name} needs `use_running_average`: give it in the call or the "
            "constructor, or use model.train() / model.eval()"
        )
    return setting


def moving_mean(
    mean: Array, x: Array, momentum: float, axis_name: Any
) -> Array:
    """Return momentum * mean + (1 - momentum) * (mean of x per channel).

    Args:
      mean: [C].
      x: [..., C].
      momentum: weight of the old mean.
      axis_name: mapped axes over which the mean of x is shared, or None.
    """
    # The mean is no path for gradients.
    x = jax.lax.stop_gradient(x)
    x = x.astype(_dtypes.wide_dtype(x))
    x = x.reshape(-1, x.shape[-1])
    batch_mean = jnp.mean(x, axis=0)
    if axis_name is not None:
        batch_mean = jax.lax.pmean(batch_mean, axis_name)
    batch_mean = batch_mean.astype(mean.dtype)
    return momentum * mean + (1 - momentum) * batch_mean


def affine(x: Array, kernel: Array, bias: Array | None, dtype: Any) -> Array:
    """Return x @ kernel + bias, multiplied in `dtype` and summed in float32 or wider."""
    wide = statistics_dtype(dtype)
    x = x.astype(dtype)
    kernel = kernel.astype(dtype)
    y = jnp.matmul(x, kernel, preferred_element_type=wide)
    if bias is None:
        return y
    # With singleton axes, since adding arrays of other ranks may be an error.
    return y + per_channel(bias.astype(wide), y.ndim)


def per_channel(values: Array, rank: int, axis: int = -1) -> Array:
    """Return values [C] with singleton axes around them, to lie along one of `rank` axes."""
    shape = [1] * rank
    shape[axis] = values.shape[-1]
    return values.reshape(shape)


def average_pool(x: Array, size: Size, strides: Size, dilation: Size) -> Array:
    """Return the mean over windows of x [..., *spatial, C], without padding."""
    lead = (1,) * (x.ndim - len(size) - 1)
    zero = x.dtype.type(0)  # a constant, or the sum has no gradient under jit
    total = jax.lax.reduce_window(
        x,
        zero,
        jax.lax.add,
        window_dimensions=(*lead, *size, 1),
        window_strides=(*lead, *strides, 1),
        padding="VALID",
        window_dilation=(*lead, *dilation, 1),
    )
    count = jnp.asarray(math.prod(size), x.dtype)
    return total / count


# Equations of einsum layers.


def split_equation(equation: str) -> tuple[str, str, str]:
    """Return (inputs, kernel, outputs) of an einsum layer's equation."""
    inputs, kernel, outputs = (
        equation.replace(" ", "").replace("->", ",").split(",")
    )
    return inputs, kernel, outputs


def einsum_bias_shape(
    equation: str, kernel_shape: Sequence[int]
) -> tuple[int, ...]:
    """Return the sizes of the axes that kernel and output share, in the output's order."""
    _, kernel, outputs = split_equation(equation)
    sizes = dict(zip(kernel, kernel_shape, strict=False))
    return tuple(sizes[letter] for letter in outputs if letter in sizes)


def einsum_channel_axis(equation: str) -> int:
    """Return the axis of the kernel, from its end, that is the last axis of the output.

    Raises:
      ValueError: the kernel does not have it.
    """
    _, kernel, outputs = split_equation(equation)
    if not outputs or "." in kernel or outputs[-1] not in kernel:
        raise ValueError(
            f"has an output whose last axis is not an axis of its kernel ({equation})"
        )
    return kernel.index(outputs[-1]) - len(kernel)


# Flags by which a model is told to train or to evaluate.


TrainKwargs = Callable[[bool], Mapping[str, Any]] | Mapping[str, bool] | None
ModeRule = Callable[[bool, Sequence[Any], Mapping[str, Any]], dict[str, Any]]
"""(train, inputs, kwargs) -> all keyword arguments of a call."""

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

_LOOKS_LIKE_A_FLAG = re.compile(
    r"(^|_)(train|training|test|testing|eval|evaluate|evaluation|infer|inference)(_|$)"
)


def mode_rule(name: str, cls: type, train_kwargs: TrainKwargs) -> ModeRule:
    """Return how to make the keyword arguments of a call that trains or evaluates.

    What the caller passes takes precedence.

    Args:
      name: of the public function, for the error.
      cls: class of the model.
      train_kwargs: as `functional` takes it; None = the flags that the call has.

    Raises:
      ValueError: `train_kwargs` is a mapping with a value that is not a bool.
    """
    if callable(train_kwargs):
        return lambda train, inputs, kwargs: {**train_kwargs(train), **kwargs}
    if train_kwargs is None:
        return lambda train, inputs, kwargs: {
            **call_flags(cls, train, inputs, kwargs),
            **kwargs,
        }
    if any(not isinstance(value, bool) for value in train_kwargs.values()):
        raise ValueError(
            f"{name}: `train_kwargs` {train_kwargs} has a value that is not a "
            "bool; pass a function train -> keyword arguments"
        )
    in_training = dict(train_kwargs)

    def rule(
        train: bool, inputs: Any, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        flags = {flag: value == train for flag, value in in_training.items()}
        return {**flags, **kwargs}

    return rule


def call_flags(
    cls: type, train: bool, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, bool]:
    """Return the flags of a call that its arguments leave open, set for this mode.

    Raises:
      ValueError: an open argument looks like a flag, but its name is not in `FLAGS`.
    """
    parameters = open_parameters(cls, inputs, kwargs)
    for name, parameter in parameters.items():
        is_switch = isinstance(parameter.default, bool)
        if name not in FLAGS and is_switch and _LOOKS_LIKE_A_FLAG.search(name):
            raise ValueError(
                f"the call of {cls.__name__} has an argument `{name}` that "
                "looks like a flag of training but is not known: give it, in "
                "`example_kwargs` to fuse, or say in `train_kwargs` what it is"
            )
    return {
        flag: value == train
        for flag, value in FLAGS.items()
        if _is_flag(parameters.get(flag))
    }


def has_flags(cls: type) -> bool:
    """Return whether the call of a class has an argument that tells it to train."""
    parameters = open_parameters(cls, (), {})
    return any(_is_flag(parameters.get(flag)) for flag in FLAGS)


def open_parameters(
    cls: type, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class's call that these arguments leave open."""
    try:
        signature = inspect.signature(cls.__call__)
        bound = signature.bind_partial(None, *inputs, **kwargs).arguments
    except (TypeError, ValueError):
        # The call itself will raise, and say what is wrong with its arguments.
        return {}
    return {
        name: p for name, p in signature.parameters.items() if name not in bound
    }


def attribute_flags(
    attributes: Mapping[str, Any], train: bool
) -> dict[str, bool]:
    """Return the attributes of a module that are flags, set for this mode."""
    return {
        flag: value == train
        for flag, value in FLAGS.items()
        if isinstance(attributes.get(flag), bool)
    }


def training_flag(values: Mapping[str, Any]) -> bool | None:
    """Return whether these arguments or attributes say train; None if they say nothing."""
    for flag, in_training in FLAGS.items():
        if isinstance(values.get(flag), bool):
            return values[flag] == in_training
    return None


def _is_flag(parameter: inspect.Parameter | None) -> bool:
    if parameter is None:
        return False
    default = parameter.default
    return (
        default is parameter.empty
        or default is None
        or isinstance(default, bool)
    )


# Arguments and results of functional forms.


def static_train(train: Any) -> bool:
    """Return `train`, or raise ValueError if it is traced or not a bool."""
    if not isinstance(train, bool):
        raise ValueError(
            "functional: `train` must be a Python bool: make it static under jit"
        )
    return train


def checked_key(key: Any) -> Key:
    """Return `key`, or raise ValueError if it is not a typed PRNG key."""
    if not jax.dtypes.issubdtype(
        getattr(key, "dtype", None), jax.dtypes.prng_key
    ):
        raise ValueError(
            "functional: `key` is not a typed PRNG key; make it with jax.random.key"
        )
    return key


def pruned(tree: Any, like: Any) -> Any:
    """Return the part of a nested dict whose keys `like` has."""
    if not isinstance(like, dict):
        return tree
    return {key: pruned(tree[key], like[key]) for key in like}


# Rules that select layers of a model, to convert them.


Rule = type | str
Target = Factory | None


class Rules:
    """Select layers by type or by path, the first rule that fits deciding.

    Args:
      name: of the public function, for errors.
      rules: {type or regex: target}.
    """

    def __init__(self, name: str, rules: Mapping[Rule, Target]):
        self._name = name
        self._rules = rules
        self._used: set[Rule] = set()

    def match(self, path: str, module: Any) -> Rule | None:
        """Return the first rule that fits the layer, or None.

        Raises:
          ValueError: the rule is a type, one of whose methods the layer overrides.
        """
        for rule in self._rules:
            if isinstance(rule, str):
                fits = re.fullmatch(rule, path) is not None
            else:
                fits = isinstance(module, rule)
                if fits:
                    self._check_not_overridden(path, module, rule)
            if fits:
                return rule
        return None

    def use(self, rule: Rule) -> Target:
        """Return the target of a rule, and note that the rule decides a layer."""
        self._used.add(rule)
        return self._rules[rule]

    def check_all_used(self) -> None:
        """Raise ValueError for a rule that decides no layer."""
        for rule in self._rules:
            if rule not in self._used:
                name = repr(rule) if isinstance(rule, str) else rule.__name__
                raise ValueError(
                    f"{self._name}: the rule {name} decides no layer: nothing "
                    "matches it, or earlier rules do"
                )

    def _check_not_overridden(self, path: str, module: Any, cls: type) -> None:
        name = overridden_name(type(module), cls)
        if name is not None:
            raise ValueError(
                f"{self._name}: {path!r} is a {type(module).__name__} that "
                f"overrides `{name}`, which the rule {cls.__name__} would "
                "lose: name it in a rule in front (None leaves it as it is)"
            )


# The arguments of a layer, which it stores as attributes, that its successor takes.
CONV_ARGUMENTS = (
    "kernel_size",
    "strides",
    "padding",
    "kernel_dilation",
    "feature_group_count",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
)
LINEAR_ARGUMENTS = ("use_bias", "dtype", "param_dtype")
NORM_ARGUMENTS = (
    "momentum",
    "epsilon",
    "use_scale",
    "use_bias",
    "axis_name",
    "dtype",
    "param_dtype",
    "use_running_average",
)

# Those that decide what the parts of a block compute.
PART_ARGUMENTS = ("dtype", "param_dtype", "precision")

CANNOT_CONVERT_STACKED = (
    "its parameters are stacked (vmap or scan): convert a layer, then stack it"
)


def with_settings(factory: Factory, settings: Mapping[str, Any]) -> Factory:
    """Return the factory with the settings that it takes and does not bind."""
    return functools.partial(factory, **accepted_settings(factory, settings))


def accepted_settings(
    factory: Factory, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that a factory takes and does not bind."""
    names = unbound_arguments(factory, settings)
    return {name: settings[name] for name in names}


def unbound_arguments(factory: Factory, names: Iterable[str]) -> list[str]:
    """Return those of the names that a factory takes and does not bind."""
    base, bound = unwrap_partial(factory)
    parameters = parameters_of(base)
    return [name for name in names if name in parameters and name not in bound]


# The normalization behind a convolution, for the block that takes its place.


NORM_SETTINGS = (
    "momentum",
    "epsilon",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "dtype",
    "param_dtype",
)


class NormSettings:
    """Look up the settings of the normalization that a convolution feeds.

    Args:
      norms: the normalizations of the model by path.
      features: number of channels of each.
      read_by: {convolution: the layers that are given its output}, one entry for each
        of its calls, if the model has been traced.
    """

    def __init__(
        self,
        norms: Mapping[str, Any],
        features: Mapping[str, int],
        read_by: Mapping[str, list[list[str | None]]],
    ):
        self._norms = norms
        self._features = features
        self._read_by = read_by

    def of(
        self, path: str, features: int, names: Iterable[str]
    ) -> dict[str, Any]:
        """Return {name: value}; empty if the model has no normalization.

        Of several that may be the one behind, all must agree: those that the trace
        shows; else those beside the convolution with as many features; else all.

        Args:
          path: of the convolution.
          features: channels of its output.
          names: of the settings; those that no normalization has are left out.

        Raises:
          ValueError: they do not agree.
        """
        parent = path.rpartition("/")[0]
        readers = [
            reader for uses in self._read_by.get(path, ()) for reader in uses
        ]
        behind = [reader for reader in readers if reader in self._norms]
        beside = [
            p
            for p in self._norms
            if p.rpartition("/")[0] == parent and self._features[p] == features
        ]
        for candidates in (behind, beside, list(self._norms)):
            if candidates:
                norms = [self._norms[p] for p in candidates]
                break
        else:
            return {}
        known = [name for name in names if any(hasattr(n, name) for n in norms)]
        return {name: _common_value(name, norms) for name in known}


def _common_value(name: str, norms: Iterable[Any]) -> Any:
    first, *others = (
        getattr(norm, name) for norm in norms if hasattr(norm, name)
    )
    for other in others:
        if other != first:
            raise ValueError(
                f"the normalizations that may stand behind it have `{name}` "
                f"{first} and {other}: give `example`, with which the trace "
                "tells, or bind the block's `norm` "
                f"(functools.partial(nnx.BatchNorm, {name}=...))"
            )
    return first


# Classes that override what their base computes.


_VARIABLES = ("kernel", "bias", "gain", "scale", "mean", "var", "epsilon")
_SPECIAL_METHODS = ("__call__", "__getattr__", "__getattribute__")


def overridden_name(
    cls: type, base: type, extension_points: tuple[str, ...] = ()
) -> str | None:
    """Return the first method or property of `base` that `cls` overrides, or None."""
    for derived in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(derived).items():
            if name not in extension_points and _overrides(name, value, base):
                return name
    return None


def _overrides(name: str, value: Any, base: type) -> bool:
    if isinstance(value, property):
        return hasattr(base, name) or name in _VARIABLES
    is_dunder = name.startswith("__") and name not in _SPECIAL_METHODS
    if not isinstance(value, types.FunctionType) or is_dunder:
        return False
    # The wrapper that a transform of Flax (nn.remat) puts around a method is the method.
    inherited = inspect.unwrap(getattr(base, name, None))
    if inherited is inspect.unwrap(value):
        return False
    return hasattr(base, name) or name in _SPECIAL_METHODS


def nearest_type(layer: Any, candidates: tuple[type, ...]) -> type:
    """Return the nearest of the candidates that the layer is an instance of."""
    return next(cls for cls in type(layer).__mro__ if cls in candidates)


def path_prefix(path: str) -> str:
    """Return what the paths of everything below a module begin with."""
    return f"{path}/" if path else ""
