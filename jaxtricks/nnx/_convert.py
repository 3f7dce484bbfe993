"""Exchange layers of an existing model, by type or by path."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtricks import _layer_functions, _layers
from jaxtricks._arguments import checked
from jaxtricks._fusion import Probe
from jaxtricks._layers import Factory, NormSettings, Rule, Target
from jaxtricks.nnx import _compat, _fuse, _module_tree
from jaxtricks.nnx._blocks import ReparamBlock
from jaxtricks.nnx._conv import WSConv, effective_kernel
from jaxtricks.nnx._heads import DisAlignHead, LWSHead
from jaxtricks.nnx._norm import ExtendedBatchNorm

NORMS = (nnx.BatchNorm, ExtendedBatchNorm)

LookUp = Callable[[int, Iterable[str]], dict[str, Any]]
"""(features, names) -> settings of the normalization behind a convolution."""


@checked
def convert(
    model: nnx.Module,
    rules: Mapping[Rule, Target],
    *,
    rngs: nnx.Rngs,
    init: Literal["preserve", "fresh"] = "preserve",
    example: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Return a new model in which the layers that the rules name are exchanged.

        rules = {
            nnx.BatchNorm: jt.nnx.ExtendedBatchNorm,
            r"stage\\d/conv": jt.nnx.ACBlock,
        }
        model = convert(model, rules, rngs=rngs)

    The first rule that fits a layer decides. A layer in several places stays one layer.
    Layers inside our blocks are left alone. An optimizer for the old model does not fit
    the new one: rebuild it.

    The normalizations inside a block take momentum, epsilon, axis_name and dtypes from
    the one behind the convolution that it stands for. Without an example those are
    meant that lie beside the convolution and have as many features, else all of the
    model; they must agree. What `functools.partial` binds takes precedence, as in
    `functools.partial(jt.nnx.ACBlock, norm=functools.partial(nnx.BatchNorm,
    momentum=0.9))`. In a model without normalizations the defaults of the block stay.

    Args:
      model: any module; it is left alone. Layers may lie in lists, tuples and dicts.
      rules: {type or regex: target}. A type fits its subclasses too, unless they
        override its methods; a regex must match the whole path of the layer
        ("stages/0/conv"). The target is a class or a factory that takes the arguments
        of the layer by name (`functools.partial(jt.nnx.WSConv, preset="qiao")`; those
        it does not know are not passed), or None to leave the layer as it is.
      rngs: keys for the new layers.
      init: "preserve" = the new model computes the same function in evaluation mode;
        "fresh" = new layers are initialized.
      example: an input of the model, or a tuple of them, whose trace tells which
        normalization is behind a convolution.
      example_kwargs: keyword arguments of the model's call, as in `fuse`.

    Returns:
      The new model, in the mode (train or eval) of the old one.

    Raises:
      ValueError: a rule that decides nothing, a layer that the target cannot stand for,
        normalizations that do not agree and no example, or init="preserve" for a layer
        whose function the target cannot have: a standardized kernel has mean zero, so
        WSConv can only take over filters that have it already.

    Example:
      >>> import jaxtricks as jt
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
      >>> rules = {nnx.Conv: jt.nnx.ACBlock, nnx.BatchNorm: jt.nnx.ExtendedBatchNorm}
      >>> [type(layer).__name__ for layer in convert(model, rules, rngs=nnx.Rngs(1)).layers]
      ['ACBlock', 'ExtendedBatchNorm']
    """
    if init not in ("preserve", "fresh"):
        raise ValueError(
            f"nnx.convert: `init` is {init!r}; use 'preserve' or 'fresh'"
        )
    norm_settings = _norm_settings(model, example, example_kwargs)
    # The settings are read from the old model, whose trace names its layers.
    copy = nnx.clone(model)
    evaluates = _evaluates(copy)
    changes: dict[int, nnx.Module] = {}
    for path, layer, target in _matching_layers(copy, rules):
        look_up = functools.partial(norm_settings.of, path)
        try:
            new = _successor(
                layer, target, rngs, look_up, preserve=init == "preserve"
            )
        except (ValueError, TypeError) as error:
            name = type(layer).__name__
            raise ValueError(
                f"nnx.convert: {path!r} ({name}): {error}"
            ) from error
        if evaluates:
            new.eval()
        # By identity, so that a shared layer stays one layer.
        changes[id(layer)] = new
    return _module_tree.replaced(copy, changes)


@checked
def checkpoint_paths(model: nnx.Module) -> dict[str, str]:
    """Return where a checkpoint of the plain model goes: {plain path: path in `model`}.

    Args:
      model: what `convert` returned.

    Returns:
      Paths as elsewhere ("stem/kernel"). The kernel of a convolution that became a
      block goes to the largest branch of the block. What has no place is left out: a
      bias in front of the normalizations of a block, a variance per channel. Those need
      the exact way: load the plain model, then `convert` it with init="preserve".

    Example:
      >>> import jaxtricks as jt
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
      >>> checkpoint_paths(convert(model, {nnx.Conv: jt.nnx.ACBlock}, rngs=nnx.Rngs(1)))
      {'layers/0/kernel': 'layers/0/square/conv/kernel'}
    """
    paths = {
        key: "/".join(map(str, path))
        for key, path in _compat.variable_paths(model).items()
    }
    kernels: dict[str, str] = {}
    without_counterpart: list[str] = []
    for path, module in _module_tree.modules(model):
        prefix = _layers.path_prefix(path)
        # All of a block's variables are new; of a norm only the variance differs.
        if isinstance(module, ReparamBlock):
            without_counterpart.append(prefix)
            kernels[f"{prefix}kernel"] = paths[id(module.largest_conv.kernel)]
        elif isinstance(module, ExtendedBatchNorm):
            without_counterpart.append(f"{prefix}var")
    unchanged = {
        path: path
        for path in paths.values()
        if not any(path.startswith(prefix) for prefix in without_counterpart)
    }
    return kernels | unchanged


def _norm_settings(
    model: nnx.Module, example: Any, example_kwargs: Mapping[str, Any] | None
) -> NormSettings:
    layers, norms = _fuse.fusible_modules(model)
    read_by: Mapping[str, Any] = {}
    if example is not None:
        kwargs = _fuse.evaluation_kwargs(model, example, example_kwargs)
        watched = _fuse.WatchedModel(model, (*layers, *norms), kwargs)
        read_by = Probe(watched, example).flow().read_by
    features = {path: norm.num_features for path, norm in norms.items()}
    return NormSettings(norms, features, read_by)


def _matching_layers(
    model: nnx.Module, rules: Mapping[Rule, Target]
) -> list[tuple[str, nnx.Module, Factory]]:
    """Return (path, layer, target) of every layer that a rule exchanges."""
    matching = _layers.Rules("nnx.convert", rules)
    decisions: dict[int, tuple[str, nnx.Module, Target]] = {}
    prefixes: list[str] = []  # of modules whose insides are left alone
    for path, module in _module_tree.modules(model):
        # Parents come first: a rule for a module decides for all that is inside.
        if any(path.startswith(prefix) for prefix in prefixes):
            continue
        rule = matching.match(path, module)
        if rule is not None and id(module) not in decisions:
            decisions[id(module)] = (path, module, matching.use(rule))
        elif rule is not None:
            first_path, _, target = decisions[id(module)]
            if target is not rules[rule]:
                raise ValueError(
                    f"nnx.convert: {first_path!r} and {path!r} are one layer, "
                    "for which two rules have different targets: give one"
                )
        if rule is not None or isinstance(module, ReparamBlock):
            prefixes.append(_layers.path_prefix(path))
    matching.check_all_used()
    return [
        (path, module, target)
        for path, module, target in decisions.values()
        if target is not None
    ]


# The new layer.


def _successor(
    layer: Any,
    target: Factory,
    rngs: nnx.Rngs,
    look_up: LookUp,
    *,
    preserve: bool,
) -> Any:
    """Return the layer that takes the place of `layer`."""
    arguments = _arguments(layer)
    if preserve and isinstance(layer, nnx.BatchNorm):
        # The scales take up what the variances of the channels differ by.
        arguments["use_scale"] = True
    accepted = _accepted_arguments(layer, target, arguments, look_up)
    new = target(**accepted, rngs=rngs)
    if preserve:
        _copy_function(layer, new)
    return new


def _arguments(layer: Any) -> dict[str, Any]:
    """Return the arguments of the layer's constructor.

    Raises:
      ValueError: layers of this type, or with these settings, are not exchanged.
    """
    if isinstance(layer, nnx.Conv | WSConv):
        _layer_functions.check_convertible(
            layer, (nnx.Conv, WSConv), ignored=("conv_general_dilated",)
        )
        if getattr(layer, "mask", None) is not None:
            raise ValueError(
                "its `mask` would be lost in training: leave it as it is (None)"
            )
        # nnx.vmap adds axes that the sizes of the layer do not explain.
        is_stacked = layer.kernel[...].ndim != len(layer.kernel_size) + 2
        names = ("in_features", "out_features", *_layers.CONV_ARGUMENTS)
    elif isinstance(layer, NORMS):
        _layer_functions.check_convertible(layer, NORMS)
        has_other_axis = getattr(layer, "axis", -1) not in (-1, (-1,))
        if has_other_axis or getattr(layer, "axis_index_groups", None):
            raise ValueError(
                "normalizations with `axis` or `axis_index_groups` have no counterpart"
            )
        is_stacked = layer.mean[...].ndim != 1
        names = ("num_features", *_layers.NORM_ARGUMENTS)
    elif isinstance(layer, nnx.Linear):
        _layer_functions.check_convertible(layer, (nnx.Linear,))
        is_stacked = layer.kernel[...].ndim != 2
        names = ("in_features", "out_features", *_layers.LINEAR_ARGUMENTS)
    else:
        raise ValueError(
            "only nnx.Linear, nnx.Conv, WSConv, nnx.BatchNorm and "
            "ExtendedBatchNorm are exchanged"
        )
    if is_stacked:
        raise ValueError(_layers.CANNOT_CONVERT_STACKED)
    return {name: getattr(layer, name) for name in names}


def _accepted_arguments(
    layer: Any, target: Factory, arguments: dict[str, Any], look_up: LookUp
) -> dict[str, Any]:
    """Return the arguments that the target takes and that its user has not bound."""
    base, _ = _layers.unwrap_partial(target)
    is_conv = "kernel_size" in arguments
    is_linear = "in_features" in arguments and not is_conv
    if is_linear and "kernel_size" in _layers.parameters_of(base):
        raise ValueError(
            "only nnx.Conv and WSConv turn into convolutions and blocks"
        )
    accepted = _layers.accepted_settings(target, arguments)
    if is_conv:
        accepted |= _part_factories(layer, target, arguments, look_up)
    return accepted


def _part_factories(
    layer: Any, target: Factory, arguments: dict[str, Any], look_up: LookUp
) -> dict[str, Any]:
    """Return the `conv` and `norm` of a block, with the settings of layer and norm behind.

    For a target that is not a block, return the settings of the layer that it takes.
    """
    base, bound = _layers.unwrap_partial(target)
    parameters = _layers.parameters_of(base)
    # The block itself has no dtype: its parts have.
    settings = {name: arguments[name] for name in _layers.PART_ARGUMENTS}
    # Not every target takes these, and they are more than a matter of rounding.
    for name in ("preferred_element_type", "conv_general_dilated"):
        value = getattr(layer, name, None)
        if value not in (None, jax.lax.conv_general_dilated):
            settings[name] = value
    if "conv" not in parameters:
        if "preferred_element_type" in settings.keys() - parameters.keys():
            raise ValueError(
                "its `preferred_element_type` would be lost: use a target that takes it"
            )
        return _layers.accepted_settings(target, settings)
    if "conv" in bound:
        # The user has chosen another convolution.
        settings.pop("conv_general_dilated", None)
    conv = bound.get("conv", nnx.Conv)
    # What the user's partials bind is not asked of the model.
    norm = bound.get("norm", parameters["norm"].default)
    names = _layers.unbound_arguments(norm, _layers.NORM_SETTINGS)
    norm_settings = look_up(arguments["out_features"], names)
    return {
        "conv": _layers.with_settings(conv, settings),
        "norm": _layers.with_settings(norm, norm_settings),
    }


# Variables with which the new layer computes what the old one did.


def _copy_function(old: Any, new: Any) -> None:
    """Set the variables of `new` so that in evaluation it computes what `old` does."""
    if isinstance(new, ReparamBlock):
        new.start_from(*effective_kernel(old))
    elif isinstance(new, WSConv) and isinstance(old, nnx.Conv | WSConv):
        _copy_filters(old, new)
    elif isinstance(new, ExtendedBatchNorm) and isinstance(old, nnx.BatchNorm):
        _copy_statistics(old, new)
    elif isinstance(new, LWSHead | DisAlignHead) and isinstance(
        old, nnx.Linear
    ):
        _copy_linear(old, new)
    else:
        raise ValueError(
            f"how {type(new).__name__} could compute the same is not known: "
            "use init='fresh'"
        )


def _copy_filters(old: Any, new: WSConv) -> None:
    kernel, bias = effective_kernel(old)
    kernel, gain = _layer_functions.matching_filters(
        kernel, preset=new.preset, eps=new.eps
    )
    # Without a gain every filter would have the norm of the preset.
    if not new.use_gain or (bias is not None and not new.use_bias):
        raise ValueError(
            "to compute the same, WSConv needs its gain (and the bias of the layer)"
        )
    _assign(new.kernel, kernel)
    _assign(new.gain, gain)
    if bias is not None:
        _assign(new.bias, bias)


def _copy_statistics(old: Any, new: ExtendedBatchNorm) -> None:
    # One variance cannot normalize every channel: the scales have to.
    if new.scale is None or (old.bias is not None and new.bias is None):
        raise ValueError(
            "to compute the same, the normalization needs its scale and bias"
        )
    var, scale = _layer_functions.pooled_variance(
        old.var[...],
        _compat.read(old.scale),
        old_epsilon=old.epsilon,
        new_epsilon=new.epsilon,
    )
    _assign(new.mean, old.mean[...])
    _assign(new.var, var)
    _assign(new.scale, scale)
    if old.bias is not None:
        _assign(new.bias, old.bias[...])


def _copy_linear(old: Any, new: LWSHead | DisAlignHead) -> None:
    """Copy the linear head; what a second stage adds starts without effect."""
    if old.bias is not None and new.bias is None:
        raise ValueError(
            "to compute the same, the head needs the bias of the layer"
        )
    if isinstance(new, DisAlignHead) and bool(
        jnp.any(new.logit_scale[...] != 0)
    ):
        raise ValueError(
            "compat=\"reference\" starts with another function: use init='fresh'"
        )
    _assign(new.kernel, old.kernel[...])
    if old.bias is not None:
        _assign(new.bias, old.bias[...])


def _assign(variable: Any, value: Any) -> None:
    variable[...] = value.astype(variable[...].dtype)


def _evaluates(model: nnx.Module) -> bool:
    """Return whether the normalizations of the model are in evaluation mode."""
    # A model without normalizations has no mode that a new layer could follow.
    norms: list[Any] = [
        module
        for _, module in _module_tree.modules(model)
        if isinstance(module, NORMS)
    ]
    return bool(norms) and all(
        norm.use_running_average is True for norm in norms
    )
