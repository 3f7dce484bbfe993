"""Report what fusing a model did, and the proof that its function is the same."""

from typing import NamedTuple

from jaxtricks import _table


class FusedLayer(NamedTuple):
    """One convolution that stands for several layers.

    Attributes:
      layer: its path; "" is the model.
      branches: convolutions, poolings and normalizations alone that it stands for.
      max_error: largest |fused - branches| on the inputs of the check.
      bound: what rounding allows there: see `reparam.error_bound`.
      params_before: parameters and running statistics.
      params_after: parameters.
      flops_before: floating-point operations on the inputs of the check.
      flops_after: the same of the fused convolution.
    """

    layer: str
    branches: int
    max_error: float
    bound: float
    params_before: int
    params_after: int
    flops_before: int
    flops_after: int

    @property
    def ratio(self) -> float:
        """Return error over bound; at most 1."""
        return self.max_error / self.bound if self.bound else 0.0


class FuseReport(NamedTuple):
    """Report of fusing a model; its `str` is a table.

    Attributes:
      layers: the fused layers.
      model: the whole model on the example; None without one. Its bound is what the
        layers' bounds come to at the output, carried there by the derivative of the
        model.
      kept: (path, reason) of the layers and normalizations that stay, though they might
        have fused.
    """

    layers: tuple[FusedLayer, ...]
    model: FusedLayer | None = None
    kept: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return str(self.table())

    def table(self) -> _table.Table:
        """Tabulate one row per fused layer, and one for the model."""
        headers = ("layer", "branches", "max error", "bound", "ratio")
        headers += ("parameters", "fused", "FLOPs", "fused")
        rows = [_row(layer.layer or ".", layer) for layer in self.layers]
        if self.model is not None:
            rows.append(_row("the model", self.model))
        notes = [f"kept {path}: {reason}" for path, reason in self.kept]
        return _table.make(headers, rows, notes)


def _row(name: str, layer: FusedLayer) -> tuple[object, ...]:
    return (
        name,
        layer.branches,
        layer.max_error,
        layer.bound,
        layer.ratio,
        *layer[4:],
    )
