"""Account for an optimizer's state: bytes, and shardings, from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxtricks import _table, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Params
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
    return _tree.nbytes(jax.eval_shape(tx.init, _shapes(params)))


@checked
def state_table(
    tx: optax.GradientTransformation | optax.MultiSteps, params: Params
) -> _table.Table:
    """Tabulate the bytes of state per parameter, from shapes alone.

    Args:
      tx: any optax transformation, chain or MultiSteps.
      params: pytree of arrays or ShapeDtypeStructs. Where they carry NamedShardings on
        a mesh of several devices, a column shows the bytes per device.

    Returns:
      A table (its `str()` is text), largest first: parameter, shape, state in bytes,
      state per parameter byte, and per device. Notes name the matrices that Adafactor
      does not factor, and what that costs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.memopt import adafactor
      >>> params = {"q": jax.ShapeDtypeStruct((1024, 16, 64), jnp.float32)}
      >>> print(state_table(adafactor(), params))
      parameter  shape       state    state/param
      ---------  ----------  -------  -----------
      q          1024x16x64  4.0 MiB            1
      others     -           4 B                -
      total      -           4.0 MiB            1
      q is not factored: 4.0 MiB, where 8.0 KiB would do: pass roles=, or lower min_dim_size_to_factor
    """
    table = _tree.by_path(_shapes(params))
    shardings = shardings_of(params)
    state = jax.eval_shape(tx.init, _shapes(params))
    owners = _owners(tx, state, table)
    owned = _by_owner(jax.tree.map(_tree.nbytes, state), owners, table)
    local = None
    if shardings is not None:
        local = _by_owner(
            _local_bytes(tx, params, state, shardings), owners, table
        )
    order = sorted(table, key=lambda path: -owned[path])
    rows = [_row(path, table[path], path, owned, local) for path in order]
    rows.append(_row("others", None, None, owned, local))
    rows.append(
        _row("total", table, "total", _with_total(owned), _with_total(local))
    )
    headers = ("parameter", "shape", "state", "state/param")
    notes = _unfactored(tx, params, state, order)
    return _table.make(
        headers if local is None else (*headers, "per device"), rows, notes
    )


def _shapes(params: Params) -> Params:
    """Return the parameters as shapes on one device."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype(x)), params
    )


def _dtype(x: Any) -> Any:
    if hasattr(x, "dtype"):
        return x.dtype
    return jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)


def _by_owner(
    sizes: Any, owners: list[str | None], table: dict[str, Any]
) -> dict[str | None, int]:
    """Return {path: bytes of its state}; None = bytes that belong to no parameter."""
    totals: dict[str | None, int] = dict.fromkeys([*table, None], 0)
    for owner, size in zip(owners, jax.tree.leaves(sizes), strict=True):
        totals[owner] += size
    return totals


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A path as a leaf of a tree, because None is not a leaf."""

    path: str | None


def _owners(tx: Any, state: Any, table: dict[str, Any]) -> list[str | None]:
    """Return the path of the parameter that each array of the state belongs to."""

    # Called with every subtree of the state that has the parameters' structure.
    def mark(tree: Any) -> Any:
        return _tree.map_with_path(
            lambda path, _: _Owner(_prefix(path, table)), tree
        )

    def leave(tree: Any) -> Any:
        return jax.tree.map(lambda _: _Owner(None), tree)

    try:
        marked = optax.tree_utils.tree_map_params(
            tx, mark, state, transform_non_params=leave, is_leaf=lambda _: True
        )
    # A transformation whose state is no such tree may fail in any way. Then the paths
    # inside the state decide.
    except Exception:
        return [
            _owner(path, table) for path, _ in _tree.leaves_with_paths(state)
        ]
    return [owner.path for owner in jax.tree.leaves(marked)]


def _prefix(path: str, table: dict[str, Any]) -> str | None:
    """Return the longest parameter path that the path begins with."""
    keys = path.split("/")
    starts = ("/".join(keys[:width]) for width in range(len(keys), -1, -1))
    return next((start for start in starts if start in table), None)


def _owner(path: str, table: dict[str, Any]) -> str | None:
    """Return the longest parameter path inside a path of the state."""
    keys = path.split("/")
    for width in range(len(keys), 0, -1):
        for start in range(len(keys) - width + 1):
            candidate = "/".join(keys[start : start + width])
            if candidate in table:
                return candidate
    return None


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
    name: str, params: Any, key: str | None, owned: Any, local: Any
) -> tuple[Any, ...]:
    """Format the state under `key` beside its parameters (one, all, or None)."""
    shape = None
    if hasattr(params, "shape"):
        shape = "x".join(map(str, params.shape)) or "scalar"
    size = _tree.nbytes(params)
    row = (
        name,
        shape,
        _table.format_bytes(owned[key]),
        owned[key] / size if size else None,
    )
    return row if local is None else (*row, _table.format_bytes(local[key]))


def _with_total(
    sizes: dict[str | None, int] | None,
) -> dict[str | None, int] | None:
    return None if sizes is None else {"total": sum(sizes.values())}


def _unfactored(
    tx: Any, params: Params, state: Any, paths: list[str]
) -> list[str]:
    """Say for each matrix that is too small to factor what that costs, and the cure.

    A chain does not reveal the arguments of its links, so init is probed with very long
    axes, of rising and of falling length. What is not factored there is so by its
    roles; where the sides swap with the lengths, it is the lengths that decide them.
    """
    table = _tree.by_path(_shapes(params))
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

    shapes = jax.tree.map(longer, _shapes(params))
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
