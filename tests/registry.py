"""One canonical setting of every public transform; tests/laws/test_laws.py runs every law over all of them.

A new public transform is not done before it has its line here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax
from jaxtricks import _compat, agc, amp, cyclical, longtail, memopt, nnx, remat


def matrices(path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Roles of stacked matrices, whatever the tree."""
    rank = len(shape)
    return ("none",) * rank if rank < 2 else ("batch",) * (rank - 2) + ("in", "out")


# name -> factory of an optax.GradientTransformation
GRADIENT_TRANSFORMS: dict[str, Callable[..., Any]] = {
    "agc.adaptive_grad_clip": partial(agc.adaptive_grad_clip, 0.1),
    "memopt.adafactor": partial(memopt.adafactor, min_dim_size_to_factor=4),
    "memopt.adafactor, everything on": partial(
        memopt.adafactor,
        1e-2,
        beta1=0.9,
        decay="adam",
        decay_rate=0.99,
        max_parameter_scale=10.0,
        min_dim_size_to_factor=4,
        weight_decay=0.03,
    ),
    "memopt.muon": partial(memopt.muon, 1e-2, roles=matrices),
    "memopt.scale_by_adafactor": partial(memopt.scale_by_adafactor, min_dim_size_to_factor=4),
    "memopt.sm3": partial(memopt.sm3, 0.1, momentum=0.9),
    "memopt.scale_by_sm3": memopt.scale_by_sm3,
    "memopt.stochastic_round": partial(memopt.stochastic_round, 0),
    "memopt.low_bit": lambda: memopt.low_bit(optax.adam(1e-2), block=2, min_size=32),
    "memopt.split_weights": memopt.split_weights,
    # No keyword arguments: with `roles`, stacked layers would be rounded by other random numbers.
    "memopt.adamw7": lambda: memopt.adamw7(1e-2, block=2, min_size=32),
    "amp.dynamic_loss_scale": partial(
        amp.dynamic_loss_scale, agc.adaptive_grad_clip(0.1), init=4.0
    ),
    "amp.skip_nonfinite": partial(amp.skip_nonfinite, agc.adaptive_grad_clip(0.1)),
}

if _compat.has_host_memory():  # jax 0.7 on CPU has none: it refuses in init
    GRADIENT_TRANSFORMS["memopt.host_offload"] = partial(
        memopt.host_offload, memopt.sm3(0.1, momentum=0.9), min_bytes=0
    )

# name -> factory of a schedule: step -> value
SCHEDULES: dict[str, Callable[..., Any]] = {
    "cyclical.cyclical": partial(cyclical.cyclical, 1e-3, 6e-3, 20),
    "cyclical.cyclical, triangular2": partial(
        cyclical.cyclical, 0.0, 1.0, 4.5, 3.25, mode="triangular2"
    ),
    "cyclical.cyclical, exp_range": partial(
        cyclical.cyclical, 0.0, 1.0, 7, mode="exp_range", gamma=0.98
    ),
    "cyclical.cyclical_momentum": partial(cyclical.cyclical_momentum, 0.8, 0.95, 4.5),
    "cyclical.one_cycle": partial(cyclical.one_cycle, 0.1, 20_000),
    "cyclical.one_cycle, linear, three phases": partial(
        cyclical.one_cycle, 0.1, 77, pct_start=0.25, anneal="linear", three_phase=True
    ),
    "cyclical.one_cycle_momentum": partial(cyclical.one_cycle_momentum, 0.85, 0.95, 200),
    "cyclical.warm_restarts": partial(cyclical.warm_restarts, 0.1, 10),
    "cyclical.warm_restarts, growing": partial(
        cyclical.warm_restarts, 0.1, 4.5, period_mult=1.5, floor=1e-3
    ),
}

# name -> factory (counts) -> loss(logits [..., C], labels [...]) -> per-example [...]
LOSSES: dict[str, Callable[..., Any]] = {
    "longtail.cross_entropy": lambda counts: longtail.cross_entropy(),
    "longtail.weighted": lambda counts: longtail.weighted(
        longtail.weights.inverse_frequency(counts)
    ),
    "longtail.focal": lambda counts: longtail.focal(1.0),
    "longtail.class_balanced": longtail.class_balanced,
    "longtail.ldam": partial(
        longtail.ldam, s=1.0
    ),  # of any logits; 30 warns if they are no cosines
    "longtail.balanced_softmax": longtail.balanced_softmax,
    "longtail.logit_adjusted": longtail.logit_adjusted,
    "longtail.vs": longtail.vs,
    "longtail.cdt": lambda counts: longtail.cdt(counts, 0.2),
    # tail and q at 0: the settings that are plain cross entropy where the counts are balanced
    "longtail.label_aware_smoothing": partial(longtail.label_aware_smoothing, head=0.3, tail=0.0),
    "longtail.seesaw": partial(longtail.seesaw, q=0.0),
}

# name -> wrapper fn -> fn that keeps values and gradients (to rounding where it says so)
WRAPPERS: dict[str, Callable[..., Any]] = {
    "remat.recompute_grad": remat.recompute_grad,
    "remat.checkpoint": remat.checkpoint,
    "amp.with_policy, full": partial(amp.with_policy, policy="full"),
    "amp.autocast, full": partial(amp.autocast, policy="full"),
    "amp.full_precision": amp.full_precision,
}

# name -> factory (rngs) -> nnx module that maps [N, 8, 8, 4] to [N, 8, 8, 4]
MODULES: dict[str, Callable[..., Any]] = {
    "nnx.WSConv": lambda rngs: nnx.WSConv(4, 4, (3, 3), use_bias=True, rngs=rngs),
    "nnx.WSConv, grouped, qiao": lambda rngs: nnx.WSConv(
        4, 4, (3, 3), feature_group_count=2, preset="qiao", use_gain=False, rngs=rngs
    ),
    "nnx.ExtendedBatchNorm": lambda rngs: nnx.ExtendedBatchNorm(4, rngs=rngs),
    "nnx.ExtendedBatchNorm, grand": lambda rngs: nnx.ExtendedBatchNorm(
        4, variance="grand", momentum=0.9, use_bias=False, rngs=rngs
    ),
    "nnx.ACBlock": lambda rngs: nnx.ACBlock(4, 4, (3, 3), rngs=rngs),
    "nnx.ACBlock, WSConv, ExtendedBatchNorm": lambda rngs: nnx.ACBlock(
        4, 4, (5, 3), conv=nnx.WSConv, norm=nnx.ExtendedBatchNorm, gamma_init=1 / 3, rngs=rngs
    ),
    "nnx.RepVGGBlock, WSConv, ExtendedBatchNorm": lambda rngs: nnx.RepVGGBlock(
        4, 4, feature_group_count=2, conv=nnx.WSConv, norm=nnx.ExtendedBatchNorm, rngs=rngs
    ),
    "nnx.RepVGGBlock, online": lambda rngs: nnx.RepVGGBlock(
        4, 4, norm=nnx.ExtendedBatchNorm, mode="online", rngs=rngs
    ),
    "nnx.DiverseBranchBlock, WSConv": lambda rngs: nnx.DiverseBranchBlock(
        4,
        4,
        (3, 3),
        conv=nnx.WSConv,
        norm=nnx.ExtendedBatchNorm,
        internal_features=6,
        rngs=rngs,
    ),
    "nnx.DiverseBranchBlock, depthwise": lambda rngs: nnx.DiverseBranchBlock(
        4, 4, (3, 3), feature_group_count=4, norm=nnx.ExtendedBatchNorm, rngs=rngs
    ),
    "nnx.DiverseBranchBlock, online": lambda rngs: nnx.DiverseBranchBlock(
        4, 4, (3, 3), norm=nnx.ExtendedBatchNorm, mode="online", rngs=rngs
    ),
    "nnx.MobileOneBlock": lambda rngs: nnx.MobileOneBlock(
        4, 4, num_branches=2, conv=nnx.WSConv, norm=nnx.ExtendedBatchNorm, rngs=rngs
    ),
    "nnx.DilatedReparamBlock": lambda rngs: nnx.DilatedReparamBlock(
        4, 4, (5, 5), conv=nnx.WSConv, norm=nnx.ExtendedBatchNorm, rngs=rngs
    ),
    "nnx.CosineHead": lambda rngs: nnx.CosineHead(4, 4, rngs=rngs),
    "nnx.NormedHead": lambda rngs: nnx.NormedHead(4, 4, rngs=rngs),
    "nnx.LWSHead": lambda rngs: nnx.LWSHead(4, 4, rngs=rngs),
    # as the reference starts: without calibration the gradient of its confidence is 0
    "nnx.DisAlignHead": lambda rngs: nnx.DisAlignHead(4, 4, compat="reference", rngs=rngs),
    "nnx.CausalHead": lambda rngs: nnx.CausalHead(4, 4, tau=4.0, alpha=0.5, rngs=rngs),
}
