"""Compile one schedule, and read what it needs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks import _jaxpr
from jaxtricks.remat import _costs, _memory
from jaxtricks.remat._memory import Report
from jaxtricks.remat._schedule import Steps


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A compiled program.

    Attributes:
      steps: how its stages run; None is unplanned.
      report: its figures.
      jaxpr: the program.
      is_refused: the compiler has no room for it.
    """

    steps: Steps | None
    report: Report
    jaxpr: _jaxpr.ClosedJaxpr
    is_refused: bool = False

    @property
    def temp(self) -> int:
        """Bytes of temporaries."""
        return self.report.temp

    @property
    def fixed(self) -> int:
        """Bytes of arguments and results, without aliases."""
        return self.report.peak - self.report.temp

    def fits(self, temp: int) -> bool:
        """Return whether it compiled, and within these bytes of temporaries."""
        return not self.is_refused and self.temp <= temp

    def timeline(self) -> np.ndarray:
        """Return the estimate of the bytes alive at each operation."""
        return _costs.live_bytes(_jaxpr.live(self.jaxpr))


def compiled(
    steps: Steps | None,
    lowered: jax.stages.Lowered,
    program: _jaxpr.ClosedJaxpr,
    platform: str,
) -> Trial:
    """Compile a lowered step.

    Args:
      steps: how its stages run.
      lowered: the step.
      program: the same as a jaxpr.
      platform: that it is lowered for.
    """
    # XLA's CPU backend assigns buffers before LLVM sees the program, which takes half of
    # the time: the bytes are those of the program that the user compiles.
    options: Any = {"xla_backend_optimization_level": 0}
    try:
        if platform == "cpu":
            executable = lowered.compile(compiler_options=options)
        else:
            executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler refuses what exceeds its memory.
        report = _memory.refusal(error, program)
        if report is None:
            raise
        return Trial(steps, report, program, is_refused=True)
    return Trial(steps, _memory.report(executable, program), program)


def idle(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of fn's arguments and results that has no activations."""

    def step(*args: Any) -> Any:
        total = jnp.float32(0)
        for x in jax.tree.leaves(args):
            if jnp.issubdtype(x.dtype, jnp.number) and x.size:
                first = x[(0,) * x.ndim]
                total = total + first.astype(jnp.float32)

        def fill(out: Any) -> Any:
            return jnp.full(out.shape, total).astype(out.dtype)

        outs = jax.eval_shape(fn, *args)
        return jax.tree.map(fill, outs)

    return step
