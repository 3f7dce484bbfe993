"""amp: mixed precision by rewriting the traced function, with dynamic loss scaling in the optax chain.

What. Matrix products and convolutions run in a 16-bit format, sums, exponentials and
logarithms in float32, parameters and optimizer state stay in float32. `autocast`
decides that operation by operation, on the jaxpr of a function that knows nothing of
it. bfloat16 has float32's range and needs no loss scaling; float16 has not, so the loss
is multiplied by a scale before differentiation and the gradients are divided by it
afterwards; when they overflow, the step is skipped and the scale halved.

Use. One line makes a function low; it goes inside or outside of grad, jit, vmap,
shard_map:

    loss_fn = jt.amp.autocast(loss_fn)            # "p=f32,c=bf16,o=f32"
    print(jt.amp.explain(jax.grad(loss_fn), params, batch))   # what runs where, and why

With float16, three lines of an optax step change:

    tx = jt.amp.dynamic_loss_scale(optax.adamw(1e-3)) scale =
    jt.amp.loss_scale(opt_state) loss, grads = jt.amp.value_and_grad(loss_fn,
    "p=f32,c=f16,o=f32", scale=scale)(params, batch) updates, opt_state =
    tx.update(grads, opt_state, params)

`value_and_grad` returns the unscaled loss and gradients still multiplied by the scale;
only `dynamic_loss_scale`, outermost in the chain, divides. `jt.metrics(opt_state)`
reports the scale and the skipped steps. A flax.nnx module whose statistics change goes
through `jt.nnx.autocast`; flax.linen's `mutable=` needs nothing. `full_precision(fn)`
keeps a part in float32, `rules={"tanh": "deny"}` a primitive.

Settings to start from. "p=f32,c=bf16,o=f32" without scaling on TPU and recent GPUs.
With float16: init 2**15, growth 2 every 2000 clean steps, backoff 0.5 (those of torch's
GradScaler but for its init of 2**16, and of TF). `scan_carry="auto"` where layers run
under lax.scan: the activations between them are then kept low, as in unrolled code; the
default keeps every carry in float32, accumulators too.

When it helps and when not. It saves activation memory and bandwidth on accelerators. On
CPU it is slower: up to jaxlib 0.10.2 XLA converts to float32, multiplies, and converts
back (1.2 of float32's time for the gradient of a small transformer); since 0.12 it
multiplies in bfloat16, more slowly still (1.6 to 2.4). On TPU a float32 product is one
bfloat16 pass already, unless its precision is set: the gain is memory and traffic.

Cost. Of the traced gradient (benchmarks/results/amp_peers.md: two decoder layers, jax
0.7.2, quax 0.2.1; error: relative L2 distance from float64; kept: what the forward pass
leaves for the backward one):

    unrolled            error    low products   low sums   kept MiB   under jax.checkpoint, low products
    float32             5.0e-07     0 of 39      0 of 47      2.90        0 of 26
    cast by hand        8.5e-03    39 of 39      9 of 47      1.72       26 of 26
    with_policy (jmp)   1.1e-02    39 of 39     30 of 47      1.46       26 of 26
    autocast            8.3e-03    39 of 39      0 of 47      1.72       26 of 26
    grampax 0.1.0       6.9e-03    39 of 39      0 of 47      2.34        3 of 32
    jaxamp 0.0.4        TypeError; it runs an MLP, with 3 of 11 sums low

On jax 0.10.2 and 0.12 neither peer runs. Temporaries on a TPU v5e as libtpu 0.0.50.1
plans them, to the cast by hand (benchmarks/results/tpu_amp.md): unrolled 0.87, scan
1.01 (auto carry 1.00), scan of jax.checkpoint 1.18 (auto carry 0.88: set it there).
Tracing takes 1.3 to 2.0 times that of the loss, the gradient's 0.9 to 1.5 times that of
the cast by hand (autocast outside of grad: to 1.75); compiling 0.8 to 1.0 (`make
bench`). Training reaches float32's loss within 1 % in bfloat16 and float16 on text and
images, three seeds each; skipping steps costs what it costs in float32 too
(benchmarks/results/amp_training.md). The finiteness check of the loss scale reads
every gradient once.

Composes with. Everything: the result is ordinary JAX. scan, while, cond,
jax.checkpoint, custom_jvp, custom_vjp and shard_map are rewritten inside; jit keeps its
shardings, donation and names. Order in a step: autocast, recompute, `value_and_grad`,
then `dynamic_loss_scale(chain(agc, memopt, ...))`, around `optax.MultiSteps` too. With
several devices under shard_map, `axis_name=` makes them skip together. What else a step
changes is kept on a skipped one by `select_tree(step_applied(opt_state, new_opt_state),
new_statistics, statistics)`; `check_skipped(opt_state)` raises on the host after more
than max_consecutive (50) skips in a row. Not rewritten: Pallas kernels, FFI calls and
callbacks (counted by `explain`), float64, what is 16-bit already, products with a
`precision=` above DEFAULT, inner products, what jax.custom_batching.custom_vmap wraps.
Refs are refused.

Differences from the paper and from optax/flax. flax casts by layer (`dtype=`), jmp by
argument: both sum in 16 bits wherever the code does; here no sum does, nor the
derivative of a broadcast, a gather or a maximum. "half" means bfloat16 on every backend
(jmp: float16 off TPU). `with_policy` is jmp's cast of arguments, for comparison. Scales
are float32 whatever the gradients are, survive jit whole (jmp loses min_loss_scale),
and gradients are divided by the scale that multiplied them, not by the adjusted one.
`optax.apply_if_finite` applies the bad update after its limit; `skip_nonfinite` never
does: `check_skipped` raises on the host instead. TensorFlow's graph pass leaves `x -
max` before an exponential in 16 bits; here a value that only float32 operations read is
computed in float32.

References. Micikevicius et al., Mixed Precision Training, arXiv 1710.03740 (loss
scaling: section 3.2).
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
