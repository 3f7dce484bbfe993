"""Optimizer state on the host and in few bits, and gradients released: `python -m benchmarks.tpu_memopt`.

Compiled for a TPU v5e that is not attached: what the compiler reserves in the memory of the chip (arguments,
temporaries) and of the host. "Copied at once" is jax.device_put of the whole state, without the order that
host_offload gives the copies.

Needs libtpu (`pip install 'jaxtricks[tpu]'`; `make test-all` makes .venv-tpu). There are no times in it.
"""

from benchmarks import tpu  # isort: skip  (it sets the environment before jax is imported)

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxtricks as jt
from benchmarks import common
from jaxtricks import _table

LAYERS, WIDTH, BATCH = 8, 4096, 4096
BLOCK, BLOCK_BATCH = 2048, 256  # of the blocks in `stack_rows`
ADAMW = optax.adamw(1e-3)
ON_HOST = jt.memopt.host_offload(ADAMW)
HEADERS = (
    "MiB",
    "arguments",
    "temporaries",
    "both",
    "host arguments",
    "host temporaries",
)

Row = tuple[str, float, float, float, float, float]


def is_large(x: Any) -> bool:
    """Whether host_offload moves it; of the trees below, all but counts."""
    return x.size * x.dtype.itemsize >= 2**16


def copied_at_once(inner: Any) -> Any:
    """Keep the state on the host with jax.device_put alone."""

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.device_put(x, space) if is_large(x) else x, state
        )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = inner.update(
            updates, moved(state, jax.memory.Space.Device), params
        )
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(inner.init, update)


def measured(
    name: str,
    step: Callable[..., Any],
    params: Any,
    state: Any,
    batch: Any,
    is_host: Callable[[Any], bool] = lambda x: False,
    chip: Any = None,
) -> Row:
    """The row of step(params, state, batch) -> (params, state, ...), both donated."""
    chip = chip or tpu.chip()
    host = chip.with_memory_kind("pinned_host")

    def place(tree: Any, where: Callable[[Any], Any]) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)),
            tree,
        )

    def run(params: Any, state: Any, batch: Any) -> Any:
        # The shape of an array on the host does not say so inside of jit; the array itself would.
        state = jax.tree.map(
            lambda x: (
                jax.device_put(x, jax.memory.Space.Host) if is_host(x) else x
            ),
            state,
        )
        return step(params, state, batch)

    compiled = (
        jax.jit(run, donate_argnums=(0, 1))
        .lower(
            place(params, lambda x: chip),
            place(state, lambda x: host if is_host(x) else _whole(chip, x)),
            place(batch, lambda x: chip),
        )
        .compile()
    )
    sizes = compiled.memory_analysis()
    arguments, temporaries = (
        sizes.argument_size_in_bytes,
        temp_bytes(compiled, chip),
    )
    of_host = sizes.host_argument_size_in_bytes, sizes.host_temp_size_in_bytes
    return (
        name,
        *(
            n / 2**20
            for n in (arguments, temporaries, arguments + temporaries, *of_host)
        ),
    )


def temp_bytes(compiled: Any, chip: Any) -> int:
    """Bytes of temporaries of an executable, without what some libtpu add to any program's."""
    # Not modulo 2**32, as `common.temp_bytes`: some programs here need more than 4 GiB.
    (device, *_) = chip.device_set
    return compiled.memory_analysis().temp_size_in_bytes - _constant(device)


@functools.cache
def _constant(device: Any) -> int:
    x = jax.ShapeDtypeStruct(
        (), jnp.float32, sharding=SingleDeviceSharding(device)
    )
    return (
        jax.jit(jnp.negative)
        .lower(x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def _whole(chip: Any, x: Any) -> Any:
    """The sharding of an array of the state that stays; counts are replicated."""
    if isinstance(chip, NamedSharding) and not x.ndim:
        return NamedSharding(chip.mesh, PartitionSpec())
    return chip


def leaves() -> dict[str, Any]:
    """Eight matrices of 64 MiB."""
    return common.shapes(**{f"w{i}": (WIDTH, WIDTH) for i in range(LAYERS)})


def update_step(tx: Any) -> Callable[..., Any]:
    """The update alone; the batch is the gradient."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def training_step(tx: Any) -> Callable[..., Any]:
    """Forward pass, backward pass and update of eight layers in straight code."""

    def loss(params: Any, x: Any) -> Any:
        for i in range(LAYERS):
            x = x + jnp.tanh(x @ params[f"w{i}"])
        return jnp.mean(x**2)

    def step(params: Any, state: Any, x: Any) -> Any:
        return update_step(tx)(params, state, jax.grad(loss)(params, x))

    return step


def update_rows() -> list[Row]:
    """What the update of eight matrices needs."""
    params = leaves()
    guarded = jt.amp.dynamic_loss_scale
    ways = {
        "adamw": (ADAMW, False),
        "copied at once": (copied_at_once(ADAMW), True),
        "host_offload": (ON_HOST, True),
        "chain(clip_by_global_norm, host_offload)": (
            optax.chain(optax.clip_by_global_norm(1.0), ON_HOST),
            True,
        ),
        "dynamic_loss_scale(host_offload)": (guarded(ON_HOST), True),
        "host_offload(dynamic_loss_scale)": (
            jt.memopt.host_offload(guarded(ADAMW)),
            True,
        ),
    }
    return [
        measured(
            name,
            update_step(tx),
            params,
            jax.eval_shape(tx.init, params),
            params,
            is_large if on_host else lambda x: False,
        )
        for name, (tx, on_host) in ways.items()
    ]


def training_rows() -> list[Row]:
    """What a training step of eight layers needs."""
    params = leaves()
    x = common.shapes(x=(BATCH, WIDTH))["x"]
    state = jax.eval_shape(ADAMW.init, params)
    return [
        measured("adamw", training_step(ADAMW), params, state, x),
        measured(
            "copied at once",
            training_step(copied_at_once(ADAMW)),
            params,
            state,
            x,
            is_large,
        ),
        measured(
            "host_offload", training_step(ON_HOST), params, state, x, is_large
        ),
    ]


def sharded_rows() -> list[Row]:
    """The update on four chips, every matrix divided among them."""
    mesh = jax.sharding.Mesh(tpu.chips(), ("data",))
    chip = NamedSharding(mesh, PartitionSpec("data"))
    params = leaves()
    state = jax.eval_shape(ADAMW.init, params)
    return [
        measured("adamw", update_step(ADAMW), params, state, params, chip=chip),
        measured(
            "host_offload",
            update_step(ON_HOST),
            params,
            state,
            params,
            is_large,
            chip,
        ),
    ]


# A stack of layers


def block(w: Any, x: Any) -> Any:
    """One layer: 128 MiB of parameters."""
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def straight(tx: Any) -> Callable[..., Any]:
    """Layers in a Python loop."""

    def loss(params: Any, x: Any) -> Any:
        for w in params:
            x = block(w, x)
        return jnp.mean(x**2)

    return lambda p, s, x: update_step(tx)(p, s, jax.grad(loss)(p, x))


def scanned(tx: Any, layer: Callable[..., Any] = block) -> Callable[..., Any]:
    """Layers in lax.scan; its backward pass stacks their gradients."""

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(
            jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)[0] ** 2
        )

    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = jax.vmap(tx.update)(
            jax.grad(loss)(params, x), state, params
        )
        return optax.apply_updates(params, updates), state

    return step


def released(tx: Any) -> Callable[..., Any]:
    """Layers in memopt.release_gradients."""

    def step(params: Any, state: Any, x: Any) -> Any:
        y, update = jt.memopt.release_gradients(block, tx, params, state, x)
        _, params, state = update(jax.grad(lambda y: jnp.mean(y**2))(y))
        return params, state

    return step


def stack_rows(chip: Any = None) -> list[Row]:
    """What a training step of eight blocks needs; chip: another device than the TPU's."""
    one = common.shapes(up=(BLOCK, 4 * BLOCK), down=(4 * BLOCK, BLOCK))
    apart = [one] * LAYERS
    stack = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((LAYERS, *x.shape), x.dtype), one
    )
    x = common.shapes(x=(BLOCK_BATCH, BLOCK))["x"]
    state = jax.eval_shape(jax.vmap(ADAMW.init), stack)
    rows = [
        measured(
            "straight code",
            straight(ADAMW),
            apart,
            jax.eval_shape(ADAMW.init, apart),
            x,
            chip=chip,
        )
    ]
    ways = {
        "scan": scanned(ADAMW),
        "scan of jax.checkpoint": scanned(ADAMW, jax.checkpoint(block)),
        "release_gradients": released(ADAMW),
    }
    rows += [
        measured(name, step, stack, state, x, chip=chip)
        for name, step in ways.items()
    ]
    if chip is None:
        ways = {
            "scan, host_offload": scanned(ON_HOST),
            "release_gradients, host_offload": released(ON_HOST),
        }
        rows += [
            measured(name, step, stack, state, x, is_large)
            for name, step in ways.items()
        ]
    return rows


NARROW = 8192
NARROW_HEADERS = (
    "arguments, bytes/param",
    "temporaries, MiB",
    "accessed, bytes/param",
    "of adamw's",
)


def narrow_rows() -> list[tuple[Any, ...]]:
    """What the update of one matrix with narrow state holds and moves.

    XLA counts what it moves between the memory of the chip and its scratchpad too.
    """
    ways = {
        "adamw, float32": (ADAMW, jnp.float32),
        "low_bit(adamw), 8 bits": (jt.memopt.low_bit(ADAMW), jnp.float32),
        "low_bit(adamw), 4 bits": (
            jt.memopt.low_bit(ADAMW, bits=4),
            jnp.float32,
        ),
        "adamw7, bfloat16 gradients": (jt.memopt.adamw7(1e-3), jnp.bfloat16),
    }
    count, rows = NARROW**2, []
    for name, (tx, dtype) in ways.items():
        shape = jax.ShapeDtypeStruct((NARROW, NARROW), dtype)
        params = {"w": shape}
        compiled = (
            jax.jit(update_step(tx), donate_argnums=(0, 1))
            .lower(
                *tpu.place((params, jax.eval_shape(tx.init, params), params))
            )
            .compile()
        )
        accessed = compiled.cost_analysis()["bytes accessed"] / count
        rows.append(
            (
                name,
                compiled.memory_analysis().argument_size_in_bytes / count,
                temp_bytes(compiled, tpu.chip()) / 2**20,
                accessed,
                accessed / rows[0][3] if rows else 1.0,
            )
        )
    return rows


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.tpu_memopt")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu", "optax")
    )
    heading = (
        f"Memory of optimizer state and gradients, for TPU {tpu.TOPOLOGY}: `{command}`\n\n{packages}.\n"
        "Exact counts of the compiler; nothing is run. AdamW in float32, parameters and state donated, so\n"
        "that results take the place of arguments."
    )
    cpu = SingleDeviceSharding(jax.devices()[0])
    tables = {
        f"update of {LAYERS} matrices {WIDTH} x {WIDTH}": update_rows(),
        f"training step of {LAYERS} layers, batch {BATCH}, straight code": training_rows(),
        "the same update on four chips, a quarter of each matrix on each": sharded_rows(),
        f"training step of {LAYERS} blocks of 128 MiB": stack_rows(),
        "the same compiled for CPU": stack_rows(cpu),
    }
    common.publish(
        [
            _table.make((name, *HEADERS[1:]), rows)
            for name, rows in tables.items()
        ]
        + [
            _table.make(
                (f"update of one matrix {NARROW} x {NARROW}", *NARROW_HEADERS),
                narrow_rows(),
            )
        ],
        heading,
        args.out,
    )


if __name__ == "__main__":
    main()
