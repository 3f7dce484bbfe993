"""Train on imbalanced classes: losses, weights, sampling, heads, experts and metrics.

What. The losses are one softmax loss over logit transforms (`softmax_loss(scale, margin,
add_log_prior, temper)`): cross entropy, focal, class-balanced, LDAM, balanced softmax,
logit adjustment, VS and CDT are settings of it. Others have the same call. Losses with a
memory are pairs: `state = loss.init()`, `each, state = loss.update(state, z, labels)`.
Beside them: weights, samplers, heads, second stages (`decoupling`), several experts on
one trunk, mixup variants, test-time adjustment (`posthoc`), metrics with intervals.

Use.

    import jax, jax.numpy as jnp
    from jaxtricks import longtail

    labels = jnp.array([0, 0, 0, 0, 0, 0, 1, 1, 2])
    counts = longtail.class_counts(labels, 3)
    loss = longtail.balanced_softmax(counts)
    logits = jnp.zeros((9, 3))
    value, gradient = jax.value_and_grad(lambda z: loss(z, labels).mean())(logits)
    state = longtail.metrics.update(longtail.metrics.init(3), logits, labels)
    print(longtail.metrics.summary(state, counts, split="rank")["balanced_accuracy"])

Settings to start from. `balanced_softmax(counts)` has nothing to tune. For a model that
is already trained: `posthoc.adjust`, with tau chosen by `posthoc.fit_tau`.

When it helps and when not. It moves accuracy from the head to the tail: balanced
accuracy rises; accuracy on a test set as skewed as the training set falls.

Cost. That of optax's cross entropy; seesaw compares every pair of classes. Figures:
docs/techniques/longtail.md.

Composes with. jit, grad, vmap, scan and sharding. A loss is a pytree whose counts, tau
and weights may be traced. `where=` masks examples; soft labels work. Never combine
`posthoc.adjust` or a class-balanced sampler with a prior-adjusted loss: both correct
twice.

Differences from the paper and from optax/flax. A class without examples has a defined
prior, weight and margin; no loss reduces (`reduce_loss` does).

References. Zhang et al., "Deep long-tailed learning: a survey", arXiv 2110.04596.
"""

from jaxtricks.longtail import (
    contrib,
    data,
    decoupling,
    distill,
    experts,
    heads,
    metrics,
    mix,
    posthoc,
    sampling,
    weights,
)
from jaxtricks.longtail._counts import class_counts, reduce_loss
from jaxtricks.longtail._losses import (
    balanced_softmax,
    cdt,
    class_balanced,
    cross_entropy,
    equalization,
    focal,
    influence_balanced,
    label_aware_smoothing,
    lade,
    ldam,
    logit_adjusted,
    seesaw,
    vs,
    weighted,
)
from jaxtricks.longtail._softmax import (
    Affine,
    SoftmaxLoss,
    Transform,
    add_log_prior,
    margin,
    scale,
    softmax_loss,
    temper,
)
from jaxtricks.longtail._stateful import class_mean, equalization_v2

__all__ = [
    "Affine",
    "SoftmaxLoss",
    "Transform",
    "add_log_prior",
    "balanced_softmax",
    "cdt",
    "class_balanced",
    "class_counts",
    "class_mean",
    "contrib",
    "cross_entropy",
    "data",
    "decoupling",
    "distill",
    "equalization",
    "equalization_v2",
    "experts",
    "focal",
    "heads",
    "influence_balanced",
    "label_aware_smoothing",
    "lade",
    "ldam",
    "logit_adjusted",
    "margin",
    "metrics",
    "mix",
    "posthoc",
    "reduce_loss",
    "sampling",
    "scale",
    "seesaw",
    "softmax_loss",
    "temper",
    "vs",
    "weighted",
    "weights",
]
