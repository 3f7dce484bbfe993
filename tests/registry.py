"""One canonical setting of every public transform; tests/test_laws.py runs every law over all of them.

A new public transform is not done before it has its line here.
"""

from collections.abc import Callable
from typing import Any

# name -> factory of an optax.GradientTransformation
GRADIENT_TRANSFORMS: dict[str, Callable[..., Any]] = {}

# name -> factory of a schedule: step -> value
SCHEDULES: dict[str, Callable[..., Any]] = {}

# name -> factory (counts) -> loss(logits [..., C], labels [...]) -> per-example [...]
LOSSES: dict[str, Callable[..., Any]] = {}

# name -> wrapper fn -> fn that keeps values and gradients (to rounding where it says so)
WRAPPERS: dict[str, Callable[..., Any]] = {}

# name -> factory (rngs) -> nnx module that maps [N, 8, 8, 4] to [N, 8, 8, 4]
MODULES: dict[str, Callable[..., Any]] = {}
