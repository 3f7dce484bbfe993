"""A whole model for inference: blocks, standardized kernels and normalizations become plain layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxtricks import reparam, weightstd
from jaxtricks._arguments import checked
from jaxtricks._typing import Array
from jaxtricks.nnx import _module_tree
from jaxtricks.nnx._branches import Branched
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx.probe import Probed, Spied, evaluation_kwargs, pure_call, whole_model
from jaxtricks.nnx.unit import LAYERS, NORMS, Unit, variables
from jaxtricks.reparam._dataflow import Flow

Where = Callable[[str], bool]


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
    where: Where | None = None,
) -> tuple[Any, reparam.FuseReport]:
    """The model for inference, and the proof that it computes the same function.

    Every block (ACBlock, RepVGGBlock, ...), WSConv and convolution with a `weightstd.standardized` hook turns
    into a plain nnx.Conv. Given an example, a convolution, nnx.Linear, LinearGeneral, Einsum or ConvTranspose
    takes up the normalization behind it, where the traced output of the layer goes to that normalization
    and nowhere else. A subclass that changes what its layer computes is kept, with the reason.

    Args:
      model: any module in evaluation mode; it is left alone. Layers may lie in lists, tuples and dicts.
      example: an input of the model, or a tuple of them; without it normalizations are never folded, since
        bn(conv(x)) and bn(relu(conv(x))) have the same variables.
      example_kwargs: keyword arguments of the model's call. Flags of the call that neither names (`train`,
        `deterministic`, ...) are set for evaluation, and `rngs` that it insists on is None.
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
    units, plain, rows, kept = merged("nnx.fuse", units, kept, where, inputs)
    changes: dict[int, Any] = {id(one.conv): new for one, new in zip(units, plain, strict=True)}
    changes |= {id(one.norm): Folded(dtypes[one.norm_layer]) for one in units if one.norm_layer}
    fused = _module_tree.replaced(copy, changes)
    whole = None
    if probed is not None:
        counts = variables(model), variables(fused)
        whole = whole_model(probed, pure_call(fused, kwargs), units, rows, counts)
    return fused, reparam.FuseReport(rows, whole, staying(units, kept))


def _set_modes(watched: Mapping[str, Any], modes: Mapping[str, set[bool | None]]) -> None:
    """The modes that the layers had in the model's call, which an argument may have said."""
    for path, seen in modes.items():
        if None not in seen:
            (watched[path].eval if seen == {True} else watched[path].train)()


def merged(
    name: str,
    units: Sequence[Unit],
    kept: Mapping[str, str],
    where: Where | None,
    inputs: Mapping[str, Array],
) -> tuple[list[Unit], list[Any], tuple[reparam.FusedLayer, ...], dict[str, str]]:
    """Fuse the units.

    Args:
      name: of the public function, for errors.
      units: what can be fused.
      kept: {path: reason} of what can not.
      where: the caller's choice among the units.
      inputs: {path: input of the layer}; others are compared on a random one.

    Returns:
      (units, the plain layers, how each compares with its unit, `kept` and what turned out not to fuse).
    """
    kept, rows = dict(kept), []
    units = chosen(name, units, kept, where)
    ready, plain = [], []
    for one in units:
        try:
            layer, row = one.fused(inputs[one.layer] if one.layer in inputs else one.probe())
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


def staying(units: Sequence[Unit], kept: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
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
                raise ValueError(f"{path!r} normalizes axis {norm.axis}, not the channels")
            conv = flow.source(path, convs)
            if conv in unknown:
                raise ValueError(unknown[conv])
            Unit(conv, convs[conv], norm, path).check_kind()
            behind[conv] = path
        except ValueError as error:
            kept[path] = str(error)
    pairs = [Unit(conv, convs[conv], norms[path], path) for conv, path in behind.items()]
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
    name: str, units: Sequence[Unit], kept: Mapping[str, str], where: Where | None
) -> list[Unit]:
    """The units to fuse, each ready for it."""
    if where is not None:
        units = [
            one for one in units if where(one.layer) or (one.norm_layer and where(one.norm_layer))
        ]
    why = _reasons(kept)
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


def _reasons(kept: Mapping[str, str]) -> str:
    return "; ".join(f"{path}: {reason}" for path, reason in kept.items())


def _changes(conv: Any) -> bool:
    """Whether a convolution is more than a plain one."""
    return isinstance(conv, WSConv | Branched) or isinstance(
        getattr(conv, "conv_general_dilated", None), weightstd.Hook
    )
