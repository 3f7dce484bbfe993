"""Optimizers whose memory does not grow with the model: Adafactor and SM3.

What. Adam keeps two numbers per parameter. Adafactor keeps the mean of g^2 per row and per column of a
matrix and rebuilds the rest as their outer product; SM3 keeps the largest g^2 seen per row and per
column. For an n x m matrix that is n + m numbers instead of 2 n m.

Use.

    import jaxtricks as jt
    tx = jt.memopt.adafactor(axes=jt.axes.infer)           # the paper's relative step, no rate to choose
    tx = jt.memopt.adafactor(1e-3, multiply_by_parameter_scale=False)       # in Adam's place
    tx = jt.memopt.adafactor(1e-2, **jt.memopt.PRESETS["t5x"])
    jt.memopt.state_bytes(tx, params)                      # from shapes, allocates nothing

Settings to start from. adafactor() as it stands is the paper's. With a rate of your own, steps are
relative to RMS(p): 1e-2 moves a weight by about 1 %; with multiply_by_parameter_scale=False they are
absolute, and Adam's rates are the place to start. beta1=0.9, momentum_dtype="bfloat16" costs two bytes
a parameter. sm3(0.1, momentum=0.9) with a warm-up. Say axes= as soon as layers are stacked (scan, vmap)
or kernels have more than two axes, and lower min_dim_size_to_factor if `state_bytes` surprises you:
below it nothing is factored, and an attention kernel (1024, 16, 64) without axes= is not factored at all.

When it helps and when not. When optimizer memory is what limits the model or the batch. It saves
nothing on vectors, and little where momentum is wanted in float32. SM3 never forgets (like Adagrad):
for long runs with a changing loss Adafactor is the safer choice.

Cost. State bytes: `state_bytes`. Compute: a few reductions per leaf more than Adam.

Composes with. optax.chain, masked, multi_transform, MultiSteps, inject_hyperparams (name static
arguments that you give in static_args), nnx.Optimizer; after agc, inside amp.dynamic_loss_scale. A
gradient that is not finite makes a state that is not finite, as in every optimizer: guard outside.

Differences from the paper and from optax/flax. optax.adafactor has no learning rate unless given one,
breaks ties between equal axes the other way round than the reference, computes beta2_t in float32,
keeps its state in the parameter's dtype (float16 gives NaN, bfloat16 stalls), gives NaN for a decay
offset on a fresh state, and treats stacked layers as one matrix. optax.sm3 fails on scalars and
schedules, always allocates momentum and has eps 1e-8. Here state is float32 or better; roles say what is
stacked; clipping and scale are per stacked layer (clip_per_slice=False clips as Mesh TensorFlow does);
weight decay is multiplied by the learning rate. As in the reference, momentum averages the scaled step
and is not debiased. Before decay_offset beta2_t is 0. The state is a dict by path, without placeholders.

References. Shazeer, Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv
1804.04235. Anil, Gupta, Koren, Singer, "Memory-Efficient Adaptive Optimization", arXiv 1901.11150. Zhai,
Kolesnikov, Houlsby, Beyer, "Scaling Vision Transformers", arXiv 2106.04560 (Big Vision's variant).
"""

from jaxtricks.memopt.accounting import state_bytes, state_table
from jaxtricks.memopt.averages import Int8
from jaxtricks.memopt.cover import Sm3State, scale_by_sm3, sm3
from jaxtricks.memopt.factored import Factored, Full
from jaxtricks.memopt.presets import PRESETS
from jaxtricks.memopt.rounding import StochasticRoundState, apply_updates, stochastic_round
from jaxtricks.memopt.sharding import state_specs
from jaxtricks.memopt.transform import AdafactorState, adafactor, scale_by_adafactor

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
