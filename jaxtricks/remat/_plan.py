"""A schedule as a program."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxtricks import _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._partition import positional, without_changes
from jaxtricks.remat import _stages
from jaxtricks.remat._memory import Report
from jaxtricks.remat._recompute import recompute_grad
from jaxtricks.remat._solver import Again, Run, Schedule, runs_of, stages_of
from jaxtricks.remat._stages import Choice, Stage


def scheduled(
    program: _jaxpr.Jaxpr, stages: Sequence[Stage], schedule: Schedule
) -> Callable[..., list[Any]]:
    """The program as a function of (*constvars, *invars), its stages run by the schedule."""
    needed = _jaxpr.needed_after(
        [stage.jaxpr.eqns for stage in stages], program.outvars
    )

    def go(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(
            zip((*program.constvars, *program.invars), xs, strict=True)
        )
        _run(schedule, env)
        return _jaxpr.read(program.outvars, env)

    def _run(steps: Schedule, env: dict[Any, Any]) -> None:
        for step in steps:
            if isinstance(step, Run):
                jaxpr = stages[step.stage].jaxpr
                ins, outs = (*jaxpr.constvars, *jaxpr.invars), jaxpr.outvars
                fn = _stages.run(jaxpr, step.choice)
            else:
                ins, outs, fn = _group(step.steps)
            env.update(zip(outs, fn(*[env[v] for v in ins]), strict=True))

    def _group(
        steps: Schedule,
    ) -> tuple[Sequence[Any], Sequence[Any], Callable[..., list[Any]]]:
        held = list(stages_of(steps))
        ins = _jaxpr.read_by([eqn for i in held for eqn in stages[i].jaxpr.eqns])
        made = [v for i in held for v in stages[i].jaxpr.outvars]
        outs = [v for v in made if v in needed[held[-1]]]

        def inner(*xs: Any) -> list[Any]:
            env = dict(zip(ins, xs, strict=True))
            _run(steps, env)
            return [env[v] for v in outs]

        return ins, outs, recompute_grad(inner)

    return go


# What the planner returns: a function, its figures, and a text that brings it back.


_FORMAT = 1
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("peak", "baseline", "budget", "compiles"), int),
    "extra_flops": (int, float),
    "wrt": str,
    "rows": list,
}


_HEADERS = (
    "stages",
    "operations",
    "carry",
    "what",
    "inside",
    "first line",
)  # of `Plan.describe`


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A schedule and the program that it is for, apart from the function itself.

    Attributes:
      ends: where the stages end.
      prints: fingerprint of each stage.
      schedule: how they run; None leaves the function as it is.
    """

    ends: tuple[int, ...]
    prints: tuple[str, ...]
    schedule: Schedule | None

    def applied(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """fn with its activations recomputed as the schedule says; same arguments, same results."""
        if self.schedule is None:
            return fn
        schedule, checked = self.schedule, without_changes(fn, "plan")

        @functools.wraps(fn)
        def planned(*args: Any, **kwargs: Any) -> Any:
            args = positional(fn, args, kwargs, "remat.plan")
            closed, structure = _jaxpr.trace(checked, *args)
            program = _jaxpr.straight(closed)
            stages = self._matched(program.jaxpr)
            for step in runs_of(schedule):
                _stages.check(stages[step.stage].jaxpr, step.choice)
            run = scheduled(program.jaxpr, stages, schedule)
            outs = run(*program.consts, *jax.tree.leaves(args))
            return jax.tree.unflatten(structure, outs)

        return planned

    def _matched(self, program: _jaxpr.Jaxpr) -> list[_stages.Stage]:
        if len(program.eqns) == self.ends[-1]:
            stages = _stages.stages(program, self.ends)
            prints = [_jaxpr.fingerprint(stage.jaxpr) for stage in stages]
            wrong = [i for i, p in enumerate(prints) if p != self.prints[i]]
            if not wrong:
                return stages
            where = f"stage {wrong[0]} of {len(stages)} differs"
        else:
            where = f"it has {len(program.eqns)} operations where the plan has {self.ends[-1]}"
        raise ValueError(
            f"this plan was made for another function, other shapes or dtypes ({where}): plan again, or "
            "use auto_remat, which plans once for each signature"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A function that meets its budget.

    Attributes:
      fn: the planned function: arguments, results and gradients of the one given.
      peak: bytes of the compiled program, as `wrt` counts them.
      baseline: the same of the unplanned one.
      extra_flops: operations that are run twice, as a fraction of the unplanned
        program's.
      budget: bytes that were asked for.
      wrt: "peak" (arguments + results - aliases + temporaries) or "temp".
      recipe: what `to_json` writes.
      report, unplanned: the compilers' figures with and without the plan; None in a
        plan that was read.
      compiles: programs compiled after the unplanned one.
      tried: (bytes, extra_flops) of each.
      frontier: (bytes, extra_flops) that the model expects of its best schedules:
        float64 [schedules, 2].
      timeline: bytes alive at each operation by estimate, unplanned and planned.
      unknown: {primitive: count} of the unplanned program's operations that the cost
        model does not know and prices by the bytes of their results.
    """

    fn: Callable[..., Any]
    peak: int
    baseline: int
    extra_flops: float
    budget: int
    wrt: str
    recipe: Recipe
    report: Report | None = None
    unplanned: Report | None = None
    compiles: int = 0
    tried: tuple[tuple[int, float], ...] = ()
    frontier: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 2)), repr=False
    )
    timeline: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(
        default=None, repr=False
    )
    rows: tuple[tuple[Any, ...], ...] = dataclasses.field(default=(), repr=False)
    unknown: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)

    def describe(self) -> _table.Table:
        """What becomes of each run of stages, and the figures."""
        notes = [
            f"{self.wrt} {_table.format_bytes(self.peak)} of {_table.format_bytes(self.baseline)} "
            f"(budget {_table.format_bytes(self.budget)}), {self.extra_flops:+.1%} FLOPs, "
            f"{self.compiles} programs compiled",
        ]
        if self.unknown:
            counts = ", ".join(
                f"{name} ({n})" for name, n in sorted(self.unknown.items())
            )
            sentence = f"unknown to the cost model, priced by bytes: {counts}"
            notes.append(_table.printable(sentence))
        return _table.make(_HEADERS, self.rows, notes)

    def __str__(self) -> str:
        return str(self.describe())

    def to_json(self) -> str:
        """The plan as text, for `plan_from_json`: the schedule and what it was made for."""
        text = {"format": _FORMAT} | {name: getattr(self, name) for name in _KINDS}
        steps = None if self.recipe.schedule is None else _packed(self.recipe.schedule)
        text |= {"unknown": self.unknown} if self.unknown else {}
        text |= {
            "ends": self.recipe.ends,
            "prints": self.recipe.prints,
            "schedule": steps,
        }
        return json.dumps(text)


@checked
def plan_from_json(text: str, fn: Callable[..., Any]) -> Plan:
    """The plan that `Plan.to_json` wrote, for the same function: nothing is compiled or searched.

    Args:
      text: the text.
      fn: the function that was planned. Each stage is compared with a hash of the one
        planned when the result is traced.

    Returns:
      Plan with the figures measured then.

    Raises:
      ValueError: text that is no plan; and from `Plan.fn`, for another function or
        other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.remat import plan
      >>> def loss(w, x):
      ...     return jnp.sin(jnp.sin(x @ w)).sum()
      >>> w = jnp.eye(4)
      >>> text = plan(loss, w, w, budget_bytes="1MB").to_json()
      >>> float(plan_from_json(text, loss).fn(w, w)) == float(loss(w, w))
      True
    """
    try:
        given = json.loads(text)
        if given.pop("format") != _FORMAT:
            raise ValueError("written by another version")
        steps = given.pop("schedule")
        schedule = None if steps is None else _unpacked(steps, len(given["ends"]))
        recipe = Recipe(tuple(given.pop("ends")), tuple(given.pop("prints")), schedule)
        _check_recipe(recipe)
        unknown = given.pop("unknown", {})
        _check_counts(unknown)
        _check_figures(given)
        given["rows"] = tuple(map(tuple, given["rows"]))
        return Plan(fn=recipe.applied(fn), recipe=recipe, unknown=unknown, **given)
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"text is no plan written by Plan.to_json: {error}") from error


def _check_recipe(recipe: Recipe) -> None:
    ends, prints = recipe.ends, recipe.prints
    whole = [type(x) is int and x >= 0 for x in ends]
    if not ends or not all(whole) or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError("its stages do not follow each other")
    if len(prints) != len(ends) or not all(isinstance(x, str) for x in prints):
        raise ValueError("it has not one fingerprint a stage")
    if recipe.schedule is not None and list(stages_of(recipe.schedule)) != list(
        range(len(ends))
    ):
        raise ValueError("it does not run every stage once")


def _check_counts(unknown: Any) -> None:
    if any(type(n) is not int or not 0 < n < 2**63 for n in unknown.values()):
        raise ValueError("its unknown operations are not counted in positive integers")


def _check_figures(given: dict[str, Any]) -> None:
    if given.keys() != _KINDS.keys():
        raise ValueError(f"its figures are not {', '.join(_KINDS)}")
    for name, kind in _KINDS.items():
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r:.40}")
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise ValueError(f"{name} is beyond any size")
    if any(
        not isinstance(row, list) or len(row) != len(_HEADERS) for row in given["rows"]
    ):
        raise ValueError(f"its rows have not the columns {', '.join(_HEADERS)}")


def _packed(schedule: Schedule) -> list[Any]:
    return [
        dataclasses.astuple(s) if isinstance(s, Run) else {"again": _packed(s.steps)}
        for s in schedule
    ]


def _unpacked(steps: Sequence[Any], deep: int) -> Schedule:
    if deep < 0:
        raise ValueError("its groups are nested more deeply than there are stages")
    return tuple(
        Again(_unpacked(s["again"], deep - 1))
        if isinstance(s, dict)
        else Run(s[0], _choice(*s[1]))
        for s in steps
    )


def _choice(saved: Sequence[int] | None, outer: int) -> Choice:
    numbers = (*(saved or ()), outer)
    if any(type(x) is not int or x < 0 for x in numbers):
        raise ValueError("it has a choice that is no number")
    if len(set(saved or ())) < len(saved or ()):
        raise ValueError("it keeps a result twice")
    return Choice(None if saved is None else tuple(saved), outer)


def rows(
    stages: Sequence[_stages.Stage], schedule: Schedule | None
) -> tuple[tuple[Any, ...], ...]:
    """Rows of `Plan.describe`; neighbours that fare alike share one."""
    fates: dict[int, tuple[str, int]] = dict.fromkeys(range(len(stages)), ("keep", 0))

    def visit(steps: Schedule, depth: int) -> None:
        for step in steps:
            if isinstance(step, Run):
                fates[step.stage] = (str(step.choice), depth)
            else:
                visit(step.steps, depth + 1)

    visit(schedule or (), 0)
    groups = _groups(schedule, len(stages))
    found: list[list[int]] = []
    for i in fates:
        if found and fates[i] == fates[found[-1][-1]] and groups[i] == groups[i - 1]:
            found[-1].append(i)
        else:
            found.append([i])
    return tuple(_row(stages, run, *fates[run[0]]) for run in found)


def _groups(schedule: Schedule | None, n: int) -> list[int]:
    """Which outermost step each stage belongs to; single stages outside groups belong together."""
    groups = [-1] * n
    for k, step in enumerate(schedule or ()):
        if isinstance(step, Again):
            for i in stages_of(step.steps):
                groups[i] = k
    return groups


def _row(
    stages: Sequence[_stages.Stage], run: Sequence[int], what: str, depth: int
) -> tuple[Any, ...]:
    eqns = [eqn for i in run for eqn in stages[i].jaxpr.eqns]
    label = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
    line = next((found for eqn in eqns if (found := _jaxpr.source_line(eqn))), "")
    inside = (
        f"{depth} recomputed groups"
        if depth > 1
        else "a recomputed group"
        if depth
        else ""
    )
    return (
        label,
        len(eqns),
        _table.format_bytes(stages[run[-1]].carry),
        what,
        inside,
        line,
    )
