"""What the tables share: parameters, optimizers, a step and its costs, times taken in turn."""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtricks as jt
from jaxtricks import _table

BASE = "adamw"  # what every ratio is taken to
TEMP_CONSTANT = 2**32  # libtpu adds it to the temporaries of some programs


class Cost(NamedTuple):
    """What one compiled step needs.

    Attributes:
      accessed: bytes read and written per parameter, XLA's own count.
      temp: bytes of temporaries.
      state: bytes of optimizer state per parameter.
    """

    accessed: float
    temp: int
    state: float


class StepCost(NamedTuple):
    """Of one compiled training step, on each chip.

    Attributes:
      temp: bytes of temporaries.
      args: bytes of arguments: the state and a batch.
      accessed: bytes read and written, copies into VMEM too.
      flops: floating-point operations.
      params: bytes of all parameters, on all chips together.
      sent: its collectives, [kind, bytes, name] each.
    """

    temp: int
    args: int
    accessed: float
    flops: float
    params: int
    sent: list[list[Any]]


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The rows of every table; settings are equal where ours stands beside optax's."""
    memopt, sgd = jt.memopt, optax.sgd(1e-3, momentum=0.9)
    return {
        BASE: optax.adamw(1e-3),
        "memopt.adafactor": memopt.adafactor(1e-3),
        "optax.adafactor": optax.adafactor(1e-3),
        "memopt.sm3 momentum 0.9": memopt.sm3(1e-3, momentum=0.9),
        "optax.sm3 momentum 0.9": optax.sm3(1e-3, momentum=0.9),
        "memopt.sm3": memopt.sm3(1e-3),
        "agc, sgd momentum 0.9": optax.chain(
            jt.agc.adaptive_grad_clip(0.01), sgd
        ),
        "optax's agc, sgd momentum 0.9": optax.chain(
            optax.adaptive_grad_clip(0.01), sgd
        ),
        "memopt.adafactor momentum int8": memopt.adafactor(
            1e-3, beta1=0.9, momentum_dtype="int8"
        ),
        "memopt.sm3 momentum int8": memopt.sm3(
            1e-3, momentum=0.9, momentum_dtype="int8"
        ),
    }


def shapes(**table: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """float32 parameters as shapes, by name."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in table.items()
    }


def transformer(
    layers: int = 12, width: int = 256, vocabulary: int = 4096
) -> dict[str, Any]:
    """Shapes of a transformer's parameters: 12 layers have 145 leaves, 10.5 M parameters."""
    square, vector, wide = (width, width), (width,), 4 * width
    layer = {
        "q": square,
        "k": square,
        "v": square,
        "o": square,
        "up": (width, wide),
    }
    layer |= {"down": (wide, width), "up_bias": (wide,), "down_bias": vector}
    layer |= {
        f"norm{i}_{name}": vector for i in (1, 2) for name in ("scale", "bias")
    }
    blocks = {f"layer_{i}": shapes(**layer) for i in range(layers)}
    return {"embedding": shapes(kernel=(vocabulary, width)), **blocks}


def draw(params: Any) -> Any:
    """Arrays of the shapes, normal with deviation 0.02."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [
        0.02 * jax.random.normal(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def compile_step(
    tx: Any, params: Any, place: Callable[[Any], Any] = lambda x: x
) -> Any:
    """The executable of (params, state, grads) -> (params, state), params and state donated."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(*place((params, state, params)))
        .compile()
    )


def cost(compiled: Any, tx: Any, params: Any) -> Cost:
    """Costs of what `compile_step` gives."""
    n, accessed = count(params), compiled.cost_analysis()["bytes accessed"]
    return Cost(
        accessed / n,
        temp_bytes(compiled),
        jt.memopt.state_bytes(tx, params) / n,
    )


def temp_bytes(compiled: Any) -> int:
    """Bytes of temporaries of an executable."""
    return compiled.memory_analysis().temp_size_in_bytes % TEMP_CONSTANT


def build_ratios(
    txs: dict[str, Any], params: Any, builds: int, base: str = BASE
) -> dict[str, float]:
    """Seconds to trace and compile, as ratios to the base's: medians of builds taken in turn."""

    def build(tx: Any) -> None:
        jax.clear_caches()  # every build traces everything anew
        compile_step(tx, params)

    builders = {name: lambda tx=tx: build(tx) for name, tx in txs.items()}
    times = in_turn(builders, builds)
    return {
        name: float(np.median(ts) / np.median(times[base]))
        for name, ts in times.items()
    }


def stepper(
    compiled: Any, tx: Any, params: Any, grads: Any
) -> Callable[[], None]:
    """A function that takes one step, from where its last call ended."""
    held = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run() -> None:
        held[:] = compiled(*held, grads)
        jax.block_until_ready(held)

    return run


def in_turn(
    runs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of every run in every round; in a round each runs once, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(ts) for name, ts in times.items()}


def arguments(module: str, **numbers: int) -> tuple[str, argparse.Namespace]:
    """(the command line as it was typed, its arguments: `--out` and the numbers, with defaults)."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="write the tables here too, as Markdown",
    )
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return " ".join([parser.prog, *sys.argv[1:]]), parser.parse_args()


def publish(
    tables: Sequence[_table.Table],
    heading: str,
    out: pathlib.Path | None = None,
) -> None:
    """Print heading and tables; with `out`, write them as Markdown too."""
    print("\n\n".join([heading, *map(str, tables)]), flush=True)
    if out is not None:
        out.write_text(
            "\n\n".join([heading, *(t.markdown() for t in tables)]) + "\n"
        )
