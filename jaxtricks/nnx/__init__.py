"""Thin layers and adapters for flax.nnx; write `jt.nnx`, never import it beside flax's.

Everything here calls the rooms' pure functions; only what owns parameters or statistics is a module.
"""

from jaxtricks.nnx._blocks import DilatedReparamBlock, DiverseBranchBlock, MobileOneBlock
from jaxtricks.nnx._conv import WSConv
from jaxtricks.nnx._convert import convert, plain_paths
from jaxtricks.nnx._functional import auto_remat, autocast, checkpoint, plan, recompute_grad
from jaxtricks.nnx._fuse import fuse
from jaxtricks.nnx._heads import CosineHead, DisAlignHead, LWSHead, NormedHead
from jaxtricks.nnx._norm import ExtendedBatchNorm
from jaxtricks.nnx._roles import roles
from jaxtricks.nnx.blocks import ACBlock, RepVGGBlock
from jaxtricks.nnx.causal import CausalHead
from jaxtricks.nnx.pure import filled, functional

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
