"""remat: recompute activations in the backward pass, and measure what that saved.

What. `recompute_grad(f)` computes f as ever but keeps only its inputs for the backward pass and runs f
again there. `memory(fn, *args)` compiles fn and reads XLA's buffer assignment: bytes of temporaries,
arguments, outputs, and the peak they add up to.

Use. Wrap each block, not the whole network:

    for block in blocks:
        x = jt.remat.recompute_grad(block)(x)
    print(jt.remat.memory(jax.value_and_grad(loss), params, batch))

Settings to start from. One wrapper a residual block or transformer layer, or sqrt(n) wrappers over
groups of layers. A function whose only residual is its input has nothing to save.

When it helps and when not. Where activations, not parameters or optimizer state, fill the memory: deep
nets, long sequences, large images. On a net that fits it only adds the second forward pass.

Cost. One more forward pass of what is wrapped (about a third more FLOPs where all of it is), one copy
of its input, and a handful of integer operations.

Composes with. jit, grad, vmap, scan, sharding, nesting, custom rules inside; traced values that the
function closes over (parameters, keys) receive their gradients. A Flax NNX module that updates its own
variables goes through `jt.nnx.recompute_grad(module)`. Reverse mode only: forward mode through it is
refused by JAX.

Differences from the paper and from optax/flax. `jax.checkpoint` saves nothing in unrolled code on
XLA's CPU backend: the barriers it relies on are removed before common subexpressions are merged. Here
the recomputation depends on the cotangent by data, bit for bit without changing a value, so it cannot
be merged or moved. Random numbers need no seed bookkeeping: keys are inputs, so both passes draw the
same mask.

References. Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

from jaxtricks.remat.budget import BudgetInfeasible
from jaxtricks.remat.effect import Effect, check_effective
from jaxtricks.remat.loops import scan
from jaxtricks.remat.measure import Report, memory
from jaxtricks.remat.names import checkpoint, name
from jaxtricks.remat.planner import auto_remat, plan
from jaxtricks.remat.plans import Plan, plan_from_json
from jaxtricks.remat.recompute import recompute_grad
from jaxtricks.remat.residuals import residuals
from jaxtricks.remat.segments import sequential

__all__ = [
    "BudgetInfeasible",
    "Effect",
    "Plan",
    "Report",
    "auto_remat",
    "check_effective",
    "checkpoint",
    "memory",
    "name",
    "plan",
    "plan_from_json",
    "recompute_grad",
    "residuals",
    "scan",
    "sequential",
]
