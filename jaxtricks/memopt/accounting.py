"""What an optimizer's state costs, from shapes alone."""

import jax
import optax

from jaxtricks import _tree
from jaxtricks._types import Params


def state_bytes(tx: optax.GradientTransformation, params: Params) -> int:
    """Bytes of the state that `tx.init(params)` would make; allocates nothing.

    Args:
      tx: any optax transformation or chain.
      params: pytree of arrays or ShapeDtypeStructs.

    Returns:
      The bytes of all arrays in the state, on one device.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> state_bytes(optax.adam(1e-3), params)
      8388612
    """
    return _tree.nbytes(jax.eval_shape(tx.init, params))
