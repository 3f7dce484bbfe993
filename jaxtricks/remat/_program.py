"""Cut and cost a loss, and compile the step that is measured by one of its schedules."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from jaxtricks import _jaxpr
from jaxtricks._partition import without_changes
from jaxtricks.remat import _costs, _memory, _options, _stages, _trial
from jaxtricks.remat._host_memory import HostMemory
from jaxtricks.remat._schedule import Schedule, Steps
from jaxtricks.remat._solver import Frontier
from jaxtricks.remat._stages import Stage
from jaxtricks.remat._trial import Trial

# Stages that read a variable: from so many on, its cotangents pass through the stages.
_MANY = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a plan, beside the arguments of the loss.

    Attributes:
      fn, argnums, has_aux, within, topology: see `plan`.
      host: the memory to offload to; None if there is none.
    """

    fn: Callable[..., Any]
    argnums: int | tuple[int, ...]
    has_aux: bool
    within: Callable[..., Any] | None
    topology: str | None
    host: HostMemory | None

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return _memory.platform(self.topology)


class Program:
    """A loss on arguments of some shapes.

    The unplanned step compiles in a thread while the stages are costed.

    Args:
      settings: what it is planned for.
      args: its arguments.
      positions: of the differentiated ones.
      size: of the batch, where one was asked for.

    Attributes:
      jaxpr: the loss, its calls written out.
      frontier: the schedules that are the cheapest for some memory.
      flops: operations of the unplanned step.
    """

    def __init__(
        self,
        settings: Settings,
        args: Any,
        positions: Sequence[int],
        size: int | None = None,
    ):
        self._settings, self._args, self._size = settings, args, size
        program = _traced(
            settings.fn, args, positions, settings.argnums, settings.has_aux
        ).jaxpr
        self._varied = _varied_variables(program, args, positions)
        self._shard_map: Any = None
        opened = _stages.main_body(program)
        if opened is not None:
            # The body is planned: its shapes are those of one device.
            index, body = opened
            self._shard_map = program.eqns[index]
            program = body.jaxpr
            operands = zip(program.invars, self._shard_map.invars, strict=True)
            inputs = [v for v, x in operands if x in self._varied]
            self._varied = _dependent(program, inputs)
        self.jaxpr = program
        self._step = self._trace(settings.fn)
        self._unplanned: Future[Trial] | None = None

    def start(self) -> None:
        """Begin to compile the unplanned step."""
        if self._unplanned is not None:
            return
        lowered = self._step.lower()
        executor = ThreadPoolExecutor(1)
        self._unplanned = executor.submit(
            _trial.compiled,
            None,
            lowered,
            self._step.jaxpr,
            self._settings.platform,
        )
        executor.shutdown(wait=False)

    @functools.cached_property
    def unplanned(self) -> Trial:
        """The unplanned step."""
        self.start()
        assert self._unplanned is not None
        return self._unplanned.result()

    @functools.cached_property
    def flops(self) -> int:
        """Operations of the unplanned step."""
        return _memory.operations(self._step.jaxpr)

    @functools.cached_property
    def frontier(self) -> Frontier:
        """The schedules that are the cheapest for some memory, of the costed stages."""
        ends = self._ends
        costed = functools.partial(
            _costed_stages,
            self.jaxpr,
            ends,
            self._varied,
            self._settings.platform,
            self._settings.host,
            self._remote_axes,
        )
        if self._shard_map is None:
            stages = costed()
        else:
            stages = _jaxpr.within_mesh(self._shard_map, costed)
        return Frontier(stages, _stages.carries(self.jaxpr, ends))

    @functools.cached_property
    def _remote_axes(self) -> frozenset[str]:
        if self._shard_map is None:
            return frozenset()
        return _jaxpr.remote_axes(self._shard_map)

    @functools.cached_property
    def _ends(self) -> list[int]:
        return _stages.cut(self.jaxpr, remote_axes=self._remote_axes)

    @functools.cached_property
    def _shared(self) -> tuple[int, ...]:
        return _shared_variables(self.jaxpr, self.frontier.stages, self._varied)

    def schedule(self, steps: Steps | None) -> Schedule:
        """Return the schedule of these steps."""
        fingerprints = tuple(s.fingerprint for s in self.frontier.stages)
        return Schedule(tuple(self._ends), fingerprints, steps, self._shared)

    def compile(self, steps: Steps) -> Trial:
        """Compile the step with its stages run by these steps."""
        traced = self._trace(self.schedule(steps).apply(self._settings.fn))
        return self._compiled(steps, traced)

    def fixed(self) -> int:
        """Return the bytes of arguments and results, which no schedule can shrink."""
        trial = self.unplanned
        # What the compiler refused has no arguments counted: those of a step without
        # activations are equal.
        if trial.is_refused:
            traced = self._trace(_trial.idle(self._settings.fn))
            trial = self._compiled(None, traced)
        return trial.fixed

    def arguments(self) -> int:
        """Return the bytes of arguments and results, before anything is compiled."""
        program = self._step.jaxpr.jaxpr
        return sum(map(_jaxpr.var_bytes, [*program.invars, *program.outvars]))

    def fingerprint(self) -> str:
        """Return what tells the loss and its step from others."""
        settings = [
            _jaxpr.fingerprint(self.jaxpr),
            _jaxpr.fingerprint(self._step.jaxpr.jaxpr),
            # Which arguments are donated, and where they are.
            *map(str, jax.tree.leaves(self._step.args_info)),
            *(
                str(getattr(x, "sharding", ""))
                for x in jax.tree.leaves(self._args)
            ),
        ]
        return "\n".join(settings)

    def _compiled(self, steps: Steps | None, traced: Any) -> Trial:
        return _trial.compiled(
            steps, traced.lower(), traced.jaxpr, self._settings.platform
        )

    def _trace(self, loss: Callable[..., Any]) -> jax.stages.Traced:
        settings = self._settings
        step: Any
        step_args: Any = self._args
        if settings.within is None:
            step = jax.jit(
                jax.value_and_grad(
                    loss, argnums=settings.argnums, has_aux=settings.has_aux
                )
            )
        elif self._size is None:
            step = settings.within(loss)
        else:
            step = settings.within(loss, batch=self._size)
        if isinstance(step, tuple):
            step, step_args = step
        return _memory.trace(step, step_args, settings.topology)


# The trace and its stages.


def _traced(
    fn: Callable[..., Any],
    args: Any,
    positions: Sequence[int],
    argnums: int | tuple[int, ...],
    has_aux: bool,
) -> _jaxpr.ClosedJaxpr:
    """Trace fn and write its calls out; ValueError for what cannot be planned."""
    closed, structure = _jaxpr.trace(without_changes(fn, "plan"), *args)
    if any(isinstance(c, jax.core.Tracer) for c in closed.consts):
        raise ValueError("fn closes over traced values: pass them as arguments")
    outs = jax.tree.unflatten(structure, closed.out_avals)
    loss = outs[0] if has_aux and isinstance(outs, tuple) and outs else outs
    is_scalar = getattr(loss, "shape", None) == ()
    if not is_scalar or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"fn must return {'(loss, aux) with ' if has_aux else ''}one float "
            "scalar, the loss, not "
            f"{jax.tree.map(lambda a: a.str_short(), outs)}: take a mean or a "
            "sum inside"
        )
    if not closed.eqns:
        raise ValueError(
            "fn returns one of its arguments as it is: there is nothing to recompute"
        )
    leaves = jax.tree.leaves([args[i] for i in positions])
    if not any(
        jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact) for x in leaves
    ):
        raise ValueError(
            f"argnums={argnums} holds no float array: name the arguments to "
            "differentiate, the parameters"
        )
    effects = [
        str(e) for e in closed.effects if type(e).__name__ != "NamedAxisEffect"
    ]
    if effects:
        raise ValueError(
            f"fn has side effects ({', '.join(effects)}) that recomputation "
            "would run twice: move them out of the loss, into its aux output "
            "say"
        )
    return _jaxpr.straight(closed)


def _varied_variables(
    program: _jaxpr.Jaxpr,
    args: Any,
    positions: Sequence[int],
) -> set[Any]:
    """Return the variables that depend on the differentiated arguments."""
    is_varied: list[bool] = []
    for i, arg in enumerate(args):
        is_varied += [i in positions] * len(jax.tree.leaves(arg))
    return _dependent(program, itertools.compress(program.invars, is_varied))


def _dependent(program: _jaxpr.Jaxpr, inputs: Iterable[Any]) -> set[Any]:
    """Return the inputs and the variables that depend on them."""
    varied = set(inputs)
    for eqn in program.eqns:
        if not varied.isdisjoint(_jaxpr.variables_of(eqn.invars)):
            varied.update(eqn.outvars)
    return varied


def _shared_variables(
    program: _jaxpr.Jaxpr,
    stages: Sequence[Stage],
    varied: set[Any],
) -> tuple[int, ...]:
    """Return the numbers of `Schedule.shared`."""
    readers: Counter[Any] = Counter()
    for stage in stages:
        readers.update((*stage.jaxpr.constvars, *stage.jaxpr.invars))
    return tuple(
        i
        for i, v in enumerate(_jaxpr.all_variables(program))
        if readers[v] >= _MANY
        and v in varied
        and jnp.issubdtype(_jaxpr.shape_of(v).dtype, jnp.inexact)
    )


def _costed_stages(
    program: _jaxpr.Jaxpr,
    ends: Sequence[int],
    varied: set[Any],
    platform: str,
    host: HostMemory | None,
    remote_axes: Collection[str],
) -> list[Stage]:
    """Return the stages of an inlined program with their costs.

    Args:
      program: the forward pass.
      ends: where the stages end.
      varied: its variables that depend on what is differentiated.
      platform: "cpu", "gpu" or "tpu".
      host: the memory to offload to.
      remote_axes: see `_stages.split`.
    """
    rates = _costs.RATES[platform]
    # Equal stages, as the layers of a network, are costed once.
    costed: dict[Any, Stage] = {}
    stages = []
    for stage in _stages.split(program, ends, remote_axes):
        inputs = (*stage.jaxpr.constvars, *stage.jaxpr.invars)
        is_varied = tuple(v in varied for v in inputs)
        key = stage.fingerprint, is_varied
        if key not in costed:
            costed[key] = _options.with_costs(stage, is_varied, rates, host)
        like = costed[key]
        stages.append(
            dataclasses.replace(
                stage,
                options=like.options,
                forward=like.forward,
                forward_bytes=like.forward_bytes,
            )
        )
    return stages
