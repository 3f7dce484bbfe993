"""What the softmax losses cost beside optax's cross entropy: loss and gradient of one batch, jitted.

Time is a ratio to optax in the same round; bytes are the compiler's own counts. Seesaw, which weighs
every pair of classes by the probabilities, is there to show what is no logit transform.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common
from jaxtricks import _table, longtail
from jaxtricks.lab.report import hardware

BASE = "optax cross entropy"
EXAMPLES, CLASSES = 4096, 1000


def main() -> None:
    """Print the table."""
    command, args = common.arguments("benchmarks.longtail_losses", rounds=60)
    common.publish([table(args.rounds)], f"{hardware()}; `{command}`", args.out)


def table(rounds: int) -> _table.Table:
    """Every loss at 4096 x 1000, float32."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(EXAMPLES, CLASSES)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, CLASSES, EXAMPLES), jnp.int32)
    programs = {
        name: compiled(loss, logits, labels) for name, loss in losses().items()
    }
    runs = {
        name: lambda f=f: jax.block_until_ready(f(logits, labels))
        for name, f in programs.items()
    }
    common.in_turn(runs, 3)  # warm
    times = common.in_turn(runs, rounds)
    temp = {
        name: f.memory_analysis().temp_size_in_bytes
        for name, f in programs.items()
    }
    accessed = {
        name: f.cost_analysis()["bytes accessed"]
        for name, f in programs.items()
    }
    rows = [
        (
            name,
            float(np.median(times[name] / times[BASE])),
            float(np.min(times[name]) / np.min(times[BASE])),
            temp[name] / 2**20,
            accessed[name] / accessed[BASE],
        )
        for name in programs
    ]
    headers = (
        "loss",
        "time, median of ratios",
        "least / least",
        "temp MiB",
        "bytes / optax",
    )
    return _table.make(
        headers,
        rows,
        (f"{rounds} rounds in turn, {EXAMPLES} x {CLASSES} logits",),
    )


def losses() -> dict[str, Callable[..., Any]]:
    """The rows."""
    counts = jnp.asarray(
        longtail.data.exponential_counts(1280, CLASSES, 256.0), jnp.float32
    )
    return {
        BASE: optax.softmax_cross_entropy_with_integer_labels,
        "cross_entropy": longtail.cross_entropy(),
        "balanced_softmax": longtail.balanced_softmax(counts),
        "logit_adjusted": longtail.logit_adjusted(counts),
        "vs": longtail.vs(counts),
        "ldam, s=1": longtail.ldam(counts, s=1.0),
        "ldam": longtail.softmax_loss(
            longtail.margin(counts**-0.25), longtail.scale(30.0)
        ),
        "focal": longtail.focal(1.0),
        "class_balanced": longtail.class_balanced(counts),
        "seesaw": longtail.seesaw(counts),
    }


def compiled(loss: Callable[..., Any], logits: Any, labels: Any) -> Any:
    """The executable of (logits, labels) -> (mean loss, gradient)."""

    def mean(logits: Any, labels: Any) -> Any:
        return loss(logits, labels).mean()

    return jax.jit(jax.value_and_grad(mean)).lower(logits, labels).compile()


if __name__ == "__main__":
    main()
