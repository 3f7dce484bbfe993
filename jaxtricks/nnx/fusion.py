"""A whole model for inference: blocks, standardized kernels and normalizations become plain convolutions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxtricks import reparam, weightstd
from jaxtricks._types import Array
from jaxtricks.nnx import surgery
from jaxtricks.nnx.branch import Branched
from jaxtricks.nnx.conv import WSConv
from jaxtricks.nnx.probe import Probed, pure_call, spied, whole_model
from jaxtricks.nnx.unit import NORMS, Unit, variables
from jaxtricks.reparam.dataflow import Flow

Where = Callable[[str], bool]


class Folded(nnx.Module):
    """Stands where a normalization was that is part of the convolution in front of it now."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """x."""
        return x


def fuse(
    model: nnx.Module, *, example: Any = None, where: Where | None = None
) -> tuple[Any, reparam.FuseReport]:
    """The model for inference, and the proof that it computes the same function.

    Every block (ACBlock, RepVGGBlock, ...), WSConv and convolution with a `weightstd.standardized` hook turns
    into a plain nnx.Conv. Given an example, so does a convolution with the normalization behind it, where the
    traced output of the convolution goes to that normalization and nowhere else.

    Args:
      model: any module in evaluation mode; it is left alone. Layers may lie in lists, tuples and dicts.
      example: an input of the model, or a tuple of them; without it normalizations are never folded, since
        bn(conv(x)) and bn(relu(conv(x))) have the same variables.
      where: where(path) -> True for what to fuse: the path of a block or convolution, or of the
        normalization; None = everything that can be.

    Returns:
      The fused model, and a FuseReport: error against rounding bound for every layer (on its own input in the
      example, else on random ones) and for the model, parameters, FLOPs, and what was kept and why.

    Raises:
      ValueError: training mode, statistics that were never updated, `where` that chooses nothing or
        what does not fuse (by name, with the reason), or a difference that rounding does not explain.

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
        units, probed, inputs = alone(convs), None, {}
        kept = dict.fromkeys(norms, "without `example` it is not known what feeds it")
    else:
        probed = Probed(spied(model, (*convs, *norms)), example)
        units, kept = paired(convs, norms, probed.flow())
        inputs = probed.inputs()
    units = chosen("nnx.fuse", units, kept, where)
    plain, rows = merged(units, inputs)
    changes = {id(one.conv): conv for one, conv in zip(units, plain, strict=True)}
    changes |= {id(one.norm): Folded() for one in units if one.norm is not None}
    fused = surgery.replaced(copy, changes)
    whole = None
    if probed is not None:
        whole = whole_model(
            probed, pure_call(fused), units, rows, (variables(model), variables(fused))
        )
    return fused, reparam.FuseReport(rows, whole, staying(units, kept))


def merged(
    units: Sequence[Unit], inputs: Mapping[str, Array]
) -> tuple[list[nnx.Conv], tuple[reparam.FusedLayer, ...]]:
    """(plain convolutions, how each compares with its unit on its input, else on a random one)."""
    made = [one.fused(inputs[one.layer] if one.layer in inputs else one.probe()) for one in units]
    return [conv for conv, _ in made], tuple(row for _, row in made)


def staying(units: Sequence[Unit], kept: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(path, reason) of the normalizations that no unit has taken up."""
    gone = {one.norm_layer for one in units}
    return tuple((norm, why) for norm, why in kept.items() if norm not in gone)


def layers(model: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """({path: convolution or block}, {path: normalization}), each once, those inside blocks left out."""
    convs, norms, seen, inside = {}, {}, set(), []
    for path, module in surgery.modules(model):
        if id(module) in seen or any(path.startswith(block) for block in inside):
            continue
        seen.add(id(module))
        if isinstance(module, Branched):
            inside.append(surgery.below(path))
        if isinstance(module, nnx.Conv | WSConv | Branched):
            convs[path] = module
        elif isinstance(module, NORMS):
            norms[path] = module
    return convs, norms


def alone(convs: Mapping[str, Any]) -> list[Unit]:
    """The blocks and standardized convolutions: they need nothing around them to be known."""
    return [Unit(path, conv) for path, conv in convs.items() if _changes(conv)]


def paired(
    convs: Mapping[str, Any], norms: Mapping[str, Any], flow: Flow
) -> tuple[list[Unit], dict[str, str]]:
    """Units with the normalizations that fold into them, and {other normalization: why it does not}."""
    behind, kept = {}, {}
    for path, norm in norms.items():
        try:
            if getattr(norm, "axis", -1) not in (-1, (-1,)):
                raise ValueError(f"{path!r} normalizes axis {norm.axis}, not the channels")
            conv = flow.source(path, convs)
            Unit(
                conv, convs[conv], norm, path
            ).node()  # raises where it is not known what conv computes
            behind[conv] = path
        except ValueError as error:
            kept[path] = str(error)
    units = [
        Unit(path, conv, norms[behind[path]], behind[path]) if path in behind else Unit(path, conv)
        for path, conv in convs.items()
    ]
    return [one for one in units if one.norm is not None or _changes(one.conv)], kept


def chosen(
    name: str, units: Sequence[Unit], kept: Mapping[str, str], where: Where | None
) -> list[Unit]:
    """The units to fuse, each ready for it."""
    if where is not None:
        units = [
            one for one in units if where(one.layer) or (one.norm_layer and where(one.norm_layer))
        ]
    why = "; ".join(f"{path}: {reason}" for path, reason in kept.items())
    if not units and where is not None:
        raise ValueError(f"{name}: `where` chooses nothing that can be fused{why and f' ({why})'}")
    if not units and why:
        raise ValueError(f"{name}: nothing can be fused: {why}")
    for one in units:
        try:
            one.check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return list(units)


def _changes(conv: Any) -> bool:
    """Whether a convolution is more than a plain one."""
    return isinstance(conv, WSConv | Branched) or isinstance(
        getattr(conv, "conv_general_dilated", None), weightstd.Hook
    )
