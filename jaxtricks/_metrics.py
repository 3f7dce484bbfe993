"""Collect what the transforms in an optimizer state report."""

from typing import Any

import jax
import jax.numpy as jnp


def metrics(opt_state: Any) -> dict[str, Any]:
    """Collect what the transforms in an optimizer state report, through any chain.

    Every state of ours that has something to log says so by a `metrics()` method (clip
    fraction, loss scale, skipped steps); `optax.inject_hyperparams` contributes its
    hyper-parameters.

    Args:
      opt_state: the state of any optax chain; may be traced.

    Returns:
      {name: scalar array}; a name that occurs twice is numbered:
      "agc/clipped_fraction", "agc/clipped_fraction_1".
    """
    values_by_name: dict[str, Any] = {}
    for x in _reporting_nodes(opt_state):
        values = x.metrics() if hasattr(x, "metrics") else x.hyperparams
        for name, value in values.items():
            unique, n = name, 0
            while unique in values_by_name:
                n += 1
                unique = f"{name}_{n}"
            # As an array, since an nnx.Optimizer holds Variables.
            values_by_name[unique] = jnp.asarray(value)
    return values_by_name


def _reporting_nodes(tree: Any) -> list[Any]:
    nodes = []

    def visit(x: Any) -> bool:
        if hasattr(x, "metrics") or hasattr(x, "hyperparams"):
            nodes.append(x)
        return False  # never a leaf: go on inside

    jax.tree.leaves(tree, is_leaf=visit)
    return nodes
