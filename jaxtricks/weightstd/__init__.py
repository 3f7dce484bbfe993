"""Weight standardization: convolution kernels with zero mean and fixed variance per output channel.

What. Before every use, each output channel of a kernel loses its mean and is divided by
its standard deviation (times sqrt(fan_in) in the scaled forms, so that variance
survives the layer). Nothing is stored: training and evaluation compute the same thing,
and there are no batch statistics. The rest of a network without normalization is here
as well: the gain that an activation needs (`scaled_activation`), the scales of residual
blocks (`residual_scales`), and `stochastic_depth`.

Use.

    import jax import jax.numpy as jnp from flax import nnx import jaxtricks as jt # a
    layer with a learnable gain conv = jt.nnx.WSConv(3, 16, (3, 3), rngs=nnx.Rngs(0)) #
    a hook for any flax convolution, no new class conv = nnx.Conv(3, 16, (3, 3),
    conv_general_dilated=jt.weightstd.standardized(), rngs=nnx.Rngs(0)) # or the
    function itself kernel = jt.weightstd.standardize(jnp.ones((3, 3, 8,
    16)).at[0].set(2.0)) # and a residual block without normalization, y = shortcut +
    alpha * branch(beta * act(x)) act = jt.weightstd.scaled_activation(jax.nn.relu)
    first, second = jt.weightstd.residual_scales((2, 2)) alpha, beta = first[0] x =
    jnp.ones((2, 8, 8, 16)) y = x + alpha *
    jt.weightstd.stochastic_depth(jax.random.key(0), beta * act(x), 0.1) # for
    inference: the parameters of plain convolutions params = {"conv": {"kernel": kernel,
    "gain": jnp.ones(16)}} params = jt.weightstd.fold_params(params)

In a model that exists: `jt.nnx.convert(model, {nnx.Conv: jt.nnx.WSConv}, rngs=rngs,
init="fresh")`, and train it from the start; ordinary filters have means, which
standardizing removes, so it keeps no function.

Settings to start from. preset "nfnet" with a gain (NFNets, no normalization layers), or
preset "qiao" without one in front of group normalization. A whole network without
normalization: scaled activations, alpha 0.2, a learned scalar that starts at 0 on every
branch (`jaxtricks.lab.models.NFNet` shows it). Leave gains and biases out of weight
decay (`roles.is_kernel` does). Weight decay on a standardized kernel changes its
effective learning rate, not the function.

When it helps and when not. Where batch statistics are unavailable or bad: batches of
one to a few images, group normalization, networks without normalization (there together
with `agc`). In front of batch normalization the mean and scale of a channel are removed
anyway. Depthwise 3x3 kernels give nine numbers to take statistics of; a depthwise 1x1
kernel gives one, which would vanish, so it raises. CIFAR-10 at 16 x 16, ResNet of 8
layers with group normalization, batch 128, 200 steps, n = 3 seeds, three rates tried
(four without): 35 % of the validation images are right after 67 +- 6 steps with preset
"qiao", after 107 +- 23 without, and 45.0 +- 0.1 against 40.2 +- 1.6 % of the test
images in the end. Long training and batch normalization are not shown. At batch 2 (8192
images seen, rate tuned at batch 32) group norm has 41.0 +- 0.6 % with it and 35.4 +-
2.2 without; batch normalization 37.5 +- 1.2, and 39.4 +- 1.4 at batch
32. `python -m benchmarks.networks --data cifar10.zip --only standardization` and
`--only small_batches`.

Cost. A few elementwise passes over the kernel (not the activations), and no parameters
but the gains. The result does not depend on the batch. Microbatches in a scan: `hat,
pull = jax.vjp(standardize, kernel)` outside, gradients by `hat` summed inside,
`pull(total)` at the end (tests/test_weightstd_modules.py). `fold_params` leaves
inference nothing to do. Timings: `python -m benchmarks.blocks`.

Composes with. Any function of a parameter tree (`standardize_params`), vmap over
stacked kernels, remat, `reparam` (branches of `ACBlock(conv=WSConv)` fuse), `agc` and
`memopt` (they see the raw kernel). Statistics are float32 or better whatever the
parameter's dtype; the hook sees the kernel after Flax has cast it to the layer's dtype,
`WSConv` standardizes the parameter itself. XLA computes wrong gradients of grouped
kernels whose batch lies on one axis of a mesh of two (jax 0.7.2 to 0.12.0.1): use a
mesh with one axis for those.

Differences from the paper and from optax/flax. Four conventions are in circulation and
differ in epsilon: see `standardize`; weights trained under one are not weights for
another. We compute (w - mean) * scale, which keeps digits that w * scale - mean * scale
loses when the mean is large. A channel that is constant gives exact zeros and finite
gradients under every preset. Flax has no weight standardization (its WeightNorm is
another method). Gains of activations are integrals, not the sampled constants of the
reference (relu 1.71286, there 1.71396; all of theirs are within 0.1 %). Stochastic
depth does not divide what it keeps by 1 - rate, as in the reference. `l2` is the
penalty scale * sum w^2; its equivalent under plain SGD is `optax.add_decayed_weights(2
* scale)`.

References. Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel
Normalization and Weight Standardization", arXiv 1903.10520. Brock, De, Smith,
"Characterizing signal propagation to close the performance gap in unnormalized
ResNets", arXiv 2101.08692. Reference code: deepmind-research/nfnets/base.py,
timm/layers/std_conv.py. Brock, De, Smith, Simonyan, "High-performance large-scale image
recognition without normalization", arXiv 2102.06171.
"""

from jaxtricks.weightstd._signal_propagation import (
    ResidualScale,
    ScaledActivation,
    residual_scales,
    scaled_activation,
    stochastic_depth,
)
from jaxtricks.weightstd._standardize import (
    PRESETS,
    Hook,
    fold_params,
    l2,
    standardize,
    standardize_params,
    standardized,
)

__all__ = [
    "PRESETS",
    "Hook",
    "ResidualScale",
    "ScaledActivation",
    "fold_params",
    "l2",
    "residual_scales",
    "scaled_activation",
    "standardize",
    "standardize_params",
    "standardized",
    "stochastic_depth",
]
