"""Say what a byte costs that waits in the memory of the host, by the kind of chip."""

from typing import NamedTuple

import jax

from jaxtricks.remat import _memory


class HostMemory(NamedTuple):
    """The memory of the host, as the planner prices it.

    Attributes:
      flops_per_byte: operations that the chip does while one byte is copied.
    """

    flops_per_byte: float


class _Chip(NamedTuple):
    """Peak rate of bfloat16 products, FLOP/s, and of copies to the host, bytes/s.

    One direction, one chip.
    """

    flops: float
    host_bandwidth: float


# FLOP/s: Google Cloud's pages of each generation and NVIDIA's data sheets. Bytes per
# second: 1.5e10 for TPUs from Austin et al., How to Scale Your Model (2025), part 2,
# which gives no other figure for later generations; half of what NVIDIA's data sheets
# give for PCIe in both directions.
_CHIPS = {
    "v4": _Chip(275e12, 1.5e10),
    "v5e": _Chip(197e12, 1.5e10),
    "v5p": _Chip(459e12, 1.5e10),
    "v6e": _Chip(918e12, 1.5e10),
    # A device of JAX is half of a chip.
    "tpu7x": _Chip(1153e12, 1.5e10),
    "T4": _Chip(65e12, 1.6e10),
    "L4": _Chip(121e12, 3.2e10),
    "A100": _Chip(312e12, 3.2e10),
    "H100": _Chip(989e12, 6.4e10),
    "H200": _Chip(989e12, 6.4e10),
}
_DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def host_memory(
    topology: str | None,
    bandwidth: float | None,
) -> HostMemory | None:
    """Return the memory to offload to; None if there is none, or its price is unknown.

    Args:
      topology: of `plan`.
      bandwidth: bytes per second from the chip to the host; None takes the table's, 0
        offloads nothing.

    Raises:
      ValueError: bandwidth is negative or not finite.
    """
    if bandwidth is not None and not 0 <= bandwidth < float("inf"):
        raise ValueError(
            f"host_bandwidth is {bandwidth}: give bytes per second, or 0 to offload "
            "nothing"
        )
    # XLA's CPU backend has one memory: what is offloaded would stay where it is.
    if bandwidth == 0 or _memory.platform(topology) == "cpu":
        return None
    chip = _CHIPS.get(_kind(topology))
    if bandwidth is None:
        if chip is None:
            return None
        bandwidth = chip.host_bandwidth
    # An unknown chip is as fast as the fastest: recomputation is cheap there.
    flops = chip.flops if chip else max(c.flops for c in _CHIPS.values())
    return HostMemory(flops / bandwidth)


def _kind(topology: str | None) -> str:
    if topology is not None:
        return topology.partition(":")[0]
    kind = jax.devices()[0].device_kind
    if kind in _DEVICE_KINDS:
        return _DEVICE_KINDS[kind]
    # "NVIDIA A100-SXM4-40GB", "TPU v4"
    words = kind.replace("-", " ").split()
    return next((word for word in words if word in _CHIPS), kind)
