"""Run the step of an optimizer leaf by leaf, and put its state together again."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxtricks import _tree
from jaxtricks._typing import Params
from jaxtricks.memopt import _leaves, _momentum

LeafStep = Callable[..., tuple[Any, Any, Any]]
"""step(path, g, p, v, m, seed) -> (update, v, m); m and seed are None where absent."""


def update_leaves(
    name: str,
    step: LeafStep,
    updates: Any,
    state: Any,
    params: Params,
    is_moment: Callable[[Any], bool],
) -> tuple[Any, Any]:
    """Return the updates of all leaves and the next state.

    Args:
      name: the transformation, for errors.
      step: the arithmetic of one leaf.
      updates: gradients, a tree like params.
      state: a NamedTuple of count, v (a second moment per leaf) and m (an average per
        leaf, or None).
      params: the parameters.
      is_moment: whether a node of v is the second moment of one leaf.
    """
    weights = _leaves.checked(name, params)
    new_v = _tree.by_path(state.v, is_moment)
    new_m = _tree.by_path(state.m, _momentum.is_int8)
    seeds = _momentum.seeds(new_m, state.count)
    out = []
    for path, g in _leaves.checked(name, updates).items():
        v = _leaves.lookup(name, new_v, path, "the state")
        p = _leaves.lookup(name, weights, path, "`params`")
        m = new_m.get(path)
        u, new_v[path], m = step(path, g, p, v, m, seeds.get(path))
        if m is not None:
            new_m[path] = _momentum.sharded_like(m, new_m[path])
        out.append(u)
    new_state = state._replace(
        count=optax.safe_increment(state.count),
        v=_leaves.with_nodes(state.v, is_moment, new_v),
        m=_leaves.with_nodes(state.m, _momentum.is_int8, new_m),
    )
    return jax.tree.unflatten(jax.tree.structure(updates), out), new_state
