"""Run functions in mixed precision by rewriting their trace; scale the loss in optax.

What. Matrix products and convolutions run in 16 or 8 bits; sums, exponentials and
logarithms run in float32, where parameters and optimizer state stay. `autocast` decides
this for each operation in the jaxpr of a function that knows nothing of it. float16
also needs loss scaling: a step whose gradients overflow is skipped and the scale halved.

Use.

    loss_fn = jt.amp.autocast(loss_fn)  # "p=f32,c=bf16,o=f32"
    print(jt.amp.explain(jax.grad(loss_fn), params, batch))  # what runs where, and why

With "c=f8", products round their operands to 8-bit floats, with scales of the step;
the first, the last and attention stay in bfloat16. With float16, three lines change:

    tx = jt.amp.dynamic_loss_scale(optax.adamw(1e-3))
    scale, policy = jt.amp.loss_scale(opt_state), "p=f32,c=f16,o=f32"
    loss, grads = jt.amp.value_and_grad(loss_fn, policy, scale=scale)(params, batch)

`value_and_grad` returns gradients that are still multiplied by the scale; only
`dynamic_loss_scale`, the outermost transformation, divides. A flax.nnx module whose
statistics change goes through `jt.nnx.autocast`.

Settings to start from. bfloat16 without scaling on TPU and recent GPUs.
`full_precision(fn)` keeps a part in float32, and `rules={"tanh": "deny"}` a primitive.

When it helps and when not. It saves activation memory and bandwidth on accelerators. On
CPU a step is slower, even where one product is faster than in float32.

Cost. Tracing takes longer; compiled products are those of a cast by hand. Figures:
docs/techniques/amp.md.

Composes with. grad, jit, vmap, scan, checkpoint, custom rules and shard_map. Order in a
step: autocast, recompute, `value_and_grad`, `dynamic_loss_scale(chain(agc, memopt))`.

Differences from the paper and from optax/flax. flax casts by layer and jmp by argument;
both sum in 16 bits wherever the code does, and here no sum does.

References. arXiv 1710.03740 (mixed precision), 2209.05433 (8-bit floats).
"""

from jaxtricks.amp._autocast import autocast, full_precision
from jaxtricks.amp._explain import Explanation, Island, explain
from jaxtricks.amp._loss_scale import (
    DynamicLossScale,
    DynamicLossScaleState,
    NoOpLossScale,
    SkipNonfiniteState,
    StaticLossScale,
    all_finite,
    check_skipped,
    dynamic_loss_scale,
    loss_scale,
    select_tree,
    skip_nonfinite,
    step_applied,
    value_and_grad,
)
from jaxtricks.amp._policy import Policy, with_policy

__all__ = [
    "DynamicLossScale",
    "DynamicLossScaleState",
    "Explanation",
    "Island",
    "NoOpLossScale",
    "Policy",
    "SkipNonfiniteState",
    "StaticLossScale",
    "all_finite",
    "autocast",
    "check_skipped",
    "dynamic_loss_scale",
    "explain",
    "full_precision",
    "loss_scale",
    "select_tree",
    "skip_nonfinite",
    "step_applied",
    "value_and_grad",
    "with_policy",
]
