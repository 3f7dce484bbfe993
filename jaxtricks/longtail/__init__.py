"""Long-tailed learning: losses, class weights, sampling, data and metrics for imbalanced classes.

What. Most classes have few examples, the test set has as many of each. The losses here
are one softmax loss over logit transforms (`softmax_loss(scale, margin, add_log_prior,
temper)`), and cross entropy, focal, class-balanced, LDAM, balanced softmax, logit
adjustment, VS and CDT are settings of it. Losses that are no logit transform have the
same call: label-aware smoothing, seesaw, LADE, softmax equalization (key=), influence
balance (features=), distillation. Losses with a memory are pairs, `state =
loss.init()`, `each, state = loss.update(state, logits, labels)`: `equalization_v2`,
`online_seesaw`, `experts.paco`. Beside them: counts and class weights, schedules,
samplers, classifier heads (also in nnx and linen), second stages on the parameters of
any model (`decoupling`), several experts on one trunk (`experts`), mixup variants,
long-tailed splits of balanced data, test-time adjustment (`posthoc`), and metrics with
intervals. `methods()` prints the survey's 66 methods: where each is here, or why not.

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

Settings to start from. `balanced_softmax(counts)`: it has nothing to tune.
`logit_adjusted` with tau chosen on held-out data (1 to 1.5 on CIFAR). VS: gamma 0.15 to
0.3, tau 1 to 1.25. LDAM: max_margin 0.5, s 30, a cosine head (`nnx.NormedHead`),
class-balanced weights (beta 0.9999) for the last fifth of the run only. Focal: gamma 1.
For a model that is trained already: `posthoc.adjust`, its tau by `posthoc.fit_tau`.

When it helps and when not. It moves accuracy from the head to the tail: balanced
accuracy rises, accuracy on a test set as skewed as the training set falls. Published
CIFAR-10-LT (imbalance 100, ResNet-32): cross entropy 70.4 to 72, balanced softmax 77.5,
logit adjustment 77.3 post hoc and 77.9 as a loss; focal and plain class weights gain
little. Here (`jaxtricks longtail-bench`, CIFAR-10 at 16 x 16, imbalance 100, ResNet-8,
1,000 steps of 128, one rate for all, 3 seeds, 2 CPU cores, jax 0.10.2), balanced
accuracy and that of the rarest third, mean +- std:
    cross entropy    39.5 +- 0.7    5.7    LDAM-DRW            48.8 +- 0.9   36.7
    focal            40.1 +- 0.5    6.4    balanced softmax    52.9 +- 0.6   51.2
    class weights    47.0 +- 0.7   51.6    post hoc, tau 1     52.5 +- 0.7   50.8
    tau-norm, 1      42.4 +- 1.5    8.1    cRT                 51.7 +- 0.6   52.3
    mixup            32.1 +- 0.4    1.5    VS 0.15             47.4 +- 0.5   66.8
    RIDE, 3 heads    45.6 +- 1.4   29.8
So what uses the prior gains 13 points in a short run; mixup loses, VS at gamma 0.15
overshoots to the tail, RIDE and LDAM, which are published for 200 epochs, gain less.
With balanced counts every setting of softmax_loss is plain cross entropy (LDAM up to
its constant margin). After decoupled classifier training the choice of loss hardly
matters.

Cost. The softmax losses take the time, traffic and memory of optax's cross entropy
(`python -m benchmarks.longtail`); seesaw compares every pair of classes and takes ten
times as long. No parameters, no optimizer state. A metric state is C (C + 1) integers
and three counts a bin.

Composes with. jit, grad, vmap, scan and sharding; forward mode and second derivatives.
A loss is a pytree: pass it as an argument, or build it inside jit from traced counts,
and nothing is traced again when counts, tau or weights change; tau, gamma, margins and
weights can be differentiated or vmapped. bfloat16 logits are summed in float32. Of a
batch split over devices no loss sends anything (vs and cdt one scalar). Soft labels
(mixup, distillation): the loss is the expectation of the hard one. Any leading shape,
`where=` masks examples. Samplers are functions of (key, step) inside jit; `shard=(host,
hosts)` draws that host's part of the same batch. Do not use `posthoc.adjust` or a
class-balanced sampler together with a prior-adjusted loss: both correct twice. With
echo: counts are those of the fresh examples; factor=n_max / counts balances the
classes.

Differences from the paper and from optax/flax. A class without examples is defined: its
prior is 1e-12, its weight 0, its temperature and margin those of the rarest class;
nothing trains its logit under a prior-adjusted loss. A label outside the classes raises
in eager mode; inside jit it costs 0 and the metrics count it. The class weight of
`focal` does not bend p_y, as it does in the LDAM-DRW code. Logit adjustment adds tau
log pi, the reference log(pi^tau + 1e-12). Effective numbers use expm1 and log1p. An odd
number of classes keeps its last class in `step_counts`. An empty group of classes
scores NaN, not 0. tau_norm keeps the bias, PaCo its exact logarithms, SADE equal priors
for equal counts; compat="reference" does as the authors' code. No loss reduces:
`reduce_loss` makes the denominator explicit, for torch and TensorFlow differ. optax has
the plain cross entropies, but no class weights, priors or margins, and its focal loss
is the sigmoid one.

References. Zhang et al., Deep long-tailed learning: a survey, arXiv 2110.04596. Menon
et al., Long- tail learning via logit adjustment, arXiv 2007.07314. Ren et al., Balanced
meta-softmax, arXiv 2007.10740. Cao et al., LDAM, arXiv 1906.07413. Cui et al.,
Class-balanced loss, arXiv 1901.05555. Kini et al., VS loss, arXiv 2103.01550. Ye et
al., CDT, arXiv 2001.01385. Lin et al., Focal loss, arXiv 1708.02002. Kang et al.,
Decoupling, arXiv 1910.09217. Wang et al., RIDE, arXiv 2010.01809.
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
from jaxtricks.longtail._stateful import class_mean, equalization_v2, online_seesaw
from jaxtricks.longtail._survey import methods

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
