"""Estimate what programs and the options of a stage cost, before a compiler sees them.

Time is in floating-point operations, memory in live bytes. A compiler fuses elementwise
operations into what reads them. The counts here do so in the simplest way: a cheap
result whose readers can all take it in is never written, and its operands live until
then.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtricks import _flops, _jaxpr
from jaxtricks._jaxpr import var_bytes, variables_of


class Rates(NamedTuple):
    """Operations that a machine does in the time of one byte.

    Attributes:
      memory: of memory traffic.
      network: sent from device to device.
    """

    memory: float
    network: float


# Fusion spares accelerators most of the traffic that an unfused count sees. Between
# devices: about the peak of bfloat16 products over the links of a chip, from Google
# Cloud's pages of TPU v5e and v6e and NVIDIA's data sheet of the H100.
RATES = {
    "cpu": Rates(0.1, 10.0),
    "gpu": Rates(10.0, 2000.0),
    "tpu": Rates(30.0, 1500.0),
}

# Collectives that may run again: the shards of parameters are gathered for the backward
# pass, as is usual, rather than kept whole.
GATHERS = frozenset(
    ("all_gather", "all_gather_invariant", "all_gather_reduced")
)
COLLECTIVES = frozenset(
    (
        "psum",
        "pmax",
        "pmin",
        "ppermute",
        "pbroadcast",
        "all_to_all",
        "ragged_all_to_all",
        "psend",
        "precv",
        "all_gather",
        "all_gather_invariant",
        "all_gather_reduced",
        "unreduced_psum",
        "unreduced_reduce_scatter",
        "reduce_scatter",
        "reduce_scatter_start",
        "reduce_scatter_done",
    )
)

# Operations that cost less than reading their result would.
_CHEAP_NAMES = """
    add sub mul neg abs sign max min square one_minus_square integer_pow add_any and or
    not xor select_n clamp eq ne lt le gt ge convert_element_type broadcast_in_dim
    reshape squeeze expand_dims iota name stop_gradient copy is_finite population_count
    shift_right_logical bitcast_convert_type reduce_precision pvary"""
_CHEAP = frozenset(_CHEAP_NAMES.split())
# Readers that take cheap results in.
_READER_NAMES = """
    reduce_sum reduce_max div sqrt rsqrt exp log log2 tanh logistic erf pow"""
_FUSES = _CHEAP | frozenset(_READER_NAMES.split())
# What shares the memory of its operand.
_VIEWS = frozenset(
    ("reshape", "squeeze", "expand_dims", "name", "stop_gradient", "copy")
)
_FREE = _VIEWS | {"broadcast_in_dim"}
# Operations that a compiler repeats in the backward pass rather than save their result.
_FUSED_AGAIN = 2


def work(jaxpr: _jaxpr.Jaxpr, rates: Rates) -> float:
    """Return the time of running the jaxpr once, in floating-point operations."""
    return _flops.flops(jaxpr) + _traffic(jaxpr, rates)


def _traffic(jaxpr: _jaxpr.Jaxpr, rates: Rates) -> float:
    """Return the time of the bytes that are written and sent."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = list(_jaxpr.sub_jaxprs(eqn))
        name = _jaxpr.primitive(eqn)
        if name == "scan":
            length = _jaxpr.scan_parts(eqn).length
            total += length * _traffic(inner[0], rates)
        elif inner and not name.startswith(("reduce", "scatter", "sort")):
            # Whichever branch writes most.
            total += max(_traffic(body, rates) for body in inner)
        else:
            rate = rates.network if name in COLLECTIVES else rates.memory
            total += rate * _jaxpr.output_bytes(eqn)
    return total


def live_bytes(jaxpr: _jaxpr.Jaxpr) -> np.ndarray:
    """Return the bytes of intermediates alive while each equation runs.

    Inputs do not count. Shape: float64 [equations].
    """
    n = len(jaxpr.eqns)
    last_read: dict[Any, int] = dict.fromkeys(variables_of(jaxpr.outvars), n)
    # What a reader needs in memory, or the caller.
    is_written = set(last_read)
    born: dict[Any, int] = {}
    inside = np.zeros(n)
    # Backwards: a fused result lets its operands live until its readers run.
    for i in reversed(range(n)):
        eqn = jaxpr.eqns[i]
        name = _jaxpr.primitive(eqn)
        out: Any = eqn.outvars[0] if eqn.outvars else None
        is_view = name in _VIEWS and out in last_read
        # Several readers do not prevent it: each computes a cheap result itself.
        is_fused = name in _CHEAP and out in last_read and out not in is_written
        operands = variables_of(eqn.invars)
        if name not in _FUSES or (is_view and out in is_written):
            is_written.update(operands)
        until = last_read[out] if is_view or is_fused else i
        for v in operands:
            last_read[v] = max(last_read.get(v, -1), until)
        # Bodies do not run at once: the largest counts.
        inner = map(peak_live, _jaxpr.sub_jaxprs(eqn))
        inside[i] = max(inner, default=0)
        if not (is_view or is_fused):
            born |= dict.fromkeys(eqn.outvars, i)
    return _alive(jaxpr, born, last_read) + inside


def _alive(
    jaxpr: _jaxpr.Jaxpr,
    born: Mapping[Any, int],
    last_read: Mapping[Any, int],
) -> np.ndarray:
    """Return the bytes alive while each equation runs: float64 [equations]."""
    n = len(jaxpr.eqns)
    change = np.zeros(n + 1)
    # {equation: bytes of a result that may take the place of an operand}
    in_place: dict[int, int] = {}
    for v, i in born.items():
        change[i] += var_bytes(v)
        if _jaxpr.primitive(jaxpr.eqns[i]) in _FUSES:
            in_place[i] = var_bytes(v)
    for v, first in born.items():
        last = last_read.get(v, first)
        end = min(last + 1, n)
        if first < last < n and in_place.get(last) == var_bytes(v):
            end = last
            # There is one result to take one place.
            del in_place[last]
        change[end] -= var_bytes(v)
    return np.cumsum(change)[:-1]


def peak_live(jaxpr: Any) -> float:
    """Return the largest of `live_bytes`."""
    return float(live_bytes(jaxpr).max(initial=0))


def written_bytes(
    jaxpr: _jaxpr.Jaxpr,
    residuals: Iterable[Any],
    outs: Sequence[Any],
) -> float:
    """Return the bytes of the residuals that are not in memory in any case.

    What a few cheap operations compute for the backward pass alone is computed there.
    What the forward pass reads too has several readers and is written.

    Args:
      jaxpr: the forward pass, with the residuals among its results.
      residuals: some of its variables.
      outs: its results, which stay in memory.
    """
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    alone = _jaxpr.prune(_jaxpr.build((), inputs, outs, jaxpr.eqns))
    in_forward = set(_jaxpr.computed_variables(alone.eqns))
    # {variable: how many operations away from something in memory}
    distance: dict[Any, int] = dict.fromkeys([*variables_of(outs), *inputs], 0)
    waiting = set(residuals)
    total = 0.0
    for eqn in jaxpr.eqns:
        name = _jaxpr.primitive(eqn)
        operands = variables_of(eqn.invars)
        is_free = name in _FREE
        is_fused = name in _CHEAP and in_forward.isdisjoint(eqn.outvars)
        if (is_free or is_fused) and all(v in distance for v in operands):
            steps = max((distance[v] for v in operands), default=0)
            steps += not is_free
            if steps <= _FUSED_AGAIN:
                distance |= dict.fromkeys(eqn.outvars, steps)
        for v in waiting.intersection(eqn.outvars) - distance.keys():
            total += var_bytes(v)
            distance[v] = 0
    return total
