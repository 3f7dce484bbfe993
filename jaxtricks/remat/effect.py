"""Whether recomputation lowers the memory of a compiled step."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtricks import _compat, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks.remat import _memory, flat
from jaxtricks.remat.recompute import is_recomputed

_BODIES = ("scan", "while", "cond", "jit")


@dataclasses.dataclass(frozen=True)
class Effect:
    """Figures of a function with its checkpoints and without.

    Attributes:
      with_: report of jit(value_and_grad(fn)) as fn is.
      without: the same with the checkpoints written out.
    """

    with_: _memory.Report
    without: _memory.Report

    @property
    def saved(self) -> int:
        """Bytes of temporaries that the checkpoints save; negative where they cost memory."""
        return self.without.temp - self.with_.temp

    def __bool__(self) -> bool:
        return self.saved > 0

    def __str__(self) -> str:
        rows = [
            (label, _table.format_bytes(r.temp), _table.format_bytes(r.peak), f"{r.flops:.3e}")
            for label, r in (("with", self.with_), ("without", self.without))
        ]
        return str(_table.make(("checkpoints", "temp", "peak", "flops"), rows))


@checked
def check_effective(fn: Callable[..., Any], *args: Any, argnums: int | Sequence[int] = 0) -> Effect:
    """Whether the checkpoints in a loss make jit(value_and_grad(fn)) need less memory; warns if not.

    Compiles fn as it is and with every checkpoint (jax.checkpoint, flax's remat, `recompute_grad` and what
    builds on it) replaced by what it wraps; nothing is run. Checkpoints in the bodies of loops and branches
    count; those inside custom rules of others are left alone.

    Args:
      fn: function with one floating scalar as its result.
      *args: arrays or ShapeDtypeStructs.
      argnums: what to differentiate by, as in jax.grad.

    Returns:
      Effect; true if the bytes of temporaries fall.

    Raises:
      ValueError: fn has no checkpoint, or its result is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtricks.remat import recompute_grad
      >>> block = recompute_grad(lambda x: jnp.sin(jnp.sin(x @ x) @ x))
      >>> x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
      >>> bool(check_effective(lambda x: block(block(block(block(x)))).sum(), x))
      True
    """
    closed, _ = _jaxpr.trace(fn, *args)
    if [getattr(aval, "shape", None) for aval in closed.out_avals] != [()]:
        raise ValueError("remat.check_effective: `fn` must return one scalar, the loss")
    if not any(map(_is_checkpoint, _jaxpr.walk(closed.jaxpr))):
        raise ValueError(
            "remat.check_effective: `fn` has no checkpoint: wrap its blocks in jaxtricks.remat.recompute_grad"
        )
    bare = _without_checkpoints(closed)

    def plain(*args: Any) -> Any:
        return _jaxpr.as_fun(bare.jaxpr)(bare.consts, *jax.tree.leaves(args))[0]

    reports = [_memory.memory(jax.value_and_grad(f, argnums), *args) for f in (fn, plain)]
    effect = Effect(*reports)
    if not effect:
        after, before = (_table.format_bytes(r.temp) for r in reports)
        warnings.warn(
            f"the checkpoints save no memory: {after} of temporaries with them, {before} without; "
            "use jaxtricks.remat.recompute_grad, one wrapper a block",
            stacklevel=2,
        )
    return effect


def _is_checkpoint(eqn: Any) -> bool:
    return _compat.primitive(eqn) == "checkpoint" or is_recomputed(eqn)


def _without_checkpoints(closed: _jaxpr.ClosedJaxpr) -> _jaxpr.ClosedJaxpr:
    program = flat.inlined(closed, also=_is_checkpoint)
    jaxpr = program.jaxpr
    eqns = [
        eqn.replace(
            params=_compat.with_bodies(eqn, [*map(_without_checkpoints, _compat.bodies(eqn))])
        )
        if _compat.primitive(eqn) in _BODIES
        else eqn
        for eqn in jaxpr.eqns
    ]
    flat_ = _jaxpr.made(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, eqns)
    return _jaxpr.ClosedJaxpr(flat_, program.consts)
