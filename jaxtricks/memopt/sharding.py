"""Where an optimizer's state lies on a mesh, given where the parameters lie."""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxtricks import _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Params


@checked
def state_specs(
    tx: optax.GradientTransformation | optax.MultiSteps, params: Params, param_specs: Any
) -> Any:
    """PartitionSpecs of the state that `tx.init(params)` makes.

    What is shaped as a parameter takes its spec; a mean over some axes takes the spec without them
    (v_in, v_out, the accumulators of SM3); counts are replicated. They are read off the types of an
    abstract `init`, so they hold for any chain of optax and ours.

    Args:
      tx: any optax transformation, chain or MultiSteps.
      params: pytree of arrays or ShapeDtypeStructs.
      param_specs: a PartitionSpec or NamedSharding for every parameter; None or a missing axis =
        replicated.

    Returns:
      A tree with the structure of the state and a PartitionSpec for every array.

    Raises:
      ValueError: another structure than params, or more axes than a parameter has.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.memopt import adafactor
      >>> params = {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
      >>> specs = state_specs(adafactor(), params, {"w": PartitionSpec("data", "model")})
      >>> [tuple(spec) for spec in specs.v["w"]]
      [('data',), ('model',)]
    """
    leaves, structure = jax.tree.flatten(params)
    specs = _specs_like(params, param_specs)
    mesh = _explicit_mesh(specs, [*leaves, *jax.tree.leaves(param_specs, is_leaf=_is_spec)])
    placed = [
        jax.ShapeDtypeStruct(jax.numpy.shape(x), x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]
    # Since jax 0.12 zeros_like forgets the sharding of a shape whose mesh is not in force.
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(structure, placed))
    return jax.tree.map(_spec_of, state)


def _explicit_mesh(specs: list[PartitionSpec], hints: list[Any]) -> AbstractMesh:
    """A mesh with the axes that the specs name, of the sizes that any of the shardings gives them."""
    names = tuple(dict.fromkeys(name for spec in specs for name in _names(spec)))
    sizes = dict.fromkeys(names, 1)  # divides everything
    for x in hints:
        sharding = getattr(x, "sharding", x)
        sizes.update(sharding.mesh.shape if isinstance(sharding, NamedSharding) else {})
    types = (AxisType.Explicit,) * len(names)
    return AbstractMesh(tuple(sizes[n] for n in names), names, axis_types=types)


def shardings_of(params: Params) -> Any | None:
    """The NamedShardings of params on a mesh of several devices; None where they are on one."""
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    on_mesh = [s for s in jax.tree.leaves(shardings) if isinstance(s, NamedSharding)]
    return shardings if any(s.mesh.size > 1 for s in on_mesh) else None


def _specs_like(params: Params, param_specs: Any) -> list[PartitionSpec]:
    """One spec per leaf of params, checked."""
    given = jax.tree.leaves(param_specs, is_leaf=_is_spec)
    table = _tree.by_path(params)
    if len(given) != len(table):
        raise ValueError(
            f"memopt.state_specs: `param_specs` has {len(given)} specs for {len(table)} parameters: "
            "give one for each"
        )
    specs = [_as_spec(spec) for spec in given]
    for (path, leaf), spec in zip(table.items(), specs, strict=True):
        if len(spec) > len(jax.numpy.shape(leaf)):
            raise ValueError(
                f"memopt.state_specs: the spec {spec} of {path!r} has more axes than its shape "
                f"{tuple(jax.numpy.shape(leaf))}: give one entry per axis"
            )
    return specs


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | jax.sharding.Sharding)


def _as_spec(x: Any) -> PartitionSpec:
    if isinstance(x, PartitionSpec):
        return x
    return x.spec if isinstance(x, NamedSharding) else PartitionSpec()


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    parts = (part if isinstance(part, tuple) else (part,) for part in spec if part is not None)
    return tuple(name for part in parts for name in part)


def _spec_of(x: Any) -> PartitionSpec:
    spec = getattr(x.sharding, "spec", None) or PartitionSpec()
    while len(spec) and spec[-1] is None:
        spec = PartitionSpec(*spec[:-1])
    return spec
