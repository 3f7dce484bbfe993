"""Keep an optimizer's state in the memory of the host between steps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jaxtricks import _compat, _dtypes, _jaxpr, _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Params

Step = Callable[[Any], tuple[Any, Any]]
"""step(state) -> (updates, new state), both in the device's memory."""


@checked
def host_offload(
    inner: optax.GradientTransformation, *, min_bytes: int = 2**16
) -> optax.GradientTransformationExtraArgs:
    """Keep the large arrays of the state of `inner` in pinned host memory.

    `init` puts them there, sharded as they are. `update` copies them to the device, runs
    inner.update and copies the new ones back, inside jit: the last parameter first, and
    the arrays of the next one only when those of the last one are on their way back. So
    the device holds the state of about three parameters, unless `inner` reads all of it
    at once. Outside of jit all of it comes at once.

    Put it around the optimizer (and around `low_bit`) and a guard around it, as in
    `amp.dynamic_loss_scale(host_offload(optax.adamw(1e-3)))`: inside, a guard's choice
    between old and new state would need both on the device. `optax.MultiSteps` makes
    that choice on either side: accumulate gradients in a `lax.scan` of your own. Layers
    that are stacked for lax.scan are one parameter: see `release_gradients`.

    The state is inner's, in the same structure: checkpoints of either restore into the
    other, and arrays go where the target's shardings say. Make it with
    `jax.jit(tx.init)`: else `inner` first makes all of it on the device. Donate it, and
    return parameters and state in the order in which they are passed, or give
    out_shardings: without those, jit pairs donated arrays with results of the same
    shape in another memory, and the TPU's compiler ends with "Unimplemented DMA".

    Args:
      inner: any optax transformation.
      min_bytes: arrays of rank 0, arrays of fewer bytes, and keys stay on the device.

    Returns:
      A GradientTransformationExtraArgs; updates are inner's.

    Raises:
      ValueError: min_bytes is negative; in `init`, the backend has no host memory that
        jit can use (jax 0.7 on CPU).

    Example:
      >>> import jax.numpy as jnp
      >>> tx = host_offload(optax.adamw(1e-3))
      >>> state = jax.jit(tx.init)({"w": jnp.ones((256, 256))})
      >>> state[0].mu["w"].sharding.memory_kind, state[0].count.sharding.memory_kind
      ('pinned_host', 'device')

    References:
      Ren, Rajbhandari, Aminabadi, Ruwase, Yang, Zhang, Li, He, "ZeRO-Offload:
      Democratizing Billion-Scale Model Training", arXiv 2101.06840 (which also computes
      the update on the host; here the device does).
    """
    if min_bytes < 0:
        raise ValueError(
            f"memopt.host_offload: `min_bytes` is {min_bytes}: give 0 or more"
        )
    inner = optax.with_extra_args_support(inner)

    def is_large(x: Any) -> bool:
        return _is_large(x, min_bytes)

    def init_fn(params: Params) -> Any:
        if not _compat.has_host_memory():
            raise ValueError(
                "memopt.host_offload: jax "
                f"{jax.__version__} cannot keep arrays in host memory on "
                f"{jax.default_backend()!r}: use `inner` without host_offload"
            )
        return _moved(inner.init(params), is_large, jax.memory.Space.Host)

    def update_fn(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        def step(state: Any) -> tuple[Any, Any]:
            return inner.update(updates, state, params, **extra)

        leaves = jax.tree.leaves(state)
        traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        return (_in_turn if traced else _at_once)(step, state, is_large)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_large(x: Any, min_bytes: int) -> bool:
    if not hasattr(x, "dtype") or not x.ndim or _dtypes.is_key(x):
        return False
    return _tree.nbytes(x) >= max(min_bytes, 1)


def _moved(state: Any, is_large: Any, space: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.device_put(x, space) if is_large(x) else x, state
    )


def _at_once(step: Step, state: Any, is_large: Any) -> tuple[Any, Any]:
    updates, state = step(_moved(state, is_large, jax.memory.Space.Device))
    return updates, _moved(state, is_large, jax.memory.Space.Host)


def _in_turn(step: Step, state: Any, is_large: Any) -> tuple[Any, Any]:
    """Return step(state), with each large array copied when an update needs it.

    XLA starts every copy to the device as early as it can: left alone, a TPU holds all
    of the state at once (benchmarks/results/tpu_memopt.md). Only data dependences order
    copies. So the equations of the step are written out in stages, and what a stage
    copies in waits for what the stage before copied out.
    """
    leaves, structure = jax.tree.flatten(state)
    places = [i for i, x in enumerate(leaves) if is_large(x)]
    arrays = [leaves[i] for i in places]

    def on_arrays(*arrays: Any) -> tuple[Any, Any]:
        mixed = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            mixed[i] = x
        return step(jax.tree.unflatten(structure, mixed))

    on_device = [_compat.in_device_memory(jax.typeof(x)) for x in arrays]
    closed, out_structure = _jaxpr.trace(on_arrays, *on_device)
    if closed.effects:  # their order is not ours to change
        return _at_once(step, state, is_large)
    closed = _jaxpr.inline(closed)
    program = closed.jaxpr
    env = dict(zip(program.constvars, closed.consts, strict=True))
    num_updates = out_structure.children()[0].num_leaves
    outs: list[Any] = [None] * len(program.outvars)
    stored: list[Any] = []  # by the last stage that stored any
    for stage in _stages(program, num_updates):
        arriving = [arrays[i] for i in stage.arrays]
        if arriving and stored:
            arriving, _ = jax.lax.optimization_barrier((arriving, stored))
            stored = []
        for i, x in zip(stage.arrays, arriving, strict=True):
            env[program.invars[i]] = jax.device_put(x, jax.memory.Space.Device)
        for eqn in stage.eqns:
            operands = _jaxpr.read_values(eqn.invars, env)
            results = _jaxpr.bind(eqn, operands)
            env.update(zip(eqn.outvars, results, strict=True))
        for i in stage.outs:
            (x,) = _jaxpr.read_values([program.outvars[i]], env)
            if i >= num_updates and is_large(x):
                x = jax.device_put(x, jax.memory.Space.Host)
                stored.append(x)
            outs[i] = x
    return jax.tree.unflatten(out_structure, outs)


class _Stage(NamedTuple):
    """A part of a step.

    Attributes:
      arrays: the inputs that arrive, by number.
      eqns: the equations that run, in order.
      outs: the outputs that are ready, by number.
    """

    arrays: list[int]
    eqns: list[Any]
    outs: list[int]


def _stages(program: _jaxpr.Jaxpr, num_updates: int) -> list[_Stage]:
    """Divide a step into stages: one per output, most of them empty.

    An input arrives in the stage of the first output that needs it. An output is ready
    where the last of its inputs arrives: as updates come first, the moments of a
    parameter leave in the stage of its update. The last parameter is the first, since
    the backward pass has its gradient first. An equation runs in the first stage that
    reads its results.
    """
    stages = [_Stage([], [], []) for _ in program.outvars]
    # Sets of inputs, as bits of integers: a norm of the whole state needs them all.
    needs = {v: 1 << i for i, v in enumerate(program.invars)}
    for eqn in program.eqns:
        bits = _union(needs, eqn.invars)
        needs.update(dict.fromkeys(eqn.outvars, bits))
    arrival: dict[int, int] = {}
    runs_in: dict[Any, int] = {}
    last_first = reversed(range(num_updates))
    order = [*last_first, *range(num_updates, len(program.outvars))]
    for stage, out in enumerate(order):
        v = program.outvars[out]
        bits = _union(needs, [v])
        needed = [i for i in range(len(program.invars)) if bits >> i & 1]
        for i in needed:
            if i not in arrival:
                arrival[i] = stage
                stages[stage].arrays.append(i)
        ready = max((arrival[i] for i in needed), default=0)
        stages[ready].outs.append(out)
        _lower(runs_in, [v], ready)
    for eqn in reversed(program.eqns):
        readers = [runs_in[v] for v in eqn.outvars if v in runs_in]
        if readers:
            stages[min(readers)].eqns.insert(0, eqn)
            _lower(runs_in, eqn.invars, min(readers))
    return stages


def _union(needs: dict[Any, int], operands: Sequence[Any]) -> int:
    bits = 0
    for v in _jaxpr.variables_of(operands):
        bits |= needs.get(v, 0)
    return bits


def _lower(
    runs_in: dict[Any, int], operands: Sequence[Any], stage: int
) -> None:
    for v in _jaxpr.variables_of(operands):
        runs_in[v] = min(stage, runs_in.get(v, stage))
