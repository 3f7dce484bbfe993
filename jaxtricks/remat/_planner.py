"""Search for the schedule whose compiled program meets a budget of bytes.

`plan` cuts and costs the program, solves for the frontier of schedules, and compiles
candidates of it (and what people write manually) until one fits.
"""

import dataclasses
import functools
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _flops, _integers, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._partition import positional, without_changes
from jaxtricks.remat import _costs, _memory, _plan, _stages
from jaxtricks.remat._memory import Report
from jaxtricks.remat._plan import Plan
from jaxtricks.remat._schedule import Rerun, Run, Schedule, Steps
from jaxtricks.remat._solver import Frontier
from jaxtricks.remat._stages import Stage

P = ParamSpec("P")
R = TypeVar("R")
Wrt = Literal["peak", "temp"]
Budget = int | float | str
"""Bytes, a size such as "4GiB", or a fraction up to 1 of the unplanned figure."""


@checked
def plan(
    fn: Callable[P, R],
    *args: Any,
    budget_bytes: Budget,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    within: Callable[[Callable[..., Any]], Any] | None = None,
    wrt: Wrt = "peak",
    max_compiles: int = 6,
    topology: str | None = None,
) -> Plan[P, R]:
    """Make a loss function meet a budget of bytes, with little recomputation.

    fn is traced and cut into a chain of stages; options of each stage are costed from
    the derivative of the stage; a dynamic programme nests them; the result is compiled,
    its bytes are read from the compiler's buffer assignment, and the search goes on
    until the budget is met closely. A program that the compiler refuses, since the
    machine has less memory, counts as one that does not fit.

    Args:
      fn: the scalar loss, forward only, of pytrees of arrays.
      *args: its arguments: arrays or ShapeDtypeStructs; nothing is run.
      budget_bytes: bytes, "4GiB", or a float up to 1: that fraction of the unplanned
        figure.
      argnums: what is differentiated.
      has_aux: fn returns (loss, anything).
      within: takes a loss and returns the jitted step that is measured in place of
        jit(value_and_grad(fn)): a jitted function of the same arguments, or (jitted
        function, its arguments), with your optimizer, donation and shardings.
      wrt: "peak" is arguments + results - aliases + temporaries; "temp" temporaries
        alone.
      max_compiles: how many programs may be compiled after the unplanned one.
      topology: plan for a TPU that is not attached, say "v5e:2x2" (its first chip,
        except for shapes with a sharding, as a step of `within` on a mesh of it needs);
        needs libtpu, and the variables of `libtpu_environment`.

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
    program = _traced(fn, args, positions, argnums, has_aux).jaxpr
    ends = _stages.cut(program)
    stages = _costed_stages(
        program,
        ends,
        _varied(args, positions),
        _memory.platform(topology),
    )
    fingerprints = tuple(stage.fingerprint for stage in stages)
    schedule_of = functools.partial(Schedule, tuple(ends), fingerprints)
    frontier = Frontier(stages, _stages.carries(program, ends))

    def compiled(
        loss: Callable[..., Any],
        steps: Steps | None = None,
    ) -> "Trial":
        step: Any
        step_args: Any = args
        if within is None:
            step = jax.jit(
                jax.value_and_grad(loss, argnums=argnums, has_aux=has_aux)
            )
        else:
            step = within(loss)
        if isinstance(step, tuple):
            step, step_args = step
        return _compiled(steps, _memory.trace(step, step_args, topology))

    unplanned = compiled(fn)
    # Arguments and results, which no schedule can shrink.
    fixed = 0
    if wrt == "peak":
        # What the compiler refused has no arguments counted: those of a step without
        # activations are equal.
        counted = compiled(_idle(fn)) if unplanned.is_refused else unplanned
        fixed = counted.report.peak - counted.report.temp
    budget = parse_budget(budget_bytes, fixed + unplanned.temp)
    search = _Search(
        frontier,
        lambda steps: compiled(schedule_of(steps).apply(fn), steps),
        unplanned,
        max_compiles,
    )
    best = search.best(budget - fixed)
    if not best.fits(budget - fixed):
        raise BudgetInfeasible(budget, best.temp + fixed, fixed, wrt)

    schedule = schedule_of(best.steps)
    base = unplanned.report.flops
    expected = [frontier.memory + fixed, frontier.extra / frontier.step]
    trials = [
        (t.temp + fixed, t.report.flops / base - 1) for t in search.trials
    ]
    return Plan(
        fn=schedule.apply(fn),
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
        rows=_plan.describe_stages(stages, best.steps),
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


# Budgets.


_MAX_BYTES = 2**63
_BUDGET_ADVICE = (
    'write bytes, a size such as "4GiB" or "500 MB", or a fraction up to 1'
)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}


class BudgetInfeasible(ValueError):  # noqa: N818 (reads as what it says)
    """No plan meets the budget.

    Attributes:
      best: the smallest figure that was reached, bytes.
    """

    def __init__(
        self,
        budget: int,
        best: int,
        fixed: int,
        wrt: str,
    ):
        asked, reached = map(_table.format_bytes, (budget, best))
        if asked == reached:
            asked, reached = f"{budget:,} B", f"{best:,} B"
        why = ""
        if budget < fixed:
            needed = _table.format_bytes(fixed)
            why = (
                f" ({needed} of it are arguments and results, which "
                "recomputation cannot shrink)"
            )
        super().__init__(
            f"budget_bytes is {asked} and the smallest {wrt} reached is "
            f"{reached}{why}: raise the budget or make the batch smaller"
        )
        self.best = best


def parse_budget(budget: Budget, unplanned: int) -> int:
    """Return the bytes of a budget.

    Args:
      budget: bytes, text such as "4GiB" or "500 MB", or a float above 0 and up to 1:
        that fraction of `unplanned`.
      unplanned: bytes.

    Raises:
      ValueError: budget is not positive, is text but not a size, is above 1 and not an
        integer, or is beyond any machine.
    """
    if isinstance(budget, str):
        shown = repr(f"{budget:.40}")
        size = _parse_size(budget)
        if size is None:
            raise ValueError(f"budget_bytes is {shown}: {_BUDGET_ADVICE}")
        budget = int(size) if size < _MAX_BYTES else _MAX_BYTES
    else:
        is_number = isinstance(budget, numbers.Real)
        shown = f"{budget!s:.40}" if is_number else type(budget).__name__
    if isinstance(budget, np.generic):
        budget = budget.item()
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(f"budget_bytes is {shown}: {_BUDGET_ADVICE}")
    if not 0 < budget < _MAX_BYTES:
        raise ValueError(
            f"budget_bytes is {shown}, not above 0 and below 2**63: {_BUDGET_ADVICE}"
        )
    if isinstance(budget, numbers.Integral):
        return int(budget)
    budget = float(budget)
    if budget > 1 and budget % 1:
        raise ValueError(f"budget_bytes is {shown}: {_BUDGET_ADVICE}")
    return int(budget * unplanned) if budget <= 1 else int(budget)


def _parse_size(text: str) -> float | None:
    """Return the bytes of a number with a unit; None if the text is neither."""
    match = re.fullmatch(
        r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower()
    )
    if match is None or match[2] not in _UNITS:
        return None
    try:
        return float(match[1]) * _UNITS[match[2]]
    except ValueError:  # two points
        return None


# The program to plan.


def _traced(
    fn: Callable[..., Any],
    args: Any,
    positions: Sequence[int],
    argnums: int | tuple[int, ...],
    has_aux: bool,
) -> _jaxpr.ClosedJaxpr:
    """Trace fn and write its calls out; ValueError for what cannot be planned."""
    closed, structure = _jaxpr.trace(without_changes(fn, "plan"), *args)
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        raise ValueError("fn closes over traced values: pass them as arguments")
    outs = jax.tree.unflatten(structure, closed.out_avals)
    loss = outs[0] if has_aux and isinstance(outs, tuple) and outs else outs
    is_scalar = getattr(loss, "shape", None) == ()
    if not is_scalar or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"fn must return {'(loss, aux) with ' if has_aux else ''}one float "
            "scalar, the loss, not "
            f"{jax.tree.map(lambda a: a.str_short(), outs)}: take a mean or a "
            "sum inside"
        )
    if not closed.eqns:
        raise ValueError(
            "fn returns one of its arguments as it is: there is nothing to recompute"
        )
    leaves = jax.tree.leaves([args[i] for i in positions])
    if not any(
        jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact) for x in leaves
    ):
        raise ValueError(
            f"argnums={argnums} holds no float array: name the arguments to "
            "differentiate, the parameters"
        )
    effects = [
        str(e) for e in closed.effects if type(e).__name__ != "NamedAxisEffect"
    ]
    if effects:
        raise ValueError(
            f"fn has side effects ({', '.join(effects)}) that recomputation "
            "would run twice: move them out of the loss, into its aux output "
            "say"
        )
    return _jaxpr.straight(closed)


def _varied(
    args: Any,
    positions: Sequence[int],
) -> list[bool]:
    """Return which leaves of the arguments are differentiated."""
    is_varied = []
    for i, arg in enumerate(args):
        is_varied += [i in positions] * len(jax.tree.leaves(arg))
    return is_varied


def _costed_stages(
    program: _jaxpr.Jaxpr,
    ends: Sequence[int],
    varied: Sequence[bool],
    platform: str,
) -> list[Stage]:
    """Return the stages of an inlined program with their costs.

    Args:
      program: the forward pass.
      ends: where the stages end.
      varied: which of its invars are differentiated.
      platform: "cpu", "gpu" or "tpu".
    """
    varied_vars = set(itertools.compress(program.invars, varied))
    for eqn in program.eqns:
        if any(
            isinstance(v, _jaxpr.Var) and v in varied_vars for v in eqn.invars
        ):
            varied_vars.update(eqn.outvars)
    flops_per_byte = _costs.FLOPS_PER_BYTE[platform]
    # Equal stages, as the layers of a network, are costed once.
    costed: dict[Any, Stage] = {}
    stages = []
    for stage in _stages.split(program, ends):
        inputs = (*stage.jaxpr.constvars, *stage.jaxpr.invars)
        is_varied = tuple(v in varied_vars for v in inputs)
        key = stage.fingerprint, is_varied
        if key not in costed:
            costed[key] = _costs.with_costs(stage, is_varied, flops_per_byte)
        like = costed[key]
        stages.append(
            dataclasses.replace(
                stage,
                options=like.options,
                forward=like.forward,
                forward_bytes=like.forward_bytes,
            )
        )
    return stages


# One compiled program.


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A compiled program.

    Attributes:
      steps: how its stages run; None is unplanned.
      report: its figures.
      jaxpr: the program.
      is_refused: the compiler has no room for it.
    """

    steps: Steps | None
    report: Report
    jaxpr: _jaxpr.ClosedJaxpr
    is_refused: bool = False

    @property
    def temp(self) -> int:
        """Bytes of temporaries."""
        return self.report.temp

    def fits(self, temp: int) -> bool:
        """Return whether it compiled, and within these bytes of temporaries."""
        return not self.is_refused and self.temp <= temp

    def timeline(self) -> np.ndarray:
        """Return the estimate of the bytes alive at each operation."""
        return _costs.live_bytes(_jaxpr.live(self.jaxpr))


def _compiled(
    steps: Steps | None,
    traced: jax.stages.Traced,
) -> Trial:
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler refuses what exceeds its memory.
        report = _memory.refusal(error, traced.jaxpr)
        if report is None:
            raise
        return Trial(
            steps,
            report,
            traced.jaxpr,
            is_refused=True,
        )
    return Trial(steps, _memory.report(compiled, traced.jaxpr), traced.jaxpr)


def _idle(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of fn's arguments and results that has no activations."""

    def idle(*args: Any) -> Any:
        total = jnp.float32(0)
        for x in jax.tree.leaves(args):
            if jnp.issubdtype(x.dtype, jnp.number) and x.size:
                first = x[(0,) * x.ndim]
                total = total + first.astype(jnp.float32)

        def fill(out: Any) -> Any:
            return jnp.full(out.shape, total).astype(out.dtype)

        outs = jax.eval_shape(fn, *args)
        return jax.tree.map(fill, outs)

    return idle


# The search, from the model's schedules to one whose compiled bytes meet the budget.


_AIM = 0.98  # of the budget: the next guess should fall just below
_FULL = 0.96  # of the budget: used up
_ERROR = 1.3  # the model's bytes may be this much above the compiler's
_CLOSE = 0.005  # of the step's operations: a gain not worth another compilation


class _Search:
    """Compiles schedules, most promising first.

    Attributes:
      trials: what was compiled, the unplanned program apart.
    """

    def __init__(
        self,
        frontier: Frontier,
        compiled: Callable[[Steps], Trial],
        unplanned: Trial,
        max_compiles: int,
    ):
        self._frontier = frontier
        self._compiled = compiled
        self._unplanned = unplanned
        self._max_compiles = max_compiles
        self.trials: list[Trial] = []
        # {index of a schedule of the frontier: bytes that it took}
        self._measured: dict[int, int] = {}

    def best(self, temp: int) -> Trial:
        """Return the cheapest trial within these temporaries, else the smallest."""
        if self._unplanned.fits(temp):
            return self._unplanned
        self._bisect(temp)
        for steps in manual_schedules(self._frontier):
            if self._remaining and self._promises(steps, temp):
                self._try(steps)
        self._shrink(temp)
        fitting = self._fitting(temp)
        if fitting:
            return min(fitting, key=lambda t: t.report.flops)
        candidates = [*self.trials, self._unplanned]
        return min(candidates, key=lambda t: (t.is_refused, t.temp))

    @property
    def _remaining(self) -> int:
        return self._max_compiles - len(self.trials)

    def _fitting(self, temp: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.fits(temp)]

    def _try(self, steps: Steps) -> Trial:
        self.trials.append(self._compiled(steps))
        return self.trials[-1]

    def _bisect(self, temp: int) -> None:
        """Try schedules of the frontier, from the model's guess towards the budget."""
        while True:
            # The last compilation is for the smallest schedule: what is called
            # infeasible has been tried.
            reserved = 0 if self._fitting(temp) else 1
            if self._remaining <= reserved:
                return
            i = self._next(temp)
            if i is None:
                return
            trial = self._try(self._frontier.steps(i))
            fits = trial.fits(temp)
            self._measured[i] = (
                trial.temp if fits else max(trial.temp, temp + 1)
            )

    def _next(self, temp: int) -> int | None:
        """Return the schedule to compile next; None if nothing is to be gained."""
        memory = self._frontier.memory
        extra = self._frontier.extra
        measured = self._measured
        # The schedules between the largest that fits and the smallest that does not.
        fitting = [i for i, nbytes in measured.items() if nbytes <= temp]
        low = max(fitting, default=-1)
        too_large = [i for i in measured if i > low and i not in fitting]
        high = min(too_large, default=len(memory))
        has_low = low >= 0
        has_high = high < len(memory)
        if high - low <= 1:
            return None
        if has_low:
            gain = extra[low] - extra[high - 1]
            if gain < _CLOSE * self._frontier.step:
                return None
            if measured[low] > _FULL * temp:
                return None
        if has_low and has_high:
            # Interpolate between the two nearest measurements.
            rise = memory[high] - memory[low]
            slope = rise / (measured[high] - measured[low])
            aim = memory[low] + slope * (_AIM * temp - measured[low])
        elif measured:
            # Correct the model by the ratio of the one measurement.
            nearest = high if has_high else low
            aim = memory[nearest] * _AIM * temp / max(1, measured[nearest])
        else:
            aim = _AIM * temp
        guess = int(np.searchsorted(memory, aim, "right")) - 1
        return min(max(guess, low + 1), high - 1)

    def _promises(
        self,
        steps: Steps,
        temp: int,
    ) -> bool:
        """Return whether steps may fit and be cheaper than what fits.

        By the model and its usual error.
        """
        memory, extra = self._frontier.cost(steps)
        fitting = [t.steps for t in self._fitting(temp) if t.steps]
        cheapest = min(
            (self._frontier.cost(other)[1] for other in fitting),
            default=math.inf,
        )
        return bool(memory < _ERROR * temp and extra < cheapest)

    def _shrink(self, temp: int) -> None:
        """Try the smallest schedules while nothing fits."""
        # What is the smallest to the model need not be to the compiler.
        for i in itertools.chain([0], self._smallest_first()):
            if not self._remaining or self._fitting(temp):
                return
            if i not in self._measured:
                trial = self._try(self._frontier.steps(i))
                self._measured[i] = trial.temp

    def _smallest_first(self) -> Iterator[int]:
        """Yield indices by increasing model bytes, the cheapest of each size."""

        def size(i: int) -> float:
            return self._frontier.cost(self._frontier.steps(i))[0]

        indices = range(len(self._frontier.memory))
        for _, same_size in itertools.groupby(indices, key=size):
            *_, cheapest = same_size
            yield cheapest


# What people write manually: candidates beside the model's.


def manual_schedules(frontier: Frontier) -> Iterator[Steps]:
    """Yield the schedules that people place: saved products, sqrt(n) groups, halves."""
    n = len(frontier.stages)
    yield _products_saved(frontier.stages)
    runs = tuple(map(Run, range(n)))
    size = math.isqrt(n - 1) + 1
    groups = [runs[start : start + size] for start in range(0, n, size)]
    # The backward pass of the last group starts at once.
    yield (*map(Rerun, groups[:-1]), *groups[-1])
    yield _halves(0, n)


def _products_saved(stages: Sequence[Stage]) -> Steps:
    """Save products and recompute the rest: drop what costs little to compute again.

    The cheap-operation rule of Chen et al., section 4.2.
    """
    runs = [_most_saved(i, stage) for i, stage in enumerate(stages)]
    steps: list[Run | Rerun] = []
    for saves_all, group in itertools.groupby(
        runs, key=lambda r: r.saved is None
    ):
        neighbours = tuple(group)
        # Collectives never run twice: their cost is infinite.
        forward = [stages[run.stage].forward for run in neighbours]
        may_rerun = all(map(math.isfinite, forward))
        if saves_all and may_rerun and len(neighbours) > 1:
            steps.append(Rerun(neighbours))
        else:
            steps += neighbours
    return tuple(steps)


def _most_saved(i: int, stage: Stage) -> Run:
    saving = [o for o in stage.options if o.saved and not o.outer]
    if not saving:
        return Run(i)
    option = max(saving, key=lambda o: len(o.saved or ()))
    return Run(i, option.saved)


def _halves(a: int, b: int) -> Steps:
    if b - a == 1:
        return (Run(a),)
    middle = (a + b) // 2
    return (Rerun(_halves(a, middle)), *_halves(middle, b))
