"""Linear layers and transposed convolutions that take up the normalization behind them."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtricks import _dtypes, _flops, _jaxpr, reparam, weightstd
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat, _flags, _functional, _module_tree, _overrides
from jaxtricks.nnx._branches import (
    Branched,
    conv_node,
    frozen_norm,
    layer_dtypes,
    plain_conv,
)
from jaxtricks.nnx._conv import WSConv, pad_by_mode
from jaxtricks.nnx._norm import ExtendedBatchNorm
from jaxtricks.reparam import _dataflow, _nodes
from jaxtricks.reparam._apply import norm_factor
from jaxtricks.reparam._dataflow import Flow
from jaxtricks.reparam._fuse import FACTOR

AFFINE_LAYERS: tuple[type, ...] = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.ConvTranspose,
)


def channel_axis(layer: Any) -> int:
    """The axis of the kernel, from the end, that is the last axis of the layer's output.

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
            expected, axis = len(layer.kernel_shape), _einsum_axis(layer.einsum_str)
    if rank != expected:
        raise ValueError("is stacked (nnx.vmap): fuse one layer")
    return axis


def _einsum_axis(equation: str) -> int:
    _, kernel, outputs = equation.replace("->", ",").split(",")
    if not outputs or "." in kernel or outputs[-1] not in kernel:
        raise ValueError(
            f"has an output whose last axis is not an axis of its kernel ({equation})"
        )
    return kernel.index(outputs[-1]) - len(kernel)


def with_norm(layer: Any, norm: reparam.Norm) -> Any:
    """A copy of the layer whose output is the normalized one: y = kernel t x + (bias - mean) t + b."""
    kernel = jnp.asarray(layer.kernel[...], _dtypes.wide_dtype(layer.kernel[...]))
    norm = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, _dtypes.wide_dtype(kernel, leaf)), norm
    )
    factor, offset = norm_factor(norm)
    bias = _compat.read(layer.bias)
    shift = (-norm.mean if bias is None else bias - _row(norm.mean, bias)) * (
        factor if bias is None else _row(factor, bias)
    )
    if offset is not None:
        shift = shift + _row(offset, shift)
    return _with_variables(
        layer, kernel * _along(factor, channel_axis(layer), kernel.ndim), shift
    )


def rounding_bound(
    layer: Any, norm: reparam.Norm, fused: Any, x: Array, dtype: Any
) -> float:
    """How far apart rounding in `dtype` may put layer and normalization from the fused layer on x.

    `reparam.error_bound` for layers that are no node of its algebra: 16 u (S_fused +
    S_branch).
    """
    wide = _dtypes.wide_dtype(x)
    x = jnp.abs(jnp.asarray(x, wide))
    norm = jax.tree.map(lambda leaf: jnp.abs(jnp.asarray(leaf, wide)), norm)
    factor, offset = norm_factor(norm)
    y = _magnitude(layer, wide)(x)
    y = (y + _row(norm.mean, y)) * _row(factor, y)
    y = y if offset is None else y + _row(offset, y)
    total = jnp.max(y) + jnp.max(_magnitude(fused, wide)(x))
    return FACTOR * float(jnp.finfo(dtype).eps) / 2 * float(total)


def _magnitude(layer: Any, dtype: Any) -> Any:
    """The layer with the absolute values of its parameters, computed in `dtype`."""
    bias = _compat.read(layer.bias)
    copy = _with_variables(
        layer,
        jnp.abs(layer.kernel[...]),
        None if bias is None else jnp.abs(bias),
        dtype,
    )
    copy.dtype = dtype
    if getattr(copy, "preferred_element_type", None) is not None:
        copy.preferred_element_type = dtype
    return copy


def _with_variables(
    layer: Any, kernel: Array, bias: Array | None, dtype: Any = None
) -> Any:
    """A copy of the layer with this kernel and bias, in `dtype` or that of its kernel."""
    copy = nnx.clone(layer)
    dtype = dtype or layer.kernel[...].dtype
    copy.kernel = layer.kernel.replace(
        kernel.astype(dtype)
    )  # not [...] =, which would cast
    if bias is None:
        return copy
    shape = _bias_shape(layer)
    values = jnp.broadcast_to(bias, shape).astype(dtype)
    copy.bias = nnx.Param(values) if layer.bias is None else layer.bias.replace(values)
    if isinstance(layer, nnx.Einsum):
        copy.bias_shape = shape
    else:
        copy.use_bias = True
    return copy


def _bias_shape(layer: Any) -> tuple[int, ...]:
    match layer:
        case nnx.LinearGeneral():
            return (*layer.batch_axis.values(), *layer.out_features)
        case nnx.Einsum():
            _, kernel, outputs = layer.einsum_str.replace("->", ",").split(",")
            sizes = dict(zip(kernel, layer.kernel_shape, strict=True))
            return tuple(sizes[letter] for letter in outputs if letter in sizes)
    return (layer.out_features,)


def _along(values: Array, axis: int, rank: int) -> Array:
    shape = [1] * rank
    shape[axis] = values.shape[-1]
    return values.reshape(shape)


def _row(values: Array, like: Array) -> Array:
    return _along(values, -1, like.ndim)


# A layer or a block, and the normalization behind it, if any: what fuses into one plain
# layer.


NORMS = (nnx.BatchNorm, ExtendedBatchNorm)
LAYERS = (nnx.Conv, WSConv, Branched, *AFFINE_LAYERS)
"""What may take up a normalization."""

_EXTENSION_POINTS = (
    "parts",
    "_make",
)  # of a block, whose call adds up what `parts` lists


class Unit(NamedTuple):
    """What one plain layer can stand for in evaluation mode.

    Attributes:
      layer: path of the convolution.
      conv: nnx.Conv, WSConv, a block, or a layer that `affine` knows.
      norm: the normalization of its output, or None.
      norm_layer: its path.
    """

    layer: str
    conv: Any
    norm: Any = None
    norm_layer: str | None = None

    def __call__(self, x: Array) -> Array:
        """What the model computes."""
        y = self.conv(x)
        return y if self.norm is None else self.norm(y, use_running_average=True)

    def node(self) -> Any:
        """The unit in the branch algebra, with its running statistics."""
        if isinstance(self.conv, Branched):
            node = self.conv.branches()
        else:
            node = conv_node(self.conv)
        return (
            node
            if self.norm is None
            else reparam.Sequential(node, frozen_norm(self.norm))
        )

    def check_kind(self) -> None:
        """Raise if it is not known what the unit computes, whatever its mode and its statistics are."""
        for path, module in _module_tree.modules(self.conv):
            if isinstance(module, LAYERS + NORMS):
                _known(
                    _module_tree.below(self.layer) + path if path else self.layer,
                    module,
                )
        if self.norm is not None:
            _known(str(self.norm_layer), self.norm)
        if isinstance(self.conv, AFFINE_LAYERS):
            frozen_norm(self.norm)
        else:
            self.node()

    def check(self) -> None:
        """Raise if the unit is in training mode, or if its statistics say nothing yet."""
        norms = {
            _module_tree.below(self.layer) + path: module
            for path, module in _module_tree.modules(self.conv)
            if isinstance(module, NORMS)
        }
        if self.norm is not None:
            norms[str(self.norm_layer)] = self.norm
        for path, norm in norms.items():
            if norm.use_running_average is not True:
                raise ValueError(
                    f"{path!r} is in training mode, in which it is not a fixed function: evaluate first, by "
                    "model.eval() in nnx, or by an argument of the call (train=False, "
                    "use_running_average=True) in `example_kwargs`"
                )
        if norms and all(map(_untouched, norms.values())):
            raise ValueError(
                f"the statistics of {min(norms)!r} were never updated (mean 0, variance 1): train the "
                "model, or load them with its parameters, before it is fused"
            )

    @property
    def exact(self) -> bool:
        """Whether all types are those of flax or of this library themselves."""
        types = (type(self.conv), *(() if self.norm is None else (type(self.norm),)))
        return all(
            kind.__module__.startswith(("flax.", "jaxtricks.")) for kind in types
        )

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.conv.kernel_size)

    def probe(self) -> Array:
        """An input to compare on where no example is given."""
        extents = _extents(self.conv)
        shape = (2, *(2 * n + 3 for n in extents), self.conv.in_features)
        return random_input(jax.ShapeDtypeStruct(shape, _dtype(self.conv, jnp.float32)))

    def fused(self, x: Array) -> tuple[Any, reparam.FusedLayer]:
        """The plain layer, and how it compares with the unit on x [..., *spatial, in_features].

        Raises:
          ValueError: they differ by more than rounding allows.
        """
        make = (
            self._fused_affine
            if isinstance(self.conv, AFFINE_LAYERS)
            else self._fused_conv
        )
        with jax.default_matmul_precision("highest"):
            x, plain, bound = make(jnp.asarray(x))
            y, z = self(x), plain(x)
            error = largest_difference(y, z)
        if self.norm is None and z.dtype != y.dtype:
            # A block's normalizations give float32 where its convolutions compute in
            # sixteen bits.
            plain.preferred_element_type = y.dtype
        layers = (self.conv,) if self.norm is None else (self.conv, self.norm)
        found = reparam.FusedLayer(
            self.layer,
            len(self.conv.parts()) if isinstance(self.conv, Branched) else 1,
            error,
            bound,
            sum(map(variables, layers)),
            variables(plain),
            flops(self, x),
            flops(plain, x),
        )
        return plain, within_bound(found)

    def _fused_conv(self, x: Array) -> tuple[Any, Any, float]:
        """(x as the convolution takes it, plain convolution, what rounding allows)."""
        x = jnp.asarray(x, _dtype(self.conv, x.dtype)).reshape(
            (-1, *x.shape[x.ndim - self.rank - 1 :])
        )
        size, dilation = self.conv.kernel_size, _per_axis(self.conv, "kernel_dilation")
        node = self.node()
        merged = reparam.fuse(node, size)
        padded, padding = pad_by_mode(x, self.conv.padding, size, dilation)
        bound = reparam.error_bound(
            node,
            padded,
            strides=_per_axis(self.conv, "strides"),
            padding=padding,
            dilation=dilation,
            kernel_size=size,
            fused=merged,
        )
        # The bound is of rounding in x's dtype; parameters or a normalization may have
        # a coarser one.
        coarser = jnp.finfo(self._coarsest(x.dtype)).eps / jnp.finfo(x.dtype).eps
        return x, plain_conv(self.conv, merged), float(bound) * float(coarser)

    def _fused_affine(self, x: Array) -> tuple[Any, Any, float]:
        """(x, the layer with other variables, what rounding allows)."""
        norm = frozen_norm(self.norm)
        plain = with_norm(self.conv, norm)
        dtype = self._coarsest(self.conv.dtype or x.dtype)
        return x, plain, rounding_bound(self.conv, norm, plain, x, dtype)

    def _coarsest(self, dtype: Any) -> Any:
        """The dtype with the largest unit roundoff of those that the unit computes or is stored in."""
        modules = [module for _, module in _module_tree.modules(self.conv)]
        modules += [] if self.norm is None else [self.norm]
        kernels = [m.kernel[...].dtype for m in modules if hasattr(m, "kernel")]
        computed = [m.dtype for m in modules if getattr(m, "dtype", None) is not None]
        return max((dtype, *kernels, *computed), key=lambda d: float(jnp.finfo(d).eps))


def _known(path: str, module: Any) -> None:
    kind = _overrides.kind_of(module, LAYERS + NORMS)
    points = _EXTENSION_POINTS if kind is Branched else ()
    try:
        _overrides.check(module, kind, points)
        if isinstance(module, AFFINE_LAYERS):
            channel_axis(module)
        elif (
            hasattr(module, "kernel")
            and module.kernel[...].ndim != len(module.kernel_size) + 2
        ):
            raise ValueError(
                "is stacked (nnx.vmap): fuse one layer, or its `branches()`"
            )
        elif isinstance(module, NORMS) and module.mean[...].ndim != 1:
            raise ValueError("is stacked (nnx.vmap): fuse one layer")
    except ValueError as error:
        raise ValueError(f"{path!r} {error}") from None


def within_bound(found: reparam.FusedLayer) -> reparam.FusedLayer:
    """The comparison itself, or an error if it shows another function."""
    # Not "error > bound": that would let NaN pass.
    if not found.max_error <= found.bound:
        raise ValueError(
            f"fused and unfused {found.layer or 'model'!r} differ by {found.max_error:.3g}, where rounding "
            f"allows {found.bound:.3g}, so they are different functions: leave "
            f"{'it' if found.layer else 'layers'} out by `path_filter`"
        )
    return found


def largest_difference(a: Any, b: Any) -> float:
    """max |a - b| over all floating leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [
        (
            jnp.asarray(x, _dtypes.wide_dtype(x, y)),
            jnp.asarray(y, _dtypes.wide_dtype(x, y)),
        )
        for x, y in pairs
    ]
    return max((float(jnp.max(jnp.abs(x - y))) for x, y in wide if x.size), default=0.0)


def random_input(like: Any) -> Array:
    """Normal numbers of this shape and dtype."""
    # Of numpy, since it may be drawn inside a trace and used outside.
    return np.random.default_rng(0).normal(size=like.shape).astype(like.dtype)


def variables(module: nnx.Module) -> int:
    """Number of parameters and running statistics."""
    return count(nnx.state(module, (nnx.Param, nnx.BatchStat)))


def count(tree: Any) -> int:
    """Number of entries of all arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flops(fn: Any, *inputs: Any) -> int:
    """Floating-point operations of fn(*inputs)."""
    return _flops.flops(_jaxpr.trace(fn, *inputs)[0].jaxpr)


def _untouched(norm: Any) -> bool:
    return bool(jnp.all(norm.mean[...] == 0) & jnp.all(norm.var[...] == 1))


def _dtype(conv: Any, dtype: Any) -> Any:
    return layer_dtypes(conv).compute or dtype


def _per_axis(conv: Any, name: str) -> tuple[int, ...]:
    return _nodes.per_axis(name, getattr(conv, name) or 1, len(conv.kernel_size))


def _extents(conv: Any) -> list[int]:
    dilation = _per_axis(conv, "kernel_dilation")
    return [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, dilation, strict=True)]


# A model run on an example, with an eye on what its layers are given and give.


_DRAWS = 4  # random signs that the layers' bounds are carried to the output with

Watch = Callable[[Any, str, str], Any]


class Probed:
    """A model on an example; its layers pass what they are given and give through a function.

    Args:
      run: run(watch, *example) -> output, where every watched layer does x = watch(x,
        "in", path) and y = watch(y, "out", path).
      example: an input of the model, or a tuple of them; what is not an array is passed
        as it is.
    """

    def __init__(self, run: Callable[..., Any], example: Any):
        self.run = run
        self.example = as_inputs(example)

    def __call__(self, *example: Any) -> Any:
        """The model's output."""
        return self.run(_unchanged, *example)

    def flow(self) -> _dataflow.Flow:
        """What feeds what."""
        return _dataflow.read(
            traced(functools.partial(self.run, _dataflow.mark), self.example)
        )

    def values(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """({path: what the layer is given first}, {path: dtype of what it gives}).

        Inside jit or scan no values are seen: an input drawn at random, of the same
          shape, stands for them.
        """
        inputs: dict[str, Array] = {}
        dtypes: dict[str, Any] = {}

        def keep(x: Any, side: str, path: str) -> Any:
            if side == "out":
                dtypes.setdefault(path, x.dtype)
            elif path not in inputs:
                inputs[path] = random_input(x) if isinstance(x, jax.core.Tracer) else x
            return x

        self.run(keep, *self.example)
        return inputs, dtypes

    def disturbed(self, sizes: dict[str, float], seed: int) -> Any:
        """The output if the outputs of these layers change by +-size, at random."""
        rng = np.random.default_rng(seed)

        def change(y: Any, side: str, path: str) -> Any:
            if side == "in" or path not in sizes:
                return y
            signs = rng.choice([-1.0, 1.0], size=y.shape)
            return y + jnp.asarray(sizes[path] * signs, y.dtype)

        return self.run(change, *self.example)


class Spied:
    """run(watch, *inputs) of a copy of a model in which some layers are watched; see `Probed`.

    Args:
      model: any module.
      watched: the paths of those layers.
      kwargs: keyword arguments of the model's call.

    Attributes:
      modes: {path: whether the layer's statistics are the running ones} of all calls so
        far, for layers whose calls have a `use_running_average`; None where neither a
        call nor the layer says.
      altered: {path: reason} of layers that are called with another kernel than the
        model holds, as far as calls outside of jit and scan show it.
    """

    def __init__(
        self, model: nnx.Module, watched: Iterable[str], kwargs: Mapping[str, Any]
    ):
        model, paths = nnx.clone(model), frozenset(watched)
        self.modes: dict[str, set[bool | None]] = {}
        self.altered: dict[str, str] = {}
        self._watch: Watch = _unchanged
        for path, module in _module_tree.modules(model):
            if path in paths:
                self._spy(module, path)
        self._call = pure_call(model, kwargs)

    def __call__(self, watch: Watch, *inputs: Any) -> Any:
        """The model's output."""
        self._watch = watch
        return self._call(*inputs)

    def _spy(self, module: nnx.Module, path: str) -> None:
        # A subclass, so that code that asks for a layer's type or reads its variables
        # goes on to work.
        base: Any = type(module)
        signature = inspect.signature(base.__call__)
        stored = _compat.read(getattr(module, "kernel", None))

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if stored is not None and is_altered(stored, layer.kernel[...]):
                self.altered[path] = altered_reason(path)
            if "use_running_average" in signature.parameters:
                given = signature.bind(layer, *args, **kwargs).arguments.get(
                    "use_running_average"
                )
                own = getattr(layer, "use_running_average", None)
                self.modes.setdefault(path, set()).add(own if given is None else given)
            args, kwargs = with_input(
                lambda x: self._watch(x, "in", path), args, kwargs
            )
            return self._watch(base.__call__(layer, *args, **kwargs), "out", path)

        object.__setattr__(
            module, "__class__", type(base.__name__, (base,), {"__call__": call})
        )


def is_altered(stored: Any, used: Any) -> bool:
    """Whether a layer's kernel is another one than it is stored with; not known of tracers."""
    known = not isinstance(used, jax.core.Tracer)
    return known and used is not stored and not np.array_equal(stored, used)


def altered_reason(path: str) -> str:
    """Why a layer with an altered kernel is kept."""
    return f"{path!r} is called with another kernel than the model holds (WeightNorm, SpectralNorm)"


def with_input(
    change: Callable[[Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's call with the first, its input, changed; it may be given by name."""
    if args:
        return (change(args[0]), *args[1:]), dict(kwargs)
    (name, x), *others = kwargs.items()
    return (), {name: change(x), **dict(others)}


def pure_call(model: nnx.Module, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The model's call; its variables are made anew in the trace that it runs in, and change nothing."""
    graph, state = nnx.split(model)

    def own(x: Any) -> Any:
        return nnx.clone(x) if isinstance(x, nnx.Rngs) else x

    def call(*inputs: Any) -> Any:
        module = nnx.merge(graph, state, copy=True)
        return module(*map(own, inputs), **{name: own(x) for name, x in kwargs.items()})

    return call


def evaluation_kwargs(
    model: nnx.Module, example: Any, kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`kwargs`, and what the call of the model needs beside them to evaluate on the example."""
    inputs, kwargs = as_inputs(example), dict(kwargs or {})
    kwargs |= _flags.call_flags(type(model), False, inputs, kwargs)
    return kwargs | _functional.call_rngs(type(model), inputs, kwargs, None)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """The positional arguments that an example stands for."""
    return example if isinstance(example, tuple) else (example,)


def traced(fn: Callable[..., Any], example: Sequence[Any]) -> _jaxpr.ClosedJaxpr:
    """The trace of fn(*example); flags among the inputs stay what they are."""
    arrays = [i for i, x in enumerate(example) if _is_arrays(x)]

    def run(*given: Any) -> Any:
        inputs = list(example)
        for i, x in zip(arrays, given, strict=True):
            inputs[i] = x
        return fn(*inputs)

    return _jaxpr.trace(run, *(example[i] for i in arrays))[0]


def whole_model(
    probed: Probed,
    fused: Callable[..., Any],
    units: Sequence[Unit],
    rows: Sequence[reparam.FusedLayer],
    params: tuple[int, int],
) -> reparam.FusedLayer:
    """The fused model against the model on the example.

    Args:
      probed: the model.
      fused: the fused model's call.
      units: what was fused.
      rows: their own comparisons.
      params: number of parameters and statistics before and after.

    Raises:
      ValueError: they differ by more than what the layers' bounds come to at the
        output.
    """
    ends = {
        one.norm_layer or one.layer: row.bound
        for one, row in zip(units, rows, strict=True)
    }
    with jax.default_matmul_precision("highest"):
        y, z = probed(*probed.example), fused(*probed.example)
        others = [probed.disturbed(ends, seed) for seed in range(_DRAWS)]
    carried = max(largest_difference(y, other) for other in others)
    costs = [_flops.flops(traced(fn, probed.example).jaxpr) for fn in (probed, fused)]
    branches, error = sum(row.branches for row in rows), largest_difference(y, z)
    found = reparam.FusedLayer(
        "", branches, error, carried + _rounding(y), *params, *costs
    )
    return within_bound(found)


def _rounding(y: Any) -> float:
    """What the last operation alone may round."""
    leaves = [x for x in jax.tree.leaves(y) if _dtypes.is_floating(x) and x.size]
    return max(
        (16 * float(jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x))) for x in leaves),
        default=0.0,
    )


def _is_arrays(x: Any) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x))


def _unchanged(x: Any, side: str, path: str) -> Any:
    return x


# A whole model for inference: blocks, standardized kernels and normalizations become
# plain layers.


PathFilter = Callable[[str], bool]


class Folded(nnx.Module):
    """Stands where a normalization was that is part of the layer in front of it now.

    Attributes:
      dtype: of the normalization's output.
    """

    def __init__(self, dtype: Any):
        self.dtype = dtype

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """x."""
        return x.astype(self.dtype)


@checked
def fuse(
    model: nnx.Module,
    *,
    example: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    path_filter: PathFilter | None = None,
) -> tuple[Any, reparam.FuseReport]:
    """The model for inference, and the proof that it computes the same function.

    Every block (ACBlock, RepVGGBlock, ...), WSConv and convolution with a
    `weightstd.standardized` hook turns into a plain nnx.Conv. Given an example, a
    convolution, nnx.Linear, LinearGeneral, Einsum or ConvTranspose takes up the
    normalization behind it, where the traced output of the layer goes to that
    normalization and nowhere else. A subclass that changes what its layer computes is
    kept, with the reason.

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
      (on its own input in the example, else on random ones) and for the model,
      parameters, FLOPs, and what was kept and why.

    Raises:
      ValueError: training mode, statistics that were never updated, `path_filter` that
        chooses nothing or what does not fuse (by name, with the reason), or a
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
    copy = nnx.clone(model)
    convs, norms = layers(copy)
    if example is None:
        kwargs, probed, inputs, dtypes = {}, None, {}, {}
        units, kept = alone(convs)
        kept |= dict.fromkeys(norms, "without `example` it is not known what feeds it")
    else:
        kwargs = evaluation_kwargs(model, example, example_kwargs)
        spied = Spied(model, (*convs, *norms), kwargs)
        probed = Probed(spied, example)
        flow, (inputs, dtypes) = probed.flow(), probed.values()
        _set_modes(convs | norms, spied.modes)
        units, kept = paired(convs, norms, flow, spied.altered)
    units, plain, rows, kept = merged("nnx.fuse", units, kept, path_filter, inputs)
    changes: dict[int, Any] = {
        id(one.conv): new for one, new in zip(units, plain, strict=True)
    }
    changes |= {
        id(one.norm): Folded(dtypes[one.norm_layer]) for one in units if one.norm_layer
    }
    fused = _module_tree.replaced(copy, changes)
    whole = None
    if probed is not None:
        counts = variables(model), variables(fused)
        whole = whole_model(probed, pure_call(fused, kwargs), units, rows, counts)
    return fused, reparam.FuseReport(rows, whole, staying(units, kept))


def _set_modes(
    watched: Mapping[str, Any], modes: Mapping[str, set[bool | None]]
) -> None:
    """The modes that the layers had in the model's call, which an argument may have said."""
    for path, seen in modes.items():
        if None not in seen:
            (watched[path].eval if seen == {True} else watched[path].train)()


def merged(
    name: str,
    units: Sequence[Unit],
    kept: Mapping[str, str],
    path_filter: PathFilter | None,
    inputs: Mapping[str, Array],
) -> tuple[list[Unit], list[Any], tuple[reparam.FusedLayer, ...], dict[str, str]]:
    """Fuse the units.

    Args:
      name: of the public function, for errors.
      units: what can be fused.
      kept: {path: reason} of what can not.
      path_filter: the caller's choice among the units.
      inputs: {path: input of the layer}; others are compared on a random one.

    Returns:
      (units, the plain layers, how each compares with its unit, `kept` and what turned
      out not to fuse).
    """
    kept, rows = dict(kept), []
    units = chosen(name, units, kept, path_filter)
    ready, plain = [], []
    for one in units:
        try:
            layer, row = one.fused(
                inputs[one.layer] if one.layer in inputs else one.probe()
            )
        except (ValueError, TypeError) as error:
            if one.exact:
                raise
            # A subclass that does something else after all.
            kept[one.norm_layer or one.layer] = str(error)
            continue
        ready.append(one)
        plain.append(layer)
        rows.append(row)
    if units and not ready:
        raise ValueError(f"{name}: nothing can be fused: {_reasons(kept)}")
    return ready, plain, tuple(rows), kept


def staying(
    units: Sequence[Unit], kept: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """(path, reason) of the layers and normalizations that no unit has taken up."""
    gone = {one.norm_layer for one in units}
    return tuple((norm, why) for norm, why in kept.items() if norm not in gone)


def layers(model: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """({path: layer or block}, {path: normalization}), each once, those inside blocks left out."""
    convs, norms, seen, inside = {}, {}, set(), []
    for path, module in _module_tree.modules(model):
        if id(module) in seen or any(path.startswith(block) for block in inside):
            continue
        seen.add(id(module))
        if isinstance(module, Branched):
            inside.append(_module_tree.below(path))
        if isinstance(module, LAYERS):
            convs[path] = module
        elif isinstance(module, NORMS):
            norms[path] = module
    return convs, norms


def alone(convs: Mapping[str, Any]) -> tuple[list[Unit], dict[str, str]]:
    """The blocks and standardized convolutions, which need nothing around them, and what does not fuse."""
    return _fusible(Unit(path, conv) for path, conv in convs.items() if _changes(conv))


def paired(
    convs: Mapping[str, Any],
    norms: Mapping[str, Any],
    flow: Flow,
    unknown: Mapping[str, str] | None = None,
) -> tuple[list[Unit], dict[str, str]]:
    """Units with the normalizations that fold into them, and {layer that is kept: why}.

    Args:
      convs: layers and blocks by path.
      norms: normalizations by path.
      flow: what feeds what.
      unknown: {path: reason} of those among them that are known not to fuse.
    """
    unknown = unknown or {}
    behind, kept = {}, {}
    for path, norm in norms.items():
        try:
            if path in unknown:
                raise ValueError(unknown[path])
            if getattr(norm, "axis", -1) not in (-1, (-1,)):
                raise ValueError(
                    f"{path!r} normalizes axis {norm.axis}, not the channels"
                )
            conv = flow.source(path, convs)
            if conv in unknown:
                raise ValueError(unknown[conv])
            Unit(conv, convs[conv], norm, path).check_kind()
            behind[conv] = path
        except ValueError as error:
            kept[path] = str(error)
    pairs = [
        Unit(conv, convs[conv], norms[path], path) for conv, path in behind.items()
    ]
    rest, refused = _fusible(
        Unit(path, conv)
        for path, conv in convs.items()
        if path not in behind and path not in unknown and _changes(conv)
    )
    order = list(convs)
    return sorted(pairs + rest, key=lambda one: order.index(one.layer)), kept | refused


def _fusible(units: Iterable[Unit]) -> tuple[list[Unit], dict[str, str]]:
    """(units that it is known what they compute, {path of another: why not})."""
    known, refused = [], {}
    for one in units:
        try:
            one.check_kind()
            known.append(one)
        except ValueError as error:
            refused[one.layer] = str(error)
    return known, refused


def chosen(
    name: str,
    units: Sequence[Unit],
    kept: Mapping[str, str],
    path_filter: PathFilter | None,
) -> list[Unit]:
    """The units to fuse, each ready for it."""
    if path_filter is not None:
        units = [
            one
            for one in units
            if path_filter(one.layer)
            or (one.norm_layer and path_filter(one.norm_layer))
        ]
    why = _reasons(kept)
    if not units and path_filter is not None:
        raise ValueError(
            f"{name}: `path_filter` chooses nothing that can be fused{why and f' ({why})'}"
        )
    if not units and why:
        raise ValueError(f"{name}: nothing can be fused: {why}")
    for one in units:
        try:
            one.check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return list(units)


def _reasons(kept: Mapping[str, str]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in kept.items())


def _changes(conv: Any) -> bool:
    """Whether a convolution is more than a plain one."""
    return isinstance(conv, WSConv | Branched) or isinstance(
        getattr(conv, "conv_general_dilated", None), weightstd.Hook
    )
