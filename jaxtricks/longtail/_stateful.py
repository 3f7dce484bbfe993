"""Remember earlier batches in losses and class means, as init/update pairs.

All of them have one shape. A factory makes a pair, whose hyper-parameters may be
traced; `init()` makes the state, a pytree of arrays to keep in the training state and
in checkpoints; and

    result, state = pair.update(state, logits, labels, where=None)

gives what the batch yields, per-example losses as a rule, and the next state. The state
carries no gradient. Inside `shard_map` or a named `vmap` give `axis_name=`: what the
devices collect is summed, so that each holds the same state. Under plain jit with
sharded arrays there is nothing to do. `experts.paco` has this shape too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import as_mask, class_indices, floating
from jaxtricks.longtail._losses import finish, read_inputs
from jaxtricks.longtail._softmax import are_hard, is_label

Axis = str | tuple[str, ...] | None
"""Name or names of mapped axes to sum over; None where there is nothing to sum."""

RATIO_EPS = 1e-10  # the reference's, in positive / (negative + eps)


@node
class EqualizationV2State:
    """State of `equalization_v2`.

    Attributes:
      positive: [C] gradient that pulled each class up so far, in weighted |p - y|.
      negative: [C] gradient that pushed it down.
    """

    positive: Array
    negative: Array


@node
class EqualizationV2:
    """The pair of `equalization_v2`: a pytree.

    Attributes:
      gamma: steepness of the negative weight as a function of the ratio.
      mu: ratio at which the negative weight is one half.
      alpha: how much the positive weight rises where the negative one falls.
      num_classes: C.
      background: whether the logits have one more column.
      axis_name: mapped axes to sum over, or None.
    """

    gamma: Scalar
    mu: Scalar
    alpha: Scalar
    num_classes: int = static()
    background: bool = static()
    axis_name: Axis = static()

    def init(self) -> EqualizationV2State:
        """Return the state before the first batch, in which every weight is 1."""
        zeros = jnp.zeros(self.num_classes, float)
        return EqualizationV2State(zeros, zeros)

    @checked
    def update(
        self,
        state: EqualizationV2State,
        logits: Float[Array, "*batch K"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch K"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch"], EqualizationV2State]:
        """Return losses weighted by the old state, and the state with this batch.

        Args:
          state: of `init` or the last update.
          logits: [..., K], K = C, or C + 1 with background.
          labels: [...] integers in [0, K), or [..., K] targets, which need not sum to 1
            (several classes at once).
          where: [...] booleans; a masked example costs 0 and leaves no trace in the
            state.

        Returns:
          [...] losses, summed over the classes, and the new state. 0 for an integer
          label outside [0, K); neither it nor an example with a NaN among its logits
          enters the state.

        Raises:
          ValueError: where the shapes do not fit.
        """
        z, q, inside = read_inputs(logits, labels, where)
        if z.shape[-1] != self.num_classes + self.background:
            raise ValueError(
                f"longtail.equalization_v2: `logits` have {z.shape[-1]} "
                "classes where the pair has "
                f"{self.num_classes + self.background}: pass another "
                "`num_classes`"
            )
        down = self._negative_weight(state, z)
        up = 1 + jnp.asarray(self.alpha).astype(z.dtype) * (1 - down)
        # Of a class that is not offered softplus(-z) is inf, which counts for its
        # examples only.
        pull = jnp.where(q == 0, 0, q * up * jax.nn.softplus(-z))
        each = pull + (1 - q) * down * jax.nn.softplus(z)
        loss = finish(jnp.sum(each, axis=-1), inside, where)
        keep = usable(z, inside, where)
        return loss, EqualizationV2State(
            self._add(state.positive, q * up * jax.nn.sigmoid(-z), keep),
            self._add(state.negative, (1 - q) * down * jax.nn.sigmoid(z), keep),
        )

    def _negative_weight(self, state: EqualizationV2State, z: Array) -> Array:
        positive = state.positive.astype(z.dtype)
        negative = state.negative.astype(z.dtype)
        gamma = jnp.asarray(self.gamma).astype(z.dtype)
        mu = jnp.asarray(self.mu).astype(z.dtype)
        weight = jax.nn.sigmoid(
            gamma * (positive / (negative + RATIO_EPS) - mu)
        )
        # Before the first batch nothing is known.
        weight = jnp.where(positive + negative > 0, weight, 1)
        if self.background:
            weight = jnp.append(weight, jnp.ones((), z.dtype))
        return jax.lax.stop_gradient(
            weight.reshape((1,) * (z.ndim - 1) + (-1,))
        )

    def _add(self, total: Array, gradient: Array, keep: Array) -> Array:
        gradient = jnp.where(
            keep[..., None], jax.lax.stop_gradient(gradient), 0
        )
        batch = jnp.sum(gradient.reshape(-1, gradient.shape[-1]), axis=0)[
            : self.num_classes
        ]
        return total + sum_over_devices(batch, self.axis_name).astype(
            total.dtype
        )


@checked
def equalization_v2(
    num_classes: int,
    *,
    gamma: Scalar = 12.0,
    mu: Scalar = 0.8,
    alpha: Scalar = 4.0,
    background: bool = False,
    axis_name: Axis = None,
) -> EqualizationV2:
    """Build equalization v2: binary losses that balance both signs of gradient.

    loss = sum_c y_c u_c log(1 + e^-z_c) + (1 - y_c) d_c log(1 + e^z_c)
    d_c = sigmoid(gamma (g_c - mu))
    u_c = 1 + alpha (1 - d_c)

    g_c is the ratio of the weighted gradients |sigmoid(z_c) - y_c| that class c has had
    as a positive and as a negative. A rare class is mostly a negative: it is pushed
    down less and pulled up more. No counts are needed. Predict by sigmoid(z_c).

    Args:
      num_classes: C.
      gamma: steepness of the negative weight. May be traced, as mu and alpha may.
      mu: ratio at which the negative weight is one half.
      alpha: largest rise of the positive weight.
      background: whether the logits have one more column for "none of these", with
        label C, whose weight stays 1 (detection).
      axis_name: mapped axes to sum the gradients over, inside shard_map or a named
        vmap.

    Returns:
      A pair: init(), update(state, logits [..., K], labels, where=None) ->
      (per-example, state).

    Raises:
      ValueError: if num_classes < 1.

    >>> loss = equalization_v2(2)
    >>> state = loss.init()
    >>> z, y = jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1])
    >>> first, state = loss.update(state, z, y)
    >>> again, _ = loss.update(state, z, y)
    >>> print(*(f"{x:.2f}" for x in jnp.stack([first[0], again[0], again[3]])))
    1.39 0.70 4.15

    References:
      Tan et al., Equalization loss v2, arXiv 2012.08548.
    """
    check_num_classes("equalization_v2", num_classes)
    return EqualizationV2(
        gamma, mu, alpha, int(num_classes), background, axis_name
    )


def check_num_classes(name: str, num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(
            f"longtail.{name} needs `num_classes` >= 1, got {num_classes}: "
            "pass the number of classes"
        )


def usable(z: Array, inside: Array | None, where: Array | None) -> Array:
    """Return which examples may enter a state; one NaN would stay for good."""
    keep = ~jnp.any(jnp.isnan(z), axis=-1)
    if inside is not None:
        keep &= inside
    return keep if where is None else keep & as_mask(where, keep.shape)


def sum_over_devices(x: Array, axis_name: Axis) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


# Running means of features, of each class and of all: centres, `heads.ncm` and
# `heads.tde`.


@node
class ClassMeanState:
    """State of `class_mean`: decaying sums, and the weight that they have reached.

    Attributes:
      sums: [C, D] decayed sum of the batch means of each class.
      weights: [C] decayed sum of ones, so that sums / weights is a mean from the first
        batch on.
      sum: [D] decayed sum of the batch means of all examples.
      weight: [] decayed sum of ones, as `weights`.
    """

    sums: Array
    weights: Array
    sum: Array
    weight: Array

    @property
    def means(self) -> Float[Array, "C D"]:
        """Return the mean feature of each class; 0 for a class without examples."""
        return _ratio(self.sums, self.weights[:, None])

    @property
    def mean(self) -> Float[Array, "D"]:
        """Return the mean feature of all examples: the `direction` of `heads.tde`."""
        return _ratio(self.sum, self.weight)

    @property
    def present(self) -> Bool[Array, "C"]:
        """Return which classes had examples."""
        return self.weights > 0


@node
class ClassMean:
    """The pair of `class_mean`: a pytree.

    Attributes:
      momentum: weight of the old mean.
      num_classes: C.
      num_features: D.
      axis_name: mapped axes to average over, or None.
    """

    momentum: Scalar
    num_classes: int = static()
    num_features: int = static()
    axis_name: Axis = static()

    def init(self) -> ClassMeanState:
        """Return the state before the first batch."""
        shape = self.num_classes, self.num_features
        zeros = [jnp.zeros(s, float) for s in (shape, shape[:1], shape[1:], ())]
        return ClassMeanState(*zeros)

    @checked
    def update(
        self,
        state: ClassMeanState,
        features: Float[Array, "*batch D"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "C D"], ClassMeanState]:
        """Move the means of the classes in the batch.

        Args:
          state: of `init` or the last update.
          features: [..., D]; an example with a NaN is left out.
          labels: [...] integers, or [..., C] probabilities. An integer outside [0, C)
            counts in the mean of all only.
          where: [...] booleans; a masked example is left out.

        Returns:
          [C, D] means, and the new state.

        Raises:
          ValueError: where the shapes do not fit.
        """
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"longtail.class_mean: `features` are {features.shape[-1]} "
                f"wide where the pair has {self.num_features}: pass another "
                "`num_features`"
            )
        x = floating(jax.lax.stop_gradient(jnp.asarray(features)))
        keep = usable(x, None, where)
        x = jnp.where(keep[..., None], x, 0).reshape(-1, x.shape[-1])
        member = jnp.where(
            keep[..., None], self._members(labels, features, x), 0
        )
        member = member.reshape(-1, self.num_classes)
        keep = keep.reshape(-1).astype(x.dtype)
        batch = (member.T @ x, jnp.sum(member, axis=0), keep @ x, jnp.sum(keep))
        sums, total, sum_, number = _summed_all(batch, self.axis_name)
        new = ClassMeanState(
            self._moved(
                state.sums, _ratio(sums, total[:, None]), total[:, None]
            ),
            self._moved(state.weights, jnp.ones_like(total), total),
            self._moved(state.sum, _ratio(sum_, number), number),
            self._moved(state.weight, jnp.ones_like(number), number),
        )
        return new.means, new

    def _members(self, labels: Array, features: Array, x: Array) -> Array:
        labels = jax.lax.stop_gradient(jnp.asarray(labels))
        like = jnp.zeros((*features.shape[:-1], self.num_classes), x.dtype)
        if not are_hard(labels, like):
            return labels.astype(x.dtype)
        return is_label(class_indices(labels), like).astype(x.dtype)

    def _moved(self, old: Array, batch: Array, total: Array) -> Array:
        mu = jnp.asarray(self.momentum).astype(old.dtype)
        return jnp.where(
            total > 0, mu * old + (1 - mu) * batch.astype(old.dtype), old
        )


@checked
def class_mean(
    num_classes: int,
    num_features: int,
    *,
    momentum: Scalar = 0.9,
    axis_name: Axis = None,
) -> ClassMean:
    """Average the features of each class, and of all, exponentially.

    m_c <- mu m_c + (1 - mu) mean{x_i : y_i = c}, only where the batch has examples of
    class c, divided by the share 1 - mu^k that k such batches have filled: an average
    from the first batch on, never drawn to zero. The mean over all examples has the
    direction of the running sum m <- mu m + mean(x) that the de-confounded classifier
    subtracts, which does not see its length.

    Args:
      num_classes: C.
      num_features: D.
      momentum: mu in [0, 1). May be traced.
      axis_name: mapped axes to average over, inside shard_map or a named vmap.

    Returns:
      A pair: init(), update(state, features [..., D], labels, where=None) -> (means [C,
      D], state); the state has `.means`, `.mean` and `.present`.

    Raises:
      ValueError: if num_classes or num_features is below 1.

    >>> centres = class_mean(3, 1, momentum=0.5)
    >>> x, y = jnp.array([[1.0], [3.0], [8.0]]), jnp.array([0, 0, 1])
    >>> means, state = centres.update(centres.init(), x, y)
    >>> print(means[:, 0], state.mean, state.present)
    [2. 8. 0.] [4.] [ True  True False]

    References:
      Tang et al., Long-tailed classification by keeping the good and removing the bad
      momentum causal effect, arXiv 2009.12991.
    """
    check_num_classes("class_mean", num_classes)
    if num_features < 1:
        raise ValueError(
            "longtail.class_mean needs `num_features` >= 1, got "
            f"{num_features}: pass the width of the features"
        )
    return ClassMean(momentum, int(num_classes), int(num_features), axis_name)


def _summed_all(xs: tuple[Array, ...], axis_name: Axis) -> tuple[Array, ...]:
    return tuple(sum_over_devices(x, axis_name) for x in xs)


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
