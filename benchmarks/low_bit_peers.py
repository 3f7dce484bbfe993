"""memopt.low_bit beside the 8-bit and 4-bit Adam of bitsandbytes and torchao, on the same gradients.

It needs the two beside jaxtricks, torch, and a C++ compiler (torchao compiles its step). On Python 3.11:

    pip install -c constraints/py311.txt -e '.[lab]' torch torchao bitsandbytes
    python -m benchmarks.low_bit_peers --data cifar10.zip --out benchmarks/results/low_bit_peers.md

A model trains with Adam in float32. Every optimizer sees each of its gradients and starts from zeros: Adam
without weight decay never looks at the parameters, so what it has added up is how far it would have moved
them. Deviation is the distance from where float32 arrived, as a share of how far float32 went. Settings are
each library's defaults. bitsandbytes and torchao round to the nearest, low_bit at random, so that part of its
deviation is noise, which differs from run to run; several runs with other random numbers tell how much of it
is not.
"""

import argparse
import functools
import importlib.util
import pathlib
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from benchmarks import common, image_task, network_arms, text_task
from jaxtricks import _table, _tree
from jaxtricks.lab.rundir import hardware

MODULE = "benchmarks.low_bit_peers"
RATES = {
    "text": 2e-3,
    "images": 3e-3,
}  # constant, so that all steps count alike
BATCHES = {"text": 16, "images": 64}
PER_CLASS = {"train": 1000, "validation": 10, "test": 10}
COPIES = 3  # runs of low_bit with other random numbers
APART = 1_000_003  # between the step counts that these start from
PEERS = ("torch", "bitsandbytes", "torchao")
# Names of the rows, and those that ours must not exceed.
OURS_8, OURS_4 = "low_bit, 8 bits", "low_bit, 4 bits"
BNB_8, AO_8, AO_4 = "bitsandbytes Adam8bit", "torchao Adam8bit", "torchao Adam4bit"  # fmt: skip
RIVALS = {OURS_8: (BNB_8, AO_8), OURS_4: (AO_4,)}
Leaves = list[np.ndarray]


class Stream(NamedTuple):
    """A model in training: its initial parameters, and the gradients of its steps."""

    params: Any
    grads: Iterator[Any]


class Follower(NamedTuple):
    """An optimizer that sees the gradients.

    Attributes:
      update: takes one step with gradients in a tree of the parameters.
      moved: for each run, what the leaves have moved so far.
      state_bytes: of its state, counted after the first step.
    """

    update: Callable[[Any], None]
    moved: Callable[[], list[Leaves]]
    state_bytes: Callable[[], int]


def text_stream(seed: int) -> Stream:
    """The lab's transformer by character."""
    task = text_task.make_task()
    draw = text_task.batches(task.train, BATCHES["text"])
    params = task.init(seed)
    grad = jax.jit(jax.grad(task.loss))
    return Stream(
        params,
        trajectory(
            params,
            RATES["text"],
            lambda params, i: grad(params, draw(seed, i)),
        ),
    )


def image_stream(task: image_task.Task, steps: int, seed: int) -> Stream:
    """A ResNet of 8 layers with batch normalization; its running statistics play no part in training."""
    batch = BATCHES["images"]
    build = network_arms.resnet(network_arms.batch_norm(batch))
    apply, params, state = jt.nnx.functional(build(nnx.Rngs(seed)))
    train = image_task.Split(*map(jnp.asarray, task.train))
    index = image_task.order(len(train.labels), steps * batch, seed)
    index = index.reshape(steps, batch)

    @jax.jit
    def grad(params: Any, index: Any, step: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)
        x = (train.images[index].astype(jnp.float32) - task.mean) / (
            task.deviation
        )
        x = image_task.augmented(key, x)

        def loss(params: Any) -> Any:
            logits, _ = apply(params, state, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, train.labels[index]
            ).mean()

        return jax.grad(loss)(params)

    return Stream(
        params,
        trajectory(
            params,
            RATES["images"],
            lambda params, i: grad(params, index[i], i),
        ),
    )


def trajectory(
    params: Any, rate: float, grad: Callable[[Any, int], Any]
) -> Iterator[Any]:
    """Yield the gradients of every step of Adam in float32."""
    step = stepper(optax.adam(rate))
    state, i = optax.adam(rate).init(params), 0
    while True:
        grads = grad(params, i)
        yield grads
        params, state = step(params, state, grads)
        i += 1


def stepper(tx: Any) -> Callable[[Any, Any, Any], Any]:
    """The compiled (params, state, grads) -> (params, state)."""

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def in_jax(tx: Any, params: Any, copies: int = 1) -> Follower:
    """An optax optimizer; copies of low_bit start from other step counts, and so round by other numbers."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    first = tx.init(zeros)
    runs = [
        (zeros, first._replace(steps=first.steps + APART * i) if i else first)
        for i in range(copies)
    ]
    step = stepper(tx)

    def update(grads: Any) -> None:
        runs[:] = [step(*run, grads) for run in runs]

    def moved() -> list[Leaves]:
        return [[*map(np.asarray, jax.tree.leaves(p))] for p, _ in runs]

    return Follower(update, moved, lambda: jt.memopt.state_bytes(tx, params))


def in_torch(
    build: Callable[[list[Any]], Any], params: Any, nbytes: Callable[[Any], int]
) -> Follower:
    """An optimizer of torch."""
    import torch

    leaves = [
        torch.nn.Parameter(torch.zeros(p.shape))
        for p in jax.tree.leaves(params)
    ]
    optimizer = build(leaves)

    def update(grads: Any) -> None:
        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            # A copy: torch wants arrays that it could write to.
            leaf.grad = torch.from_numpy(np.array(grad))
        optimizer.step()

    def moved() -> list[Leaves]:
        return [[leaf.detach().numpy().copy() for leaf in leaves]]

    def state_bytes() -> int:
        return sum(
            nbytes(value)
            for state in optimizer.state.values()
            for name, value in state.items()
            # The tables that decode are shared by all parameters.
            if torch.is_tensor(value) and not name.startswith("qmap")
        )

    return Follower(update, moved, state_bytes)


def followers(params: Any, rate: float) -> dict[str, Follower]:
    """float32 first, then ours, then those of the peers that are installed."""
    adam = optax.adam(rate)
    found = {"Adam, float32": in_jax(adam, params)}
    for name, bits in ((OURS_8, 8), (OURS_4, 4)):
        tx = jt.memopt.low_bit(adam, bits=bits)
        found[name] = in_jax(tx, params, copies=COPIES)
    if not all(map(importlib.util.find_spec, PEERS)):
        return found
    import bitsandbytes
    import torch
    import torchao.optim

    def plain(x: Any) -> int:
        return x.nbytes

    def coded(x: Any) -> int:
        return x.codes.nbytes + x.scale.nbytes if hasattr(x, "codes") else x.nbytes  # fmt: skip

    for name, build, nbytes in (
        ("torch Adam, float32", torch.optim.Adam, plain),
        (BNB_8, bitsandbytes.optim.Adam8bit, plain),
        (AO_8, torchao.optim.Adam8bit, coded),
        (AO_4, torchao.optim.Adam4bit, coded),
    ):
        found[name] = in_torch(
            functools.partial(build, lr=rate), params, nbytes
        )
    return found


def norm(leaves: Leaves) -> float:
    """Of all leaves together."""
    return float(
        np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in leaves))
    )


def away(a: Leaves, b: Leaves) -> Leaves:
    """a - b."""
    return [x - y for x, y in zip(a, b, strict=True)]


def deviation(runs: list[Leaves], reference: Leaves) -> float:
    """Distance from the reference over the reference's length: mean over the runs."""
    distances = [norm(away(run, reference)) for run in runs]
    return float(np.mean(distances)) / norm(reference)


def bias(runs: list[Leaves], reference: Leaves) -> float:
    """The deviation of infinitely many runs' mean.

    With K runs: D^2 = bias^2 + noise^2, the mean square of one; that of their mean is bias^2 + noise^2 / K.
    """
    count = len(runs)
    if count == 1:
        return deviation(runs, reference)
    one = np.mean([norm(away(run, reference)) ** 2 for run in runs])
    mean = [np.mean(leaf, axis=0) for leaf in zip(*runs, strict=True)]
    of_mean = norm(away(mean, reference)) ** 2
    square = (count * of_mean - one) / (count - 1)
    return float(np.sqrt(max(square, 0))) / norm(reference)


def worst(
    runs: list[Leaves], reference: Leaves, paths: list[str]
) -> tuple[float, str]:
    """The largest deviation of a leaf that moved, and its path."""
    return max(
        (deviation([[run[i]] for run in runs], [reference[i]]), path)
        for i, path in enumerate(paths)
        if norm([reference[i]])
    )


def replay(
    stream: Stream, rate: float, looks: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """{optimizer: its figures}, from one run of a model."""
    compared = followers(stream.params, rate)
    base = next(iter(compared))
    paths = [*_tree.by_path(stream.params)]
    count = common.count(stream.params)
    figures: dict[str, dict[str, Any]] = {name: {} for name in compared}
    before: dict[str, list[Leaves]] = {}
    for i in range(1, looks[-1] + 1):
        grads = next(stream.grads)
        if i == looks[-1]:
            before = {name: f.moved() for name, f in compared.items()}
        for follower in compared.values():
            follower.update(grads)
        if i not in looks:
            continue
        (reference,) = compared[base].moved()
        for name, follower in compared.items():
            figures[name][f"step {i}"] = deviation(follower.moved(), reference)
    (last,) = compared[base].moved()
    last_update = away(last, before[base][0])
    for name, follower in compared.items():
        moved = follower.moved()
        updates = [*map(away, moved, before[name])]
        leaf, path = worst(moved, last, paths)
        figures[name] |= {
            "without noise": bias(moved, last),
            "worst leaf": leaf,
            "last update": deviation(updates, last_update),
            "bytes": follower.state_bytes() / count,
            "path": path,
        }
    return figures


def table(runs: list[dict[str, dict[str, Any]]], steps: int) -> _table.Table:
    """One row an optimizer."""
    columns = [
        name for name in runs[0][OURS_8] if name not in ("bytes", "path")
    ]
    body = []
    for name in runs[0]:
        cells = [
            spread([run[name][column] for run in runs]) for column in columns
        ]
        paths = sorted({run[name]["path"] for run in runs})
        body.append((name, runs[0][name]["bytes"], *cells, ", ".join(paths)))
    notes = [
        verdict(runs, ours, rival, f"step {steps}")
        for ours, rivals in RIVALS.items()
        for rival in rivals
        if rival in runs[0]
    ]
    return _table.make(
        ("optimizer", "state, bytes/param", *columns, "which leaf"), body, notes
    )


def verdict(
    runs: list[dict[str, dict[str, Any]]], ours: str, rival: str, column: str
) -> str:
    """Whether our mean deviation is no larger than a rival's."""
    a, b = (
        float(np.mean([run[name][column] for run in runs]))
        for name in (ours, rival)
    )
    met = "met" if a <= b else "MISSED"
    return (
        f"{ours}: deviation at {column} no larger than that of {rival}: {met} "
        f"({a:.4f} and {b:.4f})"
    )


def spread(values: list[float]) -> str:
    """Mean +- sample standard deviation over seeds as text."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.2g} +- {deviation:.1g}"


def heading(command: str, seeds: int) -> str:
    """What was run, on what, with which versions."""
    names = ("jax", "optax", *PEERS)
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in names
        if importlib.util.find_spec(name)
    )
    model = ", ".join(
        f"{value} {name}" for name, value in text_task.model_settings().items()
    )
    return (
        f"low_bit beside bitsandbytes and torchao: `{command}`\n\n{hardware()}\n{versions}\n\n"
        "Every optimizer saw the gradients of one that trained in float32. Deviation: the distance from "
        "where float32\narrived as a share of how far float32 went, at three steps (`step`), for the leaf "
        "where it is largest, and for the\nlast update alone. Theirs round to the nearest, ours at random: "
        "`without noise` is the deviation of the mean of many\nruns, estimated from "
        f"{COPIES} with other random numbers; the other columns are those of one run.\n"
        f"n = {seeds} seeds of model and data, mean +- std. Constant rates: {RATES['text']:g} for text and "
        f"{RATES['images']:g} for images.\nAll leave arrays below 4096 entries in float32, torchao those too "
        "that its block does not divide.\nThe curves of low_bit's codes were chosen on the gradients of "
        "seed 0; the other seeds played no part in it.\n\n"
        f"First table: the lab's transformer by character ({model}),\n"
        f"{BATCHES['text']} x {text_task.CONTEXT} characters a step. Second table: a ResNet of 8 layers with "
        f"batch normalization on CIFAR-10 at\n16 x 16, {BATCHES['images']} images a step."
    )


def main() -> None:
    """Replay, print the tables, write them with --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help="CIFAR-10, as `networks`",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    steps = given.steps
    looks = (steps // 4, steps // 2, steps)
    images = image_task.make_task(given.data, PER_CLASS)
    streams = {
        "text": text_stream,
        "images": functools.partial(image_stream, images, steps),
    }
    tables = []
    for key, stream in streams.items():
        runs = []
        for seed in range(given.seeds):
            start = time.perf_counter()
            runs.append(replay(stream(seed), RATES[key], looks))
            took = time.perf_counter() - start
            print(f"{key}, seed {seed}, {took:.0f} s: {runs[-1]}", flush=True)
        tables.append(table(runs, steps))
    command = f"python -m {MODULE} --data {given.data.name}"
    common.publish(tables, heading(command, given.seeds), given.out)


if __name__ == "__main__":
    main()
