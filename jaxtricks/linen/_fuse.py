"""The nnx layer that computes what a linen layer does, with the same variables."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxtricks.nnx as jnnx
from jaxtricks import _tree, reparam
from jaxtricks._arguments import checked
from jaxtricks.linen import _blocks, _layers
from jaxtricks.linen._functional import (
    Fused,
    Original,
    evaluated,
    in_mode,
    layer_path,
    layer_trains,
    original,
)
from jaxtricks.nnx import _fuse, _overrides
from jaxtricks.nnx._branches import unpacked
from jaxtricks.nnx._flags import call_flags
from jaxtricks.nnx._fuse import (
    Probed,
    Unit,
    Watch,
    altered_reason,
    as_inputs,
    count,
    is_altered,
    traced,
    whole_model,
    with_input,
)
from jaxtricks.nnx._module_tree import below

BLOCKS: dict[type, Any] = {
    _blocks.ACBlock: jnnx.ACBlock,
    _blocks.RepVGGBlock: jnnx.RepVGGBlock,
    _blocks.DiverseBranchBlock: jnnx.DiverseBranchBlock,
}
CONVS: dict[type, Any] = {nn.Conv: nnx.Conv, _layers.WSConv: jnnx.WSConv}
AFFINE: dict[type, Any] = {
    nn.Dense: nnx.Linear,
    nn.DenseGeneral: nnx.LinearGeneral,
    nn.Einsum: nnx.Einsum,
    nn.ConvTranspose: nnx.ConvTranspose,
}
NORMS: dict[type, Any] = {
    nn.BatchNorm: nnx.BatchNorm,
    _layers.ExtendedBatchNorm: jnnx.ExtendedBatchNorm,
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
      ValueError: stacked variables (nn.scan, nn.vmap), a subclass that computes
        something else, or a block whose parts have no twin.
    """
    kind = _overrides.kind_of(module, tuple(KINDS))
    _overrides.check(module, kind, ("_branches",) if kind in BLOCKS else ())
    fields = {
        n: value
        for n in _FIELDS.split()
        if (value := getattr(module, n, None)) is not None
    }
    kernel = variables["params"].get("kernel")
    sizes: tuple[Any, ...] = ()
    if kind in NORMS:
        sizes = variables["batch_stats"]["mean"].shape[-1:]
    elif kind in AFFINE:
        fields |= _affine_sizes(module, kernel.shape)
    else:
        sizes = _sizes(module, variables["params"])
        fields |= {
            n: _factory(getattr(module, n)) for n in ("conv", "norm") if kind in BLOCKS
        }
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
    kernel = (
        params["kernel"] if "kernel" in params else params["square"]["conv"]["kernel"]
    )
    *_, fan_in, out = kernel.shape
    return fan_in * module.feature_group_count, out


def _affine_sizes(module: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of the twin that only the kernel's shape says."""
    if isinstance(module, nn.Einsum):
        if module.einsum_str is None:
            raise ValueError("is given its equation in the call")
        if len(shape) != len(module.shape):
            raise ValueError(_STACKED)
        # The bias has the axes that kernel and output share, in the order of the
        # output.
        _, letters, outputs = (
            module.einsum_str.replace(" ", "").replace("->", ",").split(",")
        )
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


# `jt.nnx.fuse` for linen: layers are found where the module calls them, and compared by
# their nnx twins.


# What `Fused` passes on, and the attribute of nnx.Conv that holds it.
_GEOMETRY = {
    "strides": "strides",
    "padding": "padding",
    "dilation": "kernel_dilation",
    "groups": "feature_group_count",
    "dtype": "dtype",
    "precision": "precision",
    "preferred_element_type": "preferred_element_type",
}


@checked
def fuse(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    example: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    path_filter: Callable[[str], bool] | None = None,
) -> tuple[nn.Module, dict[str, Any], reparam.FuseReport]:
    """The module and its variables for inference, and the proof that they compute the same function.

    See `jt.nnx.fuse`. The variables returned are those of a network of plain layers,
    under the paths of the layers they stand for: {"kernel", "bias"}, and no statistics
    of what was folded.

    Args:
      module: any linen module.
      variables: its variables, with running statistics.
      example: an input of the module, or a tuple of them; needed, since a linen module
        makes its layers while it is called.
      example_kwargs: keyword arguments of the module's call. Flags that neither names
        (`train`, `deterministic`, ...) are set for evaluation, also where they are
        attributes of the module.
      path_filter: path_filter(path) -> True for what to fuse; None = everything that
        can be.

    Returns:
      (module, variables, report): fused.apply(variables, x) takes the arguments of the
      original's call.

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
    module = in_mode(module, False)
    inputs, flags = as_inputs(example), dict(example_kwargs or {})
    flags |= call_flags(type(original(module)), False, inputs, flags)
    run = _Run(module, variables, inputs, flags)
    probed = Probed(run, inputs)
    convs, norms, unknown = _convs_and_norms(run, variables)
    flow, (values, dtypes) = probed.flow(), probed.values()
    units, kept = _fuse.paired(convs, norms, flow, run.altered | unknown)
    units, plain, rows, kept = _fuse.merged(
        "linen.fuse", units, kept, path_filter, values
    )
    fused, smaller = _exchanged(module, variables, units, plain, dtypes)
    call = functools.partial(fused.apply, smaller, **flags)
    whole = whole_model(probed, call, units, rows, (_count(variables), _count(smaller)))
    return fused, smaller, reparam.FuseReport(rows, whole, _fuse.staying(units, kept))


class _Run:
    """run(watch, *inputs) of a module that evaluates; see `Probed`."""

    def __init__(
        self, module: nn.Module, variables: Any, example: Any, kwargs: dict[str, Any]
    ):
        self.module, self.variables = module, variables
        self.example, self.kwargs = example, kwargs
        self.altered: dict[str, str] = {}  # as that of nnx.probe.Spied

    def __call__(self, watch: Watch, *inputs: Any) -> Any:
        """The module's output."""
        return self.intercepted(functools.partial(self._watched, watch), *inputs)

    def _watched(
        self, watch: Watch, call: Any, inputs: Any, kwargs: Any, context: Any
    ) -> Any:
        path = layer_path(context.module)
        stored = _at(self.variables, path)["params"].get("kernel")
        if stored is not None:
            used = nn.meta.unbox(context.module.get_variable("params", "kernel"))
            if is_altered(stored, used):
                self.altered[path] = altered_reason(path)
        inputs, kwargs = with_input(lambda x: watch(x, "in", path), inputs, kwargs)
        return watch(call(*inputs, **kwargs), "out", path)

    def intercepted(self, interceptor: Callable[..., Any], *inputs: Any) -> Any:
        """The output with an interceptor around every method."""

        def run(mutable: list[str]) -> Any:
            return self.module.apply(
                self.variables, *inputs, **self.kwargs, mutable=mutable
            )

        with nn.intercept_methods(functools.partial(_outermost, set(), interceptor)):
            # What is written is met by our sentence on training mode, not by flax's.
            return evaluated(run, self.variables)[0][0]


def _outermost(
    running: set[str],
    interceptor: Any,
    call: Any,
    inputs: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Intercept a layer's `__call__`, not that of its base class, which it may call in turn."""
    path = layer_path(context.module)
    layer = (
        isinstance(context.module, tuple(KINDS)) and context.method_name == "__call__"
    )
    if not layer or path in running:
        return call(*inputs, **kwargs)
    running.add(path)
    try:
        return interceptor(call, inputs, kwargs, context)
    finally:
        running.remove(path)


def _convs_and_norms(
    run: _Run, variables: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Twins by path: (layers and blocks, normalizations), and {path: why a layer has none}.

    A layer without a twin stands for itself; those inside blocks are left out.
    """
    called: dict[str, nn.Module] = {}
    trains: set[str] = set()

    def note(call: Any, inputs: Any, kwargs: Any, context: Any) -> Any:
        layer, path = context.module, layer_path(context.module)
        called.setdefault(path, layer)
        if isinstance(layer, tuple(NORMS)) and layer_trains(layer, inputs, kwargs):
            trains.add(path)
        return call(*inputs, **kwargs)

    traced(functools.partial(run.intercepted, note), run.example)
    blocks = [
        path for path, layer in called.items() if isinstance(layer, tuple(BLOCKS))
    ]
    convs, norms, unknown = {}, {}, {}
    for path, layer in called.items():
        if any(path != block and path.startswith(below(block)) for block in blocks):
            continue
        evaluates = not any(p == path or p.startswith(below(path)) for p in trains)
        try:
            made = twin(layer, _at(variables, path), evaluates=evaluates)
        except ValueError as error:
            made, unknown[path] = layer, f"{path!r} {error}"
        (norms if isinstance(layer, tuple(NORMS)) else convs)[path] = made
    return convs, norms, unknown


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
    module: nn.Module,
    variables: Any,
    units: Sequence[Unit],
    plain: Sequence[Any],
    dtypes: Mapping[str, Any],
) -> tuple[Fused, dict[str, Any]]:
    """The module with the plain layers in place of the units, and its variables."""
    smaller = jax.tree.map(lambda x: x, flax.core.unfreeze(variables))
    convs, biased = [], []
    for one, conv in zip(units, plain, strict=True):
        if isinstance(conv, nnx.Conv):
            convs.append((one.layer, _geometry(conv)))
        else:
            biased.append(one.layer)
        _drop(smaller, one.layer)
        if one.norm_layer is not None:
            _drop(smaller, one.norm_layer)
        params = {"kernel": conv.kernel[...], "bias": conv.bias[...]}
        _put(smaller["params"], one.layer, params)
    folded = tuple(
        (one.norm_layer, str(dtypes[one.norm_layer])) for one in units if one.norm_layer
    )
    smaller = {name: tree for name, tree in smaller.items() if jax.tree.leaves(tree)}
    return Fused(Original(module), tuple(convs), folded, tuple(biased)), smaller


def _geometry(conv: nnx.Conv) -> tuple[tuple[str, Any], ...]:
    how = {
        name: getattr(conv, attribute, None) for name, attribute in _GEOMETRY.items()
    }
    how |= {
        name: how[name] or 1 for name in ("strides", "dilation")
    }  # None is flax's one
    return tuple(how.items())


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
