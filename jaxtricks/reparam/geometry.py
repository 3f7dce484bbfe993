"""Where the taps of a small kernel lie in a large one, and convolutions placed by that rule."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _integers
from jaxtricks._typing import Array

Pads = tuple[tuple[int, int], ...]
Padding = str | int | Sequence[int | Sequence[int]]


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One positive integer per spatial axis."""
    values = _integers.plain(value)
    values = (values,) * rank if isinstance(values, int) else values
    if len(values) != rank or any(v < 1 for v in values):
        raise ValueError(
            f"reparam: `{name}` is {value}; give a positive integer or one per spatial axis ({rank})"
        )
    return values


def resolve(
    padding: Padding,
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> Pads:
    """Padding as explicit (low, high) pairs for a kernel of the given size on this input size."""
    rank = len(kernel)
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CAUSAL" and rank == 1:
            return ((extents[0] - 1, 0),)
        if name not in ("SAME", "SAME_LOWER", "VALID"):
            raise ValueError(
                f"reparam: `padding` {padding!r} has no zero-padded equivalent; use 'SAME', 'VALID' "
                "or (low, high) pairs"
            )
        pads = jax.lax.padtype_to_pads(spatial, extents, strides, name)
        return tuple((int(low), int(high)) for low, high in pads)
    pairs = (padding,) * rank if _integers.is_integer(padding) else tuple(padding)
    pads = tuple((p, p) if _integers.is_integer(p) else tuple(p) for p in pairs)
    if len(pads) != rank or any(len(p) != 2 for p in pads):
        raise ValueError(
            f"reparam: `padding` {padding} needs one (low, high) pair per spatial axis"
        )
    return tuple((int(low), int(high)) for low, high in pads)


def place(pads: Pads, outer: Sequence[int], inner: Sequence[int], dilation: Sequence[int]) -> Pads:
    """Padding of a kernel of size `inner` whose centre tap coincides with that of `outer`.

    low' = low - d (K//2 - k//2),   high' = high - d ((K-1-K//2) - (k-1-k//2)): then both see the same
    input under the same output, for every stride. Negative numbers crop.
    """

    def after(size: int) -> int:
        return size - 1 - size // 2

    return tuple(
        (low - d * (big // 2 - small // 2), high - d * (after(big) - after(small)))
        for (low, high), big, small, d in zip(pads, outer, inner, dilation, strict=True)
    )


def zero_pad(x: Array, pads: Pads) -> Array:
    """x [..., *spatial, C] with zeros around its spatial axes; negative pads crop."""
    if all(p == (0, 0) for p in pads):
        return x
    lead = x.ndim - len(pads) - 1
    config = [(0, 0, 0)] * lead + [(low, high, 0) for low, high in pads] + [(0, 0, 0)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def convolve(
    x: Array,
    kernel: Array,
    *,
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
    groups: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """Convolution of x [..., *spatial, I] with a kernel [*size, I / groups, O], channels last.

    Any number of leading axes; negative pads crop.
    """
    rank = kernel.ndim - 2
    if any(side < 0 for pair in pads for side in pair):
        # Backends are not agreed on negative padding inside a convolution. Both sides at once: a small
        # branch of a cropped window may read nothing but the padding of the other side.
        x, pads = zero_pad(x, pads), ((0, 0),) * rank
    lead, spatial = x.shape[: x.ndim - rank - 1], x.shape[x.ndim - rank - 1 :]
    y = jax.lax.conv_general_dilated(
        jnp.reshape(x, (-1, *spatial)) if len(lead) != 1 else jnp.asarray(x),
        jnp.asarray(kernel),
        tuple(strides),
        pads,
        rhs_dilation=tuple(dilation),
        dimension_numbers=channels_last(rank),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape((*lead, *y.shape[1:])) if len(lead) != 1 else y


def channels_last(rank: int) -> jax.lax.ConvDimensionNumbers:
    """Layouts N..C and ..IO for `rank` spatial axes."""
    images = (0, rank + 1, *range(1, rank + 1))
    kernels = (rank + 1, rank, *range(rank))
    return jax.lax.ConvDimensionNumbers(images, kernels, images)
