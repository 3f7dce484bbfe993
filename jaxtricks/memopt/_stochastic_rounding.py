"""Round updates of low-precision parameters at random, so that none is lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtricks import _dtypes, _random_bits, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Key, Params
from jaxtricks.memopt import _leaves


class StochasticRoundState(NamedTuple):
    """State of `stochastic_round`.

    Attributes:
      count: updates so far, int32 []; every rounding is a function of it, the seed and
        the path.
    """

    count: Any


@checked
def stochastic_round(seed: Any) -> optax.GradientTransformation:
    """Round parameters below float32 at random, without bias; last in a chain.

    update <- SR(p + u) - p in float32, where SR rounds to a neighbour of p + u in the
    dtype of p: to the upper one with probability (p + u - lower) / (upper - lower).

    A bfloat16 weight has 8 bits: rounding to the nearest loses a step below 1/512 of
    the weight, while random rounding takes it on average. `optax.apply_updates` and
    `nnx.Optimizer`, which add the update and cast, land exactly on the rounded value.
    Leaves of float32 and float64 pass unchanged.

    The bits are a hash of seed, step, path and place: they do not depend on how a leaf
    is sharded, and cost no memory. Under `jax.vmap` over an ensemble one seed means the
    same bits for all members: build the transformation inside, `stochastic_round(key)`,
    and map over the keys too.

    Args:
      seed: an int, or a key of `jax.random.key`.

    Returns:
      A GradientTransformation whose update needs `params`.

    Raises:
      ValueError: a seed that is neither; in `update`, no `params`.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), stochastic_round(0))
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> updates, _ = tx.update(jnp.full(10_000, -1e-3, jnp.float32), state, params)
      >>> new = optax.apply_updates(params, updates)  # the neighbours of 1.001 are 1 and 1.0078125
      >>> new.dtype, round(float(new.astype(jnp.float32).mean()), 3)
      (dtype(bfloat16), 1.001)

    References:
      Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical
      Precision", arXiv 1502.02551, section 3.
    """

    if not hasattr(seed, "dtype") and not isinstance(seed, int):
        raise ValueError(
            f"memopt.stochastic_round: `seed` is {seed!r}: give an int or a key"
        )

    def init_fn(params: Params) -> StochasticRoundState:
        del params
        return StochasticRoundState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: Any, state: Any, params: Params | None = None
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "memopt.stochastic_round needs `params`: call tx.update(grads, "
                "state, params)"
            )
        at_step = _random_bits.of_step(_key(seed), state.count)
        count = optax.safe_increment(state.count)
        return _rounded(updates, params, at_step), StochasticRoundState(count)

    return optax.GradientTransformation(init_fn, update_fn)


@checked
def apply_updates(
    params: Params, updates: Any, *, key: Key | None = None
) -> Params:
    """Return params + updates in the dtypes of params, rounded at random with a key.

    Args:
      params: pytree of arrays.
      updates: the same tree of updates.
      key: rounds leaves below float32 as `stochastic_round` does; None = to the
        nearest, as `optax.apply_updates`.

    Returns:
      The new parameters.

    Example:
      >>> params = {"w": jnp.ones(3, jnp.bfloat16)}
      >>> apply_updates(params, {"w": jnp.full(3, 0.5)}, key=jax.random.key(0))["w"].tolist()
      [1.5, 1.5, 1.5]
    """
    if key is not None:
        updates = _rounded(updates, params, _random_bits.of_step(key, 0))
    return optax.apply_updates(params, updates)


def _key(seed: Any) -> Key:
    typed = hasattr(seed, "dtype") and jnp.issubdtype(
        seed.dtype, jax.dtypes.prng_key
    )
    return seed if typed else jax.random.key(seed)


def _rounded(updates: Any, params: Params, at_step: Array) -> Any:
    """Return float32 updates that land on rounded values."""
    weights = _tree.by_path(params)

    def round_leaf(path: str, u: Any) -> Any:
        p = _leaves.lookup("stochastic_round", weights, path, "`params`")
        if not _dtypes.is_floating(p) or p.dtype.itemsize > 2:
            return u
        return _rounded_leaf(u, p, _random_bits.of_leaf(at_step, path))

    return _tree.map_with_path(round_leaf, updates)


# Leaves of one shape share a trace.
@jax.jit
def _rounded_leaf(u: Any, p: Any, seed: Array) -> Array:
    wide = p.astype(jnp.float32)
    chance = _random_bits.uniform(seed, p.shape)
    return to_neighbour(wide + u.astype(jnp.float32), p.dtype, chance) - wide


def to_neighbour(x: Array, dtype: Any, chance: Array) -> Array:
    """Round x (float32) up where `chance` is below the remainder, else down.

    `chance` is uniform over the multiples of 2^-16 in [0, 1). Between two bfloat16
    numbers there are exactly 16 bits, so the probability is exact for bfloat16.
    """
    info = jnp.finfo(dtype)
    if dtype == jnp.bfloat16:
        rounded = _to_neighbour_in_bfloat16(x, chance)
    else:
        _, exponent = jnp.frexp(x)  # |x| = f 2^exponent with 1/2 <= f < 1
        spacing = jnp.maximum(exponent - 1, info.minexp) - info.nmant
        steps = jnp.ldexp(x, -spacing)
        lower = jnp.floor(steps)
        up = chance < steps - lower
        rounded = jnp.ldexp(lower + up.astype(jnp.float32), spacing)
    # Beyond the range, and for NaN, round to the nearest.
    inside = jnp.abs(x) <= float(info.max)
    return jnp.where(inside, rounded, x.astype(dtype).astype(jnp.float32))


def _to_neighbour_in_bfloat16(x: Array, chance: Array) -> Array:
    """Do the same on bits: bfloat16 is the upper half of a float32.

    XLA's CPU backend takes 20 ms more to compile frexp and ldexp in every leaf.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    remainder = (bits & jnp.uint32(0xFFFF)).astype(jnp.float32) / 2**16
    # Away from zero, which is up for positive and down for negative numbers.
    away = jnp.where(x < 0, chance >= 1 - remainder, chance < remainder)
    upper_half = (bits >> jnp.uint32(16)) + away.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(
        upper_half << jnp.uint32(16), jnp.float32
    )
