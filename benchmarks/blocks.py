"""Layers beside the plain ones: step times of normalizations, standardized convolutions and branches.

Times are ratios between rows of one process, run in turn; bytes are XLA's own counts and exact.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxtricks as jt
from benchmarks import common
from jaxtricks import _table
from jaxtricks.lab.report import hardware

BATCH, SIDE, CHANNELS, ROUNDS = 64, 32, 64, 15
TIMES = ("row", "ms", "ratio", "to")
Runs = dict[str, Callable[[], Any]]


def norms(channels: int) -> dict[str, Callable[[], Any]]:
    """What the bytes and steps of normalizations are taken of; the second is the base."""
    batch_norm = functools.partial(nnx.BatchNorm, channels)
    return {
        "ExtendedBatchNorm": lambda: jt.nnx.ExtendedBatchNorm(
            channels, rngs=nnx.Rngs(0)
        ),
        "BatchNorm": lambda: batch_norm(
            use_fast_variance=False, rngs=nnx.Rngs(0)
        ),
        "BatchNorm, fast variance": lambda: batch_norm(
            use_fast_variance=True, rngs=nnx.Rngs(0)
        ),
    }


def compiled(
    module: Any, x: Any, train: bool = True, grad: bool = True
) -> tuple[Any, Any]:
    """(executable, its arguments): one call of the module, or the gradients of sum(y * x) by all."""
    apply, params, state = jt.nnx.functional(module)

    def run(params: Any, x: Any) -> Any:
        return apply(params, state, x, train=train)

    def loss(params: Any, x: Any, cotangent: Any) -> Any:
        y, new = run(params, x)
        return jnp.sum(y * cotangent), new

    if not grad:
        return jax.jit(run).lower(params, x).compile(), (params, x)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step.lower(params, x, x).compile(), (params, x, x)


def norm_bytes(
    make: Callable[[], Any], dtype: str = "float32"
) -> tuple[float, float]:
    """Bytes accessed by the forward pass in training and by the train step, in sizes of x."""
    x = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, CHANNELS), jnp.dtype(dtype))
    size = x.size * x.dtype.itemsize
    costs = [
        compiled(make(), x, grad=grad)[0].cost_analysis()
        for grad in (False, True)
    ]
    return costs[0]["bytes accessed"] / size, costs[1]["bytes accessed"] / size


def images(batch: int = BATCH) -> Any:
    """Normal numbers [batch, 32, 32, 64]."""
    return jax.random.normal(jax.random.key(0), (batch, SIDE, SIDE, CHANNELS))


def runner(module: Any, batch: int = BATCH, **how: bool) -> Callable[[], Any]:
    """A function that runs what `compiled` gives."""
    step, args = compiled(module, images(batch), **how)
    return lambda: jax.block_until_ready(step(*args))


def convolution(**settings: Any) -> Any:
    """The plain layer: 3x3, 64 to 64 channels."""
    return nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=nnx.Rngs(0), **settings)


def norm_steps() -> Runs:
    """Train steps of convolution, normalization, relu; the base is BatchNorm without fast variance."""
    return {
        f"conv, {name}, relu": runner(
            nnx.Sequential(convolution(use_bias=False), make(), jax.nn.relu)
        )
        for name, make in norms(CHANNELS).items()
    }


def isolated_norms() -> Runs:
    """Train steps of the normalizations alone."""
    return {name: runner(make()) for name, make in norms(CHANNELS).items()}


def standardized_steps() -> Runs:
    """Train steps of WSConv and of the plain convolution."""
    standardized = jt.nnx.WSConv(
        CHANNELS, CHANNELS, (3, 3), use_bias=True, rngs=nnx.Rngs(0)
    )
    return {"WSConv": runner(standardized), "nnx.Conv": runner(convolution())}


def microbatch_steps(microbatches: int = 32) -> Runs:
    """Gradients over a scan of microbatches of one small image: standardized inside it, and once outside."""
    kernel = jax.random.normal(jax.random.key(1), (3, 3, CHANNELS, CHANNELS))
    x = images(microbatches)[:, None, :8, :8]

    def loss(kernel: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(y * y)

    def accumulate(of: Callable[..., Any], kernel: Any, x: Any) -> Any:
        add = lambda total, part: (total + jax.grad(of)(kernel, part), None)
        return jax.lax.scan(add, jnp.zeros_like(kernel), x)[0]

    def inside(kernel: Any, x: Any) -> Any:
        return accumulate(
            lambda k, part: loss(jt.weightstd.standardize(k), part), kernel, x
        )

    def outside(kernel: Any, x: Any) -> Any:
        standardized, pull_back = jax.vjp(jt.weightstd.standardize, kernel)
        return pull_back(accumulate(loss, standardized, x))[0]

    found = {}
    for name, fn in (
        ("once, outside the scan", outside),
        ("in every microbatch", inside),
    ):
        step = jax.jit(fn).lower(kernel, x).compile()
        found[name] = lambda step=step: jax.block_until_ready(step(kernel, x))
    return found


def branched(block: Any) -> tuple[Any, Any]:
    """The block in its training form, statistics moved once, and its fused convolution."""
    block.train()
    block(images(2))
    block.eval()
    return block, block.fused()


def branch_blocks(**how: Any) -> dict[str, Callable[[], Any]]:
    """Blocks of several branches that fuse into one 3x3 convolution."""
    kinds = (jt.nnx.ACBlock, jt.nnx.RepVGGBlock, jt.nnx.DiverseBranchBlock)
    args, rngs = (CHANNELS, CHANNELS, (3, 3)), nnx.Rngs(0)
    return {
        kind.__name__: functools.partial(kind, *args, rngs=rngs, **how)
        for kind in kinds
    }


def branch_inference() -> Runs:
    """Inference of fused blocks and of the plain convolution."""
    runs = {
        f"{name}, fused": runner(branched(make())[1], train=False, grad=False)
        for name, make in branch_blocks().items()
    }
    return runs | {"nnx.Conv": runner(convolution(), train=False, grad=False)}


def branch_steps() -> Runs:
    """Train steps of the branches, of one kernel made of them, and of convolution and BatchNorm."""
    runs = {
        f"{name}, {mode}": runner(make())
        for mode in ("branches", "online")
        for name, make in branch_blocks(mode=mode).items()
    }
    norm = norms(CHANNELS)["BatchNorm, fast variance"]()
    return runs | {
        "nnx.Conv, BatchNorm": runner(
            nnx.Sequential(convolution(use_bias=False), norm)
        )
    }


# Table: (its runs, the row that ratios are taken to).
TABLES: dict[str, tuple[Callable[[], Runs], str]] = {
    "train step, normalized": (norm_steps, "conv, BatchNorm, relu"),
    "train step, the norm alone": (isolated_norms, "BatchNorm"),
    "train step, standardized": (standardized_steps, "nnx.Conv"),
    "32 microbatches of 1 x 8 x 8": (microbatch_steps, "in every microbatch"),
    "inference, fused": (branch_inference, "nnx.Conv"),
    "train step, branches": (branch_steps, "nnx.Conv, BatchNorm"),
}


def time_table(title: str, rounds: int) -> _table.Table:
    """Medians over the rounds: milliseconds, and the ratio to the base in the same round."""
    make, base = TABLES[title]
    runs = make()
    common.in_turn(runs, 1)  # warm
    times = common.in_turn(runs, rounds)
    rows = [
        (
            name,
            1e3 * float(np.median(ts)),
            float(np.median(ts / times[base])),
            base,
        )
        for name, ts in times.items()
    ]
    return _table.make((title, *TIMES[1:]), rows)


def bytes_table() -> _table.Table:
    """Bytes accessed by the normalizations alone, in sizes of x."""
    rows = [
        (name, dtype, *norm_bytes(make, dtype))
        for dtype in ("float32", "bfloat16")
        for name, make in norms(CHANNELS).items()
    ]
    return _table.make(
        ("bytes / size of x", "x", "forward", "train step"), rows
    )


def heading(command: str, rounds: int = ROUNDS) -> str:
    """What was run, on what, how often."""
    return (
        f"Layers: `{command}`\n\n{hardware()}.\n\n"
        f"x: [{BATCH}, {SIDE}, {SIDE}, {CHANNELS}], float32; 3x3 convolutions, {CHANNELS} to {CHANNELS}\n"
        "channels. Train step: value and gradients by parameters and x. BatchNorm:\n"
        "nnx.BatchNorm(use_fast_variance=False). Median\n"
        f"over {rounds} rounds of the milliseconds, and of the ratio to the base in the same round."
    )


def main() -> None:
    """Measure and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.blocks", rounds=ROUNDS)
    tables = [
        bytes_table(),
        *(time_table(title, args.rounds) for title in TABLES),
    ]
    common.publish(tables, heading(command, args.rounds), args.out)


if __name__ == "__main__":
    main()
