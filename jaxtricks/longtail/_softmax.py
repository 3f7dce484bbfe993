"""Compute softmax losses of transformed logits, through the gap above the label.

gap = log sum_{j != y} exp(z'_j) - z'_y with z' = gain z + offset. The label is left out
of the sum, so that softplus(gap) = -log p_y and softplus(-gap) = -log(1 - p_y) are
exact even where p_y rounds to 1.

The forward and backward pass read and write [..., C] as often as those of plain cross
entropy: the maximum is that of the bare logits, which bounds the others closely enough,
and the derivative reuses the exponentials.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Bool, Float, Integer, Real

from jaxtricks import _sharding
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

_SLACK = 100.0
"""Largest distance of the bounds on the largest logit: sums of many e^50 are finite."""


def gap(z: Array, gain: Array, offset: Array, labels: Array) -> Array:
    """Compute how far all other classes are above the label.

    log sum_{j != y} exp(gain_j z_j + offset_j) - (gain_y z_y + offset_y)

    Args:
      z: [..., C] logits; -inf is a class that is not offered.
      gain: [C], or [] for all, positive.
      offset: [C], finite.
      labels: [...] int32; what is outside of [0, C) gets any number.

    Returns:
      [...]; a very low number where no other class is offered, inf where the class of
      the label is not, NaN where a logit is NaN or inf.
    """
    top = jax.lax.stop_gradient(_top(z, gain, offset))
    return _gap(z, gain, offset, top, labels)


def _top(z: Array, gain: Array, offset: Array) -> Array:
    """Return nearly the largest of gain z + offset, within _SLACK / 2."""
    largest = jnp.max(z, axis=-1)
    # -inf is a row without any class.
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    ends = jnp.min(gain) * largest, jnp.max(gain) * largest
    low = jnp.minimum(*ends) + jnp.min(offset)
    high = jnp.maximum(*ends) + jnp.max(offset)
    # With a single gain the offsets [C] alone decide how far apart the bounds are, so
    # the batch need not be reduced.
    apart = (
        jnp.max(offset) - jnp.min(offset)
        if gain.ndim == 0
        else jnp.max(high - low)
    )
    return jax.lax.cond(
        apart <= _SLACK,
        lambda z: (
            low / 2 + high / 2
        ),  # their sum may be beyond the largest float
        lambda z: jnp.maximum(
            jnp.max(_affine(z, gain, offset), axis=-1), lowest(z)
        ),
        z,
    )


@jax.custom_jvp
def _gap(
    z: Array, gain: Array, offset: Array, top: Array, labels: Array
) -> Array:
    return _parts(z, gain, offset, top, labels)[0]


def _gap_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    z, gain, _, _, labels = primals
    out, terms, total = _parts(*primals)
    # The derivative is the softmax over the other classes, and -1 at the label.
    share = terms * (1 / jnp.where(total == 0, 1, total))[..., None]
    share = jnp.where(is_label(labels, z), -1, share)
    dz, dgain, doffset = tangents[:3]
    # Symbolic zeros: constants such as counts cost nothing in the backward pass.
    moves = []
    if not isinstance(dz, SymbolicZero):
        moves.append(rows(gain, z) * dz)
    if not isinstance(dgain, SymbolicZero):
        moves.append(rows(dgain, z) * jnp.where(jnp.isneginf(z), 0, z))
    if not isinstance(doffset, SymbolicZero):
        moves.append(rows(doffset, z))
    if not moves:
        return out, jnp.zeros_like(out)
    return out, jnp.sum(share * sum(moves[1:], moves[0]), axis=-1)


_gap.defjvp(_gap_jvp, symbolic_zeros=True)


def _parts(
    z: Array, gain: Array, offset: Array, top: Array, labels: Array
) -> tuple[Array, Array, Array]:
    """Return (gap, exp(z' - top) of the other classes, their sum)."""
    terms = jnp.exp(_affine(z, gain, offset) - top[..., None])
    # Indices into sharded logits would gather the logits or the indices.
    if _sharding.on_mesh(z):
        terms, at_label = _by_mask(terms, z, labels)
    else:
        terms, at_label = jax.lax.platform_dependent(
            terms, z, labels, cpu=_by_index, default=_by_mask
        )
    total = jnp.sum(terms, axis=-1)
    gain_at_label = gain if gain.ndim == 0 else of_label(gain, labels, z)
    at_label = gain_at_label * at_label + of_label(offset, labels, z)
    # == 0 and not <= 0 or ~(> 0): a NaN total must not count as no other class.
    alone = total == 0
    # Subtract first: the log 2 of two equal logits would be lost beside 1e30.
    distance = (top - at_label) + jnp.log(jnp.where(alone, 1, total))
    when_alone = jnp.where(jnp.isfinite(at_label), floor(z), jnp.nan)
    distance = jnp.where(alone, when_alone, distance)
    return distance, terms, total


def of_label(vector: Array, labels: Array, z: Array) -> Array:
    """Return vector[labels] of a [C] vector, for labels [...] of logits z [..., C]."""
    # Because a gather does not propagate the sharding.
    if _sharding.is_explicit(z):
        zero = jnp.zeros((), vector.dtype)
        return jnp.sum(
            jnp.where(is_label(labels, z), rows(vector, z), zero), axis=-1
        )
    return vector[jnp.clip(labels, 0, z.shape[-1] - 1)]


def _by_index(terms: Array, z: Array, labels: Array) -> tuple[Array, Array]:
    """Return (terms of the other classes, label's logit), by scatter and gather."""
    at = jnp.clip(labels, 0, z.shape[-1] - 1)[..., None]
    others = jnp.put_along_axis(
        terms, at, jnp.zeros((), z.dtype), axis=-1, inplace=False
    )
    return others, jnp.take_along_axis(z, at, axis=-1)[..., 0]


def _by_mask(terms: Array, z: Array, labels: Array) -> tuple[Array, Array]:
    """Return the same by a mask, which accelerators fuse and sharded axes need."""
    at_label = is_label(labels, z)
    zero = jnp.zeros((), z.dtype)
    return jnp.where(at_label, zero, terms), jnp.sum(
        jnp.where(at_label, z, zero), axis=-1
    )


def is_label(labels: Array, z: Array) -> Array:
    """Return the one-hot classes of labels, bool [..., C]; none outside [0, C)."""
    return labels[..., None] == rows(
        jnp.arange(z.shape[-1], dtype=labels.dtype), z
    )


def _affine(z: Array, gain: Array, offset: Array) -> Array:
    return rows(gain, z) * z + rows(offset, z)


def rows(vector: Array, like: Array) -> Array:
    """Give a [C] or [] vector the leading axes of `like` [..., C]."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def floor(z: Array) -> Array:
    """Return a low stand-in for a logit of -inf; differences of two are finite."""
    return jnp.asarray(jnp.finfo(z.dtype).min / 8, z.dtype)


def lowest(z: Array) -> Array:
    """Return the lowest finite number of the logits' dtype."""
    return jnp.asarray(jnp.finfo(z.dtype).min, z.dtype)


def gaps(z: Array, left_out: Array | None = None) -> tuple[Array, Array]:
    """Compute `gap` of every class at once, and which classes are offered.

    Args:
      z: [..., C] logits; -inf is a class that is not offered.
      left_out: [..., C] bool, classes that are in no sum, or None.

    Returns:
      [..., C] log sum_{j != c} exp z_j - z_c, and 0 for a class that is not offered;
      [..., C] bool.
    """
    offered = ~jnp.isneginf(z)
    largest = jnp.max(z, axis=-1, keepdims=True)
    # Relative to the largest logit, so that no logarithm is added to 1e30.
    z = z - jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0, largest))
    others = _logsumexp_of_others(
        z if left_out is None else jnp.where(left_out, lowest(z), z)
    )
    distance = others - jnp.where(offered, z, 0)
    # Finite where no other class is offered, so that its focal factor has a derivative.
    return jnp.where(offered, jnp.maximum(distance, floor(z)), 0), offered


def _logsumexp_of_others(z: Array) -> Array:
    """Compute log sum_{j != c} exp z_j for every c at once, without cancellation.

    Logits of -inf are not in the sum.
    """
    top = jnp.argmax(z, axis=-1, keepdims=True) == rows(
        jnp.arange(z.shape[-1]), z
    )
    total = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    # The lowest float adds nothing to the others, and has a gradient if there are none.
    without_top = jax.nn.logsumexp(
        jnp.where(top, lowest(z), z), axis=-1, keepdims=True
    )
    # At most 1/2 wherever it is used.
    share = jnp.exp(jnp.where(top, total - 1, z) - total)
    return jnp.where(top, without_top, total + jnp.log1p(-share))


def expected(q: Array, each: Array, offered: Array) -> Array:
    """Compute sum_c q_c each_c [...].

    A class that is not offered costs inf where q_c > 0, else nothing.
    """
    # A class without a share may cost inf, and 0 times that would be NaN.
    counts = offered & ((q != 0) | jnp.isnan(each))
    total = jnp.sum(jnp.where(counts, q * each, 0), axis=-1)
    return total + jnp.where(jnp.any(~offered & (q > 0), axis=-1), jnp.inf, 0)


# One softmax loss, and the logit transforms that turn it into the losses of the
# literature.
#
# Every transform of the family is affine in the logits and shifts the logit of the
# label at most by a margin. So any composition has the normal form
#
#     z'_j = gain_j z_j + offset_j - margin_y [j = y],
#
# and a transform is a function from one normal form to the next. The form is what makes
# a soft label cost no more than a hard one (see `SoftmaxLoss`).


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
        return Affine(
            form.gain, form.offset + tau * log_prior(counts), form.margin
        )


@node
class _Temper:
    counts: Array
    gamma: Scalar

    @checked
    def __call__(self, form: Affine) -> Affine:
        n = at_least_rarest(_per_class("temper: `counts`", self.counts, form))
        gamma = jnp.asarray(self.gamma).astype(n.dtype)
        factor = jnp.exp(gamma * (jnp.log(n) - jnp.log(jnp.max(n))))
        return Affine(
            form.gain * factor, form.offset * factor, form.margin * factor
        )


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
      m: [C] margins in units of the logits as they are at this point, or one for all
        classes.

    Returns:
      A logit transform for `softmax_loss`.
    """
    return _Margin(jnp.asarray(m))


@checked
def add_log_prior(counts: Counts, tau: Scalar = 1.0) -> Transform:
    """Add the log prior: z_j -> z_j + tau log(n_j / sum n).

    A class without examples counts as one of prior 1e-12: out of the softmax, without
    an infinity.

    Args:
      counts: [C] training examples per class; may be traced.
      tau: strength; 1 is the calibrated choice; may be traced, differentiated and
        vmapped.

    Returns:
      A logit transform for `softmax_loss`.

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation
      10.
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

    Pass it through jit as an argument and new counts, weights, tau or gamma need no new
    trace. The loss of a soft label q is the expectation of the loss of a hard one,
    sum_c q_c loss(c): the usual mixup rule, with margins, weights and the focal factor
    one per class.

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
        """Compute the loss of every example, in float32 or wider.

        Args:
          logits: [..., C], any floating dtype; -inf means "this class is not offered".
          labels: [...] integers in [0, C), or [..., C] probabilities.
          where: [...] booleans; a masked example costs 0, has no gradient, and may hold
            any label and any logits, NaN included.

        Returns:
          [...] unreduced losses; 0 for an integer label outside [0, C), which outside
          of jit raises unless it is masked. NaN where a logit is NaN or inf, inf where
          the label is a class that is not offered.

        Raises:
          ValueError: where the shapes do not fit each other or the counts; for a label
            outside [0, C) that is not masked, where its value is known.
        """
        logits = floating(jnp.asarray(logits))
        # Before the arithmetic: 0 times the gradient of a NaN is a NaN.
        if where is not None:
            where = as_mask(where, logits.shape[:-1])
            logits = jnp.where(where[..., None], logits, 0)
        form = self._form(logits)
        if are_hard(labels, logits):
            check_labels(labels, logits.shape[-1], where)
            loss = self._hard(logits, class_indices(labels), form)
        else:
            z = rows(form.gain, logits) * logits + rows(form.offset, logits)
            loss = self._soft(z, floating(jnp.asarray(labels)), form)
        return loss if where is None else jnp.where(where, loss, 0)

    def _form(self, logits: Array) -> Affine:
        num_classes = logits.shape[-1]
        dtype = logits.dtype
        form = Affine(jnp.ones((), dtype), *[jnp.zeros(num_classes, dtype)] * 2)
        for transform in self.transforms:
            form = transform(form)
        return form

    def _hard(self, z: Array, labels: Array, form: Affine) -> Array:
        distance = gap(z, form.gain, form.offset, labels) + of_label(
            form.margin, labels, z
        )
        loss = self._of_gap(distance)
        if self.weights is not None:
            loss *= of_label(self._class_weights(form), labels, z)
        return jnp.where(are_classes(labels, z.shape[-1]), loss, 0)

    def _soft(self, z: Array, labels: Array, form: Affine) -> Array:
        distance, offered = gaps(z)
        q = labels.astype(z.dtype) * rows(self._class_weights(form), z)
        return expected(
            q, self._of_gap(distance + rows(form.margin, z)), offered
        )

    def _of_gap(self, distance: Array) -> Array:
        # p_y = sigmoid(-gap): -log p_y and log(1 - p_y) are exact even where p_y rounds
        # to 1.
        if isinstance(self.focal_gamma, int | float) and self.focal_gamma == 0:
            return jax.nn.softplus(distance)
        gamma = jnp.asarray(self.focal_gamma).astype(distance.dtype)
        # At inf the factor is 1: its derivative is 0, and 0 times the loss would be
        # NaN.
        infinite = jnp.isposinf(distance)
        finite = jnp.where(infinite, 0, distance)
        loss = jax.nn.softplus(finite) * jnp.exp(
            -gamma * jax.nn.softplus(-finite)
        )
        return jnp.where(infinite, distance, loss)

    def _class_weights(self, form: Affine) -> Array:
        if self.weights is None:
            return jnp.ones_like(form.offset)
        return _per_class("softmax_loss: `weights`", self.weights, form)


@checked
def softmax_loss(
    *transforms: Transform,
    weights: Counts | None = None,
    focal_gamma: Scalar = 0.0,
) -> SoftmaxLoss:
    """Build cross entropy of transformed logits, the algebra behind every preset.

    loss = w_y (1 - p_y)^focal_gamma (-log p_y), p = softmax(t_k(... t_1(z))).

    Args:
      *transforms: `scale`, `margin`, `add_log_prior`, `temper`, or a function of
        `Affine`; applied left to right.
      weights: [C] class weights, or None for ones.
      focal_gamma: exponent of the focal factor; 0 is none. May be traced and
        differentiated.

    Returns:
      loss(logits [..., C], labels [...] or [..., C], where=None) -> per-example [...].

    >>> loss = softmax_loss(add_log_prior([90, 10]), focal_gamma=1.0)
    >>> loss(jnp.zeros((1, 2)), jnp.array([1])).round(3)
    Array([2.072], dtype=float32)
    """
    w = (
        None
        if weights is None
        else as_vector("softmax_loss: `weights`", weights)
    )
    return SoftmaxLoss(tuple(transforms), w, focal_gamma)


def are_hard(labels: Real[Array, "..."], logits: Array) -> bool:
    labels = jnp.asarray(labels)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape == logits.shape[:-1] and integers:
        return True
    if labels.shape == logits.shape and not integers:
        return False
    raise ValueError(
        f"longtail: `labels` {labels.dtype}{list(labels.shape)} do not fit "
        f"`logits` {list(logits.shape)}: pass integers [...] or probabilities "
        "[..., C]"
    )


def _per_class(name: str, values: Array | Scalar, form: Affine) -> Array:
    values = jnp.asarray(values)
    num_classes = form.offset.shape[-1]
    if values.shape not in ((), (num_classes,)):
        raise ValueError(
            f"longtail.{name} has shape {values.shape} where the logits have "
            f"{num_classes} classes: pass one number per class"
        )
    return jnp.broadcast_to(values.astype(form.gain.dtype), (num_classes,))
