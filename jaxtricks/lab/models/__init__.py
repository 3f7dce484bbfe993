"""Small networks in Flax NNX, written to be read and copied; their parts can be swapped.

How a network is split over devices is declared by its classes, in class attributes that
`split_axes` reads: `row_parallel` names the submodules whose kernels are split along
their inputs, `unsplit` those that stay whole. All other kernels are split along their
outputs.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxtricks.lab.models.nfnet import NFNet
from jaxtricks.lab.models.repvgg import RepVGG
from jaxtricks.lab.models.resnet import ConvNorm, ResNet, activated
from jaxtricks.lab.models.transformer import Transformer

__all__ = [
    "ConvNorm",
    "NFNet",
    "RepVGG",
    "ResNet",
    "Transformer",
    "activated",
    "declared_paths",
    "split_axes",
]


def declared_paths(model: nnx.Module, attribute: str) -> tuple[str, ...]:
    """Return the paths of the submodules that the classes of a model name in a class attribute."""
    paths = []
    # Shared modules are visited once, under their first path.
    for path, node in nnx.iter_graph(model):
        for name in getattr(type(node), attribute, ()):
            paths.append("/".join(map(str, (*path, name))))
    return tuple(sorted(paths))


def split_axes(
    model: nnx.Module, roles: Callable[..., Any]
) -> Callable[[str, tuple[int, ...]], list[int]]:
    """Return (path, shape) -> the axes of a parameter that may be split over the mesh axis model.

    The second of two kernels in a row is split along its inputs, so that what lies
    between the two stays where it is (Shoeybi et al., Megatron-LM, arXiv 1909.08053,
    section 3). All others are split along their outputs: the TPU's compiler then
    scatters the residual stream of a ResNet and gathers it again, which sends what
    summing it whole would, and takes a third less memory.

    Args:
      model: its classes declare `row_parallel` and `unsplit`.
      roles: (path, shape) -> the roles of a parameter's axes (`jt.nnx.roles`).
    """
    row_parallel = _folders(declared_paths(model, "row_parallel"))
    unsplit = _folders(declared_paths(model, "unsplit"))

    def axes(path: str, shape: tuple[int, ...]) -> list[int]:
        if not path.endswith("kernel") or path.startswith(unsplit):
            return []
        side = "in" if path.startswith(row_parallel) else "out"
        return [i for i, role in enumerate(roles(path, shape)) if role == side]

    return axes


def _folders(paths: tuple[str, ...]) -> tuple[str, ...]:
    # With the slash: "second" is not the beginning of "second_gain".
    return tuple(f"{path}/" for path in paths)
