"""Fuse convolutions, blocks and linear layers with what follows them into plain layers.

The framework describes its layers (`ConvLayer`, `AffineLayer`, `NormLayer`); this module
pairs each with the normalization that the trace shows behind it, fuses the pairs, and
compares every fused layer and the whole model with what they stand for.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _flops, _jaxpr, reparam
from jaxtricks._dtypes import is_floating, wide_dtype
from jaxtricks._layer_functions import Node, Padding, pad_by_mode
from jaxtricks._layers import per_channel
from jaxtricks._typing import Array
from jaxtricks.reparam import Conv, FusedLayer, Norm, Sequential
from jaxtricks.reparam._apply import norm_factor
from jaxtricks.reparam._dataflow import Flow, mark
from jaxtricks.reparam._dataflow import read as read_flow
from jaxtricks.reparam._fuse import FACTOR

PathFilter = Callable[[str], bool]
Watch = Callable[[Any, str, str], Any]
"""watch(x, "in" or "out", path) -> x, for the input or output of a watched layer."""

# What a framework says about its layers.


class PlainLayer(NamedTuple):
    """A layer that stands for several others.

    Attributes:
      call: what it computes.
      size: number of its parameters.
      layer: what the framework puts in place of the others.
    """

    call: Callable[[Array], Array]
    size: int
    layer: Any


class Refusal(NamedTuple):
    """Stands for a layer of which it is not known what it computes.

    Attributes:
      reason: why.
      is_composite: as in `ConvLayer`.
    """

    reason: str
    is_composite: bool = False


@dataclass(frozen=True)
class NormLayer:
    """A normalization with running statistics.

    Attributes:
      path: of the layer.
      call: what it computes in evaluation mode.
      node: its statistics and parameters.
      evaluates: whether the model uses the running statistics.
      size: number of parameters and running statistics.
      dtype: of its computation, or None.
      is_library_type: whether its class is one of Flax or of this library.
    """

    path: str
    call: Callable[[Array], Array]
    node: Norm
    evaluates: bool
    size: int
    dtype: Any
    is_library_type: bool


@dataclass(frozen=True)
class ConvLayer:
    """A convolution, or a block that deploys as one.

    Attributes:
      path: of the layer.
      call: what it computes in evaluation mode.
      node: the same in the branch algebra.
      in_features: channels of the input.
      kernel_size: per spatial axis, and so on.
      strides: per spatial axis.
      dilation: per spatial axis.
      padding: as in Flax.
      dtype: of its computation, or None.
      dtypes: in which its parts are stored or computed.
      norms: the normalizations inside it.
      branches: number of parallel branches.
      size: number of parameters and running statistics.
      is_composite: whether it is more than a plain convolution, and fuses alone.
      is_library_type: whether its class is one of Flax or of this library.
      make_plain: (fused convolution, dtype of the output or None) -> plain layer.
    """

    path: str
    call: Callable[[Array], Array]
    node: Node
    in_features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding
    dtype: Any
    dtypes: tuple[Any, ...]
    norms: tuple[NormLayer, ...]
    branches: int
    size: int
    is_composite: bool
    is_library_type: bool
    make_plain: Callable[[Conv, Any], PlainLayer]


@dataclass(frozen=True)
class AffineLayer:
    """A linear layer or transposed convolution, which may take up a normalization.

    Attributes:
      path: of the layer.
      call: what it computes.
      kernel: of any rank.
      bias: broadcast to `bias_shape`, or None.
      channel_axis: the axis of the kernel, from its end, that is the output's last.
      bias_shape: of a bias that it may take up.
      dtype: of its computation, or None.
      size: number of parameters.
      is_library_type: whether its class is one of Flax or of this library.
      make: (kernel, bias, dtype to compute in or None for its usual one) -> the layer
        with other variables.
    """

    path: str
    call: Callable[[Array], Array]
    kernel: Array
    bias: Array | None
    channel_axis: int
    bias_shape: tuple[int, ...]
    dtype: Any
    size: int
    is_library_type: bool
    make: Callable[[Array, Array | None, Any], PlainLayer]

    is_composite = False
    branches = 1
    norms: tuple[NormLayer, ...] = ()

    @property
    def dtypes(self) -> tuple[Any, ...]:
        """The dtypes in which it is stored or computed."""
        computed = () if self.dtype is None else (self.dtype,)
        return (self.kernel.dtype, *computed)


Layers = Mapping[str, ConvLayer | AffineLayer | Refusal]
Norms = Mapping[str, NormLayer | Refusal]


# A layer and the normalization behind it.


class FusibleLayer(NamedTuple):
    """A layer, and perhaps its normalization, that one plain layer can replace.

    Attributes:
      layer: a convolution, a block or an affine layer.
      norm: the normalization of its output, or None.
    """

    layer: ConvLayer | AffineLayer
    norm: NormLayer | None = None

    @property
    def path(self) -> str:
        """The path of the layer."""
        return self.layer.path

    @property
    def last_path(self) -> str:
        """The path of what gives the output."""
        return self.layer.path if self.norm is None else self.norm.path

    @property
    def is_library_type(self) -> bool:
        """Whether all classes are those of Flax or of this library."""
        if self.norm is not None and not self.norm.is_library_type:
            return False
        return self.layer.is_library_type

    def __call__(self, x: Array) -> Array:
        """Return what the model computes."""
        y = self.layer.call(x)
        return y if self.norm is None else self.norm.call(y)

    def check_ready(self) -> None:
        """Raise ValueError in training mode, or if the statistics were never updated."""
        norms = list(self.layer.norms)
        if self.norm is not None:
            norms.append(self.norm)
        for norm in norms:
            if not norm.evaluates:
                raise ValueError(
                    f"{norm.path!r} is in training mode, in which it is not a "
                    "fixed function: evaluate first, by model.eval() in nnx, "
                    "or by an argument of the call (train=False, "
                    "use_running_average=True) in `example_kwargs`"
                )
        if norms and all(_is_untouched(norm.node) for norm in norms):
            first = min(norm.path for norm in norms)
            raise ValueError(
                f"the statistics of {first!r} were never updated (mean 0, "
                "variance 1): train the model, or load them with its "
                "parameters, before it is fused"
            )

    def fuse(self, x: Array) -> tuple[PlainLayer, FusedLayer]:
        """Return the plain layer, and how it compares with the others on x.

        Args:
          x: [..., in_features].

        Raises:
          ValueError: they differ by more than rounding allows.
        """
        is_affine = isinstance(self.layer, AffineLayer)
        fuse = self._fuse_affine if is_affine else self._fuse_conv
        with jax.default_matmul_precision("highest"):
            x, plain, bound, with_dtype = fuse(jnp.asarray(x))
            y, z = self(x), plain.call(x)
            error = largest_difference(y, z)
        size = self.layer.size + (0 if self.norm is None else self.norm.size)
        row = FusedLayer(
            self.path,
            self.layer.branches,
            error,
            bound,
            size,
            plain.size,
            flops(self, x),
            flops(plain.call, x),
        )
        if self.norm is None and z.dtype != y.dtype:
            # The normalizations of a block give float32 where its convolutions compute
            # in sixteen bits.
            plain = with_dtype(y.dtype)
        return plain, check_bound(row)

    def _fuse_conv(self, x: Array) -> tuple[Array, PlainLayer, float, Any]:
        """Return x as the convolution takes it, the plain layer and its error bound."""
        conv: Any = self.layer
        rank = len(conv.kernel_size)
        x = jnp.asarray(x, conv.dtype or x.dtype)
        x = x.reshape((-1, *x.shape[x.ndim - rank - 1 :]))
        node = conv.node
        if self.norm is not None:
            node = Sequential(node, self.norm.node)
        merged = reparam.fuse(node, conv.kernel_size)
        padded, padding = pad_by_mode(
            x, conv.padding, conv.kernel_size, conv.dilation
        )
        bound = reparam.error_bound(
            node,
            padded,
            strides=conv.strides,
            padding=padding,
            dilation=conv.dilation,
            kernel_size=conv.kernel_size,
            fused=merged,
        )
        # The bound is for rounding in x's dtype; parameters or a normalization may have
        # a coarser one.
        coarser = (
            jnp.finfo(self._coarsest(x.dtype)).eps / jnp.finfo(x.dtype).eps
        )
        make_plain = functools.partial(conv.make_plain, merged)
        return x, make_plain(None), float(bound) * float(coarser), make_plain

    def _fuse_affine(self, x: Array) -> tuple[Array, PlainLayer, float, Any]:
        """Return x, the layer with other variables, and its error bound."""
        layer: Any = self.layer
        norm: Any = self.norm
        kernel, bias = fold_norm(layer, norm.node)
        # Stored like the kernel of the layer, whose rounding the bound covers.
        kernel = kernel.astype(layer.kernel.dtype)
        bias = bias.astype(layer.kernel.dtype)
        dtype = self._coarsest(layer.dtype or x.dtype)
        bound = affine_bound(layer, norm.node, kernel, bias, x, dtype)
        plain = layer.make(kernel, bias, None)
        return x, plain, bound, lambda dtype: plain

    def _coarsest(self, dtype: Any) -> Any:
        """Return the dtype with the largest unit roundoff among those of the layers."""
        dtypes = [dtype, *self.layer.dtypes]
        if self.norm is not None and self.norm.dtype is not None:
            dtypes.append(self.norm.dtype)

        def spacing(dtype: Any) -> float:
            return float(jnp.finfo(dtype).eps)

        return max(dtypes, key=spacing)


def fold_norm(layer: AffineLayer, norm: Norm) -> tuple[Array, Array]:
    """Return (kernel, bias) of the layer whose output is the normalized one.

    kernel' = kernel t and bias' = (bias - mean) t + b for a normalization with the
    factor t and the offset b, in float32 or wider.
    """
    kernel = jnp.asarray(layer.kernel, wide_dtype(layer.kernel))

    def wide(leaf: Array) -> Array:
        return jnp.asarray(leaf, wide_dtype(kernel, leaf))

    norm = jax.tree.map(wide, norm)
    factor, offset = norm_factor(norm)
    # A bias may have leading axes (LinearGeneral), which the statistics do not have.
    rank = 1 if layer.bias is None else layer.bias.ndim
    mean = per_channel(norm.mean, rank)
    shift = -mean if layer.bias is None else layer.bias - mean
    shift = shift * per_channel(factor, rank)
    if offset is not None:
        shift = shift + per_channel(offset, shift.ndim)
    bias = jnp.broadcast_to(shift, layer.bias_shape)
    factor = per_channel(factor, kernel.ndim, layer.channel_axis)
    return kernel * factor, bias


def affine_bound(
    layer: AffineLayer,
    norm: Norm,
    kernel: Array,
    bias: Array,
    x: Array,
    dtype: Any,
) -> float:
    """Return how far rounding in `dtype` may put layer and normalization from the fusion.

    `reparam.error_bound` for layers that are not a node of its algebra:
    16 u (S_fused + S_branch), where S is the output with absolute values throughout.

    Args:
      layer: the layer.
      norm: the normalization behind it.
      kernel: of the fused layer.
      bias: of the fused layer.
      x: the input.
      dtype: whose unit roundoff u is.
    """
    wide = wide_dtype(x)

    def magnitude(leaf: Array) -> Array:
        return jnp.abs(jnp.asarray(leaf, wide))

    x = magnitude(x)
    norm = jax.tree.map(magnitude, norm)
    factor, offset = norm_factor(norm)
    # S_branch: every subtraction becomes an addition, so that nothing cancels.
    y = _magnitude(layer, layer.kernel, layer.bias, x)
    y = y + per_channel(norm.mean, y.ndim)
    y = y * per_channel(factor, y.ndim)
    if offset is not None:
        y = y + per_channel(offset, y.ndim)
    fused = _magnitude(layer, kernel, bias, x)
    total = float(jnp.max(y) + jnp.max(fused))
    unit_roundoff = float(jnp.finfo(dtype).eps) / 2
    return FACTOR * unit_roundoff * total


def _magnitude(
    layer: AffineLayer, kernel: Array, bias: Array | None, x: Array
) -> Array:
    """Return the output for absolute values of the variables, computed in x's dtype."""
    kernel = jnp.abs(kernel).astype(x.dtype)
    if bias is not None:
        bias = jnp.abs(bias).astype(x.dtype)
    absolute = layer.make(kernel, bias, x.dtype)
    return absolute.call(x)


def check_bound(row: FusedLayer) -> FusedLayer:
    """Return the comparison, or raise ValueError if it shows another function."""
    # Not "error > bound": that would let NaN pass.
    if not row.max_error <= row.bound:
        raise ValueError(
            f"fused and unfused {row.layer or 'model'!r} differ by "
            f"{row.max_error:.3g}, where rounding allows {row.bound:.3g}, so "
            "they are different functions: leave "
            f"{'it' if row.layer else 'layers'} out by `path_filter`"
        )
    return row


def largest_difference(a: Any, b: Any) -> float:
    """Return max |a - b| over all leaves; NaN if one is NaN."""
    differences = [0.0]
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in leaves:
        if not x.size:
            continue
        dtype = wide_dtype(x, y)
        x = jnp.asarray(x, dtype)
        y = jnp.asarray(y, dtype)
        largest = jnp.max(jnp.abs(x - y))
        differences.append(float(largest))
    # Not Python's max, which may pass over NaN.
    return float(np.max(differences))


def random_input(shape: Sequence[int], dtype: Any) -> Array:
    """Return normal numbers."""
    # By NumPy, since they may be drawn inside a trace and used outside.
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def probe_input(conv: Any) -> Array:
    """Return an input of a `ConvLayer` to compare on where the example has none."""
    spatial = []
    for k, dilation in zip(conv.kernel_size, conv.dilation, strict=True):
        extent = dilation * (k - 1) + 1
        # Large enough for outputs that no padding reaches, and odd, so that a stride of
        # two does not divide it.
        spatial.append(2 * extent + 3)
    shape = (2, *spatial, conv.in_features)
    return random_input(shape, conv.dtype or jnp.float32)


def flops(fn: Any, *inputs: Any) -> int:
    """Return the floating-point operations of fn(*inputs)."""
    return _flops.flops(_jaxpr.trace(fn, *inputs)[0].jaxpr)


def count(tree: Any) -> int:
    """Return the number of entries of all arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _is_untouched(norm: Norm) -> bool:
    return bool(jnp.all(norm.mean == 0) & jnp.all(norm.var == 1))


# Which layers fuse, and with which normalization.


def standalone(layers: Layers) -> tuple[list[FusibleLayer], dict[str, str]]:
    """Return the layers that fuse without anything around them, and {other: reason}."""
    fusible, reasons = [], {}
    for path, layer in layers.items():
        if not layer.is_composite:
            continue
        if isinstance(layer, Refusal):
            reasons[path] = layer.reason
        else:
            fusible.append(FusibleLayer(layer))
    return fusible, reasons


def pair_with_norms(
    layers: Layers, norms: Norms, flow: Flow
) -> tuple[list[FusibleLayer], dict[str, str]]:
    """Return the layers that fuse, with their normalizations, and {other: reason}.

    Args:
      layers: convolutions, blocks and affine layers by path.
      norms: normalizations by path.
      flow: what feeds what.
    """
    norm_behind: dict[str, NormLayer] = {}
    reasons: dict[str, str] = {}
    for path, norm in norms.items():
        try:
            if isinstance(norm, Refusal):
                raise ValueError(norm.reason)
            source = flow.source(path, layers)
            layer = layers[source]
            if isinstance(layer, Refusal):
                raise ValueError(layer.reason)
            norm_behind[source] = norm
        except ValueError as error:
            reasons[path] = str(error)
    others = {
        path: layer for path, layer in layers.items() if path not in norm_behind
    }
    alone, more_reasons = standalone(others)
    by_path = {fusible.path: fusible for fusible in alone}
    for path, norm in norm_behind.items():
        layer: Any = layers[path]
        by_path[path] = FusibleLayer(layer, norm)
    in_order = [by_path[path] for path in layers if path in by_path]
    return in_order, reasons | more_reasons


class FusedLayers(NamedTuple):
    """Layers that have been fused.

    Attributes:
      layers: what was fused.
      plain: the plain layer for each.
      rows: how each compares.
      reasons: {path: reason} of what was not fused.
    """

    layers: list[FusibleLayer]
    plain: list[PlainLayer]
    rows: tuple[FusedLayer, ...]
    reasons: dict[str, str]

    def remaining(self) -> tuple[tuple[str, str], ...]:
        """Return (path, reason) of what no plain layer stands for."""
        folded_paths = set()
        for one in self.layers:
            if one.norm is not None:
                folded_paths.add(one.norm.path)
        remaining = []
        for path, reason in self.reasons.items():
            if path not in folded_paths:
                remaining.append((path, reason))
        return tuple(remaining)


def fuse_layers(
    name: str,
    fusible: Sequence[FusibleLayer],
    reasons: Mapping[str, str],
    path_filter: PathFilter | None,
    inputs: Mapping[str, Array],
) -> FusedLayers:
    """Fuse the layers that the caller selects.

    Args:
      name: of the public function, for errors.
      fusible: what can be fused.
      reasons: {path: reason} of what cannot.
      path_filter: selects among the layers; None = all.
      inputs: {path: input of the layer}; others are compared on a random one.

    Raises:
      ValueError: nothing can be fused, a layer is not ready, or a fused layer is
        another function.
    """
    reasons = dict(reasons)
    selected = _selected(name, fusible, reasons, path_filter)
    ready, plain, rows = [], [], []
    for one in selected:
        x = inputs[one.path] if one.path in inputs else probe_input(one.layer)
        try:
            layer, row = one.fuse(x)
        except (ValueError, TypeError) as error:
            if one.is_library_type:
                raise
            # The class of a user, which does something else after all.
            reasons[one.last_path] = str(error)
            continue
        ready.append(one)
        plain.append(layer)
        rows.append(row)
    if selected and not ready:
        raise ValueError(f"{name}: nothing can be fused: {_joined(reasons)}")
    return FusedLayers(ready, plain, tuple(rows), reasons)


def _selected(
    name: str,
    fusible: Sequence[FusibleLayer],
    reasons: Mapping[str, str],
    path_filter: PathFilter | None,
) -> list[FusibleLayer]:
    """Return the layers to fuse, each ready for it."""
    selected = list(fusible)
    if path_filter is not None:
        selected = [
            one
            for one in fusible
            if path_filter(one.path) or path_filter(one.last_path)
        ]
    why = _joined(reasons)
    if not selected and path_filter is not None:
        details = f" ({why})" if why else ""
        raise ValueError(
            f"{name}: `path_filter` chooses nothing that can be fused{details}"
        )
    if not selected and why:
        raise ValueError(f"{name}: nothing can be fused: {why}")
    for one in selected:
        try:
            one.check_ready()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return selected


def _joined(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in reasons.items())


def is_library_type(layer: Any) -> bool:
    """Return whether the class of a layer is one of Flax or of this library."""
    return type(layer).__module__.startswith(("flax.", "jaxtricks."))


def altered_reason(path: str) -> str:
    """Return why a layer that is called with another kernel does not fuse."""
    return (
        f"{path!r} is called with another kernel than the model holds "
        "(WeightNorm, SpectralNorm)"
    )


def is_altered(stored: Any, used: Any) -> bool:
    """Return whether a layer is called with another kernel than it is stored with."""
    if isinstance(used, jax.core.Tracer):
        return False  # not known inside a transform
    return used is not stored and not np.array_equal(stored, used)


# A model that runs on an example while its layers are watched.


# Random signs with which the bounds of layers are carried to the output.
_DRAWS = 4


class Probe:
    """Run a model on an example, with a function around its watched layers.

    Args:
      run: run(watch, *example) -> output, where every watched layer does
        x = watch(x, "in", path) and y = watch(y, "out", path).
      example: an input of the model, or a tuple of them; what is not an array is passed
        as it is.
    """

    def __init__(self, run: Callable[..., Any], example: Any):
        self.run = run
        self.example = as_inputs(example)

    def __call__(self, *example: Any) -> Any:
        """Return the output of the model."""
        return self.run(_unchanged, *example)

    def flow(self) -> Flow:
        """Return what feeds what."""
        run = functools.partial(self.run, mark)
        return read_flow(traced(run, self.example))

    def values(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return ({path: first input}, {path: dtype of the output}) of the layers.

        Inside jit or scan there are no values: random ones of the same shape stand for
        them.
        """
        inputs: dict[str, Array] = {}
        dtypes: dict[str, Any] = {}

        def record(x: Any, side: str, path: str) -> Any:
            if side == "out":
                dtypes.setdefault(path, x.dtype)
            elif path not in inputs:
                is_traced = isinstance(x, jax.core.Tracer)
                inputs[path] = (
                    random_input(x.shape, x.dtype) if is_traced else x
                )
            return x

        self.run(record, *self.example)
        return inputs, dtypes

    def disturbed(self, sizes: Mapping[str, float], seed: int) -> Any:
        """Return the output if the outputs of these layers change by +-size."""
        rng = np.random.default_rng(seed)

        def disturb(y: Any, side: str, path: str) -> Any:
            if side == "in" or path not in sizes:
                return y
            signs = rng.choice([-1.0, 1.0], size=y.shape)
            change = sizes[path] * signs
            return y + jnp.asarray(change, y.dtype)

        return self.run(disturb, *self.example)


def compare_models(
    probe: Probe,
    fused_call: Callable[..., Any],
    fused: FusedLayers,
    sizes: tuple[int, int],
) -> FusedLayer:
    """Compare the fused model with the model on the example.

    Args:
      probe: the model.
      fused_call: call of the fused model.
      fused: its layers.
      sizes: number of parameters and statistics before and after.

    Raises:
      ValueError: they differ by more than what the bounds of the layers come to at the
        output.
    """
    pairs = zip(fused.layers, fused.rows, strict=True)
    bounds = {one.last_path: row.bound for one, row in pairs}
    with jax.default_matmul_precision("highest"):
        y, z = probe(*probe.example), fused_call(*probe.example)
        others = [probe.disturbed(bounds, seed) for seed in range(_DRAWS)]
    carried = max(largest_difference(y, other) for other in others)
    before, after = (
        _flops.flops(traced(fn, probe.example).jaxpr)
        for fn in (probe, fused_call)
    )
    row = FusedLayer(
        "",
        sum(row.branches for row in fused.rows),
        largest_difference(y, z),
        carried + _last_rounding(y),
        *sizes,
        before,
        after,
    )
    return check_bound(row)


def _last_rounding(y: Any) -> float:
    """Return what the last operation alone may round."""
    largest = 0.0
    for x in jax.tree.leaves(y):
        if not is_floating(x) or not x.size:
            continue
        magnitude = float(jnp.max(jnp.abs(x)))
        eps = float(jnp.finfo(x.dtype).eps)
        largest = max(largest, 16 * eps * magnitude)
    return largest


def with_input(
    change: Callable[[Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer's call with the input, the first one, changed."""
    if args:
        x, *others = args
        return (change(x), *others), dict(kwargs)
    # The input may be given by name.
    name = next(iter(kwargs))
    changed = dict(kwargs)
    changed[name] = change(changed[name])
    return (), changed


def as_inputs(example: Any) -> tuple[Any, ...]:
    """Return the positional arguments that an example stands for."""
    return example if isinstance(example, tuple) else (example,)


def traced(
    fn: Callable[..., Any], example: Sequence[Any]
) -> _jaxpr.ClosedJaxpr:
    """Return the trace of fn(*example); flags among the inputs stay as they are."""
    indices = [i for i, x in enumerate(example) if _has_arrays_only(x)]
    example_arrays = [example[i] for i in indices]

    def run(*arrays: Any) -> Any:
        inputs = list(example)
        for i, x in zip(indices, arrays, strict=True):
            inputs[i] = x
        return fn(*inputs)

    closed, _ = _jaxpr.trace(run, *example_arrays)
    return closed


def _has_arrays_only(x: Any) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x))


def _unchanged(x: Any, side: str, path: str) -> Any:
    return x
