"""`remat.recompute_grad` for a module that updates its own variables."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxtricks import remat


def recompute_grad(module: nnx.Module) -> Callable[..., Any]:
    """The module's call, recomputed in the backward pass; its variables are updated as ever.

    `remat.recompute_grad` takes functions of arrays. A module also writes its batch statistics and RNG
    counts, so its variables go in as arguments and come out as results.

    Args:
      module: any module; call the result inside the transformed function, where the module lives.

    Returns:
      A function with the signature of `module.__call__`.

    Example:
      >>> import jax.numpy as jnp
      >>> block = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> recompute_grad(block)(jnp.ones((2, 3))).shape
      (2, 3)
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        graph, state = nnx.split(module)

        def pure(state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            inner = nnx.merge(graph, state, copy=True)
            return inner(*args, **kwargs), nnx.state(inner)

        out, state = remat.recompute_grad(pure)(state, *args, **kwargs)
        nnx.update(module, state)
        return out

    return call
