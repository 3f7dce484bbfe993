"""Budgets: bytes, text, or a fraction of what the program needs unplanned."""

import dataclasses
import functools
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from jaxtricks import _integers, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._partition import positional, without_changes
from jaxtricks.remat import _memory, _plan, _stages
from jaxtricks.remat._plan import Plan, Recipe
from jaxtricks.remat._solver import Again, Run, Schedule, Solution
from jaxtricks.remat._stages import Choice, Priced

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}


class BudgetInfeasible(ValueError):  # noqa: N818 (reads as what it says)
    """No plan meets the budget.

    Attributes:
      best: the smallest figure that was reached, bytes.
    """

    def __init__(self, budget: int, best: int, fixed: int, wrt: str):
        asked, reached = map(_table.format_bytes, (budget, best))
        if asked == reached:
            asked, reached = f"{budget:,} B", f"{best:,} B"
        why = ""
        if budget < fixed:
            needed = _table.format_bytes(fixed)
            why = f" ({needed} of it are arguments and results, which recomputation cannot shrink)"
        super().__init__(
            f"budget_bytes is {asked} and the smallest {wrt} reached is {reached}{why}: raise the budget "
            "or make the batch smaller"
        )
        self.best = best


_MOST = 2**63
_CURE = 'write bytes, a size such as "4GiB" or "500 MB", or a fraction up to 1'


def parse(budget: int | float | str, unplanned: int) -> int:
    """Bytes of a budget.

    Args:
      budget: bytes, text such as "4GiB" or "500 MB", or a float above 0 and up to 1:
        that fraction of `unplanned`.
      unplanned: bytes.

    Raises:
      ValueError: budget is not positive, is text but not a size, is above 1 and not an
        integer, or is beyond any machine.
    """
    shown = (
        f"{budget!s:.40}"
        if isinstance(budget, str | numbers.Real)
        else type(budget).__name__
    )
    if isinstance(budget, str):
        shown = repr(shown)
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", budget.lower())
        number = _number(found[1]) if found else None
        if found is None or number is None or found[2] not in _UNITS:
            raise ValueError(f"budget_bytes is {shown}: {_CURE}")
        size = number * _UNITS[found[2]]
        budget = int(size) if size < _MOST else _MOST
    if isinstance(budget, np.generic):
        budget = budget.item()
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(f"budget_bytes is {shown}: {_CURE}")
    if not 0 < budget < _MOST:
        raise ValueError(
            f"budget_bytes is {shown}, not above 0 and below 2**63: {_CURE}"
        )
    if isinstance(budget, numbers.Integral):
        return int(budget)
    budget = float(budget)
    if budget > 1 and budget % 1:
        raise ValueError(f"budget_bytes is {shown}: {_CURE}")
    return int(budget * unplanned) if budget <= 1 else int(budget)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# What people write by hand, as schedules: candidates beside the model's own.


def schedules(solution: Solution) -> Iterator[Schedule]:
    """Products kept and the rest recomputed; every stage recomputed; sqrt(n) groups; binary recursion."""
    n = len(solution.prices)
    yield _products_kept(solution.prices)
    size = math.isqrt(n - 1) + 1
    groups = [range(a, min(a + size, n)) for a in range(0, n, size)]
    yield tuple(Again(tuple(map(_kept, group))) for group in groups[:-1]) + tuple(
        map(_kept, groups[-1])
    )
    yield _halves(0, n)


def _kept(i: int) -> Run:
    return Run(i, Choice())


def _products_kept(prices: Sequence[Priced]) -> Schedule:
    """The cheap-operation rule of Chen et al., section 4.2: drop what costs little to make again."""

    def most_saved(i: int) -> Choice:
        saving = [o for o in prices[i].options if o.choice.saved and not o.choice.outer]
        return (
            max(saving, key=lambda o: len(o.choice.saved or ())).choice
            if saving
            else Choice()
        )

    steps: list[Run | Again] = []
    runs = itertools.groupby(
        range(len(prices)), key=lambda i: most_saved(i) == Choice()
    )
    for bare, group in runs:
        run = tuple(Run(i, most_saved(i)) for i in group)
        whole = (
            bare
            and len(run) > 1
            and all(math.isfinite(prices[s.stage].forward) for s in run)
        )
        steps += [Again(run)] if whole else run
    return tuple(steps)


def _halves(a: int, b: int) -> Schedule:
    if b - a == 1:
        return (_kept(a),)
    middle = (a + b) // 2
    return (Again(_halves(a, middle)), *_halves(middle, b))


# From the model's schedules to one whose compiled bytes meet the budget.


_AIM = 0.98  # of the budget: the next guess should fall just below
_FULL = 0.96  # of the budget: used up
_ERROR = 1.3  # the model's bytes may be this much above the compiler's
_CLOSE = 0.005  # of the step's operations: a gain not worth another compilation


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A program as a chain of priced stages.

    Attributes:
      ends, stages: the chain.
      prints: fingerprints of the stages.
      solution: the best schedules by the model.
    """

    ends: tuple[int, ...]
    stages: list[_stages.Stage]
    prints: tuple[str, ...]
    solution: Solution

    @classmethod
    def of(
        cls, program: _jaxpr.Jaxpr, varied: Sequence[bool], platform: str
    ) -> "Problem":
        """The problem of an inlined program.

        Args:
          program: the forward pass.
          varied: which of its invars are differentiated.
          platform: "cpu", "gpu" or "tpu".
        """
        ends = _stages.cut(program)
        stages = _stages.stages(program, ends)
        prints = tuple(_jaxpr.fingerprint(stage.jaxpr) for stage in stages)
        moving = {v for v, moves in zip(program.invars, varied, strict=True) if moves}
        for eqn in program.eqns:
            if any(isinstance(v, Var) and v in moving for v in eqn.invars):
                moving.update(eqn.outvars)
        known: dict[object, _stages.Priced] = {}
        prices = []
        for stage, name in zip(stages, prints, strict=True):
            moves = tuple(
                v in moving for v in (*stage.jaxpr.constvars, *stage.jaxpr.invars)
            )
            if (name, moves) not in known:
                known[name, moves] = _stages.price(
                    stage, moves, _stages.FLOPS_PER_BYTE[platform]
                )
            prices.append(known[name, moves])
        return cls(
            tuple(ends),
            stages,
            prints,
            Solution(prices, _stages.carries(program, ends)),
        )

    def recipe(self, schedule: Schedule | None) -> Recipe:
        """The schedule with what it is for."""
        return Recipe(self.ends, self.prints, schedule)


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """A compiled program: its report and its jaxpr; `refused` if the machine has no room for it."""

    report: _memory.Report
    jaxpr: _jaxpr.ClosedJaxpr
    refused: bool = False

    def alive(self) -> np.ndarray:
        """Bytes alive at each operation, as `cost.live_bytes` estimates them."""
        return _stages.live_bytes(_jaxpr.live(self.jaxpr))


@dataclasses.dataclass(frozen=True, eq=False)
class Tried:
    """A schedule (None: unplanned) and what the compiler made of it."""

    schedule: Schedule | None
    figures: Figures

    @property
    def temp(self) -> int:
        """Bytes of temporaries."""
        return self.figures.report.temp

    def fits(self, temp: int) -> bool:
        """Whether it compiled, and within these bytes of temporaries."""
        return not self.figures.refused and self.temp <= temp


class Search:
    """Compiles schedules, most promising first.

    Attributes:
      tried: what was compiled, the unplanned program apart.
    """

    def __init__(
        self,
        solution: Solution,
        compiled: Callable[[Schedule], Figures],
        unplanned: Figures,
        max_compiles: int,
    ):
        self._solution, self._compiled = solution, compiled
        self._unplanned, self._left = Tried(None, unplanned), max_compiles
        self.tried: list[Tried] = []
        # {index of a schedule of the solution: bytes that it took}
        self._seen: dict[int, int] = {}

    def best(self, temp: int) -> Tried:
        """The cheapest schedule found within these bytes of temporaries, else the smallest one."""
        if self._unplanned.fits(temp):
            return self._unplanned
        # The last one is for the smallest: what is called infeasible has been tried.
        while (
            self._left > (not self._fitting(temp))
            and (i := self._next(temp)) is not None
        ):
            tried = self._try(self._solution.schedule(i))
            self._seen[i] = (
                tried.temp if tried.fits(temp) else max(tried.temp, temp + 1)
            )
        for schedule in schedules(self._solution):
            if self._left and self._promises(schedule, temp):
                self._try(schedule)
        if self._left and not self._fitting(temp) and 0 not in self._seen:
            self._seen[0] = self._try(self._solution.schedule(0)).temp
        # What is the smallest to the model need not be to the compiler.
        for i in self._smallest():
            if not self._left or self._fitting(temp):
                break
            if i not in self._seen:
                self._seen[i] = self._try(self._solution.schedule(i)).temp
        cheapest = min(
            self._fitting(temp), key=lambda t: t.figures.report.flops, default=None
        )
        every = [*self.tried, self._unplanned]
        return cheapest or min(every, key=lambda t: (t.figures.refused, t.temp))

    def _smallest(self) -> Iterator[int]:
        """Indices of schedules from the smallest on by the model, of each size the cheapest."""
        size = lambda i: self._solution.priced(self._solution.schedule(i))[0]  # noqa: E731
        for _, same in itertools.groupby(range(len(self._solution.memory)), key=size):
            *_, cheapest = same
            yield cheapest

    def _fitting(self, temp: int) -> list[Tried]:
        return [t for t in self.tried if t.fits(temp)]

    def _try(self, schedule: Schedule) -> Tried:
        self._left -= 1
        self.tried.append(Tried(schedule, self._compiled(schedule)))
        return self.tried[-1]

    def _next(self, temp: int) -> int | None:
        """The schedule to compile next; None if nothing is to be gained."""
        memory, extra = self._solution.memory, self._solution.extra
        low = max((i for i, n in self._seen.items() if n <= temp), default=-1)
        high = min(
            (i for i, n in self._seen.items() if n > temp and i > low),
            default=len(memory),
        )
        if high - low <= 1:
            return None
        if low >= 0 and self._seen[low] > _FULL * temp:
            return None
        if low >= 0 and extra[low] - extra[high - 1] < _CLOSE * self._solution.step:
            return None
        if low >= 0 and high < len(memory):
            slope = (memory[high] - memory[low]) / (self._seen[high] - self._seen[low])
            aim = memory[low] + slope * (_AIM * temp - self._seen[low])
        elif self._seen:
            known = high if high < len(memory) else low
            aim = memory[known] * _AIM * temp / max(1, self._seen[known])
        else:
            aim = _AIM * temp
        guess = int(np.searchsorted(memory, aim, "right")) - 1
        return min(max(guess, low + 1), high - 1)

    def _promises(self, schedule: Schedule, temp: int) -> bool:
        """Whether a schedule may fit and be cheaper than what fits, by the model and its usual error."""
        memory, extra = self._solution.priced(schedule)
        found = [
            self._solution.priced(t.schedule)[1]
            for t in self._fitting(temp)
            if t.schedule
        ]
        return bool(memory < _ERROR * temp and extra < min(found, default=math.inf))


# Plan which activations to recompute, so that the compiled program meets a budget of
# bytes.


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

    fn is traced and cut into a chain of stages; options of each stage are priced from
    its own derivative; a dynamic programme nests them; the result is compiled, its
    bytes are read from the compiler's buffer assignment, and the search goes on until
    the budget is met closely. A program that the compiler refuses, since the machine
    has less memory, counts as one that does not fit.

    Args:
      fn: the scalar loss, forward only, of pytrees of arrays.
      *args: its arguments: arrays or ShapeDtypeStructs; nothing is run.
      budget_bytes: bytes, "4GiB", or a float up to 1: that fraction of the unplanned
        figure.
      argnums: what is differentiated.
      has_aux: fn returns (loss, anything).
      within: given fn, returns the jitted step that is measured in place of
        jit(value_and_grad(fn)): a jitted function of the same arguments, or (jitted
        function, its arguments), with optimizer, donation and shardings of your own.
      wrt: "peak" is arguments + results - aliases + temporaries; "temp" temporaries
        alone.
      max_compiles: how many programs may be compiled after the unplanned one.
      topology: plan for a TPU that is not attached, say "v5e:2x2" (its first chip, but
        for shapes with a sharding of their own, as a step of `within` on a mesh of it
        needs); needs libtpu.

    Returns:
      Plan: `fn` is a drop-in to differentiate and jit; `describe()`, `to_json()`.

    Raises:
      BudgetInfeasible: with `best`, the smallest figure reached.
      ValueError: fn has effects or no float scalar, nothing differentiable, or changes
        an argument in place (a flax.nnx module with statistics: `jaxtricks.nnx.plan`).

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
    parse(budget_bytes, 1)  # a mistake in it is known before anything is compiled
    argnums = _integers.plain(argnums)
    wanted = _integers.positions(argnums, len(args))
    program = _checked(fn, args, wanted, argnums, has_aux)
    problem = Problem.of(
        program.jaxpr, _varied(args, wanted), _memory.platform(topology)
    )
    measured = functools.partial(
        _measured,
        within=within,
        args=args,
        topology=topology,
        argnums=argnums,
        has_aux=has_aux,
    )
    unplanned = measured(fn)
    # What the compiler refused has no arguments counted: those of a step without
    # activations are equal.
    counted = measured(_idle(fn)) if unplanned.refused and wrt == "peak" else unplanned
    fixed = counted.report.peak - counted.report.temp if wrt == "peak" else 0
    asked = parse(budget_bytes, fixed + unplanned.report.temp)
    search = Search(
        problem.solution,
        lambda schedule: measured(problem.recipe(schedule).applied(fn)),
        unplanned,
        max_compiles,
    )
    best = search.best(asked - fixed)
    if best.figures.refused or best.figures.report.temp > asked - fixed:
        raise BudgetInfeasible(asked, best.figures.report.temp + fixed, fixed, wrt)
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
        unknown=dict(_jaxpr.unknown(unplanned.jaxpr.jaxpr)),
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
      A function to differentiate and jit; inside jit only shapes are seen, not
      shardings.

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
        shapes = jax.tree.map(_memory.shape, args)
        leaves, structure = jax.tree.flatten(shapes)
        signature = structure, tuple((x.shape, x.dtype, x.weak_type) for x in leaves)
        if signature not in found:
            found[signature] = plan(
                checked, *shapes, budget_bytes=budget_bytes, **settings
            )
        return found[signature].fn(*args)

    return planned


def _measured(
    fn: Callable[..., Any], *, within: Any, args: Any, topology: str | None, **grad: Any
) -> Figures:
    """The program around a loss function, compiled."""
    step = jax.jit(jax.value_and_grad(fn, **grad)) if within is None else within(fn)
    if isinstance(step, tuple):
        step, args = step
    traced = _memory.trace(step, args, topology)
    try:
        compiled = traced.lower().compile()
    except (
        jax.errors.JaxRuntimeError
    ) as error:  # a TPU's compiler refuses what exceeds its memory
        refused = _memory.refusal(error, traced.jaxpr)
        if refused is None:
            raise
        return Figures(refused, traced.jaxpr, refused=True)
    return Figures(_memory.report(compiled, traced.jaxpr), traced.jaxpr)


def _idle(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes all arguments of fn and returns what fn does, and has no activations."""

    def idle(*args: Any) -> Any:
        numbers = [
            x for x in jax.tree.leaves(args) if jnp.issubdtype(x.dtype, jnp.number)
        ]
        total = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in numbers if x.size)
        outs = jax.eval_shape(fn, *args)
        return jax.tree.map(
            lambda out: jnp.full(out.shape, total).astype(out.dtype), outs
        )

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
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(
        loss.dtype, jnp.floating
    ):
        raise ValueError(
            f"fn must return {'(loss, aux) with ' if has_aux else ''}one float scalar, the loss, not "
            f"{jax.tree.map(lambda a: a.str_short(), outs)}: take a mean or a sum inside"
        )
    if not closed.eqns:
        raise ValueError(
            "fn returns one of its arguments as it is: there is nothing to recompute"
        )
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
    return _jaxpr.straight(closed)


def _varied(args: Any, wanted: Sequence[int]) -> list[bool]:
    """Which leaves of the arguments are differentiated."""
    return [i in wanted for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
