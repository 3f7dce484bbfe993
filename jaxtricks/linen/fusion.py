"""`jt.nnx.fuse` for linen: layers are found where the module calls them, and compared by their nnx twins."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
from flax import linen as nn

from jaxtricks import reparam
from jaxtricks.linen.fused import Fused, Original, layer_path
from jaxtricks.linen.pure import eval_kwargs
from jaxtricks.linen.twins import BLOCKS, KINDS, NORMS, twin
from jaxtricks.nnx import fusion
from jaxtricks.nnx.probe import Probed, Watch, traced, whole_model
from jaxtricks.nnx.surgery import below
from jaxtricks.nnx.unit import Unit, count

# What `Fused` passes on, and the attribute of nnx.Conv that holds it.
_GEOMETRY = {
    "strides": "strides",
    "padding": "padding",
    "dilation": "kernel_dilation",
    "groups": "feature_group_count",
    "dtype": "dtype",
}


def fuse(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    example: Any = None,
    where: Callable[[str], bool] | None = None,
) -> tuple[nn.Module, dict[str, Any], reparam.FuseReport]:
    """The module and its variables for inference, and the proof that they compute the same function.

    See `jt.nnx.fuse`. The variables returned are those of a network of plain convolutions, under the paths of
    the layers they stand for: {"kernel", "bias"}, and no statistics of what was folded.

    Args:
      module: any linen module.
      variables: its variables, with running statistics.
      example: an input of the module, or a tuple of them; needed, since a linen module makes its layers while
        it is called.
      where: where(path) -> True for what to fuse; None = everything that can be.

    Returns:
      (module, variables, report): fused.apply(variables, x) takes the arguments of the original's call.

    Raises:
      ValueError: as `jt.nnx.fuse`, and for a missing example.

    Example:
      >>> import jax.numpy as jnp, jaxtricks as jt
      >>> conv, x = jt.linen.WSConv(None, 4, (3, 3)), jnp.ones((1, 6, 6, 3))
      >>> variables = conv.init(jax.random.key(0), x)
      >>> plain, params, report = fuse(conv, variables, example=x)
      >>> sorted(params["params"]), report.layers[0].ratio < 1, plain.apply(params, x).shape
      (['bias', 'kernel'], True, (1, 6, 6, 4))

    References:
      Ding, Zhang, Ma, Han, Ding, Sun, "RepVGG", arXiv 2101.03697, section 3.
    """
    if example is None:
        raise ValueError(
            "linen.fuse: `example` is missing: a linen module makes its layers while it is called; pass an "
            "input"
        )
    flags = eval_kwargs(module)

    def run(watch: Watch, *inputs: Any) -> Any:
        with nn.intercept_methods(functools.partial(_watched, watch)):
            # Mutable, so that training mode is met by our sentence, not by flax's.
            return module.apply(variables, *inputs, **flags, mutable=True)[0]

    probed = Probed(run, example)
    convs, norms = _layers(probed.example, module, variables, flags)
    units, kept = fusion.paired(convs, norms, probed.flow())
    units = fusion.chosen("linen.fuse", units, kept, where)
    plain, rows = fusion.merged(units, probed.inputs())
    fused, smaller = _exchanged(module, variables, units, plain)
    call = functools.partial(fused.apply, smaller, **flags)
    whole = whole_model(probed, call, units, rows, (_count(variables), _count(smaller)))
    return fused, smaller, reparam.FuseReport(rows, whole, fusion.staying(units, kept))


def _watched(watch: Watch, call: Any, inputs: Any, flags: Any, context: Any) -> Any:
    path = layer_path(context.module)
    if context.method_name != "__call__" or not isinstance(context.module, tuple(KINDS)):
        return call(*inputs, **flags)
    x, *rest = inputs
    return watch(call(watch(x, "in", path), *rest, **flags), "out", path)


def _layers(
    example: tuple[Any, ...], module: nn.Module, variables: Any, flags: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Twins by path: (convolutions and blocks, normalizations); those inside blocks are left out."""
    called: dict[str, nn.Module] = {}
    trains: set[str] = set()

    def note(call: Any, inputs: Any, given: Any, context: Any) -> Any:
        layer, path = context.module, layer_path(context.module)
        if context.method_name == "__call__" and isinstance(layer, tuple(KINDS)):
            called.setdefault(path, layer)
            if isinstance(layer, tuple(NORMS)) and not _evaluates(layer, *inputs[1:], **given):
                trains.add(path)
        return call(*inputs, **given)

    with nn.intercept_methods(note):
        traced(lambda *inputs: module.apply(variables, *inputs, **flags, mutable=True)[0], example)
    blocks = [path for path, layer in called.items() if isinstance(layer, tuple(BLOCKS))]
    convs, norms = {}, {}
    for path, layer in called.items():
        if any(path != block and path.startswith(below(block)) for block in blocks):
            continue
        evaluates = not any(p == path or p.startswith(below(path)) for p in trains)
        try:
            made = twin(layer, _at(variables, path), evaluates=evaluates)
        except ValueError:
            continue  # no plain convolution can stand for it; what it feeds says so
        (norms if isinstance(layer, tuple(NORMS)) else convs)[path] = made
    return convs, norms


def _evaluates(norm: Any, use_running_average: bool | None = None, **_: Any) -> bool:
    given = norm.use_running_average if use_running_average is None else use_running_average
    return given is True


def _at(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The variables of one layer."""
    found = {}
    for collection in ("params", "batch_stats"):
        tree = variables.get(collection, {})
        for name in filter(None, path.split("/")):
            tree = tree.get(name, {})
        found[collection] = nn.meta.unbox(flax.core.unfreeze(tree))
    return found


def _exchanged(
    module: nn.Module, variables: Any, units: Sequence[Unit], plain: Sequence[Any]
) -> tuple[Fused, dict[str, Any]]:
    """The module with the plain convolutions in place of the units, and its variables."""
    smaller = jax.tree.map(lambda x: x, flax.core.unfreeze(variables))
    convs = []
    for one, conv in zip(units, plain, strict=True):
        how = {name: getattr(conv, attribute) for name, attribute in _GEOMETRY.items()}
        how |= {name: how[name] or 1 for name in ("strides", "dilation")}  # None is flax's one
        convs.append((one.layer, tuple(how.items())))
        _drop(smaller, one.layer)
        if one.norm_layer is not None:
            _drop(smaller, one.norm_layer)
        params = {"kernel": conv.kernel[...], "bias": conv.bias[...]}
        _put(smaller["params"], one.layer, params)
    folded = tuple(one.norm_layer for one in units if one.norm_layer is not None)
    smaller = {name: tree for name, tree in smaller.items() if jax.tree.leaves(tree)}
    return Fused(Original(module), tuple(convs), folded), smaller


def _drop(variables: dict[str, Any], path: str) -> None:
    for name in ("params", "batch_stats"):
        if path:
            _put(variables.get(name, {}), path, None)
        elif name in variables:
            variables[name] = {}


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set (None: remove) what lies at the path; the root itself is filled."""
    if not path:
        tree.update(value)
        return
    *above, last = path.split("/")
    for name in above:
        tree = tree.setdefault(name, {})
    tree.pop(last, None)
    if value is not None:
        tree[last] = value


def _count(variables: Any) -> int:
    """Number of parameters and running statistics."""
    known = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    return count(known)
