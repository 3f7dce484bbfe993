"""Make a whole model ready for inference: blocks and normalizations become plain layers."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxtricks import _layer_functions, _layers, reparam
from jaxtricks._arguments import checked
from jaxtricks._fusion import (
    AffineLayer,
    ConvLayer,
    NormLayer,
    PathFilter,
    PlainLayer,
    Probe,
    Refusal,
    Watch,
    altered_reason,
    as_inputs,
    compare_models,
    count,
    fuse_layers,
    is_altered,
    is_library_type,
    pair_with_norms,
    standalone,
    with_input,
)
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat, _functional, _module_tree
from jaxtricks.nnx._blocks import ReparamBlock
from jaxtricks.nnx._conv import WSConv, conv_node, is_standardized, plain_conv
from jaxtricks.nnx._norm import ExtendedBatchNorm, frozen_norm
from jaxtricks.reparam import _nodes

AFFINE_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.ConvTranspose)
CONVS = (nnx.Conv, WSConv, ReparamBlock)
NORMS = (nnx.BatchNorm, ExtendedBatchNorm)
LAYERS = (*CONVS, *AFFINE_LAYERS)
"""Layers that may take up a normalization."""

_STACKED = "is stacked (nnx.vmap): fuse one layer"


class Folded(nnx.Module):
    """Takes the place of a normalization that has become part of the layer before it.

    Attributes:
      dtype: of the output of the normalization.
    """

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return x in the dtype of the normalization."""
        return x.astype(self.dtype)


@checked
def fuse(
    model: nnx.Module,
    *,
    example: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    path_filter: PathFilter | None = None,
) -> tuple[Any, reparam.FuseReport]:
    """Return the model for inference, and the proof that it computes the same function.

    Every block (ACBlock, RepVGGBlock, ...), WSConv and convolution with a
    `weightstd.standardized` hook turns into a plain nnx.Conv. Given an example, a
    convolution, nnx.Linear, LinearGeneral, Einsum or ConvTranspose takes up the
    normalization behind it, where the traced output of the layer goes to that
    normalization and nowhere else. A layer whose class overrides what its base computes
    stays, with the reason in the report.

    Args:
      model: any module in evaluation mode; it is left alone. Layers may lie in lists,
        tuples and dicts.
      example: an input of the model, or a tuple of them; without it normalizations are
        never folded, since bn(conv(x)) and bn(relu(conv(x))) have the same variables.
      example_kwargs: keyword arguments of the model's call. Flags of the call that
        neither names (`train`, `deterministic`, ...) are set for evaluation, and `rngs`
        that it insists on is None.
      path_filter: path_filter(path) -> True for what to fuse: the path of a block or
        convolution, or of the normalization; None = everything that can be.

    Returns:
      The fused model, and a FuseReport: error against rounding bound for every layer
      (on its input in the example, else on a random one) and for the model, parameters,
      FLOPs, and what was not fused and why.

    Raises:
      ValueError: training mode, statistics that were never updated, `path_filter` that
        selects nothing or what does not fuse (by name, with the reason), or a
        difference that rounding does not explain.

    Example:
      >>> import jax, jaxtricks as jt
      >>> block = jt.nnx.RepVGGBlock(4, 4, norm=jt.nnx.ExtendedBatchNorm, rngs=nnx.Rngs(0))
      >>> _ = block(jax.random.normal(jax.random.key(0), (2, 8, 8, 4)))  # a training step
      >>> block.eval()
      >>> plain, report = fuse(block)
      >>> type(plain).__name__, report.layers[0].branches, report.layers[0].ratio < 1
      ('Conv', 3, True)

    References:
      Ding, Zhang, Ma, Han, Ding, Sun, "RepVGG", arXiv 2101.03697, section 3.
    """
    # Modes are set and layers replaced in the copy alone.
    copy = nnx.clone(model)
    layer_modules, norm_modules = fusible_modules(copy)
    probe, flow, kwargs, inputs, dtypes = None, None, {}, {}, {}
    altered: set[str] = set()
    if example is not None:
        kwargs = evaluation_kwargs(model, example, example_kwargs)
        # The trace knows what feeds what, and the modes that flags of the call set.
        watched = WatchedModel(model, (*layer_modules, *norm_modules), kwargs)
        probe = Probe(watched, example)
        flow, (inputs, dtypes) = probe.flow(), probe.values()
        altered = watched.altered
        _set_modes(layer_modules | norm_modules, watched.modes)
    layers = {
        path: _layer(path, m, altered) for path, m in layer_modules.items()
    }
    norms = {
        path: _norm_or_refusal(path, m) for path, m in norm_modules.items()
    }
    if flow is None:
        fusible, reasons = standalone(layers)
        unknown = "without `example` it is not known what feeds it"
        reasons |= dict.fromkeys(norms, unknown)
    else:
        fusible, reasons = pair_with_norms(layers, norms, flow)
    fused = fuse_layers("nnx.fuse", fusible, reasons, path_filter, inputs)

    # By identity: a layer in several places is replaced in all of them.
    changes: dict[int, nnx.Module] = {}
    for one, plain in zip(fused.layers, fused.plain, strict=True):
        # A folded normalization stays as a module, which casts as it did.
        changes[id(layer_modules[one.path])] = plain.layer
        if one.norm is not None:
            path = one.norm.path
            changes[id(norm_modules[path])] = Folded(dtypes[path])
    fused_model = _module_tree.replaced(copy, changes)
    whole = None
    if probe is not None:
        call, sizes = (
            pure_call(fused_model, kwargs),
            (size(model), size(fused_model)),
        )
        whole = compare_models(probe, call, fused, sizes)
    return fused_model, reparam.FuseReport(fused.rows, whole, fused.remaining())


def size(module: nnx.Module) -> int:
    """Return the number of parameters and running statistics."""
    return count(nnx.state(module, (nnx.Param, nnx.BatchStat)))


def fusible_modules(model: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({path: layer or block}, {path: normalization}), each module once.

    The layers inside blocks are left out.
    """
    layers, norms = {}, {}
    visited: set[int] = set()
    block_prefixes: list[str] = []
    for path, module in _module_tree.modules(model):
        is_inside = any(path.startswith(prefix) for prefix in block_prefixes)
        if id(module) in visited or is_inside:
            continue
        visited.add(id(module))
        if isinstance(module, ReparamBlock):
            block_prefixes.append(_layers.path_prefix(path))
        if isinstance(module, LAYERS):
            layers[path] = module
        elif isinstance(module, NORMS):
            norms[path] = module
    return layers, norms


def _set_modes(
    modules: Mapping[str, Any], modes: Mapping[str, set[bool | None]]
) -> None:
    """Give the layers the modes that they had in the model's call."""
    for path, observed in modes.items():
        # Where neither call nor layer said, the layer has failed already.
        if None in observed:
            continue
        evaluates = observed == {True}
        (modules[path].eval if evaluates else modules[path].train)()


# Layers of nnx, described for `_fusion`.


def _layer(
    path: str, module: Any, altered: set[str]
) -> ConvLayer | AffineLayer | Refusal:
    is_composite = isinstance(module, ReparamBlock) or is_standardized(module)
    if path in altered:
        return Refusal(altered_reason(path), is_composite)
    try:
        # The parts of a block count too: each may be a subclass.
        for inner_path, inner in _module_tree.modules(module):
            if isinstance(inner, LAYERS + NORMS):
                full_path = f"{_layers.path_prefix(path)}{inner_path}".rstrip(
                    "/"
                )
                _check_known(full_path, inner)
        if isinstance(module, AFFINE_LAYERS):
            return _affine_layer(path, module)
        return _conv_layer(path, module, is_composite)
    except ValueError as error:
        return Refusal(str(error), is_composite)


def _conv_layer(path: str, module: Any, is_composite: bool) -> ConvLayer:
    is_block = isinstance(module, ReparamBlock)
    # Of the parts of a block the one with the largest kernel has the dtypes.
    template = module.largest_conv if is_block else module
    rank = len(module.kernel_size)
    norms = [
        _norm_layer(f"{_layers.path_prefix(path)}{inner_path}", inner)
        for inner_path, inner in _module_tree.modules(module)
        if isinstance(inner, NORMS)
    ]

    def make_plain(merged: reparam.Conv, output_dtype: Any) -> PlainLayer:
        conv: Any = plain_conv(template, module, merged, output_dtype)
        return PlainLayer(conv, size(conv), conv)

    return ConvLayer(
        path=path,
        call=module,
        node=module.node() if is_block else conv_node(module),
        in_features=module.in_features,
        kernel_size=module.kernel_size,
        strides=_nodes.per_axis("strides", module.strides or 1, rank),
        dilation=_nodes.per_axis("dilation", module.kernel_dilation or 1, rank),
        padding=module.padding,
        dtype=template.dtype,
        dtypes=_dtypes_inside(module),
        norms=tuple(norms),
        branches=len(module.table()) if is_block else 1,
        size=size(module),
        is_composite=is_composite,
        is_library_type=is_library_type(module),
        make_plain=make_plain,
    )


def _dtypes_inside(module: nnx.Module) -> tuple[Any, ...]:
    dtypes = []
    for _, inner in _module_tree.modules(module):
        if hasattr(inner, "kernel"):
            dtypes.append(inner.kernel[...].dtype)
        if getattr(inner, "dtype", None) is not None:
            dtypes.append(inner.dtype)
    return tuple(dtypes)


def _affine_layer(path: str, module: Any) -> AffineLayer:
    def make(kernel: Array, bias: Array | None, dtype: Any) -> PlainLayer:
        layer = _with_variables(module, kernel, bias, dtype)
        return PlainLayer(layer, size(layer), layer)

    return AffineLayer(
        path=path,
        call=module,
        kernel=module.kernel[...],
        bias=_compat.read(module.bias),
        channel_axis=channel_axis(module),
        bias_shape=_bias_shape(module),
        dtype=module.dtype,
        size=size(module),
        is_library_type=is_library_type(module),
        make=make,
    )


def _norm_or_refusal(path: str, module: Any) -> NormLayer | Refusal:
    try:
        if getattr(module, "axis", -1) not in (-1, (-1,)):
            raise ValueError(
                f"{path!r} normalizes axis {module.axis}, not the channels"
            )
        _check_known(path, module)
        return _norm_layer(path, module)
    except ValueError as error:
        return Refusal(str(error))


def _norm_layer(path: str, module: Any) -> NormLayer:
    return NormLayer(
        path=path,
        call=lambda y: module(y, use_running_average=True),
        node=frozen_norm(module),
        # None is not known before the call, and does not evaluate.
        evaluates=module.use_running_average is True,
        size=size(module),
        dtype=module.dtype,
        is_library_type=is_library_type(module),
    )


def _check_known(path: str, module: Any) -> None:
    """Raise ValueError, with the path, if it is not known what the layer computes."""
    cls = _layers.nearest_type(module, LAYERS + NORMS)
    # The call of a block adds up whatever its table lists.
    extension_points = ("table", "least_axes") if cls is ReparamBlock else ()
    try:
        _layer_functions.check_layer(module, cls, extension_points)
        if isinstance(module, AFFINE_LAYERS):
            channel_axis(module)
        elif isinstance(module, nnx.Conv | WSConv):
            if module.kernel[...].ndim != len(module.kernel_size) + 2:
                raise ValueError(f"{_STACKED}, or its `node()`")
        elif isinstance(module, NORMS) and module.mean[...].ndim != 1:
            raise ValueError(_STACKED)
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from None


def channel_axis(layer: Any) -> int:
    """Return the axis of the kernel, from its end, that is the last of the output.

    Raises:
      ValueError: there is none, or the layer is stacked (nnx.vmap).
    """
    rank = layer.kernel[...].ndim
    match layer:
        case nnx.Linear():
            expected, axis = 2, -1
        case nnx.ConvTranspose():
            expected = len(layer.kernel_size) + 2
            axis = -2 if layer.transpose_kernel else -1
        case nnx.LinearGeneral():
            sizes = (layer.batch_axis, layer.in_features, layer.out_features)
            expected, axis = sum(map(len, sizes)), -1
        case _:
            expected = len(layer.kernel_shape)
            axis = _layers.einsum_channel_axis(layer.einsum_str)
    if rank != expected:
        raise ValueError(_STACKED)
    return axis


def _bias_shape(layer: Any) -> tuple[int, ...]:
    match layer:
        case nnx.LinearGeneral():
            return (*layer.batch_axis.values(), *layer.out_features)
        case nnx.Einsum():
            return _layers.einsum_bias_shape(
                layer.einsum_str, layer.kernel_shape
            )
    return (layer.out_features,)


def _with_variables(
    layer: Any, kernel: Array, bias: Array | None, dtype: Any
) -> Any:
    """Return a copy of an affine layer with this kernel and bias.

    Args:
      layer: the layer.
      kernel: of the copy.
      bias: of the copy, or None for that of the layer.
      dtype: to compute in; None = as the layer does.
    """
    copy = nnx.clone(layer)
    # Assigning to [...] would cast to the dtype of the old kernel.
    # Metadata of the variable (shardings) goes over.
    copy.kernel = layer.kernel.replace(kernel)
    if dtype is not None:
        copy.dtype = dtype
        if getattr(copy, "preferred_element_type", None) is not None:
            copy.preferred_element_type = dtype
    if bias is None:
        return copy
    # A bias of lower rank is that of statistics, without the layer's leading axes.
    bias = jnp.broadcast_to(bias, _bias_shape(layer))
    copy.bias = (
        nnx.Param(bias) if layer.bias is None else layer.bias.replace(bias)
    )
    if isinstance(layer, nnx.Einsum):
        copy.bias_shape = bias.shape
    else:
        copy.use_bias = True
    return copy


# The model's call, while some of its layers are watched.


class WatchedModel:
    """run(watch, *inputs) of a copy of a model, for `Probe`.

    Args:
      model: any module.
      paths: of the layers to watch.
      kwargs: keyword arguments of the model's call.

    Attributes:
      modes: {path: whether the statistics of the layer are the running ones} in all
        calls so far, for layers whose calls have `use_running_average`; None where
        neither a call nor the layer says.
      altered: paths of layers that are called with another kernel than the model holds,
        as far as calls outside of jit and scan show it.
    """

    def __init__(
        self, model: nnx.Module, paths: Iterable[str], kwargs: Mapping[str, Any]
    ):
        self.modes: dict[str, set[bool | None]] = {}
        self.altered: set[str] = set()
        self._watch: Watch | None = None
        paths = frozenset(paths)
        copy = nnx.clone(model)
        watched = {
            id(module): self._watched(module, path)
            for path, module in _module_tree.modules(copy)
            if path in paths
        }
        # In place of the layers, wherever the model refers to them.
        self._call = pure_call(_module_tree.replaced(copy, watched), kwargs)

    def __call__(self, watch: Watch, *inputs: Any) -> Any:
        """Return the output of the model."""
        self._watch = watch
        return self._call(*inputs)

    def _watched(self, module: nnx.Module, path: str) -> nnx.Module:
        """Return a copy of the layer, with its variables, that reports its calls."""
        base: Any = type(module)
        # nnx.WeightNorm and others write another kernel before each call.
        stored = _compat.read(getattr(module, "kernel", None))
        report = self

        # A subclass, not a module around the layer: code that asks for the layer's
        # type, reads its variables or wraps it (nnx.WeightNorm) goes on to work.
        class Watched(base):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                report._note_call(path, self, base, stored, args, kwargs)
                watch: Any = report._watch
                args, kwargs = with_input(
                    lambda x: watch(x, "in", path), args, kwargs
                )
                return watch(base.__call__(self, *args, **kwargs), "out", path)

        copy: Any = object.__new__(Watched)
        copy.__dict__.update(module.__dict__)
        return copy

    def _note_call(
        self,
        path: str,
        layer: Any,
        cls: type,
        stored: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if stored is not None and is_altered(stored, layer.kernel[...]):
            self.altered.add(path)
        signature = inspect.signature(cls.__call__)
        # What the call says takes precedence over the attribute, as in Flax.
        if "use_running_average" in signature.parameters:
            arguments = signature.bind(layer, *args, **kwargs).arguments
            setting = arguments.get("use_running_average")
            if setting is None:
                setting = getattr(layer, "use_running_average", None)
            self.modes.setdefault(path, set()).add(setting)


def pure_call(model: nnx.Module, kwargs: Mapping[str, Any]) -> Any:
    """Return the model's call as a function that leaves the model alone.

    Its variables are created in the trace that it runs in.
    """
    graph, state = nnx.split(model)

    def copied(x: Any) -> Any:
        return nnx.clone(x) if isinstance(x, nnx.Rngs) else x

    def call(*inputs: Any) -> Any:
        module: Any = nnx.merge(graph, state, copy=True)
        copies = {name: copied(x) for name, x in kwargs.items()}
        return module(*map(copied, inputs), **copies)

    return call


def evaluation_kwargs(
    model: nnx.Module, example: Any, kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return `kwargs`, and what else the call needs to evaluate on the example."""
    inputs, kwargs = as_inputs(example), dict(kwargs or {})
    # Flags that the caller passed stay: then `fuse` may find training mode.
    kwargs |= _layers.call_flags(type(model), False, inputs, kwargs)
    return kwargs | _functional.call_rngs(type(model), inputs, kwargs, None)
