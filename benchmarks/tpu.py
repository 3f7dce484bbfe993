"""The optimizers' steps compiled for a TPU v5e that is not attached: `python -m benchmarks.tpu`.

For a tree of small leaves the compiler prefetches arrays into VMEM and counts those copies as accesses,
so that the figure depends on how much fits (plain SGD on 12 layers counts 52 bytes a parameter where 12
are needed). One leaf of 8192 x 8192 does not fit, there the count is the traffic with HBM (AdamW: 28
bytes a parameter, each array read and written once), and that is the figure to trust.

Needs libtpu (`pip install 'jaxtricks[tpu]'`; `make test-all` makes .venv-tpu). There are no times in it.
"""

import os

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nothing is run: several processes may compile at once
)  # before jax is imported; without them libtpu asks a metadata server and waits

import functools
from importlib.metadata import version
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import common
from jaxtricks import _table

TOPOLOGY = "v5e:2x2"
HEADERS = ("optimizer", "bytes/param", "to adamw", "temp MiB", "state/param")


@functools.cache
def chips() -> list[Any]:
    """The chips of the topology; they need not exist."""
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGY, chips_per_host_bounds=(2, 2, 1)
    )
    return list(found.devices)


def chip() -> SingleDeviceSharding:
    """The first of them."""
    return SingleDeviceSharding(chips()[0])


def place(tree: Any) -> Any:
    """The shapes, placed on the chip."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip()), tree
    )


def leaf() -> dict[str, Any]:
    """One leaf of 256 MiB: twice the VMEM of a v5e."""
    return common.shapes(kernel=(8192, 8192))


def rows(params: Any, with_int8: bool = True) -> list[tuple[Any, ...]]:
    """One row an optimizer; see `HEADERS`."""
    txs = {
        n: tx
        for n, tx in common.optimizers().items()
        if with_int8 or "int8" not in n
    }
    costs = {
        name: common.cost(common.compile_step(tx, params, place), tx, params)
        for name, tx in txs.items()
    }
    base = costs[common.BASE].accessed
    return [
        (name, c.accessed, c.accessed / base, c.temp / 2**20, c.state)
        for name, c in costs.items()
    ]


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.tpu")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu", "optax")
    )
    heading = (
        f"Optimizers, compiled for one chip of TPU {TOPOLOGY}: `{command}`\n\n{packages}.\n"
        "Exact counts of the compiler; nothing is run. The single leaf's are the traffic with HBM; those of\n"
        "the transformers (width 256) count copies into VMEM too."
    )
    trees = {"one leaf of 8192 x 8192": (leaf(), True)}
    trees |= {
        f"transformer, {n} layers": (common.transformer(n), False)
        for n in (4, 12)
    }
    tables = [
        _table.make((name, *HEADERS[1:]), rows(params, with_int8))
        for name, (params, with_int8) in trees.items()
    ]
    common.publish(tables, heading, args.out)


if __name__ == "__main__":
    main()
