"""Estimate what programs and the options of a stage cost, before a compiler sees them.

Time is in floating-point operations, memory in live bytes. A compiler fuses elementwise
operations into what reads them. The counts here do so in the simplest way: a cheap
result with one reader that can take it in is never written, and its operands live until
then.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _flops, _jaxpr
from jaxtricks._jaxpr import shape_of, var_bytes, variables_of
from jaxtricks.remat import _schedule
from jaxtricks.remat._schedule import Run
from jaxtricks.remat._stages import Option, Stage

# Operations that a machine does in the time of one byte of memory traffic; fusion
# spares accelerators most of the traffic that an unfused count sees.
FLOPS_PER_BYTE = {"cpu": 1.0, "gpu": 10.0, "tpu": 30.0}

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


def work(jaxpr: _jaxpr.Jaxpr, flops_per_byte: float) -> float:
    """Return the time of running the jaxpr once, in floating-point operations."""
    return _flops.flops(jaxpr) + flops_per_byte * _bytes_written(jaxpr)


def _bytes_written(jaxpr: _jaxpr.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = list(_jaxpr.sub_jaxprs(eqn))
        name = _jaxpr.primitive(eqn)
        if name == "scan":
            length = _jaxpr.scan_parts(eqn).length
            total += length * _bytes_written(inner[0])
        elif inner and not name.startswith(("reduce", "scatter", "sort")):
            # Whichever branch writes most.
            total += max(map(_bytes_written, inner))
        else:
            total += _jaxpr.output_bytes(eqn)
    return total


def live_bytes(jaxpr: _jaxpr.Jaxpr) -> np.ndarray:
    """Return the bytes of intermediates alive while each equation runs.

    Inputs do not count. Shape: float64 [equations].
    """
    n = len(jaxpr.eqns)
    readers: Counter[Any] = Counter()
    for eqn in jaxpr.eqns:
        readers.update(variables_of(eqn.invars))
    last_read: dict[Any, int] = dict.fromkeys(variables_of(jaxpr.outvars), n)
    reader: dict[Any, str] = {}
    change = np.zeros(n + 1)
    inside = np.zeros(n)
    # Backwards: a fused result lets its operands live until its reader runs.
    for i in reversed(range(n)):
        eqn = jaxpr.eqns[i]
        name = _jaxpr.primitive(eqn)
        out: Any = eqn.outvars[0] if eqn.outvars else None
        is_fused = name in _VIEWS and out in last_read
        if name in _CHEAP and readers[out] == 1 and last_read[out] < n:
            is_fused |= reader[out] in _FUSES
        until = last_read[out] if is_fused else i
        for v in variables_of(eqn.invars):
            last_read[v] = max(last_read.get(v, -1), until)
            reader[v] = name
        # Bodies do not run at once: the largest counts.
        inner = map(peak_live, _jaxpr.sub_jaxprs(eqn))
        inside[i] = max(inner, default=0)
        if is_fused:
            continue
        for v in eqn.outvars:
            nbytes = var_bytes(v)
            change[i] += nbytes
            dead = last_read.get(v, i) + 1
            change[min(dead, n)] -= nbytes
    alive = np.cumsum(change)
    return alive[:-1] + inside


def peak_live(jaxpr: Any) -> float:
    """Return the largest of `live_bytes`."""
    return float(live_bytes(jaxpr).max(initial=0))


def written_bytes(
    jaxpr: _jaxpr.Jaxpr,
    residuals: Iterable[Any],
    available: Iterable[Any],
) -> float:
    """Return the bytes of the residuals that a compiler would write out.

    What few cheap operations compute from other residuals is computed again instead.

    Args:
      jaxpr: the program that computes them.
      residuals: some of its variables.
      available: variables that are in memory in any case.
    """
    waiting = set(residuals)
    total = 0.0
    # {variable: how many operations away from something in memory}
    distance: dict[Any, int] = dict.fromkeys(
        [*available, *jaxpr.invars, *jaxpr.constvars], 0
    )
    for eqn in jaxpr.eqns:
        name = _jaxpr.primitive(eqn)
        operands = variables_of(eqn.invars)
        if name in _CHEAP and all(v in distance for v in operands):
            steps = max((distance[v] for v in operands), default=0)
            steps += name not in _FREE
            if steps <= _FUSED_AGAIN:
                distance |= dict.fromkeys(eqn.outvars, steps)
        for v in waiting.intersection(eqn.outvars) - distance.keys():
            total += var_bytes(v)
            distance[v] = 0
    return total


# The options of a stage, measured on the trace of its derivative.


_PRODUCTS = ("dot_general", "conv_general_dilated")
_MAX_SETS = 6  # how many sets of saved products are tried
_MAX_PRODUCTS = 12  # and how many products alone
_MAX_SPLITS = 3  # ways to nest a scan

Measure = Callable[[tuple[int, ...] | None, int], Option]
"""(saved, outer) -> the option, its `extra` still all operations of both passes."""


def with_costs(
    stage: Stage,
    varied: Sequence[bool],
    flops_per_byte: float,
) -> Stage:
    """Return the stage with its options, each measured on the trace of its derivative.

    Args:
      stage: the stage.
      varied: which of its inputs depend on what is differentiated.
      flops_per_byte: see `FLOPS_PER_BYTE`.
    """

    @functools.cache
    def measure(saved: tuple[int, ...] | None, outer: int) -> Option:
        return _measured(
            stage.jaxpr,
            saved,
            outer,
            varied,
            flops_per_byte,
        )

    jaxpr = stage.jaxpr
    everything = measure(None, 0)
    options = [everything]
    if not stage.has_collective:
        options += _saving(measure, _products(jaxpr), 0)
        loop = _schedule.largest_scan(jaxpr)
        if loop is not None:
            body = _schedule.scan_body(loop).jaxpr
            for outer in _splits(_jaxpr.scan_parts(loop).length):
                if outer > 1:
                    options.append(measure(None, outer))
                options += _saving(measure, _products(body), outer)
    relative = []
    for option in options:
        extra = max(0.0, option.extra - everything.extra)
        relative.append(dataclasses.replace(option, extra=extra))
    return dataclasses.replace(
        stage,
        options=tuple(_undominated(relative)),
        forward=math.inf
        if stage.has_collective
        else work(jaxpr, flops_per_byte),
        forward_bytes=peak_live(jaxpr),
    )


def _saving(
    measure: Measure,
    products: Sequence[int],
    outer: int,
) -> list[Option]:
    """Return options that save growing sets of products, the most profitable first.

    The first one saves none. What one product is worth is measured: the last of a block
    is often not read by any derivative.
    """
    bare = measure((), outer)
    worth = {}
    for i in products:
        alone = measure((i,), outer)
        spared = bare.extra - alone.extra
        added = alone.residual_bytes - bare.residual_bytes
        if spared > 0 and added > 0:
            worth[i] = spared / added
    most_worth_first = sorted(worth, key=lambda i: -worth[i])
    options = [bare]
    step = max(1, len(worth) // _MAX_SETS)
    for n in range(1, len(worth) + 1, step):
        saved = tuple(sorted(most_worth_first[:n]))
        options.append(measure(saved, outer))
    return options


def _splits(length: int) -> list[int]:
    """Return lengths of the outer of two loops; 1 leaves one, its body recomputed."""
    divisors = [d for d in range(2, length) if length % d == 0]
    # Two loops of equal length save the fewest carries.
    nearest_to_root = sorted(
        divisors, key=lambda d: abs(math.log(d / math.sqrt(length)))
    )
    return [1, *nearest_to_root[:_MAX_SPLITS]]


def _products(jaxpr: _jaxpr.Jaxpr) -> list[int]:
    """Return the indices of the products with most arithmetic per byte of result."""

    def intensity(i: int) -> float:
        eqn = jaxpr.eqns[i]
        return _flops.eqn_flops(eqn) / max(1, _jaxpr.output_bytes(eqn))

    products = [
        i
        for i, eqn in enumerate(jaxpr.eqns)
        if _jaxpr.primitive(eqn) in _PRODUCTS
    ]
    return sorted(products, key=lambda i: -intensity(i))[:_MAX_PRODUCTS]


def _measured(
    jaxpr: _jaxpr.Jaxpr,
    saved: tuple[int, ...] | None,
    outer: int,
    varied: Sequence[bool],
    flops_per_byte: float,
) -> Option:
    """Trace both passes of a stage that runs this way, and count."""
    fn = _schedule.run_stage(jaxpr, Run(0, saved, outer))
    shapes = [shape_of(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    argnums = [
        i
        for i, x in enumerate(shapes)
        if varied[i] and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    structure: Any = None

    def forward(*xs: Any) -> tuple[Any, Any]:
        nonlocal structure

        def of_varied(*ys: Any) -> Any:
            arguments = list(xs)
            for i, y in zip(argnums, ys, strict=True):
                arguments[i] = y
            return fn(*arguments)

        outs, pullback = jax.vjp(of_varied, *[xs[i] for i in argnums])
        residuals, structure = jax.tree.flatten(pullback)
        return outs, residuals

    def backward(residuals: Any, cotangents: Any) -> Any:
        return jax.tree.unflatten(structure, residuals)(cotangents)

    first = _jaxpr.live(jax.make_jaxpr(forward)(*shapes))
    outputs = len(jaxpr.outvars)
    outs, residuals = first.outvars[:outputs], first.outvars[outputs:]
    residual_bytes = written_bytes(
        first, variables_of(residuals), variables_of(outs)
    )
    residual_shapes = list(map(shape_of, residuals))
    cotangent_shapes = list(map(shape_of, outs))
    second = _jaxpr.live(
        jax.make_jaxpr(backward)(residual_shapes, cotangent_shapes)
    )
    total = work(first, flops_per_byte) + work(second, flops_per_byte)
    return Option(
        saved,
        outer,
        residual_bytes,
        total,
        peak_live(second),
    )


def _undominated(options: Sequence[Option]) -> list[Option]:
    best: list[Option] = []
    for o in sorted(
        options, key=lambda o: (o.residual_bytes, o.extra, o.backward_bytes)
    ):
        if not any(_beats(other, o) for other in best):
            best = [*(other for other in best if not _beats(o, other)), o]
    return best


def _beats(a: Option, b: Option) -> bool:
    # The transient counts: splits of a scan differ in nothing else.
    return (
        a.residual_bytes <= b.residual_bytes
        and a.extra <= b.extra
        and a.residual_bytes + a.backward_bytes
        <= b.residual_bytes + b.backward_bytes
    )
