"""Adjust the logits of a trained model to another class prior."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Scalar
from jaxtricks.longtail._counts import (
    UNSEEN_LOG_PRIOR,
    Counts,
    are_classes,
    as_mask,
    as_vector,
    class_indices,
    floating,
    has_examples,
    log_prior,
)

__all__ = [
    "Calibration",
    "adjust",
    "calibrate",
    "estimate_prior",
    "fit_tau",
    "shift_prior",
]


class HeldOut(NamedTuple):
    """Held-out examples in a row, [N, C], [N] and [N], and the counts [C]; every class weighs the same."""

    logits: Array
    labels: Array
    member: Array
    counts: Array


def held_out(
    name: str, logits: Array, labels: Array, counts: Counts, where: Array | None
) -> HeldOut:
    """Return the held-out examples that count; replace the rest."""
    z = floating(jnp.asarray(logits))
    y = class_indices(labels).reshape(-1)
    n = as_vector(f"posthoc.{name}: `counts`", counts).astype(z.dtype)
    check_classes(name, "counts", n, z)
    batch = z.shape[:-1]
    z = z.reshape(-1, z.shape[-1])
    inside = are_classes(y, z.shape[-1])
    y = jnp.where(inside, y, 0)
    keep = inside & has_examples(n)[y]
    keep = keep if where is None else keep & as_mask(where, batch).reshape(-1)
    return HeldOut(jnp.where(keep[:, None], z, 0), y, keep, n)


def balanced(values: Array, held: HeldOut) -> Array:
    """Average per class, then over the classes that have examples."""
    size = held.counts.shape[0]
    member = held.member.astype(values.dtype)
    total = (
        jnp.zeros(size, values.dtype)
        .at[held.labels]
        .add(jnp.where(held.member, values, 0))
    )
    members = jnp.zeros(size, values.dtype).at[held.labels].add(member)
    means = total / jnp.maximum(members, 1)
    return jnp.sum(means) / jnp.maximum(jnp.sum(members > 0), 1).astype(
        values.dtype
    )


def centered_shift(counts: Array) -> tuple[Array, Array]:
    """Return (classes that take part, -log prior less its mean).

    Centered, balanced counts leave tau without effect.
    """
    present = has_examples(counts)
    offered = present | ~jnp.any(present)
    shift = jnp.where(present, -log_prior(counts), 0)
    center = jnp.sum(shift) / jnp.maximum(jnp.sum(present), 1).astype(
        shift.dtype
    )
    return offered, jnp.where(present, shift - center, 0)


def balanced_cross_entropy(
    theta: Array, z: Array, shift: Array, offered: Array, held: HeldOut
) -> tuple[Array, Array, Array]:
    """Return value, gradient and Hessian by theta of the balanced cross entropy.

    The scores are theta_0 z + theta_1 shift.
    """
    scores = jnp.where(
        offered[None], theta[0] * z + theta[1] * shift[None], -jnp.inf
    )
    log_p = jax.nn.log_softmax(scores, axis=-1)
    label_index = held.labels[:, None]
    p = jnp.exp(log_p)
    a = shift[None]
    mean_z = jnp.sum(p * z, -1)
    mean_a = jnp.sum(p * a, -1)
    # Centred, so that variances are not differences of large squares.
    dz = z - mean_z[:, None]
    da = a - mean_a[:, None]
    log_p_label = jnp.take_along_axis(log_p, label_index, -1)[:, 0]
    z_label = jnp.take_along_axis(z, label_index, -1)[:, 0]
    terms = (
        -log_p_label,
        mean_z - z_label,
        mean_a - shift[held.labels],
        jnp.sum(p * dz * dz, -1),
        jnp.sum(p * dz * da, -1),
        jnp.sum(p * da * da, -1),
    )
    value, *gradient, zz, za, aa = (balanced(term, held) for term in terms)
    return value, jnp.stack(gradient), jnp.stack([zz, za, za, aa]).reshape(2, 2)


def check_classes(function: str, name: str, values: Array, z: Array) -> None:
    """Raise unless there is one number per logit."""
    if values.shape[0] != z.shape[-1]:
        raise ValueError(
            f"longtail.posthoc.{function}: `{name}` has {values.shape[0]} "
            f"classes where the logits have {z.shape[-1]}: pass one number per "
            "class"
        )


# Corrections at test time, for a model trained with the plain loss.


@checked
def adjust(
    logits: Float[Array, "*batch C"], counts: Counts, tau: Scalar = 1.0
) -> Float[Array, "*batch C"]:
    """Adjust logits after training: z_c - tau log(n_c / sum n).

    For logits of a model trained with plain cross entropy. Never together with a loss
    that knows the prior already (`balanced_softmax`, `logit_adjusted`, `vs`): that
    would count it twice.

    A class without training examples has no prior to divide by; taken literally it
    would win every time. It is held back instead, by tau * 27.6 (a factor of 1e-12 to
    the power tau).

    Args:
      logits: [..., C] of a trained model.
      counts: [C] training examples per class; may be traced.
      tau: strength; choose it on held-out data by balanced accuracy. Traced,
        differentiable.

    Returns:
      [..., C] adjusted logits in float32 or wider.

    Raises:
      ValueError: if counts has not one entry per logit.

    >>> adjust(jnp.array([[2.0, 0.5]]), [90, 10]).argmax(-1)
    Array([1], dtype=int32)

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, equation
      9.
    """
    z = floating(jnp.asarray(logits))
    n = as_vector("posthoc.adjust: `counts`", counts).astype(z.dtype)
    check_classes("adjust", "counts", n, z)
    shift = jnp.where(has_examples(n), -log_prior(n), UNSEEN_LOG_PRIOR)
    shift = jnp.asarray(tau).astype(z.dtype) * shift
    return z + shift.reshape((1,) * (z.ndim - 1) + shift.shape)


@checked
def shift_prior(
    logits: Float[Array, "*batch C"], source: Counts, target: Counts
) -> Float[Array, "*batch C"]:
    """Shift logits between class priors: z_c - log source_c + log target_c.

    For logits calibrated to the source prior. Those of a model trained with a
    prior-adjusted loss (`balanced_softmax`, `lade`) are calibrated to a uniform one:
    pass ones as the source.

    A class that the source lacks is held back by 27.6 (a factor of 1e-12), as in
    `adjust`; so is one that the target lacks, beside its source prior.

    Args:
      logits: [..., C].
      source: [C] counts or probabilities, of the prior in the logits; need not sum to
        1.
      target: [C] counts or probabilities, of the prior wanted. Both may be traced.

    Returns:
      [..., C] shifted logits in float32 or wider.

    Raises:
      ValueError: if a prior has not one entry per logit.

    >>> shift_prior(jnp.zeros((1, 2)), [1, 1], [3, 1]).round(4)
    Array([[ 0.4055, -0.6931]], dtype=float32)

    References:
      Hong et al., LADE, arXiv 2012.00321.
    """
    z = floating(jnp.asarray(logits))
    old = _prior("source", source, z)
    new = _prior("target", target, z)
    shift = jnp.where(
        has_examples(old), log_prior(new) - log_prior(old), UNSEEN_LOG_PRIOR
    )
    return z + shift.reshape((1,) * (z.ndim - 1) + shift.shape)


@checked
def fit_tau(
    logits: Float[Array, "*batch C"],
    labels: Integer[Array, "*batch"],
    counts: Counts,
    *,
    taus: Sequence[Any] | Float[Array, "T"] | None = None,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Fit tau of `adjust` so that held-out data are predicted best, all classes alike.

    By default the minimum of the smooth loss of `calibrate`, tau * temperature of it;
    with `taus` the one of them with the best balanced accuracy. The held-out data may
    be as long-tailed as the training data, since every class counts the same; with few
    examples of a class its accuracy is a rough number, and the smooth loss chooses
    better (simulated with 300 examples of 10 classes, imbalance 100: 0.7 points of
    balanced accuracy lost against 1.9).

    Args:
      logits: [..., C] on held-out examples, of a model trained with plain cross
        entropy.
      labels: [...] integers; an example whose label is not in [0, C), or is of a class
        without training examples, does not count.
      counts: [C] training examples per class; may be traced.
      taus: [T] candidates, np.linspace(0, 2, 41) say, or None.
      where: [...] booleans; a masked example does not count.

    Returns:
      [] tau; of several as good as each other, the smallest. Works under jit.

    Raises:
      ValueError: if counts has not one entry per logit.

    >>> logits = jnp.array([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    >>> fit_tau(logits, jnp.array([0, 0, 1]), [90, 10], taus=[0.0, 0.25, 0.5, 0.75, 1.0])
    Array(0.5, dtype=float32)

    References:
      Menon et al., Long-tail learning via logit adjustment, arXiv 2007.07314, section
      5.
    """
    if taus is None:
        best = calibrate(logits, labels, counts, where=where)
        return best.tau * best.temperature
    held = held_out("fit_tau", logits, labels, counts, where)
    grid = jnp.asarray(taus).astype(held.logits.dtype)

    def score(tau: Array) -> Array:
        prediction = jnp.argmax(
            adjust(held.logits, counts, tau), axis=-1
        ).astype(jnp.int32)
        right = prediction == held.labels
        return balanced(right.astype(held.logits.dtype), held)

    scores = jax.lax.map(score, grid)  # one at a time: [N, C] and not [T, N, C]
    # Sums of the same fractions differ by rounding.
    best = scores >= jnp.max(scores) - 1e-6
    return jnp.min(jnp.where(best, grid, jnp.inf))


class Calibration(NamedTuple):
    """Result of `calibrate`.

    Attributes:
      tau: strength of the adjustment.
      temperature: by which the logits are divided first.
    """

    tau: Array
    temperature: Array


@checked
def calibrate(
    logits: Float[Array, "*batch C"],
    labels: Integer[Array, "*batch"],
    counts: Counts,
    *,
    where: Bool[Array, "*batch"] | None = None,
    max_steps: int = 100,
) -> Calibration:
    """Fit tau and temperature together.

    They minimize mean_c CE_c(adjust(logits / temperature, counts, tau)).

    CE_c is the mean cross entropy of the held-out examples of class c. In
    (1/temperature, tau) it is convex, so a damped Newton method finds the one best pair
    from anywhere. Use it as `adjust(logits / c.temperature, counts, c.tau)`; for the
    classes' order alone, `adjust(logits, counts, c.tau * c.temperature)`.

    Args:
      logits: [..., C] on held-out examples, of a model trained with plain cross
        entropy.
      labels: as for `fit_tau`.
      counts: [C] training examples per class; may be traced. A class without any is
        left out.
      where: [...] booleans; a masked example does not count.
      max_steps: bound of the Newton steps, of which it needs some twenty; static.

    Returns:
      (tau, temperature), scalars; tau 0 where the counts are balanced, since any would
      do; 0 and 1 without examples. 1/temperature stays in [1e-3, 1e3]. Works under
      jit.

    Raises:
      ValueError: if counts has not one entry per logit.

    References:
      Guo et al., On calibration of modern neural networks, arXiv 1706.04599. Menon et
      al., arXiv 2007.07314, equation 9.
    """
    held = held_out("calibrate", logits, labels, counts, where)
    dtype = held.logits.dtype
    offered, shift = centered_shift(held.counts)
    z = jnp.where(offered[None], held.logits, 0)
    z = z - jnp.mean(z, axis=-1, keepdims=True)

    def newton(state: _Newton) -> _Newton:
        ridge = (
            state.damping * jnp.trace(state.hessian)
            + jnp.finfo(dtype).tiny ** 0.5
        )
        step = jnp.linalg.solve(
            state.hessian + ridge * jnp.eye(2, dtype=dtype), state.gradient
        )
        theta = state.theta - step
        theta = theta.at[0].set(jnp.clip(theta[0], 1e-3, 1e3))
        value, gradient, hessian = balanced_cross_entropy(
            theta, z, shift, offered, held
        )
        better = value <= state.value
        factor = jnp.where(better, 0.1, 10.0).astype(dtype)
        there = state._replace(
            theta=theta,
            value=value,
            gradient=gradient,
            hessian=hessian,
            moved=jnp.max(jnp.abs(theta - state.theta)),
        )
        chosen = jax.tree.map(
            lambda new, old: jnp.where(better, new, old), there, state
        )
        damping = jnp.clip(state.damping * factor, 1e-6, 1e6)
        return chosen._replace(damping=damping, step=state.step + 1)

    def going(state: _Newton) -> Array:
        return (state.step < max_steps) & (
            state.moved > float(jnp.finfo(dtype).eps) ** 0.7
        )

    first = jnp.array([1, 0], dtype)
    one = jnp.ones((), dtype)
    value, gradient, hessian = balanced_cross_entropy(
        first, z, shift, offered, held
    )
    start = _Newton(
        first,
        value,
        gradient,
        hessian,
        one * 1e-3,
        one,
        jnp.zeros((), jnp.int32),
    )
    last = jax.lax.while_loop(going, newton, start)
    return Calibration(last.theta[1], 1 / last.theta[0])


@checked
def estimate_prior(
    logits: Float[Array, "*batch C"],
    source: Counts,
    *,
    where: Bool[Array, "*batch"] | None = None,
    tolerance: Scalar = 1e-6,
    max_steps: int = 1000,
) -> Float[Array, "C"]:
    """Estimate the class prior of unlabelled data by expectation maximization.

    q_c <- mean_i r_ic, r_ic ~ q_c / source_c softmax(z_i)_c, from q = source until no
    q_c moves by more than the tolerance. The likelihood that it climbs is concave in q.

    The logits must be calibrated to the source prior: overconfident ones make the
    estimate too extreme (divide by `calibrate`'s temperature first).

    Args:
      logits: [..., C] on the test examples.
      source: [C] counts or probabilities, of the prior in the logits; need not sum to
        1. Ones for a model trained with `balanced_softmax`. May be traced.
      where: [...] booleans; a masked example does not count.
      tolerance: largest step of a probability at which it stops. May be traced.
      max_steps: after which it stops in any case; static.

    Returns:
      [C] probabilities that sum to 1; 0 for a class that the source lacks. The source
      prior if there are no examples. Works under jit.

    Raises:
      ValueError: if source has not one entry per logit.

    >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]]))
    >>> estimate_prior(logits, [1, 1]).round(2)
    Array([0.71, 0.29], dtype=float32)

    References:
      Saerens, Latinne, Decaestecker, Adjusting the outputs of a classifier to new a
      priori probabilities: a simple procedure, Neural Computation 14 (2002), section
      2.2.
    """
    z = floating(jnp.asarray(logits))
    prior = _prior("source", source, z, "estimate_prior")
    offered = has_examples(prior)
    prior = jnp.where(jnp.any(offered), prior, 1 / z.shape[-1])
    keep = as_mask(where, z.shape[:-1])
    z = z.reshape(-1, z.shape[-1])
    keep = keep.reshape(-1)
    z = jnp.where(keep[:, None], z, 0) - log_prior(prior)[None]
    z = jnp.where((offered | ~jnp.any(offered))[None], z, -jnp.inf)
    total = jnp.maximum(jnp.sum(keep), 1).astype(z.dtype)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q, _, n = state
        members = jax.nn.softmax(z + jnp.log(q)[None], axis=-1)
        new = jnp.sum(jnp.where(keep[:, None], members, 0), axis=0) / total
        new = jnp.where(
            jnp.any(keep), new / jnp.maximum(jnp.sum(new), 1e-30), q
        )
        return new, jnp.max(jnp.abs(new - q)), n + 1

    def going(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > jnp.asarray(tolerance).astype(z.dtype)) & (
            state[2] < max_steps
        )

    start = (prior, jnp.full((), jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(going, step, start)[0]


class _Newton(NamedTuple):
    """Where the search for theta = (1/temperature, tau) is: the loss there, the damping, the last step."""

    theta: Array
    value: Array
    gradient: Array
    hessian: Array
    damping: Array
    moved: Array
    step: Array


def _prior(
    name: str, values: Counts, z: Array, function: str = "shift_prior"
) -> Array:
    n = as_vector(f"posthoc.{function}: `{name}`", values).astype(z.dtype)
    check_classes(function, name, n, z)
    total = jnp.sum(n)
    return n / jnp.where(total > 0, total, 1)
