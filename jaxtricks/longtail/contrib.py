"""Offer methods of single papers that few models use."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import (
    Counts,
    are_classes,
    as_vector,
    at_least_rarest,
)
from jaxtricks.longtail._losses import Seesaw, read_inputs
from jaxtricks.longtail._stateful import (
    Axis,
    check_num_classes,
    sum_over_devices,
)
from jaxtricks.longtail.distill import Loss, kd

__all__ = [
    "Dive",
    "OnlineSeesaw",
    "OnlineSeesawState",
    "dive",
    "meta_rates",
    "online_seesaw",
]


@node
class OnlineSeesawState:
    """State of `online_seesaw`.

    Attributes:
      counts: [C] examples of each class so far; the sum of their probabilities for soft
        labels.
    """

    counts: Array


@node
class OnlineSeesaw:
    """The pair of `online_seesaw`: a pytree.

    Attributes:
      p: exponent of the mitigation factor.
      q: exponent of the compensation factor.
      num_classes: C.
      axis_name: mapped axes to sum over, or None.
    """

    p: Scalar
    q: Scalar
    num_classes: int = static()
    axis_name: Axis = static()

    def init(self) -> OnlineSeesawState:
        """Return the state before the first batch."""
        return OnlineSeesawState(jnp.zeros(self.num_classes, float))

    @checked
    def update(
        self,
        state: OnlineSeesawState,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch"], OnlineSeesawState]:
        """Count the batch, then `seesaw` with the counts; the arguments are those of a loss."""
        _, target, _ = read_inputs(logits, labels, where)
        batch = jnp.sum(target.reshape(-1, target.shape[-1]), axis=0)
        batch = sum_over_devices(batch, self.axis_name).astype(
            state.counts.dtype
        )
        if batch.shape != state.counts.shape:
            raise ValueError(
                f"contrib.online_seesaw: `logits` have {batch.shape[0]} "
                f"classes where the state has {state.counts.shape[0]}: pass "
                "another `num_classes`"
            )
        counts = state.counts + jax.lax.stop_gradient(batch)
        loss = Seesaw(counts, self.p, self.q)(logits, labels, where=where)
        return loss, OnlineSeesawState(counts)


@checked
def online_seesaw(
    num_classes: int,
    *,
    p: Scalar = 0.8,
    q: Scalar = 2.0,
    axis_name: Axis = None,
) -> OnlineSeesaw:
    """Build `seesaw` with running counts, which include the batch.

    Args:
      num_classes: C.
      p: exponent of the mitigation factor; 0 is none. May be traced.
      q: exponent of the compensation factor; 0 is none. May be traced.
      axis_name: mapped axes to sum the counts over, inside shard_map or a named vmap.

    Returns:
      A pair: init(), update(state, logits [..., C], labels, where=None) ->
      (per-example, state). The counts are floats: single increments are lost above
      2^24 = 16.8 million, whole batches are not.

    Raises:
      ValueError: if num_classes < 1; in update if the logits have another number of
        classes.

    >>> loss = online_seesaw(2)
    >>> each, state = loss.update(loss.init(), jnp.zeros((3, 2)), jnp.array([0, 0, 1]))
    >>> print(each.round(4), state.counts)
    [0.4538 0.4538 0.6931] [2. 1.]

    References:
      Wang et al., Seesaw loss for long-tailed instance segmentation, arXiv 2008.10032.
    """
    check_num_classes("online_seesaw", num_classes)
    return OnlineSeesaw(p, q, int(num_classes), axis_name)


@node
class Dive:
    """The loss of `dive`: a pytree, and callable with a teacher.

    Attributes:
      base: the loss on the labels.
      alpha: share of the distillation loss.
      temperature: of student and teacher.
      power: that flattens the teacher's probabilities.
    """

    base: Loss
    alpha: Scalar
    temperature: Scalar
    power: Scalar

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        teacher: Float[Array, "*batch C"],
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Compute the loss of every example; `teacher` [..., C] are logits."""
        hard = self.base(logits, labels, where=where)
        soft = kd(logits, teacher, self.temperature, self.power, where=where)
        soft = jnp.where(are_classes(labels, logits.shape[-1]), soft, 0)
        alpha = jnp.asarray(self.alpha).astype(hard.dtype)
        return alpha * soft.astype(hard.dtype) + (1 - alpha) * hard


@checked
def dive(
    base: Loss,
    *,
    alpha: Scalar = 0.5,
    temperature: Scalar = 3.0,
    power: Scalar = 0.5,
) -> Dive:
    """Build the loss of distilling virtual examples.

    alpha kd(z, teacher; T, power) + (1 - alpha) base(z, y)

    A teacher trained with `balanced_softmax` gives the tail more probability than its
    labels do; what it says of a head image about tail classes stands for examples that
    are not there.

    Args:
      base: the loss on the labels, `balanced_softmax(counts)` in the paper.
      alpha: share of the distillation loss. May be traced.
      temperature: T > 0, 2 or 3 in the paper. May be traced.
      power: that flattens the teacher's probabilities; 1 is plain distillation. May be
        traced.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], teacher= [..., C], where=None) ->
      per-example [...].

    >>> from jaxtricks.longtail import balanced_softmax
    >>> loss = dive(balanced_softmax([90, 10]))
    >>> loss(jnp.zeros((1, 2)), jnp.array([0]), teacher=jnp.zeros((1, 2))).round(4)
    Array([0.0527], dtype=float32)

    References:
      He et al., Distilling virtual examples for long-tailed recognition, arXiv
      2103.15042.
    """
    return Dive(base, alpha, temperature, power)


@checked
def meta_rates(counts: Counts, power: Scalar = 0.5) -> Float[Array, "C"]:
    """Return the rates where the meta sampler starts.

    r_c = n_c^-power / (n_max^-power + n_min^-power)

    The rate at which an example of the class is sampled; largest and smallest sum to 1.
    The learned parameters are the logits log(r / (1 - r)); a class is drawn with p_c ~
    n_c r_c, as `class_probabilities(counts, 1 - power)`.

    Args:
      counts: [C] training examples per class; may be traced.
      power: 0 starts as the data, 0.5 square root, 1 balanced.

    Returns:
      [C] rates in (0, 1); a class without examples has that of the rarest.

    >>> [round(float(rate), 3) for rate in meta_rates([90, 10], 1.0)]
    [0.1, 0.9]

    References:
      Ren et al., Balanced meta-softmax, arXiv 2007.10740, section 3.2 and its
      SampleLearner.
    """
    n = at_least_rarest(as_vector("contrib.meta_rates: `counts`", counts))
    power = jnp.asarray(power).astype(n.dtype)
    # Relative to the mean of the extreme logarithms, so that no power overflows.
    log_n = jnp.log(n)
    log_rate = -power * (log_n - (jnp.max(log_n) + jnp.min(log_n)) / 2)
    return jnp.exp(log_rate) / (
        jnp.exp(jnp.max(log_rate)) + jnp.exp(jnp.min(log_rate))
    )
