"""Run a linen module in evaluation mode, and intercept the calls of its layers."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from jaxtricks import _layers
from jaxtricks._fusion import as_inputs
from jaxtricks.linen._functional import evaluated, in_mode
from jaxtricks.linen._substitution import original, substituted_layers
from jaxtricks.linen._variables import layer_path

Interceptor = Callable[[Any, Any, Any, Any], Any]
"""(call, args, kwargs, context) -> output, as in flax.linen."""


class EvaluatedModule:
    """A module with variables and arguments of a call, told to evaluate.

    Args:
      module: any linen module.
      variables: its variables.
      example: an input of the module, or a tuple of them.
      example_kwargs: keyword arguments of the module's call.

    Attributes:
      module: the module, with flags that are attributes set for evaluation.
      example: the positional arguments.
      kwargs: the keyword arguments, with the flags of the call set for evaluation.
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Mapping[str, Any],
        example: Any,
        example_kwargs: Mapping[str, Any] | None,
    ):
        self.module = in_mode(module, False)
        self.variables = variables
        self.example = as_inputs(example)
        kwargs = dict(example_kwargs or {})
        cls = type(original(module))
        kwargs |= _layers.call_flags(cls, False, self.example, kwargs)
        self.kwargs = kwargs

    def run(
        self, interceptor: Interceptor, classes: tuple[type, ...], *inputs: Any
    ) -> Any:
        """Return the output, with an interceptor around the calls of layers.

        Args:
          interceptor: runs around the outermost `__call__` of each layer, not around
            that of a base class, which a layer may call in turn.
          classes: of the layers.
          *inputs: of the module.
        """
        # Where another layer runs in place of one, that is the layer: its call is the
        # second one at the path.
        replaced: set[str] = set()
        depth: dict[str, int] = collections.defaultdict(int)

        def outermost(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.scope is None:
                return call(*args, **kwargs)
            path = layer_path(module)
            prefix = _layers.path_prefix(path)
            replaced.update(f"{prefix}{p}" for p in substituted_layers(module))
            is_layer = isinstance(module, classes)
            is_outermost = depth[path] == (1 if path in replaced else 0)
            counts = is_layer or path in replaced
            depth[path] += counts
            try:
                if is_layer and is_outermost:
                    return interceptor(call, args, kwargs, context)
                return call(*args, **kwargs)
            finally:
                depth[path] -= counts

        def apply(mutable: list[str]) -> Any:
            return self.module.apply(
                self.variables, *inputs, **self.kwargs, mutable=mutable
            )

        with nn.intercept_methods(outermost):
            # A module that trains writes its statistics: `fuse` has an error for that,
            # which says more than Flax's.
            (y, _), _ = evaluated(apply, self.variables)
        return y

    def intercepted(
        self, interceptor: Interceptor, classes: tuple[type, ...]
    ) -> Callable[..., Any]:
        """Return `run` as a function of the inputs."""
        return functools.partial(self.run, interceptor, classes)
