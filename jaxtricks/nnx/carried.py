"""Transforms of pure functions, applied to functions of modules."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx

from jaxtricks import amp, remat

Fn = Callable[..., Any]


def recompute_grad(module: nnx.Module | Fn) -> Fn:
    """The module's call, recomputed in the backward pass; its variables are updated as ever.

    `remat.recompute_grad` takes functions of arrays. A module also writes its batch statistics and RNG
    counts, so its variables go in as arguments and come out as results.

    Args:
      module: any module, or a function with modules among its arguments; call the result inside the
        transformed function, where the modules live.

    Returns:
      A function with the signature of the module's call (or of the function).

    Example:
      >>> import jax.numpy as jnp
      >>> block = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> recompute_grad(block)(jnp.ones((2, 3))).shape
      (2, 3)
    """
    return _carried(remat.recompute_grad, module)


def autocast(
    fn: nnx.Module | Fn,
    policy: amp.Policy | str = "p=f32,c=bf16,o=f32",
    *,
    rules: Mapping[str, str] | None = None,
    scan_carry: Literal["keep", "auto"] = "keep",
) -> Fn:
    """`amp.autocast` of a module or of a function with modules among its arguments.

    The modules' batch statistics and RNG counts are updated as ever, in their own dtypes. It goes inside
    `nnx.jit` and `nnx.value_and_grad`.

    Args:
      fn: a module, or a function; modules that it closes over (other than itself) are not updated.
      policy, rules, scan_carry: see `amp.autocast`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> y = autocast(lambda model, x: model(x).mean())(model, jnp.ones((2, 3)))
      >>> y.dtype, model.mean[...].dtype
      (dtype('float32'), dtype('float32'))
    """
    cast = functools.partial(amp.autocast, policy=policy, rules=rules, scan_carry=scan_carry)
    return _carried(cast, fn)


def _carried(transform: Callable[[Fn], Fn], fn: nnx.Module | Fn) -> Fn:
    """fn under a transform; the variables of its modules go in as arguments and come out as results."""
    own = [fn] if isinstance(fn, nnx.Module) else []

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((own, args, kwargs), is_leaf=_is_module)
        modules = tuple(x for x in leaves if _is_module(x))
        others = [None if _is_module(x) else x for x in leaves]
        graph, state = nnx.split(modules)

        def pure(state: Any, others: Any) -> tuple[Any, Any]:
            inner = nnx.merge(graph, state, copy=True)
            given = iter(inner)
            filled = [
                next(given) if _is_module(x) else y for x, y in zip(leaves, others, strict=True)
            ]
            mine, args, kwargs = jax.tree.unflatten(structure, filled)
            return (mine[0] if mine else fn)(*args, **kwargs), nnx.state(inner)

        out, state = transform(pure)(state, others)
        nnx.update(modules, state)
        return out

    return call


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)
