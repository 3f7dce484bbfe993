"""Layers, blocks and adapters for flax.linen: those of `jt.nnx`, under the same names.

Variables have the same paths and the functions are the same; arguments come in the
order of linen (features first), and input channels are those of the input.
"""

from jaxtricks.linen._blocks import (
    ACBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    RepVGGBlock,
)
from jaxtricks.linen._convert import convert
from jaxtricks.linen._functional import functional
from jaxtricks.linen._fuse import fuse
from jaxtricks.linen._layers import (
    CausalHead,
    CosineHead,
    DisAlignHead,
    ExtendedBatchNorm,
    LWSHead,
    NormedHead,
    WSConv,
)
from jaxtricks.linen._roles import roles

# pylint: disable=duplicate-code # the names of jt.nnx
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
    "convert",
    "functional",
    "fuse",
    "roles",
]
