"""remat: recompute activations in the backward pass, by hand or planned for a budget of bytes.

What. `recompute_grad(f)` computes f as ever but keeps only its inputs for the backward
pass and runs f again there. `plan(loss, ..., budget_bytes=)` decides by itself what to
keep and what to run again, and compiles until XLA's own buffer assignment meets the
budget.

Use. By hand, one wrapper a block; or a plan, whose fn is a drop-in for the loss:

    for block in blocks:
        x = jt.remat.recompute_grad(block)(x)

    plan = jt.remat.plan(loss, params, batch, budget_bytes="4GiB")      # or 0.5: half of today's
    print(plan)                                                         # jt.plot.plan(plan) draws it
    grads = jax.jit(jax.grad(plan.fn))(params, batch)

`auto_remat(loss, budget)` plans at the first call with each signature. `checkpoint(f,
save="attn")` keeps what `checkpoint_name(x, "attn")` marks. `sequential(fns)` and
`scan(body, init, xs)` need memory of sqrt(n) or log(n) layers. `memory_analysis`,
`saved_residuals` and `check_effective` say what is kept and whether recomputing helped.

Settings to start from. budget_bytes just below what the machine has, and `within=` with
your whole donated step, so that the optimizer's memory is in the figure. By hand, one
wrapper a residual block or layer.

When it helps and when not. Where activations, not parameters or optimizer state, fill
the memory: deep nets, long sequences, large images. On a net that fits it only adds a
second forward pass. A function whose only residual is its input has nothing to save.

Cost. `python -m tests.bench.remat_plan` writes tests/bench/results/remat_plan.md:
temporaries of value and gradient in float32, compiled for CPU with jax 0.12.0.1; extra
FLOPs counted in the traced program.

    MiB of temporaries    budget  planned  FLOPs    by hand, recompute_grad
    16-layer MLP, 8.5        4.0      4.0  + 26 %   4.0 + 34 % sqrt(n), 3.0 + 68 % recursion
                             3.0      3.0  + 41 %
    12-layer decoder, 223     62     61.0  +  7 %   58.5 + 30 % sqrt(n)
                            27.5     26.0  + 21 %   26.5 + 24 % each layer, 23.5 + 46 % nested
                              21     20.0  + 26 %
    64-layer scan, 65.6     16.5     14.5  + 33 %   33.6 + 33 % body, 15.0 + 33 % two levels

Planning compiles the program two to six times and runs nothing.

Composes with. jit, grad, vmap, scan, sharding, nesting, custom rules inside; traced
values that the function closes over receive their gradients. Plan what autocast
returns, so that the plan sees the final dtypes. Functions of flax.nnx modules, whose
statistics change in place, go through `jt.nnx.plan`, `auto_remat`, `checkpoint` and
`recompute_grad`; linen's through `functional`. Collective operations are never run
twice. Reverse mode; ad="both" allows forward over reverse.

Differences from the paper and from optax/flax. Before jaxlib 0.11.2 `jax.checkpoint`
saves nothing in unrolled code on XLA's CPU backend, which removes the barriers that it
relies on before it merges common subexpressions; here the second run waits for the
cotangent behind a conditional that no pass sees through. Since jaxlib 0.11.2 the
barriers hold: `checkpoint` is jax.checkpoint there, and `recompute_grad` needs its
bytes and its operations. What `recompute_grad` is still for: the older versions
(Colab's 0.7.2); strings, flags and callables as arguments without `static_argnums`; and
`jt.nnx.recompute_grad`, `sequential` and `plan`, which are made of it. The paper plans
against its own allocator; this plan is measured by the compiler. Random numbers need no
seeds: keys are inputs of both passes.

References. Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv
1604.06174. Beaumont et al., Optimal checkpointing for heterogeneous chains, arXiv
1911.13214.
"""

from jaxtricks.remat._checkpoint import checkpoint, checkpoint_name, saved_residuals
from jaxtricks.remat._memory import (
    Effect,
    Report,
    check_effective,
    libtpu_environment,
    memory_analysis,
)
from jaxtricks.remat._plan import Plan, plan_from_json
from jaxtricks.remat._planner import BudgetInfeasible, auto_remat, plan
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
