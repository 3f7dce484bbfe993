"""Cyclical learning rates: triangles, one cycle, warm restarts, exact at any step; and the range test.

What. The rate rises linearly from base to peak in step_size_up iterations, falls back in step_size_down,
and begins again. Its amplitude may shrink: by half every cycle ("triangular2"), by gamma every iteration
("exp_range"), or by a function of your own. one_cycle rises once and falls to nearly nothing;
warm_restarts falls along half a cosine and jumps back. cyclical_momentum and one_cycle_momentum move
the momentum the other way. lr_range_test trains briefly at rising rates, to find the bounds.

Use.

    import jaxtricks as jt, optax
    rate = jt.cyclical.cyclical(1e-3, 6e-3, 4 * steps_per_epoch, mode="triangular2")
    tx = optax.sgd(rate, momentum=0.9)

    rate = jt.cyclical.one_cycle(0.1, total_steps)
    momentum = jt.cyclical.one_cycle_momentum(0.85, 0.95, total_steps)
    tx = optax.inject_hyperparams(optax.sgd)(rate, momentum)

    def step(params, batch, lr):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return jax.tree.map(lambda p, g: p - lr * g, params, grads), loss

    r = jt.cyclical.lr_range_test(jax.jit(step), params, loader)  # or batches stacked: all on device
    print(r.suggestion)
    jt.plot.lr_range(r).savefig("range.png")

Settings to start from. step_size_up of 2 to 10 epochs; base a third or a quarter of peak, peak where a
range test turns ragged. End training on the low side: after a whole number of cycles. For exp_range,
gamma 0.99994. one_cycle: the defaults, momentum 0.85 to 0.95 (PyTorch's); three_phase=True is the
paper's. warm_restarts: first_period of 1 to 10 epochs, period_mult 2; stop just before a restart.

When it helps and when not. When you do not want to tune a rate: the cycle passes through a good one. A
well tuned decay is hard to beat, and the metrics go up and down with the rate, so compare at cycle ends.
one_cycle needs the length of the training beforehand; warm_restarts has a usable model at every cycle's
end. The range test sees a few steps of one model. Its suggestion is the steepest point of the longest fall
of the curve, and no more; smoothing 0.98 lags behind by tens of steps. Look at the curve.
CIFAR-10 at 16 x 16, ResNet of 8 layers, 400 steps of 100, n = 3, three peaks tried for each: 45 % of the
validation images are right after 230 +- 46 steps with one cycle, 230 +- 52 at a constant rate, 203 +- 49 with
warm-up and cosine; in the end 53.8 +- 0.6, 50.2 +- 2.8 and 51.6 +- 1.4 % of the test images. No target was
reached sooner. `python -m benchmarks.networks --data cifar10.zip --only cycles`.

Cost. A handful of scalar operations a step, however many cycles. The range test costs num_steps steps
and a copy of the carry; the host loop waits for every loss, the stacked form does not.

Composes with. Anything that takes an optax schedule: optax.sgd, memopt.adafactor, inject_hyperparams.
Bounds, gamma and the factors of one_cycle may be arrays (also traced, so that a sweep over them does not
recompile); step sizes, periods and totals are static. The range test takes any step and any loader.

Differences from the paper and from optax/flax. optax has no cyclical schedule and no range test. Names
and defaults are those of the paper's Keras callback; legs of different length are PyTorch's. The position
in the cycle is computed in integers, so float32 does not lose it: the usual formula is off by a tenth of
the amplitude after 5e7 iterations of step size 20. The rate is float32 (float64 under jax_enable_x64).
one_cycle has PyTorch's phases, which end at pct_start total - 1 and at total - 1 and need not be whole;
optax's end at the integers near pct_start total and at total. After the last step it holds its value
where PyTorch raises. optax.sgdr_schedule wants a list of all cycles and evaluates each of them in every
step; warm_restarts goes on for ever, with whole or fractional periods. The range test returns its curve
and leaves the parameters alone; the best loss may be negative (see its stopping rule).

References. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186. Smith and
Topin, "Super-Convergence", arXiv 1708.07120. Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent
with Warm Restarts", arXiv 1608.03983. Reference code: bckenstler/CLR, clr_callback.py;
torch.optim.lr_scheduler.CyclicLR, OneCycleLR, CosineAnnealingWarmRestarts.
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
