"""What the command line can set of devices and hosts; the docstrings are the help. Imports no jax."""

import dataclasses
import math

from jaxtricks.lab.errors import UserError

DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The devices and hosts that a run is spread over."""

    mesh: str = ""
    """Devices along each axis of the mesh, such as data=4,model=2: examples are split over data, kernels
    over model. Not given: one device, or all devices of all hosts over data."""
    fsdp: bool = False
    """Split parameters and optimizer state over data too (ZeRO-3); each is gathered where it is used."""
    coordinator: str = ""
    """Several hosts: HOST:PORT of process 0, the same everywhere, with --processes and --process; or auto,
    what the cluster says (Slurm, Open MPI, Kubernetes, Cloud TPU). --out must be on a shared disk."""
    processes: int = 0
    """Processes, one a host, with --coordinator HOST:PORT."""
    process: int = -1
    """Which of them this one is, from 0."""

    @property
    def axes(self) -> dict[str, int]:
        """The mesh, {"data": 4, "model": 2}; {} if it is not given.

        Raises:
          UserError: it can't be read.
        """
        axes: dict[str, int] = {}
        for part in filter(None, self.mesh.split(",")):
            name, _, size = part.partition("=")
            number = int(size) if size.isdecimal() and len(size) < 7 else 0
            if name not in (DATA, MODEL) or name in axes or number < 1:
                raise UserError(
                    f"--mesh {self.mesh} can't be read: give sizes such as data=4,model=2"
                )
            axes[name] = number
        return axes and {DATA: axes.get(DATA, 1), MODEL: axes.get(MODEL, 1)}

    @property
    def devices(self) -> int:
        """Devices of the mesh; 1 if it is not given."""
        return math.prod(self.axes.values())

    def check(self, batch: int, accumulate: int) -> None:
        """Raise UserError for a value that can't be meant with these batches."""
        over = self.axes.get(DATA, 1)
        if batch % (over * accumulate):
            raise UserError(
                f"--batch {batch} does not divide over {over} devices and {accumulate} "
                "micro-batches: choose a multiple"
            )
        self._check_hosts()

    def check_alone(self, command: str) -> None:
        """Raise UserError if a command that one process does was given several."""
        if self.coordinator:
            raise UserError(f"{command} runs in one process: drop --coordinator")

    def _check_hosts(self) -> None:
        counted = self.processes != 0 or self.process != -1
        if not self.coordinator or self.coordinator == "auto":
            if counted:
                raise UserError(
                    "--processes and --process need --coordinator HOST:PORT of process 0"
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator {self.coordinator} is no address: give HOST:PORT of process 0, or auto"
            )
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"--coordinator needs --processes N and --process from 0 to N - 1, not "
                f"{self.processes} and {self.process}"
            )
