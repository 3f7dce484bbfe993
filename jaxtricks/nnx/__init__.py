"""Thin layers and adapters for flax.nnx; write `jt.nnx`, never import it beside flax's.

Everything here calls the rooms' pure functions; only what owns parameters or statistics is a module.
"""

from jaxtricks.nnx._blocks import (
    ACBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    RepVGGBlock,
)
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx._convert import convert, plain_paths
from jaxtricks.nnx._functional import (
    auto_remat,
    autocast,
    checkpoint,
    filled,
    functional,
    plan,
    recompute_grad,
)
from jaxtricks.nnx._fuse import fuse
from jaxtricks.nnx._heads import CausalHead, CosineHead, DisAlignHead, LWSHead, NormedHead
from jaxtricks.nnx._norm import ExtendedBatchNorm
from jaxtricks.nnx._roles import roles

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
    "convert",
    "filled",
    "functional",
    "fuse",
    "plain_paths",
    "plan",
    "recompute_grad",
    "roles",
]
