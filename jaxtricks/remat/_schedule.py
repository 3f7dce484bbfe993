"""Run a program as a schedule says: each stage by an option, groups of them again.

A schedule belongs to one program: it holds the fingerprints of the stages, which are
compared when it is applied to a function.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax

from jaxtricks import _flops, _jaxpr
from jaxtricks._partition import positional, without_changes
from jaxtricks.remat import _sequential, _stages
from jaxtricks.remat._checkpoint import repeat_in_loop, with_labels
from jaxtricks.remat._recompute import recompute_grad, recomputed
from jaxtricks.remat._stages import Stage

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a stage once, by one of its options.

    Attributes:
      stage: index of the stage.
      saved, outer, offload: see `_stages.Option`; the defaults save everything.
      in_parts: what lies between two products runs once more when its own cotangent
        arrives. Less is alive in the backward pass of the stage, for a few elementwise
        operations.
    """

    stage: int
    saved: tuple[int, ...] | None = None
    outer: int = 0
    in_parts: bool = False
    offload: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.saved is None:
            text = "keep"
        elif self.saved:
            on_device = len(self.saved) - len(self.offload)
            counts = {"save": on_device, "offload": len(self.offload)}
            text = ", ".join(f"{verb} {n}" for verb, n in counts.items() if n)
        else:
            text = "recompute"
        if self.in_parts:
            text += ", in parts"
        return f"scan in {self.outer}, {text}" if self.outer else text


@dataclasses.dataclass(frozen=True)
class Rerun:
    """Run these steps and save only their input, and once more in the backward pass."""

    steps: "Steps"


Steps = tuple[Run | Rerun, ...]


def runs_of(steps: Steps) -> Iterator[Run]:
    """Yield the runs of stages in order."""
    for step in steps:
        if isinstance(step, Run):
            yield step
        else:
            yield from runs_of(step.steps)


def stages_of(steps: Steps) -> list[int]:
    """Return the indices of the stages in order."""
    return [run.stage for run in runs_of(steps)]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How each stage of one program runs.

    Attributes:
      ends: where the stages end; see `_stages.split`.
      fingerprints: of the stages.
      steps: how they run; None leaves the function as it is.
      shared: differentiated variables that many stages read, as weights of a recurrent
        network; numbers of (*constvars, *invars, *results of the equations). Each
        recomputed step returns them, so that their cotangents pass through it.
    """

    ends: tuple[int, ...]
    fingerprints: tuple[str, ...]
    steps: Steps | None
    shared: tuple[int, ...] = ()

    def apply(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Return fn with its activations recomputed as the schedule says.

        Arguments and results are the same.

        Raises:
          ValueError: (from the result) fn is another function than the schedule is for.
        """
        if self.steps is None:
            return fn
        steps = self.steps
        unchanging = without_changes(fn, "plan")

        @functools.wraps(fn)
        def planned(*args: P.args, **kwargs: P.kwargs) -> R:
            # By position, as they were planned: the order of keywords is the caller's.
            arguments = positional(fn, args, kwargs, "remat.plan")
            closed, structure = _jaxpr.trace(unchanging, *arguments)
            program = _jaxpr.straight(closed)
            leaves = [*program.consts, *jax.tree.leaves(arguments)]
            opened = _stages.main_body(program.jaxpr)
            if opened is None:
                outs = self._prepared(program.jaxpr, steps)(*leaves)
            else:
                i, body = opened
                execute = self._prepared(body.jaxpr, steps)
                outs = _with_body(program.jaxpr, i, execute, body.consts)(
                    *leaves
                )
            return jax.tree.unflatten(structure, outs)

        return planned

    def _prepared(
        self,
        program: _jaxpr.Jaxpr,
        steps: Steps,
    ) -> Callable[..., list[Any]]:
        stages = self._matching_stages(program)
        # A text may ask for what its fingerprints do not rule out.
        for run in runs_of(steps):
            _check(stages[run.stage].jaxpr, run)
        self._check_shared(program)
        return _scheduled(program, stages, steps, self.shared)

    def _check_shared(self, program: _jaxpr.Jaxpr) -> None:
        count = len(_jaxpr.all_variables(program))
        if max(self.shared, default=-1) >= count:
            raise ValueError(
                "this plan shares a variable that is not there: plan again"
            )

    def _matching_stages(self, program: _jaxpr.Jaxpr) -> list[Stage]:
        count = self.ends[-1]
        # The number first: with another one the stages can't be cut.
        if len(program.eqns) == count:
            stages = _stages.split(program, self.ends)
            pairs = zip(stages, self.fingerprints, strict=True)
            different = [
                i for i, (s, f) in enumerate(pairs) if s.fingerprint != f
            ]
            if not different:
                return stages
            where = f"stage {different[0]} of {len(stages)} differs"
        else:
            where = f"it has {len(program.eqns)} operations where the plan has {count}"
        raise ValueError(
            "this plan was made for another function, other shapes or dtypes "
            f"({where}): plan again, or use auto_remat, which plans once for "
            "each signature"
        )


def _check(jaxpr: _jaxpr.Jaxpr, run: Run) -> None:
    """Raise ValueError if a stage can't run this way; the plan may come from a text."""
    body = jaxpr
    if run.outer:
        loop = largest_scan(jaxpr)
        if loop is None or _jaxpr.scan_parts(loop).length % run.outer:
            raise ValueError(
                f"this plan splits a loop in {run.outer} that has other steps: "
                "plan again"
            )
        body = scan_body(loop).jaxpr
    saved = run.saved or ()
    # The parts of a stage have products between them, and nothing else keeps its place.
    choice = products(body) if run.in_parts else range(len(body.eqns))
    if not set(run.offload) <= set(saved) <= set(choice):
        raise ValueError(
            "this plan saves the result of an operation that is not there: plan again"
        )


def _with_body(
    program: _jaxpr.Jaxpr,
    index: int,
    execute: Callable[..., list[Any]],
    consts: Sequence[Any],
) -> Callable[..., list[Any]]:
    """Return the program as a function of (*constvars, *invars), one body run otherwise.

    Args:
      program: an inlined jaxpr.
      index: of its shard_map.
      execute: what to run inside, a function of (*consts, *operands).
      consts: of the body.
    """
    eqn = program.eqns[index]
    before = _jaxpr.extract(program.eqns[:index])
    after = _jaxpr.extract(program.eqns[index + 1 :])
    body = jax.shard_map(
        functools.partial(execute, *consts), **_jaxpr.shard_map_arguments(eqn)
    )
    parts = ((before, _plain(before)), (eqn, body), (after, _plain(after)))
    return _in_order(program, parts)


def _in_order(
    jaxpr: _jaxpr.Jaxpr,
    parts: Sequence[tuple[Any, Callable[..., Sequence[Any]]]],
) -> Callable[..., list[Any]]:
    """Return a jaxpr as a function of (*constvars, *invars), its parts run as given.

    Args:
      jaxpr: the whole.
      parts: (equation or jaxpr, a function of what it reads).
    """
    variables = (*jaxpr.constvars, *jaxpr.invars)

    def execute(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(variables, xs, strict=True))
        for part, fn in parts:
            results = fn(*_jaxpr.read_values(part.invars, env))
            env.update(zip(part.outvars, results, strict=True))
        return _jaxpr.read_values(jaxpr.outvars, env)

    return execute


def _scheduled(
    program: _jaxpr.Jaxpr,
    stages: Sequence[Stage],
    steps: Steps,
    shared: Sequence[int],
) -> Callable[..., list[Any]]:
    """Return the program as a function of (*constvars, *invars), run by the steps."""
    needed_after = _jaxpr.needed_after(
        [stage.jaxpr.eqns for stage in stages], program.outvars
    )
    variables = (*program.constvars, *program.invars)
    numbered = _jaxpr.all_variables(program)
    shared_vars = {numbered[i] for i in shared}

    def execute(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(variables, xs, strict=True))
        perform(steps, env)
        # Results may be literals.
        return _jaxpr.read_values(program.outvars, env)

    def perform(steps: Steps, env: dict[Any, Any]) -> None:
        for step in steps:
            if isinstance(step, Run):
                jaxpr = stages[step.stage].jaxpr
                ins = [*jaxpr.constvars, *jaxpr.invars]
                passed = [] if step.saved is None else passing(ins, step)
                outs = [*jaxpr.outvars, *passed]
                through = _jaxpr.build(
                    jaxpr.constvars, jaxpr.invars, outs, jaxpr.eqns
                )
                fn = run_stage(through, step)
            else:
                # A group inside a group is recomputed twice: its inputs are alive only
                # while the outer one runs again.
                ins, outs = boundary(step.steps)
                outs += passing(ins, step)
                group = functools.partial(run_group, step.steps, ins, outs)
                fn = recompute_grad(group)
            results = fn(*[env[v] for v in ins])
            env.update(zip(outs, results, strict=True))

    def passing(ins: Sequence[Any], step: Run | Rerun) -> list[Any]:
        """Return the shared inputs of a step that later steps read too.

        A step returns them as they are, so that their cotangents pass through it. Without
        it a compiler adds up the cotangents of all steps at once, in the end, and until
        then each of them is alive.
        """
        later_reads = needed_after[stages_of((step,))[-1]]
        return [v for v in ins if v in shared_vars and v in later_reads]

    def boundary(steps: Steps) -> tuple[list[Any], list[Any]]:
        """Variables that a group of stages reads, and those of it that later ones read."""
        indices = stages_of(steps)
        later_reads = needed_after[indices[-1]]
        eqns: list[Any] = []
        outs: list[Any] = []
        for i in indices:
            jaxpr = stages[i].jaxpr
            eqns += jaxpr.eqns
            outs += [v for v in jaxpr.outvars if v in later_reads]
        return _jaxpr.free_variables(eqns), outs

    def run_group(
        steps: Steps,
        ins: Sequence[Any],
        outs: Sequence[Any],
        *xs: Any,
    ) -> list[Any]:
        env = dict(zip(ins, xs, strict=True))
        perform(steps, env)
        return [env[v] for v in outs]

    return execute


# One stage.


def run_stage(
    jaxpr: _jaxpr.Jaxpr,
    run: Run,
) -> Callable[..., list[Any]]:
    """Return the stage, run by an option, as a function of (*constvars, *invars)."""
    if run.outer:
        return _with_split_scan(jaxpr, run)
    if run.saved is None:
        return _plain(jaxpr)
    return _recomputed(jaxpr, run)


def _recomputed(
    jaxpr: _jaxpr.Jaxpr,
    run: Run,
    *,
    ordered: bool = True,
) -> Callable[..., list[Any]]:
    """Return a stage or a body that saves the results of some equations."""
    saved = run.saved or ()
    if not run.in_parts:
        return recomputed(jaxpr, saved=saved, ordered=ordered)

    def execute(*xs: Any) -> list[Any]:
        parts, numbers = _in_parts(jaxpr, saved, xs)
        return recomputed(parts, saved=numbers, ordered=ordered)(*xs)

    return execute


PRODUCTS = ("dot_general", "conv_general_dilated")


def products(jaxpr: _jaxpr.Jaxpr) -> list[int]:
    """Return the indices of the equations whose results are worth saving."""
    return [i for i, eqn in enumerate(jaxpr.eqns) if _is_product(eqn)]


def _is_product(eqn: Any) -> bool:
    return _jaxpr.primitive(eqn) in PRODUCTS


def has_parts(jaxpr: _jaxpr.Jaxpr) -> bool:
    """Return whether there is more than one equation between two products."""
    return bool(products(jaxpr)) and any(
        len(part) > 1 for part in _parts(jaxpr)
    )


def with_results(
    jaxpr: _jaxpr.Jaxpr,
    run: Run,
    indices: Sequence[int],
) -> Callable[..., list[Any]]:
    """Return the stage, saving everything, with the results of some products behind its own."""
    if run.outer:
        return run_stage(jaxpr, run)

    def execute(*xs: Any) -> list[Any]:
        stage, numbers = jaxpr, indices
        if run.in_parts:
            stage, numbers = _in_parts(jaxpr, indices, xs)
        results = _jaxpr.computed_variables([stage.eqns[i] for i in numbers])
        more = _jaxpr.build(
            stage.constvars,
            stage.invars,
            [*stage.outvars, *results],
            stage.eqns,
        )
        return _plain(more)(*xs)

    return execute


def _parts(jaxpr: _jaxpr.Jaxpr) -> list[_jaxpr.Equations]:
    """Return each product alone, and what lies between them."""
    parts: list[_jaxpr.Equations] = []
    for is_product, group in itertools.groupby(jaxpr.eqns, key=_is_product):
        eqns = tuple(group)
        parts += [(eqn,) for eqn in eqns] if is_product else [eqns]
    return parts


def _in_parts(
    jaxpr: _jaxpr.Jaxpr,
    indices: Sequence[int],
    xs: Sequence[Any],
) -> tuple[_jaxpr.Jaxpr, tuple[int, ...]]:
    """Return the jaxpr with what lies between its products recomputed, and their new indices.

    It is traced on its inputs xs, whose types may say more than their shapes.
    """
    parts: list[tuple[Any, Callable[..., list[Any]]]] = []
    groups = _parts(jaxpr)
    needed = _jaxpr.needed_after(groups, jaxpr.outvars)
    for eqns, later_reads in zip(groups, needed, strict=True):
        outs = [v for v in _jaxpr.computed_variables(eqns) if v in later_reads]
        part = _jaxpr.extract(eqns, outs)
        parts.append(
            (part, _plain(part) if len(eqns) == 1 else recomputed(part))
        )
    closed, _ = _jaxpr.trace(_in_order(jaxpr, parts), *xs)
    program = closed.jaxpr
    number = dict(zip(products(jaxpr), products(program), strict=True))
    return program, tuple(number[i] for i in indices)


def largest_scan(jaxpr: _jaxpr.Jaxpr) -> Any:
    """Return the scan with most arithmetic; None if there is none to split."""
    scans = [
        eqn
        for eqn in jaxpr.eqns
        if _jaxpr.primitive(eqn) == "scan" and _jaxpr.scan_parts(eqn).length > 1
    ]
    return max(scans, key=_flops.eqn_flops, default=None)


def scan_body(loop: Any) -> _jaxpr.ClosedJaxpr:
    """Return the body of a scan, its calls written out."""
    return _jaxpr.inline(_jaxpr.bodies(loop)[0])


def _plain(jaxpr: _jaxpr.Jaxpr) -> Callable[..., list[Any]]:
    n = len(jaxpr.constvars)
    return lambda *xs: _jaxpr.as_fun(jaxpr)(xs[:n], *xs[n:])


def _with_split_scan(
    jaxpr: _jaxpr.Jaxpr,
    run: Run,
) -> Callable[..., list[Any]]:
    """Return the stage that saves everything except inside its largest scan."""
    loop = largest_scan(jaxpr)
    position = next(i for i, eqn in enumerate(jaxpr.eqns) if eqn is loop)
    before = _jaxpr.extract(jaxpr.eqns[:position])
    after = _jaxpr.extract(jaxpr.eqns[position + 1 :])
    parts = (
        (before, _plain(before)),
        (loop, _split_scan(loop, run)),
        (after, _plain(after)),
    )
    return _in_order(jaxpr, parts)


def _split_scan(
    loop: Any,
    run: Run,
) -> Callable[..., list[Any]]:
    """Return the scan as two nested ones, whose two bodies are recomputed."""
    parts = _jaxpr.scan_parts(loop)
    first_row = parts.consts + parts.carry
    body = scan_body(loop)
    recompute = functools.partial(repeat_in_loop, offload=bool(run.offload))
    if run.saved is None:
        step = _plain(body.jaxpr)
    elif run.saved and run.outer > 1:
        # What the inner loop saves stays saved while the outer one repeats it.
        step = with_labels(body.jaxpr, run.saved, run.offload)
    elif run.offload:
        step = recompute(with_labels(body.jaxpr, run.saved, run.offload))
    else:
        # The backward pass of a loop is another loop: no order is needed.
        step = _recomputed(body.jaxpr, run, ordered=False)
    # 1 leaves a single loop, whose body is recomputed.
    outer = [run.outer] if run.outer > 1 else []

    def execute(*xs: Any) -> list[Any]:
        fixed = xs[: parts.consts]
        init = list(xs[parts.consts : first_row])
        rows = list(xs[first_row:])

        def one(carry: Any, row: Any) -> tuple[Any, Any]:
            out = step(*body.consts, *fixed, *carry, *row)
            return out[: parts.carry], out[parts.carry :]

        carry, stacked = _sequential.nested(
            one,
            init,
            rows,
            parts.length,
            outer,
            reverse=parts.reverse,
            recompute=recompute if run.saved else None,
        )
        return [*carry, *stacked]

    return execute
