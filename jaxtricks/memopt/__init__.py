"""Optimize with state that does not grow with the model: Adafactor and SM3.

What. Adam stores two numbers per parameter. Adafactor stores the mean of g^2 per row and
per column of a matrix and rebuilds the rest as their outer product; SM3 stores the
largest g^2 per row and per column. For an n x m matrix that is n + m numbers, not 2 n m.

Use.

    import jaxtricks as jt
    roles = jt.nnx.roles(model)  # or jt.linen.roles, jt.roles.by_path
    tx = jt.memopt.adafactor(roles=roles)  # the paper's relative step
    tx = jt.memopt.adafactor(1e-3, multiply_by_parameter_scale=False, roles=roles)
    tx = jt.memopt.adafactor(1e-2, **jt.memopt.PRESETS["t5x"])
    tx = jt.memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8", roles=roles)
    print(jt.memopt.state_table(tx, params))  # from shapes; allocates nothing
    tx = optax.chain(tx, jt.memopt.stochastic_round(0))  # last, for bfloat16 parameters

Settings to start from. With a rate of your own, steps are relative to RMS(p); with
multiply_by_parameter_scale=False they are absolute, and Adam's rates are the place to
start. Pass `roles=` where layers are stacked or kernels have more than two axes.

When it helps and when not. When optimizer memory limits the model or the batch. It saves
nothing on vectors. SM3 never forgets, like Adagrad: prefer Adafactor for long runs.

Cost. State in n + m numbers per matrix; a step near AdamW's. Figures:
docs/techniques/memopt.md.

Composes with. optax.chain, masked, multi_transform, MultiSteps, inject_hyperparams,
nnx.Optimizer; after agc, inside amp.dynamic_loss_scale. States are trees like the
parameters, sharded as they are (`state_specs`).

Differences from the paper and from optax/flax. Clipping and scale are per stacked
layer; arguments translated from optax are in the docs.

References. Shazeer, Stern, arXiv 1804.04235. Anil, Gupta, Koren, Singer, arXiv
1901.11150. Zhai, Kolesnikov, Houlsby, Beyer, arXiv 2106.04560 (Big Vision's variant).
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
