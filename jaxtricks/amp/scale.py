"""Loss scales as pytrees, and the finiteness check."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxtricks import _tree
from jaxtricks._arguments import checked, known_number
from jaxtricks._typing import Array, Scalar

T = TypeVar("T")
AxisName = str | tuple[str, ...] | None


@_tree.node
class NoOpLossScale:
    """No scaling; same methods as the others, so code need not ask."""

    @property
    def value(self) -> Array:
        """1, float32 []."""
        return jnp.float32(1)

    def scale(self, tree: T) -> T:
        """The tree as it is."""
        return tree

    def unscale(self, tree: T) -> T:
        """The tree as it is."""
        return tree

    def adjust(self, grads_finite: Array) -> "NoOpLossScale":
        """Itself."""
        return self


@_tree.node
class StaticLossScale:
    """A fixed scale.

    Attributes:
      value: the scale; float32 [] when an array.
    """

    value: Scalar

    def scale(self, tree: T) -> T:
        """Floating and complex leaves times the scale, in float32 or better."""
        return _multiply(tree, jnp.float32(self.value))

    def unscale(self, tree: T) -> T:
        """Floating and complex leaves divided by the scale, in float32 or better."""
        return _multiply(tree, 1 / jnp.float32(self.value))

    def adjust(self, grads_finite: Array) -> "StaticLossScale":
        """Itself."""
        return self


@_tree.node
class DynamicLossScale:
    """A scale that grows while gradients are finite and backs off when they are not.

    finite:     clean += 1; at growth_interval: value *= growth, clean = 0
    non-finite: value = max(value * backoff, min_scale), clean = 0

    Attributes:
      value: the scale, float32 [].
      clean: finite steps since the last change, int32 [].
      growth_interval, growth, backoff, min_scale: see `amp.dynamic_loss_scale`.
    """

    value: Scalar = 2.0**15
    clean: Scalar = 0
    growth_interval: int = _tree.static(default=2000)
    growth: float = _tree.static(default=2.0)
    backoff: float = _tree.static(default=0.5)
    min_scale: float = _tree.static(default=1.0)

    def __post_init__(self) -> None:
        """Refuse settings under which training stands still."""
        rules = self.growth_interval, self.growth, self.backoff, self.min_scale
        check_settings("DynamicLossScale", ("value", self.value), *rules)

    def scale(self, tree: T) -> T:
        """Floating and complex leaves times the scale, in float32 or better."""
        return StaticLossScale(self.value).scale(tree)

    def unscale(self, tree: T) -> T:
        """Floating and complex leaves divided by the scale, in float32 or better."""
        return StaticLossScale(self.value).unscale(tree)

    def adjust(self, grads_finite: Array) -> "DynamicLossScale":
        """The scale for the next step.

        Args:
          grads_finite: bool [], what `all_finite` said of this step's gradients.
        """
        rules = self.growth_interval, self.growth, self.backoff, self.min_scale
        value, clean = next_scale(self.value, self.clean, grads_finite, *rules)
        # Not by the constructor, whose check would wait for the value in every step.
        return jax.tree.unflatten(jax.tree.structure(self), [value, clean])


def check_settings(
    name: str,
    init: tuple[str, Scalar],
    growth_interval: Scalar,
    growth: Scalar,
    backoff: Scalar,
    min_scale: Scalar,
) -> None:
    """Raise for numbers with which the scale runs away or stands still; arrays may be traced."""
    rules = [
        (*init, "a finite number > 0", lambda x: 0 < x < math.inf),
        (
            "growth_interval",
            growth_interval,
            "a whole number >= 1",
            lambda x: x >= 1 and x % 1 == 0,
        ),
        ("growth", growth, "a finite number >= 1", lambda x: 1 <= x < math.inf),
        ("backoff", backoff, "a number between 0 and 1", lambda x: 0 < x < 1),
        ("min_scale", min_scale, "a finite number > 0", lambda x: 0 < x < math.inf),
    ]
    for argument, value, wanted, holds in rules:
        number = known_number(value)
        if number is not None and not holds(number):
            raise ValueError(f"amp.{name}: `{argument}` is {value}: give {wanted}")
    argument, first = init
    low, high = known_number(min_scale), known_number(first)
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"amp.{name}: `min_scale` is {min_scale}, above `{argument}`, {first}: give a smaller one"
        )


def check_most(name: str, max_consecutive: Scalar) -> None:
    """Raise for a number of skipped steps that no training could stay below."""
    most = known_number(max_consecutive)
    if most is not None and not (most >= 1 and most % 1 == 0):
        raise ValueError(
            f"amp.{name}: `max_consecutive` is {max_consecutive}: give a whole number >= 1"
        )


def next_scale(
    value: Scalar,
    clean: Scalar,
    finite: Array,
    growth_interval: Scalar,
    growth: Scalar,
    backoff: Scalar,
    min_scale: Scalar,
) -> tuple[Array, Array]:
    """(scale float32 [], clean steps int32 []) after a step; see `DynamicLossScale`."""
    value, clean = jnp.float32(value), jnp.int32(clean) + 1
    grow = clean >= jnp.asarray(growth_interval)
    grown = jnp.where(grow, value * jnp.float32(growth), value)
    grown = jnp.where(jnp.isfinite(grown), grown, value)
    smaller = jnp.maximum(value * jnp.float32(backoff), jnp.float32(min_scale))
    return jnp.where(finite, grown, smaller), jnp.where(finite & ~grow, clean, 0)


@checked
def all_finite(tree: Any, axis_name: AxisName = None) -> Array:
    """Whether every floating and complex leaf is free of inf and NaN: bool [], True for an empty tree.

    Args:
      tree: gradients, say.
      axis_name: mapped axes (of shard_map or pmap) along which the leaves differ; the answer is for
        all of them together. Under jit, arrays are whole and none is needed.
    """
    checks = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if _tree.is_inexact(x)]
    finite = jnp.stack(checks).all() if checks else jnp.bool_(True)
    return finite if axis_name is None else jax.lax.pmin(finite.astype(jnp.int32), axis_name) > 0


@checked
def select_tree(pred: Array, on_true: T, on_false: T) -> T:
    """Leaf by leaf `where(pred, on_true, on_false)`; pred is bool [], keys and integers included."""
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), on_true, on_false)


def _multiply(tree: T, factor: Array) -> T:
    def leaf(x: Any) -> Any:
        if not _tree.is_inexact(x):
            return x
        x = jnp.asarray(x)
        x = x.astype(_tree.wide_dtype(x))
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            # Part by part: as a complex number the factor would make NaN of an infinite part.
            return jax.lax.complex(*(part * factor.astype(part.dtype) for part in (x.real, x.imag)))
        return x * factor.astype(x.dtype)

    return jax.tree.map(leaf, tree)
