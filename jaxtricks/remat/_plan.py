"""Hold a planned function and its figures; write it as a table or as JSON."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from jaxtricks import _flops, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks.remat._memory import Report
from jaxtricks.remat._schedule import (
    Rerun,
    Run,
    Schedule,
    Steps,
    largest_scan,
    products,
    scan_body,
    stages_of,
)
from jaxtricks.remat._solver import Frontier
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
# The same, of fields that plans of before lack.
_LATER_FIGURES: dict[str, Any] = {
    "values": list,
    "gap": (int, float),
    "host": int,
    "flops": int,
    "batch": (int, type(None)),
    "sizes": list,
}
_HEADERS = ("stages", "operations", "carry", "what", "inside", "first line")
# Columns of a plan's tables in its text, and their types there; those of `rows` are
# printed as they are.
_COLUMNS: dict[str, dict[str, Any]] = {
    "rows": dict.fromkeys(_HEADERS, object),
    "values": {
        "choice": str,
        "count": int,
        "bytes": int,
        "cost": (int, float),
        "what": str,
        "line": str,
    },
    "sizes": {
        "batch": int,
        "bytes": int,
        "extra_flops": (int, float),
        "flops_per_example": (int, float),
        "fits": bool,
    },
}
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
      values: what becomes of each kind of product, rows of (choice, count, bytes,
        operations to compute it again as a fraction, what, line).
      gap: operations above a lower bound for any schedule of these stages within the
        same memory, both by the model, as a fraction of the step's.
      host: bytes in the memory of the host.
      flops: operations of the planned step.
      batch: the size that was planned for, if one was asked for.
      sizes: (batch, bytes, extra_flops, operations per example, whether it fits) of
        each size that was compiled.
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
    values: tuple[tuple[Any, ...], ...] = dataclasses.field(
        default=(), repr=False
    )
    gap: float = 0.0
    host: int = 0
    flops: int = 0
    batch: int | None = None
    sizes: tuple[tuple[Any, ...], ...] = dataclasses.field(
        default=(), repr=False
    )
    unknown: dict[str, int] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def with_sizes(
        self,
        batch: int,
        sizes: Iterable[tuple[Any, ...]],
    ) -> "Plan[P, R]":
        """Return the plan with its batch, and the sizes that were compiled."""
        return dataclasses.replace(
            self, batch=batch, sizes=tuple(map(tuple, sizes))
        )

    def describe(self) -> _table.Table:
        """Return a table of what becomes of each run of stages, and the figures."""
        peak, baseline, budget = map(
            _table.format_bytes, (self.peak, self.baseline, self.budget)
        )
        figures = [
            f"{self.wrt} {peak} of {baseline} (budget {budget})",
            f"{self.extra_flops:+.1%} FLOPs",
            f"at most {self.gap:.1%} above any schedule of these stages",
            f"{self.compiles} programs compiled",
        ]
        if self.host:
            figures[0] += f" and {_table.format_bytes(self.host)} on the host"
        notes = [", ".join(figures)]
        notes += map(_describe_value, self.values)
        notes += map(_describe_size, self.sizes)
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
        names = (*_FIGURES, *_LATER_FIGURES)
        content |= {name: getattr(self, name) for name in names}
        if self.unknown:
            content["unknown"] = self.unknown
        content["shared"] = self.schedule.shared
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
        shared = tuple(content.pop("shared", ()))
        schedule = Schedule(tuple(ends), tuple(fingerprints), steps, shared)
        _check_schedule(schedule)
        unknown = content.pop("unknown", {})
        _check_counts(unknown)
        _check_figures(content)
        for name in ("rows", "values", "sizes"):
            content[name] = tuple(map(tuple, content.get(name, ())))
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
    if not all(type(i) is int and i >= 0 for i in schedule.shared):
        raise ValueError("its shared variables are not numbered")


def _is_increasing(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


def _check_counts(unknown: Mapping[str, Any]) -> None:
    for n in unknown.values():
        if type(n) is not int or not 0 < n < _MAX_INTEGER:
            raise ValueError(
                "its unknown operations are not counted in positive integers"
            )


def _check_figures(content: Mapping[str, Any]) -> None:
    if content.keys() - _LATER_FIGURES.keys() != _FIGURES.keys():
        raise ValueError(f"its figures are not {', '.join(_FIGURES)}")
    kinds = _FIGURES | _LATER_FIGURES
    for name, value in content.items():
        _check_type(name, value, kinds[name])
        # Not NaN either.
        is_number = isinstance(value, int | float)
        if is_number and not abs(value) < _MAX_INTEGER:
            raise ValueError(f"{name} is beyond any size")
    for name, columns in _COLUMNS.items():
        for row in content.get(name, ()):
            if not isinstance(row, list) or len(row) != len(columns):
                raise ValueError(
                    f"its {name} have not the columns {', '.join(columns)}"
                )
            for (column, kind), value in zip(columns.items(), row, strict=True):
                _check_type(column, value, kind)


def _check_type(name: str, value: Any, kind: Any) -> None:
    # True is an int to Python. What a size that does not fit costs is NaN.
    is_bool = isinstance(value, bool) and kind not in (bool, object)
    is_number = isinstance(value, int | float)
    is_beyond = is_number and abs(value) >= _MAX_INTEGER
    if is_bool or is_beyond or not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.40}")


# A run is [stage, [saved, outer, in_parts, offload]] in the text, without the last two in
# plans of before; a rerun is {"again": steps}.


def _pack(steps: Steps) -> list[Any]:
    packed: list[Any] = []
    for step in steps:
        if isinstance(step, Run):
            choice = [step.saved, step.outer, step.in_parts, step.offload]
            packed.append([step.stage, choice])
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
            stage, choice = item
            steps.append(_unpack_run(stage, *choice))
    return tuple(steps)


def _unpack_run(
    stage: Any,
    saved: Sequence[Any] | None,
    outer: Any,
    in_parts: Any = False,
    offload: Sequence[Any] = (),
) -> Run:
    indices = None if saved is None else tuple(saved)
    for number in (*(indices or ()), outer, *offload):
        # True is an int to Python, and a float may be whole.
        if type(number) is not int or number < 0:
            raise ValueError("it has a choice that is not a number")
    if not isinstance(in_parts, bool):
        raise ValueError("it has a choice that is neither true nor false")
    if indices and len(set(indices)) < len(indices):
        raise ValueError("it saves a result twice")
    return Run(stage, indices, outer, in_parts, tuple(offload))


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


# What becomes of the products.


def describe_values(
    frontier: Frontier,
    steps: Steps | None,
) -> tuple[tuple[Any, ...], ...]:
    """Return the rows of `Plan.values`, the costliest first.

    Products inside loops are those of one iteration, counted as often as they run.
    """
    counts: dict[Any, list[float]] = {}
    for run, depth in _with_depth(steps or (), 0):
        stage = frontier.stages[run.stage]
        jaxpr, times = stage.jaxpr, 1
        if run.outer:
            loop = largest_scan(jaxpr)
            times = _jaxpr.scan_parts(loop).length
            jaxpr = scan_body(loop).jaxpr
        for i in products(jaxpr):
            eqn = jaxpr.eqns[i]
            choice = _choice(run, i, is_rerun=depth > 0)
            what = _jaxpr.primitive(eqn) + " "
            what += eqn.outvars[0].aval.str_short(short_dtypes=True)
            key = choice, what, _jaxpr.source_line(eqn)
            sums = counts.setdefault(key, [0, 0, 0.0])
            sums[0] += times
            sums[1] += times * _jaxpr.output_bytes(eqn)
            sums[2] += times * _flops.eqn_flops(eqn) / frontier.step
    rows = [
        (choice, n, nbytes, cost, what, line)
        for (choice, what, line), (n, nbytes, cost) in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row[3]))


def _choice(run: Run, i: int, *, is_rerun: bool) -> str:
    if run.saved is None or i in run.saved:
        choice = "offloaded" if i in run.offload else "saved"
        return f"{choice} in a recomputed group" if is_rerun else choice
    return "recomputed"


def _describe_value(row: tuple[Any, ...]) -> str:
    choice, count, nbytes, cost, what, line = row
    where = f" at {line}" if line else ""
    sentence = (
        f"{choice}: {count} x {what}, {_table.format_bytes(nbytes)}, "
        f"{cost:.1%} of the FLOPs{where}"
    )
    # Names may come from a text.
    return _table.printable(sentence)


def _describe_size(row: tuple[Any, ...]) -> str:
    batch, figure, extra, per_example, fits = row
    if not fits:
        return f"batch {batch}: {_table.format_bytes(figure)}, does not fit"
    return (
        f"batch {batch}: {_table.format_bytes(figure)}, {extra:+.1%} FLOPs, "
        f"{per_example:.3e} FLOPs per example"
    )
