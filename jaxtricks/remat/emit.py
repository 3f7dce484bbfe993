"""A schedule as a program."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtricks import _jaxpr
from jaxtricks.remat import _stages, flat
from jaxtricks.remat._solver import Run, Schedule, stages_of
from jaxtricks.remat.chain import Stage
from jaxtricks.remat.recompute import recompute_grad


def scheduled(
    program: _jaxpr.Jaxpr, stages: Sequence[Stage], schedule: Schedule
) -> Callable[..., list[Any]]:
    """The program as a function of (*constvars, *invars), its stages run by the schedule."""
    needed = flat.needed_after([stage.jaxpr.eqns for stage in stages], program.outvars)

    def go(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip((*program.constvars, *program.invars), xs, strict=True))
        _run(schedule, env)
        return flat.read(program.outvars, env)

    def _run(steps: Schedule, env: dict[Any, Any]) -> None:
        for step in steps:
            if isinstance(step, Run):
                jaxpr = stages[step.stage].jaxpr
                ins, outs = (*jaxpr.constvars, *jaxpr.invars), jaxpr.outvars
                fn = _stages.run(jaxpr, step.choice)
            else:
                ins, outs, fn = _group(step.steps)
            env.update(zip(outs, fn(*[env[v] for v in ins]), strict=True))

    def _group(steps: Schedule) -> tuple[Sequence[Any], Sequence[Any], Callable[..., list[Any]]]:
        held = list(stages_of(steps))
        ins = flat.read_by([eqn for i in held for eqn in stages[i].jaxpr.eqns])
        made = [v for i in held for v in stages[i].jaxpr.outvars]
        outs = [v for v in made if v in needed[held[-1]]]

        def inner(*xs: Any) -> list[Any]:
            env = dict(zip(ins, xs, strict=True))
            _run(steps, env)
            return [env[v] for v in outs]

        return ins, outs, recompute_grad(inner)

    return go
