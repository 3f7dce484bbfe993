"""Multiply in 8 bits: a bilinear primitive that rounds its operands, and so do its derivatives.

A scale is a power of two, so it changes no digit of a floating operand: it moves the
largest finite magnitude just below the largest of the format. Hence it is no matter for
the result how many entries share a scale, but for those that underflow. What is
infinite or NaN becomes NaN or infinite in the format and reaches the result.

The derivative is that of the exact product, with its operands rounded likewise
(straight-through): cotangents in the format of `GRADIENT`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxtricks import _jaxpr, _tree
from jaxtricks._typing import Array

Scaling = Literal["tensor", "row", "block32"]
SCALINGS: tuple[str, ...] = ("tensor", "row", "block32")
BLOCK = 32
E4M3, E5M2, INT8 = "float8_e4m3fn", "float8_e5m2", "int8"
FORMATS = (E4M3, INT8)
"""Formats of the operands of a forward product."""
GRADIENT = {E4M3: E5M2, E5M2: E5M2, INT8: None, None: None}
"""Format of an operand -> that of its tangents and of cotangents beside it."""


# JAX keeps weak references to parameters, which a named tuple has none of.
@dataclasses.dataclass(frozen=True)
class Product:
    """A bilinear operation and its parameters, hashable.

    Attributes:
      primitive: dot_general or conv_general_dilated.
      params: its parameters, sorted.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, eqn: Any) -> "Product":
        """Return the product that an equation computes."""
        params = {**eqn.params, "preferred_element_type": None}
        return cls(eqn.primitive, tuple(sorted(params.items())))

    def __call__(self, a: Array, b: Array, dtype: Any = None) -> Array:
        params = {**dict(self.params), "preferred_element_type": dtype}
        return self.primitive.bind(a, b, **params)

    @property
    def is_dot(self) -> bool:
        """Whether it is a product of matrices."""
        return self.primitive.name == "dot_general"


@dataclasses.dataclass(frozen=True)
class Side:
    """How an operand is rounded.

    Attributes:
      format: name of a dtype; None: not at all.
      scaling: what shares a scale.
      apart: axes along which every index has a scale of its own, because of vmap.
    """

    format: str | None
    scaling: str
    apart: tuple[int, ...] = ()


@_tree.node
class Rounded:
    """An operand in 8 bits, as the forward and the backward pass read it.

    Attributes:
      values: the operand divided by the step, in the format.
      step: float32, of size 1 along the axes that one scale spans.
    """

    values: Array
    step: Array


def scale_axes(eqn: Any, which: int, side: Side) -> tuple[int, ...]:
    """Return the axes of an operand of an equation that one scale spans."""
    ndim = eqn.invars[which].aval.ndim
    return _scale_axes(Product.of(eqn), side, which, ndim)


def round_operand(
    eqn: Any, x: Array, which: int, side: Side
) -> Rounded | None:
    """Round an operand once for all the products that read it, if they can share that.

    Args:
      eqn: dot_general or conv_general_dilated.
      x: its operand number `which`.
      side: how.
    """
    # The steps of "row" lie along an axis that other products sum, and cotangents have
    # their own format.
    if side.scaling != "tensor" or side.format not in FORMATS:
        return None
    axes = _scale_axes(Product.of(eqn), side, which, x.ndim)
    values, step = round_to_8_bits(
        lax.stop_gradient(x), format=side.format, axes=axes
    )
    # Else XLA rounds again in the backward pass, from wide values saved for that.
    return Rounded(*lax.optimization_barrier((values, step)))


def multiply(
    eqn: Any,
    operands: Sequence[Array],
    sides: Sequence[Side],
    rounded: Sequence[Rounded | None],
) -> Array:
    """Return the product that an equation computes, of operands in 8 bits.

    Args:
      eqn: dot_general or conv_general_dilated.
      operands: of one floating dtype, which is that of the result.
      sides: how they are rounded.
      rounded: these operands rounded, where that is done.
    """
    return _bind(Product.of(eqn), operands, sides, rounded)


def _bind(
    product: Product,
    operands: Sequence[Any],
    sides: Sequence[Side],
    rounded: Sequence[Rounded | None],
) -> Any:
    ready = tuple(x is not None for x in rounded)
    extra = [part for x in rounded if x is not None for part in (x.values, x.step)]
    return product8_p.bind(
        *operands,
        *extra,
        product=product,
        lhs=sides[0],
        rhs=sides[1],
        ready=ready,
    )


def _unpacked(
    args: Sequence[Any], ready: tuple[bool, bool]
) -> tuple[Sequence[Any], list[Rounded | None]]:
    """Return the operands of an equation, and these rounded."""
    extra = iter(args[2:])
    rounded = [Rounded(next(extra), next(extra)) if r else None for r in ready]
    return args[:2], rounded


def operand_formats(
    product: Product, lhs: Side, rhs: Side
) -> tuple[str, str] | None:
    """Return the dtypes that are multiplied; None: the rounded operands are wide again.

    A convolution takes operands of one dtype, and a scale for each block of the axis
    that is summed cannot be taken out of the sum.
    """
    a, b = lhs.format, rhs.format
    if a is None or b is None or "block32" in (lhs.scaling, rhs.scaling):
        return None
    if (a == INT8) != (b == INT8):
        return None
    if product.is_dot or a == b:
        return a, b
    return E4M3, E4M3


def _multiply(
    *args: Array,
    product: Product,
    lhs: Side,
    rhs: Side,
    ready: tuple[bool, bool],
) -> Array:
    operands, rounded = _unpacked(args, ready)
    dtype = operands[0].dtype
    dtypes = operand_formats(product, lhs, rhs)
    if dtypes is None:
        values = [
            _again_wide(x, product, side, i, done)
            for i, (x, side, done) in enumerate(
                zip(operands, (lhs, rhs), rounded, strict=True)
            )
        ]
        return product(*values, jnp.float32).astype(dtype)
    for i, side in enumerate((lhs, rhs)):
        if rounded[i] is None:
            axes = _scale_axes(product, side, i, operands[i].ndim)
            rounded[i] = Rounded(
                *round_to_8_bits(operands[i], format=dtypes[i], axes=axes)
            )
    x, y = rounded
    sums = jnp.int32 if lhs.format == INT8 else jnp.float32
    out = product(x.values, y.values, sums).astype(jnp.float32)
    steps = _spread(x.step, product, 0, out.ndim), _spread(y.step, product, 1, out.ndim)
    # The smaller one first, or the sum may overflow where the result does not.
    out = out * jnp.minimum(*steps) * jnp.maximum(*steps)
    return out.astype(dtype)


# A call of this name: traced once per shape, and its casts are no casts of autocast.
@functools.partial(jax.jit, static_argnames=("format", "axes"))
def round_to_8_bits(
    x: Array, *, format: str, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """Return x / step in the format, and step, float32 with size 1 along the axes."""
    x = x.astype(jnp.float32)
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    largest = jnp.max(magnitude, axis=axes, keepdims=True, initial=0)
    if format == INT8:
        step = jnp.where(largest > 0, largest, 127) / 127
        # An integer cannot say NaN: then the step does.
        infinite = ~jnp.all(jnp.isfinite(x), axis=axes, keepdims=True)
        rounded = jnp.round(jnp.clip(x / step, -127, 127))
        return (
            jnp.nan_to_num(rounded).astype(jnp.int8),
            jnp.where(infinite, jnp.nan, step),
        )
    exponent = _exponent_of_scale(largest, float(jnp.finfo(format).max))
    return (x * _power_of_two(exponent)).astype(format), _power_of_two(-exponent)


def _exponent_of_scale(largest: Array, limit: float) -> Array:
    """Return the largest k with largest * 2^k <= limit, within float32's exponents."""
    mantissa, exponent = math.frexp(limit)
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    # frexp has mantissas from 1/2 to 1, the bits of float32 from 1 to 2.
    k = exponent - 1 - ((bits >> 23) - 127)
    above = int(np.float32(2 * mantissa).view(np.int32)) & 0x7FFFFF
    k = k - ((bits & 0x7FFFFF) > above).astype(jnp.int32)
    return jnp.clip(k, -126, 126)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _again_wide(
    x: Array, product: Product, side: Side, which: int, done: Rounded | None
) -> Array:
    """Return an operand rounded as `side` says, in its own dtype."""
    if side.format is None:
        return x
    if side.scaling != "block32":
        if done is None:
            axes = _scale_axes(product, side, which, x.ndim)
            done = Rounded(*round_to_8_bits(x, format=side.format, axes=axes))
        return (done.values.astype(jnp.float32) * done.step).astype(x.dtype)
    axis = _summed_axes(product, which)[-1]
    length = x.shape[axis]
    missing = -length % BLOCK
    padded = jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)])
    shape = padded.shape
    blocks = padded.reshape(*shape[:axis], -1, BLOCK, *shape[axis + 1 :])
    rounded, step = round_to_8_bits(
        blocks, format=side.format, axes=(axis + 1,)
    )
    wide = (rounded.astype(jnp.float32) * step).astype(x.dtype).reshape(shape)
    return lax.slice_in_dim(wide, 0, length, axis=axis)


def _summed_axes(product: Product, which: int) -> tuple[int, ...]:
    """Return the axes of an operand that the product sums, in part or whole."""
    numbers = dict(product.params)["dimension_numbers"]
    if product.is_dot:
        return tuple(numbers[0][which])
    spec = numbers.rhs_spec if which else numbers.lhs_spec
    # Of the kernel: all but the output features; of the input: all but the batch.
    return (*spec[2:], spec[1])


def _kept_axes(product: Product, which: int) -> tuple[int, ...]:
    """Return the axes that an operand shares with the result alone."""
    numbers = dict(product.params)["dimension_numbers"]
    if product.is_dot:
        return tuple(numbers[1][which])
    return ()


def _scale_axes(
    product: Product, side: Side, which: int, ndim: int
) -> tuple[int, ...]:
    """Return the axes that one scale spans."""
    if side.scaling == "row":
        return tuple(sorted(_summed_axes(product, which)))
    apart = {*_kept_axes(product, which), *side.apart}
    return tuple(i for i in range(ndim) if i not in apart)


def _spread(step: Array, product: Product, which: int, ndim: int) -> Array:
    """Return the steps of an operand's entries where the result has them."""
    if step.size == 1:
        return step.reshape(())
    numbers = dict(product.params)["dimension_numbers"]
    if product.is_dot:
        contracting, batch = (pair[which] for pair in numbers)
        free = [i for i in range(step.ndim) if i not in (*contracting, *batch)]
        axes = [*batch, *free]
        first = len(batch)
        at = ndim - len(free) if which else first
        places = [*range(first), *range(at, at + len(free))]
    else:
        spec = numbers.rhs_spec if which else numbers.lhs_spec
        axes, places = [spec[0]], [numbers.out_spec[1 if which else 0]]
    by_place = {place: step.shape[i] for i, place in zip(axes, places, strict=True)}
    shape = [by_place.get(i, 1) for i in range(ndim)]
    order = [i for _, i in sorted(zip(places, axes, strict=True))]
    others = [i for i in range(step.ndim) if i not in axes]
    return lax.transpose(step, (*others, *order)).reshape(shape)


# The primitive. Its operands are those of the product, then the rounded ones that are
# ready. An operand that is ready is only read for its derivative, so that compiled
# programs save what is rounded.

product8_p = Primitive("product8")
_jitted = jax.jit(_multiply, static_argnames=("product", "lhs", "rhs", "ready"))


@product8_p.def_impl
def _impl(*args: Array, **params: Any) -> Array:
    return _jitted(*args, **params)


@product8_p.def_abstract_eval
def _abstract_eval(a: Any, b: Any, *_: Any, product: Product, **__: Any) -> Any:
    params = {**dict(product.params), "preferred_element_type": None}
    aval, _ = product.primitive.abstract_eval(a, b, **params)
    return aval


mlir.register_lowering(
    product8_p, mlir.lower_fun(_multiply, multiple_results=False)
)


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    product: Product,
    lhs: Side,
    rhs: Side,
    ready: tuple[bool, bool],
) -> tuple[Any, Any]:
    operands, rounded = _unpacked(primals, ready)
    out = _bind(product, operands, (lhs, rhs), rounded)
    rates = []
    for i in range(2):
        if isinstance(tangents[i], ad.Zero):
            continue
        inputs, sides, done = list(operands), [lhs, rhs], list(rounded)
        inputs[i], sides[i], done[i] = tangents[i], _of_gradient(sides[i]), None
        rates.append(_bind(product, inputs, sides, done))
    if not rates:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, functools.reduce(ad.add_jaxvals, rates)


def _of_gradient(side: Side) -> Side:
    return dataclasses.replace(side, format=GRADIENT[side.format])


def _transpose(
    cotangent: Any,
    *args: Any,
    product: Product,
    lhs: Side,
    rhs: Side,
    ready: tuple[bool, bool],
) -> list[Any]:
    nothing = [None] * len(args)
    if isinstance(cotangent, ad.Zero):
        return nothing
    operands, rounded = _unpacked(args, ready)
    sides = lhs, rhs
    linear = 0 if ad.is_undefined_primal(operands[0]) else 1
    fixed = 1 - linear
    aval = operands[linear].aval
    rule = ad.get_primitive_transpose(product.primitive)
    params = {**dict(product.params), "preferred_element_type": None}

    def plain(cotangent: Any, factor: Any) -> Any:
        inputs = [factor, factor]
        inputs[linear] = ad.UndefinedPrimal(aval)
        return rule(cotangent, *inputs, **params)[linear]

    given = dataclasses.replace(sides[fixed], apart=())
    nothing[linear] = _in_8_bits(
        plain,
        (cotangent, operands[fixed]),
        (_of_gradient(given), given),
        (None, rounded[fixed]),
    )
    return nothing


def _batch(
    args: Sequence[Any],
    axes: Sequence[Any],
    *,
    product: Product,
    lhs: Side,
    rhs: Side,
    ready: tuple[bool, bool],
) -> tuple[Any, int]:
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    ]
    operands, rounded = _unpacked(moved, ready)
    is_mapped = [axis is not None for axis in axes[:2]]
    sides = [
        dataclasses.replace(side, apart=(0, *(i + 1 for i in side.apart)))
        if mapped
        else side
        for side, mapped in zip((lhs, rhs), is_mapped, strict=True)
    ]
    in_axes = tuple(0 if mapped else None for mapped in is_mapped)
    plain = jax.vmap(lambda a, b: product(a, b), in_axes)
    return _in_8_bits(plain, operands, sides, rounded), 0


def _in_8_bits(
    fn: Callable[..., Any],
    args: Sequence[Any],
    sides: Sequence[Side],
    rounded: Sequence[Rounded | None],
) -> Any:
    """Run fn, one product and movements of data, with the product in 8 bits.

    Args:
      fn: of two arrays.
      args: the arrays.
      sides: how each is rounded.
      rounded: each rounded, where that is done.
    """
    closed = jax.make_jaxpr(fn)(*map(jax.typeof, args))
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    sources = dict(zip(jaxpr.invars, sides, strict=True))
    ready = dict(zip(jaxpr.invars, rounded, strict=True))
    for eqn in jaxpr.eqns:
        operands = [
            v.val if _jaxpr.is_literal(v) else values[v] for v in eqn.invars
        ]
        variables = [v for v in eqn.invars if not _jaxpr.is_literal(v)]
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            new_sides = [
                sources[v]
                if v in jaxpr.invars
                else _after_moves(eqn, sources[v], i)
                for i, v in enumerate(variables)
            ]
            done = [ready.get(v) for v in variables]
            results = [_bind(Product.of(eqn), operands, new_sides, done)]
        else:
            results = _jaxpr.bind(eqn, operands)
            for v in variables:
                if v in sources:
                    sources |= dict.fromkeys(eqn.outvars, sources[v])
                    ready |= dict.fromkeys(eqn.outvars, _moved(eqn, ready[v]))
        values.update(zip(eqn.outvars, results, strict=True))
    (out,) = jaxpr.outvars
    return values[out]


def _moved(eqn: Any, rounded: Rounded | None) -> Rounded | None:
    """Return a rounded operand moved like the operand."""
    # Steps of several entries would have to be moved otherwise.
    if rounded is None or rounded.step.size > 1:
        return None
    (out,) = eqn.outvars
    if len(eqn.invars) > 1:
        return None
    # The equation names no dtype: it only moves data.
    (values,) = _jaxpr.bind(eqn, [rounded.values])
    return Rounded(values, rounded.step.reshape((1,) * out.aval.ndim))


def _after_moves(eqn: Any, side: Side, which: int) -> Side:
    """Return how an operand is rounded whose axes vmap moved or merged."""
    if eqn.primitive.name != "conv_general_dilated" or not side.apart:
        return dataclasses.replace(side, apart=())
    numbers = eqn.params["dimension_numbers"]
    # The mapped axis went into the batch of the input or into the kernel's features,
    # which the result has as well; or into the groups, whose scale is one.
    grouped = eqn.params["feature_group_count"] > 1
    axis = (numbers.rhs_spec if which else numbers.lhs_spec)[0]
    return dataclasses.replace(
        side, apart=() if grouped and not which else (axis,)
    )


ad.primitive_jvps[product8_p] = _jvp
ad.primitive_transposes[product8_p] = _transpose
batching.primitive_batchers[product8_p] = _batch
