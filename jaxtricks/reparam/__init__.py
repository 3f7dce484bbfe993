"""Structural re-parameterization: train several linear branches, deploy one convolution.

What. Convolutions, normalizations with frozen statistics, poolings and identities are
linear, so a sum of such branches is one convolution. This room is the algebra: nodes
that describe branches, `apply` that computes them one by one, `fuse` that gives the
convolution, `unfuse` that gives branches for a convolution, `error_bound` that says how
far apart rounding may put the two. The layers that train are `jt.nnx.ACBlock`,
`RepVGGBlock`, `DiverseBranchBlock`, `MobileOneBlock`, `DilatedReparamBlock`, and
`jt.linen.ACBlock`.

Use.

    import jax.numpy as jnp from jaxtricks import reparam as rp norm =
    rp.Norm(mean=jnp.zeros(8), var=jnp.ones(8), scale=jnp.ones(8), bias=jnp.zeros(8))
    square = rp.Sequential(rp.Conv(jnp.ones((3, 3, 4, 8))), norm) line =
    rp.Sequential(rp.Conv(jnp.ones((1, 3, 4, 8))), norm) branches = rp.Sum(square, line)
    x = jnp.ones((2, 7, 7, 4)) y = rp.apply(branches, x, strides=2)
    y_fused = rp.apply(rp.fuse(branches), x, strides=2)     # the same, one convolution

A whole model, yours or another's: `jt.nnx.convert(model, {".*/conv1": jt.nnx.ACBlock},
rngs=rngs)` keeps its function in evaluation mode, then train it; `jt.nnx.fuse(model,
example=x)` gives plain convolutions, which take up batch normalizations as well, as
linear layers and transposed convolutions do, and a report of errors against rounding
bounds and of what was kept and why (`jt.linen.fuse` too). Arguments of the model's call
go in `example_kwargs`. `jaxtricks fuse RUN` does so for a run of the lab.

Settings to start from. ACBlock in place of 3x3 convolutions followed by batch
normalization; gamma_init 1/3 is an option of the reference code that its authors found
to help on CIFAR. Fuse after training, in evaluation mode. `convert` gives the
normalizations inside a block the momentum, epsilon and axis_name of the one behind the
convolution; if yours differ, give it an `example`, or bind them
(`functools.partial(jt.nnx.ACBlock, norm=functools.partial(nnx.BatchNorm,
momentum=0.9))`). A block that you make yourself has Flax's momentum 0.99, whose
statistics lag behind in runs of a few hundred steps.

When it helps and when not. Plain and residual convolutional networks gain a few tenths
of a point in the papers' experiments; differences of that size need several seeds to
see. The function class does not grow, only training changes. Do not fuse before
training is over: the fused network trains differently. On CIFAR-10 at 16 x 16 (7
convolutions without shortcuts, batch 128, 120 steps, n = 3 seeds, two rates tried for
each) we saw no gain: plain 43.2 +- 0.8 % of the test images, ACBlock 43.0 +- 0.2,
RepVGGBlock 41.4 +- 0.7. Fusing changed no prediction, and logits (up to 8) by 3.4e-6 at
most. Longer training, where the papers' gains are, is not shown. `python -m
benchmarks.networks --data cifar10.zip --only branches`.

Cost. Training computes every branch; with mode="online" it computes one convolution,
whose kernel is made of all branches in every step, and one normalization. After fusing:
exactly one convolution with bias.

Composes with. jit, grad, vmap (stacked layers, ensembles); nodes are pytrees. `fuse` is
differentiable, so a penalty on the fused kernel works. Kernels may be standardized
first (`weightstd`), the normalization may have one variance for all channels (`ebn`).
XLA gives wrong gradients of grouped and depthwise kernels whose batch lies on one axis
of a mesh of two (jax 0.7.2 to 0.12.0.1): use a mesh with one axis for those.

Differences from the paper and from optax/flax. Every branch is centred on the centre
tap (k // 2) of one window and derives its padding from it. With "SAME" and stride 2,
branches that each use "SAME" do not add up to a convolution on inputs of even size;
here they do, for every stride, padding (asymmetric or negative too), parity, dilation,
groups, depthwise, 1, 2 or 3 spatial axes, even and rectangular kernels. Reference
implementations fail at dilation or ignore it. A 1x1 -> KxK sequence (and 1x1 -> average
pooling) is exact at the border because the intermediate is padded with its value on
zero input; the reference's training mode uses running statistics for that border.
Frozen statistics only: the training mode of branches is that of the layers. Equality is
up to rounding of the branches' terms (`error_bound`): where they cancel, errors are
relative to the terms, not to the output. On GPU and TPU pass precision="highest" to
compare.

References. Ding, Guo, Ding, Han, "ACNet: Strengthening the Kernel Skeletons for
Powerful CNN via Asymmetric Convolution Blocks", arXiv 1908.03930. Ding, Zhang, Ma, Han,
Ding, Sun, "RepVGG", arXiv 2101.03697. Ding, Zhang, Han, Ding, "Diverse Branch Block",
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
