"""The normalization behind a convolution, for the settings of a block that takes the convolution's place."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from jaxtricks.nnx import _fuse
from jaxtricks.nnx.probe import Probed, Spied, evaluation_kwargs

NAMES = (
    "momentum",
    "epsilon",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "dtype",
    "param_dtype",
)


class NormSettings:
    """Finds the settings of the normalization that a convolution of a model feeds.

    Args:
      model: any module.
      example: an input, or a tuple of them: then the trace knows; None = by where the layers lie.
      example_kwargs: keyword arguments of the model's call.
    """

    def __init__(self, model: nnx.Module, example: Any, example_kwargs: Mapping[str, Any] | None):
        self._convs, self._norms = _fuse.layers(model)
        self._fed: Mapping[str, list[list[str | None]]] = {}
        if example is not None:
            kwargs = evaluation_kwargs(model, example, example_kwargs)
            spied = Spied(model, (*self._convs, *self._norms), kwargs)
            self._fed = Probed(spied, example).flow().read_by

    def of(self, path: str, features: int, names: Iterable[str]) -> dict[str, Any]:
        """{name: value} of the normalization; empty if the model has none, or none with a name.

        Of several that may be it, all must agree: those that the trace shows; else those beside the
        convolution, with as many features; else all of the model.

        Raises:
          ValueError: they do not agree.
        """
        parent = path.rpartition("/")[0]
        traced = [self._norms.get(p) for uses in self._fed.get(path, ()) for p in uses if p]
        beside = [
            norm
            for p, norm in self._norms.items()
            if p.rpartition("/")[0] == parent and norm.num_features == features
        ]
        groups = ([norm for norm in traced if norm], beside, list(self._norms.values()))
        norms = next((group for group in groups if group), [])
        return {
            name: _common(name, norms) for name in names if any(hasattr(n, name) for n in norms)
        }


def _common(name: str, norms: Iterable[Any]) -> Any:
    first, *others = (getattr(norm, name) for norm in norms if hasattr(norm, name))
    for other in others:
        if other != first:
            raise ValueError(
                f"the normalizations that may stand behind it have `{name}` {first} and {other}: give "
                "`example`, with which the trace tells, or bind the block's `norm` "
                f"(functools.partial(nnx.BatchNorm, {name}=...))"
            )
    return first
