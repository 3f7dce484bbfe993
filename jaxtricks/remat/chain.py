"""A program as a chain of stages, cut where little is alive."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Var

from jaxtricks import _compat, _jaxpr
from jaxtricks.remat import _memory, _recompute, flat

MAX_STAGES = 96
_GROUP = 1 / 160  # cuts with less than this fraction of the work between them are one cut
_WINDOW = 6  # equations to either side that a cut is compared with
_NEAR, _CHEAPER = 0.15, 1.2  # a cut inside a block has cheaper ones near it on both sides

COLLECTIVES = frozenset(
    " ".join(
        (
            "psum pmax pmin ppermute pbroadcast all_to_all ragged_all_to_all psend precv",
            "all_gather all_gather_invariant all_gather_reduced unreduced_psum unreduced_reduce_scatter",
            "reduce_scatter reduce_scatter_start reduce_scatter_done",
        )
    ).split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive equations.

    Attributes:
      jaxpr: the equations as a function of what they read.
      carry: bytes alive at its end, long-lived values apart.
      fixed: it holds a collective operation, which is never run twice.
    """

    jaxpr: _jaxpr.Jaxpr
    carry: int
    fixed: bool


def stages(program: _jaxpr.Jaxpr, ends: Sequence[int]) -> list[Stage]:
    """The stages that end before these equations (the last is the number of equations)."""
    _, last = _lifetimes(program)
    alive, consts, found = _alive(program), set(program.constvars), []
    for a, b in zip([0, *ends], ends, strict=False):
        eqns = program.eqns[a:b]
        outs = [v for eqn in eqns for v in eqn.outvars if last.get(v, -1) >= b]
        ins = [v for v in flat.read_by(eqns) if v not in consts]
        jaxpr = _jaxpr.made([v for v in flat.read_by(eqns) if v in consts], ins, outs, eqns)
        fixed = any(_compat.primitive(e) in COLLECTIVES for e in _jaxpr.walk(jaxpr))
        found.append(Stage(jaxpr, int(alive[b - 1]), fixed))
    return found


def carries(program: _jaxpr.Jaxpr, ends: Sequence[int]) -> np.ndarray:
    """Bytes that a run of stages adds to what is alive: float64 [stages, stages].

    Entry [s, k] counts what stages s..k make and later stages read, long-lived values apart; what only
    passes through is held already.
    """
    born, last = _lifetimes(program)
    stage_of = np.searchsorted(ends, np.arange(len(program.eqns)), "right")
    made = np.zeros((len(ends), len(ends)))
    for v in born.keys() - _long_lived(program, born, last):
        first = stage_of[born[v]]
        final = int(np.searchsorted(ends, last.get(v, -1), "right"))
        made[first, first:final] += _recompute.var_bytes(v)
    return np.cumsum(made[::-1], 0)[::-1]


def cut(program: _jaxpr.Jaxpr, max_stages: int = MAX_STAGES) -> list[int]:
    """Where the stages end: at prominent minima of the live bytes, and around collectives.

    Args:
      program: an inlined jaxpr.
      max_stages: where there are more minima, those nearest to stages of equal cost.

    Returns:
      Increasing indices of equations; the last is their number.
    """
    n = len(program.eqns)
    alive, work = _alive(program), np.cumsum([_work(eqn) for eqn in program.eqns])
    minima = [i for i in range(n - 1) if 0 < alive[i] <= 1.05 * _around(alive, i)]
    cuts = _grouped(minima, alive, work, _GROUP * work[-1])
    cuts = [c for c in cuts if not _inside_a_block(c, cuts, alive, work)]
    if len(cuts) >= max_stages:
        even = work[-1] * np.arange(1, max_stages) / max_stages
        cuts = [cuts[int(np.argmin(np.abs(work[cuts] - w)))] for w in even]
    apart = {
        j
        for i, eqn in enumerate(program.eqns)
        if _compat.primitive(eqn) in COLLECTIVES
        for j in (i - 1, i)
    }
    return [*sorted({c + 1 for c in {*cuts, *apart} if 0 <= c < n - 1}), n]


def _work(eqn: Any) -> float:
    return _memory.eqn_flops(eqn) + 4.0 * sum(map(_recompute.var_bytes, eqn.outvars))


def _lifetimes(program: _jaxpr.Jaxpr) -> tuple[dict[Any, int], dict[Any, int]]:
    """({variable: equation that makes it}, {variable: last equation that reads it})."""
    born = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.outvars}
    last = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.invars if isinstance(v, Var)}
    last |= {v: len(program.eqns) for v in program.outvars if isinstance(v, Var)}
    return born, last


def _long_lived(program: _jaxpr.Jaxpr, born: Any, last: Any) -> set[Any]:
    """Masks and tables: made early, read by most of the program; they block no cut."""
    n = len(program.eqns)
    return {v for v, i in born.items() if n // 2 < last.get(v, -1) - i and last.get(v) != n}


def _alive(program: _jaxpr.Jaxpr) -> np.ndarray:
    """Bytes alive after each equation: float64 [equations]."""
    born, last = _lifetimes(program)
    long_lived = _long_lived(program, born, last)
    alive = np.zeros(len(program.eqns))
    for v, i in born.items():
        if v not in long_lived and v in last:
            alive[i : last[v]] += _recompute.var_bytes(v)
    return alive


def _around(alive: np.ndarray, i: int) -> float:
    return float(alive[max(0, i - _WINDOW) : i + _WINDOW + 1].min())


def _grouped(minima: Sequence[int], alive: Any, work: Any, gap: float) -> list[int]:
    """The best of each run of neighbouring minima: fewest bytes, then latest."""
    groups: list[list[int]] = []
    for i in minima:
        if groups and work[i] - work[groups[-1][-1]] < gap:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [min(g, key=lambda i: (alive[i], -i)) for g in groups]


def _inside_a_block(c: int, cuts: Sequence[int], alive: Any, work: Any) -> bool:
    near = [d for d in cuts if abs(work[d] - work[c]) < _NEAR * work[-1]]
    cheaper = [d for d in near if alive[d] * _CHEAPER < alive[c]]
    return any(d < c for d in cheaper) and any(d > c for d in cheaper)
