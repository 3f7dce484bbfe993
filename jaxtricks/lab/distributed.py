"""Where a run's arrays lie: a mesh of devices, what is split over it, and who reads what."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtricks import _tree
from jaxtricks.lab.errors import UserError
from jaxtricks.lab.parallel_config import DATA, MODEL, Parallel

# The second of two kernels in a row: it is split along its inputs, so that what lies between the two
# stays where it is (Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3). All others are split along
# their outputs: the TPU's compiler then scatters the residual stream of a ResNet and gathers it again, which
# sends what summing it whole would, and keeps a third less (tests/bench/results/tpu_aot.md).
_SECOND = re.compile(r"(^|/)(second|contract|attention/out)(/|$)")
# Vectors and small kernels are not worth a collective.
_SMALL = 2**10


class Placement(NamedTuple):
    """A mesh with the axes data and model, and whether parameters are split over data too.

    Attributes:
      mesh: all devices of the run.
      fsdp: split parameters and optimizer state over data.
    """

    mesh: Mesh
    fsdp: bool = False

    @classmethod
    def of(cls, cfg: Parallel, devices: Sequence[Any] | None = None) -> "Placement":
        """The mesh of the settings over the first devices; several hosts use all devices.

        Args:
          cfg: the settings.
          devices: to choose from; None is those at hand, others need not be attached
            (`jax.experimental.topologies`).

        Raises:
          UserError: fewer devices than asked for, or some of a host's left over.
        """
        have, axes = devices or jax.devices(), cfg.axes
        if not axes:
            axes = {DATA: len(have) if jax.process_count() > 1 else 1, MODEL: 1}
        need = axes[DATA] * axes[MODEL]
        if need > len(have):
            raise UserError(
                f"--mesh {cfg.mesh} has {need} devices, but there are {len(have)}: lower it"
            )
        if jax.process_count() > 1 and need < len(have):
            raise UserError(
                f"--mesh {cfg.mesh} leaves devices of some host unused: make it {len(have)} devices"
            )
        types = (AxisType.Auto,) * len(axes)
        devices = have[:need]
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)
        return cls(mesh, cfg.fsdp)

    @property
    def everywhere(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """The first axis over data."""
        return NamedSharding(self.mesh, P(DATA))

    def check(self, batch: int) -> None:
        """Raise UserError if a micro-batch does not divide over the mesh."""
        if batch % self.mesh.shape[DATA]:
            raise UserError(
                f"a micro-batch of {batch} does not divide over {self.mesh.shape[DATA]} devices: "
                "choose another --batch"
            )

    def rows(self, batch: int) -> np.ndarray:
        """The rows of a batch that this process reads: those on its devices."""
        index: Any = self.batch.addressable_devices_indices_map((batch,))
        parts = sorted({part[0].indices(batch)[:2] for part in index.values()})
        return np.concatenate([np.arange(*part) for part in parts])

    def put(self, batch: Any) -> Any:
        """A batch on its devices, from this process's rows."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch, x), batch)

    def stored(self, params: Any, roles: Any) -> Any:
        """NamedShardings of parameters between steps.

        Kernels are split over model along their outputs, the second of two along its inputs; under
        `fsdp` also over data, along the largest other axis that divides. What divides by neither
        stays whole.

        Args:
          params: tree of arrays or shapes.
          roles: (path, shape) -> the roles of its axes (`jt.nnx.roles`).
        """
        return self._specs(params, roles, self.fsdp)

    def used(self, params: Any, roles: Any) -> Any:
        """NamedShardings of parameters while a step computes with them: not over data."""
        return self._specs(params, roles, False)

    def _specs(self, params: Any, roles: Any, fsdp: bool) -> Any:
        def sharding(path: str, x: Any) -> NamedSharding:
            spec: list[str | None] = [None] * len(x.shape)
            # The head stays whole over model: the loss wants all the logits of an example in one place.
            if path.endswith("kernel") and not path.startswith("head/"):
                side = "in" if _SECOND.search(path) else "out"
                along = [i for i, role in enumerate(roles(path, x.shape)) if role == side]
                self._split(spec, x.shape, MODEL, along)
            if fsdp and x.size >= _SMALL:
                self._split(spec, x.shape, DATA, range(len(spec)))
            return NamedSharding(self.mesh, P(*spec))

        return _tree.map_with_path(sharding, params)

    def _split(self, spec: list[str | None], shape: tuple[int, ...], name: str, axes: Any) -> None:
        size = self.mesh.shape[name]
        free = [i for i in axes if spec[i] is None and shape[i] % size == 0]
        if free and size > 1:
            # Of equal axes the last: the features of a kernel, not its spatial axes.
            spec[max(free, key=lambda i: (shape[i], i))] = name


def device_bytes(tree: Any) -> int:
    """Bytes of arrays that one device holds."""
    shards = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
    return _tree.nbytes(shards)
