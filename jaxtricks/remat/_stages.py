"""Cut a program into a chain of stages, where few bytes are alive.

What each stage costs is counted in `_options`; how it runs is decided in `_solver` and
done in `_schedule`.
"""

import bisect
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtricks import _flops, _jaxpr
from jaxtricks.remat._costs import COLLECTIVES, GATHERS

MAX_STAGES = 96
# Cuts with less than this fraction of the work between them are one cut.
_MIN_FRACTION = 1 / 160
# Equations to either side that a cut is compared with.
_WINDOW = 6
# A cut with fewer bytes at its end than these cuts on both sides is inside a block:
# within this fraction of the work, and by this factor of its bytes.
_NEAR, _CHEAPER = 0.15, 1.2

Lifetimes = tuple[Mapping[Any, int], Mapping[Any, int]]
"""({variable: equation that computes it}, {variable: last equation that reads it})."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run a stage, and its costs beside saving everything.

    Attributes:
      saved: equations whose results are saved, of the stage or of its scan's body; None
        saves all that the derivative needs, () recomputes from the inputs.
      outer: for a stage with a scan: iterations of the outer of two loops; 0 leaves the
        scan alone.
      in_parts: see `_schedule.Run`.
      offload: those of `saved` that wait in the memory of the host.
      residual_bytes: bytes alive until the backward pass, without the inputs and
        outputs of the stage.
      host_bytes: the same, in the memory of the host.
      extra: operations beyond those of saving everything.
      backward_bytes: most bytes alive in the backward pass, without residuals.
    """

    saved: tuple[int, ...] | None
    outer: int
    in_parts: bool = False
    offload: tuple[int, ...] = ()
    residual_bytes: float = 0.0
    host_bytes: float = 0.0
    extra: float = 0.0
    backward_bytes: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive equations, and the ways to run them once they are costed.

    Attributes:
      jaxpr: the equations as a function of what they read.
      fingerprint: of the jaxpr.
      carry: bytes alive at its end, long-lived values apart.
      runs_once: it holds a collective operation that must not run twice.
      options: the ways that no other beats; empty before `_options.with_costs`.
      forward: operations of one forward pass; infinite if it may not run twice.
      forward_bytes: most bytes alive in it.
    """

    jaxpr: _jaxpr.Jaxpr
    fingerprint: str
    carry: int
    runs_once: bool
    options: tuple[Option, ...] = ()
    forward: float = math.inf
    forward_bytes: float = 0.0


def main_body(
    program: _jaxpr.Jaxpr,
) -> tuple[int, _jaxpr.ClosedJaxpr] | None:
    """Return the index of the shard_map that does most of the work, and its body.

    Args:
      program: an inlined jaxpr.

    Returns:
      The body as `_jaxpr.straight` writes it; None if no shard_map does most.
    """
    indices = [
        i
        for i, eqn in enumerate(program.eqns)
        if _jaxpr.primitive(eqn) == "shard_map"
    ]
    # Most programs have none, and need no count of their work.
    half = sum(map(_work, program.eqns)) / 2 if indices else 0.0
    for i in indices:
        eqn = program.eqns[i]
        if _work(eqn) > half:
            return i, _jaxpr.straight(_jaxpr.bodies(eqn)[0])
    return None


def split(
    program: _jaxpr.Jaxpr,
    ends: Sequence[int],
    remote_axes: Collection[str] = (),
) -> list[Stage]:
    """Return the stages that end before these equations.

    Args:
      program: an inlined jaxpr.
      ends: increasing indices of equations; the last is their number.
      remote_axes: names of axes of a mesh that span several hosts.
    """
    _, last_read = _lifetimes(program)
    alive = _alive(program)
    constvars = set(program.constvars)
    stages = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        eqns = program.eqns[start:end]
        computed = _jaxpr.computed_variables(eqns)
        # What only this stage reads stays inside it.
        outs = [v for v in computed if last_read.get(v, -1) >= end]
        reads = _jaxpr.free_variables(eqns)
        consts = [v for v in reads if v in constvars]
        ins = [v for v in reads if v not in constvars]
        jaxpr = _jaxpr.build(consts, ins, outs, eqns)
        stage = Stage(
            jaxpr,
            _jaxpr.fingerprint(jaxpr),
            carry=int(alive[end - 1]),
            runs_once=any(
                _runs_once(e, remote_axes) for e in _jaxpr.walk(jaxpr)
            ),
        )
        stages.append(stage)
    return stages


def carries(
    program: _jaxpr.Jaxpr,
    ends: Sequence[int],
) -> np.ndarray:
    """Return the bytes that a run of stages adds: float64 [stages, stages].

    Entry [s, k] counts what stages s..k compute and later stages read, long-lived
    values apart; what only passes through is alive already.
    """
    lifetimes = _lifetimes(program)
    born, last_read = lifetimes
    count = len(ends)
    # Row s, column k: what stage s computes and is read after stage k.
    added = np.zeros((count, count))
    for v in born.keys() - _long_lived(program, lifetimes):
        first = bisect.bisect_right(ends, born[v])
        last = bisect.bisect_right(ends, last_read.get(v, -1))
        added[first, first:last] += _jaxpr.var_bytes(v)
    # Sums over the stages from s on.
    reversed_sums = np.cumsum(added[::-1], 0)
    return reversed_sums[::-1]


def cut(
    program: _jaxpr.Jaxpr,
    max_stages: int = MAX_STAGES,
    remote_axes: Collection[str] = (),
) -> list[int]:
    """Return where the stages end: where few bytes are alive, and around collectives.

    Args:
      program: an inlined jaxpr.
      max_stages: where there are more minima of the live bytes, those nearest to stages
        of equal cost.
      remote_axes: see `split`.

    Returns:
      Increasing indices of equations; the last is their number.
    """
    n = len(program.eqns)
    alive = _alive(program)
    work = np.cumsum([_work(eqn) for eqn in program.eqns])
    minima = [i for i in range(n - 1) if _is_minimum(alive, i)]
    cuts = _grouped(minima, alive, work)
    cuts = [c for c in cuts if not _is_inside_a_block(c, cuts, alive, work)]
    if len(cuts) >= max_stages:
        cuts = _nearest_to_even(cuts, work, max_stages)
    # A collective that runs once is a stage by itself: what is around it may run twice.
    around_collectives = []
    for i, eqn in enumerate(program.eqns):
        if _runs_once(eqn, remote_axes):
            around_collectives += [i - 1, i]
    last_equations = {*cuts, *around_collectives}
    return [*sorted(c + 1 for c in last_equations if 0 <= c < n - 1), n]


def _nearest_to_even(
    cuts: Sequence[int],
    work: np.ndarray,
    count: int,
) -> list[int]:
    """Return the cuts nearest to those into this many stages of equal work."""
    even = work[-1] * np.arange(1, count) / count
    nearest = []
    for target in even:
        distance = np.abs(work[cuts] - target)
        nearest.append(cuts[int(np.argmin(distance))])
    return nearest


def _runs_once(eqn: Any, remote_axes: Collection[str]) -> bool:
    name = _jaxpr.primitive(eqn)
    if name in GATHERS:
        return not _jaxpr.axis_names(eqn).isdisjoint(remote_axes)
    return name in COLLECTIVES


def _work(eqn: Any) -> float:
    return _flops.eqn_flops(eqn) + 4.0 * _jaxpr.output_bytes(eqn)


def _lifetimes(program: _jaxpr.Jaxpr) -> Lifetimes:
    born = {}
    last_read = {}
    for i, eqn in enumerate(program.eqns):
        born |= dict.fromkeys(eqn.outvars, i)
        reads = [v for v in eqn.invars if isinstance(v, _jaxpr.Var)]
        last_read |= dict.fromkeys(reads, i)
    results = [v for v in program.outvars if isinstance(v, _jaxpr.Var)]
    last_read |= dict.fromkeys(results, len(program.eqns))
    return born, last_read


def _long_lived(
    program: _jaxpr.Jaxpr,
    lifetimes: Lifetimes,
) -> set[Any]:
    """Return masks and tables: computed early, read by most of the program.

    They are alive wherever the program is cut, and stand in the way of no cut.
    """
    born, last_read = lifetimes
    n = len(program.eqns)
    return {
        v
        for v, i in born.items()
        if last_read.get(v, -1) - i > n // 2 and last_read.get(v) != n
    }


def _alive(program: _jaxpr.Jaxpr) -> np.ndarray:
    """Return the bytes alive after each equation: float64 [equations]."""
    lifetimes = _lifetimes(program)
    born, last_read = lifetimes
    long_lived = _long_lived(program, lifetimes)
    alive = np.zeros(len(program.eqns))
    for v, i in born.items():
        if v not in long_lived and v in last_read:
            alive[i : last_read[v]] += _jaxpr.var_bytes(v)
    return alive


def _is_minimum(alive: np.ndarray, i: int) -> bool:
    """Return whether about the fewest bytes of its neighbourhood are alive here."""
    first = max(0, i - _WINDOW)
    neighbourhood = alive[first : i + _WINDOW + 1]
    fewest = float(neighbourhood.min())
    return 0 < float(alive[i]) <= 1.05 * fewest


def _grouped(
    minima: Sequence[int],
    alive: np.ndarray,
    work: np.ndarray,
) -> list[int]:
    """Return the best of each run of neighbouring minima: fewest bytes, then latest."""
    min_work = _MIN_FRACTION * work[-1]
    groups: list[list[int]] = []
    for i in minima:
        if groups and work[i] - work[groups[-1][-1]] < min_work:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [min(group, key=lambda i: (alive[i], -i)) for group in groups]


def _is_inside_a_block(
    c: int,
    cuts: Sequence[int],
    alive: np.ndarray,
    work: np.ndarray,
) -> bool:
    max_distance = _NEAR * work[-1]
    has_cheaper_before = has_cheaper_after = False
    for d in cuts:
        is_near = abs(work[d] - work[c]) < max_distance
        if is_near and alive[d] * _CHEAPER < alive[c]:
            has_cheaper_before |= d < c
            has_cheaper_after |= d > c
    return has_cheaper_before and has_cheaper_after
