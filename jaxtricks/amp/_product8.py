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

from jaxtricks import _jaxpr
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


def multiply(eqn: Any, a: Array, b: Array, lhs: Side, rhs: Side) -> Array:
    """Return the product that an equation computes, of operands in 8 bits.

    Args:
      eqn: dot_general or conv_general_dilated.
      a, b: operands of one floating dtype, which is that of the result.
      lhs, rhs: how they are rounded.
    """
    return product8_p.bind(a, b, product=Product.of(eqn), lhs=lhs, rhs=rhs)


def is_product8(eqn: Any) -> bool:
    """Return whether an equation is a product in 8 bits."""
    return eqn.primitive is product8_p


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
    a: Array, b: Array, *, product: Product, lhs: Side, rhs: Side
) -> Array:
    dtypes = operand_formats(product, lhs, rhs)
    if dtypes is None:
        values = _again_wide(a, product, lhs, 0), _again_wide(b, product, rhs, 1)
        return product(*values, jnp.float32).astype(a.dtype)
    lhs, rhs = dataclasses.replace(lhs, format=dtypes[0]), dataclasses.replace(rhs, format=dtypes[1])
    x, x_step = _rounded(a, lhs.format, _scale_axes(product, lhs, 0, a.ndim))
    y, y_step = _rounded(b, rhs.format, _scale_axes(product, rhs, 1, b.ndim))
    sums = jnp.int32 if lhs.format == INT8 else jnp.float32
    out = product(x, y, sums).astype(jnp.float32)
    # One after the other: their product may be out of range.
    out = out * _spread(x_step, product, 0, out.ndim)
    out = out * _spread(y_step, product, 1, out.ndim)
    return out.astype(a.dtype)


def _rounded(
    x: Array, format: str, axes: tuple[int, ...]
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


def _again_wide(x: Array, product: Product, side: Side, which: int) -> Array:
    """Return an operand rounded as `side` says, in its own dtype."""
    if side.format is None:
        return x
    if side.scaling != "block32":
        axes = _scale_axes(product, side, which, x.ndim)
        rounded, step = _rounded(x, side.format, axes)
        return (rounded.astype(jnp.float32) * step).astype(x.dtype)
    axis = _summed_axes(product, which)[-1]
    length = x.shape[axis]
    missing = -length % BLOCK
    padded = jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)])
    shape = padded.shape
    blocks = padded.reshape(*shape[:axis], -1, BLOCK, *shape[axis + 1 :])
    rounded, step = _rounded(blocks, side.format, (axis + 1,))
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


# The primitive.

product8_p = Primitive("product8")
_jitted = jax.jit(_multiply, static_argnames=("product", "lhs", "rhs"))


@product8_p.def_impl
def _impl(a: Array, b: Array, **params: Any) -> Array:
    return _jitted(a, b, **params)


@product8_p.def_abstract_eval
def _abstract_eval(a: Any, b: Any, *, product: Product, **_: Any) -> Any:
    params = {**dict(product.params), "preferred_element_type": None}
    aval, _ = product.primitive.abstract_eval(a, b, **params)
    return aval


mlir.register_lowering(product8_p, mlir.lower_fun(_multiply, multiple_results=False))


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    product: Product,
    lhs: Side,
    rhs: Side,
) -> tuple[Any, Any]:
    bind = functools.partial(product8_p.bind, product=product)
    (a, b), (da, db) = primals, tangents
    out = bind(a, b, lhs=lhs, rhs=rhs)
    rates = []
    if not isinstance(da, ad.Zero):
        rates.append(bind(da, b, lhs=_of_gradient(lhs), rhs=rhs))
    if not isinstance(db, ad.Zero):
        rates.append(bind(a, db, lhs=lhs, rhs=_of_gradient(rhs)))
    if not rates:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, functools.reduce(ad.add_jaxvals, rates)


def _of_gradient(side: Side) -> Side:
    return dataclasses.replace(side, format=GRADIENT[side.format])


def _transpose(
    cotangent: Any, a: Any, b: Any, *, product: Product, lhs: Side, rhs: Side
) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [None, None]
    of_first = ad.is_undefined_primal(a)
    linear, fixed, side = (a, b, rhs) if of_first else (b, a, lhs)
    rule = ad.get_primitive_transpose(product.primitive)
    params = {**dict(product.params), "preferred_element_type": None}

    def plain(cotangent: Any, fixed: Any) -> Any:
        hole = ad.UndefinedPrimal(linear.aval)
        operands = (hole, fixed) if of_first else (fixed, hole)
        return rule(cotangent, *operands, **params)[0 if of_first else 1]

    fresh = dataclasses.replace(_of_gradient(lhs if of_first else rhs), apart=())
    fixed_side = dataclasses.replace(side, apart=())
    # Of the format of the gradient where the other operand was in 8 bits.
    fresh = dataclasses.replace(fresh, format=GRADIENT[side.format])
    out = _in_8_bits(plain, (cotangent, fixed), (fresh, fixed_side))
    return [out, None] if of_first else [None, out]


def _batch(
    operands: Sequence[Any],
    axes: Sequence[Any],
    *,
    product: Product,
    lhs: Side,
    rhs: Side,
) -> tuple[Any, int]:
    moved, in_axes, sides = [], [], []
    for x, axis, side in zip(operands, axes, (lhs, rhs), strict=True):
        if axis is None:
            moved.append(x)
            in_axes.append(None)
            sides.append(side)
        else:
            moved.append(jnp.moveaxis(x, axis, 0))
            in_axes.append(0)
            apart = (0, *(i + 1 for i in side.apart))
            sides.append(dataclasses.replace(side, apart=apart))
    plain = jax.vmap(lambda a, b: product(a, b), tuple(in_axes))
    return _in_8_bits(plain, moved, sides), 0


def _in_8_bits(
    fn: Callable[..., Any], args: Sequence[Any], sides: Sequence[Side]
) -> Any:
    """Run fn, one product and movements of data, with the product in 8 bits.

    Args:
      fn: of two arrays.
      args: the arrays.
      sides: how each is rounded.
    """
    closed = jax.make_jaxpr(fn)(*map(jax.typeof, args))
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    sources = dict(zip(jaxpr.invars, sides, strict=True))
    for eqn in jaxpr.eqns:
        operands = [
            v.val if _jaxpr.is_literal(v) else values[v] for v in eqn.invars
        ]
        found = [
            sources.get(v) for v in eqn.invars if not _jaxpr.is_literal(v)
        ]
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            both = [
                side if v in jaxpr.invars else _after_moves(eqn, side, i)
                for i, (v, side) in enumerate(zip(eqn.invars, found, strict=True))
            ]
            results = [multiply(eqn, *operands, *both)]
        else:
            results = _jaxpr.bind(eqn, operands)
            side = next(filter(None, found), None)
            sources |= {v: side for v in eqn.outvars if side is not None}
        values.update(zip(eqn.outvars, results, strict=True))
    (out,) = jaxpr.outvars
    return values[out]


def _after_moves(eqn: Any, side: Side, which: int) -> Side:
    """Return how an operand is rounded whose axes vmap moved or merged."""
    if eqn.primitive.name != "conv_general_dilated" or not side.apart:
        return dataclasses.replace(side, apart=())
    numbers = eqn.params["dimension_numbers"]
    # The mapped axis went into the batch of the input or into the kernel's features,
    # which the result has as well; or into the groups, whose scale is one.
    grouped = eqn.params["feature_group_count"] > 1
    axis = (numbers.rhs_spec if which else numbers.lhs_spec)[0]
    return dataclasses.replace(side, apart=() if grouped and not which else (axis,))


ad.primitive_jvps[product8_p] = _jvp
ad.primitive_transposes[product8_p] = _transpose
batching.primitive_batchers[product8_p] = _batch
