"""A linen module some of whose layers are computed by plain ones."""

import dataclasses
from typing import Any

from flax import linen as nn

from jaxtricks import _tree
from jaxtricks.nnx import _conv


@dataclasses.dataclass(frozen=True)
class Original:
    """Holds an unbound module."""

    module: nn.Module


class Fused(nn.Module):
    """What `jt.linen.fuse` returns: the module with other layers, under the same paths.

    Its variables are those of a network of plain layers. Where the module would call a fused layer, the
    convolution with the kernel and bias at the layer's path runs; a folded normalization passes its input on.

    Attributes:
      original: the module; wrapped, since flax would give a module that is a field another path.
      convs: (path, strides and so on as pairs) of the layers that are convolutions now.
      folded: (path, dtype of its output) of the normalizations that are part of a layer now.
      biased: paths of linear layers and transposed convolutions that have taken one up: they are called
        with a bias.
    """

    original: Original
    convs: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    folded: tuple[tuple[str, str], ...] = ()
    biased: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The original module."""
        return self.original.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the original computes in evaluation mode."""
        convs, folded = dict(self.convs), dict(self.folded)

        def plain(call: Any, inputs: Any, flags: Any, context: Any) -> Any:
            layer, path = context.module, layer_path(context.module)
            if context.method_name != "__call__":
                return call(*inputs, **flags)
            if path in folded:
                return _first(inputs, flags).astype(folded[path])
            if path in self.biased:
                params = {n: layer.get_variable("params", n) for n in ("kernel", "bias")}
                alone = layer.clone(use_bias=True, parent=None)
                return alone.apply({"params": params}, *inputs, **flags)
            if path not in convs:
                return call(*inputs, **flags)
            kernel, bias = (layer.get_variable("params", n) for n in ("kernel", "bias"))
            x, how = _first(inputs, flags), dict(convs[path])
            dtype = _tree.common_dtype(x, kernel, bias, given=how.pop("dtype"))
            return _conv.convolution(x, kernel, bias, dtype=dtype, **how)

        with nn.intercept_methods(plain):
            return self.module.apply(self.variables, *args, **kwargs)


def _first(inputs: Any, kwargs: Any) -> Any:
    """The input of a layer's call, which may be given by name."""
    return inputs[0] if inputs else next(iter(kwargs.values()))


def layer_path(module: nn.Module) -> str:
    """The path of a bound module."""
    return "/".join(module.path)
