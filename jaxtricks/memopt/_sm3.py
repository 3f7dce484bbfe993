"""Optimize with SM3, whose second moment is one accumulator per axis."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtricks import _dtypes
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params, Roles, ScalarOrSchedule
from jaxtricks.memopt import _leaves, _momentum, _update

# optax.inject_hyperparams turns Python floats into arrays, which may become nonzero and
# would need a buffer. It leaves a NumPy number alone.
_NO_MOMENTUM = np.float32(0)


class Sm3State(NamedTuple):
    """State of `sm3` and `scale_by_sm3`.

    Attributes:
      count: updates so far, int32 [].
      v: the parameters' tree with a tuple of accumulators in place of every leaf,
        float32 or better: one per axis that is not "batch", shaped as the "batch" axes
        and that axis; for slices of rank <= 1 a single one shaped as the leaf.
      m: the parameters' tree of moving averages of the update, each an array or an
        Int8; None without momentum.
    """

    count: Any
    v: Any
    m: Any


@checked
def scale_by_sm3(
    *,
    momentum: ScalarOrSchedule | None = _NO_MOMENTUM,
    momentum_dtype: Any = None,
    roles: Any = None,
    eps: ScalarOrSchedule = 1e-30,
) -> optax.GradientTransformation:
    """Compute the update of SM3-II, not negated and without learning rate.

    nu = min_r mu_r + g^2
    mu_r = max over all other axes of nu
    s = g / sqrt(nu + eps)
    m = momentum m + (1 - momentum) s

    The arguments are those of `sm3`.

    Returns:
      A GradientTransformation; its update does not need `params`.

    Raises:
      ValueError: see `sm3`.

    Example:
      >>> tx = scale_by_sm3()
      >>> grads = {"w": jnp.array([[3.0, 4.0]] * 2)}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["w"][0].tolist(), [a.tolist() for a in state.v["w"]]
      ([1.0, 1.0], [[16.0, 16.0], [9.0, 16.0]])

    References:
      Anil, Gupta, Koren, Singer, "Memory-Efficient Adaptive Optimization", arXiv
      1901.11150, algorithm SM3-II.
    """
    return _transform(
        "scale_by_sm3", None, momentum, momentum_dtype, roles, eps
    )


@checked
def sm3(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: ScalarOrSchedule | None = _NO_MOMENTUM,
    momentum_dtype: Any = None,
    roles: Any = None,
    eps: ScalarOrSchedule = 1e-30,
) -> optax.GradientTransformation:
    """Optimize with SM3-II: Adagrad whose accumulators cover rows and columns.

    nu = min_r mu_r + g^2
    mu_r = max over all other axes of nu
    s = g / sqrt(nu + eps), with 0 / sqrt(0) = 0
    m = momentum m + (1 - momentum) s
    p <- p - learning_rate m

    Numbers may be arrays or schedules (step -> value); `momentum_dtype` and `roles` are
    static.

    Args:
      learning_rate: as in Adagrad there is no decay: warm up, then keep it constant.
      momentum: None or the number 0 = none and no buffer; an array or schedule always
        has its buffer.
      momentum_dtype: dtype of m: "bfloat16"; "int8", the codes of `low_bit`, with a
        scale for every 64 entries and rounded at random (unbiased, the same at the same
        step and path; single numbers stay in float32); None = float32, float64 for
        float64 parameters.
      roles: which axes are "batch" (independent slices; every other role is alike):
        None = none of them; a function (path, shape) -> roles or None; a rule of
        `roles.by_path`; a tree of roles.
      eps: added under the root, never accumulated.

    Returns:
      A GradientTransformation; its update does not need `params`.

    Raises:
      ValueError: an argument out of range; in `init`, a rule that does not fit or a
        parameter that is not floating.

    Example:
      >>> tx = sm3(0.1)
      >>> params = {"w": jnp.ones((300, 200))}
      >>> [a.shape for a in tx.init(params).v["w"]]
      [(300,), (200,)]

    References:
      Anil, Gupta, Koren, Singer, "Memory-Efficient Adaptive Optimization", arXiv
      1901.11150, algorithm SM3-II.
    """
    return _transform(
        "sm3", learning_rate, momentum, momentum_dtype, roles, eps
    )


def _transform(
    name: str,
    rate: Any,
    momentum: Any,
    momentum_dtype: Any,
    roles: Any,
    eps: Any,
) -> optax.GradientTransformation:
    momentum_dtype = _momentum.checked_dtype(name, momentum_dtype)
    _leaves.check_number(name, "learning_rate", rate, 0)
    _leaves.check_number(name, "momentum", momentum, 0, 1)
    _leaves.check_number(name, "eps", eps, 0)

    def init_fn(params: Params) -> Any:
        weights = _leaves.checked(name, params)
        leaf_roles = _leaves.roles_by_path(roles, params)
        accumulators = [
            _zeros(x, _axes(x.shape, leaf_roles[path]))
            for path, x in weights.items()
        ]
        v = _leaves.tree_like(accumulators, params)
        m = None
        if not _leaves.is_zero(momentum):
            m = _momentum.init(name, params, momentum_dtype, leaf_roles)
        return Sm3State(jnp.zeros([], jnp.int32), v, m)

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> Any:
        tree = updates if params is None else params
        leaf_roles = _leaves.roles_by_path(roles, tree)

        def leaf_step(
            path: str, g: Any, p: Any, v: Any, m: Any, seed: Any
        ) -> Any:
            hyper = [
                _leaves.optional(x, state.count, v[0].dtype)
                for x in (rate, momentum, eps)
            ]
            axes = _axes(g.shape, leaf_roles[path])
            u, v, m = _step(g, v, m, seed, *hyper, axes=axes)
            return u.astype(_dtypes.common_dtype(g, p)), v, m

        return _update.update_leaves(
            name, leaf_step, updates, state, tree, _is_accumulators
        )

    return optax.GradientTransformation(init_fn, update_fn)


def _is_accumulators(x: Any) -> bool:
    """Return whether x is the tuple of one leaf, not a tuple in the parameters' tree."""
    return isinstance(x, tuple) and bool(x) and jax.tree_util.all_leaves(x)


def _axes(
    shape: tuple[int, ...], roles: Roles | None
) -> tuple[int, ...] | None:
    """Return the axes that have an accumulator each; None = one for the whole leaf."""
    batch = () if roles is None else roles_lib.positions(roles, "batch")
    sliced_axes = tuple(i for i in range(len(shape)) if i not in batch)
    return None if len(sliced_axes) <= 1 or 0 in shape else sliced_axes


def _others(axis: int, sliced_axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in sliced_axes if i != axis)


def _zeros(leaf: Any, sliced_axes: tuple[int, ...] | None) -> tuple[Array, ...]:
    if sliced_axes is None:
        return (_leaves.zeros(leaf),)
    return tuple(
        _leaves.zeros(leaf, without=_others(axis, sliced_axes))
        for axis in sliced_axes
    )


@functools.partial(jax.jit, static_argnames="axes")
def _step(
    g: Any,
    v: Any,
    m: Any,
    seed: Any,
    rate: Any,
    momentum: Any,
    eps: Any,
    *,
    axes: Any,
) -> Any:
    """Return (update, v, m) of one leaf in the dtype of its state."""
    maxima = []
    # Each maximum and the update read g; none of them writes nu to memory.
    for axis in axes or ():
        maxima.append(jnp.max(_bound(g, v, axes), axis=_others(axis, axes)))
        g, *v = _leaves.opaque_copies(g, *v)
    nu = _bound(g, v, axes)
    g = g.astype(v[0].dtype)
    v = tuple(maxima) or (nu,)
    # With no gradient so far and without eps the step is 0, not 0 / 0. A maximum is
    # one operation per entry, where a choice would be two.
    total = jnp.maximum(nu + eps, jnp.finfo(nu.dtype).tiny)
    u = g * jax.lax.rsqrt(total)
    if m is not None:
        u, m = _momentum.step(m, u, momentum, seed)
    return (u if rate is None else -rate * u), v, m


def _bound(g: Array, v: Sequence[Array], axes: tuple[int, ...] | None) -> Array:
    """Compute nu: the smallest accumulator that covers an entry, plus g^2."""
    square = jnp.square(g.astype(v[0].dtype))
    if axes is None:
        return v[0] + square
    covers = [
        jnp.expand_dims(a, _others(axis, axes))
        for axis, a in zip(axes, v, strict=True)
    ]
    return functools.reduce(jnp.minimum, covers) + square
