"""Hold a planned function and its figures; write it as a table or as JSON."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from jaxtricks import _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks.remat._memory import Report
from jaxtricks.remat._schedule import Rerun, Run, Schedule, Steps, stages_of
from jaxtricks.remat._stages import Stage

P = ParamSpec("P")
R = TypeVar("R")

_FORMAT = 1
# Fields of a plan in its text, and their types there.
_FIGURES: dict[str, Any] = {
    "peak": int,
    "baseline": int,
    "budget": int,
    "compiles": int,
    "extra_flops": (int, float),
    "wrt": str,
    "rows": list,
}
_HEADERS = ("stages", "operations", "carry", "what", "inside", "first line")
_MAX_INTEGER = 2**63


@dataclasses.dataclass(frozen=True)
class Plan(Generic[P, R]):
    """A function that meets its budget.

    Attributes:
      fn: the planned function, with the arguments, results and gradients of the one
        that was planned.
      peak: bytes of the compiled program, as `wrt` counts them.
      baseline: the same of the unplanned one.
      extra_flops: operations that are run twice, as a fraction of the unplanned
        program's.
      budget: bytes that were asked for.
      wrt: "peak" (arguments + results - aliases + temporaries) or "temp".
      schedule: how its stages run, which `to_json` writes.
      report, unplanned: the compilers' figures with and without the plan; None in a
        plan that was read.
      compiles: programs compiled after the unplanned one.
      tried: (bytes, extra_flops) of each.
      frontier: (bytes, extra_flops) that the model expects of its best schedules:
        float64 [schedules, 2].
      timeline: bytes alive at each operation by estimate, unplanned and planned.
      rows: of the table of `describe`.
      unknown: {primitive: count} of the unplanned program's operations that the cost
        model does not know, and costs by the bytes of their results.
    """

    fn: Callable[P, R]
    peak: int
    baseline: int
    extra_flops: float
    budget: int
    wrt: str
    schedule: Schedule
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
    rows: tuple[tuple[Any, ...], ...] = dataclasses.field(
        default=(), repr=False
    )
    unknown: dict[str, int] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def describe(self) -> _table.Table:
        """Return a table of what becomes of each run of stages, and the figures."""
        peak, baseline, budget = map(
            _table.format_bytes, (self.peak, self.baseline, self.budget)
        )
        notes = [
            f"{self.wrt} {peak} of {baseline} (budget {budget}), "
            f"{self.extra_flops:+.1%} FLOPs, {self.compiles} programs compiled"
        ]
        if self.unknown:
            counts = ", ".join(
                f"{name} ({n})" for name, n in sorted(self.unknown.items())
            )
            sentence = f"unknown to the cost model, counted by bytes: {counts}"
            # Names of primitives may come from a text.
            notes.append(_table.printable(sentence))
        return _table.make(_HEADERS, self.rows, notes)

    def __str__(self) -> str:
        return str(self.describe())

    def to_json(self) -> str:
        """Return the plan as text, for `plan_from_json`."""
        content: dict[str, Any] = {"format": _FORMAT}
        content |= {name: getattr(self, name) for name in _FIGURES}
        if self.unknown:
            content["unknown"] = self.unknown
        steps = self.schedule.steps
        content["ends"] = self.schedule.ends
        content["prints"] = self.schedule.fingerprints
        content["schedule"] = None if steps is None else _pack(steps)
        return json.dumps(content)


@checked
def plan_from_json(
    text: str,
    fn: Callable[P, R],
) -> Plan[P, R]:
    """Return the plan that `Plan.to_json` wrote, for the same function.

    Nothing is compiled or searched. Each stage is compared with the fingerprint of the
    one planned when the result is traced.

    Args:
      text: the text.
      fn: the function that was planned.

    Returns:
      Plan with the figures measured then.

    Raises:
      ValueError: text that is not a plan; and from `Plan.fn`, for another function or
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
        content = json.loads(text)
        if content.pop("format") != _FORMAT:
            raise ValueError("written by another version")
        packed = content.pop("schedule")
        steps = (
            None if packed is None else _unpack(packed, len(content["ends"]))
        )
        ends, fingerprints = content.pop("ends"), content.pop("prints")
        schedule = Schedule(tuple(ends), tuple(fingerprints), steps)
        _check_schedule(schedule)
        unknown = content.pop("unknown", {})
        _check_counts(unknown)
        _check_figures(content)
        content["rows"] = tuple(map(tuple, content["rows"]))
        planned = schedule.apply(fn)
        return Plan(
            fn=planned,
            schedule=schedule,
            unknown=unknown,
            **content,
        )
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"text is no plan written by Plan.to_json: {error}"
        ) from error


def _check_schedule(schedule: Schedule) -> None:
    ends = schedule.ends
    fingerprints = schedule.fingerprints
    # Before they are compared: a text may hold anything.
    are_counts = all(type(end) is int and end >= 0 for end in ends)
    if not ends or not are_counts or not _is_increasing(ends):
        raise ValueError("its stages do not follow each other")
    are_texts = all(isinstance(text, str) for text in fingerprints)
    if len(fingerprints) != len(ends) or not are_texts:
        raise ValueError("it has not one fingerprint per stage")
    every_stage = list(range(len(ends)))
    steps = schedule.steps
    if steps is not None and stages_of(steps) != every_stage:
        raise ValueError("it does not run every stage once")


def _is_increasing(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _check_counts(unknown: Mapping[str, Any]) -> None:
    for n in unknown.values():
        if type(n) is not int or not 0 < n < _MAX_INTEGER:
            raise ValueError(
                "its unknown operations are not counted in positive integers"
            )


def _check_figures(content: Mapping[str, Any]) -> None:
    if content.keys() != _FIGURES.keys():
        raise ValueError(f"its figures are not {', '.join(_FIGURES)}")
    for name, kind in _FIGURES.items():
        value = content[name]
        # True is an int to Python.
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r:.40}")
        # Not NaN either.
        is_number = isinstance(value, int | float)
        if is_number and not abs(value) < _MAX_INTEGER:
            raise ValueError(f"{name} is beyond any size")
    for row in content["rows"]:
        if not isinstance(row, list) or len(row) != len(_HEADERS):
            raise ValueError(
                f"its rows have not the columns {', '.join(_HEADERS)}"
            )


# A run is [stage, [saved, outer]] in the text, a rerun {"again": steps}.


def _pack(steps: Steps) -> list[Any]:
    packed: list[Any] = []
    for step in steps:
        if isinstance(step, Run):
            packed.append([step.stage, [step.saved, step.outer]])
        else:
            packed.append({"again": _pack(step.steps)})
    return packed


def _unpack(packed: Sequence[Any], max_depth: int) -> Steps:
    if max_depth < 0:
        raise ValueError(
            "its groups are nested more deeply than there are stages"
        )
    steps: list[Run | Rerun] = []
    for item in packed:
        if isinstance(item, dict):
            steps.append(Rerun(_unpack(item["again"], max_depth - 1)))
        else:
            stage, (saved, outer) = item[0], item[1]
            steps.append(_unpack_run(stage, saved, outer))
    return tuple(steps)


def _unpack_run(
    stage: Any,
    saved: Sequence[Any] | None,
    outer: Any,
) -> Run:
    indices = None if saved is None else tuple(saved)
    for number in (*(indices or ()), outer):
        # True is an int to Python, and a float may be whole.
        if type(number) is not int or number < 0:
            raise ValueError("it has a choice that is not a number")
    if indices and len(set(indices)) < len(indices):
        raise ValueError("it saves a result twice")
    return Run(stage, indices, outer)


# The rows of the table.


def describe_stages(
    stages: Sequence[Stage],
    steps: Steps | None,
) -> tuple[tuple[Any, ...], ...]:
    """Return the rows of `Plan.describe`; neighbours that run alike share one."""
    # {stage: (how it runs, which outermost group it is in, the depth of nesting)}
    everything_saved = (str(Run(0)), -1, 0)
    runs = dict.fromkeys(range(len(stages)), everything_saved)
    for i, step in enumerate(steps or ()):
        # Single stages outside of groups belong together.
        group = i if isinstance(step, Rerun) else -1
        for run, depth in _with_depth((step,), 0):
            runs[run.stage] = (str(run), group, depth)
    rows = []
    for alike, neighbours in itertools.groupby(runs, key=runs.__getitem__):
        text, _, depth = alike
        rows.append(_row(stages, list(neighbours), text, depth))
    return tuple(rows)


def _with_depth(
    steps: Steps,
    depth: int,
) -> Iterator[tuple[Run, int]]:
    """Yield each run and how many groups it is in."""
    for step in steps:
        if isinstance(step, Run):
            yield step, depth
        else:
            yield from _with_depth(step.steps, depth + 1)


def _row(
    stages: Sequence[Stage],
    indices: Sequence[int],
    text: str,
    depth: int,
) -> tuple[Any, ...]:
    first, last = indices[0], indices[-1]
    label = str(first) if first == last else f"{first}-{last}"
    eqns = [eqn for i in indices for eqn in stages[i].jaxpr.eqns]
    lines = filter(None, map(_jaxpr.source_line, eqns))
    inside = ""
    if depth == 1:
        inside = "a recomputed group"
    elif depth > 1:
        inside = f"{depth} recomputed groups"
    carry = _table.format_bytes(stages[last].carry)
    return (label, len(eqns), carry, text, inside, next(lines, ""))
