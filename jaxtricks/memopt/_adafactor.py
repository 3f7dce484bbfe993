"""Adafactor as GradientTransformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params, ScalarOrSchedule
from jaxtricks.memopt import _leaves, _momentum, rates
from jaxtricks.memopt.factored import Config, Hyper, is_second_moment, layout, step, zeros

# optax.inject_hyperparams turns every Python int into an array, and under jit into a tracer, which
# cannot decide a shape; a NumPy integer it leaves alone.
_MIN_DIM = np.int64(128)


class AdafactorState(NamedTuple):
    """State of `adafactor` and `scale_by_adafactor`; nothing in it is a placeholder.

    Attributes:
      count: updates so far, int32 [].
      v: the parameters' tree with a Factored or a Full in place of every leaf, float32 or better.
      m: the parameters' tree of moving averages of the step, each an array or an Int8; None without
        beta1.
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
    axes: Any = None,
    clip_per_slice: bool = True,
) -> optax.GradientTransformation:
    """The clipped update of Adafactor times the parameter scale; not negated, no learning rate.

    u = g / sqrt(V) / max(1, RMS(g / sqrt(V)) / clipping_threshold) * max(eps[1], RMS(p))

    Args: as in `adafactor`.

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
    _check(name, (decay, decay_rate, decay_cap), eps, clipping_threshold, max_parameter_scale)
    config = Config(factored, multiply_by_parameter_scale, clip_per_slice, False)

    def hyper(count: Any, dtype: Any) -> Hyper:
        return _hyper(
            count, dtype, (decay, decay_rate, decay_offset, decay_cap), clipping_threshold, eps,
            max_parameter_scale,
        )  # fmt: skip

    def init_fn(params: Params) -> Any:
        return _init(name, params, axes, config, min_dim_size_to_factor)

    def update_fn(updates: Any, state: Any, params: Params | None = None) -> Any:
        return _update(name, updates, state, params, axes, config, hyper, frozenset())

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
    axes: Any = None,
    clip_per_slice: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformation:
    """Adafactor with everything its implementations differ in as an argument.

    t = count + 1, beta2_t = min(1 - max(t - decay_offset, 1)^-decay_rate, decay_cap)
    R = beta2_t R + (1 - beta2_t) mean_out(g^2 + eps[0]); C likewise with mean_in; V = R C / mean(R)
    u = g / sqrt(V);  u = u / max(1, RMS(u) / clipping_threshold);  a = lr_t max(eps[1], RMS(p))
    m = beta1 m + (1 - beta1) a u;  p <- p - m - lr_t weight_decay p

    Numbers may be arrays or schedules (step -> value). Strings, bools, `axes`, `weight_decay_mask`
    and `min_dim_size_to_factor` are static: under optax.inject_hyperparams name those you give, e.g.
    static_args=("axes", "min_dim_size_to_factor").

    Args:
      learning_rate: lr_t. None = the paper's relative step min(1e-2, 1/sqrt(t)).
      warmup_init: with learning_rate None, min(1e-6 t, 1/sqrt(t)).
      beta1: momentum; None or 0 = none and no buffer.
      momentum_dtype: dtype of m: "bfloat16"; "int8", with a scale for every 128 entries and rounded at
        random (unbiased, the same at the same step and path); None = float32, float64 for float64
        parameters.
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
      axes: which axes are sides ("in", "out") and slices ("batch"): None = the two largest axes,
        ties to the earlier; a function (path, shape) -> roles or None; a rule of `roles.by_path`; or
        a tree of roles.
      clip_per_slice: RMS(u) per "batch" slice; False = over the whole leaf. RMS(p) is per slice.
      weight_decay: decoupled, times the learning rate, not times RMS(p).
      weight_decay_mask: what decays: a tree of bools (or a prefix), a function params -> tree, or a
        function (path, shape) -> bool such as `roles.is_kernel`. None = everything.

    Returns:
      A GradientTransformation whose update needs `params`.

    Raises:
      ValueError: an argument out of range; in `init`, a rule that does not fit or a parameter that is
        not floating; in `update`, no `params`.

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
        "adafactor", (decay, decay_rate, decay_cap), eps, clipping_threshold, max_parameter_scale
    )
    _leaves.check_number("adafactor", "learning_rate", learning_rate, 0)
    _leaves.check_number("adafactor", "beta1", beta1, 0, 1)
    _leaves.check_number("adafactor", "weight_decay", weight_decay, 0)
    if warmup_init and learning_rate is not None:
        raise ValueError(
            "memopt.adafactor: `warmup_init` is part of the relative step: leave out `learning_rate`"
        )
    momentum_dtype = _momentum.checked_dtype("adafactor", momentum_dtype)
    config = Config(factored, multiply_by_parameter_scale, clip_per_slice, momentum_before_lr)

    def hyper(count: Any, dtype: Any) -> Hyper:
        if learning_rate is None:
            rate = rates.relative_step(count, warmup_init, dtype)
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
        state = _init("adafactor", params, axes, config, min_dim_size_to_factor)
        if _leaves.is_zero(beta1):
            return state
        table = _leaves.checked("adafactor", params)
        m = [_momentum.zeros(x, momentum_dtype) for x in table.values()]
        return state._replace(m=_leaves.arranged(m, params))

    def update_fn(updates: Any, state: Any, params: Params | None = None) -> Any:
        off = _leaves.is_zero(weight_decay) or params is None
        decayed = frozenset() if off else _leaves.decayed(weight_decay_mask, params)
        return _update("adafactor", updates, state, params, axes, config, hyper, decayed)

    return optax.GradientTransformation(init_fn, update_fn)


def _check(name: str, decay: Any, eps: Any, clip: Any, max_scale: Any) -> None:
    rates.check_decay(name, *decay)
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise ValueError(
            f"memopt.{name}: `eps` is a {type(eps).__name__}: give two numbers, (added to g^2, scale floor)"
        )
    tiny = float(np.finfo(np.float32).tiny)
    _leaves.check_number(name, "eps[0]", eps[0], tiny)  # 0 / 0 for a row of zero gradients
    _leaves.check_number(name, "eps[1]", eps[1], 0)
    _leaves.check_number(name, "clipping_threshold", clip, tiny)
    _leaves.check_number(name, "max_parameter_scale", max_scale, 0)


def _hyper(count: Any, dtype: Any, decay: Any, clip: Any, eps: Any, max_scale: Any) -> Hyper:
    return Hyper(
        rates.one_minus_beta2(count, dtype, *decay),
        _leaves.optional(clip, count, dtype),
        _leaves.value(eps[0], count, dtype),
        _leaves.value(eps[1], count, dtype),
        _leaves.optional(max_scale, count, dtype),
    )


def _init(name: str, params: Params, axes: Any, config: Config, min_dim: Any) -> AdafactorState:
    if isinstance(min_dim, jax.core.Tracer):
        raise ValueError(
            f"memopt.{name}: `min_dim_size_to_factor` is traced but decides shapes: pass "
            "static_args='min_dim_size_to_factor' to optax.inject_hyperparams"
        )
    roles = _leaves.roles_by_path(axes, params)
    v = [
        zeros(leaf, layout(tuple(leaf.shape), roles[path]), config.factored, int(min_dim))
        for path, leaf in _leaves.checked(name, params).items()
    ]
    return AdafactorState(jnp.zeros([], jnp.int32), _leaves.arranged(v, params), None)


def _update(
    name: str,
    updates: Any,
    state: AdafactorState,
    params: Params | None,
    axes: Any,
    config: Config,
    hyper: Callable[[Any, Any], Hyper],
    decayed: frozenset[str] | set[str],
) -> tuple[Any, AdafactorState]:
    if params is None:
        raise ValueError(f"memopt.{name} needs `params`: call tx.update(grads, state, params)")
    weights, roles = _leaves.checked(name, params), _leaves.roles_by_path(axes, params)
    at_step: dict[Any, Hyper] = {}
    new_v = _leaves.nodes_by_path(state.v, is_second_moment)
    new_m = _leaves.nodes_by_path(state.m, _momentum.is_int8)
    seeds, out = _momentum.seeds(new_m, state.count), []
    for path, g in _leaves.checked(name, updates).items():
        v = _leaves.lookup(name, new_v, path, "the state")
        p = _leaves.lookup(name, weights, path, "`params`")
        dtype = v[0].dtype
        if dtype not in at_step:
            at_step[dtype] = hyper(state.count, dtype)
        h = at_step[dtype] if path in decayed else at_step[dtype]._replace(weight_decay=None)
        where = layout(tuple(p.shape), roles[path])
        m = new_m.get(path)
        u, new_v[path], m = step(g, p, v, m, seeds.get(path), h, where=where, config=config)
        if m is not None:
            new_m[path] = _momentum.kept(m, new_m[path])
        out.append(u)
    new_state = AdafactorState(
        optax.safe_increment(state.count),
        _leaves.replaced(state.v, is_second_moment, new_v),
        _leaves.replaced(state.m, _momentum.is_int8, new_m),
    )
    return jax.tree.unflatten(jax.tree.structure(updates), out), new_state
