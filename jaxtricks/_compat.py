"""Hide the differences between the jax versions we support, all of them in this file.

Names that moved, primitives that were renamed, and where an equation holds its bodies
and counts. Versions are never compared: the code looks for what differs. Rooms read
equations through `_jaxpr`, which builds on this module (tests/ground/test_compat.py).
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

NEWEST_TESTED = "0.12.0.1"
"""The newest jax that the suite was run on."""


def enable_x64() -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which float64 exists."""
    # A public name of jax since 0.8, an experimental one before.
    module: Any = jax
    if not hasattr(jax, "enable_x64"):
        module = importlib.import_module("jax.experimental")
    return module.enable_x64(True)


def varying(x: Any) -> frozenset[str]:
    """Return the axes of shard_map over which x differs."""
    return _varying_axes(jax.typeof(x))


def _varying_axes(aval: Any) -> frozenset[str]:
    # jax has renamed the attribute once.
    if hasattr(aval, "vma"):
        return aval.vma
    return aval.manual_axis_type.varying


def shape_of(aval: Any) -> Any:
    """Return the shape and dtype of an abstract value, for a trace.

    One that varies in shard_map stands for itself: no version's ShapeDtypeStruct can say
    how it varies without a mesh.
    """
    if _varying_axes(aval):
        return aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def in_device_memory(aval: Any) -> Any:
    """Return an abstract value with the device's memory in place of its own."""
    return aval.update(memory_space=jax.memory.Space.Device)


def in_host_memory(aval: Any) -> bool:
    """Return whether an abstract value lies in the memory of the host."""
    return aval.memory_space == jax.memory.Space.Host


@functools.cache
def has_host_memory() -> bool:
    """Return whether jit can leave an array in pinned host memory, on this backend.

    XLA's CPU backend names that memory on every version; a program's result goes there
    since jax 0.8 or so.
    """
    memories = jax.local_devices()[0].addressable_memories()
    if "pinned_host" not in [memory.kind for memory in memories]:
        return False
    with jax.ensure_compile_time_eval():
        put = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))
        return put(jnp.zeros(1)).sharding.memory_kind == "pinned_host"


def weakly_typed(x: jax.Array, dtype: Any) -> jax.Array:
    """Return x with a weak type, which no public function gives a traced value."""
    return lax.convert_element_type_p.bind(
        x, new_dtype=dtype, weak_type=True, sharding=None
    )


def distributed_state() -> Any:
    """Return the state of `jax.distributed`: client, process_id and num_processes.

    Its key-value store has no public name. The client is None in a single process.
    """
    return importlib.import_module("jax._src.distributed").global_state


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
    """Return the name of an equation's primitive, spelled alike on all versions."""
    if is_high(eqn):
        name = type(eqn.params["_prim"]).__name__
    else:
        name = eqn.primitive.name
    return _SPELLING.get(name, name)


def is_high(eqn: Any) -> bool:
    """Return whether an equation holds an object with rules, not a primitive."""
    return eqn.primitive.name == "call_hi_primitive"


def params(eqn: Any) -> Mapping[str, Any]:
    """Return the parameters of an equation."""
    # Those of a `call_hi_primitive` lie one level down.
    return eqn.params["_prim"].params if is_high(eqn) else eqn.params


# Where an equation holds what runs when it runs; what differentiates it lies elsewhere.
_BODY_KEYS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "traced")
CALLS = frozenset(
    (
        "jit",
        "call",
        "checkpoint",
        "shard_map",
        "custom_jvp_call",
        "custom_vjp_call",
    )
)
"""Primitives whose one body takes the operands as they are and returns the results."""
WITH_BODIES = CALLS | {"scan", "cond", "while"}


def has_bodies(eqn: Any) -> bool:
    """Return whether `bodies` can read the equation."""
    return primitive(eqn) in WITH_BODIES


def body_keys(eqn: Any) -> tuple[str, ...]:
    """Return the names of the parameters that hold the bodies of an equation.

    Raises:
      NotImplementedError: jax writes the equation in a way that we have not met.
    """
    name = primitive(eqn)
    parameters = params(eqn)
    keys: Sequence[str]
    if name == "cond":
        keys = ("branches",)
    elif name == "while":
        keys = ("cond_jaxpr", "body_jaxpr")
    else:
        keys = [key for key in _BODY_KEYS if key in parameters][:1]
    if not keys or not all(key in parameters for key in keys):
        raise _unknown_layout(eqn)
    return tuple(keys)


def bodies(eqn: Any) -> list[core.ClosedJaxpr]:
    """Return the jaxprs that run when the equation does.

    The branches of a cond, (condition, body) of a while loop, else a single one.
    """
    parameters = params(eqn)
    values = [parameters[key] for key in body_keys(eqn)]
    if primitive(eqn) == "cond":
        (values,) = values
    return [closed(body) for body in values]


def with_bodies(
    eqn: Any,
    new: Sequence[core.ClosedJaxpr],
) -> dict[str, Any]:
    """Return the parameters of the equation with other bodies in their places."""
    parameters = dict(params(eqn))
    keys = body_keys(eqn)
    if primitive(eqn) == "cond":
        parameters[keys[0]] = tuple(new)
        return parameters
    for key, body in zip(keys, new, strict=True):
        is_closed = isinstance(parameters[key], core.ClosedJaxpr)
        parameters[key] = body if is_closed else body.jaxpr
    return parameters


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Return a parameter that is a jaxpr as a ClosedJaxpr.

    Since 0.11 one class of jaxprs serves for both. jax_custom_jvp3 and jax_custom_vjp3
    wrap it in the traced function.
    """
    if isinstance(jaxpr, jax.stages.Traced):
        jaxpr = jaxpr.jaxpr
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr
    return core.ClosedJaxpr(jaxpr, ())


def is_jaxpr(value: Any) -> bool:
    """Return whether a parameter is a jaxpr, which `closed` accepts."""
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr | jax.stages.Traced)


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
    """Return the parts of a scan.

    Raises:
      NotImplementedError: jax writes scans in a way that we have not met.
    """
    parameters = params(eqn)
    try:
        # Counts before jax 0.11, trees of the operands since.
        if "ft_in" in parameters:
            consts, carry, _ = parameters["ft_in"].unpack()
            counts = len(consts), len(carry)
        else:
            counts = parameters["num_consts"], parameters["num_carry"]
        return ScanParts(*counts, parameters["length"], parameters["reverse"])
    except KeyError as error:
        raise _unknown_layout(eqn) from error


def scan_outputs(
    eqn: Any,
    used: Sequence[bool],
    body: core.ClosedJaxpr,
) -> Any:
    """Return the scan without the stacked results that are not used.

    Args:
      eqn: a scan.
      used: for each result, whether it stays.
      body: the body of the new scan, which lacks the same results.
    """
    parameters = with_bodies(eqn, [body])
    if "ft_out" in parameters:
        parameters["ft_out"] = parameters["ft_out"].filter_with_mask(list(used))
    outvars = [
        v for v, is_used in zip(eqn.outvars, used, strict=True) if is_used
    ]
    return eqn.replace(outvars=outvars, params=parameters)


def while_consts(eqn: Any) -> tuple[int, int]:
    """Return how many operands only the condition and only the body of a loop read.

    The carry follows them.

    Raises:
      NotImplementedError: jax writes loops in a way that we have not met.
    """
    parameters = params(eqn)
    try:
        return parameters["cond_nconsts"], parameters["body_nconsts"]
    except KeyError as error:
        raise _unknown_layout(eqn) from error


def shard_map_arguments(eqn: Any) -> dict[str, Any]:
    """Return the keyword arguments that jax.shard_map was called with.

    Raises:
      NotImplementedError: jax writes shard_map in a way that we have not met.
    """
    parameters = params(eqn)
    axes = parameters.get(
        "manual_axes", parameters.get("newly_manual_axes", ())
    )
    try:
        return dict(
            mesh=parameters["mesh"],
            in_specs=parameters["in_specs"],
            out_specs=list(parameters["out_specs"]),
            axis_names=set(axes),
            check_vma=parameters["check_vma"],
        )
    except KeyError as error:
        raise _unknown_layout(eqn) from error


# Primitives of our own, and the rules of those of jax.


def new_primitive(
    name: str,
    run: Callable[..., Any],
    type_of: Callable[..., Any],
    jvp: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
) -> Any:
    """Return a primitive with one result.

    Args:
      name: of it.
      run: (*operands, **params) -> result, which is traced when it is compiled.
      type_of: likewise, of types.
      jvp: (primals, tangents, **params) -> (result, its tangent); see `is_zero`.
      transpose: (cotangent, *operands, **params) -> a cotangent or None per operand;
        see `is_linear`.
      batch: (operands, axes, **params) -> (result, its axis).
    """
    primitive = core.Primitive(name)
    primitive.def_impl(run)
    primitive.def_abstract_eval(type_of)
    mlir.register_lowering(
        primitive, mlir.lower_fun(run, multiple_results=False)
    )
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    return primitive


def is_zero(tangent: Any) -> bool:
    """Return whether a tangent or a cotangent is known to be zero."""
    return isinstance(tangent, ad.Zero)


def zero_tangent(x: Any) -> Any:
    """Return the zero that `is_zero` knows, for an array."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def is_linear(operand: Any) -> bool:
    """Return whether it is the operand that a rule for transposition is asked for."""
    return ad.is_undefined_primal(operand)


def transposed(
    primitive: Any,
    params: Mapping[str, Any],
    cotangent: Any,
    operands: Sequence[Any],
    linear: int,
) -> Any:
    """Return the cotangent of an operand of a primitive of jax.

    Args:
      primitive, params: what is transposed.
      cotangent: of its result.
      operands: of it.
      linear: which of them; of that, only the type is read.
    """
    inputs = list(operands)
    inputs[linear] = ad.UndefinedPrimal(_type_of(operands[linear]))
    rule = ad.get_primitive_transpose(primitive)
    return rule(cotangent, *inputs, **params)[linear]


def _type_of(operand: Any) -> Any:
    return operand.aval if is_linear(operand) else jax.typeof(operand)


def _unknown_layout(eqn: Any) -> NotImplementedError:
    return NotImplementedError(
        f"jaxtricks does not know how jax {jax.__version__} writes a "
        f"{primitive(eqn)!r} equation (the newest version tested is "
        f"{NEWEST_TESTED}): install that one, or a newer jaxtricks"
    )
