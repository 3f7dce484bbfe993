"""Say what each axis of a layer's parameters means, from the layer's attributes.

The layers of flax.nnx are known by the names of their classes, so that no framework is
imported here.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxtricks import _integers
from jaxtricks._typing import Roles

NONE: Roles = ("none",)

Axis = tuple[str, int | None]
"""Role and size of an axis of a layer's parameter; None if the layer does not store it."""

LayerAxes = dict[str, tuple[Axis, ...]]
"""{name of a parameter: role and size of each of its axes}."""


def placements(layer_axes: Sequence[Axis], shape: Sequence[int]) -> list[Roles]:
    """Return every way to place the axes of a layer in a shape, the rest being "batch".

    Args:
      layer_axes: role and size of each axis of the parameter of one layer.
      shape: of the parameter, which has more axes if layers are stacked.

    Returns:
      The roles of every axis of `shape`; leading stacked axes come first.
    """
    rank = len(shape)
    matches: dict[Roles, None] = {}  # ordered, without duplicates
    stacked_count = max(rank - len(layer_axes), 0)
    for stacked in itertools.combinations(range(rank), stacked_count):
        # What the layer would have if these were the axes of the stack.
        sizes = [n for i, n in enumerate(shape) if i not in stacked]
        if not _fits(layer_axes, sizes):
            continue
        remaining = iter(layer_axes)
        roles = []
        for i in range(rank):
            if i in stacked:
                roles.append("batch")
            else:
                role, _ = next(remaining)
                roles.append(role)
        matches[tuple(roles)] = None
    return list(matches)


def _fits(layer_axes: Sequence[Axis], sizes: Sequence[int]) -> bool:
    if len(layer_axes) != len(sizes):
        return False
    for (_, expected), size in zip(layer_axes, sizes, strict=True):
        if expected is not None and expected != size:
            return False
    return True


def einsum_roles(
    equation: str | None, rank: int, bias_rank: int
) -> dict[str, Roles]:
    """Return the roles of an einsum layer's kernel, its second operand, and of its bias.

    An axis of the kernel that only the output has is "out", one that both input and
    output have is "batch" (experts), any other "in". A kernel that is neither summed
    nor widens anything is a scale like that of a norm: all "none". Without an equation
    that names every axis of the kernel, only the bias has roles.
    """
    equation = (equation or "").replace(" ", "")
    match = re.fullmatch(r"([^,]+),([a-zA-Z]+)->(.*)", equation)
    if match is None or len(match[2]) != rank:
        return {"bias": NONE * bias_rank}
    inputs, kernel, outputs = match.groups()
    role_of = {
        letter: _einsum_role(letter, inputs, outputs) for letter in kernel
    }
    if set(role_of.values()) == {"batch"}:
        return {"kernel": NONE * rank, "bias": NONE * bias_rank}
    # Flax gives the bias the axes that kernel and output share, in the output's order.
    bias = []
    for letter in outputs:
        if letter in role_of:
            bias.append("batch" if role_of[letter] == "batch" else "none")
    if len(bias) != bias_rank:
        bias = NONE * bias_rank
    return {
        "kernel": tuple(role_of[letter] for letter in kernel),
        "bias": tuple(bias),
    }


def _einsum_role(letter: str, inputs: str, outputs: str) -> str:
    if letter not in outputs:
        return "in"
    return "batch" if letter in inputs else "out"


# Layers of flax.nnx and jaxtricks.nnx.


def layer_axes(module: Any) -> LayerAxes:
    """Return {attribute: axes} of the parameters of one layer; empty for unknown types."""
    for cls in type(module).__mro__:
        is_library_type = cls.__module__.startswith(
            ("flax.nnx.", "jaxtricks.nnx.")
        )
        if is_library_type and cls.__name__ in _RULES:
            return _RULES[cls.__name__](module)
    return {}


def named_parameter(module: Any, name: str) -> Any:
    """Return a variable of a module, or None; "attribute/key" is one in a dictionary."""
    attribute, _, key = name.partition("/")
    member = getattr(module, attribute, None)
    if not key or not member:
        return member
    for other_key, variable in member.items():
        if str(other_key) == key:
            return variable
    return None


def _axes(role: str, *sizes: int | None) -> tuple[Axis, ...]:
    return tuple((role, size) for size in sizes)


def _matrix(ins: int | None, outs: int | None) -> tuple[Axis, ...]:
    return (*_axes("in", ins), *_axes("out", outs))


def _linear(module: Any) -> LayerAxes:
    kernel = _matrix(module.in_features, module.out_features)
    return {"kernel": kernel, "bias": _axes("none", module.out_features)}


def _conv(module: Any) -> LayerAxes:
    per_channel = _axes("none", module.out_features)
    ins = module.in_features // module.feature_group_count
    spatial = _axes("in", *module.kernel_size)
    matrix = _matrix(ins, module.out_features)
    return {
        "kernel": spatial + matrix,
        "bias": per_channel,
        "gain": per_channel,  # of WSConv
    }


def _conv_transpose(module: Any) -> LayerAxes:
    spatial = _axes("in", *module.kernel_size)
    matrix = _matrix(module.in_features, module.out_features)
    if module.transpose_kernel:
        matrix = matrix[::-1]
    bias = _axes("none", module.out_features)
    return {"kernel": spatial + matrix, "bias": bias}


def _linear_general(module: Any) -> LayerAxes:
    batch = _axes("batch", *module.batch_axis.values())
    ins = _axes("in", *module.in_features)
    outs = _axes("out", *module.out_features)
    bias = _axes("none", *module.out_features)
    return {
        "kernel": batch + ins + outs,
        "bias": batch + bias,
    }


def _einsum(module: Any) -> LayerAxes:
    shapes = {"kernel": module.kernel_shape, "bias": module.bias_shape or ()}
    ranks = map(len, shapes.values())
    roles_of = einsum_roles(module.einsum_str, *ranks)
    return {
        name: tuple(zip(roles, shapes[name], strict=True))
        for name, roles in roles_of.items()
    }


def _norm(module: Any) -> LayerAxes:
    per_channel = _axes("none", module.num_features)
    return {"scale": per_channel, "bias": per_channel}


def _group_norm(module: Any) -> LayerAxes:
    per_channel = _axes("none", module.num_groups * module.group_size)
    return {"scale": per_channel, "bias": per_channel}


def _embed(module: Any) -> LayerAxes:
    return {"embedding": _matrix(module.num_embeddings, module.features)}


def _lora(module: Any) -> LayerAxes:
    # The layer does not store its rank.
    return {
        "lora_a": _matrix(module.in_features, None),
        "lora_b": _matrix(None, module.out_features),
    }


def _gain(module: Any) -> LayerAxes:
    return {"gain": _axes("none", module.features)}


def _head(module: Any) -> LayerAxes:
    per_class = _axes("none", module.out_features)
    return {
        "kernel": _matrix(module.in_features, module.out_features),
        "confidence_kernel": _matrix(module.in_features, 1),
        "confidence_bias": _axes("none", 1),
        **dict.fromkeys(
            ("bias", "scale", "logit_scale", "logit_bias"), per_class
        ),
    }


def _weight_norm(module: Any) -> LayerAxes:
    axes = module.feature_axes
    rank = 1 if _integers.is_integer(axes) else len(axes or ())
    scale_axes = (("none", None),) * rank
    # They are in a dictionary, by the path of what they scale.
    paths = getattr(module, "scales", None) or {}
    return {f"scales/{path}": scale_axes for path in paths}


def _prelu(module: Any) -> LayerAxes:
    return {"negative_slope": ()}


_HEADS = ("CausalHead", "CosineHead", "DisAlignHead", "LWSHead", "NormedHead")
_NORMS = (
    "BatchNorm",
    "LayerNorm",
    "RMSNorm",
    "InstanceNorm",
    "ExtendedBatchNorm",
)

_RULES: dict[str, Callable[[Any], LayerAxes]] = {
    "Linear": _linear,
    "Conv": _conv,
    "WSConv": _conv,
    "ConvTranspose": _conv_transpose,
    "LinearGeneral": _linear_general,
    "Einsum": _einsum,
    "Embed": _embed,
    "LoRA": _lora,
    "GroupNorm": _group_norm,
    "ConvNorm": _gain,
    "PointwiseNorm": _gain,
    "PReLU": _prelu,
    "WeightNorm": _weight_norm,
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_HEADS, _head),
}
"""{class of flax.nnx or jaxtricks.nnx: its axes}."""
