"""Schedule learning rates in cycles, exact at any step, and find their bounds.

What. `cyclical` rises linearly from base to peak, falls back and begins again; the
amplitude may shrink ("triangular2", "exp_range", or a function). `one_cycle` rises once
and falls to nearly nothing. `warm_restarts` falls along half a cosine and jumps back.
`cyclical_momentum` and `one_cycle_momentum` move momentum the other way.
`lr_range_test` trains briefly at rising rates.

Use.

    import jaxtricks as jt, optax
    rate = jt.cyclical.cyclical(1e-3, 6e-3, 4 * steps_per_epoch, mode="triangular2")
    tx = optax.sgd(rate, momentum=0.9)

    test = jt.cyclical.lr_range_test(step, params, loader)  # step(carry, batch, lr)
    print(test.suggestion)
    jt.plot.lr_range(test).savefig("range.png")

Settings to start from. step_size_up of 2 to 10 epochs; base a third or a quarter of
peak; peak where a range test turns ragged. End training after a whole number of cycles.
one_cycle: the defaults, with momentum 0.85 to 0.95.

When it helps and when not. When you do not want to tune a rate: the cycle passes
through a good one. A well tuned decay is hard to beat. Compare models at the ends of
cycles.

Cost. A few scalar operations per step; the range test trains for num_steps. Figures:
docs/techniques/cyclical.md.

Composes with. Anything that takes an optax schedule, and `optax.inject_hyperparams`.
Bounds and factors may be traced arrays; step sizes, periods and totals are static.

Differences from the paper and from optax/flax. Exact where float32 formulas drift;
optax has no cyclical schedule and no range test.

References. Smith, arXiv 1506.01186. Smith and Topin, arXiv 1708.07120. Loshchilov and
Hutter, arXiv 1608.03983. Reference code: bckenstler/CLR and torch.optim.lr_scheduler.
"""

from jaxtricks.cyclical._lr_range import RangeTest, lr_range_test
from jaxtricks.cyclical._schedules import (
    cyclical,
    cyclical_momentum,
    one_cycle,
    one_cycle_momentum,
    warm_restarts,
)

__all__ = [
    "RangeTest",
    "cyclical",
    "cyclical_momentum",
    "lr_range_test",
    "one_cycle",
    "one_cycle_momentum",
    "warm_restarts",
]
