"""Name the types that the rooms share; array shapes stand in the annotations."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

Array = jax.Array | np.ndarray
"""Arrays that a room accepts: device arrays, tracers and host arrays."""

Params = Any
"""A pytree of floating arrays; None leaves are allowed."""

State = Any
"""A pytree of arrays that a function returns updated (statistics, RNG counts, optimizer state)."""

Scalar = float | int | np.generic | Array
"""A Python number or an array of shape ()."""

Schedule = Callable[[Any], Any]
"""step (int32 []) -> value (float32 []), as in optax."""

ScalarOrSchedule = Scalar | Schedule

Roles = tuple[str, ...]
"""One of "batch", "in", "out", "none" per axis of a parameter."""

PathRule = Callable[[str, tuple[int, ...]], Roles | None]
"""(path, shape) -> roles, or None where the rule has nothing to say."""

Key = jax.Array
"""A typed PRNG key (`jax.random.key`)."""


@runtime_checkable
class ApplyFn(Protocol):
    """The functional form of a model, whatever framework it was written in."""

    def __call__(
        self,
        params: Params,
        state: State,
        /,
        *inputs: Any,
        train: bool,
        key: Key | None = None,
        **kwargs: Any,
    ) -> tuple[Any, State]:
        """Return the output and the new state; `key` may be None only if no RNG is used."""
        ...
