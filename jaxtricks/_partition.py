"""Split the arguments of a call into arrays, which are traced, and everything else.

Also refuses what a trace would lose: changes that a function makes in place.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


class Call:
    """A call as a function of its arrays alone.

    Args:
      fn: the function.
      args, kwargs: its arguments; leaves that are not arrays are static.
      nnx: the function of jaxtricks.nnx that carries the state of modules where this
        one can't.

    Attributes:
      arrays: the arrays among the arguments, in order.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        nnx: str = "autocast",
    ):
        self._fn = fn
        self._nnx = nnx
        self._leaves, self._structure = jax.tree.flatten((args, kwargs))
        self.arrays = [_as_jax(x) for x in self._leaves if _is_array(x)]
        # Leaves and structure of fn's results of the last trace.
        self._outputs: Any = None

    def run(self, *arrays: Any) -> list[Any]:
        """Return the arrays among fn's results; `assemble` puts the rest back."""
        leaves = _with_arrays(self._leaves, arrays)
        args, kwargs = jax.tree.unflatten(self._structure, leaves)
        with _module_hint(self._nnx):
            out = self._fn(*args, **kwargs)
        _refuse_changes(leaves, (args, kwargs), self._nnx)
        self._outputs = jax.tree.flatten(out)
        return [x for x in self._outputs[0] if _is_array(x)]

    def assemble(self, arrays: Sequence[Any]) -> Any:
        """Return fn's results with these arrays in place of those of the trace."""
        leaves, structure = self._outputs
        return jax.tree.unflatten(structure, _with_arrays(leaves, arrays))


def without_changes(
    fn: Callable[P, R],
    nnx: str,
) -> Callable[P, R]:
    """Return fn, which then raises if it changes an argument in place.

    A trace works on copies, so that such a change would be lost.

    Args:
      fn: the function.
      nnx: the function of jaxtricks.nnx that carries such changes.
    """

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        before = jax.tree.leaves((args, kwargs))
        with _module_hint(nnx):
            out = fn(*args, **kwargs)
        _refuse_changes(before, (args, kwargs), nnx)
        return out

    return checked


def refuse_module(fn: Callable[..., Any], name: str) -> None:
    """Raise ValueError if fn is a flax.nnx module.

    As a function it would hide its parameters.

    Args:
      fn: what is to be wrapped.
      name: the wrapper's, the same in remat and in jaxtricks.nnx.
    """
    # By name: Flax is not imported on this floor.
    for base in type(fn).__mro__:
        if base.__name__ == "Module" and base.__module__.startswith(
            "flax.nnx."
        ):
            raise ValueError(
                f"remat.{name}: `fn` is a flax.nnx module "
                f"({type(fn).__name__}): use jaxtricks.nnx.{name}, which "
                "returns a module and updates its variables"
            )


def positional(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
) -> tuple[Any, ...]:
    """Return all arguments of fn(*args, **kwargs) by position.

    Raises:
      ValueError: they do not fit, or one of them has no position.
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
            f"{where}: {names} can't be passed by position: fix it before, by "
            "functools.partial say"
        )
    return bound.args


def _with_arrays(
    leaves: Sequence[Any],
    arrays: Sequence[Any],
) -> list[Any]:
    """Return the leaves with these arrays in place of theirs."""
    remaining = iter(arrays)
    return [next(remaining) if _is_array(x) else x for x in leaves]


def _is_array(x: Any) -> bool:
    # Python numbers stay static, so `if flag:` and `range(n)` keep working inside fn.
    return isinstance(
        x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    )


def _as_jax(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x


@contextlib.contextmanager
def _module_hint(nnx: str) -> Iterator[None]:
    """Add a note to the error of a function that changes a closed-over module."""
    try:
        yield
    except Exception as error:
        # By name, as above: flax.nnx raises it from the user's function.
        if type(error).__name__ == "TraceContextError":
            error.add_note(
                f"{_advice(nnx)}, and pass the module as an argument"
            )
        raise


def _advice(nnx: str) -> str:
    return f"return the new value, or for a flax.nnx module use jaxtricks.nnx.{nnx}"


def _refuse_changes(
    before: Sequence[Any],
    arguments: Any,
    nnx: str,
) -> None:
    """Raise ValueError if the leaves are not those of before.

    fn receives copies of its containers: what it writes into them (batch statistics)
    would be lost.
    """
    after, _ = jax.tree_util.tree_flatten_with_path(arguments)
    # By identity: comparing values would wait for them, and tracers have none.
    changed = [
        path
        for (path, x), old in zip(after, before, strict=False)
        if x is not old
    ]
    if changed or len(after) != len(before):
        where = f" ({jax.tree_util.keystr(changed[0])})" if changed else ""
        raise ValueError(
            "the traced function changes one of its arguments in "
            f"place{where}, and a trace works on copies; {_advice(nnx)}"
        )
