"""Small networks in Flax NNX, written to be read and copied; their parts can be swapped."""

from jaxtricks.lab.models.nfnet import NFNet
from jaxtricks.lab.models.repvgg import RepVGG
from jaxtricks.lab.models.resnet import ConvNorm, ResNet, activated
from jaxtricks.lab.models.transformer import Transformer

__all__ = ["ConvNorm", "NFNet", "RepVGG", "ResNet", "Transformer", "activated"]
