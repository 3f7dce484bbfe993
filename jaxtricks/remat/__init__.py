"""remat: recompute activations in the backward pass, by hand or for a memory budget.

What. `recompute_grad(f)` saves only the inputs of f for the backward pass and runs f
again there. `plan(loss, ..., budget_bytes=)` chooses what to keep, what to recompute and
what to offload to the host, and compiles until XLA's own buffer assignment meets the
budget; with `batch="max"` it finds the largest batch that does.

Use.

    for block in blocks:
        x = jt.remat.recompute_grad(block)(x)  # by hand: one wrapper per block

    plan = jt.remat.plan(loss, params, batch, budget_bytes="4GiB")  # or a fraction, 0.5
    print(plan)  # jt.plot.plan(plan) draws it
    grads = jax.jit(jax.grad(plan.fn))(params, batch)

`auto_remat(loss, budget)` plans at the first call with each signature. `checkpoint(f,
save="attn")` saves what `checkpoint_name(x, "attn")` marks. `sequential(fns)` and
`scan(body, init, xs)` need memory for sqrt(n) or log(n) layers. `memory_analysis`,
`saved_residuals` and `check_effective` show what is saved, and whether it helped.

Settings to start from. budget_bytes just below the memory of the device, and `within=`
with your whole donated step, so that the figure includes the optimizer.

When it helps and when not. Where activations fill the memory: deep nets, long sequences,
large images. A net that already fits only pays for a second forward pass.

Cost. A second forward pass of what is not saved; planning compiles up to six times.
Figures: docs/techniques/remat.md.

Composes with. jit, grad, vmap, scan, sharding and nesting. Plan what `amp.autocast`
returns. Functions of flax.nnx modules go through the same names in `jt.nnx`; linen
modules go through `jt.linen.functional`. Forward over reverse: ad="both".

Differences from the paper and from optax/flax. Random numbers need no seeds: keys are
inputs of both passes.

References. Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv
1604.06174. Beaumont et al., "Optimal checkpointing for heterogeneous chains", arXiv
1911.13214.
"""

from jaxtricks.remat._budgets import BudgetInfeasible
from jaxtricks.remat._checkpoint import (
    checkpoint,
    checkpoint_name,
    saved_residuals,
)
from jaxtricks.remat._memory import (
    Effect,
    Report,
    check_effective,
    libtpu_environment,
    memory_analysis,
)
from jaxtricks.remat._plan import Plan, plan_from_json
from jaxtricks.remat._planner import auto_remat, plan
from jaxtricks.remat._recompute import recompute_grad
from jaxtricks.remat._sequential import scan, sequential

__all__ = [
    "BudgetInfeasible",
    "Effect",
    "Plan",
    "Report",
    "auto_remat",
    "check_effective",
    "checkpoint",
    "checkpoint_name",
    "libtpu_environment",
    "memory_analysis",
    "plan",
    "plan_from_json",
    "recompute_grad",
    "saved_residuals",
    "scan",
    "sequential",
]
