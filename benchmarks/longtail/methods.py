"""The methods that are compared: a head, a loss, a mixture of images, a second stage."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import longtail
from jaxtricks._typing import Array, Key

DRW_START = 0.8
"""Share of the run after which LDAM and RIDE weight classes."""
BETA = 0.9999
EXPERTS = 3

Loss = Callable[[Array, Array, Array, Array], Array]
"""(logits, labels, counts, share of the run that is over) -> per example."""


class Method(NamedTuple):
    """How to train.

    Attributes:
      loss: see `Loss`.
      normed: whether the head is a cosine.
      experts: heads on one trunk; 0 is a single head without an axis for it.
      mixup: whether images are mixed.
    """

    loss: Loss
    normed: bool = False
    experts: int = 0
    mixup: bool = False


def _of(make: Callable[[Array], Any]) -> Loss:
    return lambda logits, labels, counts, share: make(counts)(logits, labels)


def _drw(counts: Array, share: Array) -> Array:
    """Class weights: none until DRW_START, then by effective numbers."""
    after = longtail.weights.effective_number(counts, BETA)
    return longtail.weights.deferred(
        share, DRW_START, jnp.ones_like(after), after
    )


def _ldam_drw(
    logits: Array, labels: Array, counts: Array, share: Array
) -> Array:
    return longtail.ldam(counts)(logits, labels) * _drw(counts, share)[labels]


def _ride(logits: Array, labels: Array, counts: Array, share: Array) -> Array:
    loss = longtail.experts.ride(longtail.ldam(counts))
    return loss(logits, labels) * _drw(counts, share)[labels]


TRAINED = {
    "cross_entropy": Method(_of(lambda n: longtail.cross_entropy())),
    "focal": Method(_of(lambda n: longtail.focal(1.0))),
    "class_balanced": Method(_of(lambda n: longtail.class_balanced(n, BETA))),
    "ldam_drw": Method(_ldam_drw, normed=True),
    "balanced_softmax": Method(_of(longtail.balanced_softmax)),
    "logit_adjusted": Method(_of(longtail.logit_adjusted)),
    "vs": Method(_of(lambda n: longtail.vs(n, gamma=0.15, tau=1.0))),
    "mixup": Method(_of(lambda n: longtail.cross_entropy()), mixup=True),
    "ride": Method(_ride, normed=True, experts=EXPERTS),
}
"""Those that train a network of their own."""

FROM_BASE = ("post_hoc", "crt", "tau_norm")
"""Those that start from the one trained by cross entropy."""


def init_head(
    key: Key, method: Method, features: int, classes: int
) -> dict[str, Array]:
    """{"kernel": [D, C] or [E, D, C], "bias": [C]}; a cosine head has no bias."""
    shape = (features, classes)
    if method.experts:
        keys = jax.random.split(key, method.experts)
        draw = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
    else:
        draw = jax.random.normal(key, shape)
    head = {"kernel": draw / features**0.5}
    return head if method.normed else {**head, "bias": jnp.zeros(classes)}


def logits_of(method: Method, head: dict[str, Array], x: Array) -> Array:
    """Features [N, D] -> [N, C], or [E, N, C] of experts."""
    if not method.normed:
        return x @ head["kernel"] + head["bias"][None]
    if not method.experts:
        return longtail.heads.normed(x, head["kernel"])
    return jax.vmap(longtail.heads.normed, (None, 0))(x, head["kernel"])


def predicted(method: Method, logits: Array) -> Array:
    """What the network says: [N, C]."""
    return longtail.experts.aggregate(logits) if method.experts else logits
