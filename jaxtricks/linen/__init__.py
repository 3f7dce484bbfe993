"""The layers and adapters of `jt.nnx` for flax.linen: same names, same parameter paths, same functions.

The layers are linen modules of a few lines around the pure functions that their nnx
twins call. (`nnx.bridge.to_linen` would construct an nnx module in every apply, and
cannot skip collectives while initializing.) Their arguments are those of the twins,
without `rngs`; `in_features` and `num_features` may be None, which stands for those of
the input, as usual in linen.
"""

from jaxtricks.linen._blocks import ACBlock, DiverseBranchBlock, RepVGGBlock
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

__all__ = [
    "ACBlock",
    "CausalHead",
    "CosineHead",
    "DisAlignHead",
    "DiverseBranchBlock",
    "ExtendedBatchNorm",
    "LWSHead",
    "NormedHead",
    "RepVGGBlock",
    "WSConv",
    "functional",
    "fuse",
    "roles",
]
