"""What blocks are made of: a branch, what may stand in front of its kernel, and how both become nodes."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtricks import _dtypes, _integers, reparam, weightstd
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat
from jaxtricks.nnx._conv import WSConv, convolution, hashable_padding
from jaxtricks.reparam import _nodes
from jaxtricks.reparam._apply import norm_factor

Size = tuple[int, ...]


class Pool(nnx.Module):
    """Mean over windows of an input that is padded already.

    Attributes:
      size: of the window, and so on, one per spatial axis.
    """

    def __init__(self, size: Size, strides: Size, dilation: Size):
        self.size = size
        self.strides = strides
        self.dilation = dilation

    def __call__(self, x: Array) -> Array:
        """[..., *spatial, C] -> [..., *spatial', C]."""
        return average_pool(x, self.size, self.strides, self.dilation)


class First(nnx.Module):
    """1x1 convolution and normalization in front of a branch's kernel.

    Its output is padded with its own value on zero input, from the running statistics
    as they are after this step and without gradient: then branch and fused convolution
    agree at the border too.

    Attributes:
      conv: nnx.Conv or WSConv of kernel size 1.
      norm: what normalizes its output; None in online mode.
      gain: [C] in its place; None in mode "branches".
      residual: whether the input is added to the convolution's output (kernel +
        identity).
    """

    def __init__(self, conv: Any, norm: Any, gain: Any, residual: bool):
        self.conv = conv
        self.norm = norm
        self.gain = gain
        self.residual = residual
        self.features = conv.out_features

    def __call__(self, x: Array, pads: _nodes.Pads, mode: dict[str, bool]) -> Array:
        """Normalized conv(x), padded."""
        y = self.conv(x)
        y = self.norm(y + x.astype(y.dtype) if self.residual else y, **mode)
        return with_border(y, pads, frozen_norm(self.norm))

    def nodes(self) -> list[reparam._nodes.Node]:
        """Convolution and normalization."""
        conv = conv_node(self.conv)
        if self.residual:
            conv = reparam.Sum(conv, reparam.Identity(self.features))
        return [conv, _affine(self)]


class Branch(nnx.Module):
    """A convolution without bias (or a pooling, or nothing), then a normalization.

    Attributes:
      conv: nnx.Conv, WSConv or Pool, without padding; None for the identity.
      norm: what normalizes its output; None in online mode.
      gain: [C] in its place; None in mode "branches".
      first: what stands in front of the convolution, or None.
      dilation: of the convolution beyond that of the window.
      features: channels of the output; `jt.nnx.roles` reads it.
    """

    def __init__(
        self,
        conv: Any,
        norm: Any,
        gain: Any = None,
        *,
        first: First | None = None,
        dilation: int = 1,
        features: int,
    ):
        self.conv = conv
        self.norm = norm
        self.gain = gain
        self.first = first
        self.dilation = dilation
        self.features = features

    def __call__(
        self, x: Array, pads: _nodes.Pads, use_running_average: bool | None = None
    ) -> Array:
        """norm(conv(x)), x padded by `pads`."""
        mode = (
            {}
            if use_running_average is None
            else {"use_running_average": use_running_average}
        )
        x = (
            _nodes.zero_pad(x, pads)
            if self.first is None
            else self.first(x, pads, mode)
        )
        return self.norm(x if self.conv is None else self.conv(x), **mode)

    def linear(self) -> list[reparam._nodes.Node]:
        """What comes before the branch's own normalization."""
        nodes: list[Any] = [] if self.first is None else self.first.nodes()
        if isinstance(self.conv, Pool):
            nodes.append(reparam.AvgPool(self.conv.size))
        elif self.conv is not None:
            nodes.append(conv_node(self.conv, self.dilation))
        return nodes

    def node(self) -> reparam._nodes.Node:
        """The branch with its current statistics."""
        nodes = [*self.linear(), _affine(self)]
        return reparam.Sequential(*nodes) if len(nodes) > 1 else nodes[0]


def _affine(part: Any) -> reparam._nodes.Node:
    return (
        reparam.Scale(part.gain[...]) if part.norm is None else frozen_norm(part.norm)
    )


def conv_node(conv: Any, dilation: int = 1) -> reparam.Conv:
    """The convolution that a layer computes."""
    kernel, bias = effective_kernel(conv)
    return reparam.Conv(kernel, bias, conv.feature_group_count, dilation)


def average_pool(x: Array, size: Size, strides: Size, dilation: Size) -> Array:
    """Mean over windows, without padding; any number of leading axes."""
    lead = (1,) * (x.ndim - len(size) - 1)
    window, steps, gaps = ((*lead, *v, 1) for v in (size, strides, dilation))
    zero = x.dtype.type(0)  # a constant, or the sum has no gradient under jit
    total = jax.lax.reduce_window(
        x, zero, jax.lax.add, window, steps, "VALID", None, gaps
    )
    return total / jnp.asarray(math.prod(size), x.dtype)


def with_border(y: Array, pads: _nodes.Pads, norm: reparam.Norm) -> Array:
    """y with what `norm` makes of zeros around its spatial axes; negative pads crop."""
    norm = jax.tree.map(lambda v: v.astype(_dtypes.wide_dtype(v)), norm)
    factor, bias = norm_factor(norm)
    value = -norm.mean * factor
    value = jax.lax.stop_gradient(value if bias is None else value + bias).astype(
        y.dtype
    )
    inside = jnp.ones(
        (1,) * (y.ndim - len(pads) - 1) + y.shape[y.ndim - len(pads) - 1 : -1] + (1,)
    )
    inside = _nodes.zero_pad(inside, pads) > 0
    value = value.reshape((1,) * (y.ndim - 1) + (-1,))
    return jnp.where(inside, _nodes.zero_pad(y, pads), value)


def unpacked(factory: Any) -> tuple[Any, dict[str, Any]]:
    """(what a factory is a partial of, the keyword arguments bound to it)."""
    keywords: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        factory, keywords = factory.func, {**factory.keywords, **keywords}
    return factory, keywords


def effective_kernel(conv: Any) -> tuple[Array, Array | None]:
    """(kernel, bias) of the plain convolution that a layer computes."""
    bias = _compat.read(conv.bias)
    if isinstance(conv, WSConv):
        return conv.standardized_kernel(), bias
    kernel = conv.kernel[...]
    if getattr(conv, "mask", None) is not None:
        kernel = kernel * conv.mask
    hook = getattr(conv, "conv_general_dilated", jax.lax.conv_general_dilated)
    if isinstance(hook, weightstd.Hook):
        kernel = hook.kernel(kernel)
    elif hook is not jax.lax.conv_general_dilated:
        raise ValueError(
            f"nnx: a {type(conv).__name__} with its own `conv_general_dilated` does not fuse: what it "
            "computes is not known"
        )
    return kernel, bias


def frozen_norm(norm: Any) -> reparam.Norm:
    """The normalization with its running statistics."""
    if not (hasattr(norm, "mean") and hasattr(norm, "var")):
        raise ValueError(
            f"nnx: {type(norm).__name__} has no running statistics and does not fuse; use nnx.BatchNorm "
            "or ExtendedBatchNorm"
        )
    scale, bias = _compat.read(norm.scale), _compat.read(norm.bias)
    return reparam.Norm(norm.mean[...], norm.var[...], scale, bias, norm.epsilon)


# The plain convolution that a layer or a block becomes.


def plain_conv(layer: Any, merged: reparam.Conv) -> nnx.Conv:
    """An nnx.Conv of this kernel and bias with the geometry of `layer`, in its dtypes."""
    dtype = layer_dtypes(layer)
    conv: Any = nnx.Conv(
        layer.in_features,
        layer.out_features,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        feature_group_count=merged.groups,
        dtype=dtype.compute,
        param_dtype=dtype.param,
        precision=largest_conv(layer).precision,
        kernel_init=nnx.initializers.zeros,  # the default takes seconds to compile, for each shape
        rngs=nnx.Rngs(0),
    )
    if (
        element := getattr(largest_conv(layer), "preferred_element_type", None)
    ) is not None:
        conv.preferred_element_type = element  # no argument in older releases of flax
    conv.kernel[...] = merged.kernel.astype(dtype.param)
    bias = jnp.zeros(layer.out_features) if merged.bias is None else merged.bias
    conv.bias[...] = bias.astype(dtype.param)
    return conv


class _Dtypes(NamedTuple):
    compute: Any
    param: Any


def largest_conv(layer: Any) -> Any:
    """The layer itself, or a block's convolution with the largest kernel."""
    return layer.parts()[0][1].conv if hasattr(layer, "parts") else layer


def layer_dtypes(layer: Any) -> _Dtypes:
    """(dtype of the computation or None, dtype of the kernel) of a convolution or a block."""
    conv = largest_conv(layer)
    return _Dtypes(conv.dtype, conv.kernel[...].dtype)


# Blocks that start as a given convolution.


def start_from(block: Any, kernel: Array, bias: Array | None) -> None:
    """See `Branched.start_from`."""
    (_, free), *others = block.parts()
    _check(block, free)
    wide = _dtypes.wide_dtype(kernel)
    target = reparam.Conv(jnp.asarray(kernel, wide), None, block.feature_group_count)
    spread = jnp.sqrt(_power(target.kernel))
    if block.norm is not None:
        _adjust(block.norm, spread**2, None)
        _write(
            free.conv.kernel,
            reparam.unfuse(target, block.branches().nodes[0]).nodes[0].nodes[0].kernel,
        )
        _write(block.norm.bias, 0.0 if bias is None else bias)
        return
    for _, branch in others:
        if branch.first is not None:
            _adjust(branch.first.norm, _variance(branch.first.nodes()[:1], block), 1.0)
        _adjust(
            branch.norm, _variance(branch.linear(), block), spread / (1 + len(others))
        )
    # A factor of 1 behind the free kernel: then it is what is missing, whose variance
    # is known after.
    _adjust(free.norm, jnp.ones_like(spread), None)
    rest = jnp.zeros_like(spread) if bias is None else jnp.asarray(bias, wide)
    made = reparam.unfuse(
        reparam.Conv(target.kernel, rest, target.groups), block.branches()
    )
    conv, norm = made.nodes[0].nodes
    _write(free.conv.kernel, conv.kernel)
    _write(free.norm.bias, norm.bias)
    _adjust(free.norm, _power(conv.kernel), None, keep_bias=True)


def _variance(nodes: list[Any], block: Any) -> Array:
    """Of each output channel for white input of unit variance."""
    features = reparam.Identity(block.in_features)
    return _power(
        reparam.fuse(reparam.Sequential(features, *nodes), block.kernel_size).kernel
    )


def _power(kernel: Array) -> Array:
    return jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)))


def _adjust(
    norm: Any, var: Array, scale: Array | float | None, keep_bias: bool = False
) -> None:
    """Mean 0, this variance (its mean where the normalization has one) and scale; None = a factor of 1."""
    _write(norm.mean, 0.0)
    _write(norm.var, var if norm.var[...].ndim else jnp.mean(var))
    if scale is None:
        scale = jnp.sqrt(frozen_norm(norm).var + norm.epsilon)
    _write(norm.scale, scale)
    if not keep_bias:
        _write(norm.bias, 0.0)


def _write(variable: nnx.Variable, value: Any) -> None:
    old = variable[...]
    variable[...] = jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)


def _check(block: Any, free: Any) -> None:
    hook = getattr(free.conv, "conv_general_dilated", None)
    if isinstance(free.conv, WSConv) or isinstance(hook, weightstd.Hook):
        raise ValueError(
            f"{type(block).__name__}.start_from: the branches have standardized kernels, whose filters have "
            "mean 0, so not every convolution can be written with them; use conv=nnx.Conv"
        )
    norms = (
        [block.norm] if block.norm is not None else [b.norm for _, b in block.parts()]
    )
    for norm in norms:
        if frozen_norm(norm).scale is None or frozen_norm(norm).bias is None:
            raise ValueError(
                f"{type(block).__name__}.start_from: a {type(norm).__name__} has no scale or no bias to "
                "set; make it with both"
            )


# Blocks of branches, each a convolution and a normalization: what they share.


Factory = Callable[..., Any]
Mode = str


class Branched(nnx.Module):
    """A sum of branches that share one window; subclasses make them and list them in `parts`.

    In mode "branches" each branch has its normalization. In mode "online" it has a gain
    per channel instead, every step makes one kernel of all branches, and `norm` stands
    behind the one convolution.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one size per spatial axis, of the window and of the fused
        convolution.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the window.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: factory of the branches' convolutions.
      norm: factory of the normalizations.
      mode: "branches" or "online".
      rngs: keys; "params" is used.

    Raises:
      ValueError: a kernel size without one to three axes, or padding that is not zeros.
    """

    least_axes = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] = (3, 3),
        strides: int | Sequence[int] | None = 1,
        *,
        padding: _nodes.Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        conv: Factory = nnx.Conv,
        norm: Factory = nnx.BatchNorm,
        mode: Mode = "branches",
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        check_features(name, in_features, out_features, feature_group_count)
        check_mode(name, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = window(kernel_size, name, self.least_axes)
        axes = len(self.kernel_size)
        self.strides = _nodes.per_axis("strides", strides or 1, axes)
        self.padding = hashable_padding(padding)
        self.kernel_dilation = _nodes.per_axis(
            "kernel_dilation", kernel_dilation or 1, axes
        )
        self.feature_group_count = feature_group_count
        self.mode = mode
        # Padding that no branch can derive its own from fails here, not in the first
        # step.
        size = self.kernel_size
        _nodes.resolve(self.padding, size, size, self.strides, self.kernel_dilation)
        self._make(Maker(self, conv, norm, rngs))
        self.norm = norm(out_features, rngs=rngs) if mode == "online" else None

    def _make(self, make: "Maker") -> None:
        """Set the branches as attributes."""
        raise NotImplementedError

    def parts(self) -> list[tuple[Size, Branch]]:
        """(effective kernel size, branch) of every branch, the one with the largest kernel first."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "..."], use_running_average: bool | None = None
    ) -> Float[Array, "..."]:
        """[..., *spatial, in_features] -> [..., *spatial', out_features].

        Args:
          x: the input.
          use_running_average: overrides the normalizations' own setting for this call.
        """
        if self.norm is not None:
            mode = (
                {}
                if use_running_average is None
                else {"use_running_average": use_running_average}
            )
            return self.norm(self._one_convolution(x), **mode)
        size, dilation = self.kernel_size, self.kernel_dilation
        spatial = x.shape[x.ndim - len(size) - 1 : -1]
        pads = _nodes.resolve(self.padding, spatial, size, self.strides, dilation)
        outputs = [
            branch(x, _nodes.place(pads, size, own, dilation), use_running_average)
            for own, branch in self.parts()
        ]
        return functools.reduce(operator.add, outputs)

    def _sum(self) -> reparam.Sum:
        return reparam.Sum(*(branch.node() for _, branch in self.parts()))

    def _one_convolution(self, x: Array) -> Array:
        """All branches as one convolution, before the one normalization."""
        merged = reparam.fuse(self._sum(), self.kernel_size)
        (_, first), *_ = self.parts()
        return convolution(
            x,
            merged.kernel,
            merged.bias,
            dtype=_dtypes.common_dtype(
                x, first.conv.kernel[...], given=first.conv.dtype
            ),
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            groups=merged.groups,
            precision=first.conv.precision,
        )

    def branches(self) -> reparam.Sum | reparam.Sequential:
        """The block as a node of `reparam`, with its current statistics (evaluation mode).

        reparam.apply(block.branches(), x, strides=block.strides, padding=block.padding,
        dilation=block.kernel_dilation) is the block's output.

        Returns:
          A Sum of the branches; in online mode that and the normalization behind it.

        Raises:
          ValueError: a normalization without running statistics.
        """
        branches = self._sum()
        if self.norm is None:
            return branches
        return reparam.Sequential(branches, frozen_norm(self.norm))

    def fused(self) -> nnx.Conv:
        """A plain nnx.Conv that computes what the block computes in evaluation mode.

        Raises:
          ValueError: a normalization without running statistics.
        """
        return plain_conv(self, reparam.fuse(self.branches(), self.kernel_size))

    def start_from(
        self, kernel: Float[Array, "..."], bias: Float[Array, " out"] | None = None
    ) -> None:
        """Set the variables so that in evaluation the block computes conv(x, kernel) + bias.

        Running statistics become those of white input of unit variance (mean 0,
        variance the sum of squares of what comes before the normalization), so that
        training starts close to the same function. Of B branches each but the first
        gets 1/B of the output's standard deviation; the first, with the largest kernel,
        gets what is missing (`reparam.unfuse`).

        Args:
          kernel: [*kernel_size, in / groups, out].
          bias: [out]; None = zeros.

        Raises:
          ValueError: another shape, standardized kernels (whose mean is always 0), or
            normalizations without scale, bias or running statistics.
        """
        start_from(self, kernel, bias)


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the branches of one block."""

    block: Branched
    conv: Factory
    norm: Factory
    rngs: nnx.Rngs

    def branch(
        self,
        size: Size,
        *,
        dilation: int = 1,
        first: First | None = None,
        scale: float = 1.0,
    ) -> Branch:
        """A convolution of this size, and what stands behind it."""
        ins = self.block.in_features if first is None else first.features
        layer = self._convolution(ins, size, dilation)
        return self._branch(layer, scale, first=first, dilation=dilation)

    def identity(self) -> Branch | None:
        """A normalization alone; None unless it has the shape of the others."""
        block = self.block
        same = block.in_features == block.out_features and set(block.strides) == {1}
        return self._branch(None, 1.0) if same else None

    def pool(self, first: First | None) -> Branch:
        """An average over the window."""
        block = self.block
        layer = Pool(block.kernel_size, block.strides, block.kernel_dilation)
        # In online mode the gain makes of white input what a normalization would.
        count = functools.reduce(operator.mul, block.kernel_size)
        scale = count**0.5 if block.mode == "online" else 1.0
        return self._branch(layer, scale, first=first)

    def first(self, features: int, *, residual: bool) -> First:
        """A 1x1 convolution in front; with `residual` it starts as the identity."""
        block, axes = self.block, len(self.block.kernel_size)
        init = {"kernel_init": nnx.initializers.zeros_init()} if residual else {}
        layer = self.conv(
            block.in_features,
            features,
            (1,) * axes,
            padding="VALID",
            feature_group_count=block.feature_group_count,
            use_bias=False,
            rngs=self.rngs,
            **init,
        )
        return First(layer, *self._behind(features, 1.0), residual)

    def _branch(self, layer: Any, scale: float, **how: Any) -> Branch:
        features = self.block.out_features
        return Branch(layer, *self._behind(features, scale), features=features, **how)

    def _behind(self, features: int, scale: float) -> tuple[Any, Any]:
        """(normalization, None), or in online mode (None, gain)."""
        if self.block.mode == "online":
            return None, nnx.Param(jnp.full(features, scale, jnp.float32))
        init = {} if scale == 1.0 else {"scale_init": nnx.initializers.constant(scale)}
        return self.norm(features, rngs=self.rngs, **init), None

    def _convolution(self, ins: int, size: Size, dilation: int) -> Any:
        """It expects an input that is padded already."""
        block = self.block
        return self.conv(
            ins,
            block.out_features,
            size,
            strides=block.strides,
            padding="VALID",
            kernel_dilation=tuple(d * dilation for d in block.kernel_dilation),
            feature_group_count=block.feature_group_count,
            use_bias=False,
            rngs=self.rngs,
        )


def window(kernel_size: int | Sequence[int], name: str, least: int = 1) -> Size:
    """One size per spatial axis, or an error that names the block."""
    size = _integers.listed(kernel_size)
    if not least <= len(size) <= 3:
        raise ValueError(
            f"{name}: `kernel_size` is {kernel_size}; give {least} to 3 sizes, such as (height, width)"
        )
    return _nodes.per_axis("kernel_size", size, len(size))


def check_mode(name: str, mode: str) -> None:
    """Raise if the mode is unknown."""
    if mode not in ("branches", "online"):
        raise ValueError(f"{name}: `mode` is {mode!r}; give 'branches' or 'online'")


def check_features(name: str, ins: int, outs: int, groups: int) -> None:
    """Raise if the groups do not divide the channels."""
    if groups < 1 or ins % groups or outs % groups:
        raise ValueError(
            f"{name}: `feature_group_count` {groups} divides not both {ins} and {outs} features"
        )
