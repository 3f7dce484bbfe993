"""What each axis of a model's parameters means, from the types of its own layers."""

import re
from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxtricks import axes
from jaxtricks._types import PathRule, Roles
from jaxtricks.nnx import _compat
from jaxtricks.nnx.conv import WSConv
from jaxtricks.nnx.norm import ExtendedBatchNorm

NONE: Roles = ("none",)
_DENSE: Roles = ("in", "out")


def roles(model: nnx.Module) -> PathRule:
    """A rule for `axes=` (memopt, agc) that is exact for the layers of flax.nnx and of this library.

    Args:
      model: any module; its parameters may be abstract (`nnx.eval_shape`). Layers that were stacked by
        nnx.vmap have more axes than their type says: the leading ones are "batch".

    Returns:
      (path, shape) -> roles, for the paths of `nnx.to_pure_dict(nnx.state(model, nnx.Param))` and of the
      nnx.State itself; None for parameters that belong to no known layer.

    Example:
      >>> rule = roles(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> rule("kernel", (3, 4)), rule("kernel", (7, 3, 4)), rule("bias", (4,))
      (('in', 'out'), ('batch', 'in', 'out'), ('none',))
    """
    return axes.exact(table(model))


def table(model: nnx.Module) -> dict[str, Roles]:
    """{path: roles} without the stacked axes."""
    # A variable that two layers share has one path, that of the first: as in nnx.state.
    owners = {id(v): path for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}
    found: dict[str, Roles] = {}
    for _, module in _compat.modules(model):
        for name, layout in layer_roles(module).items():
            variable = getattr(module, name, None)
            if isinstance(variable, nnx.Param):
                found.setdefault("/".join(map(str, owners[id(variable)])), layout)
    return found


def layer_roles(module: nnx.Module) -> dict[str, Roles]:
    """{attribute: roles} of one layer's own parameters; empty for an unknown type."""
    for kind, rule in LAYERS.items():
        if isinstance(module, kind):
            return rule(module)
    return {}


def _linear(module: Any) -> dict[str, Roles]:
    return {"kernel": _DENSE, "bias": NONE}


def _conv(module: Any) -> dict[str, Roles]:
    spatial = ("in",) * len(module.kernel_size)
    return {"kernel": (*spatial, "in", "out"), "bias": NONE, "gain": NONE}


def _conv_transpose(module: Any) -> dict[str, Roles]:
    spatial = ("in",) * len(module.kernel_size)
    last = ("out", "in") if module.transpose_kernel else ("in", "out")
    return {"kernel": (*spatial, *last), "bias": NONE}


def _linear_general(module: Any) -> dict[str, Roles]:
    return general_roles(len(module.batch_axis), len(module.in_features), len(module.out_features))


def general_roles(batch: int, ins: int, outs: int) -> dict[str, Roles]:
    """Roles of a dense layer over several axes."""
    stacked = ("batch",) * batch
    kernel = (*stacked, *("in",) * ins, *("out",) * outs)
    return {"kernel": kernel, "bias": (*stacked, *NONE * outs)}


def _einsum(module: Any) -> dict[str, Roles]:
    kernel = einsum_roles(module.einsum_str, len(module.kernel_shape))
    return {**kernel, "bias": NONE * len(module.bias_shape or ())}


def einsum_roles(equation: str | None, rank: int) -> dict[str, Roles]:
    """Roles of an einsum layer's kernel, its second operand; nothing where the equation is no help."""
    match = re.fullmatch(r"([^,]+),([a-zA-Z]+)->(.+)", (equation or "").replace(" ", ""))
    if match is None or len(match[2]) != rank:
        return {}
    inputs, kernel, outputs = match.groups()
    return {"kernel": tuple(_einsum_role(letter, inputs, outputs) for letter in kernel)}


def _einsum_role(letter: str, inputs: str, outputs: str) -> str:
    if letter not in outputs:
        return "in"
    return "batch" if letter in inputs else "out"


def _norm(module: Any) -> dict[str, Roles]:
    return {"scale": NONE, "bias": NONE}


def _embed(module: Any) -> dict[str, Roles]:
    return {"embedding": _DENSE}


def _lora(module: Any) -> dict[str, Roles]:
    return {"lora_a": _DENSE, "lora_b": _DENSE}


LAYERS: dict[type, Callable[[Any], dict[str, Roles]]] = {
    nnx.Linear: _linear,
    nnx.Conv: _conv,
    WSConv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
    nnx.LoRA: _lora,
    **dict.fromkeys(_compat.NORMS, _norm),
    ExtendedBatchNorm: _norm,
}
