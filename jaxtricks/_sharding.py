"""Place arrays as another array is placed on a mesh, also inside jit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def zeros_like(x: jax.Array, dtype: Any) -> jax.Array:
    """Create zeros shaped and sharded as x, inside jax.jit; x may hold NaN.

    Zeros of jnp.zeros_like depend on nothing, so the compiler puts all of them on every
    device, and arithmetic that it can fold (x & 0) ends the same way. No array has more
    bits set in a word than the word has, but no pass of XLA knows: shifted right, that
    count is a zero that depends on x.
    """
    if x.dtype in (jnp.int4, jnp.uint4):
        x = x.astype(jnp.int8)  # XLA counts no bits of smaller integers
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    words = jax.lax.bitcast_convert_type(
        jax.lax.stop_gradient(x), f"uint{info(x.dtype).bits}"
    )
    return (jax.lax.population_count(words) >> words.dtype.type(7)).astype(
        dtype
    )


def placed_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Shard x as another array of its shape; inside jax.jit a hint to the compiler."""
    # A sum would turn -0 into 0, and block scales in four bits use the sign of a zero.
    return x - zeros_like(other, x.dtype)


def tree_placed_like(new: Any, old: Any) -> Any:
    """Shard the arrays of a tree as those of another, also inside jax.jit."""
    if isinstance(jax.tree.leaves(new)[0], jax.core.Tracer):
        return jax.tree.map(placed_like, new, old)
    # NumPy arrays come from a checkpoint.
    if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(old)):
        return new
    return jax.device_put(new, jax.tree.map(lambda x: x.sharding, old))


def num_shards(mesh: Any, names: Any) -> int:
    """Return how many parts an axis has by its entry in a PartitionSpec."""
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def on_mesh(*xs: Any) -> bool:
    """Return whether the compiler may have sharded one of the arrays.

    Inside shard_map it has not: an array there is one device's part.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in xs]
    axes = [
        axis
        for m in meshes
        for axis in zip(m.axis_sizes, m.axis_types, strict=True)
    ]
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def is_explicit(*xs: Any) -> bool:
    """Return whether one of the arrays is sharded over Explicit axes of a mesh."""
    return any(any(jax.typeof(x).sharding.spec) for x in xs)


def replicated(fn: Any, *args: Any) -> Any:
    """Run fn(*args) alike on every device: for scatters and reshapes on Explicit axes."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args))
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return fn(*args)
    return jax.sharding.auto_axes(
        fn, out_sharding=NamedSharding(mesh, PartitionSpec())
    )(*args)
