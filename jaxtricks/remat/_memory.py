"""What a compiled program needs: bytes from XLA's buffer assignment, FLOPs from the jaxpr."""

import dataclasses
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxtricks import _compat, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._jaxpr import flops
from jaxtricks.remat._recompute import is_recomputed


class Report(NamedTuple):
    """Memory and arithmetic of one compiled function.

    Attributes:
      temp: bytes of temporaries.
      args, outs: bytes of arguments and results.
      alias: bytes of results that reuse donated arguments.
      peak: args + outs - alias + temp, bytes.
      flops: floating-point operations, loop bodies counted as often as they run.
    """

    temp: int
    args: int
    outs: int
    alias: int
    peak: int
    flops: int

    def __str__(self) -> str:
        rows = [(f, _table.format_bytes(getattr(self, f))) for f in self._fields[:-1]]
        return str(
            _table.make(("memory", "bytes"), [*rows, ("flops", f"{self.flops:.3e}")])
        )


@checked
def memory_analysis(fn: Callable[..., Any], *args: Any) -> Report:
    """Bytes and FLOPs of fn(*args), compiled for the default backend; nothing is run.

    Args:
      fn: a function, or one already jitted (its donation and shardings are respected).
      *args: arrays or ShapeDtypeStructs.

    Returns:
      Report; the constant that some backends add to their temporaries is measured with
      a trivial program and subtracted.

    Example:
      >>> memory_analysis(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), jnp.float32)).flops
      1024
    """
    jitted: Any = fn if hasattr(fn, "trace") else jax.jit(fn)
    traced = jitted.trace(*args)
    return report(traced.lower().compile(), traced.jaxpr)


def report(compiled: Any, program: _jaxpr.ClosedJaxpr) -> Report:
    """Report of an executable and the jaxpr it was made from; dead code counts no operations."""
    m = compiled.memory_analysis()
    temp = max(0, m.temp_size_in_bytes - _constant_temp())
    args, outs, alias = (
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
    )
    needed = flops(_jaxpr.live(program))
    return Report(temp, args, outs, alias, args + outs - alias + temp, needed)


def refusal(error: Exception, program: _jaxpr.ClosedJaxpr) -> Report | None:
    """Report of a program that the compiler refused for want of memory; None if that is not what it said.

    TPU's compiler names what the program would need; arguments and results stay
    uncounted.
    """
    text = str(error)
    found = re.search(r"(?:temporaries \(|Used )([0-9.]+)([KMG]?)", text)
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        return None
    temp = int(float(found[1]) * 1024 ** " KMG".index(found[2] or " "))
    return Report(temp, 0, 0, 0, temp, flops(_jaxpr.live(program)))


def _constant_temp() -> int:
    # libtpu reports 2**32 more than a program uses; XLA's CPU backend reports 0.
    compiled: Any = jax.jit(lambda x: x + 1).lower(jnp.float32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# Whether recomputation lowers the memory of a compiled step.


_BODIES = ("scan", "while", "cond", "jit")


@dataclasses.dataclass(frozen=True)
class Effect:
    """Figures of a function with its checkpoints and without.

    Attributes:
      with_: report of jit(value_and_grad(fn)) as fn is.
      without: the same with the checkpoints written out.
    """

    with_: Report
    without: Report

    @property
    def saved(self) -> int:
        """Bytes of temporaries that the checkpoints save; negative where they cost memory."""
        return self.without.temp - self.with_.temp

    def __bool__(self) -> bool:
        return self.saved > 0

    def __str__(self) -> str:
        rows = [
            (
                label,
                _table.format_bytes(r.temp),
                _table.format_bytes(r.peak),
                f"{r.flops:.3e}",
            )
            for label, r in (("with", self.with_), ("without", self.without))
        ]
        return str(_table.make(("checkpoints", "temp", "peak", "flops"), rows))


@checked
def check_effective(
    fn: Callable[..., Any], *args: Any, argnums: int | Sequence[int] = 0
) -> Effect:
    """Whether the checkpoints in a loss make jit(value_and_grad(fn)) need less memory; warns if not.

    Compiles fn as it is and with every checkpoint (jax.checkpoint, flax's remat,
    `recompute_grad` and what builds on it) replaced by what it wraps; nothing is run.
    Checkpoints in the bodies of loops and branches count; those inside custom rules of
    others are left alone.

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

    reports = [
        memory_analysis(jax.value_and_grad(f, argnums), *args) for f in (fn, plain)
    ]
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
    program = _jaxpr.inlined(closed, also=_is_checkpoint)
    jaxpr = program.jaxpr
    eqns = [
        eqn.replace(
            params=_compat.with_bodies(
                eqn, [*map(_without_checkpoints, _compat.bodies(eqn))]
            )
        )
        if _compat.primitive(eqn) in _BODIES
        else eqn
        for eqn in jaxpr.eqns
    ]
    flat_ = _jaxpr.made(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, eqns)
    return _jaxpr.ClosedJaxpr(flat_, program.consts)


# The machine that a plan is compiled for: the one at hand, or a TPU that is not
# attached.


# libtpu asks a metadata server what it runs on, and waits for it, unless it is told;
# and lets one process at a time use it, as if it held a chip.
_NO_SERVER = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def platform(topology: str | None) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if topology is None else "tpu"


def shape(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a tracer or a shape, weak types kept; placed if there is a sharding."""
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type
    )


def placed(tree: Any, topology: str | None) -> Any:
    """The shapes of a tree on the target; leaves that have a sharding of their own keep it."""
    if topology is None:
        return tree
    chip = first_chip(topology)
    return jax.tree.map(lambda x: x if _has_place(x) else shape(x, chip), tree)


def _has_place(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None


@functools.cache
def first_chip(topology: str) -> SingleDeviceSharding:
    """The first chip of a TPU topology ("v5e:2x2"; "v5e:1x1" is one chip) that need not be attached.

    Raises:
      ValueError: libtpu is not installed, or does not know the topology.
    """
    kind, _, shape = topology.partition(":")
    bounds = tuple(int(n) if n.isdigit() else 0 for n in shape.split("x"))
    if not shape or not all(bounds):
        raise ValueError(f'topology must be like "v5e:2x2", not {topology!r}')
    if jax.default_backend() != "tpu":
        accelerator = {"v5e": "v5litepod"}.get(kind, kind)
        chips = {"TPU_ACCELERATOR_TYPE": f"{accelerator}-{math.prod(bounds)}"}
        for key, value in (_NO_SERVER | chips).items():
            os.environ.setdefault(key, value)
    per_host = (*bounds, 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=per_host
        )
    except Exception as error:  # whatever a missing or older libtpu makes of it
        raise ValueError(
            f"topology={topology!r} cannot be compiled for ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): install jaxtricks[tpu], which brings libtpu"
        ) from error
    return SingleDeviceSharding(found.devices[0])


def trace(
    program: Callable[..., Any], args: Any, topology: str | None
) -> jax.stages.Traced:
    """A jitted (or plain) function traced on the shapes of its arguments, on the target."""
    jitted: Any = program if hasattr(program, "trace") else jax.jit(program)
    return jitted.trace(*placed(args, topology))
