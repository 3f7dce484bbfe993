"""Keep bfloat16 parameters more precise than they are: 8 bits more in the state."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtricks import _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params
from jaxtricks.memopt import _leaves
from jaxtricks.memopt._block_codes import BLOCK
from jaxtricks.memopt._low_bit import low_bit


class SplitWeightsState(NamedTuple):
    """State of `split_weights`.

    Attributes:
      correction: the parameters' tree with an int8 array for every bfloat16 parameter;
        weight = parameter + correction * ulp(parameter) / 256. optax.MaskedNode stands
        for other parameters.
    """

    correction: Any


@checked
def split_weights() -> optax.GradientTransformation:
    """Split each weight into a bfloat16 parameter and an int8 correction; last in a chain.

    The model has plain bfloat16 parameters. What rounding cuts off is in the state, in
    units of 1/256 of the distance between neighbouring bfloat16 numbers:

    w = p + c ulp(p) / 256
    p <- bfloat16(w + u),  c <- round(256 (w + u - p) / ulp(p))

    So w has 3 bytes where float32 has 4, and a rounding error of at most 2^-16 of it (up
    to 2^-15 next to the middle of two bfloat16 numbers, where c would be 128).
    The update is p_new - p in float32: `optax.apply_updates` and `nnx.Optimizer` land on
    p_new. Parameters of other dtypes pass unchanged.

    Returns:
      A GradientTransformation whose update needs `params`.

    Raises:
      ValueError: in `update`, no `params`.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), split_weights())
      >>> params = jnp.ones((), jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(20):  # bfloat16 alone would stay at 1
      ...     updates, state = tx.update(jnp.float32(-1e-3), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(float32_weights(params, state)), 3)
      1.02

    References:
      FlashOptim, arXiv 2602.23349: the correction in units of the last place. Zamirai,
      Zhang, Aberger, De Sa, "Revisiting BFloat16 Training", arXiv 2010.06192.
    """

    def init_fn(params: Params) -> SplitWeightsState:
        return SplitWeightsState(jax.tree.map(_no_correction, params))

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "memopt.split_weights needs `params`: call tx.update(grads, "
                "state, params)"
            )
        weights = _tree.by_path(params)
        corrections = _tree.by_path(state.correction)

        def step(path: str, u: Any) -> Any:
            p = _leaves.lookup("split_weights", weights, path, "`params`")
            if jnp.result_type(p) != jnp.bfloat16:
                return u
            c = _leaves.lookup("split_weights", corrections, path, "the state")
            w = _joined(p, c) + u.astype(jnp.float32)
            u = w.astype(jnp.bfloat16).astype(jnp.float32) - p.astype(
                jnp.float32
            )
            # Where the step is very long, u is rounded: take what will be there.
            landed = (p.astype(jnp.float32) + u).astype(jnp.bfloat16)
            corrections[path] = _correction(w, landed)
            return u

        updates = _tree.map_with_path(step, updates)
        structure = jax.tree.structure(state.correction)
        correction = jax.tree.unflatten(structure, list(corrections.values()))
        return updates, SplitWeightsState(correction)

    return optax.GradientTransformation(init_fn, update_fn)


@checked
def float32_weights(params: Params, opt_state: Any) -> Params:
    """Return the weights that parameters and corrections make together.

    Args:
      params: parameters of a chain that ends with `split_weights`.
      opt_state: its state.

    Returns:
      The parameters' tree, in float32 where a parameter has a correction.

    Raises:
      ValueError: no `SplitWeightsState` in the state, or one of other parameters.
    """
    corrections = _corrections("float32_weights", params, opt_state)

    def weight(path: str, p: Any) -> Any:
        return _joined(p, corrections[path]) if path in corrections else p

    return _tree.map_with_path(weight, params)


@checked
def split_float32(weights: Params, opt_state: Any) -> tuple[Params, Any]:
    """Return (params, opt_state) that hold these weights, those of a checkpoint for example.

    Args:
      weights: the parameters' tree, float32.
      opt_state: state of a chain that ends with `split_weights`, made of bfloat16
        parameters: `tx.init(params)`.

    Returns:
      The parameters, bfloat16 where the state has corrections, and the state with the
      corrections that belong to them.

    Raises:
      ValueError: no `SplitWeightsState` in the state, or one of other parameters.
    """
    corrections = _corrections("split_float32", weights, opt_state)
    weights = jax.tree.map(jnp.asarray, weights)

    def rounded(path: str, w: Any) -> Any:
        return w.astype(jnp.bfloat16) if path in corrections else w

    params = _tree.map_with_path(rounded, weights)
    table, wide = _tree.by_path(params), _tree.by_path(weights)

    def new(path: str, _: Any) -> Array:
        return _correction(wide[path].astype(jnp.float32), table[path])

    def renewed(x: Any) -> Any:
        if not _is_state(x):
            return x
        return SplitWeightsState(_tree.map_with_path(new, x.correction))

    return params, jax.tree.map(renewed, opt_state, is_leaf=_is_state)


@checked
def adamw7(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    bits: int = 8,
    block: int = BLOCK,
    roles: Any = None,
    min_size: int = 4096,
    keep: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Optimize with AdamW in 7 bytes a parameter, gradient included; optax.adamw has 16.

    Two bytes each for the bfloat16 parameter and its gradient, one for the correction
    of `split_weights`, and one for each moment (`low_bit`), whose scales add 1/16.

    Args:
      learning_rate, b1, b2, eps, eps_root, weight_decay, mask, nesterov: of
        `optax.adamw`.
      bits, block, roles, min_size, keep: of `low_bit`; bits=4 takes a byte less.

    Returns:
      A GradientTransformation for bfloat16 parameters; its update needs `params`. Under
      optax.inject_hyperparams pass static_args=("bits", "block", "min_size").

    Example:
      >>> params = {"w": jnp.ones((512, 512), jnp.bfloat16)}
      >>> tx = adamw7(1e-3)
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.ones((512, 512), jnp.bfloat16)}
      >>> updates, state = tx.update(grads, state, params)
      >>> optax.apply_updates(params, updates)["w"].dtype
      dtype(bfloat16)

    References:
      FlashOptim, arXiv 2602.23349.
    """
    adamw = optax.adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        weight_decay=weight_decay,
        mask=mask,
        nesterov=nesterov,
    )
    moments = low_bit(
        adamw,
        bits=bits,
        block=block,
        roles=roles,
        min_size=min_size,
        keep=keep,
    )
    return optax.chain(moments, split_weights())


def _no_correction(p: Any) -> Any:
    if jnp.result_type(p) != jnp.bfloat16:
        return optax.MaskedNode()
    return _leaves.zeros(p, dtype=jnp.int8)


def _unit(p: Array) -> Array:
    """Return ulp(p) / 256 in float32: 0 for 0, and where it would be subnormal."""
    bits = jax.lax.bitcast_convert_type(p, jnp.uint16) & jnp.uint16(0x7F80)
    power = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    return power.astype(jnp.float32) * 2.0**-15


def _joined(p: Array, c: Array) -> Array:
    wide = p.astype(jnp.float32)
    return jnp.where(
        jnp.isfinite(wide), wide + c.astype(jnp.float32) * _unit(p), wide
    )


def _correction(w: Array, p: Array) -> Array:
    # Within +-127, p stays what p + c rounds to: splitting a joined weight is exact.
    unit = _unit(p)
    usable = (unit > 0) & jnp.isfinite(w) & jnp.isfinite(unit)
    steps = (w - p.astype(jnp.float32)) / jnp.where(usable, unit, 1)
    return jnp.where(usable, jnp.clip(jnp.round(steps), -127, 127), 0).astype(
        jnp.int8
    )


def _is_state(x: Any) -> bool:
    return isinstance(x, SplitWeightsState)


def _corrections(name: str, params: Params, opt_state: Any) -> dict[str, Array]:
    """Return {path: correction} of all states of `split_weights`; raise if they don't fit."""
    states = [
        x for x in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(x)
    ]
    if not states:
        raise ValueError(
            f"memopt.{name}: `opt_state` has no state of split_weights: give that of "
            "a chain that ends with it"
        )
    corrections: dict[str, Array] = {}
    for state in states:
        corrections |= _tree.by_path(state.correction)
    table = _tree.by_path(params)
    for path, c in corrections.items():
        if path not in table or jnp.shape(table[path]) != c.shape:
            raise ValueError(
                f"memopt.{name}: `opt_state` has a correction {c.shape} for {path!r}, "
                "and there is no such parameter: give the state of these parameters"
            )
    return corrections
