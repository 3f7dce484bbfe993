"""Training where a scan carries activations: `scan_carry="auto"` beside "keep" and beside float32.

Layers under lax.scan hand on the residual stream, and a recurrent cell its state. "keep" holds both in
float32 between the rounds, "auto" in bfloat16 if a product reads them and they come out low. A stream of a
few layers is rounded a few times; a state is rounded once per character, and a GRU adds little to it each
time. As in `amp_training`, the arms have the same weights and batches, and "nudged" shows what chance does.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtricks as jt
from benchmarks import amp_training, common, networks, text_task
from benchmarks import language_model as lm
from benchmarks.amp_training import POLICY, Way, autocast
from jaxtricks import _table
from jaxtricks.lab.report import hardware

AUTO_TARGET = 1.003  # of the loss with "keep"
LAYERS, WIDTH, HEADS = 4, 128, 4
FEATURES = 192  # of a cell
RATES = {"transformer": 2e-3, "LSTM": 1e-2, "GRU": 1e-2}
FLOAT32, NUDGED, KEEP, AUTO = (
    "float32",
    "float32, nudged",
    "bfloat16, keep",
    "bfloat16, auto",
)


def ways() -> list[Way]:
    """float32 comes first, "keep" before "auto"."""
    return [
        Way(FLOAT32),
        Way(NUDGED, start=amp_training.nudged),
        Way(KEEP, autocast("bf16", scan_carry="keep")),
        Way(AUTO, autocast("bf16", scan_carry="auto")),
    ]


def tasks() -> dict[str, text_task.Task]:
    """{model: task}: layers under lax.scan, each recomputed, and two cells."""
    codes, vocabulary = text_task.characters()
    cut = len(codes) * 9 // 10
    size = lm.Size(LAYERS, WIDTH, HEADS, text_task.CONTEXT, 1, vocabulary)

    def task(
        init: Callable[[int], Any], loss: Callable[[Any, Any], Any]
    ) -> text_task.Task:
        return text_task.Task(init, loss, None, codes[:cut], codes[cut:])

    return {
        "transformer": task(
            lambda seed: lm.draw(size, True, seed)[0], lm.loss(size, "remat")
        ),
        **{
            name: task(
                lambda seed, gates=gates: draw_cell(gates, vocabulary, seed),
                cell_loss(cell),
            )
            for name, gates, cell in (("LSTM", 4, lstm), ("GRU", 3, gru))
        },
    }


def draw_cell(gates: int, vocabulary: int, seed: int) -> Any:
    """Parameters of a language model with one recurrent layer, float32."""
    shapes = {
        "embedding": (vocabulary, FEATURES),
        "input": (FEATURES, gates * FEATURES),
        "state": (FEATURES, gates * FEATURES),
        "head": (FEATURES, vocabulary),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    params = {
        name: jax.random.normal(key, shape) / np.sqrt(FEATURES)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"bias": jnp.zeros(gates * FEATURES)}


def cell_loss(
    cell: Callable[..., tuple[Any, Any]],
) -> Callable[[Any, Any], Any]:
    """(params, windows int [N, T + 1]) -> nats per character; the state is the carry of a scan over T."""

    def loss(params: Any, windows: Any) -> Any:
        inputs = params["embedding"][windows[:, :-1]] @ params["input"]
        inputs = jnp.swapaxes(inputs + params["bias"], 0, 1)
        zeros = jnp.zeros((windows.shape[0], FEATURES))
        state = (zeros, zeros) if cell is lstm else zeros
        _, outputs = jax.lax.scan(
            lambda state, x: cell(params["state"], state, x), state, inputs
        )
        logits = jnp.swapaxes(outputs @ params["head"], 0, 1)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, windows[:, 1:]
        ).mean()

    return loss


def lstm(kernel: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """A product reads the output h alone; the memory c is a sum over time."""
    h, c = state
    gates = jnp.split(x + h @ kernel, 4, -1)
    i, f, o = (jax.nn.sigmoid(gate) for gate in gates[:3])
    c = f * c + i * jnp.tanh(gates[3])
    h = o * jnp.tanh(c)
    return (h, c), h


def gru(kernel: Any, h: Any, x: Any) -> tuple[Any, Any]:
    """The state is both: a product reads it, and it is a sum over time."""
    inputs, states = jnp.split(x, 3, -1), jnp.split(h @ kernel, 3, -1)
    reset, update = (jax.nn.sigmoid(inputs[i] + states[i]) for i in range(2))
    candidate = jnp.tanh(inputs[2] + reset * states[2])
    h = update * h + (1 - update) * candidate
    return h, h


def trained(
    name: str, task: text_task.Task, steps: int, batch: int, seeds: int
) -> dict[str, list[text_task.Run]]:
    """{arm: a run for every seed} of one model."""
    runs = {}
    for way in ways():
        arm = text_task.Arm(
            f"{name}: {way.name}",
            lambda rate: optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(rate)
            ),
            differentiate=way.differentiate,
            start=way.start,
        )
        train = text_task.trainer(task, arm, steps=steps, batch=batch)
        runs[way.name] = [train(seed, RATES[name]) for seed in range(seeds)]
    return runs


def carries(task: text_task.Task, scan_carry: str) -> str:
    """How many float32 carries of loops are lowered, of how many, in both passes."""
    windows = text_task.batches(task.train, 1)(0, 0)
    census = jt.amp.explain(
        jax.grad(task.loss),
        task.init(0),
        windows,
        policy=POLICY.format("bf16"),
        scan_carry=scan_carry,
    )
    return f"{census.carries_low} of {census.carries_low + census.carries_full}"


def rows_of(
    name: str, task: text_task.Task, runs: dict[str, list[text_task.Run]]
) -> tuple[list[tuple[str | None, ...]], str]:
    """The rows of one model, and whether "auto" costs loss there."""
    losses = {
        arm: {
            "training": np.array([text_task.tail(run) for run in found]),
            "validation": np.array([run.validation for run in found]),
        }
        for arm, found in runs.items()
    }
    rows = []
    for arm, found in losses.items():
        cells: list[str | None] = []
        for what, loss in found.items():
            cells.append(networks.spread(loss, 4))
            cells.append(networks.spread(loss / losses[FLOAT32][what], 4))
        low = None
        if arm in (KEEP, AUTO):
            low = carries(task, arm.split(", ")[1])
        rows.append((name, arm, low, *cells))
    parts = []
    for what in ("training", "validation"):
        ratio = losses[AUTO][what] / losses[KEEP][what]
        met = "met" if ratio.mean() <= AUTO_TARGET else "MISSED"
        each = ", ".join(f"{r:.4f}" for r in ratio)
        parts.append(f"{what} {met} (mean {ratio.mean():.4f}; {each})")
    return rows, (
        f'{name}, "auto" at most {AUTO_TARGET} of the loss with "keep": '
        f"{', '.join(parts)}."
    )


def heading(command: str, given: argparse.Namespace) -> str:
    """What was run, on what, how often."""
    rates = ", ".join(
        f"{rate:g} for the {name}" for name, rate in RATES.items()
    )
    return (
        f"Carries of lax.scan in training: `{command}`\n\n{hardware()}.\n\n"
        f"One process, n = {given.seeds} seeds, mean +- sample standard deviation. Losses in nats per "
        "character;\ntraining loss: mean over the last tenth of the steps. Ratios are to the float32 run of "
        "the same seed: same\ninitial weights, same batches. nudged: initial weights rounded to bfloat16 "
        "once, the rest float32.\ncarries low: float32 carries of loops, in both passes, that are held in "
        f"bfloat16.\n\nCharacters of Python's help topics, {given.steps} steps of {given.batch} x "
        f"{text_task.CONTEXT}; AdamW, gradients clipped to norm 1; rates:\n{rates}; warm-up over a tenth, "
        f"then a\ncosine to zero. transformer: {LAYERS} layers of {WIDTH} features under lax.scan and "
        f"jax.checkpoint (`language_model`).\nLSTM, GRU: one layer of {FEATURES} features, whose state is "
        f"the carry of a scan over {text_task.CONTEXT} characters."
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=pathlib.Path, help="write the table here too, as Markdown"
    )
    for name, default in {"steps": 300, "batch": 8, "seeds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Train and print; `--out FILE` writes the same as Markdown."""
    given = arguments()
    rows, notes = [], []
    for name, task in tasks().items():
        runs = trained(name, task, given.steps, given.batch, given.seeds)
        found, note = rows_of(name, task, runs)
        rows += found
        notes.append(note)
    headers = (
        "model",
        "arm",
        "carries low",
        "training loss",
        "of float32's",
        "validation loss",
        "of float32's",
    )
    out = f" --out {given.out}" if given.out else ""
    command = f"python -m benchmarks.amp_carries{out}"
    table = _table.make(headers, rows, notes)
    common.publish([table], heading(command, given), given.out)


if __name__ == "__main__":
    main()
