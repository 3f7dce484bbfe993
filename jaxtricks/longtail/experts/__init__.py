"""Several classifiers over one trunk, and losses with more than one branch.

Experts are heads with an axis of their own in front. Any trunk serves, and any head, vmapped over
parameters that were stacked:

    logits = jax.vmap(heads.normed, in_axes=(None, 0))(features, kernels)  # [E, ..., C]

The losses take all logits [E, ..., C] and return per-example losses [...], summed over the experts;
`aggregate` makes one prediction of them. `bbn` has two branches that see different examples instead,
and `paco` a branch that compares features.
"""

from jaxtricks.longtail.experts.branches import bbn
from jaxtricks.longtail.experts.contrast import paco
from jaxtricks.longtail.experts.diversity import aggregate, divergence, ride
from jaxtricks.longtail.experts.priors import agreement, fit_weights, sade

__all__ = [
    "aggregate",
    "agreement",
    "bbn",
    "divergence",
    "fit_weights",
    "paco",
    "ride",
    "sade",
]
