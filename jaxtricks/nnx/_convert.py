"""The normalization behind a convolution, for the settings of a block that takes the convolution's place."""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtricks import weightstd
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat, _fuse, _module_tree, _overrides
from jaxtricks.nnx._branches import Branched, effective_kernel, largest_conv, unpacked
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx._fuse import Probed, Spied, evaluation_kwargs
from jaxtricks.nnx._heads import DisAlignHead, LWSHead
from jaxtricks.nnx._norm import ExtendedBatchNorm

NAMES = (
    "momentum",
    "epsilon",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "dtype",
    "param_dtype",
)


class NormSettings:
    """Finds the settings of the normalization that a convolution of a model feeds.

    Args:
      model: any module.
      example: an input, or a tuple of them: then the trace knows; None = by where the
        layers lie.
      example_kwargs: keyword arguments of the model's call.
    """

    def __init__(
        self, model: nnx.Module, example: Any, example_kwargs: Mapping[str, Any] | None
    ):
        self._convs, self._norms = _fuse.layers(model)
        self._fed: Mapping[str, list[list[str | None]]] = {}
        if example is not None:
            kwargs = evaluation_kwargs(model, example, example_kwargs)
            spied = Spied(model, (*self._convs, *self._norms), kwargs)
            self._fed = Probed(spied, example).flow().read_by

    def of(self, path: str, features: int, names: Iterable[str]) -> dict[str, Any]:
        """{name: value} of the normalization; empty if the model has none, or none with a name.

        Of several that may be it, all must agree: those that the trace shows; else
        those beside the convolution, with as many features; else all of the model.

        Raises:
          ValueError: they do not agree.
        """
        parent = path.rpartition("/")[0]
        traced = [
            self._norms.get(p) for uses in self._fed.get(path, ()) for p in uses if p
        ]
        beside = [
            norm
            for p, norm in self._norms.items()
            if p.rpartition("/")[0] == parent and norm.num_features == features
        ]
        groups = ([norm for norm in traced if norm], beside, list(self._norms.values()))
        norms = next((group for group in groups if group), [])
        return {
            name: _common(name, norms)
            for name in names
            if any(hasattr(n, name) for n in norms)
        }


def _common(name: str, norms: Iterable[Any]) -> Any:
    first, *others = (getattr(norm, name) for norm in norms if hasattr(norm, name))
    for other in others:
        if other != first:
            raise ValueError(
                f"the normalizations that may stand behind it have `{name}` {first} and {other}: give "
                "`example`, with which the trace tells, or bind the block's `norm` "
                f"(functools.partial(nnx.BatchNorm, {name}=...))"
            )
    return first


# Layers of an existing model exchanged for ours, by type or by path.


Rule = type | str
Target = Callable[..., Any] | None
Settings = Callable[[int, Iterable[str]], dict[str, Any]]
"""(features, names) -> settings of the normalization behind a convolution."""

# The arguments that a layer was made with, which it keeps as attributes.
_CONV = (
    "in_features out_features kernel_size strides padding kernel_dilation feature_group_count "
    "use_bias dtype param_dtype precision"
)
_LINEAR = "in_features out_features use_bias dtype param_dtype"
_NORM = (
    "num_features momentum epsilon use_scale use_bias axis_name dtype param_dtype "
    "use_running_average"
)


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
    """A new model in which the layers that the rules name are exchanged; the model given in is left alone.

    convert(model, {nnx.BatchNorm: jt.nnx.ExtendedBatchNorm, r"stage\\d/conv":
    jt.nnx.ACBlock}, rngs=rngs)

    The first rule that fits a layer decides. A layer in several places stays one layer.
    Layers inside our blocks are left alone. An optimizer made for the old model does
    not fit the new one: rebuild it.

    The normalizations inside a block take momentum, epsilon, axis_name and dtypes from
    the one behind the convolution that it stands for. Without an example those are
    meant that lie beside the convolution and have as many features, else all of the
    model; they must agree. What `functools.partial` binds wins, as in
    `functools.partial(jt.nnx.ACBlock, norm=functools.partial(nnx.BatchNorm,
    momentum=0.9))`. In a model without normalizations the block's own defaults stay.

    Args:
      model: any module; layers may lie in lists, tuples and dicts.
      rules: {type or regex: target}. A type fits its subclasses too, unless they have
        methods of their own in place of its; a regex must match the layer's whole path
        ("stages/0/conv"). The target is a class or a factory that takes the layer's
        arguments by name (`functools.partial(jt.nnx.WSConv, preset="qiao")`; those it
        does not know are not passed), or None to leave the layer as it is.
      rngs: keys for the new layers.
      init: "preserve" = the new model computes the same function in evaluation mode;
        "fresh" = new layers begin anew.
      example: an input of the model, or a tuple of them, whose trace tells what
        normalization is behind a convolution.
      example_kwargs: keyword arguments of the model's call, as in `fuse`.

    Returns:
      The new model, in the mode (train or eval) of the old one.

    Raises:
      ValueError: a rule that decides nothing, a layer that the target cannot stand for,
        normalizations that do not agree and no example, or init="preserve" for a layer
        whose function the target cannot keep: a standardized kernel has mean zero, so
        WSConv keeps only filters that have it already.

    Example:
      >>> import jaxtricks as jt
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
      >>> rules = {nnx.Conv: jt.nnx.ACBlock, nnx.BatchNorm: jt.nnx.ExtendedBatchNorm}
      >>> [type(layer).__name__ for layer in convert(model, rules, rngs=nnx.Rngs(1)).layers]
      ['ACBlock', 'ExtendedBatchNorm']
    """
    if init not in ("preserve", "fresh"):
        raise ValueError(f"nnx.convert: `init` is {init!r}; use 'preserve' or 'fresh'")
    norms = NormSettings(model, example, example_kwargs)
    model = nnx.clone(model)
    evaluates = _evaluates(model)
    changes = {}
    for path, layer, target in _decided(model, rules):
        settings = functools.partial(norms.of, path)
        try:
            new = _made(layer, target, rngs, settings, keep=init == "preserve")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"nnx.convert: {path!r} ({type(layer).__name__}): {error}"
            ) from error
        if evaluates:
            new.eval()
        changes[id(layer)] = new
    return _module_tree.replaced(model, changes)


@checked
def checkpoint_paths(model: nnx.Module) -> dict[str, str]:
    """Where a checkpoint of the plain model goes in the converted one: {plain path: path in `model`}.

    Args:
      model: what `convert` returned.

    Returns:
      Paths as elsewhere ("stem/kernel"). The kernel of a convolution that became a
      block goes to the block's largest branch. What has no place is left out: a bias in
      front of a block's normalizations, a variance per channel. Those need the exact
      way: load the plain model, then `convert` it with init="preserve".

    Example:
      >>> import jaxtricks as jt
      >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
      >>> checkpoint_paths(convert(model, {nnx.Conv: jt.nnx.ACBlock}, rngs=nnx.Rngs(1)))
      {'layers/0/kernel': 'layers/0/square/conv/kernel'}
    """
    places = {
        key: "/".join(map(str, path))
        for key, path in _compat.variable_paths(model).items()
    }
    found, inside = {}, []
    for path, module in _module_tree.modules(model):
        if isinstance(module, Branched):
            inside.append(_module_tree.below(path))
            found[f"{inside[-1]}kernel"] = places[id(largest_conv(module).kernel)]
        elif isinstance(module, ExtendedBatchNorm):
            inside.append(f"{_module_tree.below(path)}var")
    inside = tuple(inside)
    kept = {
        path: path
        for path in places.values()
        if not (inside and path.startswith(inside))
    }
    return found | kept


def _decided(
    model: nnx.Module, rules: Mapping[Rule, Target]
) -> list[tuple[str, nnx.Module, Callable[..., Any]]]:
    """(path, layer, target) of every layer that a rule exchanges."""
    found: dict[int, tuple[str, nnx.Module, Target]] = {}
    used: set[Rule] = set()
    inside: list[str] = []
    for path, module in _module_tree.modules(model):
        if any(path.startswith(prefix) for prefix in inside):
            continue
        rule = next((rule for rule in rules if _fits(rule, path, module)), None)
        if rule is not None and id(module) not in found:
            used.add(rule)
            found[id(module)] = (path, module, rules[rule])
        elif rule is not None and found[id(module)][2] is not rules[rule]:
            first = found[id(module)][0]
            raise ValueError(
                f"nnx.convert: {first!r} and {path!r} are one layer, for which two rules have different "
                "targets: give one"
            )
        if rule is not None or isinstance(module, Branched):
            inside.append(_module_tree.below(path))
    for rule in rules:
        if rule not in used:
            name = repr(rule) if isinstance(rule, str) else rule.__name__
            raise ValueError(
                f"nnx.convert: the rule {name} decides no layer: nothing matches it, or earlier rules do"
            )
    return [
        (path, module, target)
        for path, module, target in found.values()
        if target is not None
    ]


def _fits(rule: Rule, path: str, module: nnx.Module) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    if not isinstance(module, rule):
        return False
    own = _overrides.overridden(type(module), rule)
    if own is not None:
        raise ValueError(
            f"nnx.convert: {path!r} is a {type(module).__name__} with a `{own}` of its own, which the "
            f"rule {rule.__name__} would lose: name it in a rule in front (None leaves it as it is)"
        )
    return True


def _made(
    layer: Any,
    target: Callable[..., Any],
    rngs: nnx.Rngs,
    settings: Settings,
    *,
    keep: bool,
) -> Any:
    """The layer that stands for `layer`."""
    arguments = _arguments(layer)
    if keep and isinstance(layer, nnx.BatchNorm):
        arguments["use_scale"] = (
            True  # takes up what the variances of the channels differ by
        )
    new = target(**_accepted(layer, target, arguments, settings), rngs=rngs)
    if keep:
        _keep(layer, new)
    return new


def _arguments(layer: Any) -> dict[str, Any]:
    """What the layer was made with."""
    if isinstance(layer, nnx.Conv | WSConv):
        _check_hooks(layer, (nnx.Conv, WSConv), but=("conv_general_dilated",))
        if getattr(layer, "mask", None) is not None:
            raise ValueError(
                "its `mask` would be lost in training: leave it as it is (None)"
            )
        if layer.kernel[...].ndim != len(layer.kernel_size) + 2:
            raise ValueError(
                "its parameters are stacked (nnx.vmap): convert a layer, then stack it"
            )
        return {name: getattr(layer, name) for name in _CONV.split()}
    if isinstance(layer, nnx.BatchNorm | ExtendedBatchNorm):
        _check_hooks(layer, (nnx.BatchNorm, ExtendedBatchNorm))
        if getattr(layer, "axis", -1) not in (-1, (-1,)) or getattr(
            layer, "axis_index_groups", None
        ):
            raise ValueError(
                "normalizations with `axis` or `axis_index_groups` have no counterpart"
            )
        if layer.mean[...].ndim != 1:
            raise ValueError(
                "its parameters are stacked (nnx.vmap): convert a layer, then stack it"
            )
        return {name: getattr(layer, name) for name in _NORM.split()}
    if isinstance(layer, nnx.Linear):
        _check_hooks(layer, (nnx.Linear,))
        if layer.kernel[...].ndim != 2:
            raise ValueError(
                "its parameters are stacked (nnx.vmap): convert a layer, then stack it"
            )
        return {name: getattr(layer, name) for name in _LINEAR.split()}
    raise ValueError(
        "only nnx.Linear, nnx.Conv, WSConv, nnx.BatchNorm and ExtendedBatchNorm are exchanged"
    )


def _check_hooks(
    layer: Any, kinds: tuple[type, ...], but: tuple[str, ...] = ()
) -> None:
    try:
        _overrides.check_hooks(layer, _overrides.kind_of(layer, kinds), but)
    except ValueError as error:
        raise ValueError(f"it {error}") from None


def _accepted(
    layer: Any,
    target: Callable[..., Any],
    arguments: dict[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    """The arguments that the target has and that its author has not bound."""
    base, bound = unpacked(target)
    names = _parameters(base)
    if (
        "kernel_size" in names
        and "in_features" in arguments
        and "kernel_size" not in arguments
    ):
        raise ValueError("only nnx.Conv and WSConv turn into convolutions and blocks")
    accepted = {k: v for k, v in arguments.items() if k in names and k not in bound}
    if "kernel_size" in arguments:
        accepted |= _factories(layer, names, bound, arguments, settings)
    return accepted


def _factories(
    layer: Any,
    names: Mapping[str, inspect.Parameter],
    bound: Mapping[str, Any],
    arguments: dict[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    """A block's `conv` and `norm`, with what the layer and the normalization behind it were made with."""
    own = {name: arguments[name] for name in ("dtype", "param_dtype", "precision")}
    # Not taken by every target, and more than a matter of rounding.
    for name in ("preferred_element_type", "conv_general_dilated"):
        value = getattr(layer, name, None)
        if value not in (None, jax.lax.conv_general_dilated):
            own[name] = value
    if "conv" not in names:
        if "preferred_element_type" in own.keys() - names.keys():
            raise ValueError(
                "its `preferred_element_type` would be lost: use a target that takes it"
            )
        return {
            name: value
            for name, value in own.items()
            if name in names and name not in bound
        }
    if "conv" in bound:
        own.pop(
            "conv_general_dilated", None
        )  # their author has chosen another convolution
    conv = _with_settings(bound.get("conv", nnx.Conv), own)
    norm = bound.get("norm", names["norm"].default)
    missing = _missing(norm, NAMES)
    behind = settings(arguments["out_features"], missing)
    return {"conv": conv, "norm": _with_settings(norm, behind)}


def _with_settings(
    factory: Callable[..., Any], settings: Mapping[str, Any]
) -> Callable[..., Any]:
    """The factory with the settings that it takes and does not bind itself."""
    return functools.partial(
        factory, **{n: settings[n] for n in _missing(factory, settings)}
    )


def _missing(factory: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of the names that a factory takes and does not bind."""
    base, bound = unpacked(factory)
    parameters = _parameters(base)
    return [name for name in names if name in parameters and name not in bound]


def _parameters(base: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """By name; of a class that hands on **kwargs, those of the classes above it too."""
    # Of a module class, `inspect.signature` sees the metaclass.
    functions = (
        [vars(kind).get("__init__") for kind in base.__mro__]
        if isinstance(base, type)
        else [base]
    )
    found: dict[str, inspect.Parameter] = {}
    for function in filter(None, functions):
        parameters = inspect.signature(function).parameters
        found = {**parameters, **found}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _keep(layer: Any, new: Any) -> None:
    """Set the new layer's variables so that it computes what the old one did, in evaluation mode."""
    if isinstance(new, Branched):
        new.start_from(*effective_kernel(layer))
    elif isinstance(new, WSConv) and isinstance(layer, nnx.Conv | WSConv):
        _keep_filters(new, *effective_kernel(layer))
    elif isinstance(new, ExtendedBatchNorm) and isinstance(layer, nnx.BatchNorm):
        _keep_statistics(layer, new)
    elif isinstance(new, LWSHead | DisAlignHead) and isinstance(layer, nnx.Linear):
        _keep_linear(layer, new)
    else:
        raise ValueError(
            f"how {type(new).__name__} could compute the same is not known: use init='fresh'"
        )


def _keep_filters(new: Any, kernel: Array, bias: Array | None) -> None:
    axes = tuple(range(kernel.ndim - 1))
    mean = jnp.abs(jnp.mean(kernel, axes))
    if bool(jnp.any(mean > 1e-6 * jnp.max(jnp.abs(kernel), axes))):
        raise ValueError(
            "standardizing would remove the means of its filters, which its function depends on: use "
            "init='fresh'"
        )
    if not new.use_gain or (bias is not None and not new.use_bias):
        raise ValueError(
            "to compute the same, WSConv needs its gain (and the bias of the layer)"
        )
    shape = weightstd.standardize(kernel, preset=new.preset, eps=new.eps)
    squares = jnp.sum(shape * shape, axes)
    new.kernel[...] = kernel.astype(new.kernel[...].dtype)
    gain = jnp.sum(kernel * shape, axes) / jnp.where(squares > 0, squares, 1)
    new.gain[...] = gain.astype(new.param_dtype)
    if bias is not None:
        new.bias[...] = bias.astype(new.param_dtype)


def _keep_statistics(old: Any, new: Any) -> None:
    """The mean of the variances is the one variance; scales make up for the difference."""
    if new.scale is None or (old.bias is not None and new.bias is None):
        raise ValueError(
            "to compute the same, the normalization needs its scale and bias"
        )
    variances = old.var[...]
    new.mean[...], new.var[...] = (
        old.mean[...],
        jnp.mean(variances).astype(new.var[...].dtype),
    )
    ratio = jnp.sqrt((new.var[...] + new.epsilon) / (variances + old.epsilon))
    scale = jnp.ones_like(variances) if old.scale is None else old.scale[...]
    new.scale[...] = (scale * ratio).astype(new.param_dtype)
    if old.bias is not None:
        new.bias[...] = old.bias[...]


def _keep_linear(old: Any, new: Any) -> None:
    """The parameters of the linear head; what a second stage adds begins without effect."""
    if old.bias is not None and new.bias is None:
        raise ValueError("to compute the same, the head needs the bias of the layer")
    if isinstance(new, DisAlignHead) and bool(jnp.any(new.logit_scale[...] != 0)):
        raise ValueError(
            "compat=\"reference\" begins with another function: use init='fresh'"
        )
    new.kernel[...] = old.kernel[...].astype(new.param_dtype)
    if old.bias is not None:
        new.bias[...] = old.bias[...].astype(new.param_dtype)


def _evaluates(model: nnx.Module) -> bool:
    """Whether the model's normalizations are in evaluation mode."""
    norms = [
        m
        for _, m in _module_tree.modules(model)
        if isinstance(m, nnx.BatchNorm | ExtendedBatchNorm)
    ]
    return bool(norms) and all(norm.use_running_average is True for norm in norms)
