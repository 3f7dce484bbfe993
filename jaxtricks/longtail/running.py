"""Running means of features, of each class and of all: centres, `heads.ncm` and `heads.tde`."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._tree import node, static
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import class_indices, floating
from jaxtricks.longtail._softmax import _are_hard
from jaxtricks.longtail._stateful import Axis, _at_least_one, _counted, _summed
from jaxtricks.longtail.gap import is_label


@node
class ClassMeanState:
    """What `class_mean` remembers: sums that decay, and by how much they have filled up.

    Attributes:
      sums: [C, D] decayed sum of the batch means of each class.
      weights: [C] decayed sum of ones, so that sums / weights is a mean from the first batch on.
      sum: [D] and
      weight: [] the same over all classes.
    """

    sums: Array
    weights: Array
    sum: Array
    weight: Array

    @property
    def means(self) -> Float[Array, "C D"]:
        """Mean feature of each class; 0 for a class that was not seen."""
        return _ratio(self.sums, self.weights[:, None])

    @property
    def mean(self) -> Float[Array, "D"]:
        """Mean feature of all examples: the `direction` of `heads.tde`."""
        return _ratio(self.sum, self.weight)

    @property
    def seen(self) -> Bool[Array, "C"]:
        """Classes that had examples."""
        return self.weights > 0


@node
class ClassMean:
    """The pair of `class_mean`: a pytree.

    Attributes:
      momentum: what is kept of the old mean.
      num_classes: C.
      num_features: D.
      axis_name: mapped axes to average over, or None.
    """

    momentum: Scalar
    num_classes: int = static()
    num_features: int = static()
    axis_name: Axis = static()

    def init(self) -> ClassMeanState:
        """The state before the first batch."""
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
          labels: [...] integers, or [..., C] probabilities. An integer outside [0, C) counts in the
            mean of all only.
          where: [...] booleans; a masked example is left out.

        Returns:
          [C, D] means, and the new state.

        Raises:
          ValueError: where the shapes do not fit.
        """
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"longtail.class_mean: `features` are {features.shape[-1]} wide where the pair has "
                f"{self.num_features}: pass another `num_features`"
            )
        x = floating(jax.lax.stop_gradient(jnp.asarray(features)))
        keep = _counted(x, None, where)
        x = jnp.where(keep[..., None], x, 0).reshape(-1, x.shape[-1])
        member = jnp.where(keep[..., None], self._members(labels, features, x), 0)
        member, keep = member.reshape(-1, self.num_classes), keep.reshape(-1).astype(x.dtype)
        batch = (member.T @ x, jnp.sum(member, axis=0), keep @ x, jnp.sum(keep))
        sums, total, sum_, number = _summed_all(batch, self.axis_name)
        new = ClassMeanState(
            self._moved(state.sums, _ratio(sums, total[:, None]), total[:, None]),
            self._moved(state.weights, jnp.ones_like(total), total),
            self._moved(state.sum, _ratio(sum_, number), number),
            self._moved(state.weight, jnp.ones_like(number), number),
        )
        return new.means, new

    def _members(self, labels: Array, features: Array, x: Array) -> Array:
        labels = jax.lax.stop_gradient(jnp.asarray(labels))
        like = jnp.zeros((*features.shape[:-1], self.num_classes), x.dtype)
        if not _are_hard(labels, like):
            return labels.astype(x.dtype)
        return is_label(class_indices(labels), like).astype(x.dtype)

    def _moved(self, old: Array, batch: Array, total: Array) -> Array:
        mu = jnp.asarray(self.momentum).astype(old.dtype)
        return jnp.where(total > 0, mu * old + (1 - mu) * batch.astype(old.dtype), old)


@checked
def class_mean(
    num_classes: int, num_features: int, *, momentum: Scalar = 0.9, axis_name: Axis = None
) -> ClassMean:
    """Exponential moving average of the features of each class, and of all.

    m_c <- mu m_c + (1 - mu) mean{x_i : y_i = c}, only where the batch has examples of class c, divided
    by the share 1 - mu^k that k such batches have filled: an average from the first batch on, never
    drawn to zero. The mean over all examples has the direction of the running sum m <- mu m + mean(x)
    that the de-confounded classifier subtracts, which does not see its length.

    Args:
      num_classes: C.
      num_features: D.
      momentum: mu in [0, 1). May be traced.
      axis_name: mapped axes to average over, inside shard_map or a named vmap.

    Returns:
      A pair: init(), update(state, features [..., D], labels, where=None) -> (means [C, D], state);
      the state has `.means`, `.mean` and `.seen`.

    Raises:
      ValueError: if num_classes or num_features is below 1.

    >>> centres = class_mean(3, 1, momentum=0.5)
    >>> x, y = jnp.array([[1.0], [3.0], [8.0]]), jnp.array([0, 0, 1])
    >>> means, state = centres.update(centres.init(), x, y)
    >>> print(means[:, 0], state.mean, state.seen)
    [2. 8. 0.] [4.] [ True  True False]

    References:
      Tang et al., Long-tailed classification by keeping the good and removing the bad momentum
      causal effect, arXiv 2009.12991.
    """
    _at_least_one("class_mean", num_classes)
    if num_features < 1:
        raise ValueError(
            f"longtail.class_mean needs `num_features` >= 1, got {num_features}: pass the width of "
            "the features"
        )
    return ClassMean(momentum, int(num_classes), int(num_features), axis_name)


def _summed_all(xs: tuple[Array, ...], axis_name: Axis) -> tuple[Array, ...]:
    return tuple(_summed(x, axis_name) for x in xs)


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
