"""Spread a run over devices and hosts: the mesh, the processes and their signals to stop.

Several hosts run one process each, joined by jax.distributed; the first of them writes
and speaks. When a process is lost, the others can't finish the step that they are in.
jax.distributed notices within `HEARTBEAT` seconds, says so, and ends them; nothing of
that can be caught.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtricks import _host_exchange, _tree
from jaxtricks.lab.config import DATA, MODEL, HostLostError, Parallel, UserError

T = TypeVar("T")

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""
_SECONDS_TO_LEAVE = 5  # in which the others may end too
_SECONDS_TO_JOIN = 300  # for the others at the start and in every exchange
# Vectors and small kernels are not worth a collective.
_SMALL = 2**10


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh with the axes data and model, and whether parameters are split over data too.

    Attributes:
      mesh: all devices of the run.
      fsdp: split parameters and optimizer state over data.
    """

    mesh: Mesh
    fsdp: bool = False

    @classmethod
    def of(
        cls, cfg: Parallel, devices: Sequence[Any] | None = None
    ) -> "Placement":
        """Make the mesh of the settings over the first devices; several hosts use all devices.

        Args:
          cfg: the settings.
          devices: to choose from; None is those at hand, others need not be attached
            (`jax.experimental.topologies`).

        Raises:
          UserError: fewer devices than asked for, or some of a host's left over.
        """
        devices, axes = devices or jax.devices(), cfg.axes
        several_hosts = jax.process_count() > 1
        if not axes:
            axes = {DATA: len(devices) if several_hosts else 1, MODEL: 1}
        size = axes[DATA] * axes[MODEL]
        if size > len(devices):
            raise UserError(
                f"--mesh {cfg.mesh} has {size} devices, but there are "
                f"{len(devices)}: lower it"
            )
        if several_hosts and size < len(devices):
            raise UserError(
                f"--mesh {cfg.mesh} leaves devices of some host unused: make "
                f"it {len(devices)} devices"
            )
        types = (AxisType.Auto,) * len(axes)
        mesh = jax.make_mesh(
            tuple(axes.values()),
            tuple(axes),
            axis_types=types,
            devices=devices[:size],
        )
        return cls(mesh, cfg.fsdp)

    @property
    def replicated(self) -> NamedSharding:
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
                f"a micro-batch of {batch} does not divide over "
                f"{self.mesh.shape[DATA]} devices: choose another --batch"
            )

    def rows(self, batch: int) -> np.ndarray:
        """Return the rows of a batch that this process reads: those on its devices."""
        slices: Any = self.batch.addressable_devices_indices_map((batch,))
        bounds = sorted(
            {part[0].indices(batch)[:2] for part in slices.values()}
        )
        return np.concatenate(
            [np.arange(start, stop) for start, stop in bounds]
        )

    def put(self, batch: Any) -> Any:
        """Move a batch to its devices, from this process's rows."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.batch, x),
            batch,
        )

    def parameters(
        self, params: Any, split_axes: Callable[..., list[int]], *, fsdp: bool
    ) -> Any:
        """Return the NamedShardings of parameters.

        Args:
          params: tree of arrays or shapes.
          split_axes: (path, shape) -> axes that may be split over model
            (`models.split_axes`).
          fsdp: split also over data, along the largest other axis that divides. What
            divides by neither stays whole.
        """

        def sharding(path: str, x: Any) -> NamedSharding:
            spec: list[str | None] = [None] * len(x.shape)
            self._split(spec, x.shape, MODEL, split_axes(path, x.shape))
            if fsdp and x.size >= _SMALL:
                self._split(spec, x.shape, DATA, range(len(spec)))
            return NamedSharding(self.mesh, P(*spec))

        return _tree.map_with_path(sharding, params)

    def _split(
        self,
        spec: list[str | None],
        shape: tuple[int, ...],
        name: str,
        axes: Sequence[int],
    ) -> None:
        size = self.mesh.shape[name]
        divisible = [
            i for i in axes if spec[i] is None and shape[i] % size == 0
        ]
        if divisible and size > 1:
            # Of equal axes the last: the features of a kernel, not its spatial axes.
            spec[max(divisible, key=lambda i: (shape[i], i))] = name


def device_bytes(tree: Any) -> int:
    """Return the bytes of arrays that one device holds."""
    shards = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
    return _tree.nbytes(shards)


# Processes of one run.


def start(cfg: Parallel) -> None:
    """Join the other processes; must be called before jax looks for devices.

    Raises:
      UserError: they can't be joined.
    """
    if not cfg.coordinator or jax.distributed.is_initialized():
        return
    address: dict[str, Any] = {}
    if cfg.coordinator != "auto":
        address = {
            "coordinator_address": cfg.coordinator,
            "num_processes": cfg.processes,
            "process_id": cfg.process,
        }
    try:
        jax.distributed.initialize(
            **address,
            heartbeat_timeout_seconds=HEARTBEAT,
            initialization_timeout=_SECONDS_TO_JOIN,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator {cfg.coordinator}: the processes did not meet "
            f"({str(error).splitlines()[0]}): start all of them, with the same "
            "address"
        ) from error


def is_first() -> bool:
    """Return whether this process writes and speaks for all."""
    return jax.process_index() == 0


def leave(code: int) -> None:
    """End this process; with several, at once, even while others wait for it.

    The ordinary end waits for all processes, which may be in the middle of a step.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        shutdown = threading.Thread(
            target=jax.distributed.shutdown, daemon=True
        )
        shutdown.start()
        shutdown.join(_SECONDS_TO_LEAVE)
        os._exit(code)
    sys.exit(code)


class Hosts:
    """Coordinate the processes of a run; all call the same methods in the same order."""

    def __init__(self) -> None:
        self.count = jax.process_count()
        self._meeting = _host_exchange.Meeting("lab")

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, in their order.

        Raises:
          HostLostError: one did not come.
        """
        try:
            texts = self._meeting.exchange(json.dumps(value), _SECONDS_TO_JOIN)
        except RuntimeError as error:
            raise HostLostError(
                f"another host did not answer within {_SECONDS_TO_JOIN} s: "
                "start all of them again with --resume"
            ) from error
        return [json.loads(text) for text in texts]

    def on_first(self, action: Callable[[], T]) -> T:
        """Return what the action returns (JSON) on the first host; the others wait for it.

        Raises:
          UserError: of the action, on every host.
        """
        answer: dict[str, Any] = {}
        if is_first():
            try:
                answer = {"value": action()}
            except UserError as error:
                answer = {"error": str(error)}
        answer = self.gather(answer)[0]
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def stop_at(self, step: int) -> bool:
        """Return whether to stop after this step, as a process got SIGTERM; called at every step."""
        from jax.experimental import multihost_utils

        return self.count > 1 and multihost_utils.reached_preemption_sync_point(
            step
        )


# Signals.


class StopError(BaseException):
    """SIGTERM before the first step. No Exception: handlers of errors must not take it for one."""


class Interrupt:
    """Turns SIGTERM (a machine that is taken back) and Ctrl-C into a flag while it is entered.

    Before `wait` is called, while a run starts up, there is nothing to save, and
    compiling may take longer than a machine that is taken back has left: SIGTERM is
    then a `StopError` at once, and Ctrl-C, as always, a KeyboardInterrupt; so is a
    second Ctrl-C later. Outside the main thread signals can't be caught, and nothing
    changes. With several hosts jax.distributed catches SIGTERM, which Ctrl-C becomes
    too: one of them is enough to stop all after the same step.

    Args:
      hosts: that stop together.

    Attributes:
      signal: the name of the signal that came, "" before.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.signal = ""
        self._hosts, self._waits = hosts, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self
        alone = self._hosts.count == 1
        handler = self._note if alone else _pass_on
        for number in (
            (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
        ):
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """Let a signal wait for the end of a step from now on."""
        self._waits = True

    def due(self, step: int) -> bool:
        """Return whether to stop after this step; called at every step."""
        if self._hosts.stop_at(step):
            self.signal = "SIGTERM"
        return bool(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal == "SIGINT" or not self._waits
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if not self._waits:
            raise StopError


def _pass_on(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
