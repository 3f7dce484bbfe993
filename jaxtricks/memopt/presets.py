"""Settings under which `adafactor` equals other implementations."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxtricks._typing import Roles


def _last_two(path: str, shape: tuple[int, ...]) -> Roles:
    """Transformers: the last two axes of everything of rank >= 2."""
    rank = len(shape)
    return ("none",) * (rank - 2) + ("in", "out") if rank >= 2 else ("none",) * rank


def _largest_late(path: str, shape: tuple[int, ...]) -> Roles:
    """optax, hence Big Vision: the two largest axes, ties to the later."""
    order = sorted(range(len(shape)), key=lambda i: shape[i])
    names = dict(zip(order[-2:], ("in", "out"), strict=True)) if len(shape) >= 2 else {}
    return tuple(names.get(i, "none") for i in range(len(shape)))


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mesh": MappingProxyType({"clip_per_slice": False}),
        "t5x": MappingProxyType({"clip_per_slice": True}),
        "hf": MappingProxyType({"axes": _last_two, "min_dim_size_to_factor": 0}),
        "big_vision": MappingProxyType(
            {
                "axes": _largest_late,
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
"""Keyword arguments of `adafactor`: "mesh" (Mesh TensorFlow), "t5x", "hf" (Transformers), "big_vision".

What they leave to you: the learning rate (t5x and Big Vision have no default), the axes of "mesh" and
"t5x" where layers are stacked, and weight decay, which t5x and Big Vision do not multiply by the
learning rate (divide theirs by it)."""
