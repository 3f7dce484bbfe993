"""Layers, blocks and transforms for flax.nnx; write `jt.nnx`, beside flax's nnx.

Everything here calls pure functions of the rooms; only what holds parameters or
statistics is a module.
"""

from jaxtricks.nnx._blocks import (
    ACBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    RepVGGBlock,
)
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx._convert import checkpoint_paths, convert
from jaxtricks.nnx._functional import functional, with_variables
from jaxtricks.nnx._fuse import fuse
from jaxtricks.nnx._heads import (
    CausalHead,
    CosineHead,
    DisAlignHead,
    LWSHead,
    NormedHead,
)
from jaxtricks.nnx._norm import ExtendedBatchNorm
from jaxtricks.nnx._roles import roles
from jaxtricks.nnx._transforms import (
    auto_remat,
    autocast,
    checkpoint,
    plan,
    recompute_grad,
)

__all__ = [
    "ACBlock",
    "CausalHead",
    "CosineHead",
    "DilatedReparamBlock",
    "DisAlignHead",
    "DiverseBranchBlock",
    "ExtendedBatchNorm",
    "LWSHead",
    "MobileOneBlock",
    "NormedHead",
    "RepVGGBlock",
    "WSConv",
    "auto_remat",
    "autocast",
    "checkpoint",
    "checkpoint_paths",
    "convert",
    "functional",
    "fuse",
    "plan",
    "recompute_grad",
    "roles",
    "with_variables",
]
