"""amp: mixed precision by policy, with dynamic loss scaling as a link of the optax chain.

What. Matrix products and convolutions run in a 16-bit format, parameters and optimizer state stay in
float32. bfloat16 has float32's range and needs no loss scaling; float16 has not, so the loss is
multiplied by a scale before differentiation and the gradients are divided by it afterwards; when they
overflow, the step is skipped and the scale halved.

Use. Three lines of an optax step change:

    tx = jt.amp.dynamic_loss_scale(optax.adamw(1e-3))
    scale = jt.amp.loss_scale(opt_state)
    loss, grads = jt.amp.value_and_grad(loss_fn, "p=f32,c=bf16,o=f32", scale=scale)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)

`value_and_grad` returns the unscaled loss and gradients still multiplied by the scale; only
`dynamic_loss_scale`, outermost in the chain, divides. `jt.metrics(opt_state)` reports the scale and the
skipped steps.

Settings to start from. "p=f32,c=bf16,o=f32" without scaling on TPU and recent GPUs. With float16:
init 2**15, growth 2 every 2000 clean steps, backoff 0.5 (those of torch's GradScaler but for its init
of 2**16, and of TF). Keep normalization statistics, softmax and losses in float32.

When it helps and when not. It saves activation memory and bandwidth on accelerators. On CPU it is
slower: XLA's CPU backend converts to float32, multiplies, and converts back.

Cost. One cast per parameter and step; the finiteness check reads every gradient once.

Composes with. Everything: casts are ordinary JAX operations. Order in a step: policy, recompute,
`value_and_grad`, then `dynamic_loss_scale(chain(agc, memopt, ...))`, around `optax.MultiSteps` too.

Differences from the paper and from optax/flax. "half" means bfloat16 on every backend (jmp: float16
off TPU). Scales are float32 whatever the gradients are, and gradients are divided by the scale that
multiplied them, not by the adjusted one. `optax.apply_if_finite` applies the bad update after its
limit; `skip_nonfinite` never does: `check` raises on the host instead. Casts touch every floating
array; the rewrite that picks operations by itself (autocast) is not built yet.

References. Micikevicius et al., Mixed Precision Training, arXiv 1710.03740 (loss scaling: section 3.2).
"""

from jaxtricks.amp.autocast import autocast, full_precision
from jaxtricks.amp.explain import Explanation, Island, explain
from jaxtricks.amp.grads import (
    DynamicLossScaleState,
    SkipNonfiniteState,
    check,
    dynamic_loss_scale,
    loss_scale,
    skip_nonfinite,
    value_and_grad,
)
from jaxtricks.amp.policy import Policy, with_policy
from jaxtricks.amp.scale import (
    DynamicLossScale,
    NoOpLossScale,
    StaticLossScale,
    all_finite,
    select_tree,
)

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
    "check",
    "dynamic_loss_scale",
    "explain",
    "full_precision",
    "loss_scale",
    "select_tree",
    "skip_nonfinite",
    "value_and_grad",
    "with_policy",
]
