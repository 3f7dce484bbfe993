"""Several hosts: one process each, joined by jax.distributed; the first of them writes and speaks.

When a process is lost, the others can't finish the step that they are in. jax.distributed notices within
`HEARTBEAT` seconds, says so, and ends them; nothing of that can be caught.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxtricks import _host_exchange
from jaxtricks.lab.errors import HostLostError, UserError
from jaxtricks.lab.parallel_config import Parallel

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
        self._meeting = _host_exchange.Meeting("lab")

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
