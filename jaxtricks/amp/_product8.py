"""Multiply in 8 bits: a bilinear primitive that rounds its operands.

Its derivative is that of the exact product, with its operands rounded likewise
(straight-through): cotangents in the format that `_rounding8.GRADIENT` says.

An operand may come rounded already, as it is saved for the backward pass. Then the
operand itself is only there for derivatives of higher order; a compiled program that
has none does not read it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtricks import _compat, _jaxpr
from jaxtricks._typing import Array
from jaxtricks.amp._precision_table import ROUNDED
from jaxtricks.amp._rounding8 import (
    E4M3,
    FORMATS,
    INT8,
    Product,
    Rounded,
    Side,
    rounded,
    rounded_in_blocks,
)


def multiply(
    product: Product,
    operands: Sequence[Any],
    sides: Sequence[Side],
    ready: Sequence[Rounded | None],
) -> Any:
    """Return a product of operands in 8 bits.

    Args:
      product: of two operands of one floating dtype, which is that of the result.
      operands: these two.
      sides: how they are rounded.
      ready: these rounded, where that is done.
    """
    saved = [(x.values, x.step) for x in ready if x is not None]
    return product8_p.bind(
        *operands,
        *sum(saved, ()),
        product=product,
        sides=tuple(sides),
        ready=tuple(x is not None for x in ready),
    )


def round_once(
    product: Product, x: Array, which: int, side: Side
) -> Rounded | None:
    """Round an operand for all the products that read it; None if they cannot share it.

    Args:
      product: one of them.
      x: its operand number `which`.
      side: how.
    """
    # The steps of "row" lie along an axis that the gradient sums, and cotangents have
    # their own format.
    if side.scaling != "tensor" or side.format not in FORMATS:
        return None
    axes = side.scale_axes(product, which, x.ndim)
    narrow = rounded(lax.stop_gradient(x), side.format, axes)
    # Else XLA saves wide values and rounds them again in the backward pass.
    return lax.optimization_barrier(narrow)


def policy_of_products(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Let a policy of jax.checkpoint say of products in 8 bits what it says of others."""

    def saveable(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is not product8_p:
            return policy(primitive, *avals, **params)
        product = params["product"]
        return policy(product.primitive, *avals[:2], **dict(product.params))

    return saveable


def multiplied_formats(
    product: Product, sides: Sequence[Side]
) -> tuple[str, str] | None:
    """Return the dtypes that are multiplied; None: the rounded operands are wide again.

    A convolution takes operands of one dtype, and a scale for each block of the axis
    that is summed cannot be taken out of the sum.
    """
    a, b = (side.format for side in sides)
    if a is None or b is None or any(s.scaling == "block32" for s in sides):
        return None
    if (a == INT8) != (b == INT8):
        return None
    return (a, b) if product.is_dot or a == b else (E4M3, E4M3)


def _multiply(
    *args: Array,
    product: Product,
    sides: tuple[Side, Side],
    ready: tuple[bool, bool],
) -> Array:
    operands, saved = _unpacked(args, ready)
    dtype = operands[0].dtype
    formats = multiplied_formats(product, sides)
    if formats is None:
        a, b = (
            _wide(product, i, operands[i], sides[i], saved[i]) for i in range(2)
        )
        return product(a, b, jnp.float32).astype(dtype)
    x, y = (
        saved[i]
        or rounded(
            operands[i],
            formats[i],
            sides[i].scale_axes(product, i, operands[i].ndim),
        )
        for i in range(2)
    )
    sums = jnp.int32 if formats[0] == INT8 else jnp.float32
    out = product(x.values, y.values, sums).astype(jnp.float32)
    steps = (
        product.spread(x.step, 0, out.ndim),
        product.spread(y.step, 1, out.ndim),
    )
    # The smaller one first: else the sum may overflow where the result does not.
    out = out * jnp.minimum(*steps) * jnp.maximum(*steps)
    return out.astype(dtype)


def _wide(
    product: Product, which: int, x: Array, side: Side, saved: Rounded | None
) -> Array:
    """Return an operand rounded as `side` says, in its own dtype."""
    if side.format is None:
        return x
    if side.scaling == "block32":
        axis = product.summed_axes(which)[-1]
        return rounded_in_blocks(x, side.format, axis)
    axes = side.scale_axes(product, which, x.ndim)
    return (saved or rounded(x, side.format, axes)).wide(x.dtype)


def _unpacked(
    args: Sequence[Any], ready: tuple[bool, bool]
) -> tuple[Sequence[Any], list[Rounded | None]]:
    """Return the operands of an equation, and these rounded."""
    rest = iter(args[2:])
    saved = [Rounded(next(rest), next(rest)) if r else None for r in ready]
    return args[:2], saved


# The rules of the primitive.


def _type_of(a: Any, b: Any, *_: Any, product: Product, **__: Any) -> Any:
    aval, _ = product.primitive.abstract_eval(a, b, **dict(product.params))
    return aval


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    product: Product,
    sides: tuple[Side, Side],
    ready: tuple[bool, bool],
) -> tuple[Any, Any]:
    operands, saved = _unpacked(primals, ready)
    out = multiply(product, operands, sides, saved)
    rates = []
    for i in range(2):
        if _compat.is_zero(tangents[i]):
            continue
        new_operands, new_sides, new_saved = (
            list(operands),
            list(sides),
            list(saved),
        )
        new_operands[i] = tangents[i]
        new_sides[i] = sides[i].of_gradient()
        new_saved[i] = None
        rates.append(multiply(product, new_operands, new_sides, new_saved))
    if not rates:
        return out, _compat.zero_tangent(out)
    return out, functools.reduce(lax.add, rates)


def _transpose(
    cotangent: Any,
    *args: Any,
    product: Product,
    sides: tuple[Side, Side],
    ready: tuple[bool, bool],
) -> list[Any]:
    gradients: list[Any] = [None] * len(args)
    if _compat.is_zero(cotangent):
        return gradients
    operands, saved = _unpacked(args, ready)
    linear = 0 if _compat.is_linear(operands[0]) else 1
    fixed = 1 - linear

    def plain(cotangent: Any, factor: Any) -> Any:
        inputs = list(operands)
        inputs[fixed] = factor
        return _compat.transposed(
            product.primitive, dict(product.params), cotangent, inputs, linear
        )

    side = dataclasses.replace(sides[fixed], apart=())
    gradients[linear] = _in_8_bits(
        plain,
        (cotangent, operands[fixed]),
        (side.of_gradient(), side),
        (None, saved[fixed]),
    )
    return gradients


def _batch(
    args: Sequence[Any],
    axes: Sequence[Any],
    *,
    product: Product,
    sides: tuple[Side, Side],
    ready: tuple[bool, bool],
) -> tuple[Any, int]:
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    ]
    operands, saved = _unpacked(moved, ready)
    new_sides = [
        side
        if axis is None
        else dataclasses.replace(side, apart=(0, *(i + 1 for i in side.apart)))
        for side, axis in zip(sides, axes[:2], strict=True)
    ]
    in_axes = tuple(None if axis is None else 0 for axis in axes[:2])
    plain = jax.vmap(lambda a, b: product(a, b), in_axes)
    return _in_8_bits(plain, operands, new_sides, saved), 0


def _in_8_bits(
    fn: Callable[..., Any],
    args: Sequence[Any],
    sides: Sequence[Side],
    saved: Sequence[Rounded | None],
) -> Any:
    """Run fn, one product and movements of data, with the product in 8 bits.

    Args:
      fn: of two arrays.
      args: the arrays.
      sides: how each is rounded.
      saved: each rounded, where that is done.
    """
    closed = jax.make_jaxpr(fn)(*map(jax.typeof, args))
    jaxpr = closed.jaxpr
    variables = (*jaxpr.constvars, *jaxpr.invars)
    values = dict(zip(variables, (*closed.consts, *args), strict=True))
    side_of = dict(zip(jaxpr.invars, sides, strict=True))
    saved_of = dict(zip(jaxpr.invars, saved, strict=True))
    for eqn in jaxpr.eqns:
        operands = _jaxpr.read_values(eqn.invars, values)
        variables = [v for v in _jaxpr.variables_of(eqn.invars) if v in side_of]
        if _jaxpr.primitive(eqn) in ROUNDED:
            new_sides = [
                side_of[v]
                if v in jaxpr.invars
                else _merged(Product.of(eqn), side_of[v], i)
                for i, v in enumerate(variables)
            ]
            done = [saved_of[v] for v in variables]
            results = [multiply(Product.of(eqn), operands, new_sides, done)]
        else:
            results = _jaxpr.bind(eqn, operands)
            for v in variables:
                moved = _moved(eqn, saved_of[v])
                side_of |= dict.fromkeys(eqn.outvars, side_of[v])
                saved_of |= dict.fromkeys(eqn.outvars, moved)
        values.update(zip(eqn.outvars, results, strict=True))
    (out,) = _jaxpr.read_values(jaxpr.outvars, values)
    return out


def _moved(eqn: Any, saved: Rounded | None) -> Rounded | None:
    """Return a rounded operand, moved as an equation moves the operand."""
    # Steps of several entries would have to be moved in another way.
    if saved is None or saved.step.size > 1 or len(eqn.invars) > 1:
        return None
    (values,) = _jaxpr.bind(eqn, [saved.values])
    return Rounded(values, saved.step.reshape((1,) * values.ndim))


def _merged(product: Product, side: Side, which: int) -> Side:
    """Return how an operand is rounded whose mapped axis vmap merged with another."""
    apart: tuple[int, ...] = ()
    # It went into the batch of the input or the features of the kernel, which the
    # result has as well. Or, if both were mapped, into the groups of the input, which
    # share a scale.
    shares = product.is_dot or (product.is_grouped and not which)
    if side.apart and not shares:
        apart = (product.kept_axis(which),)
    return dataclasses.replace(side, apart=apart)


product8_p = _compat.new_primitive(
    "product8",
    jax.jit(
        _multiply,
        static_argnames=("product", "sides", "ready"),
        inline=True,
    ),
    type_of=_type_of,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batch,
)
