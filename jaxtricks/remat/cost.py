"""What a jaxpr costs before any compiler saw it: time in floating-point operations, and live bytes.

A compiler fuses elementwise operations into what reads them. The counts here do so in the simplest way:
a cheap result with one reader that can take it in is never written, and its operands live until then.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.extend.core import Var

from jaxtricks import _compat, _jaxpr
from jaxtricks.remat import _memory, _recompute

# Operations that a machine does in the time of one byte of memory traffic; fusion spares accelerators
# most of the traffic that an unfused count sees.
FLOPS_PER_BYTE = {"cpu": 1.0, "gpu": 10.0, "tpu": 30.0}

_CHEAP = frozenset(
    " ".join(
        (
            "add sub mul neg abs sign max min square one_minus_square integer_pow add_any and or not xor",
            "select_n clamp",
            "eq ne lt le gt ge convert_element_type broadcast_in_dim reshape squeeze expand_dims iota name",
            "stop_gradient copy is_finite population_count shift_right_logical bitcast_convert_type",
            "reduce_precision pvary",
        )
    ).split()
)
_REDUCTIONS = ("reduce_sum", "reduce_max")
_FUSES = _CHEAP | {
    *_REDUCTIONS,
    "div",
    "sqrt",
    "rsqrt",
    "exp",
    "log",
    "log2",
    "tanh",
    "logistic",
    "erf",
    "pow",
}
_VIEWS = frozenset(("reshape", "squeeze", "expand_dims", "name", "stop_gradient", "copy"))
_FREE = _VIEWS | {"broadcast_in_dim"}
_FUSED_AGAIN = 2  # operations that a compiler repeats backward rather than keep their result


def work(jaxpr: _jaxpr.Jaxpr, flops_per_byte: float) -> float:
    """Time of running the jaxpr once, in floating-point operations."""
    return _memory.flops(jaxpr) + flops_per_byte * _bytes_written(jaxpr)


def _bytes_written(jaxpr: _jaxpr.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = list(_jaxpr.sub_jaxprs(eqn))
        name = _compat.primitive(eqn)
        if name == "scan":
            total += _compat.scan_parts(eqn).length * _bytes_written(inner[0])
        elif inner and not name.startswith(("reduce", "scatter", "sort")):
            total += max(map(_bytes_written, inner))
        else:
            total += sum(map(_recompute.var_bytes, eqn.outvars))
    return total


def live_bytes(jaxpr: _jaxpr.Jaxpr) -> np.ndarray:
    """Bytes of intermediates alive while each equation runs, inputs apart: float64 [equations]."""
    n = len(jaxpr.eqns)
    readers = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var))
    last: dict[Any, int] = {v: n for v in jaxpr.outvars if isinstance(v, Var)}
    reader: dict[Any, str] = {}
    change, inside = np.zeros(n + 1), np.zeros(n)
    for i in reversed(range(n)):
        eqn = jaxpr.eqns[i]
        name = _compat.primitive(eqn)
        out: Any = eqn.outvars[0] if eqn.outvars else None
        fused = name in _VIEWS and out in last
        if name in _CHEAP and readers[out] == 1 and last[out] < n:
            fused |= reader[out] in _FUSES
        until = last[out] if fused else i
        for v in eqn.invars:
            if isinstance(v, Var):
                last[v] = max(last.get(v, -1), until)
                reader[v] = name
        inside[i] = max(map(peak_live, _jaxpr.sub_jaxprs(eqn)), default=0)
        for v in () if fused else eqn.outvars:
            change[i] += _recompute.var_bytes(v)
            change[min(last.get(v, i) + 1, n)] -= _recompute.var_bytes(v)
    return np.cumsum(change)[:-1] + inside


def peak_live(jaxpr: Any) -> float:
    """The largest of `live_bytes`."""
    return float(live_bytes(jaxpr).max(initial=0))


def kept_bytes(jaxpr: _jaxpr.Jaxpr, residuals: Iterable[Any], known: Iterable[Any]) -> float:
    """Bytes of residuals that are written out: what few cheap operations make of others is made again.

    Args:
      jaxpr: the program that makes them.
      residuals: some of its variables.
      known: variables that are kept in any case.
    """
    wanted, total = set(residuals), 0.0
    # {variable: how many operations away from something kept}
    away: dict[Any, int] = dict.fromkeys([*known, *jaxpr.invars, *jaxpr.constvars], 0)
    for eqn in jaxpr.eqns:
        operands = [v for v in eqn.invars if isinstance(v, Var)]
        name = _compat.primitive(eqn)
        if name in _CHEAP and all(v in away for v in operands):
            steps = max((away[v] for v in operands), default=0) + (name not in _FREE)
            away |= dict.fromkeys(eqn.outvars, steps) if steps <= _FUSED_AGAIN else {}
        for v in wanted.intersection(eqn.outvars) - away.keys():
            total += _recompute.var_bytes(v)
            away[v] = 0
    return total
