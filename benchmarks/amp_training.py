"""Training to the end with autocast against float32: a character transformer and a residual network.

Every arm starts from the same weights and sees the same batches in the same order; parameters and
optimizer state are float32 in all of them. Training is chaotic: a rounding error grows until two runs
differ as much as two of float32 would. The arm "float32, nudged" shows how much that is: float32, but for
the initial weights, which are rounded to bfloat16 once. float16 has two arms: one with the default loss
scale, and one whose scale starts so large that the first steps overflow and grows so often that later
ones do too; what is between them is the price of the skipped steps. `--control` measures that price alone:
float32 whose steps are skipped at about the same places. 8 bits have an arm for each way to scale and one
without the exceptions of the default rules. `amp_carries` trains layers and cells under lax.scan.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxtricks as jt
from benchmarks import common, image_task, network_arms, networks, text_task
from benchmarks.text_task import in_float32
from jaxtricks import _table
from jaxtricks.lab.report import hardware

POLICY = "p=f32,c={},o=f32"
INIT, GROWTH_INTERVAL = 2.0**24, 50  # of the loss scale
TEXT_SIZE = {
    "features": 128,
    "layers": 3,
}  # most products neither first nor last
TEXT_RATE = 2e-3  # AdamW's best in `training`
IMAGE_RATE = (
    0.1  # the batch-norm ResNet's best in `networks` at 32 images a step
)
PER_CLASS = {"train": 1000, "validation": 100, "test": 300}
LOSS_TARGETS = {
    "bfloat16": 1.003,
    "float16": 1.01,
    "float8": 1.01,
    "int8": 1.01,
}
ALL_PRODUCTS = {"first": "f8", "last": "f8", "attention": "f8"}
ARMS = (
    "nudged: initial weights rounded to bfloat16 once, the rest float32:\nso much does a ratio vary without "
    f"any 16-bit product. overflows: the loss scale starts at 2^{np.log2(INIT):.0f} and\ndoubles after "
    f"{GROWTH_INTERVAL} clean steps (else 2^15 and 2000); a step that overflows is skipped, and its batch\n"
    "is lost. float8: e4m3fn, for gradients e5m2 (in convolutions e4m3fn); all products: also the first,\n"
    "the last and those of attention, which run in bfloat16 by default; by rows: a scale for each row, not\n"
    "for the whole operand. int8: in the forward pass; gradients run in bfloat16. share low: of the\n"
    "operations of all products, in both passes, those in the compute dtype (`amp.explain`). No layer runs\n"
    "under lax.scan here; for `scan_carry` see amp_carries.md."
)
CONTROL = (
    "steps skipped: float32 without the first 7 steps,\nnor the one after every "
    f"{GROWTH_INTERVAL} others: about those that overflow in float16."
)


class Way(NamedTuple):
    """How an arm differs from float32: see `text_task.Arm`.

    `protect` wraps the optimizer, and `settings` are those of `amp.explain`; None for what it cannot see.
    """

    name: str
    differentiate: Callable[..., Any] = in_float32
    start: Callable[[Any], Any] = lambda params: params
    protect: Callable[[Any], Any] = lambda tx: tx
    settings: dict[str, Any] | None = None


def ways(control: bool = False) -> list[Way]:
    """float32 comes first: the others, or the control alone, are compared with it."""
    if control:
        return [Way("float32"), Way("float32, steps skipped", protect=skipping)]
    default = jt.amp.dynamic_loss_scale
    forced = functools.partial(
        default, init=INIT, growth_interval=GROWTH_INTERVAL
    )
    return [
        Way("float32"),
        Way("float32, nudged", start=nudged),
        Way("bfloat16, hand cast", hand_cast),
        casting("bfloat16, autocast", "bf16"),
        casting("float16, autocast", "f16", default),
        casting("float16, autocast, overflows", "f16", forced),
        casting("float8, autocast", "f8"),
        casting("float8, autocast, all products", "f8", rules=ALL_PRODUCTS),
        casting("float8, autocast, by rows", "f8", scaling="row"),
        casting("int8, autocast", "i8"),
    ]


def casting(
    name: str,
    dtype: str,
    protect: Callable[[Any], Any] = lambda tx: tx,
    **options: Any,
) -> Way:
    """The arm that trains with `amp.autocast`; options are its other arguments."""
    settings = {"policy": POLICY.format(dtype), **options}
    return Way(
        name, autocast(dtype, **options), protect=protect, settings=settings
    )


def skipping(tx: Any) -> Any:
    """The optimizer without the steps that overflow in float16: from 2^24 to 2^17, then after each growth."""

    def taken(step: Any, **extra: Any) -> Any:
        return (step >= 7) & ((step - 6) % (GROWTH_INTERVAL + 1) != 0)

    return optax.conditionally_mask(tx, taken)


def nudged(params: Any) -> Any:
    """The parameters, rounded to bfloat16."""
    return jax.tree.map(
        lambda p: p.astype(jnp.bfloat16).astype(p.dtype), params
    )


def hand_cast(
    loss: Callable[..., Any], state: Any, **options: Any
) -> Callable[..., Any]:
    """Parameters and inputs cast to bfloat16 by hand; logits are float32 in the loss itself."""
    del state
    return jax.value_and_grad(
        jt.amp.with_policy(loss, POLICY.format("bf16")), **options
    )


def autocast(dtype: str, **options: Any) -> Callable[..., Callable[..., Any]]:
    """`amp.autocast` inside of grad, with the loss scale of the optimizer state in float16."""

    def differentiate(
        loss: Callable[..., Any], state: Any, **arguments: Any
    ) -> Callable[..., Any]:
        scale = jt.amp.loss_scale(state) if dtype == "f16" else None
        cast = jt.amp.autocast(loss, POLICY.format(dtype), **options)
        return jt.amp.value_and_grad(cast, scale=scale, **arguments)

    return differentiate


def shares(
    compared: list[Way], loss: Callable[..., Any], *args: Any
) -> dict[str, float | None]:
    """{arm: share of the operations of all products that run in its compute dtype}."""
    return {
        way.name: None
        if way.settings is None
        else jt.amp.explain(
            jax.grad(loss), *args, **way.settings
        ).share_of_flops()
        for way in compared
    }


def text_runs(
    compared: list[Way], steps: int, batch: int, seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """{arm: figures of every seed} of the transformer."""
    task, found = text_task.make_task(**TEXT_SIZE), {}
    windows = text_task.batches(task.train, batch)(0, 0)
    share = shares(compared, task.loss, task.init(0), windows)
    for way in compared:
        arm = text_task.Arm(
            way.name,
            lambda rate, way=way: way.protect(optax.adamw(rate)),
            differentiate=way.differentiate,
            start=way.start,
        )
        train = text_task.trainer(task, arm, steps=steps, batch=batch)
        runs = [train(seed, TEXT_RATE) for seed in range(seeds)]
        found[way.name] = [
            {
                "share": share[way.name],
                "loss": text_task.tail(r),
                "validation loss": r.validation,
                **r.metrics,
            }
            for r in runs
        ]
    return found


def image_runs(
    compared: list[Way], data: pathlib.Path, steps: int, batch: int, seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """{arm: figures of every seed} of the ResNet with batch normalization."""
    task, found = image_task.make_task(data, PER_CLASS), {}
    build = network_arms.resnet(network_arms.batch_norm(batch))
    sgd = functools.partial(optax.sgd, momentum=0.9, nesterov=True)
    share = image_shares(compared, build, task, batch)
    for way in compared:
        arm = image_task.Arm(
            way.name,
            build,
            batch,
            steps * batch,
            tx=lambda rate, way=way: way.protect(sgd(rate)),
            differentiate=way.differentiate,
            start=way.start,
        )
        train = image_task.trainer(task, arm)
        runs = [train(seed, IMAGE_RATE) for seed in range(seeds)]
        # A run that diverged has no loss: it stays in the table, as infinite.
        found[way.name] = [
            {
                **r,
                "share": share[way.name],
                "loss": np.inf if r["loss"] is None else r["loss"],
                "test loss": r["test_loss"],
                "test %": 100 * r["test"],
            }
            for r in runs
        ]
    return found


def image_shares(
    compared: list[Way],
    build: Callable[..., Any],
    task: image_task.Task,
    batch: int,
) -> dict[str, float | None]:
    """`shares` of the ResNet."""
    apply, params, state = jt.nnx.functional(build(nnx.Rngs(0)))

    def loss(params: Any, images: Any, labels: Any) -> Any:
        logits, _ = apply(params, state, images, train=True)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(logits, labels).mean()

    images = jnp.zeros((batch, *task.train.images.shape[1:]))
    return shares(compared, loss, params, images, jnp.zeros(batch, jnp.int32))


def table(
    runs: dict[str, list[dict[str, Any]]], held: str, *others: str
) -> _table.Table:
    """One row an arm.

    Args:
      runs: figures of every seed.
      held: name of the loss on data that is not trained on.
      others: figures beside it.
    """
    base = next(iter(runs.values()))
    spread = functools.partial(networks.spread, digits=4)
    ratios = {
        name: [column(found, k) / column(base, k) for k in ("loss", held)]
        for name, found in runs.items()
    }
    rows, notes = [], []
    for name, found in runs.items():
        training, holding = ratios[name]
        share = found[0]["share"]
        skipped = [
            f"{r['amp/skipped_steps']:.0f}"
            for r in found
            if "amp/skipped_steps" in r
        ]
        scale = [
            f"2^{np.log2(r['amp/loss_scale']):.0f}"
            for r in found
            if "amp/loss_scale" in r
        ]
        cells = (
            None if share is None else f"{100 * share:.0f} %",
            spread(column(found, "loss")),
            ", ".join(f"{r:.4f}" for r in training),
            spread(training),
            spread(column(found, held)),
            spread(holding),
            *(spread(column(found, other)) for other in others),
        )
        rows.append(
            (name, *cells, ", ".join(skipped) or None, ", ".join(scale) or None)
        )
        if "autocast" in name:
            notes.append(verdicts(name, ratios, held))
    headers = (
        "arm",
        "share low",
        "training loss",
        "of float32's, each seed",
        "mean",
        held,
        "of float32's",
        *others,
    )
    return _table.make((*headers, "skipped steps", "final scale"), rows, notes)


def verdicts(name: str, ratios: dict[str, list[np.ndarray]], held: str) -> str:
    """Whether an arm meets its target on both losses, with the spread of the nudged arm beside."""
    target = LOSS_TARGETS[name.split(",")[0]]
    nudged = ratios.get("float32, nudged", [None, None])
    parts = []
    for what, ratio, chance in zip(
        ("training loss", held), ratios[name], nudged, strict=True
    ):
        met = "met" if ratio.mean() <= target else "MISSED"
        beside = (
            "" if chance is None else f"; nudged {networks.spread(chance, 4)}"
        )
        parts.append(
            f"{what} {met} (mean {ratio.mean():.4f}, worst seed {ratio.max():.4f}{beside})"
        )
    return f"{name}, at most {target} of float32's: {', '.join(parts)}."


def column(runs: list[dict[str, Any]], name: str) -> np.ndarray:
    """One figure of every seed."""
    return np.array([run[name] for run in runs])


def heading(command: str, given: argparse.Namespace) -> str:
    """What was run, on what, how often."""
    sizes = text_task.model_settings() | TEXT_SIZE
    model = ", ".join(f"{value} {name}" for name, value in sizes.items())
    return (
        f"Training with autocast: `{command}`\n\n{hardware()}.\n\n"
        f"One process, n = {given.seeds} seeds, mean +- sample standard deviation. Training loss: nats, "
        "mean over the last\ntenth of the steps. Warm-up over a tenth, then a cosine to zero. Ratios are to "
        "the float32 run of the same\nseed: same initial weights, same batches. "
        f"{CONTROL if given.control else ARMS}\n\n"
        f"First table: the lab's transformer by character ({model}), AdamW at\n{TEXT_RATE:g}, "
        f"{given.text_steps} steps of {given.text_batch} x {text_task.CONTEXT} characters. Second table: a "
        "ResNet of 8 layers with batch normalization on\nCIFAR-10 at 16 x 16, "
        f"{PER_CLASS['train']} training and {PER_CLASS['test']} test images a class, SGD with Nesterov "
        f"momentum 0.9 at {IMAGE_RATE:g},\n{given.image_steps} steps of {given.image_batch}."
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        required=True,
        help="CIFAR-10, as `networks`",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="write the tables here too, as Markdown",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="float32 with steps skipped, alone",
    )
    sizes = {
        "text-steps": 300,
        "text-batch": 8,
        "image-steps": 400,
        "image-batch": 64,
        "seeds": 3,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Train and print; `--out FILE` writes the same as Markdown."""
    given = arguments()
    compared = ways(given.control)
    text = text_runs(compared, given.text_steps, given.text_batch, given.seeds)
    images = image_runs(
        compared, given.data, given.image_steps, given.image_batch, given.seeds
    )
    out = " --control" * given.control + (
        f" --out {given.out}" if given.out else ""
    )
    command = f"python -m benchmarks.amp_training --data {given.data.name}{out}"
    tables = [
        table(text, "validation loss"),
        table(images, "test loss", "test %"),
    ]
    common.publish(tables, heading(command, given), given.out)


if __name__ == "__main__":
    main()
