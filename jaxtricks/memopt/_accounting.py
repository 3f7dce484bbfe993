"""Account for an optimizer's state: bytes, and shardings, from shapes alone."""

import math
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxtricks import _compat, _jaxpr, _table, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Params
from jaxtricks.memopt import _owners
from jaxtricks.memopt._adafactor import AdafactorState, Full, is_second_moment


@checked
def state_bytes(
    tx: optax.GradientTransformation | optax.MultiSteps, params: Params
) -> int:
    """Count the bytes of the state of `tx.init(params)`, without allocating it.

    Args:
      tx: any optax transformation, chain or MultiSteps.
      params: pytree of arrays or ShapeDtypeStructs.

    Returns:
      The bytes of all arrays in the state, on one device.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> state_bytes(optax.adam(1e-3), params)
      8388612
    """
    return _tree.nbytes(jax.eval_shape(tx.init, _owners.shapes(params)))


@checked
def state_table(
    tx: optax.GradientTransformation | optax.MultiSteps, params: Params
) -> _table.Table:
    """Tabulate the bytes of state of each parameter, from shapes alone.

    Args:
      tx: any optax transformation, chain or MultiSteps.
      params: pytree of arrays or ShapeDtypeStructs. Where they carry NamedShardings on
        a mesh of several devices, a column shows the bytes in the memory of one device.

    Returns:
      A table (its `str()` is text), largest first: parameter, shape, bytes of state,
      and those per entry of the parameter; bytes per device; bytes on the host, where
      `host_offload` puts any there. Notes name the matrices that Adafactor does not
      factor, and what that costs; the last is the size of a checkpoint of parameters
      and state, uncompressed.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.memopt import adafactor
      >>> params = {"q": jax.ShapeDtypeStruct((1024, 16, 64), jnp.float32)}
      >>> print(state_table(adafactor(), params))
      parameter  shape       state    bytes/param
      ---------  ----------  -------  -----------
      q          1024x16x64  4.0 MiB            4
      others     -           4 B                -
      total      -           4.0 MiB            4
      q is not factored: 4.0 MiB, where 8.0 KiB would do: pass roles=, or lower min_dim_size_to_factor
      a checkpoint is 8.0 MiB: parameters 4.0 MiB, state 4.0 MiB
    """
    table = _tree.by_path(_owners.shapes(params))
    shardings = shardings_of(params)
    state = jax.eval_shape(tx.init, _owners.shapes(params))
    owners = _owners.owners(tx, state, table)
    sizes = jax.tree.map(_tree.nbytes, state)
    on_host = _on_host(tx, params)

    def owned(sizes: Any) -> dict[str | None, int]:
        return _by_owner(jax.tree.leaves(sizes), owners, table)

    columns = {"state": owned(sizes)}
    if shardings is not None:
        local = jax.tree.leaves(_local_bytes(tx, params, state, shardings))
        columns["per device"] = owned(_where(local, [not x for x in on_host]))
    if any(on_host):
        columns["on host"] = owned(_where(jax.tree.leaves(sizes), on_host))
    order = sorted(table, key=lambda path: -columns["state"][path])
    rows = [_row(path, table[path], path, columns) for path in order]
    rows.append(_row("others", None, None, columns))
    totals = {
        name: {"total": sum(column.values())}
        for name, column in columns.items()
    }
    rows.append(_row("total", table, "total", totals))
    _, *more = columns
    return _table.make(
        ("parameter", "shape", "state", "bytes/param", *more),
        rows,
        [
            *_unfactored(tx, params, state, order),
            _checkpoint(_tree.nbytes(table), _tree.nbytes(state)),
        ],
    )


def _on_host(tx: Any, params: Params) -> list[bool]:
    """Return whether each array of the state lies in the memory of the host."""
    # Neither eval_shape nor ShapeDtypeStruct says so; a jaxpr does.
    closed, _ = _jaxpr.trace(tx.init, _owners.shapes(params))
    return [_compat.in_host_memory(aval) for aval in closed.out_avals]


def _where(sizes: list[int], mask: list[bool]) -> list[int]:
    return [size if m else 0 for size, m in zip(sizes, mask, strict=True)]


def _checkpoint(params: int, state: int) -> str:
    total, *parts = map(_table.format_bytes, (params + state, params, state))
    return "a checkpoint is {}: parameters {}, state {}".format(total, *parts)


def _by_owner(
    sizes: list[int], owners: list[str | None], table: dict[str, Any]
) -> dict[str | None, int]:
    """Return {path: bytes of its state}; None = bytes that belong to no parameter."""
    totals: dict[str | None, int] = dict.fromkeys([*table, None], 0)
    for owner, size in zip(owners, sizes, strict=True):
        totals[owner] += size
    return totals


def _local_bytes(tx: Any, params: Params, state: Any, shardings: Any) -> Any:
    specs = state_specs(tx, params, shardings)
    named = (
        s for s in jax.tree.leaves(shardings) if isinstance(s, NamedSharding)
    )
    mesh = next(named).mesh

    def local(x: Any, spec: PartitionSpec) -> int:
        shape = NamedSharding(mesh, spec).shard_shape(x.shape)
        return _tree.nbytes(jax.ShapeDtypeStruct(shape, x.dtype))

    return jax.tree.map(local, state, specs)


def _row(
    name: str, params: Any, key: str | None, columns: dict[str, Any]
) -> tuple[Any, ...]:
    """Format the bytes under `key` beside its parameters (one, all, or None)."""
    shape = None
    if hasattr(params, "shape"):
        shape = "x".join(map(str, params.shape)) or "scalar"
    entries = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    state, *more = (column[key] for column in columns.values())
    return (
        name,
        shape,
        _table.format_bytes(state),
        state / entries if entries else None,
        *map(_table.format_bytes, more),
    )


def _unfactored(
    tx: Any, params: Params, state: Any, paths: list[str]
) -> list[str]:
    """Say for each matrix that is too small to factor what that costs, and the cure.

    A chain does not reveal the arguments of its links, so init is probed with very long
    axes, of rising and of falling length. What is not factored there is so by its
    roles; where the sides swap with the lengths, it is the lengths that decide them.
    """
    table = _tree.by_path(_owners.shapes(params))
    whole = [
        path
        for path in paths
        if _is_whole_matrix(state, path, table[path].shape)
    ]
    if not whole:
        return []
    rising, falling = (_long(tx, params, order) for order in (1, -1))
    notes = []
    for path in whole:
        up = _sides(*rising, path)
        down = _sides(*falling, path)
        if not up or not down:
            continue
        shape = table[path].shape
        rank = len(shape)
        by_length = rank > 2 and up != down
        # With roles any cut of the axes into two sides is possible.
        cuts = [(range(c), range(c, rank)) for c in range(1, rank)]
        sides = cuts if by_length else [up]
        fewest = min(_factored_size(shape, pair) for pair in sides)
        if fewest >= math.prod(shape):
            continue
        itemsize = next(
            v.v.dtype.itemsize for v in _second_moments(state, path)
        )
        size = _table.format_bytes(itemsize * math.prod(shape))
        enough = _table.format_bytes(itemsize * fewest)
        cure = "lower min_dim_size_to_factor"
        if by_length:
            cure = f"pass roles=, or {cure}"
        notes.append(
            f"{path} is not factored: {size}, where {enough} would do: {cure}"
        )
    return notes


def _is_whole_matrix(state: Any, path: str, shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 or 0 in shape:
        return False
    return any(isinstance(v, Full) for v in _second_moments(state, path))


def _factored_size(shape: tuple[int, ...], sides: Any) -> int:
    """Return the number of entries of the second moment with these two sides."""
    return sum(math.prod(shape[i] for i in side) for side in sides)


_LENGTH = 2**14
"""Longer than any useful `min_dim_size_to_factor`."""


def _long(tx: Any, params: Params, order: int) -> tuple[Any, dict[str, Any]]:
    """Return (state, {path: shape}) for axes of rising (1) or falling (-1) length."""

    def longer(x: Any) -> Any:
        lengths = [_LENGTH * (i + 1) for i in range(len(x.shape))][::order]
        return jax.ShapeDtypeStruct(tuple(lengths), x.dtype)

    shapes = jax.tree.map(longer, _owners.shapes(params))
    return jax.eval_shape(tx.init, shapes), _tree.by_path(shapes)


def _sides(
    state: Any, shapes: dict[str, Any], path: str
) -> tuple[list[int], ...] | None:
    """Return the axes of each factor of the second moment; None if not factored."""
    moments = _second_moments(state, path)
    if not moments or any(isinstance(v, Full) for v in moments):
        return None
    lengths = shapes[path].shape  # all different, so they identify the axes
    return tuple(
        [lengths.index(n) for n in factor.shape] for factor in moments[0]
    )


def _second_moments(state: Any, path: str) -> list[Any]:
    states = jax.tree.leaves(
        state, is_leaf=lambda x: isinstance(x, AdafactorState)
    )
    tables = [
        _tree.by_path(x.v, is_second_moment)
        for x in states
        if isinstance(x, AdafactorState)
    ]
    return [table[path] for table in tables if path in table]


# Shardings of an optimizer's state.


@checked
def state_specs(
    tx: optax.GradientTransformation | optax.MultiSteps,
    params: Params,
    param_specs: Any,
) -> Any:
    """Return PartitionSpecs for the state of `tx.init(params)`.

    An array shaped as a parameter takes its spec; a mean over some axes takes the spec
    without them (v_in, v_out, the accumulators of SM3); counts are replicated. An
    abstract `init` decides, so the specs hold for any chain.

    Args:
      tx: any optax transformation, chain or MultiSteps.
      params: pytree of arrays or ShapeDtypeStructs.
      param_specs: a PartitionSpec or NamedSharding for every parameter; None or a
        missing axis = replicated.

    Returns:
      A tree with the structure of the state and a PartitionSpec for every array.

    Raises:
      ValueError: a structure unlike params, or more axes than a parameter has.

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
    hints = [*leaves, *jax.tree.leaves(param_specs, is_leaf=_is_spec)]
    mesh = _explicit_mesh(specs, hints)
    sharded = []
    for x, spec in zip(leaves, specs, strict=True):
        sharding = NamedSharding(mesh, spec)
        shape = jax.numpy.shape(x)
        sharded.append(jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding))
    # Since jax 0.12 zeros_like forgets a sharding whose mesh is not in force.
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(structure, sharded))
    return jax.tree.map(_spec_of, state)


def _explicit_mesh(
    specs: list[PartitionSpec], hints: list[Any]
) -> AbstractMesh:
    """Build a mesh with the axes that the specs name; shardings give their sizes."""
    names = tuple(
        dict.fromkeys(name for spec in specs for name in _names(spec))
    )
    sizes = dict.fromkeys(names, 1)  # 1 divides every axis
    for x in hints:
        sharding = getattr(x, "sharding", x)
        sizes.update(
            sharding.mesh.shape if isinstance(sharding, NamedSharding) else {}
        )
    types = (AxisType.Explicit,) * len(names)
    return AbstractMesh(tuple(sizes[n] for n in names), names, axis_types=types)


def shardings_of(params: Params) -> Any | None:
    """Return the NamedShardings of params; None unless they span several devices."""
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    on_mesh = [
        s for s in jax.tree.leaves(shardings) if isinstance(s, NamedSharding)
    ]
    return shardings if any(s.mesh.size > 1 for s in on_mesh) else None


def _specs_like(params: Params, param_specs: Any) -> list[PartitionSpec]:
    """Return one checked spec per leaf of params."""
    leaf_specs = jax.tree.leaves(param_specs, is_leaf=_is_spec)
    table = _tree.by_path(params)
    if len(leaf_specs) != len(table):
        raise ValueError(
            f"memopt.state_specs: `param_specs` has {len(leaf_specs)} specs "
            f"for {len(table)} parameters: give one for each"
        )
    specs = [_as_spec(spec) for spec in leaf_specs]
    for (path, leaf), spec in zip(table.items(), specs, strict=True):
        if len(spec) > len(jax.numpy.shape(leaf)):
            raise ValueError(
                f"memopt.state_specs: the spec {spec} of {path!r} has more "
                f"axes than its shape {tuple(jax.numpy.shape(leaf))}: give one "
                "entry per axis"
            )
    return specs


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | jax.sharding.Sharding)


def _as_spec(x: Any) -> PartitionSpec:
    if isinstance(x, PartitionSpec):
        return x
    return x.spec if isinstance(x, NamedSharding) else PartitionSpec()


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    names: list[str] = []
    for part in spec:
        if part is not None:
            names.extend(part if isinstance(part, tuple) else (part,))
    return tuple(names)


def _spec_of(x: Any) -> PartitionSpec:
    spec = getattr(x.sharding, "spec", None) or PartitionSpec()
    while len(spec) and spec[-1] is None:
        spec = PartitionSpec(*spec[:-1])
    return spec
