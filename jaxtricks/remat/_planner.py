"""Plan a loss for a budget of bytes.

`plan` cuts and costs the program, solves for the frontier of schedules, and compiles
candidates of it (and what people write manually) until one fits.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import numpy as np

from jaxtricks import _flops, _integers
from jaxtricks._arguments import checked
from jaxtricks._partition import positional, without_changes
from jaxtricks.remat import _batches, _cache, _memory, _plan
from jaxtricks.remat._batches import Batch, Largest, Size
from jaxtricks.remat._bound import gap
from jaxtricks.remat._budgets import Budget, BudgetInfeasible, parse_budget
from jaxtricks.remat._host_memory import host_memory
from jaxtricks.remat._plan import Plan
from jaxtricks.remat._program import Program, Settings
from jaxtricks.remat._search import Search
from jaxtricks.remat._trial import Trial

P = ParamSpec("P")
R = TypeVar("R")
Wrt = Literal["peak", "temp"]


@checked
def plan(
    fn: Callable[P, R],
    *args: Any,
    budget_bytes: Budget,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    within: Callable[..., Any] | None = None,
    wrt: Wrt = "peak",
    max_compiles: int = 6,
    topology: str | None = None,
    host_bandwidth: float | None = None,
    batch: Batch | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    batch_step: int = 1,
    max_extra_flops: float = 0.5,
    cache: str | pathlib.Path | None = None,
) -> Plan[P, R]:
    """Make a loss function meet a budget of bytes, with little recomputation.

    fn is traced and cut into a chain of stages; options of each stage are costed from
    the derivative of the stage; a dynamic programme nests them; the result is compiled,
    its bytes are read from the compiler's buffer assignment, and the search goes on
    until the budget is met closely. A program that the compiler refuses, since the
    machine has less memory, counts as one that does not fit.

    What the backward pass needs is kept, computed again, or, on chips beside a host
    whose memory they reach, copied there and back while the chip computes. The last
    pays where much is computed per byte: wide layers and long steps.

    Args:
      fn: the scalar loss, forward only, of pytrees of arrays.
      *args: its arguments: arrays or ShapeDtypeStructs; nothing is run.
      budget_bytes: bytes, "4GiB", or a float up to 1: that fraction of the unplanned
        figure.
      argnums: what is differentiated.
      has_aux: fn returns (loss, anything).
      within: takes a loss and returns the jitted step that is measured in place of
        jit(value_and_grad(fn)): a jitted function of the same arguments, or (jitted
        function, its arguments), with your optimizer, donation and shardings. With
        `batch` it is called as within(loss, batch=size).
      wrt: "peak" is arguments + results - aliases + temporaries; "temp" temporaries
        alone. Both are bytes of the device.
      max_compiles: how many programs may be compiled after the unplanned one.
      topology: plan for a TPU that is not attached, say "v5e:2x2" (its first chip,
        except for shapes with a sharding, as a step of `within` on a mesh of it needs);
        needs libtpu, and the variables of `libtpu_environment`.
      host_bandwidth: bytes per second from the chip to the memory of its host, which
        prices what waits there; None takes a table of chips, 0 offloads nothing.
      batch: plan for this size of the batch instead of that of the arguments; for
        several, the largest that fits; "max" searches for the largest that fits, and
        compiles no more than 8 programs.
      batch_argnums: the arguments whose arrays begin with the axis of the batch; None
        is all that are not differentiated.
      batch_step: "max" tries multiples of this.
      max_extra_flops: the most that "max" recomputes, as a fraction of the unplanned
        step's operations.
      cache: a folder for plans: the same program with the same settings is read from it
        instead of planned again.

    Returns:
      Plan: `fn` is a drop-in to differentiate and jit; `describe()`, `to_json()`.

    Raises:
      BudgetInfeasible: with `best`, the smallest figure reached.
      ValueError: fn has effects or no float scalar, nothing differentiable, or changes
        an argument in place (a flax.nnx module with statistics: `jaxtricks.nnx.plan`).

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(ws, x):
      ...     for w in ws:
      ...         x = jnp.tanh(x @ w)
      ...     return (x**2).mean()
      >>> ws, x = [jnp.eye(32)] * 16, jnp.ones((1024, 32))
      >>> planned = plan(loss, ws, x, budget_bytes=0.5, wrt="temp")
      >>> planned.peak <= planned.baseline / 2
      True
    """
    if wrt not in ("peak", "temp"):
        raise ValueError(f'wrt must be "peak" or "temp", not {wrt!r}')
    # A mistake in it is reported before the first trace.
    parse_budget(budget_bytes, 1)
    argnums = _integers.plain(argnums)
    positions = _integers.positions(argnums, len(args))
    settings = Settings(
        fn,
        argnums,
        has_aux,
        within,
        topology,
        host_memory(topology, host_bandwidth),
    )
    if not 0 <= max_extra_flops < np.inf:
        raise ValueError(
            f"max_extra_flops is {max_extra_flops}: give a fraction of the step's "
            "operations, such as 0.5"
        )
    sizes = first = None
    start = 1
    batched: tuple[int, ...] = ()
    if batch is not None:
        sizes = _batches.sizes(batch, batch_step)
        batched = tuple(i for i in range(len(args)) if i not in positions)
        if batch_argnums is not None:
            batched = _integers.positions(
                _integers.plain(batch_argnums), len(args), "batch_argnums"
            )
        start = _batches.size_of(args, batched)
        # The program that the cache knows the loss by, at a size that was asked for.
        first = sizes[0] if sizes else _batches.multiple(start, batch_step)

    @functools.cache
    def program_of(size: int | None) -> Program:
        at_size = args
        if size is not None:
            at_size = _batches.resized(args, batched, size)
        return Program(settings, at_size, positions, size)

    def planned(
        size: int | None,
        first: Trial | None = None,
        compiles: int = max_compiles,
    ) -> Plan[P, R]:
        return _planned(
            settings, program_of(size), budget_bytes, wrt, compiles, first
        )

    folder = None if cache is None else _cache.Cache(cache)
    key = folder and (
        program_of(first).fingerprint(),
        budget_bytes,
        argnums,
        has_aux,
        wrt,
        max_compiles,
        topology,
        host_bandwidth,
        sizes or batch,
        batched,
        batch_step,
        max_extra_flops,
    )
    if folder is not None:
        cached = folder.read(key, fn)
        if cached is not None:
            return cached
    if batch is None:
        result = planned(None)
    elif sizes is not None:
        result = _largest_of(planned, sizes)
    else:
        budget = _absolute(budget_bytes)
        search = Largest(
            program_of, budget, wrt, int(batch_step), max_extra_flops
        )
        size, trial = search.search(start)
        if trial is None:
            raise BudgetInfeasible(budget, search.least(), 0, wrt)
        # The last trial of the search is the first of the plan.
        compiles = _batches.MAX_COMPILES - len(search.tried)
        result = planned(size, trial, compiles)
        result = result.with_sizes(size, search.sizes())
    if folder is not None:
        folder.write(key, result)
    return result


def _absolute(budget_bytes: Budget) -> int:
    """Return the bytes of a budget that is not a fraction.

    Raises:
      ValueError: it is one.
    """
    budget = parse_budget(budget_bytes, 1)
    if budget <= 1:
        raise ValueError(
            f"budget_bytes is {budget_bytes}, a fraction of what the batch of the "
            'arguments needs: give bytes or a size such as "4GiB" with batch="max"'
        )
    return budget


def _largest_of(
    planned: Callable[[int], Plan[P, R]],
    sizes: Sequence[int],
) -> Plan[P, R]:
    """Plan for every size, and return the plan of the largest that fits."""
    best: tuple[int, Plan[P, R]] | None = None
    failure: BudgetInfeasible | None = None
    table = []
    for size in sorted(set(sizes)):
        try:
            result = planned(size)
        except BudgetInfeasible as error:
            failure = error
            table.append(Size(size, error.best, np.nan, np.nan, False))
        else:
            best = size, result
            table.append(
                Size(
                    size,
                    result.peak,
                    result.extra_flops,
                    result.flops / size,
                    True,
                )
            )
    if best is None:
        assert failure is not None
        raise failure
    size, result = best
    return result.with_sizes(size, table)


def _planned(
    settings: Settings,
    program: Program,
    budget_bytes: Budget,
    wrt: Wrt,
    max_compiles: int,
    first: Trial | None,
) -> Plan[..., Any]:
    """Plan one program; `first` is a trial that is known to fit."""
    program.start()
    frontier = program.frontier
    unplanned = program.unplanned
    fixed = 0
    if wrt == "peak":
        fixed = first.fixed if first is not None else program.fixed()
    budget = parse_budget(budget_bytes, fixed + unplanned.temp)
    search = Search(frontier, program.compile, unplanned, max_compiles, first)
    best = search.best(budget - fixed)
    if not best.fits(budget - fixed):
        raise BudgetInfeasible(budget, best.temp + fixed, fixed, wrt)

    schedule = program.schedule(best.steps)
    base = unplanned.report.flops
    expected = [frontier.memory + fixed, frontier.extra / frontier.step]
    trials = [
        (t.temp + fixed, t.report.flops / base - 1) for t in search.trials
    ]
    return Plan(
        fn=schedule.apply(settings.fn),
        peak=best.temp + fixed,
        baseline=unplanned.temp + fixed,
        extra_flops=best.report.flops / base - 1,
        budget=budget,
        wrt=wrt,
        schedule=schedule,
        report=best.report,
        unplanned=unplanned.report,
        compiles=len(trials),
        tried=tuple(trials),
        frontier=np.stack(expected, 1),
        timeline=(unplanned.timeline(), best.timeline()),
        rows=_plan.describe_stages(frontier.stages, best.steps),
        values=_plan.describe_values(frontier, best.steps),
        gap=gap(frontier, best.steps),
        host=best.report.host,
        flops=best.report.flops,
        unknown=dict(_flops.uncounted(unplanned.jaxpr.jaxpr)),
    )


@checked
def auto_remat(
    fn: Callable[P, R],
    budget_bytes: Budget,
    **settings: Any,
) -> Callable[P, R]:
    """Return fn, planned at its first call with each signature.

    Args:
      fn: the scalar loss; it must not close over traced values.
      budget_bytes, **settings: of `plan`.

    Returns:
      A function to differentiate and jit; inside jit it has shapes, but no shardings,
      to plan by.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = auto_remat(lambda w, x: jnp.sin(x @ w).sum(), "1MB")
      >>> jax.grad(loss)(jnp.eye(2), jnp.eye(2)).shape
      (2, 2)
    """
    plans: dict[Any, Plan[..., R]] = {}
    unchanging = without_changes(fn, "auto_remat")

    @functools.wraps(fn)
    def planned(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = positional(fn, args, kwargs, "remat.auto_remat")
        shapes = jax.tree.map(_memory.shape, arguments)
        leaves, structure = jax.tree.flatten(shapes)
        signature = (
            structure,
            tuple((x.shape, x.dtype, x.weak_type) for x in leaves),
        )
        if signature not in plans:
            plans[signature] = plan(
                unchanging,
                *shapes,
                budget_bytes=budget_bytes,
                **settings,
            )
        return plans[signature].fn(*arguments)

    return planned
