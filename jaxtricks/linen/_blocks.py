"""Blocks of branches as linen modules, with the paths and functions of their nnx twins."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxtricks import reparam
from jaxtricks._typing import Array
from jaxtricks.linen._layers import Sizes, WSConv, in_features
from jaxtricks.nnx import _blocks, _branches
from jaxtricks.reparam import _nodes

Factory = Callable[..., Any]
Size = tuple[int, ...]


class _First(nn.Module):
    """1x1 convolution and normalization in front of a branch's kernel; see `jt.nnx` parts.First."""

    conv: Factory
    norm: Factory
    residual: bool

    @nn.compact
    def __call__(self, x: Array, pads: _nodes.Pads, mode: dict[str, bool]) -> Array:
        y, norm = self.conv(name="conv")(x), self.norm(name="norm")
        y = norm(y + x.astype(y.dtype) if self.residual else y, **mode)
        return _branches.with_border(y, pads, _frozen(norm))


class _Branch(nn.Module):
    """A convolution (or a pooling, or nothing) without padding or bias, then a normalization."""

    norm: Factory
    conv: Factory | None = None
    pool: Callable[[Array], Array] | None = None
    first: Factory | None = None

    @nn.compact
    def __call__(self, x: Array, pads: _nodes.Pads, mode: dict[str, bool]) -> Array:
        if self.first is None:
            x = _nodes.zero_pad(x, pads)
        else:
            x = self.first(name="first")(x, pads, mode)
        if self.conv is not None:
            x = self.conv(name="conv")(x)
        elif self.pool is not None:
            x = self.pool(x)
        return self.norm(name="norm")(x, **mode)


class _Block(nn.Module):
    """What the blocks share: one window, on whose centre tap every branch is placed."""

    in_features: int | None
    out_features: int
    kernel_size: Sizes = (3, 3)
    strides: Sizes | None = 1
    padding: _nodes.Padding = "SAME"
    kernel_dilation: Sizes | None = 1
    feature_group_count: int = 1
    conv: Factory = nn.Conv
    norm: Factory = nn.BatchNorm
    use_running_average: bool | None = None

    least_axes = 1  # no field: every block has its own

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """[..., *spatial, in_features] -> [..., *spatial', out_features].

        Args:
          x: the input.
          use_running_average: overrides the block's own setting for this call.
        """
        name = type(self).__name__
        ins = in_features(name, self.in_features, x)
        _branches.check_features(name, ins, self.out_features, self.feature_group_count)
        size, strides, dilation = self._window()
        spatial = x.shape[x.ndim - len(size) - 1 : -1]
        pads = _nodes.resolve(self.padding, spatial, size, strides, dilation)
        mode = (
            self.use_running_average
            if use_running_average is None
            else use_running_average
        )
        flags = {} if mode is None else {"use_running_average": mode}
        outputs = [
            made(x, _nodes.place(pads, size, own, dilation), flags)
            for own, made in self._branches(ins)
        ]
        return functools.reduce(operator.add, outputs)

    def _window(self) -> tuple[Size, Size, Size]:
        """(size, strides, dilation), one number per spatial axis."""
        size = _branches.window(self.kernel_size, type(self).__name__, self.least_axes)
        strides = _nodes.per_axis("strides", self.strides or 1, len(size))
        dilation = _nodes.per_axis(
            "kernel_dilation", self.kernel_dilation or 1, len(size)
        )
        return size, strides, dilation

    def _branches(self, ins: int) -> list[tuple[Size, _Branch]]:
        """(kernel size, branch) of every branch."""
        raise NotImplementedError

    def _convolution(
        self, size: Size, features: int | None = None, **how: Any
    ) -> Factory:
        """A branch's convolution; it expects an input that is padded already."""
        _, strides, dilation = self._window()
        return functools.partial(
            _with_features(self.conv, features or self.out_features),
            kernel_size=size,
            padding="VALID",
            feature_group_count=self.feature_group_count,
            use_bias=False,
            **{"strides": strides, "kernel_dilation": dilation, **how},
        )

    def _first(self, features: int, residual: bool) -> Factory:
        ones = (1,) * len(self._window()[0])
        how: dict[str, Any] = {"kernel_init": nn.initializers.zeros} if residual else {}
        conv = self._convolution(
            ones, features, strides=ones, kernel_dilation=ones, **how
        )
        return functools.partial(_First, conv, self.norm, residual)


class ACBlock(_Block):
    """KxK, Kx1 and 1xK branches, each with its normalization, summed; see `jt.nnx.ACBlock`.

    Attributes:
      in_features: channels of the input; None = those of the input it is called on.
      out_features: channels of the output.
      kernel_size: (kh, kw) or (kd, kh, kw).
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: nn.Conv, this library's WSConv, or a partial of either.
      norm: nn.BatchNorm, this library's ExtendedBatchNorm, or a partial of either.
      use_running_average: True in evaluation; None = as the normalizations say.
      gamma_init: initial scale of the normalizations.

    Example:
      >>> import jax
      >>> block = ACBlock(None, 8, (3, 3), use_running_average=True)
      >>> made = jax.eval_shape(block.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
      >>> sorted(made["params"])
      ['horizontal', 'square', 'vertical']
    """

    gamma_init: float = 1.0

    least_axes = 2

    def _branches(self, ins: int) -> list[tuple[Size, _Branch]]:
        norm = functools.partial(
            self.norm, scale_init=nn.initializers.constant(self.gamma_init)
        )
        sizes = _blocks.lines(self._window()[0])
        return [
            (k, _Branch(norm, self._convolution(k), name=name))
            for name, k in sizes.items()
        ]


class RepVGGBlock(_Block):
    """KxK, 1x1 and identity branches, each with its normalization, summed; see `jt.nnx.RepVGGBlock`.

    Attributes:
      in_features: channels of the input; None = those of the input it is called on.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: nn.Conv, this library's WSConv, or a partial of either.
      norm: nn.BatchNorm, this library's ExtendedBatchNorm, or a partial of either.
      use_running_average: True in evaluation; None = as the normalizations say.

    Example:
      >>> import jax
      >>> block, x = RepVGGBlock(None, 4, use_running_average=True), jnp.ones((1, 6, 6, 4))
      >>> sorted(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
      ['identity', 'point', 'square']
    """

    def _branches(self, ins: int) -> list[tuple[Size, _Branch]]:
        size, strides, _ = self._window()
        ones = (1,) * len(size)
        made = [
            (size, _Branch(self.norm, self._convolution(size), name="square")),
            (ones, _Branch(self.norm, self._convolution(ones), name="point")),
        ]
        if ins == self.out_features and set(strides) == {1}:
            made.append((ones, _Branch(self.norm, name="identity")))
        return made


class DiverseBranchBlock(_Block):
    """KxK, 1x1, 1x1-average and 1x1-KxK branches, normalized and summed; see `jt.nnx.DiverseBranchBlock`.

    Attributes:
      in_features: channels of the input; None = those of the input it is called on.
      out_features: channels of the output.
      kernel_size: an int for one spatial axis, else one int per axis.
      strides: an int or one per spatial axis.
      padding: "SAME", "VALID", an int or (low, high) pairs, of the KxK kernel.
      kernel_dilation: an int or one per spatial axis.
      feature_group_count: groups.
      conv: nn.Conv, this library's WSConv, or a partial of either.
      norm: nn.BatchNorm, this library's ExtendedBatchNorm, or a partial of either.
      use_running_average: True in evaluation; None = as the normalizations say.
      internal_features: channels between 1x1 and KxK; None = in_features, depthwise
        twice that.

    Example:
      >>> import jax
      >>> block, x = DiverseBranchBlock(None, 4, use_running_average=True), jnp.ones((1, 6, 6, 4))
      >>> sorted(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
      ['point', 'pool', 'sequence', 'square']
    """

    internal_features: int | None = None

    def _branches(self, ins: int) -> list[tuple[Size, _Branch]]:
        size, strides, dilation = self._window()
        ones, conv = (1,) * len(size), self._convolution(size)
        depthwise = self.feature_group_count == self.out_features
        inside = _blocks.internal(
            ins, self.out_features, self.feature_group_count, self.internal_features
        )
        pool = functools.partial(
            _branches.average_pool, size=size, strides=strides, dilation=dilation
        )
        before = None if depthwise else self._first(self.out_features, residual=False)
        first = self._first(inside, residual=inside == ins)
        made = [
            (size, _Branch(self.norm, conv, name="square")),
            (size, _Branch(self.norm, pool=pool, first=before, name="pool")),
            (size, _Branch(self.norm, conv, first=first, name="sequence")),
        ]
        if not depthwise:
            made.insert(
                1, (ones, _Branch(self.norm, self._convolution(ones), name="point"))
            )
        return made


def _frozen(norm: Any) -> reparam.Norm:
    """A bound normalization with its running statistics as they are now."""

    def parameter(name: str) -> Array | None:
        if not norm.has_variable("params", name):
            return None
        return nn.meta.unbox(norm.get_variable("params", name))

    mean, var = (
        jnp.asarray(norm.get_variable("batch_stats", name)) for name in ("mean", "var")
    )
    return reparam.Norm(mean, var, parameter("scale"), parameter("bias"), norm.epsilon)


def _with_features(factory: Factory, features: int) -> Factory:
    """The factory with its number of output channels; flax's and ours name it differently."""
    base, _ = _branches.unpacked(factory)
    return functools.partial(factory, *((None,) if base is WSConv else ()), features)
