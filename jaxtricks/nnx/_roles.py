"""What each axis of a model's parameters means, from the types of its own layers."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flax import nnx

from jaxtricks import _integers
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Roles
from jaxtricks.nnx import _compat
from jaxtricks.nnx._branches import Branch, First
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx._heads import (
    CausalHead,
    CosineHead,
    DisAlignHead,
    LWSHead,
    NormedHead,
)
from jaxtricks.nnx._norm import ExtendedBatchNorm

NONE: Roles = ("none",)

Axis = tuple[str, int | None]
"""Role and size of one axis of a layer's own parameter; None where the layer does not keep the size."""


@checked
def roles(model: nnx.Module) -> roles_lib.Exact:
    """A rule for `roles=` (memopt, agc) that is exact for the layers of flax.nnx and of this library.

    Layers that nnx.vmap has stacked have more axes than their own sizes explain: those
    are "batch", wherever they are. Where the sizes fit more than one place (four layers
    of 4 by 4), the names of a partitioned variable decide (`transform_metadata` names
    the stacked axis); without them it is the first place that fits, since nnx.vmap
    stacks along axis 0 unless told otherwise, and `roles.describe` marks the leaf.

    Args:
      model: any module; its parameters may be abstract (`nnx.eval_shape`).

    Returns:
      (path, shape) -> roles, for the paths of `nnx.to_pure_dict(nnx.state(model,
      nnx.Param))` and of the nnx.State itself; a shape with more axes than the model's
      parameter has them in front. None for parameters that belong to no known layer:
      your own nnx.Param, and those of `nnx.bridge.ToNNX` (below whose path
      `jt.linen.roles` of the linen module applies).

    Example:
      >>> rule = roles(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> rule("kernel", (3, 4)), rule("kernel", (7, 3, 4)), rule("bias", (4,))
      (('in', 'out'), ('batch', 'in', 'out'), ('none',))
    """
    possible = {path: (found, names) for path, found, names in _possible(model)}
    stacked = _stack_names(possible.values())
    known = {
        path: _named(found, names, stacked) for path, (found, names) in possible.items()
    }
    assumed = [path for path, found in known.items() if len(found) > 1]
    return roles_lib.exact({path: found[0] for path, found in known.items()}, assumed)


def _possible(
    model: nnx.Module,
) -> Iterator[tuple[str, list[Roles], tuple[Any, ...] | None]]:
    """(path, roles that fit the sizes, partition names) of every parameter of a known layer."""
    owners, seen = _compat.variable_paths(model), set()
    for _, module in _compat.modules(model):
        layer = {}
        for name, own in layer_axes(module).items():
            variable = _member(module, name)
            if isinstance(variable, nnx.Variable) and id(variable) not in seen:
                seen.add(id(variable))
                if found := placements(own, variable.shape) or _by_rank(
                    own, variable.shape
                ):
                    layer[name] = variable, found
        for variable, found in _made_together(layer.values()):
            path = "/".join(map(str, owners[id(variable)]))
            yield path, found, _compat.partition_names(variable)


def _member(module: Any, name: str) -> Any:
    """The variable of a module, or, for "attribute/key", of a dictionary that it holds; None if absent."""
    attribute, _, key = name.partition("/")
    member = getattr(module, attribute, None)
    return {str(k): v for k, v in member.items()}.get(key) if key and member else member


def _made_together(
    layer: Iterable[tuple[Any, list[Roles]]],
) -> list[tuple[Any, list[Roles]]]:
    """Of the ways to see a layer's parameters, those that see the same number of copies in all."""

    def copies(variable: Any, roles: Roles) -> tuple[int, ...]:
        return tuple(
            n for n, role in zip(variable.shape, roles, strict=True) if role == "batch"
        )

    layer = list(layer)
    common = [{copies(v, roles) for roles in found} for v, found in layer]
    common = set.intersection(*common) if common else set()
    return [
        (v, [r for r in found if copies(v, r) in common] or found) for v, found in layer
    ]


def placements(own: Sequence[Axis], shape: Sequence[int]) -> list[Roles]:
    """Every way to see `shape` as a layer's own axes and "batch" axes among them, leading ones first."""
    rank, found = len(shape), {}
    for new in itertools.combinations(range(rank), max(rank - len(own), 0)):
        rest = [n for i, n in enumerate(shape) if i not in new]
        if len(rest) == len(own) and all(
            size in (None, n) for (_, size), n in zip(own, rest, strict=True)
        ):
            words = iter(role for role, _ in own)
            found[tuple("batch" if i in new else next(words) for i in range(rank))] = (
                None
            )
    return list(found)


def _by_rank(own: Sequence[Axis], shape: Sequence[int]) -> list[Roles]:
    """Roles of a parameter that was replaced by one of other sizes but of the same rank."""
    return [tuple(role for role, _ in own)] if len(own) == len(shape) else []


def _stack_names(possible: Iterable[tuple[list[Roles], Any]]) -> set[Any]:
    """Partition names that stand for a stacked axis wherever the sizes leave no doubt."""
    names = {"batch": set(), "other": set()}
    for found, partition in possible:
        if partition and len(found) == 1:
            for name, role in zip(partition, found[0], strict=False):
                names["batch" if role == "batch" else "other"].add(name)
    return names["batch"] - names["other"] - {None}


def _named(
    found: list[Roles], names: tuple[Any, ...] | None, stacked: set[Any]
) -> list[Roles]:
    """Of several ways to see a shape, those that the names of its axes allow; all if they allow none."""
    if len(found) == 1 or not names or len(names) != len(found[0]):
        return found
    wanted = [name in stacked for name in names]
    return [r for r in found if [role == "batch" for role in r] == wanted] or found


def layer_axes(module: nnx.Module) -> dict[str, tuple[Axis, ...]]:
    """{attribute: axes} of one layer's own parameters; empty for an unknown type."""
    for kind, rule in LAYERS.items():
        if isinstance(module, kind):
            return rule(module)
    return {}


def _axes(role: str, *sizes: int | None) -> tuple[Axis, ...]:
    return tuple((role, size) for size in sizes)


def _matrix(ins: int | None, outs: int | None) -> tuple[Axis, ...]:
    return (*_axes("in", ins), *_axes("out", outs))


def _linear(module: Any) -> dict[str, tuple[Axis, ...]]:
    kernel = _matrix(module.in_features, module.out_features)
    return {"kernel": kernel, "bias": _axes("none", module.out_features)}


def _conv(module: Any) -> dict[str, tuple[Axis, ...]]:
    per_channel = _axes("none", module.out_features)
    last = _matrix(
        module.in_features // module.feature_group_count, module.out_features
    )
    kernel = (*_axes("in", *module.kernel_size), *last)
    return {"kernel": kernel, "bias": per_channel, "gain": per_channel}


def _conv_transpose(module: Any) -> dict[str, tuple[Axis, ...]]:
    last = _matrix(module.in_features, module.out_features)
    last = last[::-1] if module.transpose_kernel else last
    kernel = (*_axes("in", *module.kernel_size), *last)
    return {"kernel": kernel, "bias": _axes("none", module.out_features)}


def _linear_general(module: Any) -> dict[str, tuple[Axis, ...]]:
    batch = _axes("batch", *module.batch_axis.values())
    ins, outs = _axes("in", *module.in_features), _axes("out", *module.out_features)
    return {
        "kernel": batch + ins + outs,
        "bias": batch + _axes("none", *module.out_features),
    }


def _einsum(module: Any) -> dict[str, tuple[Axis, ...]]:
    shapes = {"kernel": module.kernel_shape, "bias": module.bias_shape or ()}
    words = einsum_roles(module.einsum_str, *map(len, shapes.values()))
    return {name: tuple(zip(r, shapes[name], strict=True)) for name, r in words.items()}


def einsum_roles(equation: str | None, rank: int, bias_rank: int) -> dict[str, Roles]:
    """Roles of an einsum layer's kernel, its second operand, and of its bias.

    An axis of the kernel that only the output has is "out", one that both input and
    output have is "batch" (experts), any other "in". A kernel that is neither summed
    nor widens anything is a scale like that of a norm: all "none". Nothing is said of a
    kernel whose equation is no help (None, because it is given at the call, or an
    ellipsis in the kernel).
    """
    match = re.fullmatch(
        r"([^,]+),([a-zA-Z]+)->(.*)", (equation or "").replace(" ", "")
    )
    if match is None or len(match[2]) != rank:
        return {"bias": NONE * bias_rank}
    inputs, kernel, outputs = match.groups()
    words = {letter: _einsum_role(letter, inputs, outputs) for letter in kernel}
    if set(words.values()) == {"batch"}:
        return {"kernel": NONE * rank, "bias": NONE * bias_rank}
    # Flax gives the bias the axes that kernel and output share, in the order of the
    # output.
    bias = [words[letter] for letter in outputs if letter in words]
    bias = tuple("batch" if role == "batch" else "none" for role in bias)
    return {
        "kernel": tuple(words[letter] for letter in kernel),
        "bias": bias if len(bias) == bias_rank else NONE * bias_rank,
    }


def _einsum_role(letter: str, inputs: str, outputs: str) -> str:
    if letter not in outputs:
        return "in"
    return "batch" if letter in inputs else "out"


def _norm(module: Any) -> dict[str, tuple[Axis, ...]]:
    per_channel = _axes("none", module.num_features)
    return {"scale": per_channel, "bias": per_channel}


def _group_norm(module: Any) -> dict[str, tuple[Axis, ...]]:
    per_channel = _axes("none", module.num_groups * module.group_size)
    return {"scale": per_channel, "bias": per_channel}


def _embed(module: Any) -> dict[str, tuple[Axis, ...]]:
    return {"embedding": _matrix(module.num_embeddings, module.features)}


def _lora(module: Any) -> dict[str, tuple[Axis, ...]]:
    # The layer does not keep its rank.
    return {
        "lora_a": _matrix(module.in_features, None),
        "lora_b": _matrix(None, module.out_features),
    }


def _gain(module: Any) -> dict[str, tuple[Axis, ...]]:
    return {"gain": _axes("none", module.features)}


def _head(module: Any) -> dict[str, tuple[Axis, ...]]:
    per_class = _axes("none", module.out_features)
    return {
        "kernel": _matrix(module.in_features, module.out_features),
        "confidence_kernel": _matrix(module.in_features, 1),
        "confidence_bias": _axes("none", 1),
        **dict.fromkeys(("bias", "scale", "logit_scale", "logit_bias"), per_class),
    }


def _weight_norm(module: Any) -> dict[str, tuple[Axis, ...]]:
    feature_axes = module.feature_axes
    count = 1 if _integers.is_integer(feature_axes) else len(feature_axes or ())
    scales = getattr(module, "scales", None) or {}
    return {f"scales/{path}": (("none", None),) * count for path in scales}


def _prelu(module: Any) -> dict[str, tuple[Axis, ...]]:
    return {"negative_slope": ()}


LAYERS: dict[type, Callable[[Any], dict[str, tuple[Axis, ...]]]] = {
    nnx.Linear: _linear,
    nnx.Conv: _conv,
    WSConv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
    nnx.LoRA: _lora,
    nnx.GroupNorm: _group_norm,
    **dict.fromkeys(_compat.NORMS, _norm),
    ExtendedBatchNorm: _norm,
    **dict.fromkeys((CausalHead, CosineHead, DisAlignHead, LWSHead, NormedHead), _head),
    Branch: _gain,
    First: _gain,
    **dict.fromkeys(_compat.PRELU, _prelu),
    **dict.fromkeys(_compat.WEIGHT_NORM, _weight_norm),
}
