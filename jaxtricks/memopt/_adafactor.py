"""Optimize with Adafactor: the arithmetic of one leaf, the schedules, the transforms.

Every pass over a leaf costs its size in memory traffic. There are four, and only the
last writes an array of that size: the mean of g^2 over one side; the same over the
other side, together with the weighted mean that gives RMS(u) without forming u; RMS(p);
the step.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtricks import _dtypes, _sharding
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params, Roles, ScalarOrSchedule
from jaxtricks.memopt import _leaves, _momentum, _update

_ONE_KERNEL_SUM = 4096  # from here on XLA's CPU backend sums in one kernel


class Factored(NamedTuple):
    """Second moment of a factored leaf, V = v_in v_out / mean(v_in).

    Attributes:
      v_in: mean of g^2 over the "out" axes, without these axes.
      v_out: mean of g^2 over the "in" axes, without these axes.
    """

    v_in: Any
    v_out: Any


class Full(NamedTuple):
    """Second moment of a leaf that is not factored.

    Attributes:
      v: moving average of g^2, shaped as the leaf.
    """

    v: Any


def is_second_moment(x: Any) -> bool:
    """Return whether x is the second moment of one leaf."""
    return isinstance(x, Factored | Full)


class Config(NamedTuple):
    """Static arguments; hashable, so that leaves of one shape share one trace."""

    factored: bool
    parameter_scale: bool
    clip_per_slice: bool
    momentum_before_rate: bool


class Layout(NamedTuple):
    """Axes of a leaf by purpose: factored (rows, columns), independent, all others."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...]
    others: tuple[int, ...]


class Hyper(NamedTuple):
    """Arguments at one step, as arrays [] in the dtype of the state; None = off.

    What can be computed once is not computed in every leaf.
    """

    one_minus_beta2: Any
    beta2: Any
    per_clip_square: Any
    eps_square: Any
    eps_scale_square: Any
    max_scale_square: Any
    beta1: Any = None
    rate: Any = None
    weight_decay: Any = None


class _Direction(NamedTuple):
    """u = g * sqrt(above / below) * factor, and means over slices or None."""

    above: Array | None
    below: Array
    factor: Array | None
    mean_square: Array | None
    parameter_square: Array | None


def layout(shape: tuple[int, ...], roles: Roles | None) -> Layout:
    """Sort the axes of a leaf by role, or by the rule of Mesh TensorFlow.

    That rule factors the two largest axes; ties go to the earlier axis.
    """
    rank = len(shape)
    if roles is None:
        order = sorted(range(rank), key=lambda i: -shape[i])
        pair = tuple((i,) for i in order[:2]) if rank >= 2 else ((), ())
        return Layout(pair[1], pair[0], (), tuple(range(rank)))
    batch = roles_lib.positions(roles, "batch")
    return Layout(
        rows=roles_lib.positions(roles, "in"),
        columns=roles_lib.positions(roles, "out"),
        batch=batch,
        others=tuple(i for i in range(rank) if i not in batch),
    )


def zeros(
    leaf: Any, leaf_layout: Layout, factored: bool, min_dim: int
) -> Factored | Full:
    """Create the second moment of a leaf, sharded as the leaf is."""
    shape = tuple(leaf.shape)
    rows = leaf_layout.rows
    columns = leaf_layout.columns
    smaller_side = min(
        math.prod(shape[i] for i in rows), math.prod(shape[i] for i in columns)
    )
    has_sides = rows and columns and 0 not in shape
    if not (factored and has_sides and smaller_side >= min_dim):
        return Full(_leaves.zeros(leaf))
    v_in = _leaves.zeros(leaf, without=columns)
    v_out = _leaves.zeros(leaf, without=rows)
    return Factored(v_in, v_out)


@functools.partial(jax.jit, static_argnames=("leaf_layout", "config"))
def step(
    g: Any,
    p: Any,
    v: Any,
    m: Any,
    seed: Any,
    hyper: Hyper,
    *,
    leaf_layout: Layout,
    config: Config,
) -> Any:
    """Return (update, v, m) of one leaf.

    Without `rate` the update is the scaled gradient, not negated.
    """
    dtype = v[0].dtype
    result = _dtypes.common_dtype(g, p)
    moments = _factored if isinstance(v, Factored) else _full
    v, direction = moments(g, p, v, hyper, leaf_layout, config)
    # Multiply small operands first: numbers, then the smaller factor, then the leaf.
    small = _small_factor(direction, hyper)
    if hyper.rate is not None and not config.momentum_before_rate:
        small = hyper.rate * small
    if direction.factor is not None:
        small = small * direction.factor
    u = small * g.astype(dtype)
    if hyper.rate is None:
        return u.astype(result), v, m
    if m is not None:
        u, m = _momentum.step(m, u, hyper.beta1, seed)
    if config.momentum_before_rate:
        u = hyper.rate * u
    if hyper.weight_decay is not None:
        u = u + hyper.rate * hyper.weight_decay * p.astype(dtype)
    return (-u).astype(result), v, m


def _full(
    g: Any, p: Any, v: Full, hyper: Hyper, leaf_layout: Layout, config: Config
) -> tuple[Full, _Direction]:
    square = jnp.square(g.astype(v.v.dtype))
    new = _average(v.v, square + hyper.eps_square, hyper)
    slices = _slices(hyper, leaf_layout, config)
    ratio = square / new
    if (
        slices is not None
        and config.parameter_scale
        and slices == leaf_layout.others
    ):
        # Both means are over the same axes: one reduction computes them.
        means = _means(ratio, jnp.square(p.astype(new.dtype)), slices)
    else:
        mean_square = _optional_mean(ratio, slices)
        parameter_square = _parameter_square(p, new.dtype, leaf_layout, config)
        means = (mean_square, parameter_square)
    return Full(new), _Direction(None, new, None, *means)


def _factored(
    g: Any,
    p: Any,
    v: Factored,
    hyper: Hyper,
    leaf_layout: Layout,
    config: Config,
) -> tuple[Factored, _Direction]:
    dtype = v.v_in.dtype
    # v_in and v_out are means over these axes.
    sides = (leaf_layout.columns, leaf_layout.rows)
    # The side with the last axis comes second, because two means at once are cheap
    # where memory is contiguous.
    first = int(max(leaf_layout.rows) < max(leaf_layout.columns))
    second = 1 - first
    new = list(v)

    def accumulate(i: int, mean: Array) -> Array:
        new[i] = _average(v[i], mean + hyper.eps_square, hyper)
        return jnp.expand_dims(new[i], sides[i])

    square = jnp.square(g.astype(dtype))
    early = accumulate(first, _mean(square, sides[first], keepdims=False))
    plain, weighted, root = _two_means(g, early, sides[second])
    late = accumulate(second, plain)
    # mean(v_in) = mean(v_out), averages of the same mean of g^2, so take the cheaper.
    # It varies along "batch" and "none" axes alone, as does its cofactor.
    weighted = jnp.expand_dims(weighted, sides[second])
    norm, cofactor = _means(late, weighted / late, sides[first])
    mean_square = _optional_mean(
        norm * cofactor, _slices(hyper, leaf_layout, config)
    )
    # V is never formed: the product of the two means may leave the range of the dtype.
    direction = _Direction(
        above=norm,
        below=late,
        factor=root,
        mean_square=mean_square,
        parameter_square=_parameter_square(p, dtype, leaf_layout, config),
    )
    return Factored(*new), direction


def _slices(
    hyper: Hyper, leaf_layout: Layout, config: Config
) -> tuple[int, ...] | None:
    """Return the axes over which RMS(u) is taken; None without clipping."""
    if hyper.per_clip_square is None:
        return None
    if config.clip_per_slice:
        return leaf_layout.others
    return tuple(sorted(leaf_layout.batch + leaf_layout.others))


def _parameter_square(
    p: Any, dtype: Any, leaf_layout: Layout, config: Config
) -> Array | None:
    axes = leaf_layout.others if config.parameter_scale else None
    return _optional_mean(jnp.square(p.astype(dtype)), axes)


def _two_means(
    g: Array, v: Array, axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Compute (mean of g^2, mean of g^2 / v, 1 / sqrt(v)) in one pass over g."""
    if _sharding.is_explicit(g, v):
        # With explicit shardings the two forms may differ in that of their results,
        # and the branches of platform_dependent must agree.
        return two_means_separate(g, v, axes)
    return jax.lax.platform_dependent(
        g,
        v,
        cpu=functools.partial(two_means_stacked, axes=axes),
        default=functools.partial(two_means_separate, axes=axes),
    )


def two_means_separate(
    g: Array, v: Array, axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Compute the two means one by one; accelerators' compilers fuse them."""
    g = g.astype(v.dtype)
    root = jax.lax.rsqrt(v)
    plain = _mean(jnp.square(g), axes, keepdims=False)
    weighted = _mean(jnp.square(g * root), axes, keepdims=False)
    return plain, weighted, root


def two_means_stacked(
    g: Array, v: Array, axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Compute both means by one reduction with an additional axis.

    XLA's CPU backend vectorizes no reduction with two results. The root is returned as
    part of the stack, because each kernel costs a millisecond to compile.
    """
    roots = jnp.stack([jnp.ones_like(v), jax.lax.rsqrt(v)])
    roots = jax.lax.optimization_barrier(roots)
    # Without the barrier g^2 would be shared with the other pass and written to memory.
    g = jax.lax.optimization_barrier(g).astype(v.dtype)[None]
    later = tuple(i + 1 for i in axes)
    means = _mean(jnp.square(g * roots), later, keepdims=False)
    return means[0], means[1], roots[1]


def _small_factor(direction: _Direction, hyper: Hyper) -> Array:
    """Compute sqrt(above / below) times RMS(p) and clipping, under one root.

    XLA's CPU backend fuses products, maxima and minima of numbers into the kernel that
    reads them, but compiles a kernel for every quotient or root of a number.
    """
    below = direction.below
    if direction.mean_square is not None:
        excess = direction.mean_square * hyper.per_clip_square
        below = below * jnp.maximum(excess, 1)
    square = (1 if direction.above is None else direction.above) / below
    # After the quotient, which is near 1 in a matrix, so that no product underflows.
    if direction.parameter_square is not None:
        size = jnp.maximum(direction.parameter_square, hyper.eps_scale_square)
        if hyper.max_scale_square is not None:
            size = jnp.minimum(size, hyper.max_scale_square)
        square = square * size
    # A zero gradient may have an infinite factor, and their product is zero.
    return jnp.sqrt(jnp.minimum(square, jnp.finfo(square.dtype).max))


def _average(old: Array, new: Array, hyper: Hyper) -> Array:
    # old + weight (new - old) would lose digits at weight 1, before decay_offset, where
    # new is much smaller than old.
    return hyper.beta2 * old + hyper.one_minus_beta2 * new


def _mean(x: Array, axes: tuple[int, ...], keepdims: bool = True) -> Array:
    count = _count(x, axes)
    if count == 1 and keepdims and x.size:
        return x  # the mean over these axes of a mean over others
    return jnp.sum(x, axis=axes, keepdims=keepdims) / count


def _optional_mean(x: Array, axes: tuple[int, ...] | None) -> Array | None:
    return None if axes is None else _mean(x, axes)


def _means(a: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Compute the means of two arrays of one shape.

    Small sums go into one reduction with two results: XLA's CPU backend compiles three
    kernels for each small sum, which dominate the compile time of large trees. On a mesh
    such a reduction would gather its operands, so there the sums are separate.
    """
    n = _count(a, axes)
    if n >= _ONE_KERNEL_SUM or _sharding.on_mesh(a):
        return _mean(a, axes), _mean(b, axes)
    zero = jnp.zeros([], a.dtype)
    add_pairs = lambda x, y: (x[0] + y[0], x[1] + y[1])  # noqa: E731
    first, second = jax.lax.reduce((a, b), (zero, zero), add_pairs, axes)
    return jnp.expand_dims(first, axes) / n, jnp.expand_dims(second, axes) / n


def _count(x: Array, axes: tuple[int, ...]) -> int:
    # At least one, so that a leaf without elements has mean zero.
    return max(1, math.prod(x.shape[i] for i in axes))


# Schedules: the relative step and the decay of the second moment.


def relative_step(count: Any, warmup_init: bool, dtype: Any) -> Array:
    """Compute min(1e-2, 1/sqrt(t)), or min(1e-6 t, 1/sqrt(t)); t = count + 1."""
    t = count.astype(dtype) + 1
    ceiling = 1e-6 * t if warmup_init else jnp.asarray(1e-2, dtype)
    return jnp.minimum(ceiling, 1 / jnp.sqrt(t))


def check_decay(
    name: str, decay: str, rate: ScalarOrSchedule, cap: ScalarOrSchedule
) -> None:
    """Raise for an unknown decay or numbers that cannot decay."""
    if decay not in ("pow", "adam"):
        raise ValueError(
            f"memopt.{name}: `decay` is {decay!r}: give 'pow' or 'adam'"
        )
    _leaves.check_number(
        name, "decay_rate", rate, 0, 1 if decay == "adam" else float("inf")
    )
    _leaves.check_number(name, "decay_cap", cap, 0, 1)


def one_minus_beta2(
    count: Any,
    dtype: Any,
    decay: str,
    rate: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    cap: ScalarOrSchedule,
) -> Array:
    """Compute 1 - beta2_t, exactly also where beta2_t is near 1.

    "pow": t^-rate
    "adam": 1 - rate (1 - rate^(t-1)) / (1 - rate^t) = (1 - rate) / (1 - rate^t)

    with t = max(count + 1 - offset, 1), so beta2_t is 0 before the offset.
    """
    t = count + 1 - _leaves.value(offset, count, count.dtype)
    t = jnp.maximum(t, 1).astype(dtype)
    floor = _complement(cap, count, dtype)
    if decay == "pow":
        return jnp.maximum(t ** -_leaves.value(rate, count, dtype), floor)
    # At least one rounding error, so that rate 1 gives the limit 1 / t, not 0 / 0.
    complement = jnp.maximum(
        _complement(rate, count, dtype), jnp.finfo(dtype).eps
    )
    return jnp.maximum(
        complement / -jnp.expm1(t * jnp.log1p(-complement)), floor
    )


def _complement(x: Any, count: Any, dtype: Any) -> Array:
    # Subtract a Python number in double precision, before it is rounded.
    x = x(count) if callable(x) else x
    return jnp.asarray(1 - x).astype(dtype)


# Adafactor as GradientTransformations.


# optax.inject_hyperparams turns a Python int into an array, and under jit into a tracer,
# which cannot decide a shape. It leaves a NumPy integer alone.
_MIN_DIM = np.int64(128)


class AdafactorState(NamedTuple):
    """State of `adafactor` and `scale_by_adafactor`, without placeholders.

    Attributes:
      count: updates so far, int32 [].
      v: the parameters' tree with a Factored or a Full in place of every leaf, float32
        or better.
      m: the parameters' tree of moving averages of the step, each an array or an Int8;
        None without beta1.
    """

    count: Any
    v: Any
    m: Any


@checked
def scale_by_adafactor(
    *,
    decay: str = "pow",
    decay_rate: ScalarOrSchedule = 0.8,
    decay_offset: ScalarOrSchedule = 0,
    decay_cap: ScalarOrSchedule = 1.0,
    clipping_threshold: ScalarOrSchedule | None = 1.0,
    eps: Any = (1e-30, 1e-3),
    multiply_by_parameter_scale: bool = True,
    max_parameter_scale: ScalarOrSchedule | None = None,
    factored: bool = True,
    min_dim_size_to_factor: int | np.integer | Array = _MIN_DIM,
    roles: Any = None,
    clip_per_slice: bool = True,
) -> optax.GradientTransformation:
    """Compute Adafactor's clipped update times the parameter scale.

    u = g / sqrt(V)
    u <- u / max(1, RMS(u) / clipping_threshold) * max(eps[1], RMS(p))

    The update is not negated and has no learning rate. The arguments are those of
    `adafactor`.

    Returns:
      A GradientTransformation whose update needs `params`.

    Raises:
      ValueError: see `adafactor`.

    Example:
      >>> tx = optax.chain(scale_by_adafactor(), optax.scale_by_learning_rate(1e-2))
      >>> params = {"w": jnp.full((4, 2), 3.0)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> round(float(updates["w"][0, 0]), 6)
      -0.03

    References:
      Shazeer, Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
      arXiv 1804.04235, algorithms 4 and 5.
    """
    name = "scale_by_adafactor"
    _check(
        name,
        (decay, decay_rate, decay_cap),
        eps,
        clipping_threshold,
        max_parameter_scale,
    )
    config = Config(
        factored, multiply_by_parameter_scale, clip_per_slice, False
    )

    def hyper(count: Any, dtype: Any) -> Hyper:
        return _hyper(
            count, dtype, (decay, decay_rate, decay_offset, decay_cap), clipping_threshold, eps,
            max_parameter_scale,
        )  # fmt: skip

    def init_fn(params: Params) -> Any:
        return _init(name, params, roles, config, min_dim_size_to_factor)

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> Any:
        return _apply(name, updates, state, params, roles, config, hyper, set())

    return optax.GradientTransformation(init_fn, update_fn)


@checked
def adafactor(
    learning_rate: ScalarOrSchedule | None = None,
    *,
    warmup_init: bool = False,
    beta1: ScalarOrSchedule | None = None,
    momentum_dtype: Any = None,
    momentum_before_lr: bool = False,
    decay: str = "pow",
    decay_rate: ScalarOrSchedule = 0.8,
    decay_offset: ScalarOrSchedule = 0,
    decay_cap: ScalarOrSchedule = 1.0,
    clipping_threshold: ScalarOrSchedule | None = 1.0,
    eps: Any = (1e-30, 1e-3),
    multiply_by_parameter_scale: bool = True,
    max_parameter_scale: ScalarOrSchedule | None = None,
    factored: bool = True,
    min_dim_size_to_factor: int | np.integer | Array = _MIN_DIM,
    roles: Any = None,
    clip_per_slice: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformation:
    """Optimize with Adafactor; its implementations differ in arguments here.

    t = count + 1
    beta2_t = min(1 - max(t - decay_offset, 1)^-decay_rate, decay_cap)
    R = beta2_t R + (1 - beta2_t) mean_out(g^2 + eps[0]), C likewise with mean_in
    V = R C / mean(R)
    u = g / sqrt(V)
    u <- u / max(1, RMS(u) / clipping_threshold)
    m = beta1 m + (1 - beta1) lr_t max(eps[1], RMS(p)) u
    p <- p - m - lr_t weight_decay p

    Numbers may be arrays or schedules (step -> value). Strings, bools, `roles`,
    `weight_decay_mask` and `min_dim_size_to_factor` are static: under
    optax.inject_hyperparams name those you give, e.g. static_args=("roles",
    "min_dim_size_to_factor").

    Args:
      learning_rate: lr_t. None = the paper's relative step min(1e-2, 1/sqrt(t)).
      warmup_init: with learning_rate None, min(1e-6 t, 1/sqrt(t)).
      beta1: momentum; None or 0 = none and no buffer.
      momentum_dtype: dtype of m: "bfloat16"; "int8", the codes of `low_bit`, with a
        scale for every 64 entries and rounded at random (unbiased, the same at the same
        step and path; single numbers stay in float32); None = float32, float64 for
        float64 parameters.
      momentum_before_lr: average u max(eps[1], RMS(p)) and multiply by lr_t afterwards.
      decay: "pow" as above, or "adam": beta2_t = rate (1 - rate^(t-1)) / (1 - rate^t).
      decay_rate: exponent of "pow", rate of "adam".
      decay_offset: step at which fine-tuning began; before it beta2_t = 0.
      decay_cap: largest beta2_t.
      clipping_threshold: largest RMS of u; None = no clipping.
      eps: (added to g^2, floor of the parameter scale).
      multiply_by_parameter_scale: False = absolute steps of size lr_t.
      max_parameter_scale: ceiling of the parameter scale; None = none.
      factored: False = keep V whole everywhere.
      min_dim_size_to_factor: a leaf is factored if both sides have at least this size.
      roles: which axes are sides ("in", "out") and slices ("batch"): None = the two
        largest axes, ties to the earlier; a function (path, shape) -> roles or None; a
        rule of `roles.by_path`; or a tree of roles.
      clip_per_slice: RMS(u) per "batch" slice; False = over the whole leaf. RMS(p) is
        per slice.
      weight_decay: decoupled, times the learning rate, not times RMS(p).
      weight_decay_mask: which parameters decay: a tree of bools (or a prefix), a
        function params -> tree, or a function (path, shape) -> bool such as
        `roles.is_kernel`. None = all.

    Returns:
      A GradientTransformation whose update needs `params`.

    Raises:
      ValueError: an argument out of range; in `init`, a rule that does not fit or a
        parameter that is not floating; in `update`, no `params`.

    Example:
      >>> tx = adafactor(1e-2, min_dim_size_to_factor=2)
      >>> params = {"w": jnp.full((4, 2), 3.0), "b": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> state.v["w"].v_in.shape, state.v["w"].v_out.shape, state.v["b"].v.shape
      ((2,), (4,), (2,))

    References:
      Shazeer, Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
      arXiv 1804.04235, algorithms 4, 5, 6 and section 8.
    """
    _check(
        "adafactor",
        (decay, decay_rate, decay_cap),
        eps,
        clipping_threshold,
        max_parameter_scale,
    )
    _leaves.check_number("adafactor", "learning_rate", learning_rate, 0)
    _leaves.check_number("adafactor", "beta1", beta1, 0, 1)
    _leaves.check_number("adafactor", "weight_decay", weight_decay, 0)
    if warmup_init and learning_rate is not None:
        raise ValueError(
            "memopt.adafactor: `warmup_init` is part of the relative step: "
            "leave out `learning_rate`"
        )
    momentum_dtype = _momentum.checked_dtype("adafactor", momentum_dtype)
    config = Config(
        factored,
        multiply_by_parameter_scale,
        clip_per_slice,
        momentum_before_lr,
    )

    def hyper(count: Any, dtype: Any) -> Hyper:
        if learning_rate is None:
            rate = relative_step(count, warmup_init, dtype)
        else:
            rate = _leaves.value(learning_rate, count, dtype)
        return _hyper(
            count, dtype, (decay, decay_rate, decay_offset, decay_cap), clipping_threshold, eps,
            max_parameter_scale,
        )._replace(
            rate=rate,
            beta1=_leaves.optional(beta1, count, dtype),
            weight_decay=_leaves.value(weight_decay, count, dtype),
        )  # fmt: skip

    def init_fn(params: Params) -> Any:
        state = _init(
            "adafactor", params, roles, config, min_dim_size_to_factor
        )
        if _leaves.is_zero(beta1):
            return state
        leaf_roles = _leaves.roles_by_path(roles, params)
        m = _momentum.init("adafactor", params, momentum_dtype, leaf_roles)
        return state._replace(m=m)

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> Any:
        decayed = set()
        if params is not None and not _leaves.is_zero(weight_decay):
            decayed = _leaves.decayed_paths(weight_decay_mask, params)
        return _apply(
            "adafactor", updates, state, params, roles, config, hyper, decayed
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _check(name: str, decay: Any, eps: Any, clip: Any, max_scale: Any) -> None:
    check_decay(name, *decay)
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise ValueError(
            f"memopt.{name}: `eps` is a {type(eps).__name__}: give two "
            "numbers, (added to g^2, scale floor)"
        )
    tiny = float(np.finfo(np.float32).tiny)
    # A smaller eps would give 0 / 0 for a row of zero gradients.
    _leaves.check_number(name, "eps[0]", eps[0], tiny)
    _leaves.check_number(name, "eps[1]", eps[1], 0)
    _leaves.check_number(name, "clipping_threshold", clip, tiny)
    _leaves.check_number(name, "max_parameter_scale", max_scale, 0)


def _hyper(
    count: Any, dtype: Any, decay: Any, clip: Any, eps: Any, max_scale: Any
) -> Hyper:
    def square(x: Any) -> Array | None:
        return None if x is None else jnp.square(_leaves.value(x, count, dtype))

    weight = one_minus_beta2(count, dtype, *decay)
    clip_square = square(clip)
    return Hyper(
        one_minus_beta2=weight,
        beta2=1 - weight,
        per_clip_square=None if clip_square is None else 1 / clip_square,
        eps_square=_leaves.value(eps[0], count, dtype),
        eps_scale_square=square(eps[1]),
        max_scale_square=square(max_scale),
    )


def _init(
    name: str, params: Params, roles: Any, config: Config, min_dim: Any
) -> AdafactorState:
    if isinstance(min_dim, jax.core.Tracer):
        raise ValueError(
            f"memopt.{name}: `min_dim_size_to_factor` is traced but decides "
            "shapes: pass static_args='min_dim_size_to_factor' to "
            "optax.inject_hyperparams"
        )
    leaf_roles = _leaves.roles_by_path(roles, params)
    moments = []
    for path, leaf in _leaves.checked(name, params).items():
        leaf_layout = layout(tuple(leaf.shape), leaf_roles[path])
        moments.append(zeros(leaf, leaf_layout, config.factored, int(min_dim)))
    v = _leaves.tree_like(moments, params)
    return AdafactorState(jnp.zeros([], jnp.int32), v, None)


def _apply(
    name: str,
    updates: Any,
    state: AdafactorState,
    params: Params | None,
    roles: Any,
    config: Config,
    hyper: Callable[[Any, Any], Hyper],
    decayed: set[str],
) -> tuple[Any, AdafactorState]:
    if params is None:
        raise ValueError(
            f"memopt.{name} needs `params`: call tx.update(grads, state, params)"
        )
    leaf_roles = _leaves.roles_by_path(roles, params)
    hyper_by_dtype: dict[Any, Hyper] = {}

    def leaf_step(path: str, g: Any, p: Any, v: Any, m: Any, seed: Any) -> Any:
        dtype = v[0].dtype
        if dtype not in hyper_by_dtype:
            hyper_by_dtype[dtype] = hyper(state.count, dtype)
        h = hyper_by_dtype[dtype]
        if path not in decayed:
            h = h._replace(weight_decay=None)
        leaf_layout = layout(tuple(p.shape), leaf_roles[path])
        return step(g, p, v, m, seed, h, leaf_layout=leaf_layout, config=config)

    return _update.update_leaves(
        name, leaf_step, updates, state, params, is_second_moment
    )


# Settings that reproduce other implementations.


def _last_two(path: str, shape: tuple[int, ...]) -> Roles:
    """Factor the last two axes, as Transformers does."""
    rank = len(shape)
    if rank < 2:
        return ("none",) * rank
    return ("none",) * (rank - 2) + ("in", "out")


def _largest_late(path: str, shape: tuple[int, ...]) -> Roles:
    """Factor the two largest axes, ties to the later, as optax and Big Vision do."""
    if len(shape) < 2:
        return ("none",) * len(shape)
    *_, second, largest = sorted(range(len(shape)), key=lambda i: shape[i])
    roles = ["none"] * len(shape)
    roles[second], roles[largest] = "in", "out"
    return tuple(roles)


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mesh": MappingProxyType({"clip_per_slice": False}),
        "t5x": MappingProxyType({"clip_per_slice": True}),
        "hf": MappingProxyType(
            {"roles": _last_two, "min_dim_size_to_factor": 0}
        ),
        "big_vision": MappingProxyType(
            {
                "roles": _largest_late,
                "beta1": 0.9,
                "clipping_threshold": None,
                "decay_cap": 0.999,
                "min_dim_size_to_factor": 32,
                "momentum_before_lr": True,
                "momentum_dtype": "bfloat16",
                "multiply_by_parameter_scale": False,
            }
        ),
    }
)
"""Keyword arguments of `adafactor` for Mesh TensorFlow, t5x, Transformers, Big Vision.

They leave to you the learning rate (t5x and Big Vision have no default), the roles of
"mesh" and "t5x" where layers are stacked, and weight decay (t5x and Big Vision do not
multiply it by the learning rate, so divide theirs by it)."""
