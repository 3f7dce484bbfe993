"""Say what each axis of a model's parameters means, from the types of its layers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from jaxtricks import _layer_axes
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._layer_axes import Axis
from jaxtricks._typing import Roles
from jaxtricks.nnx import _compat


@checked
def roles(model: nnx.Module) -> roles_lib.Exact:
    """Return a rule for `roles=` that is exact for the layers of flax.nnx and ours.

    Layers that nnx.vmap has stacked have more axes than their sizes explain: those are
    "batch", wherever they are. Where the sizes fit more than one place (four layers of
    4 by 4), the names of a partitioned variable decide (`transform_metadata` names the
    stacked axis); without them it is the first place that fits, since nnx.vmap stacks
    along axis 0 unless told otherwise, and `roles.describe` marks the leaf.

    Args:
      model: any module; its parameters may be abstract (`nnx.eval_shape`).

    Returns:
      (path, shape) -> roles, for the paths of `nnx.to_pure_dict(nnx.state(model,
      nnx.Param))` and of the nnx.State itself; a shape with more axes than the
      parameter of the model has them in front. None for parameters that belong to no
      known layer: a user's nnx.Param, and those of `nnx.bridge.ToNNX` (below whose path
      `jt.linen.roles` of the linen module applies).

    Example:
      >>> rule = roles(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
      >>> rule("kernel", (3, 4)), rule("kernel", (7, 3, 4)), rule("bias", (4,))
      (('in', 'out'), ('batch', 'in', 'out'), ('none',))
    """
    parameters = list(_parameters(model))
    stack_names = _stack_names(parameters)
    table: dict[str, Roles] = {}
    assumed = []
    for parameter in parameters:
        candidates = _matching_names(parameter, stack_names)
        table[parameter.path] = candidates[0]
        if len(candidates) > 1:
            assumed.append(parameter.path)
    return roles_lib.exact(table, assumed)


class _Parameter(NamedTuple):
    """A parameter of a known layer.

    Attributes:
      path: in the state of the model.
      candidates: all roles that fit its sizes.
      partition_names: names of its axes for sharding, or None.
    """

    path: str
    candidates: list[Roles]
    partition_names: tuple[Any, ...] | None


def _parameters(model: nnx.Module) -> Iterator[_Parameter]:
    paths = _compat.variable_paths(model)
    visited: set[int] = set()
    for _, module in _compat.modules(model):
        layer = []
        for name, axes in _layer_axes.layer_axes(module).items():
            variable = _layer_axes.named_parameter(module, name)
            if (
                not isinstance(variable, nnx.Variable)
                or id(variable) in visited
            ):
                continue
            visited.add(id(variable))
            candidates = _layer_axes.placements(axes, variable.shape)
            # A user may have assigned a parameter of another size.
            candidates = candidates or _by_rank(axes, variable.shape)
            if candidates:
                layer.append((variable, candidates))
        for variable, candidates in _stacked_alike(layer):
            path = "/".join(map(str, paths[id(variable)]))
            yield _Parameter(
                path, candidates, _compat.partition_names(variable)
            )


def _stacked_alike(
    layer: Sequence[tuple[Any, list[Roles]]],
) -> list[tuple[Any, list[Roles]]]:
    """Return the candidates that give all parameters of a layer the same stacked sizes."""

    def stacked_sizes(variable: Any, roles: Roles) -> tuple[int, ...]:
        pairs = zip(variable.shape, roles, strict=True)
        return tuple(n for n, role in pairs if role == "batch")

    sizes = [
        {stacked_sizes(variable, roles) for roles in candidates}
        for variable, candidates in layer
    ]
    common = set.intersection(*sizes) if sizes else set()
    result = []
    for variable, candidates in layer:
        # A layer's kernel and bias are stacked together.
        alike = [r for r in candidates if stacked_sizes(variable, r) in common]
        result.append((variable, alike or candidates))
    return result


def _by_rank(axes: Sequence[Axis], shape: Sequence[int]) -> list[Roles]:
    """Return the roles of a parameter that was replaced by one of other sizes."""
    return [tuple(role for role, _ in axes)] if len(axes) == len(shape) else []


def _stack_names(parameters: Iterable[_Parameter]) -> set[Any]:
    """Return the partition names of stacked axes, wherever the sizes leave no doubt."""
    # A name that also stands for another axis proves nothing.
    stacked: set[Any] = set()
    others: set[Any] = {None}
    for parameter in parameters:
        names = parameter.partition_names
        if not names or len(parameter.candidates) > 1:
            continue
        for name, role in zip(names, parameter.candidates[0], strict=False):
            (stacked if role == "batch" else others).add(name)
    return stacked - others


def _matching_names(
    parameter: _Parameter, stack_names: set[Any]
) -> list[Roles]:
    """Return the candidates that the names of the axes allow; all if they allow none."""
    candidates, names = parameter.candidates, parameter.partition_names
    if len(candidates) == 1 or not names or len(names) != len(candidates[0]):
        return candidates
    is_stacked = [name in stack_names for name in names]
    allowed = [
        roles
        for roles in candidates
        if [r == "batch" for r in roles] == is_stacked
    ]
    return allowed or candidates
