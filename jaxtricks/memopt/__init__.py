"""Optimizers whose memory does not grow with the model: Adafactor and SM3.

What. Adam keeps two numbers per parameter. Adafactor keeps the mean of g^2 per row and
per column of a matrix and rebuilds the rest as their outer product; SM3 keeps the
largest g^2 seen per row and per column. For an n x m matrix that is n + m numbers
instead of 2 n m.

Use.

    import jaxtricks as jt
    roles = jt.nnx.roles(model)                             # or jt.linen.roles, roles.by_path, roles.infer
    tx = jt.memopt.adafactor(roles=roles)                    # the paper's relative step, no rate to choose
    tx = jt.memopt.adafactor(1e-3, multiply_by_parameter_scale=False, roles=roles)      # in Adam's place
    tx = jt.memopt.adafactor(1e-2, **jt.memopt.PRESETS["t5x"])
    tx = jt.memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8", roles=roles)
    print(jt.memopt.state_table(tx, params))                # from shapes, allocates nothing
    tx = optax.chain(tx, jt.memopt.stochastic_round(0))     # last, where parameters are bfloat16

Settings to start from. adafactor() as it stands is the paper's. With a rate of your
own, steps are relative to RMS(p): 1e-2 moves a weight by about 1 %; with
multiply_by_parameter_scale=False they are absolute, and Adam's rates are the place to
start. beta1=0.9 in "bfloat16" costs two bytes a parameter, in "int8" 1.03: a scale for
every 128 entries, rounded at random without bias, the same at the same step and path.
sm3(0.1, momentum=0.9) with a warm-up (the transformer measured below wanted 0.015). Say
roles= as soon as layers are stacked (scan, vmap) or kernels have more than two axes,
and read `state_table`: below min_dim_size_to_factor nothing is factored, and an
attention kernel (1024, 16, 64) without roles= is not factored at all.

When it helps and when not. When optimizer memory is what limits the model or the batch.
It saves nothing on vectors, and little where momentum is wanted in float32. SM3 never
forgets (like Adagrad): for long runs with a changing loss Adafactor is the safer
choice. Measured (python -m benchmarks.training: one-layer character transformer, 200
steps, n = 3, four rates tried for each, six for SM3): validation 2.20 +- 0.01 nats for
AdamW, 2.08 +- 0.03 for Adafactor with 0.004 of its state, 2.32 +- 0.04 for SM3 with 0.5
of it and the same with int8 momentum and 0.13 of it: on so short a run SM3 is 6 %
behind. stochastic_round is for parameters kept in 16 bits: to the nearest, steps below
1/512 of a bfloat16 weight are lost. It does nothing in float32. Measured (python -m
benchmarks.rounding, the same model, n = 3): at a peak rate of 1e-3 the validation loss
is 1.203 of float32's to the nearest and 1.000 rounded at random; at 1e-2, 1.005 and
1.000.

Cost. State: `state_bytes`, `state_table`. The step beside AdamW's on two CPU cores (jax
0.12.0.1, optax 0.2.8, 10.5 M parameters in 145 leaves, float32, donated;
benchmarks/results/optimizers.md, `make bench`):

                               step   bytes/param   temporaries   trace + compile
      adamw                     1        40            0            1
      adafactor                 0.93     24            0.5 MiB      1.91   (289 leaves: 1.86)
      optax.adafactor           2.03     56           44 MiB        3.08   (289 leaves: 3.39)
      sm3, momentum 0.9         1.07     32            0.2 MiB      1.02
      optax.sm3                 1.51     44           40 MiB        1.08
      sm3                       0.80     20            0.2 MiB      0.74
      adafactor, int8 momentum  2.16     47           41 MiB        5.7
      sm3, int8 momentum        3.36     63           81 MiB        4.9

On a TPU v5e, compiled ahead of time, traffic with HBM for a leaf of 8192 x 8192 is 24
bytes a parameter for adafactor (adamw and optax.adafactor 28), 20 for sm3 with momentum
(optax.sm3 20) and 12 without. Trees that fit into its fast memory are counted
otherwise: benchmarks/results/tpu.md. Int8 momentum buys state, not time: while it is
rounded a few float32 copies of a leaf are alive. Stacking equal leaves into one update
was measured too: two to three times slower, and slower to compile.

Composes with. optax.chain, masked, multi_transform, MultiSteps, inject_hyperparams
(name static arguments that you give in static_args), nnx.Optimizer; after agc, inside
amp.dynamic_loss_scale. States are trees with the parameters' structure, which
optax.tree_utils.tree_map_params maps, in any of these. A gradient that is not finite
makes its leaf's state not finite, as in every optimizer, and no other leaf's: guard
outside, with amp.skip_nonfinite. On a mesh, `init` (jitted or not, Auto or Explicit
axes) places v_in, v_out and the accumulators as the parameters are placed, without the
axes that are gone, and steps keep them there; `state_specs` says where for any chain,
for out_shardings and checkpoints. Nothing is gathered; momentum_dtype="int8" gathers a
leaf whose last axis gives a device no multiple of 128.

Differences from the paper and from optax/flax. As in the reference, momentum averages
the scaled step and is not debiased. Clipping and scale are per stacked layer
(clip_per_slice=False clips as Mesh TensorFlow does); weight decay is multiplied by the
learning rate; before decay_offset beta2_t is 0. V is divided by the mean of v_out where
that is cheaper than the mean of v_in: both are averages of the mean of g^2.

What optax 0.2.8 does otherwise. Each is a test in tests/test_differences.py that fails
when optax mends it.

    optax.adafactor
      no learning rate     adafactor() steps by RMS(p) times 1; here None is the paper's relative step
      ties                 the last two of equal largest axes are factored, the reference takes the first two
      state dtype          that of the parameter: float16 is NaN on step one where g^2 underflows (below
                           1.7e-4); a bfloat16 second moment freezes (g doubles at step
                           6000: v is still 1 at step 8000, where float32 has 3.4)
      decay_offset         NaN from step one on a fresh state (optax#1791); here beta2_t is 0 until then
      axes                 by size alone: a DenseGeneral kernel (1024, 16, 64) is kept whole at min_dim 128,
                           128 experts or layers become an axis of the matrix, stacked
                           biases are factored
      stacked layers       clipping and RMS(p) are over the whole stack: one layer's spike shrinks all others
                           (16 to 17 % of the largest update; sm3 34 %); here 0 with
                           roles=
      weight decay         not times the learning rate: the same 10 % a step at 1e-2 and at 1e-3
      eps2                 the floor of the parameter scale is fixed at 1e-3; here eps=(eps1, eps2)
      beta2_t              float32 also under jax_enable_x64 (1e-8 off)
      placeholders         a (1,) array for every slot a leaf lacks; optax.tree.map_params gives it the
                           parameter's PartitionSpec, and jit(init, out_shardings=...)
                           raises
      layout               init leaves v_row, v_col on one device, the first update shards them: recompiles
      inject_hyperparams   TracerBoolConversionError under jit (optax#412) unless min_dim is static
    optax.sm3
      scalars              IndexError
      momentum=None        TypeError, although documented; momentum=0 allocates a whole buffer (optax#1010)
      learning_rate        TypeError for a schedule
      eps                  1e-8 inside the root: updates 97 % off at gradients near 1e-6, 12 % at 1e-4
      state dtype          that of the parameter: a bfloat16 accumulator stalls at 256 g^2

From optax.adafactor to memopt.adafactor (all but learning_rate are keyword-only here)

      optax                        here                         what differs
      learning_rate                learning_rate                None: relative step, there 1.0
      min_dim_size_to_factor       min_dim_size_to_factor       with roles=: the product of a side's axes
      decay_rate                   decay_rate                   decay="pow"; also decay="adam", decay_cap
      decay_offset                 decay_offset                 no NaN before it
      multiply_by_parameter_scale  multiply_by_parameter_scale  RMS(p) per stacked layer
      with roles=
      clipping_threshold           clipping_threshold           per stacked layer, or clip_per_slice=False
      momentum                     beta1                        0 or None: no buffer (there 0 has one)
      dtype_momentum=float32       momentum_dtype=None          None: float32, float64 for float64 parameters
      weight_decay_rate            weight_decay                 times the learning rate: divide optax's by it
      eps                          eps[0]                       eps=(eps, 1e-3); eps[1] is fixed there
      factored                     factored                     the same
      weight_decay_mask            weight_decay_mask            also a function (path, shape) -> bool
      (scale_by_factored_rms)      scale_by_adafactor           clips and scales too, unless told not to:
                                                                clipping_threshold=None,
                                                                multiply_by_parameter_scale=False
      step_offset, epsilon         decay_offset, eps[0]         arguments of scale_by_factored_rms
      decay_rate_fn                decay, decay_cap             no function; Big Vision's is decay_cap=0.999
      (ties to the later axis)     roles=                       PRESETS["big_vision"]["roles"] is optax's rule

References. Shazeer, Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory
Cost", arXiv 1804.04235. Anil, Gupta, Koren, Singer, "Memory-Efficient Adaptive
Optimization", arXiv 1901.11150. Zhai, Kolesnikov, Houlsby, Beyer, "Scaling Vision
Transformers", arXiv 2106.04560 (Big Vision's variant).
"""

from jaxtricks.memopt._accounting import state_bytes, state_specs, state_table
from jaxtricks.memopt._adafactor import (
    PRESETS,
    AdafactorState,
    Factored,
    Full,
    adafactor,
    scale_by_adafactor,
)
from jaxtricks.memopt._momentum import Int8
from jaxtricks.memopt._sm3 import Sm3State, scale_by_sm3, sm3
from jaxtricks.memopt._stochastic_rounding import (
    StochasticRoundState,
    apply_updates,
    stochastic_round,
)

__all__ = [
    "PRESETS",
    "AdafactorState",
    "Factored",
    "Full",
    "Int8",
    "Sm3State",
    "StochasticRoundState",
    "adafactor",
    "apply_updates",
    "scale_by_adafactor",
    "scale_by_sm3",
    "sm3",
    "state_bytes",
    "state_specs",
    "state_table",
    "stochastic_round",
]
