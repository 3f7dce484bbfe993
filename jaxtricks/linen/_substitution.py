"""Run a linen module with other layers in place of some of its layers.

A linen module creates its layers while it is called, so they cannot be replaced in the
module: `SubstitutedModule` intercepts their calls and runs others with the variables at
the same paths.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from jaxtricks import _layers


@dataclasses.dataclass(frozen=True)
class Unbound:
    """Modules that are not submodules, which Flax would make of modules in fields.

    Attributes:
      module: the original module.
      layers: (path, layer) of what runs in place of its layers.
    """

    module: nn.Module
    layers: tuple[tuple[str, nn.Module], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Bound:
    """Modules that are bound to scopes.

    A scope must not be bound twice: what is called again has to be the same module.

    Attributes:
      module: the original.
      layers: {(path, id of the scope): (scope, layer)}; the scope is held, or another
        one could get its id.
    """

    module: Any
    layers: dict[tuple[str, int], tuple[Any, Any]]


class SubstitutedModule(nn.Module):
    """A module with other layers in place of some of its layers, under the same paths.

    It is initialized, applied, trained and fused like any module. Where the original
    would call a layer, the other one runs with the variables at the path of the layer.
    One whose call takes `use_running_average` (a block, a normalization) is told what
    the call says, else what its attribute says, else what the layer's attribute says,
    else whether the nearest enclosing call trains: by its flags (`train`,
    `deterministic`, ...) or, without any, by whether "batch_stats" is mutable.

    Attributes:
      unbound: the original module and the layers.
      is_fused: whether the layers do not train.
    """

    unbound: Unbound
    is_fused: bool = False

    def setup(self) -> None:
        """Bind the original module to the scope, so that paths stay as they are."""
        # In a holder, since Flax would make a submodule of it, with a name in the paths.
        self.bound = _Bound(self.unbound.module.clone(parent=self.scope), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the original does, with the other layers."""
        interceptor = _Interceptor(self.path, self.layers, self.bound.layers)
        with nn.intercept_methods(interceptor):
            return self.bound.module(*args, **kwargs)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers by path."""
        return dict(self.unbound.layers)


def substituted(
    module: nn.Module, layers: Mapping[str, nn.Module], *, is_fused: bool
) -> SubstitutedModule:
    """Return the module with these layers at these paths.

    If it is one with other layers already, they are merged.
    """
    layers = {**substituted_layers(module), **layers}
    unbound = Unbound(original(module), tuple(layers.items()))
    return SubstitutedModule(unbound, is_fused)


def original(module: nn.Module) -> nn.Module:
    """Return the original of a module with other layers, or the module itself."""
    is_substituted = isinstance(module, SubstitutedModule)
    return module.unbound.module if is_substituted else module


def substituted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return {path: layer} of what runs in place of the original's layers."""
    return module.layers if isinstance(module, SubstitutedModule) else {}


class _Interceptor:
    """Runs other layers in place of those at some paths, during one call."""

    def __init__(
        self,
        root: tuple[str, ...],
        layers: Mapping[str, nn.Module],
        bound: dict[tuple[str, int], tuple[Any, Any]],
    ):
        # Path of the module, which those of the layers continue.
        self._root = root
        self._layers = layers
        self._bound = bound
        self._modes: list[
            bool
        ] = []  # of the enclosing calls that say whether to train
        self._running: set[str] = set()

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if module.scope is None:  # not part of the computation
            return call(*args, **kwargs)
        path = "/".join(module.path[len(self._root) :])
        # While the other layer runs, it is the one at this path.
        is_substituted = path in self._layers and path not in self._running
        if is_substituted and method == "__call__":
            return self._run(path, module, args, kwargs)
        trains = _mode_of_call(module, method, args, kwargs)
        if trains is None:
            return call(*args, **kwargs)
        self._modes.append(trains)
        try:
            return call(*args, **kwargs)
        finally:
            self._modes.pop()

    def _run(self, path: str, module: Any, args: Any, kwargs: Any) -> Any:
        key = (path, id(module.scope))
        if key not in self._bound:
            layer = self._layers[path].clone(parent=module.scope)
            self._bound[key] = module.scope, layer
        _, layer = self._bound[key]
        says_mode = "use_running_average" in layer.__dataclass_fields__
        if (
            says_mode
            and len(args) < 2
            and kwargs.get("use_running_average") is None
        ):
            setting = layer.use_running_average
            if setting is None:
                setting = getattr(module, "use_running_average", None)
            if setting is None:
                setting = not self._trains(module)
            kwargs = {**kwargs, "use_running_average": setting}
        # Its call at the same path must not be intercepted again.
        self._running.add(path)
        try:
            return layer(*args, **kwargs)
        finally:
            self._running.remove(path)

    def _trains(self, module: nn.Module) -> bool:
        # The nearest enclosing call knows best.
        if self._modes:
            return self._modes[-1]
        return module.is_mutable_collection("batch_stats")


def _mode_of_call(
    module: nn.Module, method: str, args: Any, kwargs: Any
) -> bool | None:
    """Return whether the flags of a call, or else of the module, say train."""
    try:
        signature = inspect.signature(getattr(type(module), method))
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        trains = _layers.training_flag(bound.arguments)
    except (AttributeError, TypeError, ValueError):
        # A function that a transform of Flax calls under the name of a method.
        trains = None
    if trains is not None:
        return trains
    fields = {
        name: getattr(module, name, None)
        for name in module.__dataclass_fields__
    }
    return _layers.training_flag(fields)
