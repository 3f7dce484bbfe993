"""Standardize convolution kernels to zero mean and fixed variance per output channel.

What. Before every use, each output channel of a kernel loses its mean and is divided by
its standard deviation (times sqrt(fan_in) in the scaled forms). Nothing is stored. Other
parts of networks without normalization: `scaled_activation`, `residual_scales`.

Use.

    import jax
    import jaxtricks as jt
    from flax import nnx
    rngs = nnx.Rngs(0)
    conv = jt.nnx.WSConv(3, 16, (3, 3), rngs=rngs)  # a layer with a learnable gain
    hook = jt.weightstd.standardized()  # or a hook for any Flax convolution
    conv = nnx.Conv(3, 16, (3, 3), conv_general_dilated=hook, rngs=rngs)
    kernel = jt.weightstd.standardize(conv.kernel[...])  # or the function itself
    act = jt.weightstd.scaled_activation(jax.nn.relu)
    first, second = jt.weightstd.residual_scales((2, 2))  # (alpha, beta) per block

`fold_params(params)` gives the parameters of plain convolutions for inference.

Settings to start from. preset "nfnet" with a gain in networks without normalization;
preset "qiao" without one in front of group normalization. Leave gains and biases out of
weight decay (`roles.is_kernel`).

When it helps and when not. Where batch statistics are unavailable or bad. In front of
batch normalization it changes nothing. A depthwise 1x1 kernel would vanish: it raises.

Cost. A few passes over the kernel, not the activations. Figures:
docs/techniques/weightstd.md.

Composes with. Any function of a parameter tree (`standardize_params`), vmap, remat,
`reparam`, `agc` and `memopt` (which see the raw kernel).

Differences from the paper and from optax/flax. Four conventions are in circulation;
weights trained under one are not weights for another.

References. Qiao et al., arXiv 1903.10520. Brock, De, Smith, arXiv 2101.08692. Brock, De,
Smith, Simonyan, arXiv 2102.06171. Code: deepmind-research/nfnets, timm.
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
