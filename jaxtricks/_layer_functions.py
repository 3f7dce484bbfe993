"""Compute what layers and blocks compute, as functions of plain arrays.

`jt.nnx` and `jt.linen` call these with their variables. The functions know the rooms
(standardized kernels, extended statistics, the branch algebra) and no framework.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxtricks import _integers, _layers, ebn, reparam, weightstd
from jaxtricks._block_tables import BlockGeometry
from jaxtricks._dtypes import common_dtype, wide_dtype
from jaxtricks._layers import affine, check_groups, per_channel
from jaxtricks._typing import Array
from jaxtricks.longtail import heads
from jaxtricks.reparam import Conv, Identity, Norm, Sequential, Sum, _nodes
from jaxtricks.reparam._apply import norm_factor
from jaxtricks.reparam._nodes import (
    convolve,
    per_axis,
    place,
    resolve,
    zero_pad,
)

Padding = _nodes.Padding
Pads = _nodes.Pads
Node = _nodes.Node

# Convolutions.

_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def standardize_wide(
    kernel: Array, gain: Array | None, *, preset: str, eps: float | None
) -> Array:
    """Return `weightstd.standardize` of the kernel, in float32 or wider."""
    wide = jnp.asarray(kernel, wide_dtype(kernel))
    return weightstd.standardize(wide, gain, preset=preset, eps=eps)


def convolution(
    x: Array,
    kernel: Array,
    bias: Array | None,
    *,
    dtype: Any,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """Return conv(x, kernel) + bias in `dtype`, with the padding modes of Flax.

    Args:
      x: [..., *spatial, in].
      kernel: [*kernel_size, in / groups, out].
      bias: [out] or None.
      dtype: of the operands.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL", an int or pairs.
      dilation: of the kernel, an int or one per spatial axis.
      groups: number of feature groups.
      precision: as in `jax.lax`.
      preferred_element_type: dtype of the result, as in `jax.lax`.

    Raises:
      ValueError: x has too few axes.
    """
    rank = kernel.ndim - 2
    if x.ndim < rank + 1:
        raise ValueError(
            f"WSConv: x of shape {x.shape} has fewer than {rank} spatial axes"
        )
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    size = kernel.shape[:-2]
    strides = per_axis("strides", strides, rank)
    dilation = per_axis("dilation", dilation, rank)
    x, padding = pad_by_mode(x, padding, size, dilation)
    spatial = x.shape[x.ndim - rank - 1 : -1]
    y = convolve(
        x,
        kernel,
        strides=strides,
        pads=resolve(padding, spatial, size, strides, dilation),
        dilation=dilation,
        groups=groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if bias is None:
        return y
    return y + per_channel(jnp.asarray(bias, y.dtype), y.ndim)


def pad_by_mode(
    x: Array, padding: Padding, size: Sequence[int], dilation: Sequence[int]
) -> tuple[Array, Padding]:
    """Return x padded by "CIRCULAR" or "REFLECT", and the zero padding that remains."""
    if not isinstance(padding, str) or padding.upper() not in _PAD_MODES:
        return x, padding
    pads = []
    for k, d in zip(size, dilation, strict=True):
        total = d * (k - 1)
        low = total // 2
        pads.append((low, total - low))
    lead = [(0, 0)] * (x.ndim - len(pads) - 1)
    mode = _PAD_MODES[padding.upper()]
    padded = jnp.pad(x, [*lead, *pads, (0, 0)], mode=mode)
    return padded, "VALID"


def hooked_kernel(conv: Any, kernel: Array, mask: Array | None) -> Array:
    """Return the kernel that a convolution of Flax uses, given its mask and its hook.

    Raises:
      ValueError: its `conv_general_dilated` may compute anything.
    """
    if mask is not None:
        kernel = kernel * mask
    hook = getattr(conv, "conv_general_dilated", None)
    if isinstance(hook, weightstd.Hook):
        return hook.kernel(kernel)
    if hook not in (None, lax.conv_general_dilated):
        raise ValueError(
            f"a {type(conv).__name__} with a custom `conv_general_dilated` "
            "does not fuse: what it computes is not known"
        )
    return kernel


def has_hook(conv: Any) -> bool:
    """Return whether a convolution standardizes its kernel by a hook."""
    return isinstance(
        getattr(conv, "conv_general_dilated", None), weightstd.Hook
    )


def matching_filters(
    kernel: Array, *, preset: str, eps: float | None
) -> tuple[Array, Array]:
    """Return (kernel, gain) with which WSConv computes the convolution of this kernel.

    Raises:
      ValueError: a filter has a mean, which standardizing would remove.
    """
    axes = tuple(range(kernel.ndim - 1))
    mean = jnp.abs(jnp.mean(kernel, axes))
    largest = jnp.max(jnp.abs(kernel), axes)
    has_mean = mean > 1e-6 * largest
    if bool(jnp.any(has_mean)):
        raise ValueError(
            "standardizing would remove the means of its filters, which its "
            "function depends on: use init='fresh'"
        )
    # Least squares: the factor by which each standardized filter is the filter.
    standardized = weightstd.standardize(kernel, preset=preset, eps=eps)
    squares = jnp.sum(standardized * standardized, axes)
    products = jnp.sum(kernel * standardized, axes)
    # A filter of zeros has the gain 0.
    gain = products / jnp.where(squares > 0, squares, 1)
    return kernel, gain


# Extended batch normalization and the calibrated head.


class RunningStatistics(NamedTuple):
    """Running statistics of extended batch normalization.

    Attributes:
      mean: [C].
      var: [].
    """

    mean: Array
    var: Array


def batch_statistics(
    x: Array,
    running: RunningStatistics,
    *,
    momentum: float,
    mask: Array | None,
    axis_name: Any,
    variance: Literal["channel", "grand"],
) -> tuple[RunningStatistics, RunningStatistics]:
    """Return the statistics of this batch, and the updated running ones.

    running = momentum * running + (1 - momentum) * batch; a batch whose mask is empty
    changes nothing.

    Args:
      x: [..., C].
      running: statistics so far.
      momentum: weight of the old statistics.
      mask: which entries count, as in `ebn.extended_moments`.
      axis_name: mapped axes over which statistics are shared.
      variance: as in `ebn.extended_moments`.
    """
    batch = ebn.moments(x, mask=mask, axis_name=axis_name, variance=variance)

    def updated(old: Array, new: Array) -> Array:
        # The statistics are no path for gradients into earlier steps.
        new = jax.lax.stop_gradient(new)
        new = new.astype(old.dtype)
        moved = momentum * old + (1 - momentum) * new
        is_counted = batch.count > 0
        return jnp.where(is_counted, moved, old)

    new_running = RunningStatistics(
        updated(running.mean, batch.mean), updated(running.var, batch.var)
    )
    return RunningStatistics(batch.mean, batch.var), new_running


def normalize_to(
    x: Array,
    statistics: RunningStatistics,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: float,
    dtype: Any,
) -> Array:
    """Return `ebn.normalize` in `dtype` (None: that of x, scale and bias together)."""
    out_dtype = common_dtype(x, scale, bias, override=dtype)
    wide = jnp.asarray(x, wide_dtype(x))
    mean, var = statistics
    y = ebn.normalize(wide, mean, var, scale, bias, epsilon=epsilon)
    return y.astype(out_dtype)


def pooled_variance(
    variances: Array,
    scale: Array | None,
    *,
    old_epsilon: float,
    new_epsilon: float,
) -> tuple[Array, Array]:
    """Return (variance [], scale [C]) that normalize like one variance per channel.

    The variance is the mean of the variances; the scales make up for the difference.
    """
    var = jnp.mean(variances)
    old_square = variances + old_epsilon
    new_square = var + new_epsilon
    ratio = jnp.sqrt(new_square / old_square)
    if scale is not None:
        ratio = scale * ratio
    return var, ratio


def calibrated(
    x: Array, logits: Array, parameter: Callable[[str], Array], dtype: Any
) -> Float[Array, "*batch C"]:
    """Return `heads.disalign` of the logits, with the parameters `parameter(name)`."""
    kernel = parameter("confidence_kernel")
    bias = parameter("confidence_bias")
    confidence = affine(x, kernel, bias, dtype)
    confidence = confidence[..., 0]
    scale = parameter("logit_scale")
    offset = parameter("logit_bias")
    return heads.disalign(logits, confidence, scale, offset)


# Blocks of parallel branches.


def block_geometry(
    name: str,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] | None,
    padding: Padding,
    kernel_dilation: int | Sequence[int] | None,
    groups: int,
    least_axes: int,
) -> BlockGeometry:
    """Return the checked geometry of a block; `name` is that of the block, for errors.

    Raises:
      ValueError: groups that do not divide the features, a kernel size without
        `least_axes` to three axes, or padding that is not zeros.
    """
    check_groups(name, in_features, out_features, groups)
    size = _integers.listed(kernel_size)
    if not least_axes <= len(size) <= 3:
        raise ValueError(
            f"{name}: `kernel_size` is {kernel_size}; give {least_axes} to 3 "
            "sizes, such as (height, width)"
        )
    rank = len(size)
    size = per_axis("kernel_size", size, rank)
    steps = per_axis("strides", strides or 1, rank)
    dilation = per_axis("kernel_dilation", kernel_dilation or 1, rank)
    # Padding from which no branch can derive its padding fails here, not in a step.
    resolve(padding, size, size, steps, dilation)
    return BlockGeometry(
        in_features, out_features, size, steps, dilation, groups
    )


def branch_pads(
    x: Array, padding: Padding, block: BlockGeometry, extent: Sequence[int]
) -> Pads:
    """Return the padding of a branch whose kernel is centred on that of the block."""
    size, dilation = block.kernel_size, block.dilation
    first_axis = x.ndim - len(size) - 1
    spatial = x.shape[first_axis:-1]
    pads = resolve(padding, spatial, size, block.strides, dilation)
    return place(pads, size, extent, dilation)


def pad_with_zero_response(y: Array, pads: Pads, norm: Norm) -> Array:
    """Return y padded with what `norm` makes of zeros; negative pads crop.

    Fusing moves a normalization behind the padding, where it maps the padded zeros to
    this value: with it, branch and fused convolution agree at the border too.
    """
    norm = jax.tree.map(lambda v: v.astype(wide_dtype(v)), norm)
    factor, bias = norm_factor(norm)
    response = -norm.mean * factor
    if bias is not None:
        response = response + bias
    # Running statistics are constants of the step.
    response = jax.lax.stop_gradient(response)
    response = per_channel(response.astype(y.dtype), y.ndim)
    # By a mask and not by jnp.pad, since negative pads crop on the same side.
    first_axis = y.ndim - len(pads) - 1
    spatial = y.shape[first_axis:-1]
    ones = jnp.ones((1,) * first_axis + spatial + (1,))
    is_inside = zero_pad(ones, pads) > 0
    padded = zero_pad(y, pads)
    return jnp.where(is_inside, padded, response)


def one_convolution(
    x: Array,
    branches: Sequence["BranchNodes"],
    block: BlockGeometry,
    *,
    padding: Padding,
    dtype: Any,
    precision: Any,
) -> Array:
    """Return the branches of an online block as one convolution of x.

    Args:
      x: [..., *spatial, in].
      branches: with gains in place of normalizations.
      block: geometry of the block.
      padding: of the window.
      dtype: of the operands.
      precision: as in `jax.lax`.
    """
    merged = reparam.fuse(branch_sum(branches), block.kernel_size)
    return convolution(
        x,
        merged.kernel,
        merged.bias,
        dtype=dtype,
        strides=block.strides,
        padding=padding,
        dilation=block.dilation,
        groups=merged.groups,
        precision=precision,
    )


@dataclass(frozen=True)
class BranchNodes:
    """One branch of a block in the algebra of `reparam`.

    Attributes:
      linear: its Conv or AvgPool; None for the identity.
      affine: the normalization (or the gain) behind it.
      first: the 1x1 convolution in front of its kernel, or None.
      first_affine: the normalization (or the gain) of that one.
      residual: whether the input is added to the output of `first`.
    """

    linear: Any
    affine: Any
    first: Conv | None = None
    first_affine: Any = None
    residual: bool = False

    def pointwise(self) -> Node:
        """Return `first` with its residual connection."""
        if self.first is None or not self.residual:
            return self.first
        features = self.first.kernel.shape[-1]
        return Sum(self.first, Identity(features))

    def before_affine(self) -> list[Node]:
        """Return the nodes that come before the normalization of the branch."""
        nodes: list[Node] = []
        if self.first is not None:
            nodes += [self.pointwise(), self.first_affine]
        if self.linear is not None:
            nodes.append(self.linear)
        return nodes

    def node(self) -> Node:
        """Return the branch as one node."""
        nodes = [*self.before_affine(), self.affine]
        return Sequential(*nodes) if len(nodes) > 1 else nodes[0]


def branch_sum(branches: Sequence[BranchNodes]) -> Sum:
    """Return the sum of the branches."""
    return Sum(*(branch.node() for branch in branches))


def block_node(
    branches: Sequence[BranchNodes], norm: Norm | None
) -> Sum | Sequential:
    """Return a block as a node: the sum, and an online block's normalization behind it."""
    total = branch_sum(branches)
    return total if norm is None else Sequential(total, norm)


# Blocks that start as a convolution.


def start_from_convolution(
    branches: Sequence[BranchNodes],
    norm: Norm | None,
    kernel: Array,
    bias: Array | None,
    block: BlockGeometry,
) -> tuple[list[BranchNodes], Norm | None]:
    """Return variables with which a block computes conv(x, kernel) + bias.

    The running statistics become those of white input of unit variance. Of B branches
    each but the first gets 1/B of the output's standard deviation; the first, with the
    largest kernel, gets what is missing (`reparam.unfuse`).

    Args:
      branches: the branches as they are.
      norm: the normalization of an online block, else None.
      kernel: [*kernel_size, in / groups, out].
      bias: [out] or None.
      block: geometry of the block.

    Raises:
      ValueError: another shape, or normalizations without scale or bias.
    """
    first, *others = branches
    wide = wide_dtype(kernel)
    target = Conv(jnp.asarray(kernel, wide), None, block.groups)
    std = jnp.sqrt(_power(target.kernel))
    offset = jnp.zeros_like(std) if bias is None else jnp.asarray(bias, wide)
    if norm is not None:
        # The gains stay; the one normalization divides by the std, and multiplies by it.
        norm = _with_statistics(norm, std**2, None)
        norm = replace(norm, bias=_like(norm.bias, offset))
        split = reparam.unfuse(target, branch_sum(branches))
        rest, _ = split.nodes[0].nodes
        return [_with_kernel(first, rest.kernel), *others], norm

    share = std / (1 + len(others))
    others = [_started(branch, block, share) for branch in others]
    # A factor of 1 behind the first kernel: it then is what the others leave over,
    # and its variance is known afterwards.
    unit = _with_statistics(first.affine, jnp.ones_like(std), None)
    first = replace(first, affine=unit)
    whole = Conv(target.kernel, offset, target.groups)
    split = reparam.unfuse(whole, branch_sum([first, *others]))
    rest, rest_norm = split.nodes[0].nodes
    first = _with_kernel(first, rest.kernel)
    affine = _with_statistics(first.affine, _power(rest.kernel), None)
    affine = replace(affine, bias=_like(affine.bias, rest_norm.bias))
    first = replace(first, affine=affine)
    return [first, *others], None


def check_startable(name: str, norm_types: Sequence[tuple[str, Norm]]) -> None:
    """Raise ValueError if one of the normalizations (type, node) has no scale or bias."""
    for type_name, norm in norm_types:
        if norm.scale is None or norm.bias is None:
            raise ValueError(
                f"{name}: a {type_name} has no scale or no bias to set; use "
                "one with both"
            )


STANDARDIZED_START = (
    "the branches have standardized kernels, whose filters have mean 0, so not "
    "every convolution can be written with them; use conv=nnx.Conv"
)


def _started(
    branch: BranchNodes, block: BlockGeometry, std: Array
) -> BranchNodes:
    """Return the branch with statistics for white input and this output std."""
    if branch.first is not None:
        var = _white_variance([branch.pointwise()], block)
        affine = _with_statistics(branch.first_affine, var, 1.0)
        branch = replace(branch, first_affine=affine)
    var = _white_variance(branch.before_affine(), block)
    affine = _with_statistics(branch.affine, var, std)
    return replace(branch, affine=affine)


def _white_variance(nodes: Sequence[Node], block: BlockGeometry) -> Array:
    """Return the variance of each output channel for white input of unit variance."""
    chain = Sequential(Identity(block.in_features), *nodes)
    return _power(reparam.fuse(chain, block.kernel_size).kernel)


def _power(kernel: Array) -> Array:
    return jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)))


def _with_statistics(
    norm: Norm, var: Array, scale: Array | float | None
) -> Norm:
    """Return the normalization with mean 0, bias 0, this variance and this scale.

    A scalar variance becomes the mean of `var`; a scale of None makes the factor 1.
    """
    var = _like(norm.var, var if norm.var.ndim else jnp.mean(var))
    if scale is None:
        scale = jnp.sqrt(var + norm.epsilon)
    return replace(
        norm,
        mean=_like(norm.mean, 0.0),
        var=var,
        scale=_like(norm.scale, scale),
        bias=_like(norm.bias, 0.0),
    )


def _with_kernel(branch: BranchNodes, kernel: Array) -> BranchNodes:
    conv: Any = branch.linear
    conv = replace(conv, kernel=_like(conv.kernel, kernel))
    return replace(branch, linear=conv)


def _like(old: Any, value: Any) -> Array:
    return jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)


# Whether a layer computes what its type and variables say.


# Attributes that replace a part of the computation, with the values that change nothing.
_HOOKS: dict[str, tuple[Any, ...]] = {
    "conv_general_dilated": (None, lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "einsum_op": (),
    "promote_dtype": (),
}


def check_layer(
    layer: Any, cls: type, extension_points: tuple[str, ...] = ()
) -> None:
    """Raise if the layer may compute something else than a `cls` with its variables.

    The text of the error continues the name of the layer.

    Args:
      layer: an instance of `cls`, of flax.nnx or flax.linen.
      cls: class of Flax or of this library.
      extension_points: methods that subclasses are meant to override.

    Raises:
      ValueError: it overrides a method or property, or `check_hooks` raises.
    """
    name = _layers.overridden_name(type(layer), cls, extension_points)
    if name is not None:
        raise ValueError(
            f"is a {type(layer).__name__} that overrides `{name}`, so what it "
            "computes is not known"
        )
    check_hooks(layer, cls)


def check_hooks(layer: Any, cls: type, ignored: tuple[str, ...] = ()) -> None:
    """Raise if the layer dilates its input, or replaces functions of JAX.

    Args:
      layer: an instance of `cls`.
      cls: class of Flax or of this library.
      ignored: hooks that may have any value.

    Raises:
      ValueError: the text continues the name of the layer, as in `check_layer`.
    """
    dilation = getattr(layer, "input_dilation", None) or 1
    if set(_integers.listed(dilation)) != {1}:
        raise ValueError(
            f"has `input_dilation` {dilation}, which has no counterpart"
        )
    for hook, neutral in _HOOKS.items():
        value = getattr(layer, hook, None)
        if value is None or hook in ignored:
            continue
        if isinstance(value, weightstd.Hook):
            continue  # its kernel is known
        harmless = (*neutral, _default(cls, hook))
        if not any(value is v for v in harmless):
            raise ValueError(
                f"has a custom `{hook}`, so what it computes is not known"
            )


def check_convertible(
    layer: Any, classes: tuple[type, ...], ignored: tuple[str, ...] = ()
) -> None:
    """Raise if `check_hooks` does, for the nearest of the classes.

    Args:
      layer: an instance of one of the classes.
      classes: of Flax or of this library.
      ignored: hooks that may have any value.

    Raises:
      ValueError: a sentence about "it".
    """
    cls = _layers.nearest_type(layer, classes)
    try:
        check_hooks(layer, cls, ignored)
    except ValueError as error:
        raise ValueError(f"it {error}") from None


def _default(cls: type, name: str) -> Any:
    parameter = inspect.signature(cls.__init__).parameters.get(name)
    return None if parameter is None else parameter.default
