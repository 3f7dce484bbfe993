"""Thin layers and adapters for flax.nnx; write `jt.nnx`, never import it beside flax's.

Everything here calls the rooms' pure functions; only what owns parameters or statistics
is a module.
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
from jaxtricks.nnx._functional import (
    auto_remat,
    autocast,
    checkpoint,
    functional,
    plan,
    recompute_grad,
    with_variables,
)
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
