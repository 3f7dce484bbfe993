"""The machine that a plan is compiled for: the one at hand, or a TPU that is not attached."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# libtpu asks a metadata server what it runs on, and waits for it, unless it is told; and lets one process at
# a time use it, as if it held a chip.
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
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


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


def trace(program: Callable[..., Any], args: Any, topology: str | None) -> jax.stages.Traced:
    """A jitted (or plain) function traced on the shapes of its arguments, on the target."""
    jitted: Any = program if hasattr(program, "trace") else jax.jit(program)
    return jitted.trace(*placed(args, topology))
