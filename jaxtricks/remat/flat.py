"""Jaxprs as flat lists of equations: inline, cut, prune, fingerprint."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jaxtricks import _compat, _jaxpr

CALLS = ("jit", "call")
RULES = ("custom_jvp_call", "custom_vjp_call", "checkpoint")


def inlined(
    closed: _jaxpr.ClosedJaxpr,
    calls: Sequence[str] = CALLS,
    also: Callable[[Any], bool] = lambda eqn: False,
) -> _jaxpr.ClosedJaxpr:
    """The same program with its calls written out; every variable is its own.

    Args:
      closed: any jaxpr.
      calls: names of primitives; with `RULES` among them the values are right and derivatives are lost.
      also: whether to write out an equation of another primitive.
    """
    eqns: list[Any] = []
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def write(jaxpr: _jaxpr.Jaxpr, env: dict[Any, Any]) -> list[Any]:
        for eqn in jaxpr.eqns:
            operands = [_read(env, v) for v in eqn.invars]
            if _stays(eqn):
                outs = operands
            elif (_compat.primitive(eqn) in calls and not _means_shardings(eqn)) or also(eqn):
                (inner,) = _compat.bodies(eqn)
                consts.update(zip(inner.jaxpr.constvars, inner.consts, strict=True))
                outs = write(inner.jaxpr, dict(zip(inner.jaxpr.invars, operands, strict=True)))
            else:
                outs = [_jaxpr.Var(v.aval) for v in eqn.outvars]
                eqns.append(eqn.replace(invars=operands, outvars=outs))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [_read(env, v) for v in jaxpr.outvars]

    outs = write(closed.jaxpr, {})
    flat = _jaxpr.made(tuple(consts), closed.jaxpr.invars, outs, eqns)
    return _jaxpr.ClosedJaxpr(flat, list(consts.values()))


def _read(env: dict[Any, Any], v: Any) -> Any:
    return v if _jaxpr.is_literal(v) else env.get(v, v)


def _stays(eqn: Any) -> bool:
    """Whether it moves nothing: jax writes it where a mesh is in force, and not elsewhere."""
    if _compat.primitive(eqn) not in ("reshard", "broadcast_in_dim"):
        return False
    return eqn.invars[0].aval.str_short() == eqn.outvars[0].aval.str_short()


def _means_shardings(eqn: Any) -> bool:
    given = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(isinstance(s, jax.sharding.Sharding) for s in given)


def straight(closed: _jaxpr.ClosedJaxpr) -> _jaxpr.ClosedJaxpr:
    """The program as the planner cuts it: its calls written out, its inputs' parts where they are read."""
    return _sunk(inlined(closed))


def _sunk(closed: _jaxpr.ClosedJaxpr) -> _jaxpr.ClosedJaxpr:
    """The same program with parts of its inputs taken where they are first read.

    Code that walks over a sequence or stacked weights slices all of it first; those slices would be alive
    across the whole program.
    """
    program = closed.jaxpr
    inputs = {*program.constvars, *program.invars}
    waiting: dict[Any, Any] = {}
    eqns: list[Any] = []

    def fetch(operands: Sequence[Any]) -> None:
        for v in operands:
            if isinstance(v, _jaxpr.Var) and v in waiting:
                eqn = waiting.pop(v)
                fetch(eqn.invars)
                eqns.append(eqn)

    for eqn in program.eqns:
        reads = [v for v in eqn.invars if isinstance(v, _jaxpr.Var)]
        if _compat.primitive(eqn) in _PARTS and all(v in inputs or v in waiting for v in reads):
            waiting[eqn.outvars[0]] = eqn
        else:
            fetch(reads)
            eqns.append(eqn)
    fetch(program.outvars)
    flat = _jaxpr.made(program.constvars, program.invars, program.outvars, eqns)
    return _jaxpr.ClosedJaxpr(flat, closed.consts)


_PARTS = (
    "slice",
    "squeeze",
    "reshape",
    "dynamic_slice",
    "convert_element_type",
    "broadcast_in_dim",
)


def read(variables: Sequence[Any], env: Mapping[Any, Any]) -> list[Any]:
    """Values of variables and literals."""
    return [v.val if _jaxpr.is_literal(v) else env[v] for v in variables]


def read_by(eqns: Sequence[Any]) -> list[Any]:
    """Variables that the equations read and do not make, in order of use."""
    made = {v for eqn in eqns for v in eqn.outvars}
    read = [v for eqn in eqns for v in eqn.invars if isinstance(v, _jaxpr.Var) and v not in made]
    return list(dict.fromkeys(read))


def piece(eqns: Sequence[Any], outs: Sequence[Any]) -> _jaxpr.Jaxpr:
    """The equations as a jaxpr of what they read."""
    return _jaxpr.made((), read_by(eqns), outs, eqns)


def replaced(
    jaxpr: _jaxpr.Jaxpr, saved: Collection[int]
) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
    """fn(inputs, values): the results of the saved equations are values, differentiated as if computed.

    Args:
      jaxpr: an inlined one; inputs are its constvars, then its invars.
      saved: indices of equations; values are all of their outputs in order.
    """
    ends = [*sorted(i + 1 for i in saved), len(jaxpr.eqns)]
    parts = [jaxpr.eqns[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    swaps = [list(eqns[-1].outvars) for eqns in parts[:-1]] + [[]]
    runs = []
    for eqns, needed in zip(parts, needed_after(parts, jaxpr.outvars), strict=True):
        runs.append(piece(eqns, [v for eqn in eqns for v in eqn.outvars if v in needed]))

    def run(inputs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))
        given = iter(values)
        for part, swapped in zip(runs, swaps, strict=True):
            results = _jaxpr.as_fun(part)((), *[env[v] for v in part.invars])
            env.update(zip(part.outvars, results, strict=True))
            for v, value in zip(swapped, given, strict=False):
                env[v] = _swap(env[v], value) if v in env else value
        return read(jaxpr.outvars, env)

    return run


def needed_after(parts: Sequence[Sequence[Any]], outvars: Sequence[Any]) -> list[set[Any]]:
    """For each run of equations, the variables that later runs or the results read."""
    needed = {v for v in outvars if isinstance(v, _jaxpr.Var)}
    after = []
    for eqns in reversed(parts):
        after.append(set(needed))
        needed |= set(read_by(eqns))
    return after[::-1]


@jax.custom_jvp
def _swap(computed: Any, value: Any) -> Any:
    del computed
    return value


@_swap.defjvp
def _swap_jvp(primals: Any, tangents: Any) -> Any:
    # The value of one, the derivative of the other: what computes the first is dead code.
    return primals[1], tangents[0]


def live(closed: _jaxpr.ClosedJaxpr) -> _jaxpr.Jaxpr:
    """What of a program runs: its calls written out, without dead code."""
    return pruned(inlined(closed).jaxpr)


def pruned(jaxpr: _jaxpr.Jaxpr, used: Sequence[bool] | None = None) -> _jaxpr.Jaxpr:
    """The jaxpr without equations whose results nobody reads.

    Args:
      jaxpr: any; its inputs stay.
      used: which outputs are read; None is all.
    """
    outs = [v for i, v in enumerate(jaxpr.outvars) if used is None or used[i]]
    needed = {v for v in outs if isinstance(v, _jaxpr.Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(_pruned_body(eqn, needed))
            needed.update(v for v in eqn.invars if isinstance(v, _jaxpr.Var))
    return _jaxpr.made(jaxpr.constvars, jaxpr.invars, outs, kept[::-1])


def _pruned_body(eqn: Any, needed: set[Any]) -> Any:
    """A scan without the stacked outputs that nobody reads (counted, never run)."""
    if _compat.primitive(eqn) != "scan":
        return eqn
    carry = _compat.scan_parts(eqn).carry
    used = [i < carry or v in needed for i, v in enumerate(eqn.outvars)]
    (body,) = _compat.bodies(eqn)
    slim = _jaxpr.ClosedJaxpr(pruned(body.jaxpr, used), body.consts)
    return _compat.scan_outputs(eqn, used, slim)


def fingerprint(jaxpr: _jaxpr.Jaxpr) -> str:
    """Twelve hexadecimal digits: equal for equal operations on equal shapes, wherever they stand."""
    return hashlib.sha256(repr(_written(jaxpr)).encode()).hexdigest()[:12]


def _written(jaxpr: _jaxpr.Jaxpr) -> Any:
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    fresh = itertools.count()
    number: dict[Any, int] = {v: next(fresh) for v in inputs}
    shapes = [v.aval.str_short() for v in inputs]
    lines = []
    for eqn in jaxpr.eqns:
        if _stays(eqn) and eqn.invars[0] in number:
            number[eqn.outvars[0]] = number[eqn.invars[0]]
            continue
        number |= {v: next(fresh) for v in eqn.outvars}
        reads = [str(v) if _jaxpr.is_literal(v) else number[v] for v in eqn.invars]
        outs = [v.aval.str_short() for v in eqn.outvars]
        params = sorted((k, v) for k, v in _compat.params(eqn).items() if _is_plain(v))
        inner = [_written(j) for j in _jaxpr.sub_jaxprs(eqn)]
        lines.append((_compat.primitive(eqn), reads, outs, params, inner))
    return shapes, lines, [str(v) if _jaxpr.is_literal(v) else number[v] for v in jaxpr.outvars]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # dimension numbers and paddings, too
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)
