"""Echo on the device: one transfer of a batch, several augmented updates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Key
from jaxtricks.echo import _checks

Step = Callable[[Any, Any], tuple[Any, Any]]


@checked
def augmentation_keys(
    key: Key, ordinal: Array | int, copy: Array | int
) -> Array:
    """Derive the key of an augmentation, elementwise.

    fold_in(fold_in(key, ordinal), copy)

    It does not depend on the order of the stream, on the schedule or on the number of
    workers.

    Args:
      key: one typed key.
      ordinal: which element of the source, integers of any shape: `Echoed.ordinal`.
      copy: which of its copies, of the same shape: `Echoed.copy`.

    Returns:
      Keys of that shape.

    Raises:
      ValueError: if the key is not one typed key.

    >>> augmentation_keys(jax.random.key(0), jnp.arange(4), jnp.zeros(4, int)).shape
    (4,)
    """
    typed = hasattr(key, "dtype") and jnp.issubdtype(
        key.dtype, jax.dtypes.prng_key
    )
    if not typed or jnp.shape(key):
        description = (
            f"an array of {jnp.shape(key)} keys" if typed else "not a typed key"
        )
        raise ValueError(
            f"echo.augmentation_keys: `key` is {description}: pass one key of "
            "jax.random.key, or for a legacy jax.random.PRNGKey its "
            "jax.random.wrap_key_data"
        )
    ordinal, copy = jnp.broadcast_arrays(
        jnp.asarray(ordinal), jnp.asarray(copy)
    )

    def one(ordinal: Array, copy: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, ordinal), copy)

    flat = jax.vmap(one)(ordinal.reshape(-1), copy.reshape(-1))
    return flat.reshape(ordinal.shape)


@checked
def echo_step(
    step: Step,
    factor: int,
    *,
    augment: Callable[[Array, Any], Any] | None = None,
    donate: bool = False,
) -> Callable[[Any, Any, Array | int, Array], tuple[Any, Any]]:
    """Make `factor` updates of one batch that was sent to the device once: batch echoing.

    One jitted scan. Copy k of batch number n is augmented with the key
    fold_in(fold_in(key, n), k), so that all copies differ, in every run in the same
    way.

    Args:
      step: (carry, batch) -> (carry, metrics), a training step; carry keeps its shapes
        and dtypes.
      factor: updates per batch, a whole number >= 1.
      augment: (key, batch) -> batch, traced; None trains on equal copies.
      donate: let the updates reuse the memory of the carry that was passed. The batch
        is never donated: all updates read it.

    Returns:
      (carry, batch, ordinal, key) -> (carry, metrics), the metrics of each update
      stacked [factor, ...]; ordinal is the number of the batch, an integer.

    Raises:
      ValueError: factor below 1 or not whole; or a call with arrays that were donated
        before.

    >>> step = lambda carry, batch: (carry + batch.sum(), carry)
    >>> noisy = lambda key, batch: batch + jax.random.bernoulli(key, shape=batch.shape)
    >>> three = echo_step(step, 3, augment=noisy)
    >>> carry, before = three(jnp.zeros(()), jnp.ones(4), 0, jax.random.key(0))
    >>> before.shape
    (3,)

    References:
      Choi et al., Faster neural network training with data echoing, arXiv 1907.05550:
      batch echoing.
    """
    copies = _checks.index(factor)
    if copies is None or copies < 1:
        raise ValueError(
            f"echo.echo_step: `factor` is {_checks.spell(factor)}: pass a "
            "whole number >= 1, or use echo.echo"
        )

    def run(
        carry: Any, batch: Any, ordinal: Array, key: Array
    ) -> tuple[Any, Any]:
        key = jax.random.fold_in(key, ordinal)

        def update(carry: Any, copy: Array) -> tuple[Any, Any]:
            augmented = (
                batch
                if augment is None
                else augment(jax.random.fold_in(key, copy), batch)
            )
            return step(carry, augmented)

        return jax.lax.scan(update, carry, jnp.arange(copies))

    compiled = jax.jit(run, donate_argnums=0 if donate else ())

    def echoed(
        carry: Any, batch: Any, ordinal: Array | int, key: Array
    ) -> tuple[Any, Any]:
        _refuse_deleted(
            carry, "carry", "go on with the one that the last call returned"
        )
        _refuse_deleted(
            batch, "batch", "no step may donate the batch that comes again"
        )
        return compiled(carry, batch, ordinal, key)

    return echoed


def _refuse_deleted(tree: Any, name: str, cure: str) -> None:
    for leaf in jax.tree.leaves(tree):
        concrete = isinstance(leaf, jax.Array) and not isinstance(
            leaf, jax.core.Tracer
        )
        if concrete and leaf.is_deleted():
            raise ValueError(
                f"echo.echo_step: `{name}` was donated to an earlier call: {cure}"
            )
