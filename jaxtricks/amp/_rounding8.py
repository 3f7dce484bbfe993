"""Round the operands of products to 8 bits, divided by a power of two.

The power moves the largest finite magnitude just below the largest of the format. It
changes no digit of a float, so it is no matter for the result how many entries share
one, but for those that underflow. What is infinite or NaN becomes NaN or infinite in
the format and reaches the result.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks import _jaxpr, _tree
from jaxtricks._typing import Array

Scaling = Literal["tensor", "row", "block32"]
SCALINGS: tuple[str, ...] = ("tensor", "row", "block32")
BLOCK = 32
E4M3, E5M2, INT8 = "float8_e4m3fn", "float8_e5m2", "int8"
FORMATS = (E4M3, INT8)
"""Formats of the operands of a forward product."""
GRADIENT = {E4M3: E5M2, E5M2: E5M2, INT8: None, None: None}
"""Format of an operand -> that of its tangents, and of cotangents beside it.

Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433.
"""


# JAX keeps weak references to parameters of equations, which a named tuple has none of.
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
        primitive, params = _jaxpr.primitive_and_params(eqn)
        params = {**params, "preferred_element_type": None}
        return cls(primitive, tuple(sorted(params.items())))

    def __call__(self, a: Array, b: Array, dtype: Any = None) -> Array:
        """Multiply a and b; the result has the dtype, or theirs."""
        params = {**dict(self.params), "preferred_element_type": dtype}
        return self.primitive.bind(a, b, **params)

    @property
    def is_dot(self) -> bool:
        """Whether it is a product of matrices."""
        return self.primitive.name == "dot_general"

    @property
    def is_grouped(self) -> bool:
        """Whether it is a convolution in groups."""
        return dict(self.params).get("feature_group_count", 1) > 1

    def kept_axis(self, which: int) -> int:
        """Return the axis of an operand of a convolution that the result has too."""
        numbers = dict(self.params)["dimension_numbers"]
        return (numbers.rhs_spec if which else numbers.lhs_spec)[0]

    def summed_axes(self, which: int) -> tuple[int, ...]:
        """Return the axes of an operand along which one result reads it."""
        numbers = dict(self.params)["dimension_numbers"]
        if self.is_dot:
            return tuple(sorted(numbers[0][which]))
        spec = numbers.rhs_spec if which else numbers.lhs_spec
        # All but the batch of the input, and the output features of the kernel.
        return tuple(sorted(spec[1:]))

    def batch_axes(self, which: int) -> tuple[int, ...]:
        """Return the axes of an operand that both operands and the result have."""
        numbers = dict(self.params)["dimension_numbers"]
        return tuple(numbers[1][which]) if self.is_dot else ()

    def spread(self, step: Array, which: int, rank: int) -> Array:
        """Return the steps of an operand's entries where a result of the rank has them."""
        if step.size == 1:
            return step.reshape(())
        numbers = dict(self.params)["dimension_numbers"]
        if self.is_dot:
            contracting, batch = (pair[which] for pair in numbers)
            joint = {*contracting, *batch}
            free = [i for i in range(step.ndim) if i not in joint]
            # The result has batch axes, those of the first operand, of the second.
            first = rank - len(free) if which else len(batch)
            axes = [*batch, *free]
            places = [*range(len(batch)), *range(first, first + len(free))]
        else:
            axes, places = [self.kept_axis(which)], [numbers.out_spec[which]]
        shape = [1] * rank
        for axis, place in zip(axes, places, strict=True):
            shape[place] = step.shape[axis]
        order = [axis for _, axis in sorted(zip(places, axes, strict=True))]
        others = [i for i in range(step.ndim) if i not in axes]
        return lax.transpose(step, (*others, *order)).reshape(shape)


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

    def of_gradient(self) -> "Side":
        """Return how a tangent or a cotangent is rounded."""
        return dataclasses.replace(self, format=GRADIENT[self.format])

    def scale_axes(
        self, product: Product, which: int, rank: int
    ) -> tuple[int, ...]:
        """Return the axes of an operand that one scale spans."""
        if self.scaling == "row":
            return product.summed_axes(which)
        apart = {*product.batch_axes(which), *self.apart}
        return tuple(i for i in range(rank) if i not in apart)


@_tree.node
class Rounded:
    """An operand in 8 bits.

    Attributes:
      values: the operand divided by the step, in the format.
      step: float32, of size 1 along the axes that one scale spans.
    """

    values: Array
    step: Array

    def wide(self, dtype: Any) -> Array:
        """Return the operand again, in a floating dtype."""
        return (self.values.astype(jnp.float32) * self.step).astype(dtype)


def rounded(x: Array, format: str, axes: Sequence[int]) -> Rounded:
    """Return an array in 8 bits, with a scale for all that lies along the axes."""
    return Rounded(*round_to_8_bits(x, format=format, axes=tuple(axes)))


# A call of this name, so that it is traced once per shape, and its casts are not
# counted among those that autocast adds.
@functools.partial(jax.jit, static_argnames=("format", "axes"))
def round_to_8_bits(
    x: Array, *, format: str, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """Return the attributes of `Rounded`."""
    x = x.astype(jnp.float32)
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    largest = jnp.max(magnitude, axis=axes, keepdims=True, initial=0)
    if format == INT8:
        step = jnp.where(largest > 0, largest, 127) / 127
        integers = jnp.round(jnp.clip(x / step, -127, 127))
        # An integer cannot say NaN, so the step does.
        is_finite = jnp.all(jnp.isfinite(x), axis=axes, keepdims=True)
        return (
            jnp.nan_to_num(integers).astype(jnp.int8),
            jnp.where(is_finite, step, jnp.nan),
        )
    exponent = _exponent_of_scale(largest, float(jnp.finfo(format).max))
    values = (x * _power_of_two(exponent)).astype(format)
    return values, _power_of_two(-exponent)


def rounded_in_blocks(x: Array, format: str, axis: int) -> Array:
    """Return x rounded with a scale for every 32 entries along an axis, in its dtype."""
    shape, length = x.shape, x.shape[axis]
    missing = -length % BLOCK
    x = jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)])
    blocks = x.reshape(*shape[:axis], -1, BLOCK, *shape[axis + 1 :])
    wide = rounded(blocks, format, (axis + 1,)).wide(x.dtype)
    return lax.slice_in_dim(wide.reshape(x.shape), 0, length, axis=axis)


def _exponent_of_scale(largest: Array, limit: float) -> Array:
    """Return the largest k with largest * 2^k <= limit, within float32's exponents."""
    mantissa, exponent = math.frexp(limit)
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    # frexp has mantissas from 1/2 to 1, the bits of float32 from 1 to 2.
    k = exponent - 1 - ((bits >> 23) - 127)
    limit_bits = int(np.float32(2 * mantissa).view(np.int32)) & 0x7FFFFF
    k = k - ((bits & 0x7FFFFF) > limit_bits).astype(jnp.int32)
    # At 2^127, the reciprocal would be subnormal, which is zero to XLA.
    return jnp.clip(k, -126, 126)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
