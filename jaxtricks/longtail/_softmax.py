"""One softmax loss, and the logit transforms that turn it into the losses of the literature.

Every transform of the family is affine in the logits and shifts the logit of the label at most by
a margin. So any composition has the normal form

    z'_j = gain_j z_j + offset_j - margin_y [j = y],

and a transform is a function from one normal form to the next. The form is what makes a soft label
cost no more than a hard one (see `SoftmaxLoss`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer, Real

from jaxtricks._arguments import checked
from jaxtricks._tree import node
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import (
    Counts,
    are_classes,
    as_mask,
    as_vector,
    at_least_rarest,
    check_labels,
    class_indices,
    floating,
    log_prior,
)
from jaxtricks.longtail.gap import expected, gap, gaps, of_label, rows


@node
class Affine:
    """z'_j = gain_j z_j + offset_j - margin_y [j = y].

    Attributes:
      gain: [C] factor of each logit, or [] of all of them.
      offset: [C] what is added to each logit.
      margin: [C] what is subtracted from the logit of the label, indexed by the label.
    """

    gain: Array
    offset: Array
    margin: Array


Transform = Callable[[Affine], Affine]
"""A logit transform: what follows it in the list is applied to its result."""


@node
class _Scale:
    s: Scalar

    @checked
    def __call__(self, form: Affine) -> Affine:
        s = jnp.asarray(self.s).astype(form.gain.dtype)
        return Affine(form.gain * s, form.offset * s, form.margin * s)


@node
class _Margin:
    m: Array | Scalar

    @checked
    def __call__(self, form: Affine) -> Affine:
        m = _per_class("margin: `m`", self.m, form)
        return Affine(form.gain, form.offset, form.margin + m)


@node
class _AddLogPrior:
    counts: Array
    tau: Scalar

    @checked
    def __call__(self, form: Affine) -> Affine:
        counts = _per_class("add_log_prior: `counts`", self.counts, form)
        tau = jnp.asarray(self.tau).astype(form.gain.dtype)
        return Affine(form.gain, form.offset + tau * log_prior(counts), form.margin)


@node
class _Temper:
    counts: Array
    gamma: Scalar

    @checked
    def __call__(self, form: Affine) -> Affine:
        n = at_least_rarest(_per_class("temper: `counts`", self.counts, form))
        gamma = jnp.asarray(self.gamma).astype(n.dtype)
        factor = jnp.exp(gamma * (jnp.log(n) - jnp.log(jnp.max(n))))
        return Affine(form.gain * factor, form.offset * factor, form.margin * factor)


@checked
def scale(s: Scalar) -> Transform:
    """Multiply the logits: z -> s z (an inverse temperature; cosine heads need 10 to 30).

    Args:
      s: scalar; may be traced and differentiated.

    Returns:
      A logit transform for `softmax_loss`.
    """
    return _Scale(s)


@checked
def margin(m: Counts | Scalar) -> Transform:
    """Subtract a margin from the logit of the label: z_y -> z_y - m_y.

    Args:
      m: [C] margins in units of the logits as they are at this point, or one for all classes.

    Returns:
      A logit transform for `softmax_loss`.
    """
    return _Margin(jnp.asarray(m))


@checked
def add_log_prior(counts: Counts, tau: Scalar = 1.0) -> Transform:
    """Add the log prior: z_j -> z_j + tau log(n_j / sum n).

    A class without examples counts as one of prior 1e-12: out of the softmax, without an infinity.

    Args:
      counts: [C] training examples per class; may be traced.
      tau: strength; 1 is the calibrated choice; may be traced, differentiated and vmapped.

    Returns:
      A logit transform for `softmax_loss`.

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation 10.
    """
    return _AddLogPrior(as_vector("add_log_prior: `counts`", counts), tau)


@checked
def temper(counts: Counts, gamma: Scalar) -> Transform:
    """Divide each logit by its class's temperature: z_j -> z_j / (n_max / n_j)^gamma.

    A class without examples gets the temperature of the rarest class that has some.

    Args:
      counts: [C] training examples per class; may be traced.
      gamma: strength; 0 changes nothing; may be traced, differentiated and vmapped.

    Returns:
      A logit transform for `softmax_loss`.

    References:
      Ye et al., Identifying and compensating for feature deviation, arXiv 2001.01385.
    """
    return _Temper(as_vector("temper: `counts`", counts), gamma)


@node
class SoftmaxLoss:
    """w_y (1 - p_y)^gamma (-log p_y), p = softmax of the transformed logits. A pytree, and callable.

    Pass it through jit as an argument and new counts, weights, tau or gamma need no new trace.
    The loss of a soft label q is the expectation of the loss of a hard one, sum_c q_c loss(c): the
    usual mixup rule, with margins, weights and the focal factor of each class its own.

    Attributes:
      transforms: the logit transforms, applied left to right.
      weights: [C] weight of each class, or None.
      focal_gamma: exponent of the focal factor; 0 is none.
    """

    transforms: tuple[Transform, ...]
    weights: Array | None
    focal_gamma: Scalar

    @checked
    def __call__(
        self,
        logits: Float[Array, "*batch C"],
        labels: Integer[Array, "*batch"] | Float[Array, "*batch C"],
        *,
        where: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """The loss of every example, in float32 or wider.

        Args:
          logits: [..., C], any floating dtype; -inf means "this class is not offered".
          labels: [...] integers in [0, C), or [..., C] probabilities.
          where: [...] booleans; a masked example costs 0, has no gradient, and may hold any label
            and any logits, NaN included.

        Returns:
          [...] unreduced losses; 0 for an integer label outside [0, C), which outside of jit raises
          unless it is masked. NaN where a logit is NaN or inf, inf where the label is a class that is
          not offered.

        Raises:
          ValueError: where the shapes do not fit each other or the counts; for a label outside [0, C)
            that is not masked, where its value is known.
        """
        logits = floating(jnp.asarray(logits))
        if where is not None:  # before the arithmetic: 0 times the gradient of a NaN is a NaN
            where = as_mask(where, logits.shape[:-1])
            logits = jnp.where(where[..., None], logits, 0)
        form = self._form(logits)
        if _are_hard(labels, logits):
            check_labels(labels, logits.shape[-1], where)
            loss = self._hard(logits, class_indices(labels), form)
        else:
            z = rows(form.gain, logits) * logits + rows(form.offset, logits)
            loss = self._soft(z, floating(jnp.asarray(labels)), form)
        return loss if where is None else jnp.where(where, loss, 0)

    def _form(self, logits: Array) -> Affine:
        num_classes, dtype = logits.shape[-1], logits.dtype
        form = Affine(jnp.ones((), dtype), *[jnp.zeros(num_classes, dtype)] * 2)
        for transform in self.transforms:
            form = transform(form)
        return form

    def _hard(self, z: Array, labels: Array, form: Affine) -> Array:
        distance = gap(z, form.gain, form.offset, labels) + of_label(form.margin, labels, z)
        loss = self._of_gap(distance)
        if self.weights is not None:
            loss *= of_label(self._class_weights(form), labels, z)
        return jnp.where(are_classes(labels, z.shape[-1]), loss, 0)

    def _soft(self, z: Array, labels: Array, form: Affine) -> Array:
        distance, offered = gaps(z)
        q = labels.astype(z.dtype) * rows(self._class_weights(form), z)
        return expected(q, self._of_gap(distance + rows(form.margin, z)), offered)

    def _of_gap(self, distance: Array) -> Array:
        # p_y = sigmoid(-gap): -log p_y and log(1 - p_y) are exact even where p_y rounds to 1.
        if isinstance(self.focal_gamma, int | float) and self.focal_gamma == 0:
            return jax.nn.softplus(distance)
        gamma = jnp.asarray(self.focal_gamma).astype(distance.dtype)
        # At inf the factor is 1: its derivative is 0, and 0 times the loss would be NaN.
        infinite = jnp.isposinf(distance)
        finite = jnp.where(infinite, 0, distance)
        loss = jax.nn.softplus(finite) * jnp.exp(-gamma * jax.nn.softplus(-finite))
        return jnp.where(infinite, distance, loss)

    def _class_weights(self, form: Affine) -> Array:
        if self.weights is None:
            return jnp.ones_like(form.offset)
        return _per_class("softmax_loss: `weights`", self.weights, form)


@checked
def softmax_loss(
    *transforms: Transform, weights: Counts | None = None, focal_gamma: Scalar = 0.0
) -> SoftmaxLoss:
    """Cross entropy of transformed logits, weighted and focused: the algebra behind every preset.

    loss = w_y (1 - p_y)^focal_gamma (-log p_y), p = softmax(t_k(... t_1(z))).

    Args:
      *transforms: `scale`, `margin`, `add_log_prior`, `temper`, or your own function of `Affine`;
        applied left to right.
      weights: [C] class weights, or None for ones.
      focal_gamma: exponent of the focal factor; 0 is none. May be traced and differentiated.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].

    >>> loss = softmax_loss(add_log_prior([90, 10]), focal_gamma=1.0)
    >>> loss(jnp.zeros((1, 2)), jnp.array([1])).round(3)
    Array([2.072], dtype=float32)
    """
    w = None if weights is None else as_vector("softmax_loss: `weights`", weights)
    return SoftmaxLoss(tuple(transforms), w, focal_gamma)


def _are_hard(labels: Real[Array, "..."], logits: Array) -> bool:
    labels = jnp.asarray(labels)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape == logits.shape[:-1] and integers:
        return True
    if labels.shape == logits.shape and not integers:
        return False
    raise ValueError(
        f"longtail: `labels` {labels.dtype}{list(labels.shape)} do not fit `logits` "
        f"{list(logits.shape)}: pass integers [...] or probabilities [..., C]"
    )


def _per_class(name: str, values: Array | Scalar, form: Affine) -> Array:
    values = jnp.asarray(values)
    num_classes = form.offset.shape[-1]
    if values.shape not in ((), (num_classes,)):
        raise ValueError(
            f"longtail.{name} has shape {values.shape} where the logits have {num_classes} classes: "
            "pass one number per class"
        )
    return jnp.broadcast_to(values.astype(form.gain.dtype), (num_classes,))
