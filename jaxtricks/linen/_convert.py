"""Exchange layers of an existing linen module, by type or by path."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import _integers, _layer_functions, _layers
from jaxtricks._arguments import checked
from jaxtricks._fusion import Probe
from jaxtricks._layers import Factory, NormSettings, Rule, Target
from jaxtricks._typing import Array, Key
from jaxtricks.linen._blocks import ReparamBlock
from jaxtricks.linen._calls import EvaluatedModule
from jaxtricks.linen._fuse import CONVS, NORMS, WatchedModule, called_layers
from jaxtricks.linen._layers import (
    DisAlignHead,
    ExtendedBatchNorm,
    LWSHead,
    Variables,
    WSConv,
    effective_kernel,
)
from jaxtricks.linen._substitution import substituted
from jaxtricks.linen._variables import (
    at_path,
    copied,
    replace_at,
    without_empty,
)


@checked
def convert(
    module: nn.Module,
    variables: Mapping[str, Any],
    rules: Mapping[Rule, Target],
    *,
    key: Key,
    example: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    init: Literal["preserve", "fresh"] = "preserve",
) -> tuple[nn.Module, dict[str, Any]]:
    """Return module and variables in which the layers that the rules name are exchanged.

        rules = {
            nn.BatchNorm: jt.linen.ExtendedBatchNorm,
            r"stage\\d/conv": jt.linen.ACBlock,
        }
        module, variables = convert(module, variables, rules, key=key, example=x)

    `jt.nnx.convert` for linen. The first rule that fits a layer decides, and layers
    inside our blocks are left alone. An optimizer state for the old variables does not
    fit the new ones: initialize it again.

    The normalizations inside a block take momentum, epsilon, axis_name and dtypes from
    the one that the traced output of the convolution feeds, else from those beside it
    with as many features, else from all of the module; they must agree. What
    `functools.partial` binds takes precedence. A block trains where the module around
    it does: by the flags of the nearest call (`train`, `deterministic`, ...) or, without
    any, by whether "batch_stats" is mutable.

    Args:
      module: any linen module.
      variables: its variables.
      rules: {type or regex: target}. A type fits its subclasses too, unless they
        override its methods; a regex must match the whole path of the layer
        ("stage_0/Conv_1"). The target is a class or a factory that takes the arguments
        of the layer by name (`functools.partial(jt.linen.WSConv, preset="qiao")`; those
        it does not know are not passed), or None to leave the layer as it is.
      key: for the new layers.
      example: an input of the module, or a tuple of them: a linen module makes its
        layers while it is called.
      example_kwargs: keyword arguments of the module's call, as in `fuse`.
      init: "preserve" = the new module computes the same function in evaluation mode;
        "fresh" = new layers are initialized.

    Returns:
      (module, variables): a module with the call of the old one, to be initialized,
      applied, trained, fused and converted like any other; and its variables.

    Raises:
      ValueError: a rule that decides nothing, a layer that the target cannot stand for,
        normalizations that do not agree, or init="preserve" for a layer whose function
        the target cannot have (see `jt.nnx.convert`).

    Example:
      >>> import jaxtricks as jt
      >>> net, x = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu]), jnp.ones((1, 8, 8, 3))
      >>> variables = net.init(jax.random.key(0), x)
      >>> rules = {nn.Conv: jt.linen.ACBlock}
      >>> new, new_variables = convert(net, variables, rules, key=jax.random.key(1), example=x)
      >>> sorted(new_variables["params"]["layers_0"])
      ['horizontal', 'square', 'vertical']
      >>> bool(jnp.allclose(new.apply(new_variables, x), net.apply(variables, x), atol=1e-5))
      True
    """
    if init not in ("preserve", "fresh"):
        raise ValueError(
            f"linen.convert: `init` is {init!r}; use 'preserve' or 'fresh'"
        )
    evaluated = EvaluatedModule(module, variables, example, example_kwargs)
    # Of every class, since a rule may name a module that holds layers.
    called, inputs, _ = called_layers(evaluated, (nn.Module,))
    norm_settings = _norm_settings(evaluated, called, inputs)
    layers: dict[str, nn.Module] = {}
    new_variables = copied(variables)
    for i, (path, layer, target) in enumerate(_matching_layers(called, rules)):
        look_up = functools.partial(norm_settings.of, path)
        # A layer that is called several times has one path, and one successor.
        layer_variables = at_path(variables, path)
        try:
            arguments = _arguments(layer, layer_variables)
            if init == "preserve" and isinstance(layer, nn.BatchNorm):
                # The scales take up what the variances of the channels differ by.
                arguments["use_scale"] = True
            new = target(
                **_accepted_arguments(layer, target, arguments, look_up)
            )
            # Each layer has a key of its number, whatever the other rules are.
            initial = _initialized(
                new, inputs[path], jax.random.fold_in(key, i)
            )
            if init == "preserve":
                initial = _with_function_of(
                    layer, layer_variables, new, initial, inputs[path][-1]
                )
        except (ValueError, TypeError) as error:
            name = type(layer).__name__
            raise ValueError(
                f"linen.convert: {path!r} ({name}): {error}"
            ) from error
        layers[path] = new
        replace_at(new_variables, path, initial)
    # Of the module as it was passed in: the flags of evaluation were for the trace.
    new_module = substituted(module, layers, is_fused=False)
    return new_module, without_empty(new_variables)


def _norm_settings(
    evaluated: EvaluatedModule,
    called: Mapping[str, Any],
    inputs: Mapping[str, tuple[int, ...]],
) -> NormSettings:
    blocks = [
        _layers.path_prefix(path)
        for path, layer in called.items()
        if isinstance(layer, ReparamBlock)
    ]
    # The normalizations inside blocks have nothing to do with those behind.
    norms = {
        path: layer
        for path, layer in called.items()
        if isinstance(layer, NORMS)
        and not any(path.startswith(b) for b in blocks)
    }
    probe = Probe(WatchedModule(evaluated), evaluated.example)
    features = {path: inputs[path][-1] for path in norms}
    return NormSettings(norms, features, probe.flow().read_by)


def _matching_layers(
    called: Mapping[str, nn.Module], rules: Mapping[Rule, Target]
) -> list[tuple[str, nn.Module, Factory]]:
    """Return (path, layer, target) of every layer that a rule exchanges."""
    matching = _layers.Rules("linen.convert", rules)
    decisions: list[tuple[str, nn.Module, Factory]] = []
    prefixes: list[str] = []  # of modules whose insides are left alone
    for path, module in called.items():
        if any(path.startswith(prefix) for prefix in prefixes):
            continue
        rule = matching.match(path, module)
        target = None if rule is None else matching.use(rule)
        if target is not None:
            decisions.append(
                (path, module.clone(parent=None, name=None), target)
            )
        if rule is not None or isinstance(module, ReparamBlock):
            prefixes.append(_layers.path_prefix(path))
    matching.check_all_used()
    return decisions


# The new layer.


def _arguments(layer: Any, variables: Variables) -> dict[str, Any]:
    """Return the arguments of the layer's constructor.

    Raises:
      ValueError: layers of this type, or with these settings, are not exchanged.
    """
    params = variables["params"]
    if isinstance(layer, CONVS):
        _layer_functions.check_convertible(
            layer, CONVS, ignored=("conv_general_dilated",)
        )
        if getattr(layer, "mask", None) is not None:
            raise ValueError(
                "its `mask` would be lost in training: leave it as it is (None)"
            )
        rank = len(_integers.listed(layer.kernel_size))
        is_stacked = params["kernel"].ndim != rank + 2
        names = ("features", *_layers.CONV_ARGUMENTS)
    elif isinstance(layer, NORMS):
        _layer_functions.check_convertible(layer, NORMS)
        has_other_axis = getattr(layer, "axis", -1) not in (-1, (-1,))
        if has_other_axis or getattr(layer, "axis_index_groups", None):
            raise ValueError(
                "normalizations with `axis` or `axis_index_groups` have no counterpart"
            )
        is_stacked = variables["batch_stats"]["mean"].ndim != 1
        names = _layers.NORM_ARGUMENTS
    elif isinstance(layer, nn.Dense):
        _layer_functions.check_convertible(layer, (nn.Dense,))
        is_stacked = params["kernel"].ndim != 2
        names = ("features", *_layers.LINEAR_ARGUMENTS)
    else:
        raise ValueError(
            "only nn.Dense, nn.Conv, WSConv, nn.BatchNorm and "
            "ExtendedBatchNorm are exchanged"
        )
    if is_stacked:
        raise ValueError(_layers.CANNOT_CONVERT_STACKED)
    arguments = {name: getattr(layer, name) for name in names}
    if isinstance(layer, NORMS):
        # It depends on the call (`not train`), and is read when the layer is called.
        arguments["use_running_average"] = None
    return arguments


def _accepted_arguments(
    layer: Any, target: Factory, arguments: dict[str, Any], look_up: Any
) -> dict[str, Any]:
    """Return the arguments that the target takes and that its user has not bound."""
    base, bound = _layers.unwrap_partial(target)
    parameters = _layers.parameters_of(base)
    is_conv = "kernel_size" in arguments
    # A linear layer has no window that a convolution could take over.
    if "kernel_size" in parameters and not is_conv:
        raise ValueError(
            "only nn.Conv and WSConv turn into convolutions and blocks"
        )
    accepted = _layers.accepted_settings(target, arguments)
    if not is_conv:
        return accepted
    settings = {name: arguments[name] for name in _layers.PART_ARGUMENTS}
    hook = getattr(layer, "conv_general_dilated", None)
    if hook not in (None, jax.lax.conv_general_dilated):
        settings["conv_general_dilated"] = hook
    if "conv" not in parameters:
        return accepted
    if "conv" in bound:
        # The user has chosen another convolution.
        settings.pop("conv_general_dilated", None)
    conv = bound.get("conv", nn.Conv)
    norm = bound.get("norm", nn.BatchNorm)
    names = _layers.unbound_arguments(norm, _layers.NORM_SETTINGS)
    norm_settings = look_up(arguments["features"], names)
    accepted["conv"] = _layers.with_settings(conv, settings)
    accepted["norm"] = _layers.with_settings(norm, norm_settings)
    return accepted


def _initialized(
    layer: Any, shape: tuple[int, ...], key: Key
) -> dict[str, Any]:
    """Return the initial variables of a layer, for an input of this shape."""
    # In evaluation mode, where statistics do not move.
    has_mode = "use_running_average" in layer.__dataclass_fields__
    flags = {"use_running_average": True} if has_mode else {}
    # One example suffices, whatever the size of the batch.
    x = jnp.zeros((1, *shape[1:]) if len(shape) > 1 else shape)
    variables = jax.jit(functools.partial(layer.init, **flags))(key, x)
    return at_path(variables, "")


# Variables with which the new layer computes what the old one did.


def _with_function_of(
    old: Any,
    old_variables: Variables,
    new: Any,
    initial: dict[str, Any],
    features: int,
) -> dict[str, Any]:
    """Return variables with which `new` computes in evaluation what `old` does.

    Args:
      old: the layer.
      old_variables: of the layer.
      new: the one that takes its place.
      initial: its initial variables.
      features: channels of the input.
    """
    # The types that nnx.convert preserves, in the same order.
    if isinstance(new, ReparamBlock):
        block = new.geometry(features)
        kernel, bias = effective_kernel(old, old_variables)
        return new.started_from(initial, block, kernel, bias)
    if isinstance(new, WSConv) and isinstance(old, CONVS):
        values = _filters(old, old_variables, new)
    elif isinstance(new, ExtendedBatchNorm) and isinstance(old, nn.BatchNorm):
        values = _statistics(old, old_variables, new)
    elif isinstance(new, LWSHead | DisAlignHead) and isinstance(old, nn.Dense):
        values = _linear(old, old_variables, new)
    else:
        raise ValueError(
            f"how {type(new).__name__} could compute the same is not known: "
            "use init='fresh'"
        )
    return {
        collection: {
            name: _like(values.get(name), value) for name, value in tree.items()
        }
        for collection, tree in initial.items()
    }


def _like(value: Array | None, initial: Array) -> Array:
    return (
        initial if value is None else jnp.asarray(value).astype(initial.dtype)
    )


def _filters(old: Any, variables: Variables, new: WSConv) -> dict[str, Any]:
    kernel, bias = effective_kernel(old, variables)
    kernel, gain = _layer_functions.matching_filters(
        kernel, preset=new.preset, eps=new.eps
    )
    if not new.use_gain or (bias is not None and not new.use_bias):
        raise ValueError(
            "to compute the same, WSConv needs its gain (and the bias of the layer)"
        )
    return {"kernel": kernel, "gain": gain, "bias": bias}


def _statistics(
    old: Any, variables: Variables, new: ExtendedBatchNorm
) -> dict[str, Any]:
    params, statistics = variables["params"], variables["batch_stats"]
    if not new.use_scale or ("bias" in params and not new.use_bias):
        raise ValueError(
            "to compute the same, the normalization needs its scale and bias"
        )
    var, scale = _layer_functions.pooled_variance(
        statistics["var"],
        params.get("scale"),
        old_epsilon=old.epsilon,
        new_epsilon=new.epsilon,
    )
    mean, bias = statistics["mean"], params.get("bias")
    return {"mean": mean, "var": var, "scale": scale, "bias": bias}


def _linear(
    old: nn.Dense, variables: Variables, new: LWSHead | DisAlignHead
) -> dict[str, Any]:
    """Return the linear head; what a second stage adds starts without effect."""
    if old.use_bias and not new.use_bias:
        raise ValueError(
            "to compute the same, the head needs the bias of the layer"
        )
    if isinstance(new, DisAlignHead) and new.compat is not None:
        raise ValueError(
            "compat=\"reference\" starts with another function: use init='fresh'"
        )
    return dict(variables["params"])
