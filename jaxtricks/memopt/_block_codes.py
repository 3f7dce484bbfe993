"""Store an array in 8 or 4 bits an entry, with a scale per block of one axis.

Codes are roots: with 8 bits and a sign, |x| / scale = (code / 126)^2. So they lie closer
together near zero, where most entries of a block are, than evenly spaced ones, and
farther apart than those of a float, whose small exponents few entries use. Between two
codes, chance decides in proportion to the distances, so that the mean is exact.

| bits | sign | level of code k | spacing at 1, 0.1, 0.01 of the largest | smallest |
| 8 | yes | k^2 | 1/63, 1/20, 1/6 of the entry | 6.3e-5 of it |
| 8 | no | k^4 | 1/63, 1/36, 1/20 | 2.4e-10 |
| 4 | yes | (k + 1)^2 - 1 | 1/4, 3/4, all of the entry and more | 4.8e-2 |
| 4 | no | (k + 1)^2 - 1 | 1/8, 2/5, all | 1.2e-2 |

NaN and infinity have codes too. With 4 bits only a block that holds one spends codes on
them; the sign of its scale says so.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxtricks import _random_bits, _sharding, _tree
from jaxtricks._typing import Array

BLOCK = 64
# By bits and sign: square roots, and what is added to a code. See _Format.
_CURVES = {
    (8, True): (1, 0),
    (8, False): (2, 0),
    (4, True): (1, 1),
    (4, False): (1, 1),
}


class Layout(NamedTuple):
    """How an array is stored.

    Attributes:
      bits: 8 or 4.
      signed: whether a bit of the code is the sign.
      axis: of the blocks, counted from the last (-1).
      length: of that axis.
      dtype: of the array.
      seed: of the array, for rounding.
    """

    bits: int
    signed: bool
    axis: int
    length: int
    dtype: Any
    seed: int = 0


@_tree.node
class BlockCodes:
    """An array in 8 or 4 bits an entry.

    Attributes:
      codes: uint8, or int4, shaped as the array.
      scale: bfloat16, shaped as the array with a number per block along that axis: at
        least the largest finite magnitude of the block; with 4 bits negative (or -0) if
        not all of the block is finite.
      layout: what the two don't say.
    """

    codes: Any
    scale: Any
    layout: Layout = _tree.static()


class _Format(NamedTuple):
    """Which magnitude a code stands for: (code + offset)^(2^roots), less that of 0."""

    magnitude_bits: int
    roots: int
    offset: int
    reserved: int  # codes of what is not finite
    on_demand: bool  # only where a block has such entries

    def largest(self, finite: Any) -> Array:
        """Return the largest code of a number, float32."""
        every = 2**self.magnitude_bits - 1
        return jnp.where(finite, every, every - self.reserved).astype(
            jnp.float32
        )

    def level(self, code: Array) -> Array:
        """Return the magnitude of a code, before scaling."""
        power = code + self.offset
        for _ in range(self.roots):
            power *= power
        return power - self.offset

    def at_most(self, magnitude: Array) -> Array:
        """Return the code whose level is the next below, or one off where they are equal."""
        root = magnitude + self.offset
        for _ in range(self.roots):
            root = jnp.sqrt(root)
        return jnp.floor(root) - self.offset


def _format(layout: Layout) -> _Format:
    roots, offset = _CURVES[layout.bits, layout.signed]
    # inf has the largest code; NaN has that of -0, or the one below inf.
    reserved = 1 if layout.signed else 2
    # Of 16 codes one or two are many, of 256 not worth another pass over the block.
    on_demand = layout.bits == 4
    return _Format(
        layout.bits - layout.signed, roots, offset, reserved, on_demand
    )


def is_codes(x: Any) -> bool:
    """Return whether x is an array in codes."""
    return isinstance(x, BlockCodes)


def block_axis(
    shape: tuple[int, ...], block: int, apart: tuple[int, ...] = ()
) -> int:
    """Choose the axis that blocks lie along, counted from the last.

    That is the one before the last where it has half a block at least: a TPU keeps the
    last axis in the lanes of its registers, so that blocks along it would be copied to
    be regrouped. Else it is the longest of the others.

    Args:
      shape: of the array.
      block: entries of a block.
      apart: axes of stacked layers, where neighbours have little in common.
    """
    rank = len(shape)
    candidates = [i - rank for i in range(rank - 1) if i not in apart]
    long = [i for i in candidates if 2 * shape[i] >= block]
    return -2 if -2 in long else max(long, key=lambda i: shape[i], default=-1)


def layout(
    x: Any,
    path: str,
    *,
    bits: int,
    signed: bool,
    axis: int,
    part: int = 0,
) -> Layout:
    """Return how to store an array of the state.

    Args:
      x: array or shape, real floating, rank 1 at least; float64 is stored in the range
        of float32.
      path: of the parameter that it belongs to.
      bits, signed, axis: of `Layout`. Without a sign, negative entries become NaN, and
        entries above zero stay above zero.
      part: number of the array among those of the parameter.
    """
    seed = zlib.crc32(f"{path}/{part}".encode())
    return Layout(bits, signed, axis, x.shape[axis], x.dtype, seed)


def encode(x: Array, layout: Layout, block: int) -> BlockCodes:
    """Encode an array, rounded to the nearest.

    Args:
      x: an array that the layout was made for.
      layout: how.
      block: entries that share a scale.
    """
    new = _encode(x, None, layout, math.ceil(layout.length / block))
    if isinstance(x, jax.core.Tracer):
        codes = _sharding.placed_like(new.codes, x)
        return BlockCodes(codes, new.scale, layout)
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return new
    place = NamedSharding(
        sharding.mesh,
        _scale_spec(
            sharding, x.ndim, layout.axis, new.scale.shape[layout.axis]
        ),
    )
    return BlockCodes(
        jax.device_put(new.codes, sharding),
        jax.device_put(new.scale, place),
        layout,
    )


def encode_like(x: Array, like: BlockCodes, at_step: Array) -> BlockCodes:
    """Encode an array in the form of another, rounded at random, and sharded like it.

    Args:
      x: an array of the shape that `like` was made of.
      like: codes.
      at_step: seed of the step, of `_random_bits.of_step`.
    """
    seed = _random_bits.of_number(at_step, like.layout.seed)
    count = like.scale.shape[like.layout.axis]
    new = _encode(x, seed, like.layout, count)
    # Else the compiler may reshard the scales.
    return _sharding.tree_placed_like(new, like)


def decode(x: BlockCodes) -> Array:
    """Return the array, in its dtype."""
    fn = functools.partial(_decoded, layout=_without_seed(x.layout))
    return _on_auto_axes(
        fn, lambda whole, _: whole, x.layout.axis, x.codes, x.scale
    )


def _encode(x: Array, seed: Any, layout: Layout, count: int) -> BlockCodes:
    fn = functools.partial(
        _codes_and_scale, layout=_without_seed(layout), count=count
    )
    codes, scale = _on_auto_axes(
        fn,
        lambda whole, scale: (whole, scale),
        layout.axis,
        x,
        seed,
        count=count,
    )
    return BlockCodes(codes, scale, layout)


def _without_seed(layout: Layout) -> Layout:
    """Return what decides the arithmetic, so that leaves of one shape share a trace."""
    return layout._replace(seed=0)


@functools.partial(jax.jit, static_argnames=("layout", "count"), inline=True)
def _codes_and_scale(
    x: Array, seed: Any, *, layout: Layout, count: int
) -> tuple[Array, Array]:
    form = _format(layout)
    size = math.ceil(layout.length / count)
    x = _split(x.astype(jnp.float32), layout.axis, count, size)
    a = jnp.abs(x)
    largest = jnp.max(
        jnp.where(a < jnp.inf, a, 0), axis=layout.axis, keepdims=True
    )
    number = a < jnp.inf if layout.signed else (x >= 0) & (a < jnp.inf)
    finite = form.on_demand and jnp.all(number, axis=layout.axis, keepdims=True)
    scale = _up_to_bfloat16(largest)
    wide = scale.astype(jnp.float32)
    near_one = _near_one(wide)
    last = form.largest(finite)
    top = form.level(last)
    y = a * near_one * (top / (jnp.where(wide > 0, wide, 1) * near_one))
    y = jnp.minimum(y, top)
    code = jnp.minimum(form.at_most(y), last - 1)
    low, high = form.level(code), form.level(code + 1)
    up = y - low > _chance(seed, x.shape) * (high - low)
    code = code.astype(jnp.int32) + up.astype(jnp.int32)
    infinite = 2**form.magnitude_bits - 1
    code = jnp.where(a == jnp.inf, infinite, code)
    if layout.signed:
        sign = 1 << form.magnitude_bits
        code = jnp.where((x < 0) & (code > 0), code | sign, code)
        code = jnp.where(jnp.isnan(x), sign, code)
    else:
        # A second moment that is rounded to zero would make a huge step.
        code = jnp.maximum(code, (a > 0).astype(jnp.int32))
        code = jnp.where(x >= 0, code, infinite - 1)
    if form.on_demand:
        scale = jnp.where(finite, scale, -scale)
    codes = _join(code, layout.axis)
    codes = jax.lax.slice_in_dim(
        codes, 0, layout.length, axis=layout.axis % codes.ndim
    )
    if layout.bits == 4:
        # Of the 4-bit integers, TensorStore writes only those with a sign.
        codes = ((codes ^ 8) - 8).astype(jnp.int4)
    else:
        codes = codes.astype(jnp.uint8)
    return codes, _join(scale, layout.axis)


@functools.partial(jax.jit, static_argnames=("layout",), inline=True)
def _decoded(codes: Array, scale: Array, *, layout: Layout) -> Array:
    form = _format(layout)
    count = scale.shape[layout.axis]
    size = math.ceil(layout.length / count)
    code = codes.astype(jnp.int32)
    if layout.bits == 4:
        code &= 15
    code = _split(code, layout.axis, count, size)
    infinite = 2**form.magnitude_bits - 1
    magnitude = code & infinite
    wide = _split(scale, layout.axis, count, 1).astype(jnp.float32)
    finite = form.on_demand and ~jnp.signbit(wide)
    wide = jnp.abs(wide)
    near_one = _near_one(wide)
    unit = wide * near_one / form.level(form.largest(finite))
    a = form.level(magnitude.astype(jnp.float32)) * unit * (1 / near_one)
    if jnp.finfo(layout.dtype).bits == 16:
        a = jnp.minimum(a, float(jnp.finfo(layout.dtype).max))
    special = jnp.logical_not(finite)
    a = jnp.where(special & (magnitude == infinite), jnp.inf, a)
    if layout.signed:
        sign = 1 << form.magnitude_bits
        a = jnp.where(code >= sign, -a, a)
        nan = code == sign
    else:
        nan = special & (magnitude == infinite - 1)
    x = _join(jnp.where(nan, jnp.nan, a).astype(layout.dtype), layout.axis)
    return jax.lax.slice_in_dim(x, 0, layout.length, axis=layout.axis % x.ndim)


def _near_one(scale: Array) -> Array:
    """Return the power of two that brings scales towards 1.

    The reciprocal of the largest float32 is subnormal, which is zero to XLA, and so is
    the smallest divided by `top`.
    """
    return jnp.where(scale > 1, 2.0**-64, 2.0**64)


def _up_to_bfloat16(x: Array) -> Array:
    """Round up, so that no entry exceeds its scale; not beyond the largest bfloat16."""
    bits = _bits(x, jnp.uint32) + jnp.uint32(0xFFFF)
    bits = jnp.minimum(bits >> 16, jnp.uint32(0x7F7F))
    return _bits(bits.astype(jnp.uint16), jnp.bfloat16)


def _chance(seed: Any, shape: tuple[int, ...]) -> Array | float:
    """Return the share of the way up from which is rounded up: random, or half."""
    if seed is None:
        return 0.5
    steps = (_random_bits.quick_words(seed, shape) >> 16).astype(jnp.float32)
    # In the middle of their 2^16 intervals, so that no bias of half a step is left.
    return (steps + 0.5) * 2.0**-16


def _bits(x: Array, dtype: Any) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype)


# An axis of blocks becomes two: [..., count, size, ...].


def _split(x: Array, axis: int, count: int, size: int) -> Array:
    at = axis % x.ndim
    missing = count * size - x.shape[at]
    if missing:
        widths = [(0, missing if i == at else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths)
    shape = (*x.shape[:at], count, size, *x.shape[at + 1 :])
    return x.reshape(shape)


def _join(x: Array, axis: int) -> Array:
    at = axis % x.ndim
    count, size = x.shape[at - 1 : at + 1]
    return x.reshape(*x.shape[: at - 1], count * size, *x.shape[at + 1 :])


# Placement on a mesh.


def _on_auto_axes(
    fn: Callable[..., Any],
    out: Callable[..., Any],
    axis: int,
    x: Array,
    *rest: Any,
    count: int | None = None,
) -> Any:
    """Run fn(x, *rest), which reshapes x into blocks, on any kind of mesh.

    A reshape on Explicit axes needs the sharding of its result, so fn runs with Auto
    axes, and out(sharding of x, sharding of its scales) gives that of the results.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return fn(x, *rest)
    scale = NamedSharding(
        sharding.mesh, _scale_spec(sharding, x.ndim, axis, count)
    )
    return jax.sharding.auto_axes(fn, out_sharding=out(sharding, scale))(
        x, *rest
    )


def _scale_spec(
    sharding: NamedSharding, rank: int, axis: int, count: int | None
) -> PartitionSpec:
    """Return where the scales lie: as the array, if every shard holds whole blocks."""
    spec = [*sharding.spec, *(None,) * (rank - len(sharding.spec))]
    if count is not None and count % _sharding.num_shards(
        sharding.mesh, spec[axis]
    ):
        spec[axis] = None
    return PartitionSpec(*spec)
