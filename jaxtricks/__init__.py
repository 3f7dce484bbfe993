"""Ten training techniques as composable JAX, Flax and Optax transforms.

Rooms: echo, amp, memopt, weightstd, agc, remat, ebn, cyclical, reparam, longtail;
beside them `roles` (what each axis of a parameter means), and the thin framework shells
`nnx` and `linen`. Importing this package imports nothing else: every room is loaded
when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# The one place that says where the project lives; README badges, cards and notebooks
# read it from here.
REPO_URL = "https://github.com/jaxtricks/jaxtricks"

KEYS = (
    "echo",
    "amp",
    "memopt",
    "weightstd",
    "agc",
    "remat",
    "ebn",
    "cyclical",
    "reparam",
    "longtail",
)
_MODULES = (*KEYS, "roles", "nnx", "linen", "plot")

__all__ = [*_MODULES, "metrics", "KEYS", "REPO_URL", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module(f"{__name__}._tree").metrics
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
