"""Plan which activations to recompute, so that the compiled program meets a budget of bytes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _integers, _jaxpr
from jaxtricks._arguments import checked
from jaxtricks._partition import positional, without_changes
from jaxtricks.remat import _memory, _plan, budget, flat, target
from jaxtricks.remat._plan import Plan
from jaxtricks.remat.search import Figures, Problem, Search

Wrt = Literal["peak", "temp"]


@checked
def plan(
    fn: Callable[..., Any],
    *args: Any,
    budget_bytes: int | float | str,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    within: Callable[[Callable[..., Any]], Any] | None = None,
    wrt: Wrt = "peak",
    max_compiles: int = 6,
    topology: str | None = None,
) -> Plan:
    """A loss function that meets a budget of bytes, at the least recomputation found.

    fn is traced and cut into a chain of stages; options of each stage are priced from its own
    derivative; a dynamic programme nests them; the result is compiled, its bytes are read from the
    compiler's buffer assignment, and the search goes on until the budget is met closely. A program that
    the compiler refuses, since the machine has less memory, counts as one that does not fit.

    Args:
      fn: the scalar loss, forward only, of pytrees of arrays.
      *args: its arguments: arrays or ShapeDtypeStructs; nothing is run.
      budget_bytes: bytes, "4GiB", or a float up to 1: that fraction of the unplanned figure.
      argnums: what is differentiated.
      has_aux: fn returns (loss, anything).
      within: given fn, returns the jitted step that is measured in place of jit(value_and_grad(fn)):
        a jitted function of the same arguments, or (jitted function, its arguments), with optimizer,
        donation and shardings of your own.
      wrt: "peak" is arguments + results - aliases + temporaries; "temp" temporaries alone.
      max_compiles: how many programs may be compiled after the unplanned one.
      topology: plan for a TPU that is not attached, say "v5e:2x2" (its first chip, but for shapes
        with a sharding of their own, as a step of `within` on a mesh of it needs); needs libtpu.

    Returns:
      Plan: `fn` is a drop-in to differentiate and jit; `describe()`, `to_json()`.

    Raises:
      BudgetInfeasible: with `best`, the smallest figure reached.
      ValueError: fn has effects or no float scalar, nothing differentiable, or changes an argument in
        place (a flax.nnx module with statistics: `jaxtricks.nnx.plan`).

    Example:
      >>> def loss(ws, x):
      ...     for w in ws:
      ...         x = jnp.tanh(x @ w)
      ...     return (x**2).mean()
      >>> ws, x = [jnp.eye(32)] * 16, jnp.ones((1024, 32))
      >>> found = plan(loss, ws, x, budget_bytes=0.5, wrt="temp")
      >>> found.peak <= found.baseline / 2
      True
    """
    if wrt not in ("peak", "temp"):
        raise ValueError(f'wrt must be "peak" or "temp", not {wrt!r}')
    budget.parse(budget_bytes, 1)  # a mistake in it is known before anything is compiled
    argnums = _integers.plain(argnums)
    wanted = _integers.positions(argnums, len(args))
    program = _checked(fn, args, wanted, argnums, has_aux)
    problem = Problem.of(program.jaxpr, _varied(args, wanted), target.platform(topology))
    measured = functools.partial(
        _measured,
        within=within,
        args=args,
        topology=topology,
        argnums=argnums,
        has_aux=has_aux,
    )
    unplanned = measured(fn)
    # What the compiler refused has no arguments counted: those of a step without activations are equal.
    counted = measured(_idle(fn)) if unplanned.refused and wrt == "peak" else unplanned
    fixed = counted.report.peak - counted.report.temp if wrt == "peak" else 0
    asked = budget.parse(budget_bytes, fixed + unplanned.report.temp)
    search = Search(
        problem.solution,
        lambda schedule: measured(problem.recipe(schedule).applied(fn)),
        unplanned,
        max_compiles,
    )
    best = search.best(asked - fixed)
    if best.figures.refused or best.figures.report.temp > asked - fixed:
        raise budget.BudgetInfeasible(asked, best.figures.report.temp + fixed, fixed, wrt)
    recipe, solution = problem.recipe(best.schedule), problem.solution
    base = unplanned.report.flops
    report, tried = best.figures.report, [t.figures.report for t in search.tried]
    return Plan(
        fn=recipe.applied(fn),
        peak=report.temp + fixed,
        baseline=unplanned.report.temp + fixed,
        extra_flops=report.flops / base - 1,
        budget=asked,
        wrt=wrt,
        recipe=recipe,
        report=report,
        unplanned=unplanned.report,
        compiles=len(tried),
        tried=tuple((r.temp + fixed, r.flops / base - 1) for r in tried),
        frontier=np.stack([solution.memory + fixed, solution.extra / solution.step], 1),
        timeline=(unplanned.alive(), best.figures.alive()),
        rows=_plan.rows(problem.stages, best.schedule),
        unknown=dict(_memory.unknown(unplanned.jaxpr.jaxpr)),
    )


@checked
def auto_remat(
    fn: Callable[..., Any], budget_bytes: int | float | str, **settings: Any
) -> Callable[..., Any]:
    """fn, planned at its first call with each signature.

    Args:
      fn: the scalar loss; what it closes over must not be traced.
      budget_bytes, **settings: of `plan`.

    Returns:
      A function to differentiate and jit; inside jit only shapes are seen, not shardings.

    Example:
      >>> loss = auto_remat(lambda w, x: jnp.sin(x @ w).sum(), "1MB")
      >>> jax.grad(loss)(jnp.eye(2), jnp.eye(2)).shape
      (2, 2)
    """
    found: dict[Any, Plan] = {}
    checked = without_changes(fn, "auto_remat")

    @functools.wraps(fn)
    def planned(*args: Any, **kwargs: Any) -> Any:
        args = positional(fn, args, kwargs, "remat.auto_remat")
        shapes = jax.tree.map(target.shape, args)
        leaves, structure = jax.tree.flatten(shapes)
        signature = structure, tuple((x.shape, x.dtype, x.weak_type) for x in leaves)
        if signature not in found:
            found[signature] = plan(checked, *shapes, budget_bytes=budget_bytes, **settings)
        return found[signature].fn(*args)

    return planned


def _measured(
    fn: Callable[..., Any], *, within: Any, args: Any, topology: str | None, **grad: Any
) -> Figures:
    """The program around a loss function, compiled."""
    step = jax.jit(jax.value_and_grad(fn, **grad)) if within is None else within(fn)
    if isinstance(step, tuple):
        step, args = step
    traced = target.trace(step, args, topology)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler refuses what exceeds its memory
        refused = _memory.refusal(error, traced.jaxpr)
        if refused is None:
            raise
        return Figures(refused, traced.jaxpr, refused=True)
    return Figures(_memory.report(compiled, traced.jaxpr), traced.jaxpr)


def _idle(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes all arguments of fn and returns what fn does, and has no activations."""

    def idle(*args: Any) -> Any:
        numbers = [x for x in jax.tree.leaves(args) if jnp.issubdtype(x.dtype, jnp.number)]
        total = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in numbers if x.size)
        outs = jax.eval_shape(fn, *args)
        return jax.tree.map(lambda out: jnp.full(out.shape, total).astype(out.dtype), outs)

    return idle


def _checked(
    fn: Callable[..., Any],
    args: Any,
    wanted: Sequence[int],
    argnums: int | tuple[int, ...],
    has_aux: bool,
) -> _jaxpr.ClosedJaxpr:
    """The program of fn, inlined; ValueError for what cannot be planned."""
    closed, structure = _jaxpr.trace(without_changes(fn, "plan"), *args)
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        raise ValueError("fn closes over traced values: pass them as arguments")
    outs = jax.tree.unflatten(structure, closed.out_avals)
    loss = outs[0] if has_aux and isinstance(outs, tuple) and outs else outs
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"fn must return {'(loss, aux) with ' if has_aux else ''}one float scalar, the loss, not "
            f"{jax.tree.map(lambda a: a.str_short(), outs)}: take a mean or a sum inside"
        )
    if not closed.eqns:
        raise ValueError("fn returns one of its arguments as it is: there is nothing to recompute")
    leaves = jax.tree.leaves([args[i] for i in wanted])
    if not any(jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact) for x in leaves):
        raise ValueError(
            f"argnums={argnums} holds no float array: name the arguments to differentiate, the parameters"
        )
    effects = [str(e) for e in closed.effects if type(e).__name__ != "NamedAxisEffect"]
    if effects:
        raise ValueError(
            f"fn has side effects ({', '.join(effects)}) that recomputation would run twice: move them "
            "out of the loss, into its aux output say"
        )
    return flat.straight(closed)


def _varied(args: Any, wanted: Sequence[int]) -> list[bool]:
    """Which leaves of the arguments are differentiated."""
    return [i in wanted for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
