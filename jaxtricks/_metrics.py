"""Collect what the transforms in an optimizer state report."""

from typing import Any

import jax
import jax.numpy as jnp


def metrics(opt_state: Any) -> dict[str, Any]:
    """What the transforms in an optimizer state report, through any chain or wrapper.

    Every state of ours that has something to log says so by a `metrics()` method (clip
    fraction, loss scale, skipped steps); `optax.inject_hyperparams` contributes its
    hyper-parameters.

    Args:
      opt_state: the state of any optax chain; may be traced.

    Returns:
      {name: scalar array}; a name that occurs twice is numbered:
      "agc/clipped_fraction", "agc/clipped_fraction_1".
    """
    found: dict[str, Any] = {}
    for x in _reporting_nodes(opt_state):
        values = x.metrics() if hasattr(x, "metrics") else x.hyperparams
        for name, value in values.items():
            unique, n = name, 0
            while unique in found:
                n += 1
                unique = f"{name}_{n}"
            found[unique] = jnp.asarray(value)  # an nnx.Optimizer holds Variables
    return found


def _reporting_nodes(tree: Any) -> list[Any]:
    found = []

    def visit(x: Any) -> bool:
        if hasattr(x, "metrics") or hasattr(x, "hyperparams"):
            found.append(x)
        return False  # never a leaf: go on inside

    jax.tree.leaves(tree, is_leaf=visit)
    return found
