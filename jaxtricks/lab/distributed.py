"""Where a run's arrays lie: a mesh of devices, what is split over it, and who reads what."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtricks import _compat, _tree
from jaxtricks.lab.config import DATA, MODEL, HostLostError, Parallel, UserError

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


# --------------------------------------------------------------------------------------------------
# Several hosts: one process each, joined by jax.distributed; the first of them writes and speaks.
#
# When a process is lost, the others can't finish the step that they are in. jax.distributed notices within
# `HEARTBEAT` seconds, says so, and ends them; nothing of that can be caught.
# --------------------------------------------------------------------------------------------------


HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""
_LEAVE = 5  # seconds in which the others may end too
_JOIN = 300  # seconds to wait for the others at the start and when they meet


def start(cfg: Parallel) -> None:
    """Join the other processes; must be called before jax looks for devices.

    Raises:
      UserError: they can't be joined.
    """
    if not cfg.coordinator or jax.distributed.is_initialized():
        return
    own: dict[str, Any] = {}
    if cfg.coordinator != "auto":
        own = {
            "coordinator_address": cfg.coordinator,
            "num_processes": cfg.processes,
            "process_id": cfg.process,
        }
    try:
        jax.distributed.initialize(
            **own, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=_JOIN
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator {cfg.coordinator}: the processes did not find each other "
            f"({str(error).splitlines()[0]}): start all of them, with the same address"
        ) from error


def first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def leave(code: int) -> None:
    """End this process; with several, at once, even while others wait for it.

    The ordinary end waits for all processes, which may be in the middle of a step.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(_LEAVE)
        os._exit(code)
    sys.exit(code)


class Hosts:
    """What the processes of a run do together; with one process, each does as it is told at once.

    All processes call the same methods in the same order.
    """

    def __init__(self) -> None:
        self.count = jax.process_count()
        self._meeting = _compat.Meeting("lab")

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order.

        Raises:
          HostLostError: one did not come.
        """
        try:
            return [json.loads(text) for text in self._meeting.exchange(json.dumps(value), _JOIN)]
        except RuntimeError as error:
            raise HostLostError(
                f"another host did not answer within {_JOIN} s: start all of them again with --resume"
            ) from error

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What the action returns (JSON) on the first host; the others wait for it.

        Raises:
          UserError: of the action, on every host.
        """
        answer: dict[str, Any] = {}
        if first():
            try:
                answer = {"value": action()}
            except UserError as error:
                answer = {"error": str(error)}
        answer = self.gather(answer)[0]
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def stop_at(self, step: int) -> bool:
        """Whether the processes stop after this step, as one of them got SIGTERM; called at every step."""
        from jax.experimental import multihost_utils

        return self.count > 1 and multihost_utils.reached_preemption_sync_point(step)


# --------------------------------------------------------------------------------------------------
# A request to stop that waits for the end of the step, the same one on all hosts.
# --------------------------------------------------------------------------------------------------


class StopError(BaseException):
    """SIGTERM before the first step. No Exception: what handles errors must not take it for one."""


class Interrupt:
    """Turns SIGTERM (a machine that is taken back) and Ctrl-C into a flag while it is entered.

    Before `wait` is called, while a run starts up, there is nothing to save, and compiling may take longer
    than a machine that is taken back has left: SIGTERM is then a `StopError` at once, and Ctrl-C, as always,
    a KeyboardInterrupt; so is a second Ctrl-C later. Outside the main thread signals can't be caught, and
    nothing changes. With several hosts jax.distributed catches SIGTERM, which Ctrl-C becomes too: one of
    them is enough to stop all after the same step.

    Args:
      hosts: that stop together.

    Attributes:
      signal: the name of the signal that came, "" before.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.signal = ""
        self._hosts, self._waits = hosts, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            alone = self._hosts.count == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._note if alone else _pass_on)
        return self

    def wait(self) -> None:
        """From now on a signal waits for the end of a step."""
        self._waits = True

    def due(self, step: int) -> bool:
        """Whether to stop after this step; called at every step."""
        if self._hosts.stop_at(step):
            self.signal = "SIGTERM"
        return bool(self.signal)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal == "SIGINT" or not self._waits
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if not self._waits:
            raise StopError


def _pass_on(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
