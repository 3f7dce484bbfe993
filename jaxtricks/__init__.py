"""Train with ten techniques as composable JAX, Flax and Optax transforms.

The rooms are echo, amp, memopt, weightstd, agc, remat, ebn, cyclical, reparam and
longtail. Beside them stand `roles` (what each axis of a parameter means), the framework
shells `nnx` and `linen`, and `plot`. Importing this package loads none of them: each is
imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The lazy imports below, spelled out for type checkers and editors.
    from jaxtricks import agc as agc
    from jaxtricks import amp as amp
    from jaxtricks import cyclical as cyclical
    from jaxtricks import ebn as ebn
    from jaxtricks import echo as echo
    from jaxtricks import linen as linen
    from jaxtricks import longtail as longtail
    from jaxtricks import memopt as memopt
    from jaxtricks import nnx as nnx
    from jaxtricks import plot as plot
    from jaxtricks import remat as remat
    from jaxtricks import reparam as reparam
    from jaxtricks import roles as roles
    from jaxtricks import weightstd as weightstd
    from jaxtricks._metrics import metrics as metrics

__version__ = "0.1.0.dev0"

# README badges, cards and notebooks read the project's address from here.
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
        return importlib.import_module(f"{__name__}._metrics").metrics
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
