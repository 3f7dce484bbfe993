"""What a jaxpr costs before any compiler saw it: time in units of a floating-point operation, live bytes."""

from typing import Any

import numpy as np
from jax.extend.core import Var

from jaxtricks import _jaxpr
from jaxtricks.remat import measure, tie

# Operations that a machine does in the time of one byte of memory traffic; fusion spares accelerators
# most of the traffic that an unfused count sees.
FLOPS_PER_BYTE = {"cpu": 4.0, "gpu": 40.0, "tpu": 60.0}


def work(jaxpr: _jaxpr.Jaxpr, flops_per_byte: float) -> float:
    """Time of running the jaxpr once, in floating-point operations."""
    return measure.flops(jaxpr) + flops_per_byte * _bytes_written(jaxpr)


def _bytes_written(jaxpr: _jaxpr.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = list(_jaxpr.sub_jaxprs(eqn))
        if eqn.primitive.name == "scan":
            total += eqn.params["length"] * _bytes_written(inner[0])
        elif inner and not eqn.primitive.name.startswith(("reduce", "scatter", "sort")):
            total += max(map(_bytes_written, inner))
        else:
            total += sum(map(tie.var_bytes, eqn.outvars))
    return total


def live_bytes(jaxpr: _jaxpr.Jaxpr) -> np.ndarray:
    """Bytes of intermediates alive while each equation runs, inputs and results apart: [equations].

    Every intermediate is counted as written out, so this is above what a fusing compiler needs.
    """
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, Var)}
    last |= dict.fromkeys((v for v in jaxpr.outvars if isinstance(v, Var)), len(jaxpr.eqns))
    change = np.zeros(len(jaxpr.eqns) + 1)
    inside = np.zeros(len(jaxpr.eqns))
    for i, eqn in enumerate(jaxpr.eqns):
        inside[i] = max(map(peak_live, _jaxpr.sub_jaxprs(eqn)), default=0)
        for v in eqn.outvars:
            change[i] += tie.var_bytes(v)
            change[min(last.get(v, i) + 1, len(jaxpr.eqns))] -= tie.var_bytes(v)
    return np.cumsum(change)[:-1] + inside


def peak_live(jaxpr: Any) -> float:
    """The largest of `live_bytes`."""
    return float(live_bytes(jaxpr).max(initial=0))
