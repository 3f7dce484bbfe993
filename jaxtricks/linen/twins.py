"""The nnx layer that computes what a linen layer does, with the same variables."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxtricks.nnx as jnnx
from jaxtricks import _tree
from jaxtricks.linen import _blocks, layers
from jaxtricks.nnx import _overrides
from jaxtricks.nnx.parts import unpacked

BLOCKS: dict[type, Any] = {
    _blocks.ACBlock: jnnx.ACBlock,
    _blocks.RepVGGBlock: jnnx.RepVGGBlock,
    _blocks.DiverseBranchBlock: jnnx.DiverseBranchBlock,
}
CONVS: dict[type, Any] = {nn.Conv: nnx.Conv, layers.WSConv: jnnx.WSConv}
AFFINE: dict[type, Any] = {
    nn.Dense: nnx.Linear,
    nn.DenseGeneral: nnx.LinearGeneral,
    nn.Einsum: nnx.Einsum,
    nn.ConvTranspose: nnx.ConvTranspose,
}
NORMS: dict[type, Any] = {
    nn.BatchNorm: nnx.BatchNorm,
    layers.ExtendedBatchNorm: jnnx.ExtendedBatchNorm,
}
KINDS = CONVS | AFFINE | BLOCKS | NORMS

# Attributes of linen layers that are arguments of their twins.
_FIELDS = (
    "kernel_size strides padding kernel_dilation feature_group_count dtype param_dtype precision "
    "mask conv_general_dilated preset eps use_gain use_bias use_scale epsilon axis internal_features "
    "transpose_kernel einsum_str preferred_element_type"
)
_STACKED = "is stacked (nn.scan, nn.vmap): fuse one layer"


def twin(module: nn.Module, variables: Mapping[str, Any], *, evaluates: bool) -> Any:
    """The nnx layer.

    Args:
      module: a layer of a type in `KINDS`.
      variables: {"params": ..., "batch_stats": ...} of this layer alone.
      evaluates: whether its normalizations use their running statistics.

    Raises:
      ValueError: stacked variables (nn.scan, nn.vmap), a subclass that computes something else, or a block
        whose parts have no twin.
    """
    kind = _overrides.kind_of(module, tuple(KINDS))
    _overrides.check(module, kind, ("_branches",) if kind in BLOCKS else ())
    fields = {n: value for n in _FIELDS.split() if (value := getattr(module, n, None)) is not None}
    kernel = variables["params"].get("kernel")
    sizes: tuple[Any, ...] = ()
    if kind in NORMS:
        sizes = variables["batch_stats"]["mean"].shape[-1:]
    elif kind in AFFINE:
        fields |= _affine_sizes(module, kernel.shape)
    else:
        sizes = _sizes(module, variables["params"])
        fields |= {n: _factory(getattr(module, n)) for n in ("conv", "norm") if kind in BLOCKS}
    if kind is nn.Einsum:
        fields.pop("use_bias")
    mask = fields.pop("mask", None)  # an array, which would count as a variable
    made = _filled(lambda: KINDS[kind](*sizes, rngs=nnx.Rngs(0), **fields), variables)
    if mask is not None:
        made.mask = nnx.data(mask)
    (made.eval if evaluates else made.train)()
    return made


def _sizes(module: Any, params: Mapping[str, Any]) -> tuple[int, int]:
    """(in_features, out_features)."""
    kernel = params["kernel"] if "kernel" in params else params["square"]["conv"]["kernel"]
    *_, fan_in, out = kernel.shape
    return fan_in * module.feature_group_count, out


def _affine_sizes(module: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of the twin that only the kernel's shape says."""
    if isinstance(module, nn.Einsum):
        if module.einsum_str is None:
            raise ValueError("is given its equation in the call")
        if len(shape) != len(module.shape):
            raise ValueError(_STACKED)
        # The bias has the axes that kernel and output share, in the order of the output.
        _, letters, outputs = module.einsum_str.replace(" ", "").replace("->", ",").split(",")
        size = dict(zip(letters, shape, strict=False))
        bias = tuple(size[letter] for letter in outputs if letter in size)
        return {"kernel_shape": shape, "bias_shape": bias if module.use_bias else None}
    if isinstance(module, nn.DenseGeneral):
        dims, axis = _tuple(module.batch_dims), _tuple(module.axis)
        at = len(dims) + len(axis)
        if shape[at:] != _tuple(module.features):
            raise ValueError(_STACKED)
        return {
            "in_features": shape[len(dims) : at],
            "out_features": shape[at:],
            "axis": axis,
            "batch_axis": dict(zip(dims, shape, strict=False)),
        }
    fan_in, out = shape[-2:]
    if getattr(module, "transpose_kernel", False):
        fan_in, out = out, fan_in
    return {"in_features": fan_in, "out_features": out}


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _factory(given: Callable[..., Any]) -> Callable[..., Any]:
    """The nnx factory of a block's part."""
    base, keywords = unpacked(given)
    if base not in KINDS:
        raise ValueError(f"is a block of {base}, which has no twin in flax.nnx")
    return functools.partial(KINDS[base], **keywords)


def _filled(make: Callable[[], nnx.Module], variables: Mapping[str, Any]) -> Any:
    """The module with these variables; it is made abstractly, since initializers take long to compile."""
    graph, params, stats = nnx.split(nnx.eval_shape(make), nnx.Param, nnx.BatchStat)

    def fill(tree: Any, like: Any) -> Any:
        given = _tree.by_path(tree)
        if {p: x.shape for p, x in given.items()} != {
            p: x.shape for p, x in _tree.by_path(like).items()
        }:
            raise ValueError(_STACKED)
        return _tree.map_with_path(lambda path, _: jnp.asarray(given[path]), like)

    return nnx.merge(
        graph, fill(variables["params"], params), fill(variables["batch_stats"], stats)
    )
