"""Optimize with little state: factored, in 8 or 4 bits, or in the host's memory.

What. Adam stores two numbers per parameter. Adafactor stores the mean of g^2 per row and
per column of a matrix, SM3 the largest g^2: n + m numbers for n x m, not 2 n m.
`low_bit` stores the state of any optimizer in 8 or 4 bits an entry.

Use.

    import jaxtricks as jt
    roles = jt.nnx.roles(model)  # or jt.linen.roles, jt.roles.by_path
    tx = jt.memopt.adafactor(roles=roles)  # the paper's relative step
    tx = jt.memopt.adafactor(1e-2, **jt.memopt.PRESETS["t5x"])
    tx = jt.memopt.sm3(0.1, momentum=0.9, momentum_dtype="int8", roles=roles)
    tx = jt.memopt.muon(0.02, roles=roles)  # optax's Muon, one number per parameter
    tx = jt.memopt.low_bit(optax.adamw(1e-3))  # bits=4: half of that
    tx = jt.memopt.adamw7(1e-3)  # bfloat16 parameters, 7 bytes each with the gradient
    tx = jt.memopt.host_offload(tx)  # any state in the host's memory between steps
    tx = optax.chain(tx, jt.memopt.stochastic_round(0))  # last, for bfloat16 parameters
    print(jt.memopt.state_table(tx, params))  # from shapes; allocates nothing

Settings to start from. Adafactor's steps are relative to RMS(p); with
multiply_by_parameter_scale=False Adam's rates are the place to start, as they are for
low_bit and adamw7. Pass `roles=` where layers are stacked or kernels have more axes.

When it helps and when not. When optimizer memory limits the model or the batch. SM3 never
forgets, like Adagrad: prefer Adafactor for long runs.

Cost. docs/techniques/memopt.md: state, steps, losses.

Composes with. optax.chain, masked, multi_transform, MultiSteps, inject_hyperparams,
nnx.Optimizer; after agc, inside amp.dynamic_loss_scale. States are trees like the
parameters, sharded as they are (`state_specs`). Scanned layers: `release_gradients`.

Differences from the paper and from optax/flax. Clipping and scale are per stacked
layer; arguments translated from optax are in the docs.

References. arXiv 1804.04235 (Adafactor), 1901.11150 (SM3), 2106.04560 (Big Vision),
2110.02861 and 2309.01507 (8 and 4 bits), 2602.23349 (FlashOptim).
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
from jaxtricks.memopt._host_offload import host_offload
from jaxtricks.memopt._low_bit import SECOND_MOMENTS, LowBitState, low_bit
from jaxtricks.memopt._momentum import Int8
from jaxtricks.memopt._muon import muon
from jaxtricks.memopt._release_gradients import release_gradients
from jaxtricks.memopt._sm3 import Sm3State, scale_by_sm3, sm3
from jaxtricks.memopt._split_weights import (
    SplitWeightsState,
    adamw7,
    float32_weights,
    split_float32,
    split_weights,
)
from jaxtricks.memopt._stochastic_rounding import (
    StochasticRoundState,
    apply_updates,
    stochastic_round,
)

__all__ = [
    "PRESETS",
    "SECOND_MOMENTS",
    "AdafactorState",
    "Factored",
    "Full",
    "Int8",
    "LowBitState",
    "Sm3State",
    "SplitWeightsState",
    "StochasticRoundState",
    "adafactor",
    "adamw7",
    "apply_updates",
    "float32_weights",
    "host_offload",
    "low_bit",
    "muon",
    "release_gradients",
    "scale_by_adafactor",
    "scale_by_sm3",
    "sm3",
    "split_float32",
    "split_weights",
    "state_bytes",
    "state_specs",
    "state_table",
    "stochastic_round",
]
