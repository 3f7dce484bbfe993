"""Ours beside its peers, in one process: `python -m benchmarks.peers` (part of `make bench`).

Time: both run in turn, one round after the other; the median of the rounds' ratios, and the ratio of the
least times. Bytes are the compiler's own counts, exact. Below 1 is less than the peer needs.
`--readme` writes the table into README.md. jmp, grampax and jaxamp come with the extra `bench`.
"""

import itertools
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import jaxtricks as jt
from benchmarks import (
    amp,
    amp_peers,
    blocks,
    common,
    echo_speed,
    longtail_losses,
    readme,
    recompute,
)
from jaxtricks import _table, _tree
from jaxtricks.lab.report import hardware

ROUNDS, BATCH, OUTPUTS = 20, 16, 20_000
HEADERS = ("ours", "peer", "time", "least / least", "bytes", "of what", "task")
Run = Callable[[], Any]


class Program(NamedTuple):
    """Something to run, and bytes that it needs; either may be missing.

    Attributes:
      run: runs it once, to the end.
      nbytes: what it needs of what the row says.
      failed: why there is neither.
    """

    run: Run | None = None
    nbytes: float | None = None
    failed: str = ""


class Pair(NamedTuple):
    """A row: ours beside the peer on one task."""

    ours: str
    peer: str
    programs: tuple[Program, Program]
    what: str
    task: str


def optimizers() -> Iterator[Pair]:
    """Update steps."""
    params, txs = common.transformer(), common.optimizers()
    arrays = common.draw(params)
    task = "update of a 12-layer transformer, 10.5 M parameters"

    def program(name: str) -> Program:
        step = common.compile_step(txs[name], params)
        run = common.stepper(step, txs[name], arrays, arrays)
        return Program(run, common.cost(step, txs[name], params).accessed)

    for ours, peer in (
        ("memopt.adafactor", "optax.adafactor"),
        ("memopt.adafactor", "adamw"),
        ("memopt.sm3 momentum 0.9", "optax.sm3 momentum 0.9"),
        ("agc, sgd momentum 0.9", "optax's agc, sgd momentum 0.9"),
    ):
        yield Pair(ours, peer, (program(ours), program(peer)), "accessed", task)
    small = common.draw(common.transformer(6))
    for name, ways in amp.pairs().items():
        found = [amp.compiled_update(tx, small) for tx in ways]
        ours, peer = name.split(" / ")
        programs = tuple(Program(run, size) for run, _, size in found)
        yield Pair(
            f"amp.{ours}",
            f"optax.{peer}",
            programs,
            "state",
            "update of 6 layers",
        )


def layers() -> Iterator[Pair]:
    """Train steps of layers; inference of a fused block."""
    channels = blocks.CHANNELS
    norms = blocks.norms(channels)
    standardized = jt.nnx.WSConv(
        channels, channels, (3, 3), use_bias=True, rngs=nnx.Rngs(0)
    )
    _, fused = blocks.branched(blocks.branch_blocks()["ACBlock"]())
    x = blocks.images(BATCH)

    def program(module: Any, **how: bool) -> Program:
        step, args = blocks.compiled(module, x, **how)
        run = lambda: jax.block_until_ready(step(*args))
        return Program(run, step.cost_analysis()["bytes accessed"])

    ebn, batch_norm = (
        norms["ExtendedBatchNorm"](),
        norms["BatchNorm, fast variance"](),
    )
    infer = {"train": False, "grad": False}
    for ours, peer, modules, how, task in (
        (
            "ExtendedBatchNorm",
            "nnx.BatchNorm",
            (ebn, batch_norm),
            {},
            "train step",
        ),
        (
            "WSConv",
            "nnx.Conv",
            (standardized, blocks.convolution()),
            {},
            "train step",
        ),
        (
            "ACBlock, fused",
            "nnx.Conv",
            (fused, blocks.convolution()),
            infer,
            "inference",
        ),
    ):
        programs = tuple(program(module, **how) for module in modules)
        yield Pair(
            f"nnx.{ours}",
            peer,
            programs,
            "accessed",
            f"{task}, {BATCH} x 32 x 32 x 64",
        )


class Block(linen.Module):
    """Four layers, as `recompute.deep_mlp` groups them."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """x through the four."""
        for _ in range(4):
            x = jnp.tanh(linen.Dense(128, use_bias=False)(x))
        return x


def recomputation() -> Iterator[Pair]:
    """Gradients of a deep network."""
    weights, x = [jnp.full((128, 128), 0.01)] * 16, jnp.ones((1024, 128))
    module = linen.Sequential([linen.remat(Block)() for _ in range(4)])
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda p: jnp.full(p.shape, 0.01), variables)
    flax = jax.value_and_grad(lambda v, x: (module.apply(v, x) ** 2).mean())

    def program(fn: Callable[..., Any], *args: Any) -> Program:
        step = jax.jit(fn)
        return Program(
            lambda: jax.block_until_ready(step(*args)),
            jt.remat.memory_analysis(fn, *args).temp,
        )

    ours = program(recompute.deep_mlp(jt.remat.recompute_grad), weights, x)
    peers = {
        "nothing recomputed": program(
            recompute.deep_mlp(lambda f: f), weights, x
        ),
        "jax.checkpoint": program(
            recompute.deep_mlp(jax.checkpoint), weights, x
        ),
        "linen.remat": program(flax, variables, x),
    }
    for peer, other in peers.items():
        yield Pair(
            "remat.recompute_grad",
            peer,
            (ours, other),
            "temporaries",
            "gradient, 16-layer MLP",
        )


def precision() -> Iterator[Pair]:
    """Gradients in bfloat16; what a peer can't take is said."""
    loss, hand, args = amp_peers.tasks()["transformer, unrolled"]

    def program(fn: Callable[..., Any]) -> Program:
        step = jax.jit(jax.grad(fn))
        try:
            jax.block_until_ready(step(*args))
            kept = jax.eval_shape(
                lambda *xs: jax.vjp(lambda p: fn(p, *xs[1:]), xs[0])[1], *args
            )
        except Exception as e:  # a peer's; whatever it is
            return Program(
                failed=f"{type(e).__name__}: {str(e)[:50]}".replace("\n", " ")
            )
        return Program(
            lambda: jax.block_until_ready(step(*args)), _tree.nbytes(kept)
        )

    ours = program(jt.amp.autocast(loss))
    for name, fn in amp_peers.ways(loss, hand).items():
        if not name.startswith("amp."):
            programs = ours, program(fn)
            yield Pair(
                "amp.autocast",
                name,
                programs,
                "kept",
                "gradient, 2-layer transformer",
            )


def losses() -> Iterator[Pair]:
    """Loss and gradient."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(
        rng.normal(size=(longtail_losses.EXAMPLES, longtail_losses.CLASSES)),
        jnp.float32,
    )
    labels = jnp.asarray(
        rng.integers(0, longtail_losses.CLASSES, longtail_losses.EXAMPLES),
        jnp.int32,
    )

    def program(name: str) -> Program:
        step = longtail_losses.compiled(
            longtail_losses.losses()[name], logits, labels
        )
        run = lambda: jax.block_until_ready(step(logits, labels))
        return Program(run, step.cost_analysis()["bytes accessed"])

    peer = program(longtail_losses.BASE)
    for ours in ("cross_entropy", "balanced_softmax"):
        programs = program(ours), peer
        task = f"loss and gradient, {longtail_losses.EXAMPLES} x {longtail_losses.CLASSES}"
        yield Pair(
            f"longtail.{ours}", longtail_losses.BASE, programs, "accessed", task
        )


def echoes() -> Iterator[Pair]:
    """An echo stage behind a generator of examples."""
    stages = echo_speed.stages(2)

    def examples() -> Iterator[Any]:
        return (
            {"image": np.zeros(8, np.uint8), "label": i}
            for i in itertools.count()
        )

    def plain() -> Iterator[Any]:
        for example in examples():
            yield example
            yield example

    def run(make: Callable[[], Any]) -> Program:
        return Program(lambda: list(itertools.islice(iter(make()), OUTPUTS)))

    ours = run(lambda: stages["spread"](examples()))
    task = f"{OUTPUTS} outputs of a generator, factor 2"
    yield Pair(
        "echo.echo", "a loop that yields twice", (ours, run(plain)), "", task
    )


def row(pair: Pair, rounds: int) -> tuple[Any, ...]:
    """One row; see `HEADERS`."""
    ours, peer = pair.programs
    if peer.failed:
        return pair.ours, pair.peer, peer.failed, "-", "-", pair.what, pair.task
    runs = {"ours": ours.run, "peer": peer.run}
    common.in_turn(runs, 2)  # warm
    times = common.in_turn(runs, rounds)
    median = float(np.median(times["ours"] / times["peer"]))
    least = float(times["ours"].min() / times["peer"].min())
    nbytes = "-" if ours.nbytes is None else f"{ours.nbytes / peer.nbytes:.2f}"
    return (
        pair.ours,
        pair.peer,
        f"{median:.2f}",
        f"{least:.2f}",
        nbytes,
        pair.what,
        pair.task,
    )


def table(rounds: int) -> _table.Table:
    """All rows."""
    groups = (optimizers, layers, recomputation, precision, losses, echoes)
    pairs = (pair for group in groups for pair in group())
    return _table.make(HEADERS, [row(pair, rounds) for pair in pairs])


def heading(command: str, rounds: int) -> str:
    """What was run, on what, how often."""
    found = []
    for name in ("jmp", "grampax", "jaxamp"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"`{command}`: {rounds} rounds in turn. {hardware()}, {', '.join(found)}."


def main() -> None:
    """Measure and print; `--readme 1` writes the table into README.md."""
    command, args = common.arguments(
        "benchmarks.peers", rounds=ROUNDS, readme=0
    )
    found, said = table(args.rounds), heading(command, args.rounds)
    common.publish([found], said, args.out)
    if args.readme:
        readme.replace("peers", f"{said}\n\n{found.markdown()}")


if __name__ == "__main__":
    main()
