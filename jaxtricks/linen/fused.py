"""A linen module some of whose layers are computed by plain convolutions."""

import dataclasses
from typing import Any

from flax import linen as nn

from jaxtricks import _tree
from jaxtricks.nnx import conv


@dataclasses.dataclass(frozen=True)
class Original:
    """Holds an unbound module."""

    module: nn.Module


class Fused(nn.Module):
    """What `jt.linen.fuse` returns: the module with other layers, under the same paths.

    Its variables are those of a network of plain convolutions. Where the module would call a fused layer, the
    convolution with the kernel and bias at the layer's path runs; a folded normalization passes its input on.

    Attributes:
      original: the module; wrapped, since flax would give a module that is a field another path.
      convs: (path, strides and so on as pairs) of the fused layers.
      folded: paths of the normalizations that are part of a convolution now.
    """

    original: Original
    convs: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    folded: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The original module."""
        return self.original.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original computes in evaluation mode."""
        convs = dict(self.convs)

        def plain(call: Any, inputs: Any, flags: Any, context: Any) -> Any:
            path = layer_path(context.module)
            if context.method_name == "__call__" and path in self.folded:
                return inputs[0]
            if context.method_name != "__call__" or path not in convs:
                return call(*inputs, **flags)
            kernel, bias = (context.module.get_variable("params", n) for n in ("kernel", "bias"))
            how = dict(convs[path])
            dtype = _tree.common_dtype(inputs[0], kernel, bias, given=how.pop("dtype"))
            return conv.convolution(inputs[0], kernel, bias, dtype=dtype, **how)

        with nn.intercept_methods(plain):
            return self.module.apply(self.variables, *args, **kwargs)


def layer_path(module: nn.Module) -> str:
    """The path of a bound module."""
    return "/".join(module.path)
