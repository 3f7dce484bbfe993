"""Every difference between the jax versions we support, in one place (tests/test_compat.py).

Names that moved, primitives that were renamed, and where an equation holds its bodies
and counts. Versions are never compared: what differs is looked for.
"""

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.extend import core

NEWEST_TESTED = "0.12.0.1"
"""The newest jax that the suite was run on."""


def enable_x64() -> contextlib.AbstractContextManager[Any]:
    """A context in which float64 exists: a public name of jax since 0.8, an experimental one before."""
    home: Any = (
        jax
        if hasattr(jax, "enable_x64")
        else importlib.import_module("jax.experimental")
    )
    return home.enable_x64(True)


def varying(x: Any) -> frozenset[str]:
    """Axes of shard_map over which x differs; two names of it in two years."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


# One spelling for primitives that have or had several. Names in capitals are classes of
# the primitive `call_hi_primitive`, which jax_remat3, jax_custom_jvp3, jax_custom_vjp3
# and jax_scan3 write.
_SPELLING = MappingProxyType(
    {
        "pjit": "jit",
        "closed_call": "call",
        "core_call": "call",
        "eval_jaxpr": "call",  # since 0.11.1
        "remat": "checkpoint",
        "remat2": "checkpoint",
        "RematTraced": "checkpoint",
        "CheckpointName": "name",
        "CustomJVPTraced": "custom_jvp_call",
        "CustomVJPTraced": "custom_vjp_call",
        "custom_vjp_call_jaxpr": "custom_vjp_call",
        "Scan3": "scan3",  # its carry is a Ref: not a scan to anything that reads scans
        "psum2": "psum",
        "psum_invariant": "psum",
        "psum_invariant_p": "psum",
        "copy_p": "copy",
        "random_clone": "random_wrap",
    }
)


def primitive(eqn: Any) -> str:
    """Name of an equation's primitive, spelled alike on all versions."""
    name = type(eqn.params["_prim"]).__name__ if is_high(eqn) else eqn.primitive.name
    return _SPELLING.get(name, name)


def is_high(eqn: Any) -> bool:
    """Whether an equation is an object with rules of its own, rather than a primitive."""
    return eqn.primitive.name == "call_hi_primitive"


def params(eqn: Any) -> Mapping[str, Any]:
    """Parameters of an equation; those of a `call_hi_primitive` lie one level down."""
    return eqn.params["_prim"].params if is_high(eqn) else eqn.params


# Where an equation keeps what runs when it runs; what differentiates it lies elsewhere.
_BODY_KEYS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "traced")
WITH_BODIES = frozenset(
    ("jit", "call", "checkpoint", "custom_jvp_call", "custom_vjp_call", "shard_map")
    + ("scan", "cond", "while")
)


def has_bodies(eqn: Any) -> bool:
    """Whether `bodies` knows the equation."""
    return primitive(eqn) in WITH_BODIES


def body_keys(eqn: Any) -> tuple[str, ...]:
    """The parameters that hold the bodies of an equation."""
    name, there = primitive(eqn), params(eqn)
    if name == "cond":
        keys: Sequence[str] = ("branches",)
    elif name == "while":
        keys = ("cond_jaxpr", "body_jaxpr")
    else:
        keys = [key for key in _BODY_KEYS if key in there][:1]
    if not keys or not all(key in there for key in keys):
        raise _unknown_layout(eqn)
    return tuple(keys)


def bodies(eqn: Any) -> list[core.ClosedJaxpr]:
    """The jaxprs that run when the equation does: branches of cond, (condition, body) of while, else one."""
    there = params(eqn)
    values = [there[key] for key in body_keys(eqn)]
    return [
        closed(body) for body in (values[0] if primitive(eqn) == "cond" else values)
    ]


def with_bodies(eqn: Any, new: Sequence[core.ClosedJaxpr]) -> dict[str, Any]:
    """Parameters of the equation with other bodies, in the form it holds them in."""
    there, keys = dict(params(eqn)), body_keys(eqn)
    if primitive(eqn) == "cond":
        return {**there, keys[0]: tuple(new)}
    return there | {
        key: _like(there[key], body) for key, body in zip(keys, new, strict=True)
    }


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """A parameter that is a jaxpr, with its constants: since 0.11 one class of jaxprs is for both.

    jax_custom_jvp3 and jax_custom_vjp3 hold the traced function around it.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, jax.stages.Traced) else jaxpr
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def is_jaxpr(value: Any) -> bool:
    """Whether `closed` takes a parameter."""
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr | jax.stages.Traced)


def _like(old: Any, new: core.ClosedJaxpr) -> Any:
    return new if isinstance(old, core.ClosedJaxpr) else new.jaxpr


class ScanParts(NamedTuple):
    """How the operands and results of a scan divide.

    Attributes:
      consts: number of operands that every step reads whole.
      carry: number of carries; the operands after them are scanned over.
      length: number of steps.
      reverse: whether the last step runs first.
    """

    consts: int
    carry: int
    length: int
    reverse: bool


def scan_parts(eqn: Any) -> ScanParts:
    """The parts of a scan: counts before jax 0.11, trees of its operands since."""
    there = params(eqn)
    try:
        if "ft_in" in there:
            consts, carry, _ = there["ft_in"].unpack()
            counts = len(consts), len(carry)
        else:
            counts = there["num_consts"], there["num_carry"]
        return ScanParts(*counts, there["length"], there["reverse"])
    except KeyError as error:
        raise _unknown_layout(eqn) from error


def scan_outputs(eqn: Any, used: Sequence[bool], body: core.ClosedJaxpr) -> Any:
    """The scan without the stacked results that are not used, and with the body that lacks them."""
    there = with_bodies(eqn, [body])
    if "ft_out" in there:
        there["ft_out"] = there["ft_out"].filter_with_mask(list(used))
    outs = [v for v, keep in zip(eqn.outvars, used, strict=True) if keep]
    return eqn.replace(outvars=outs, params=there)


def while_consts(eqn: Any) -> tuple[int, int]:
    """Numbers of operands that the condition and the body of a while loop read; the carry follows."""
    there = params(eqn)
    try:
        return there["cond_nconsts"], there["body_nconsts"]
    except KeyError as error:
        raise _unknown_layout(eqn) from error


def shard_map_arguments(eqn: Any) -> dict[str, Any]:
    """What jax.shard_map was called with."""
    there = params(eqn)
    axes = there.get("manual_axes", there.get("newly_manual_axes", ()))
    try:
        return dict(
            mesh=there["mesh"],
            in_specs=there["in_specs"],
            out_specs=list(there["out_specs"]),
            axis_names=set(axes),
            check_vma=there["check_vma"],
        )
    except KeyError as error:
        raise _unknown_layout(eqn) from error


def _unknown_layout(eqn: Any) -> NotImplementedError:
    return NotImplementedError(
        f"jaxtricks does not know how jax {jax.__version__} writes a {primitive(eqn)!r} equation (the newest "
        f"version tested is {NEWEST_TESTED}): install that one, or a newer jaxtricks"
    )
