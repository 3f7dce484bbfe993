"""A layer or a block, and the normalization behind it, if any: what fuses into one plain layer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtricks import _jaxpr, _tree, reparam
from jaxtricks._typing import Array
from jaxtricks.nnx import _module_tree, _overrides, affine
from jaxtricks.nnx._branches import Branched
from jaxtricks.nnx._conv import WSConv, pad_by_mode
from jaxtricks.nnx._norm import ExtendedBatchNorm
from jaxtricks.nnx.parts import conv_node, frozen_norm
from jaxtricks.nnx.plain import layer_dtypes, plain_conv
from jaxtricks.remat import _memory
from jaxtricks.reparam import geometry

NORMS = (nnx.BatchNorm, ExtendedBatchNorm)
LAYERS = (nnx.Conv, WSConv, Branched, *affine.LAYERS)
"""What may take up a normalization."""

_EXTENSION_POINTS = ("parts", "_make")  # of a block, whose call adds up what `parts` lists


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
        return node if self.norm is None else reparam.Sequential(node, frozen_norm(self.norm))

    def check_kind(self) -> None:
        """Raise if it is not known what the unit computes, whatever its mode and its statistics are."""
        for path, module in _module_tree.modules(self.conv):
            if isinstance(module, LAYERS + NORMS):
                _known(_module_tree.below(self.layer) + path if path else self.layer, module)
        if self.norm is not None:
            _known(str(self.norm_layer), self.norm)
        if isinstance(self.conv, affine.LAYERS):
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
        return all(kind.__module__.startswith(("flax.", "jaxtricks.")) for kind in types)

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
        make = self._fused_affine if isinstance(self.conv, affine.LAYERS) else self._fused_conv
        with jax.default_matmul_precision("highest"):
            x, plain, bound = make(jnp.asarray(x))
            y, z = self(x), plain(x)
            error = largest_difference(y, z)
        if self.norm is None and z.dtype != y.dtype:
            # A block's normalizations give float32 where its convolutions compute in sixteen bits.
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
        # The bound is of rounding in x's dtype; parameters or a normalization may have a coarser one.
        coarser = jnp.finfo(self._coarsest(x.dtype)).eps / jnp.finfo(x.dtype).eps
        return x, plain_conv(self.conv, merged), float(bound) * float(coarser)

    def _fused_affine(self, x: Array) -> tuple[Any, Any, float]:
        """(x, the layer with other variables, what rounding allows)."""
        norm = frozen_norm(self.norm)
        plain = affine.with_norm(self.conv, norm)
        dtype = self._coarsest(self.conv.dtype or x.dtype)
        return x, plain, affine.rounding_bound(self.conv, norm, plain, x, dtype)

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
        if isinstance(module, affine.LAYERS):
            affine.channel_axis(module)
        elif hasattr(module, "kernel") and module.kernel[...].ndim != len(module.kernel_size) + 2:
            raise ValueError("is stacked (nnx.vmap): fuse one layer, or its `branches()`")
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
            f"{'it' if found.layer else 'layers'} out by `where`"
        )
    return found


def largest_difference(a: Any, b: Any) -> float:
    """max |a - b| over all floating leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [
        (jnp.asarray(x, _tree.wide_dtype(x, y)), jnp.asarray(y, _tree.wide_dtype(x, y)))
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
    return _memory.flops(_jaxpr.trace(fn, *inputs)[0].jaxpr)


def _untouched(norm: Any) -> bool:
    return bool(jnp.all(norm.mean[...] == 0) & jnp.all(norm.var[...] == 1))


def _dtype(conv: Any, dtype: Any) -> Any:
    return layer_dtypes(conv).compute or dtype


def _per_axis(conv: Any, name: str) -> tuple[int, ...]:
    return geometry.per_axis(name, getattr(conv, name) or 1, len(conv.kernel_size))


def _extents(conv: Any) -> list[int]:
    dilation = _per_axis(conv, "kernel_dilation")
    return [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, dilation, strict=True)]
