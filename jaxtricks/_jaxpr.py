"""Trace, walk, rewrite and compare jaxprs: the only place that looks inside equations.

amp, remat, reparam and nnx call it. What differs between jax versions is read through
`_compat`; what an equation costs is in `_flops`.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import math
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar

import jax
import numpy as np
from jax.extend import core, source_info_util
from jax.extend.core import primitives

from jaxtricks import _compat

T = TypeVar("T")
Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
Var = core.Var

Equations = Sequence[Any]
"""Equations of one jaxpr (their class has no public name)."""

# `_compat` hides how each version of jax writes an equation. This is what rooms use.
CALLS = _compat.CALLS
WITH_BODIES = _compat.WITH_BODIES
primitive = _compat.primitive
params = _compat.params
is_high = _compat.is_high
has_bodies = _compat.has_bodies
bodies = _compat.bodies
scan_parts = _compat.scan_parts
while_consts = _compat.while_consts
shard_map_arguments = _compat.shard_map_arguments


def trace(
    fn: Callable[..., Any],
    *args: Any,
) -> tuple[ClosedJaxpr, Any]:
    """Return the jaxpr of fn(*args) and the structure of its output.

    Tracers that fn closes over become `consts` of the result, whatever their type.
    """
    make = jax.make_jaxpr(fn, return_shape=True)
    closed, shapes = make(*args)
    return closed, jax.tree.structure(shapes)


def as_fun(jaxpr: Jaxpr) -> Callable[..., list[Any]]:
    """Return fn(consts, *flat_args) -> flat outputs, in the caller's trace."""

    def run(consts: Any, *args: Any) -> list[Any]:
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)

    return run


def sub_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """Yield the jaxprs of an equation's parameters, those of derivative rules too."""
    for value in params(eqn).values():
        items = value if isinstance(value, tuple | list) else (value,)
        for item in items:
            if _compat.is_jaxpr(item):
                yield _compat.closed(item).jaxpr


def walk(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yield every equation, inner ones after the one that holds them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from walk(inner)


def census(
    fn: Callable[..., Any],
    *args: Any,
) -> Counter[tuple[str, str]]:
    """Count each (primitive, dtype of its first output) in the trace of fn(*args)."""
    closed, _ = trace(fn, *args)
    counts: Counter[tuple[str, str]] = Counter()
    for eqn in walk(closed.jaxpr):
        if not eqn.outvars:
            continue
        dtype = getattr(eqn.outvars[0].aval, "dtype", None)
        if dtype is not None:
            counts[primitive(eqn), str(dtype)] += 1
    return counts


def is_literal(v: Any) -> bool:
    """Return whether an operand is a constant written into the equation."""
    return isinstance(v, core.Literal)


def shape_of(v: Any) -> Any:
    """Return the shape and dtype of a variable, for a trace."""
    return _compat.shape_of(v.aval)


def var_bytes(v: Any) -> int:
    """Return the bytes of a variable; 0 for tokens and other values without a size."""
    aval = v.aval
    if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


def output_bytes(eqn: Any) -> int:
    """Return the bytes of all results of an equation."""
    return sum(map(var_bytes, eqn.outvars))


# What the parameters of particular primitives say.


def label_of(eqn: Any) -> str | None:
    """Return the label that a `checkpoint_name` equation attaches, else None."""
    return params(eqn)["name"] if primitive(eqn) == "name" else None


def function_name(eqn: Any) -> str | None:
    """Return the name of the function that a call wraps, None where there is none."""
    return params(eqn).get("name")


def policy_of(eqn: Any) -> Any:
    """Return the policy of a checkpoint; None where there is none."""
    return params(eqn).get("policy")


def primitive_and_params(eqn: Any) -> tuple[Any, Mapping[str, Any]]:
    """Return what computes an equation without bodies, to bind it anew."""
    return eqn.primitive, eqn.params


def dimension_numbers(eqn: Any) -> Any:
    """Return which axes a product sums, and which of its operands go together."""
    return params(eqn)["dimension_numbers"]


def precisions(eqn: Any) -> tuple[Any, ...]:
    """Return the `precision=` of a product, of both operands where they differ."""
    precision = params(eqn).get("precision")
    return precision if isinstance(precision, tuple) else (precision,)


def sums_nothing(eqn: Any) -> bool:
    """Return whether a product has no axis to sum: einsum multiplies entries by it."""
    return is_inner_product(eqn) and not any(dimension_numbers(eqn)[0])


def is_inner_product(eqn: Any) -> bool:
    """Return whether a product has no free axis: each result is one inner product."""
    if primitive(eqn) != "dot_general":
        return False
    contracting, batch = dimension_numbers(eqn)
    operands = zip(
        eqn.invars,
        contracting,
        batch,
        strict=True,
    )
    return all(v.aval.ndim == len(c) + len(b) for v, c, b in operands)


def with_plain_names(jaxpr: Jaxpr) -> Jaxpr:
    """Replace the name objects of jax_remat3 by plain primitives, which vmap knows."""
    eqns = []
    for eqn in jaxpr.eqns:
        label = label_of(eqn)
        if is_high(eqn) and label is not None:
            eqn = eqn.replace(
                primitive=primitives.name_p, params={"name": label}
            )
        eqns.append(eqn)
    return build(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, eqns)


# Equations bound anew, and jaxprs of other equations.


def bind(
    eqn: Any,
    operands: Sequence[Any],
    **changes: Any,
) -> list[Any]:
    """Return the results of an equation on other operands, in the caller's trace.

    Args:
      eqn: the equation; its context (mesh, compute type) and its place in the source
        stay.
      operands: one per operand, of other dtypes perhaps; that of a literal may be a
        NumPy scalar.
      changes: parameters to replace.
    """
    new_params = {**eqn.params, **changes}
    prim = eqn.primitive
    if type(prim).get_bind_params is core.Primitive.get_bind_params:
        # No bodies and no rules among its parameters: nothing has to be evaluated
        # around it.
        with source_context(eqn), eqn.ctx.manager:
            results = prim.bind(*operands, **new_params)
        return list(results) if prim.multiple_results else [results]
    # Else a jaxpr of this one equation is evaluated, which unpacks its bodies. Literals
    # stay literals, unless a traced value has taken their place.
    invars: list[Any] = []
    free_invars: list[Any] = []
    values: list[Any] = []
    for v, operand in zip(eqn.invars, operands, strict=True):
        if is_literal(v) and not hasattr(operand, "dtype"):
            invars.append(v)
            continue
        variable = Var(v.aval)
        invars.append(variable)
        free_invars.append(variable)
        values.append(operand)
    eqn = eqn.replace(invars=invars, params=new_params)
    single = build((), free_invars, eqn.outvars, [eqn])
    return core.jaxpr_as_fun(ClosedJaxpr(single, ()))(*values)


def bind_with_bodies(
    eqn: Any,
    operands: Sequence[Any],
    new_bodies: Sequence[ClosedJaxpr],
    **changes: Any,
) -> list[Any]:
    """Return the results of an equation with other bodies, on fitting operands.

    Args:
      eqn: the equation.
      operands: one per operand.
      new_bodies: what its bodies become.
      changes: parameters to replace.
    """
    if not is_high(eqn):
        changed = {**_compat.with_bodies(eqn, new_bodies), **changes}
        return bind(eqn, operands, **changed)
    # A checkpoint of jax_remat3 is built anew: the equation's object has the dtypes of
    # the old body.
    parameters = {**params(eqn), **changes}
    run = jax.checkpoint(
        core.jaxpr_as_fun(new_bodies[0]),
        policy=parameters["policy"],
        prevent_cse=parameters.get("prevent_cse", True),  # jax 0.10.2 omits it
    )
    return run(*operands)


def replace_bodies(
    eqn: Any,
    new_bodies: Sequence[ClosedJaxpr],
) -> Any:
    """Return the equation with other bodies of the same signature."""
    return eqn.replace(params=_compat.with_bodies(eqn, new_bodies))


def build(
    constvars: Sequence[Any],
    invars: Sequence[Any],
    outvars: Sequence[Any],
    eqns: Iterable[Any],
) -> Jaxpr:
    """Return the jaxpr of these variables and equations."""
    eqns = list(eqns)
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = _anonymous(len(constvars) + len(invars), len(outvars))
    high = any(map(_is_high_inside, eqns))
    return Jaxpr(
        tuple(constvars),
        list(invars),
        list(outvars),
        eqns,
        effects,
        names,
        high,
    )


def _is_high_inside(eqn: Any) -> bool:
    return is_high(eqn) or any(jaxpr.is_high for jaxpr in sub_jaxprs(eqn))


@functools.cache
def _anonymous(inputs: int, outputs: int) -> Any:
    """Return the names that a jaxpr's constructor asks for; they appear nowhere."""
    info = jax.make_jaxpr(lambda: ())().jaxpr.debug_info
    return info._replace(arg_names=("",) * inputs, result_paths=("",) * outputs)


@contextlib.contextmanager
def source_context(eqn: Any) -> Iterator[Any]:
    """Let operations inside carry the equation's names and source line.

    Yields the equation without them.
    """
    source = eqn.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    bare = source.replace(name_stack=source_info_util.new_name_stack())
    with source_info_util.user_context(source.traceback, name_stack=names):
        yield eqn.replace(source_info=bare)


def source_line(eqn: Any) -> str:
    """Return "file.py:12:4 (function)"; "" where no frame is the user's.

    A layer of Flax, or of this library, stands for the line that calls it.
    """
    summary = source_info_util.summarize(eqn.source_info)
    frames = getattr(eqn.source_info.traceback, "frames", ())
    for frame in frames:
        if not frame.file_name.startswith(_library_folders()):
            line = f"{frame.file_name}:{frame.line_num}"
            if not summary.startswith(f"{line}:"):
                summary = f"{line} ({frame.function_name})"
            break
    return summary.rpartition("/")[2]


@functools.cache
def _library_folders() -> tuple[str, ...]:
    """Return the folders of JAX, of Flax, and of this library."""
    folders = []
    for name in ("jax", "jaxlib", "flax", __name__.partition(".")[0]):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            folders.append(spec.origin.removesuffix("__init__.py"))
    # Decorators.
    folders += [contextlib.__file__, functools.__file__]
    return tuple(folders)


# Jaxprs as flat lists of equations: inline, slice, prune.


PLAIN_CALLS = ("jit", "call")
"""Calls that change nothing when they are written out."""
RULES = ("custom_jvp_call", "custom_vjp_call", "checkpoint")
"""Calls that say how to differentiate: written out, their rules are lost."""


def inline(
    closed: ClosedJaxpr,
    calls: Sequence[str] = PLAIN_CALLS,
    also: Callable[[Any], bool] = lambda eqn: False,
) -> ClosedJaxpr:
    """Return the same program with its calls written out, every variable unique.

    Args:
      closed: any jaxpr.
      calls: names of primitives; with `RULES` among them the values are right and the
        derivatives are lost.
      also: whether to write out an equation of another primitive.
    """
    eqns: list[Any] = []
    constvars = closed.jaxpr.constvars
    consts = dict(zip(constvars, closed.consts, strict=True))

    def is_written_out(eqn: Any) -> bool:
        is_call = primitive(eqn) in calls and not _sets_shardings(eqn)
        return is_call or also(eqn)

    def write(jaxpr: Jaxpr, env: dict[Any, Any]) -> list[Any]:
        for eqn in jaxpr.eqns:
            operands = [_renamed(env, v) for v in eqn.invars]
            if _is_identity(eqn):
                outs = operands
            elif is_written_out(eqn):
                (inner,) = bodies(eqn)
                body = inner.jaxpr
                consts.update(zip(body.constvars, inner.consts, strict=True))
                arguments = zip(body.invars, operands, strict=True)
                outs = write(body, dict(arguments))
            else:
                # A body that is called twice is written twice.
                outs = [Var(v.aval) for v in eqn.outvars]
                new_eqn = eqn.replace(invars=operands, outvars=outs)
                eqns.append(new_eqn)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [_renamed(env, v) for v in jaxpr.outvars]

    program = closed.jaxpr
    outs = write(program, {})
    # The constants of the bodies are now those of the program.
    flat = build(tuple(consts), program.invars, outs, eqns)
    return ClosedJaxpr(flat, list(consts.values()))


def _renamed(env: dict[Any, Any], v: Any) -> Any:
    return v if is_literal(v) else env.get(v, v)


def _is_identity(eqn: Any) -> bool:
    """Return whether it moves nothing: jax writes such equations only under a mesh."""
    if primitive(eqn) not in ("reshard", "broadcast_in_dim"):
        return False
    return eqn.invars[0].aval.str_short() == eqn.outvars[0].aval.str_short()


def _sets_shardings(eqn: Any) -> bool:
    parameters = params(eqn)
    for key in ("in_shardings", "out_shardings"):
        # The others are marked as unspecified.
        for sharding in parameters.get(key, ()):
            if isinstance(sharding, jax.sharding.Sharding):
                return True
    return False


def axis_names(eqn: Any) -> frozenset[str]:
    """Return the axes of the mesh along which a collective communicates."""
    names = params(eqn).get("axis_name", ())
    names = names if isinstance(names, tuple | list) else (names,)
    return frozenset(name for name in names if isinstance(name, str))


def remote_axes(eqn: Any) -> frozenset[str]:
    """Return the axes of a shard_map's mesh whose neighbours are on different hosts."""
    return axes_between_hosts(shard_map_arguments(eqn)["mesh"])


def axes_between_hosts(mesh: Any) -> frozenset[str]:
    """Return the axes of a mesh that span several hosts; none of one without devices."""
    devices = getattr(mesh, "devices", None)
    if devices is None:
        return frozenset()
    hosts = np.vectorize(lambda d: d.process_index, otypes=[int])(devices)
    return frozenset(
        name
        for i, name in enumerate(mesh.axis_names)
        if hosts.size and np.ptp(hosts, axis=i).any()
    )


def within_mesh(eqn: Any, action: Callable[[], T]) -> T:
    """Call an action that traces equations of the body of a shard_map."""
    results: list[T] = []

    def body() -> tuple[()]:
        results.append(action())
        return ()

    settings = shard_map_arguments(eqn) | {"in_specs": (), "out_specs": ()}
    jax.eval_shape(jax.shard_map(body, **settings))
    return results[0]


def straight(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Return the program as the planner cuts it.

    Its calls are written out, and slices of its inputs stand where they are first read.
    """
    return _sink_slices(inline(closed))


_SLICING = (
    "slice",
    "squeeze",
    "reshape",
    "dynamic_slice",
    "convert_element_type",
    "broadcast_in_dim",
)


def _sink_slices(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Return the same program with slices of its inputs moved to their first reader.

    Code that walks over a sequence or stacked weights slices all of it first; those
    slices would be alive across the whole program.
    """
    program = closed.jaxpr
    inputs = {*program.constvars, *program.invars}
    waiting: dict[Any, Any] = {}
    eqns: list[Any] = []

    def fetch(operands: Sequence[Any]) -> None:
        for v in operands:
            if isinstance(v, Var) and v in waiting:
                eqn = waiting.pop(v)
                fetch(eqn.invars)
                eqns.append(eqn)

    for eqn in program.eqns:
        reads = variables_of(eqn.invars)
        from_inputs = all(v in inputs or v in waiting for v in reads)
        if primitive(eqn) in _SLICING and from_inputs:
            waiting[eqn.outvars[0]] = eqn
        else:
            fetch(reads)
            eqns.append(eqn)
    fetch(program.outvars)
    flat = build(
        program.constvars,
        program.invars,
        program.outvars,
        eqns,
    )
    return ClosedJaxpr(flat, closed.consts)


def variables_of(operands: Iterable[Any]) -> list[Any]:
    """Return the operands that are variables; literals are left out."""
    return [v for v in operands if isinstance(v, Var)]


def read_values(
    variables: Sequence[Any],
    env: Mapping[Any, Any],
) -> list[Any]:
    """Return the values of variables and literals."""
    return [v.val if is_literal(v) else env[v] for v in variables]


def free_variables(eqns: Equations) -> list[Any]:
    """Return what the equations read and do not compute, in order of use."""
    computed = set(computed_variables(eqns))
    free: dict[Any, None] = {}
    for eqn in eqns:
        for v in variables_of(eqn.invars):
            if v not in computed:
                free[v] = None
    return list(free)


def computed_variables(eqns: Equations) -> list[Any]:
    """Return the results of the equations in order."""
    return [v for eqn in eqns for v in eqn.outvars]


def all_variables(jaxpr: Jaxpr) -> list[Any]:
    """Return the constvars, the invars and the results of the equations, in order."""
    computed = computed_variables(jaxpr.eqns)
    return [*jaxpr.constvars, *jaxpr.invars, *computed]


def extract(
    eqns: Equations,
    outs: Sequence[Any] | None = None,
) -> Jaxpr:
    """Return the equations as a jaxpr of what they read.

    Args:
      eqns: consecutive equations.
      outs: variables to return; None is all that they compute.
    """
    if outs is None:
        outs = computed_variables(eqns)
    return build((), free_variables(eqns), outs, eqns)


def followed_by(
    first: Jaxpr,
    second: Jaxpr,
) -> Jaxpr:
    """Return both as one jaxpr: the first inputs of the second are all outputs of the first.

    The others come after the inputs of the first. It is for counting: variables that
    both compute may be the same.
    """
    count = len(first.outvars)
    names = dict(zip(second.invars[:count], first.outvars, strict=True))
    eqns = [
        eqn.replace(invars=[_renamed(names, v) for v in eqn.invars])
        for eqn in second.eqns
    ]
    return build(
        (*first.constvars, *second.constvars),
        (*first.invars, *second.invars[count:]),
        [_renamed(names, v) for v in second.outvars],
        [*first.eqns, *eqns],
    )


def needed_after(
    parts: Sequence[Equations],
    outvars: Sequence[Any],
) -> list[set[Any]]:
    """Return, for each part of a program, the variables that later parts read.

    The results of the program count as read.
    """
    needed = set(variables_of(outvars))
    after = []
    for eqns in reversed(parts):
        after.append(set(needed))
        needed |= set(free_variables(eqns))
    return after[::-1]


def with_saved_values(
    jaxpr: Jaxpr,
    saved: Collection[int],
) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
    """Return fn(inputs, values) that computes all but the results of some equations.

    Those are replaced by the values, and differentiated as if they were computed.

    Args:
      jaxpr: an inlined one; inputs are its constvars, then its invars.
      saved: indices of equations; values are all of their outputs in order.
    """
    # The program is cut behind each saved equation, whose results are then replaced.
    parts: list[Equations] = []
    start = 0
    for i in sorted(saved):
        parts.append(jaxpr.eqns[start : i + 1])
        start = i + 1
    saved_outvars = [part[-1].outvars for part in parts]
    # Nothing is saved behind the last part.
    parts.append(jaxpr.eqns[start:])
    saved_outvars.append([])
    runs = []
    needed_variables = needed_after(parts, jaxpr.outvars)
    for eqns, needed in zip(parts, needed_variables, strict=True):
        outs = [v for v in computed_variables(eqns) if v in needed]
        runs.append(extract(eqns, outs))
    variables = (*jaxpr.constvars, *jaxpr.invars)

    def run(inputs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(variables, inputs, strict=True))
        remaining = iter(values)
        for part, outvars in zip(runs, saved_outvars, strict=True):
            operands = read_values(part.invars, env)
            results = as_fun(part)((), *operands)
            env.update(zip(part.outvars, results, strict=True))
            for v in outvars:
                value = next(remaining)
                # Absent: what computes it is needed for nothing but its value.
                if v in env:
                    value = _swap(env[v], value)
                env[v] = value
        return read_values(jaxpr.outvars, env)

    return run


@jax.custom_jvp
def _swap(computed: Any, value: Any) -> Any:
    del computed
    return value


@_swap.defjvp
def _swap_jvp(primals: Any, tangents: Any) -> Any:
    # The value of one, the derivative of the other: what computes the first is dead
    # code.
    return primals[1], tangents[0]


def live(closed: ClosedJaxpr) -> Jaxpr:
    """Return what of a program runs: its calls written out, without dead code."""
    return prune(inline(closed).jaxpr)


def prune(
    jaxpr: Jaxpr,
    used: Sequence[bool] | None = None,
) -> Jaxpr:
    """Return the jaxpr without the equations whose results nothing reads.

    Args:
      jaxpr: any; its inputs stay.
      used: which outputs are read; None is all.
    """
    outs = jaxpr.outvars
    if used is not None:
        outs = list(itertools.compress(outs, used))
    needed = set(variables_of(outs))
    reversed_eqns = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            reversed_eqns.append(_prune_body(eqn, needed))
            needed.update(variables_of(eqn.invars))
    return build(
        jaxpr.constvars,
        jaxpr.invars,
        outs,
        reversed_eqns[::-1],
    )


def _prune_body(eqn: Any, needed: set[Any]) -> Any:
    """Return a scan without the stacked outputs that nothing reads.

    The result is for counting; it is never run.
    """
    if primitive(eqn) != "scan":
        return eqn
    carry = scan_parts(eqn).carry
    # Carries stay: the next step reads them.
    used = [True] * carry
    used += [v in needed for v in eqn.outvars[carry:]]
    (body,) = bodies(eqn)
    pruned = prune(body.jaxpr, used)
    new_body = ClosedJaxpr(pruned, body.consts)
    return _compat.scan_outputs(eqn, used, new_body)


# Whether two jaxprs are the same program.


def fingerprint(jaxpr: Jaxpr) -> str:
    """Return twelve hexadecimal digits, equal for equal operations on equal shapes.

    Names of variables and lines of source play no part.
    """
    return hashlib.sha256(repr(_canonical(jaxpr)).encode()).hexdigest()[:12]


def _canonical(jaxpr: Jaxpr) -> Any:
    """Return nested tuples that describe the jaxpr, its variables as numbers."""
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    counter = itertools.count()
    number: dict[Any, int] = {v: next(counter) for v in inputs}

    def reference(v: Any) -> Any:
        return str(v) if is_literal(v) else number[v]

    lines = []
    for eqn in jaxpr.eqns:
        if _is_identity(eqn) and not is_literal(eqn.invars[0]):
            number[eqn.outvars[0]] = number[eqn.invars[0]]
            continue
        number |= {v: next(counter) for v in eqn.outvars}
        # Functions, meshes and the like have texts that differ from run to run.
        settings = [item for item in params(eqn).items() if _is_plain(item[1])]
        line = (
            primitive(eqn),
            list(map(reference, eqn.invars)),
            list(map(_type_of, eqn.outvars)),
            sorted(settings),
            list(map(_canonical, sub_jaxprs(eqn))),
        )
        lines.append(line)
    return (
        list(map(_type_of, inputs)),
        lines,
        list(map(reference, jaxpr.outvars)),
    )


def _type_of(v: Any) -> str:
    return v.aval.str_short()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # dimension numbers and paddings, too
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)
