"""What a layer changes of the type that it is an instance of: then its variables do not say what it does."""

import inspect
import types
from typing import Any

from jax import lax

from jaxtricks import _integers, weightstd

# Attributes that replace a part of the computation, with the values that leave it as it
# is.
_HOOKS: dict[str, tuple[Any, ...]] = {
    "conv_general_dilated": (None, lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "einsum_op": (),
    "promote_dtype": (),
}
_VARIABLES = ("kernel", "bias", "gain", "scale", "mean", "var", "epsilon")
_SPECIAL = ("__call__", "__getattr__", "__getattribute__")


def check(layer: Any, kind: type, extension_points: tuple[str, ...] = ()) -> None:
    """Raise if the layer may compute something else than a layer of type `kind` with its variables.

    The error's text goes behind the name of the layer.

    Args:
      layer: an instance of `kind`, of flax.nnx or flax.linen.
      kind: class of flax or of this library.
      extension_points: methods that subclasses are meant to override.

    Raises:
      ValueError: a method or property of its own, or what `check_hooks` raises.
    """
    name = overridden(type(layer), kind, extension_points)
    if name is not None:
        raise ValueError(
            f"is a {type(layer).__name__} with a `{name}` of its own, so what it computes is not known"
        )
    check_hooks(layer, kind)


def check_hooks(layer: Any, kind: type, but: tuple[str, ...] = ()) -> None:
    """Raise if the layer dilates its input, or has functions in place of jax's; see `check`.

    Args:
      layer: an instance of `kind`.
      kind: class of flax or of this library.
      but: hooks that are no matter.
    """
    dilation = getattr(layer, "input_dilation", None) or 1
    if any(d != 1 for d in _integers.listed(dilation)):
        raise ValueError(f"has `input_dilation` {dilation}, which has no counterpart")
    for hook, usual in _HOOKS.items():
        value = getattr(layer, hook, None)
        if (
            value is not None
            and hook not in but
            and not any(value is v for v in (*usual, _default(kind, hook)))
            and not isinstance(value, weightstd.Hook)
        ):
            raise ValueError(
                f"has a `{hook}` of its own, so what it computes is not known"
            )


def overridden(
    kind: type, base: type, extension_points: tuple[str, ...] = ()
) -> str | None:
    """The first method or property that a class changes of `base`; None if it adds and fills in at most."""
    for cls in kind.__mro__[: kind.__mro__.index(base)]:
        for name, value in vars(cls).items():
            if name in extension_points:
                continue
            dunder = name.startswith("__") and name not in _SPECIAL
            method = isinstance(value, types.FunctionType) and not dunder
            # What flax's transforms (nn.remat) put around a method is no other method.
            same = inspect.unwrap(getattr(base, name, None)) is inspect.unwrap(value)
            if method and not same and (hasattr(base, name) or name in _SPECIAL):
                return name
            if isinstance(value, property) and (
                hasattr(base, name) or name in _VARIABLES
            ):
                return name
    return None


def _default(kind: type, name: str) -> Any:
    """The default of a constructor's argument."""
    parameter = inspect.signature(kind.__init__).parameters.get(name)
    return None if parameter is None else parameter.default


def kind_of(layer: Any, kinds: tuple[type, ...]) -> type:
    """The type among `kinds` that the layer is an instance of, the nearest first."""
    return next(cls for cls in type(layer).__mro__ if cls in kinds)
