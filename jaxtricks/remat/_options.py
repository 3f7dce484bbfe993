"""Find the ways to run a stage and what each costs, from one trace of its derivative.

Saving a set of products means that the backward pass computes everything else again
that it reads. Which equations those are follows from the two passes of the stage that
saves everything: they are traced once, and every option is counted on them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _flops, _jaxpr
from jaxtricks._jaxpr import shape_of, var_bytes, variables_of
from jaxtricks.remat import _schedule
from jaxtricks.remat._costs import Rates, peak_live, work, written_bytes
from jaxtricks.remat._host_memory import HostMemory
from jaxtricks.remat._schedule import Run
from jaxtricks.remat._stages import Option, Stage

_MAX_SETS = 6  # how many sets of saved products are tried
_MAX_PRODUCTS = 12  # and how many products alone
_MAX_SPLITS = 3  # ways to nest a scan

Measure = Callable[[tuple[int, ...] | None], Option]
"""saved -> the option, its `extra` still all operations of both passes."""


def with_costs(
    stage: Stage,
    varied: Sequence[bool],
    rates: Rates,
    host: HostMemory | None,
) -> Stage:
    """Return the stage with its options.

    Args:
      stage: the stage.
      varied: which of its inputs depend on what is differentiated.
      rates: see `_costs.RATES`.
      host: the memory to offload to; None if there is none.
    """
    jaxpr = stage.jaxpr
    forward = work(jaxpr, rates)
    passes = _traced(jaxpr, Run(0), varied)
    measure = functools.cache(_counted(passes, Run(0), rates))
    everything = measure(None)
    options = [everything]
    if not stage.runs_once:
        products = _products(jaxpr)
        whole = _saving(measure, products)
        options += whole
        if _schedule.has_parts(jaxpr):
            run = Run(0, in_parts=True)
            in_parts = _counted(_traced(jaxpr, run, varied), run, rates)
            # Which products are worth most is known by now.
            options += [in_parts(option.saved) for option in whole]
        loop = _schedule.largest_scan(jaxpr)
        if loop is not None:
            options += _of_scan(stage, loop, varied, rates, host)
    relative = []
    for option in options:
        extra = max(0.0, option.extra - everything.extra)
        relative.append(dataclasses.replace(option, extra=extra))
    return dataclasses.replace(
        stage,
        options=tuple(_undominated(relative)),
        forward=math.inf if stage.runs_once else forward,
        forward_bytes=peak_live(jaxpr),
    )


def _of_scan(
    stage: Stage,
    loop: Any,
    varied: Sequence[bool],
    rates: Rates,
    host: HostMemory | None,
) -> list[Option]:
    """Return the options that split the largest scan of a stage in two loops."""
    body = _schedule.scan_body(loop).jaxpr
    products = _products(body)
    length = _jaxpr.scan_parts(loop).length
    options = []
    for outer in _splits(length):

        @functools.cache
        def measure(
            saved: tuple[int, ...] | None,
            outer: int = outer,
        ) -> Option:
            # What is saved is inside the loop: each set is another program.
            run = Run(0, saved, outer)
            passes = _traced(stage.jaxpr, run, varied)
            return _counted(passes, run, rates)(None)

        if outer > 1:
            options.append(measure(None))
        options += _saving(measure, products)
    if host is not None:
        forward = work(stage.jaxpr, rates)
        stacked = [length * _jaxpr.output_bytes(eqn) for eqn in body.eqns]
        options += _offloaded(options, stacked, length, forward, rates, host)
    return options


def _offloaded(
    options: Sequence[Option],
    stacked: Sequence[int],
    length: int,
    forward: float,
    rates: Rates,
    host: HostMemory,
) -> list[Option]:
    """Return the options with what they save in the memory of the host.

    Only of loops: in straight code libtpu 0.0.50 keeps the original of every copy, and
    brings all of them back at once, so that the device needs more memory than without.

    The copies run beside the computation of the stage, forwards once and backwards about
    twice as long; what takes longer delays the step. They also pass through the memory
    of the device once each way.

    Args:
      options: the ways to split a loop, which save growing sets of products.
      stacked: bytes of the results of each equation of its body, of all steps.
      length: steps of the loop.
      forward: operations of one forward pass of the stage.
      rates: see `_costs.RATES`.
      host: the price of a byte.
    """
    offloaded = []
    for option in options:
        largest_first = sorted(option.saved or (), key=lambda i: -stacked[i])
        for n in range(1, len(largest_first) + 1):
            moved = largest_first[:n]
            nbytes = float(sum(stacked[i] for i in moved))
            one_way = nbytes * host.flops_per_byte
            delay = max(0.0, one_way - forward)
            delay += max(0.0, one_way - 2 * forward)
            offloaded.append(
                dataclasses.replace(
                    option,
                    offload=tuple(sorted(moved)),
                    residual_bytes=max(0.0, option.residual_bytes - nbytes),
                    host_bytes=nbytes,
                    extra=option.extra + delay + 2 * rates.memory * nbytes,
                    # They come back for one step of the loop at a time.
                    backward_bytes=option.backward_bytes + nbytes / length,
                )
            )
    return offloaded


def _saving(
    measure: Measure,
    products: Sequence[int],
) -> list[Option]:
    """Return options that save growing sets of products, the most profitable first.

    The first one saves none. What one product is worth is measured: the last of a block
    is often not read by any derivative.
    """
    bare = measure(())
    worth = {}
    for i in products:
        alone = measure((i,))
        spared = bare.extra - alone.extra
        added = alone.residual_bytes - bare.residual_bytes
        if spared > 0 and added > 0:
            worth[i] = spared / added
    most_worth_first = sorted(worth, key=lambda i: -worth[i])
    options = [bare]
    step = max(1, len(worth) // _MAX_SETS)
    for n in range(1, len(worth) + 1, step):
        saved = tuple(sorted(most_worth_first[:n]))
        options.append(measure(saved))
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

    products = _schedule.products(jaxpr)
    return sorted(products, key=lambda i: -intensity(i))[:_MAX_PRODUCTS]


# Both passes of a stage.


class _Passes(NamedTuple):
    """Both passes of a stage that saves all that its derivative needs.

    Attributes:
      forward: inputs -> (outs, residuals, results of the products).
      backward: (residuals, cotangents) -> gradients.
      outputs: how many outs there are.
      residuals: variables of `forward`.
      results: {index of a product in the stage: variable of `forward`}.
    """

    forward: _jaxpr.Jaxpr
    backward: _jaxpr.Jaxpr
    outputs: int
    residuals: list[Any]
    results: dict[int, Any]


def _traced(
    jaxpr: _jaxpr.Jaxpr,
    run: Run,
    varied: Sequence[bool],
) -> _Passes:
    """Trace both passes of a stage that runs this way."""
    indices = [] if run.outer else _schedule.products(jaxpr)
    fn = _schedule.with_results(jaxpr, run, indices)
    outputs = len(jaxpr.outvars)
    shapes = [shape_of(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    argnums = [
        i
        for i, x in enumerate(shapes)
        if varied[i] and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    structure: Any = None

    def forward(*xs: Any) -> tuple[Any, ...]:
        nonlocal structure

        def of_varied(*ys: Any) -> tuple[Any, Any]:
            arguments = list(xs)
            for i, y in zip(argnums, ys, strict=True):
                arguments[i] = y
            results = fn(*arguments)
            return results[:outputs], results[outputs:]

        outs, pullback, results = jax.vjp(
            of_varied, *[xs[i] for i in argnums], has_aux=True
        )
        residuals, structure = jax.tree.flatten(pullback)
        return outs, residuals, results

    def backward(residuals: Any, cotangents: Any) -> Any:
        return jax.tree.unflatten(structure, residuals)(cotangents)

    first = _jaxpr.live(jax.make_jaxpr(forward)(*shapes))
    computed = len(first.outvars) - len(indices)
    outs, residuals = first.outvars[:outputs], first.outvars[outputs:computed]
    second = _jaxpr.live(
        jax.make_jaxpr(backward)(
            list(map(shape_of, residuals)), list(map(shape_of, outs))
        )
    )
    results = dict(zip(indices, first.outvars[computed:], strict=True))
    return _Passes(first, second, outputs, residuals, results)


def _counted(
    passes: _Passes,
    run: Run,
    rates: Rates,
) -> Measure:
    """Return the function that counts what a stage costs that saves some products."""
    forward, backward, outputs, residuals, results = passes
    outs = forward.outvars[:outputs]
    inputs = (*forward.constvars, *forward.invars)

    def without(saved: Sequence[Any], needed: Sequence[Any]) -> _jaxpr.Jaxpr:
        """Return what of the forward pass computes these variables from the saved."""
        eqns = [
            eqn
            for eqn in forward.eqns
            if not any(v in saved for v in eqn.outvars)
        ]
        return _jaxpr.prune(_jaxpr.build((), (*inputs, *saved), needed, eqns))

    def measure(saved: tuple[int, ...] | None) -> Option:
        if saved is None:
            first = without((), [*outs, *residuals])
            second = backward
            nbytes = written_bytes(first, variables_of(residuals), outs)
        else:
            values = list({results[i]: None for i in saved})
            first = without((), [*outs, *values])
            again = without(values, residuals)
            second = _jaxpr.prune(_jaxpr.followed_by(again, backward))
            nbytes = sum(float(var_bytes(v)) for v in values if v not in outs)
        total = work(first, rates) + work(second, rates)
        return Option(
            run.saved if run.outer else saved,
            run.outer,
            run.in_parts,
            residual_bytes=nbytes,
            extra=total,
            backward_bytes=peak_live(second),
        )

    return measure


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
