"""The plan of a run with a budget: what its training step recomputes."""

from typing import Any, NamedTuple

import jax

from jaxtricks import remat
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import step as loop_lib
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.plan_config import Plan
from jaxtricks.remat import _memory
from jaxtricks.remat._planner import Wrt


class Prepared(NamedTuple):
    """What a run trains.

    Attributes:
      program: its functions, the step within the budget if there is one.
      plan: the plan of the step; None without a budget.
    """

    program: loop_lib.Program
    plan: remat.Plan | None


def prepare(cfg: Train, data: data_lib.Data, rate: float | None = None) -> Prepared:
    """`loop_lib.build`, planned if the settings have a budget; the same settings give the same plan.

    Raises:
      UserError: the budget can't be met.
    """
    program = loop_lib.build(cfg, data, rate)
    if not cfg.remat_budget:
        return Prepared(program, None)
    found = plan(cfg, data, program)
    return Prepared(program._replace(step=program.step_of(found.fn)), found)


def plan(
    cfg: Train,
    data: data_lib.Data,
    program: loop_lib.Program,
    *,
    wrt: Wrt = "peak",
    max_compiles: int = 6,
    topology: str | None = None,
) -> remat.Plan:
    """The loss of a run's step, planned within that step: jitted, donated, on its devices.

    Args:
      cfg: the settings; their budget is met.
      data: what the program was built for.
      program: of the settings.
      wrt, max_compiles, topology: of `remat.plan`.

    Raises:
      UserError: the budget can't be met or read, or the topology is unknown.
    """
    state, batch = program.shapes, loop_lib.batch_shapes(cfg, data, program.place)
    if topology is not None:  # its chip is not one of those at hand
        state, batch = jax.tree.map(_memory.shape, (state, batch))

    def within(loss: Any) -> tuple[Any, Any]:
        step = program.step_of(loss)
        compiled = (
            loop_lib.jitted(program, step) if topology is None else jax.jit(step, donate_argnums=0)
        )
        return compiled, (state, batch)

    try:
        return remat.plan(
            program.loss,
            *jax.eval_shape(program.inputs, state, batch),
            budget_bytes=_budget(cfg.remat_budget or ""),
            has_aux=True,
            within=within,
            wrt=wrt,
            max_compiles=max_compiles,
            topology=topology,
        )
    except ValueError as error:
        flag = "--budget" if isinstance(cfg, Plan) else "--remat-budget"
        raise UserError(str(error).replace("budget_bytes", flag)) from error


def figures(found: remat.Plan) -> dict[str, Any]:
    """What result.json says of a plan."""
    return {
        "peak_bytes": found.peak,
        "unplanned_peak_bytes": found.baseline,
        "budget_bytes": found.budget,
        "extra_flops": found.extra_flops,
    }


def _budget(text: str) -> str | float:
    """The budget as the planner takes it: a number with a point, up to 1, is a fraction."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if "." in text and value <= 1 else text
