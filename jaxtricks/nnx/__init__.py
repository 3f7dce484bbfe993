"""Thin layers and adapters for flax.nnx; write `jt.nnx`, never import it beside flax's.

Everything here calls the rooms' pure functions; only what owns parameters or statistics is a module.
"""

from jaxtricks.nnx.blocks import ACBlock, RepVGGBlock
from jaxtricks.nnx.carried import auto_remat, autocast, checkpoint, plan, recompute_grad
from jaxtricks.nnx.causal import CausalHead
from jaxtricks.nnx.conv import WSConv
from jaxtricks.nnx.convert import convert, plain_paths
from jaxtricks.nnx.diverse import DilatedReparamBlock, DiverseBranchBlock, MobileOneBlock
from jaxtricks.nnx.fusion import fuse
from jaxtricks.nnx.heads import CosineHead, DisAlignHead, LWSHead, NormedHead
from jaxtricks.nnx.layout import roles
from jaxtricks.nnx.norm import ExtendedBatchNorm
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
