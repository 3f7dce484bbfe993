"""A call with everything but its arrays fixed, and what a trace refuses: changes in place."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Call:
    """A call as a function of its arrays alone.

    Args:
      fn: the function.
      args, kwargs: what it is called with; leaves that are no arrays stay what they
        are.
      nnx: the function of jaxtricks.nnx that carries the state of modules where this
        one can't.
    """

    def __init__(
        self, fn: Callable[..., Any], args: Any, kwargs: Any, *, nnx: str = "autocast"
    ):
        self._fn, self._nnx = fn, nnx
        self._leaves, self._structure = jax.tree.flatten((args, kwargs))
        arrays = [x for x in self._leaves if _is_array(x)]
        self.arrays = [
            jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x
            for x in arrays
        ]
        self._outputs: Any = None

    def run(self, *arrays: Any) -> list[Any]:
        """The arrays among fn's results; `assemble` puts the rest back."""
        given = iter(arrays)
        leaves = [next(given) if _is_array(x) else x for x in self._leaves]
        args, kwargs = jax.tree.unflatten(self._structure, leaves)
        with _cured(self._nnx):
            out = self._fn(*args, **kwargs)
        _refuse_changes(leaves, (args, kwargs), self._nnx)
        self._outputs = jax.tree.flatten(out)
        return [x for x in self._outputs[0] if _is_array(x)]

    def assemble(self, arrays: Sequence[Any]) -> Any:
        """fn's results, with these arrays in the places of its own."""
        leaves, structure = self._outputs
        given = iter(arrays)
        return jax.tree.unflatten(
            structure, [next(given) if _is_array(x) else x for x in leaves]
        )


def without_changes(fn: Callable[..., Any], nnx: str) -> Callable[..., Any]:
    """fn, refused if it changes an argument in place: a trace works on copies, and they are lost.

    Args:
      fn: the function.
      nnx: the function of jaxtricks.nnx that carries such changes.
    """

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        before = jax.tree.leaves((args, kwargs))
        with _cured(nnx):
            out = fn(*args, **kwargs)
        _refuse_changes(before, (args, kwargs), nnx)
        return out

    return checked


def refuse_module(fn: Callable[..., Any], name: str) -> None:
    """Raise ValueError if fn is a flax.nnx module: as a function, it would hide its parameters.

    Args:
      fn: what is to be wrapped.
      name: the function's, the same in remat and in jaxtricks.nnx.
    """
    bases = type(fn).__mro__
    if any(
        c.__name__ == "Module" and c.__module__.startswith("flax.nnx.") for c in bases
    ):
        raise ValueError(
            f"remat.{name}: `fn` is a flax.nnx module ({type(fn).__name__}): use jaxtricks.nnx.{name}, which "
            "returns a module and updates its variables"
        )


def positional(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> tuple[Any, ...]:
    """All arguments of fn(*args, **kwargs) by position.

    Raises:
      ValueError: if they don't fit, or one of them has no position.
    """
    if not kwargs:
        return args
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{where}: the arguments do not fit the function: {error}"
        ) from None
    if bound.kwargs:
        names = ", ".join(bound.kwargs)
        raise ValueError(
            f"{where}: {names} can't be passed by position: fix it before, by functools.partial say"
        )
    return bound.args


@contextlib.contextmanager
def _cured(nnx: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # flax.nnx: fn closes over a module and changes it.
        if type(error).__name__ == "TraceContextError":
            error.add_note(f"{_cure(nnx)}, and pass the module as an argument")
        raise


def _cure(nnx: str) -> str:
    return f"return the new value, or for a flax.nnx module use jaxtricks.nnx.{nnx}"


def _is_array(x: Any) -> bool:
    # Python numbers stay static, so `if flag:` and `range(n)` keep working inside fn.
    return isinstance(x, jax.Array | np.ndarray | np.generic) or _is_shape(x)


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _refuse_changes(before: Sequence[Any], arguments: Any, nnx: str) -> None:
    """fn got copies of its containers: what it wrote into them (batch statistics) would be lost."""
    after, _ = jax.tree_util.tree_flatten_with_path(arguments)
    changed = [
        path for (path, x), old in zip(after, before, strict=False) if x is not old
    ]
    if changed or len(after) != len(before):
        where = f" ({jax.tree_util.keystr(changed[0])})" if changed else ""
        raise ValueError(
            f"the traced function changes one of its arguments in place{where}, and a trace works on "
            f"copies; {_cure(nnx)}"
        )
