"""Long-tailed learning: losses, class weights, sampling, data and metrics for imbalanced classes.

What. Most classes have few examples, the test set has as many of each. The losses here are one
softmax loss over logit transforms (`softmax_loss(scale, margin, add_log_prior, temper)`), and
cross entropy, focal, class-balanced, LDAM, balanced softmax, logit adjustment, VS and CDT are
settings of it. Losses that are no logit transform have the same call: label-aware smoothing,
seesaw, LADE, softmax equalization (key=), influence balance (features=). Beside them: counts and
class weights, classifier heads, mixup variants, long-tailed splits of balanced data, test-time
adjustment, class-balanced sampling inside jit, and many/medium/few-shot metrics.

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

Settings to start from. `balanced_softmax(counts)`: it has nothing to tune. `logit_adjusted` with
tau chosen on held-out data (1 to 1.5 on CIFAR). VS: gamma 0.15 to 0.3, tau 1 to 1.25. LDAM:
max_margin 0.5, s 30, a cosine head, class-balanced weights (beta 0.9999) for the last fifth of the
run only. Focal: gamma 1. For a model that is trained already: `posthoc.adjust`, tau 1.

When it helps and when not. It moves accuracy from the head to the tail: balanced accuracy rises,
accuracy on a test set as skewed as the training set falls. Published CIFAR-10-LT (imbalance 100,
ResNet-32): cross entropy 70.4 to 72, balanced softmax 77.5, logit adjustment 77.3 post hoc and 77.9
as a loss; focal and plain class weights gain little. With balanced counts every setting of softmax_loss
is plain cross entropy (LDAM up to its constant margin). After decoupled classifier training the choice of
loss hardly matters.

Cost. O(C) more arithmetic per example than cross entropy, no parameters, no optimizer state. A
metric state is C (C + 1) integers.

Composes with. jit, grad, vmap, scan and sharding. A loss is a pytree: pass it as an argument, or
build it inside jit from traced counts, and nothing is traced again when counts, tau or weights
change; tau, gamma, margins and weights can be differentiated or vmapped. bfloat16 logits are
summed in float32. Soft labels (mixup, distillation): the loss is the expectation of the hard one.
Any leading shape, `where=` masks examples. Do not use `posthoc.adjust` on a model that was trained
with a prior-adjusted loss. With echo: counts are those of the fresh examples.

Differences from the paper and from optax/flax. A class without examples is defined: its prior is
1e-12, its weight 0, its temperature and margin those of the rarest class; nothing trains its logit
under a prior-adjusted loss. The class weight of `focal` does not bend p_y, as it does in the
LDAM-DRW code. Logit adjustment adds tau log pi, the reference log(pi^tau + 1e-12). Effective
numbers use expm1 and log1p. An odd number of classes keeps its last class in `step_counts`. An
empty group of classes scores NaN, not 0. No loss reduces: `reduce` makes the denominator explicit,
for torch and TensorFlow differ. optax has the plain cross entropies, but no class weights, priors
or margins, and its focal loss is the sigmoid one.

References. Zhang et al., Deep long-tailed learning: a survey, arXiv 2110.04596. Menon et al., Long-
tail learning via logit adjustment, arXiv 2007.07314. Ren et al., Balanced meta-softmax, arXiv
2007.10740. Cao et al., LDAM, arXiv 1906.07413. Cui et al., Class-balanced loss, arXiv 1901.05555.
Kini et al., VS loss, arXiv 2103.01550. Ye et al., CDT, arXiv 2001.01385. Lin et al., Focal loss,
arXiv 1708.02002. Kang et al., Decoupling, arXiv 1910.09217.
"""

from jaxtricks.longtail import (
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
from jaxtricks.longtail.algebra import (
    Affine,
    SoftmaxLoss,
    Transform,
    add_log_prior,
    margin,
    scale,
    softmax_loss,
    temper,
)
from jaxtricks.longtail.counts import class_counts
from jaxtricks.longtail.losses import (
    equalization,
    influence_balanced,
    label_aware_smoothing,
    lade,
    seesaw,
)
from jaxtricks.longtail.presets import (
    balanced_softmax,
    cdt,
    class_balanced,
    cross_entropy,
    focal,
    ldam,
    logit_adjusted,
    vs,
    weighted,
)
from jaxtricks.longtail.reduction import reduce
from jaxtricks.longtail.running import class_mean
from jaxtricks.longtail.stateful import equalization_v2, online_seesaw
from jaxtricks.longtail.survey import methods

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
    "methods",
    "metrics",
    "mix",
    "online_seesaw",
    "posthoc",
    "reduce",
    "sampling",
    "scale",
    "seesaw",
    "softmax_loss",
    "temper",
    "vs",
    "weighted",
    "weights",
]
