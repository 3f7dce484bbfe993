"""Train several linear branches and deploy one convolution.

What. Convolutions, frozen normalizations, poolings and identities are linear, so a sum
of such branches is one convolution. Nodes describe branches; `apply` computes them one
by one; `fuse` returns the convolution; `unfuse` returns branches for a convolution;
`error_bound` bounds their difference by rounding. The layers that train are `ACBlock`,
`RepVGGBlock`, `DiverseBranchBlock` and others in `jt.nnx` and `jt.linen`.

Use.

    import jax.numpy as jnp
    from jaxtricks import reparam as rp
    norm = rp.Norm(jnp.zeros(8), jnp.ones(8), jnp.ones(8), jnp.zeros(8))
    square = rp.Sequential(rp.Conv(jnp.ones((3, 3, 4, 8))), norm)
    line = rp.Sequential(rp.Conv(jnp.ones((1, 3, 4, 8))), norm)
    branches = rp.Sum(square, line)
    y = rp.apply(branches, jnp.ones((2, 7, 7, 4)), strides=2)
    fused = rp.apply(rp.fuse(branches), jnp.ones((2, 7, 7, 4)), strides=2)  # the same

For a whole model: `jt.nnx.convert(model, {".*/conv1": jt.nnx.ACBlock}, rngs=rngs)`,
train, then `jt.nnx.fuse(model, example=x)`.

Settings to start from. ACBlock in place of 3x3 convolutions that batch normalization
follows. Fuse after training, in evaluation mode.

When it helps and when not. The papers report a few tenths of a point for convolutional
networks. The function class does not grow, so never fuse before training is over.

Cost. Training computes every branch; after fusing, one convolution with bias. Figures:
docs/techniques/reparam.md.

Composes with. jit, grad, vmap; nodes are pytrees and `fuse` is differentiable. Kernels
may be standardized (`weightstd`), and the variance may be a scalar (`ebn`).

Differences from the paper and from optax/flax. Exact at borders for every stride,
padding, dilation and parity of the input.

References. ACNet, arXiv 1908.03930. RepVGG, arXiv 2101.03697. Diverse Branch Block,
arXiv 2103.13425.
"""

from jaxtricks.reparam._apply import apply
from jaxtricks.reparam._fuse import error_bound, fuse, unfuse
from jaxtricks.reparam._nodes import (
    AvgPool,
    Conv,
    Identity,
    Norm,
    Scale,
    Sequential,
    Sum,
)
from jaxtricks.reparam._report import FusedLayer, FuseReport

__all__ = [
    "AvgPool",
    "Conv",
    "FuseReport",
    "FusedLayer",
    "Identity",
    "Norm",
    "Scale",
    "Sequential",
    "Sum",
    "apply",
    "error_bound",
    "fuse",
    "unfuse",
]
