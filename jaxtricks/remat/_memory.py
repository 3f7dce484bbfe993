"""Measure what a compiled program needs: bytes by XLA's buffer assignment, and FLOPs.

Also for a TPU that is not attached: `trace` places a program on a topology, for which
libtpu compiles it.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxtricks import _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._flops import flops
from jaxtricks.remat._recompute import is_recomputed


class Report(NamedTuple):
    """Memory and arithmetic of one compiled function.

    Attributes:
      temp: bytes of temporaries.
      args, outs: bytes of arguments and results.
      alias: bytes of results that reuse donated arguments.
      peak: args + outs - alias + temp, bytes.
      flops: floating-point operations, loop bodies counted as often as they run.
      host: bytes of temporaries in the memory of the host; `temp` and `peak` are those
        of the device.
    """

    temp: int
    args: int
    outs: int
    alias: int
    peak: int
    flops: int
    host: int = 0

    def __str__(self) -> str:
        rows = [
            (field, _table.format_bytes(getattr(self, field)))
            for field in self._fields
            if field != "flops" and (self.host or field != "host")
        ]
        rows.append(("flops", f"{self.flops:.3e}"))
        return str(_table.make(("memory", "bytes"), rows))


@checked
def memory_analysis(
    fn: Callable[..., Any],
    *args: Any,
) -> Report:
    """Measure the bytes and FLOPs of fn(*args), compiled for the default backend.

    Nothing is run. The constant that some backends add to their temporaries is measured
    with a trivial program and subtracted.

    Args:
      fn: a function, or one already jitted (its donation and shardings are respected).
      *args: arrays or ShapeDtypeStructs.

    Example:
      >>> memory_analysis(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), jnp.float32)).flops
      1024
    """
    traced = _as_jitted(fn).trace(*args)
    return report(traced.lower().compile(), traced.jaxpr)


def _as_jitted(fn: Callable[..., Any]) -> Any:
    return fn if hasattr(fn, "trace") else jax.jit(fn)


def report(
    compiled: Any,
    program: _jaxpr.ClosedJaxpr,
) -> Report:
    """Return the report of an executable and its jaxpr, without dead code."""
    sizes = compiled.memory_analysis()
    temp = max(
        0, sizes.temp_size_in_bytes - _constant_temp(jax.default_backend())
    )
    args = sizes.argument_size_in_bytes
    outs = sizes.output_size_in_bytes
    alias = sizes.alias_size_in_bytes
    return Report(
        temp,
        args,
        outs,
        alias,
        args + outs - alias + temp,
        operations(program),
        sizes.host_temp_size_in_bytes,
    )


def refusal(
    error: Exception,
    program: _jaxpr.ClosedJaxpr,
) -> Report | None:
    """Return the report of a program that the compiler refused for want of memory.

    TPU's compiler names what the program would need; arguments and results stay
    uncounted. None if the error says something else.
    """
    text = str(error)
    match = re.search(r"(?:temporaries \(|Used )([0-9.]+)([KMG]?)", text)
    if "RESOURCE_EXHAUSTED" not in text or match is None:
        return None
    # In units of 1024.
    power = " KMG".index(match[2] or " ")
    temp = int(float(match[1]) * 1024**power)
    return Report(
        temp,
        0,
        0,
        0,
        temp,
        operations(program),
    )


def operations(program: _jaxpr.ClosedJaxpr) -> int:
    """Return the floating-point operations of a program, without dead code."""
    # XLA's own count takes the body of a loop once.
    return flops(_jaxpr.live(program))


@functools.cache
def _constant_temp(backend: str) -> int:
    """Return what this backend, the default one, adds to the temporaries of any program."""
    # libtpu reports 2**32 more than a program uses; XLA's CPU backend reports 0.
    compiled: Any = jax.jit(lambda x: x + 1).lower(jnp.float32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# Whether checkpoints lower the memory of a compiled step.


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
        """Bytes of temporaries that the checkpoints save; negative if they add some."""
        return self.without.temp - self.with_.temp

    def __bool__(self) -> bool:
        return self.saved > 0

    def __str__(self) -> str:
        rows = []
        for label, report in (("with", self.with_), ("without", self.without)):
            temp, peak = map(_table.format_bytes, (report.temp, report.peak))
            rows.append((label, temp, peak, f"{report.flops:.3e}"))
        return str(_table.make(("checkpoints", "temp", "peak", "flops"), rows))


@checked
def check_effective(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
) -> Effect:
    """Check that the checkpoints in a loss lower its memory; warn if they do not.

    Compiles jit(value_and_grad(fn)) as it is and with every checkpoint (jax.checkpoint,
    flax's remat, `recompute_grad` and what builds on it) replaced by what it wraps;
    nothing is run. Checkpoints in the bodies of loops and branches count; those inside
    custom rules of others are left alone.

    Args:
      fn: function with one floating scalar as its result.
      *args: arrays or ShapeDtypeStructs.
      argnums: what to differentiate by, as in jax.grad.

    Returns:
      Effect; true if the bytes of temporaries fall.

    Raises:
      ValueError: fn has no checkpoint, or its result is not a scalar.

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
        raise ValueError(
            "remat.check_effective: `fn` must return one scalar, the loss"
        )
    if not any(map(_is_checkpoint, _jaxpr.walk(closed.jaxpr))):
        raise ValueError(
            "remat.check_effective: `fn` has no checkpoint: wrap its blocks in "
            "jaxtricks.remat.recompute_grad"
        )
    bare = _without_checkpoints(closed)

    # Positional arguments only: keywords would need fn's signature.
    def plain(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        return _jaxpr.as_fun(bare.jaxpr)(bare.consts, *leaves)[0]

    reports = [
        memory_analysis(jax.value_and_grad(f, argnums), *args)
        for f in (fn, plain)
    ]
    effect = Effect(*reports)
    if not effect:
        after, before = (_table.format_bytes(report.temp) for report in reports)
        warnings.warn(
            f"the checkpoints save no memory: {after} of temporaries with "
            f"them, {before} without; use jaxtricks.remat.recompute_grad, one "
            "wrapper per block",
            stacklevel=2,
        )
    return effect


def _is_checkpoint(eqn: Any) -> bool:
    return _jaxpr.primitive(eqn) == "checkpoint" or is_recomputed(eqn)


def _without_checkpoints(closed: _jaxpr.ClosedJaxpr) -> _jaxpr.ClosedJaxpr:
    program = _jaxpr.inline(closed, also=_is_checkpoint)
    jaxpr = program.jaxpr
    eqns = []
    for eqn in jaxpr.eqns:
        if _jaxpr.primitive(eqn) in ("scan", "while", "cond", "jit"):
            inner = map(_without_checkpoints, _jaxpr.bodies(eqn))
            eqn = _jaxpr.replace_bodies(eqn, list(inner))
        eqns.append(eqn)
    bare = _jaxpr.build(
        jaxpr.constvars,
        jaxpr.invars,
        jaxpr.outvars,
        eqns,
    )
    return _jaxpr.ClosedJaxpr(bare, program.consts)


# The machine that a program is compiled for: the present one, or a TPU that is not
# attached.


def libtpu_environment(topology: str) -> dict[str, str]:
    """Return environment variables with which libtpu compiles where there is no TPU.

    Set them before the process first uses libtpu. Without them libtpu asks a
    metadata server what it runs on, and waits for it; and it lets one process at a time
    use it, as if it held a chip.

    Args:
      topology: "v5e:2x2" and the like; see `plan`.

    Raises:
      ValueError: text that is not like "v5e:2x2".

    Example:
      >>> libtpu_environment("v5e:2x2")["TPU_ACCELERATOR_TYPE"]
      'v5litepod-4'
    """
    kind, bounds = _parse_topology(topology)
    accelerator = {"v5e": "v5litepod"}.get(kind, kind)
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{accelerator}-{math.prod(bounds)}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def platform(topology: str | None) -> str:
    """Return "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if topology is None else "tpu"


def shape(
    x: Any,
    sharding: Any = None,
) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an array, a tracer or a shape; weak types stay weak."""
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        sharding=sharding,
        weak_type=aval.weak_type,
    )


def trace(
    program: Callable[..., Any],
    args: Any,
    topology: str | None,
) -> jax.stages.Traced:
    """Trace a jitted (or plain) function on its arguments' shapes, on the target."""
    return _as_jitted(program).trace(*_placed(args, topology))


def _placed(tree: Any, topology: str | None) -> Any:
    """Return the shapes of a tree on the target; leaves with a sharding keep theirs."""
    if topology is None:
        return tree
    chip = _first_chip(topology)

    def place(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None:
            return x
        return shape(x, chip)

    return jax.tree.map(place, tree)


def _parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """Split "v5e:2x2" into the kind of chip and the bounds of their grid."""
    kind, _, grid = topology.partition(":")
    bounds = tuple(int(n) if n.isdigit() else 0 for n in grid.split("x"))
    if not grid or not all(bounds):
        raise ValueError(f'topology must be like "v5e:2x2", not {topology!r}')
    return kind, bounds


@functools.cache
def _first_chip(topology: str) -> SingleDeviceSharding:
    """Return the first chip of a TPU topology that need not be attached.

    Raises:
      ValueError: libtpu is not installed, cannot start, or does not know the topology.
    """
    _, bounds = _parse_topology(topology)
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology,
            chips_per_host_bounds=(*bounds, 1, 1)[:3],
        )
    except Exception as error:  # whatever a missing or older libtpu makes of it
        variables = ", ".join(libtpu_environment(topology))
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"topology={topology!r} cannot be compiled for "
            f"({type(error).__name__}: {first_line}): install jaxtricks[tpu], "
            f"which brings libtpu, and without a TPU set {variables} to what "
            "jaxtricks.remat.libtpu_environment returns"
        ) from error
    return SingleDeviceSharding(description.devices[0])
