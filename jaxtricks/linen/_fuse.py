"""Make a linen module ready for inference: blocks and norms become plain layers.

`jt.nnx.fuse` for linen. Layers are those that the module calls on the example; what
they compute, and how well the fused ones agree, is decided by `_fusion` for both.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import (
    _block_tables,
    _dtypes,
    _integers,
    _layer_functions,
    _layers,
    reparam,
)
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
    compare_models,
    count,
    fuse_layers,
    is_altered,
    is_library_type,
    pair_with_norms,
    traced,
    with_input,
)
from jaxtricks._typing import Array
from jaxtricks.linen._blocks import ReparamBlock
from jaxtricks.linen._calls import EvaluatedModule
from jaxtricks.linen._functional import layer_trains
from jaxtricks.linen._layers import (
    ExtendedBatchNorm,
    Variables,
    WSConv,
    conv_node,
    frozen_norm,
    is_standardized,
)
from jaxtricks.linen._substitution import substituted
from jaxtricks.linen._variables import (
    COLLECTIONS,
    at_path,
    copied,
    layer_path,
    replace_at,
    without_empty,
)
from jaxtricks.reparam import _nodes

CONVS = (nn.Conv, WSConv)
AFFINE_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.ConvTranspose)
NORMS = (nn.BatchNorm, ExtendedBatchNorm)
CLASSES = (*CONVS, ReparamBlock, *AFFINE_LAYERS, *NORMS)

_STACKED = "is stacked (nn.scan, nn.vmap): fuse one layer"


class PlainConv(nn.Module):
    """The convolution that stands for others.

    Attributes:
      features: channels of the output.
      kernel_size: per spatial axis, and so on, as in nn.Conv.
      strides: per spatial axis.
      padding: as in nn.Conv.
      kernel_dilation: per spatial axis.
      feature_group_count: groups.
      dtype: of the operands; None = that of input and parameters together.
      precision: as in `jax.lax`.
      preferred_element_type: dtype of the output, as in `jax.lax`.
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any
    kernel_dilation: tuple[int, ...]
    feature_group_count: int
    dtype: Any
    precision: Any
    preferred_element_type: Any

    @nn.compact
    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Map [..., *spatial, in_features] to [..., *spatial', features].

        Other arguments, such as the mode of a block, have no effect.
        """
        shape = _layers.conv_kernel_shape(
            x.shape[-1],
            self.features,
            self.kernel_size,
            self.feature_group_count,
        )
        zeros = nn.initializers.zeros
        kernel = self.param("kernel", zeros, shape)
        bias = self.param("bias", zeros, (self.features,))
        return _layer_functions.convolution(
            x,
            kernel,
            bias,
            dtype=_dtypes.common_dtype(x, kernel, bias, override=self.dtype),
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=self.feature_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )


class Folded(nn.Module):
    """Takes the place of a normalization that has become part of the layer before it.

    Attributes:
      dtype: of the output of the normalization.
    """

    dtype: Any

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return x in the dtype of the normalization."""
        return x.astype(self.dtype)


@checked
def fuse(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    example: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    path_filter: PathFilter | None = None,
) -> tuple[nn.Module, dict[str, Any], reparam.FuseReport]:
    """Return module and variables for inference, and the proof that they are the same.

    See `jt.nnx.fuse`. The variables returned are those of a network of plain layers,
    under the paths of the layers they stand for: {"kernel", "bias"}, and no statistics
    of what was folded.

    Args:
      module: any linen module.
      variables: its variables, with running statistics.
      example: an input of the module, or a tuple of them; needed, since a linen module
        makes its layers while it is called.
      example_kwargs: keyword arguments of the module's call. Flags that neither names
        (`train`, `deterministic`, ...) are set for evaluation, also where they are
        attributes of the module.
      path_filter: path_filter(path) -> True for what to fuse; None = everything that
        can be.

    Returns:
      (module, variables, report): fused.apply(variables, x) takes the arguments of the
      original's call.

    Raises:
      ValueError: as `jt.nnx.fuse`, and for a missing example.

    Example:
      >>> import jax, jax.numpy as jnp, jaxtricks as jt
      >>> conv, x = jt.linen.WSConv(4, (3, 3)), jnp.ones((1, 6, 6, 3))
      >>> variables = conv.init(jax.random.key(0), x)
      >>> plain, params, report = fuse(conv, variables, example=x)
      >>> sorted(params["params"]), report.layers[0].ratio < 1, plain.apply(params, x).shape
      (['bias', 'kernel'], True, (1, 6, 6, 4))

    References:
      Ding, Zhang, Ma, Han, Ding, Sun, "RepVGG", arXiv 2101.03697, section 3.
    """
    if example is None:
        raise ValueError(
            "linen.fuse: `example` is missing: a linen module makes its layers "
            "while it is called; pass an input"
        )
    evaluated = EvaluatedModule(module, variables, example, example_kwargs)
    watched = WatchedModule(evaluated)
    probe = Probe(watched, evaluated.example)
    flow, (inputs, dtypes) = probe.flow(), probe.values()
    # After the run, which shows what kernels are called with.
    layers, norms = _describe(evaluated, watched.altered)
    fusible, reasons = pair_with_norms(layers, norms, flow)
    fused = fuse_layers("linen.fuse", fusible, reasons, path_filter, inputs)

    # The variables of what is gone would confuse a checkpoint of the plain network.
    plain_layers: dict[str, nn.Module] = {}
    plain_variables = copied(variables)
    for one, plain in zip(fused.layers, fused.plain, strict=True):
        layer, params = plain.layer
        plain_layers[one.path] = layer
        replace_at(plain_variables, one.path, {"params": params})
        if one.norm is not None:
            path = one.norm.path
            plain_layers[path] = Folded(dtypes[path])
            replace_at(plain_variables, path, {})
    plain_variables = without_empty(plain_variables)
    fused_module = substituted(evaluated.module, plain_layers, is_fused=True)
    call = functools.partial(
        fused_module.apply, plain_variables, **evaluated.kwargs
    )
    sizes = _size(variables), _size(plain_variables)
    whole = compare_models(probe, call, fused, sizes)
    report = reparam.FuseReport(fused.rows, whole, fused.remaining())
    return fused_module, plain_variables, report


class WatchedModule:
    """run(watch, *inputs) of a module, for `Probe`.

    Attributes:
      altered: paths of layers that are called with another kernel than the module
        holds.
    """

    def __init__(self, evaluated: EvaluatedModule):
        self.evaluated = evaluated
        self.altered: set[str] = set()

    def __call__(self, watch: Watch, *inputs: Any) -> Any:
        """Return the output of the module."""
        interceptor = functools.partial(self._watched, watch)
        return self.evaluated.run(interceptor, CLASSES, *inputs)

    def _watched(
        self, watch: Watch, call: Any, args: Any, kwargs: Any, context: Any
    ) -> Any:
        path = layer_path(context.module)
        stored = at_path(self.evaluated.variables, path)["params"].get("kernel")
        if stored is not None:
            used = nn.meta.unbox(
                context.module.get_variable("params", "kernel")
            )
            if is_altered(stored, used):
                self.altered.add(path)
        args, kwargs = with_input(lambda x: watch(x, "in", path), args, kwargs)
        return watch(call(*args, **kwargs), "out", path)


# Layers of linen, described for `_fusion`.


def called_layers(
    evaluated: EvaluatedModule, classes: tuple[type, ...]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]:
    """Return what the module calls, by tracing it.

    Args:
      evaluated: the module.
      classes: of the layers that count.

    Returns:
      ({path: layer}, {path: shape of its input}, paths of the normalizations that
      train), in the order of the calls, modules before the layers inside them.
    """
    layers: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    training: set[str] = set()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer, path = context.module, layer_path(context.module)
        layers.setdefault(path, layer)
        inputs = [*args, *kwargs.values()]
        # The input may be given by name, and may not be an array.
        if inputs and getattr(inputs[0], "ndim", 0):
            shapes.setdefault(path, inputs[0].shape)
        if isinstance(layer, NORMS) and layer_trains(layer, args, kwargs):
            training.add(path)
        return call(*args, **kwargs)

    traced(evaluated.intercepted(note, classes), evaluated.example)
    return layers, shapes, training


def _describe(
    evaluated: EvaluatedModule, altered: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({path: layer}, {path: normalization}) without those inside blocks."""
    called, shapes, training = called_layers(evaluated, CLASSES)
    blocks = {
        p for p, layer in called.items() if isinstance(layer, ReparamBlock)
    }
    prefixes = [_layers.path_prefix(path) for path in blocks]
    layers, norms = {}, {}
    for path, bound in called.items():
        if any(
            path.startswith(prefix) and path not in blocks
            for prefix in prefixes
        ):
            continue
        variables = at_path(evaluated.variables, path)
        # The bound one belongs to a trace that is over.
        module = bound.clone(parent=None, name=None)
        if isinstance(module, NORMS):
            norms[path] = _norm_or_refusal(path, module, variables, training)
        else:
            layers[path] = _layer(
                path, module, variables, shapes[path][-1], altered, training
            )
    return layers, norms


def _layer(
    path: str,
    module: Any,
    variables: Variables,
    in_features: int,
    altered: set[str],
    training: set[str],
) -> ConvLayer | AffineLayer | Refusal:
    is_composite = isinstance(module, ReparamBlock) or is_standardized(module)
    if path in altered:
        return Refusal(altered_reason(path), is_composite)
    try:
        if isinstance(module, ReparamBlock):
            return _block_layer(path, module, variables, in_features, training)
        _check_known(path, module, variables)
        if isinstance(module, AFFINE_LAYERS):
            return _affine_layer(path, module, variables)
        return _conv_layer(path, module, variables, is_composite)
    except ValueError as error:
        return Refusal(str(error), is_composite)


def _conv_layer(
    path: str, module: Any, variables: Variables, is_composite: bool
) -> ConvLayer:
    kernel = variables["params"]["kernel"]
    dtypes = (
        [kernel.dtype] if module.dtype is None else [kernel.dtype, module.dtype]
    )
    return _described_conv(
        path,
        module,
        variables,
        template=module,
        call=lambda x: module.apply(variables, x),
        node=conv_node(module, variables),
        in_features=kernel.shape[-2] * module.feature_group_count,
        dtypes=tuple(dtypes),
        param_dtype=kernel.dtype,
        is_composite=is_composite,
    )


def _block_layer(
    path: str,
    module: ReparamBlock,
    variables: Variables,
    in_features: int,
    training: set[str],
) -> ConvLayer:
    _check_class(path, module, ReparamBlock, ("table", "least_axes"))
    # The kernels alone do not say whether there is an identity branch.
    block = module.geometry(in_features)
    table = module.table(block)
    prefix = _layers.path_prefix(path)
    kernels, norms = _block_parts(prefix, module, block, variables, training)
    dtypes = [kernel.dtype for _, kernel in kernels]
    dtypes += [conv.dtype for conv, _ in kernels if conv.dtype is not None]
    dtypes += [norm.dtype for norm in norms if norm.dtype is not None]
    conv, kernel = kernels[0]
    nodes = module.branch_nodes(variables, block)
    return _described_conv(
        path,
        module,
        variables,
        template=conv,
        call=lambda x: module.apply(variables, x, use_running_average=True),
        node=_layer_functions.block_node(nodes, module.norm_node(variables)),
        in_features=in_features,
        dtypes=tuple(dtypes),
        param_dtype=kernel.dtype,
        is_composite=True,
        norms=tuple(norms),
        branches=len(table),
    )


def _block_parts(
    prefix: str,
    module: ReparamBlock,
    block: _block_tables.BlockGeometry,
    variables: Variables,
    training: set[str],
) -> tuple[list[tuple[Any, Array]], list[NormLayer]]:
    """Return the convolutions of a block with their kernels, and its normalizations."""
    kernels, norms = [], []

    def add_conv(path: str, conv: Any) -> None:
        conv_variables = at_path(variables, path)
        _check_known(f"{prefix}{path}", conv, conv_variables)
        kernels.append((conv, conv_variables["params"]["kernel"]))

    def add_norm(path: str) -> None:
        norm, norm_variables = (
            module.norm(parent=None),
            at_path(variables, path),
        )
        norm_path = f"{prefix}{path}"
        frozen_norm(norm, norm_variables)
        _check_known(norm_path, norm, norm_variables)
        norms.append(_norm_layer(norm_path, norm, norm_variables, training))

    for spec in module.table(block):
        branch = module.branch(spec, block, parent=None)
        if spec.kind == "conv":
            add_conv(f"{spec.name}/conv", branch.conv_layer(parent=None))
        if spec.first is not None:
            first = branch.pointwise(parent=None).conv_layer(parent=None)
            add_conv(f"{spec.name}/first/conv", first)
        if module.mode == "branches":
            add_norm(f"{spec.name}/norm")
            if spec.first is not None:
                add_norm(f"{spec.name}/first/norm")
    if module.mode == "online":
        add_norm("norm")
    return kernels, norms


def _described_conv(
    path: str,
    module: Any,
    variables: Variables,
    *,
    template: Any,
    param_dtype: Any,
    norms: tuple[NormLayer, ...] = (),
    branches: int = 1,
    **how: Any,
) -> ConvLayer:
    kernel_size = _integers.listed(module.kernel_size)
    rank = len(kernel_size)
    strides = _nodes.per_axis("strides", module.strides or 1, rank)
    dilation = _nodes.per_axis("dilation", module.kernel_dilation or 1, rank)

    def make_plain(merged: reparam.Conv, output_dtype: Any) -> PlainLayer:
        conv = PlainConv(
            features=module.features,
            kernel_size=kernel_size,
            strides=strides,
            padding=_layers.hashable_padding(module.padding),
            kernel_dilation=dilation,
            feature_group_count=merged.groups,
            dtype=template.dtype,
            precision=template.precision,
            preferred_element_type=output_dtype,
        )
        bias = merged.bias
        bias = jnp.zeros(module.features) if bias is None else bias
        params = {
            "kernel": merged.kernel.astype(param_dtype),
            "bias": bias.astype(param_dtype),
        }
        return _plain_layer(conv, params)

    return ConvLayer(
        path=path,
        kernel_size=kernel_size,
        strides=strides,
        dilation=dilation,
        padding=module.padding,
        dtype=template.dtype,
        norms=norms,
        branches=branches,
        size=_size(variables),
        is_library_type=is_library_type(module),
        make_plain=make_plain,
        **how,
    )


def _plain_layer(layer: nn.Module, params: dict[str, Any]) -> PlainLayer:
    def call(x: Array) -> Any:
        return layer.apply({"params": params}, x)

    return PlainLayer(call, count(params), (layer, params))


def _affine_layer(path: str, module: Any, variables: Variables) -> AffineLayer:
    params = variables["params"]
    kernel = params["kernel"]
    bias_shape = _bias_shape(module, kernel.shape)

    def make(kernel: Array, bias: Array | None, dtype: Any) -> PlainLayer:
        # With a dtype it is computed for the error bound, else it is the result.
        how: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if dtype is not None and getattr(
            module, "preferred_element_type", None
        ):
            how["preferred_element_type"] = dtype
        new_params = {"kernel": kernel}
        if bias is not None:
            how["use_bias"] = True
            new_params["bias"] = jnp.broadcast_to(bias, bias_shape)
        return _plain_layer(module.clone(**how), new_params)

    return AffineLayer(
        path=path,
        call=lambda x: module.apply(variables, x),
        kernel=kernel,
        bias=params.get("bias"),
        channel_axis=channel_axis(module, kernel.shape),
        bias_shape=bias_shape,
        dtype=module.dtype,
        size=_size(variables),
        is_library_type=is_library_type(module),
        make=make,
    )


def _norm_or_refusal(
    path: str, module: Any, variables: Variables, training: set[str]
) -> NormLayer | Refusal:
    try:
        if getattr(module, "axis", -1) not in (-1, (-1,)):
            raise ValueError(
                f"{path!r} normalizes axis {module.axis}, not the channels"
            )
        _check_known(path, module, variables)
        return _norm_layer(path, module, variables, training)
    except ValueError as error:
        return Refusal(str(error))


def _norm_layer(
    path: str, module: Any, variables: Variables, training: set[str]
) -> NormLayer:
    # Flax refuses the setting in the call where the module has it too.
    evaluating = module.clone(use_running_average=None)
    return NormLayer(
        path=path,
        call=lambda y: evaluating.apply(variables, y, use_running_average=True),
        node=frozen_norm(module, variables),
        evaluates=path not in training,
        size=_size(variables),
        dtype=module.dtype,
        is_library_type=is_library_type(module),
    )


def _size(variables: Mapping[str, Any]) -> int:
    """Return the number of parameters and running statistics."""
    return count({name: variables.get(name, {}) for name in COLLECTIONS})


def _check_known(path: str, module: Any, variables: Variables) -> None:
    """Raise ValueError, with the path, if it is not known what the layer computes."""
    if not isinstance(module, CLASSES):
        raise ValueError(
            f"{path!r} is a {type(module).__name__}: a block of these does not fuse"
        )
    cls = _layers.nearest_type(module, CLASSES)
    _check_class(path, module, cls)
    try:
        if isinstance(module, AFFINE_LAYERS):
            channel_axis(module, variables["params"]["kernel"].shape)
        elif isinstance(module, NORMS):
            if variables["batch_stats"]["mean"].ndim != 1:
                raise ValueError(_STACKED)
        else:
            rank = len(_integers.listed(module.kernel_size))
            if variables["params"]["kernel"].ndim != rank + 2:
                raise ValueError(_STACKED)
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from None


def _check_class(
    path: str, module: Any, cls: type, extension_points: Sequence[str] = ()
) -> None:
    try:
        _layer_functions.check_layer(module, cls, tuple(extension_points))
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from None


def channel_axis(layer: Any, shape: Sequence[int]) -> int:
    """Return the axis of the kernel, from its end, that is the last of the output.

    Args:
      layer: a layer of a type in `AFFINE_LAYERS`.
      shape: of its kernel.

    Raises:
      ValueError: there is none, or the layer is stacked (nn.scan, nn.vmap).
    """
    match layer:
        case nn.Dense():
            expected, axis = 2, -1
        case nn.ConvTranspose():
            expected = len(_integers.listed(layer.kernel_size)) + 2
            axis = -2 if layer.transpose_kernel else -1
        case nn.DenseGeneral():
            sizes = (layer.batch_dims, layer.axis, layer.features)
            expected, axis = sum(len(_integers.listed(s)) for s in sizes), -1
        case _:
            if layer.einsum_str is None:
                raise ValueError("is given its equation in the call")
            expected = len(layer.shape)
            axis = _layers.einsum_channel_axis(layer.einsum_str)
    if len(shape) != expected:
        raise ValueError(_STACKED)
    return axis


def _bias_shape(layer: Any, shape: Sequence[int]) -> tuple[int, ...]:
    match layer:
        case nn.DenseGeneral():
            batch_rank = len(_integers.listed(layer.batch_dims))
            return (*shape[:batch_rank], *_integers.listed(layer.features))
        case nn.Einsum():
            return _layers.einsum_bias_shape(str(layer.einsum_str), shape)
    return (layer.features,)
