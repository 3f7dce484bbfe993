"""The planner beside what one places by hand: `python -m benchmarks.remat_plan`.

Temporaries, FLOPs and gradients of seven networks; the models and the ways are in `remat_models` and
`remat_chains`. Bytes and FLOPs are exact counts of the compiled program and of its jaxpr.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import remat_chains as chains
from benchmarks import remat_models
from jaxtricks import _table, remat
from jaxtricks.lab.report import hardware
from jaxtricks.remat import _memory

MB = 2**20
MAX_COMPILES = 6
BUDGETS = {
    "mlp16": (4.0, 3.5, 3.0),
    "tf12": (60.5, 26, 20.5),
    "resnet": (6.94, 4.9),
    "scan64": (50.5, 16.5),
    "rnn40": (15.8, 8),
}  # MiB
FRACTIONS = 0.5, 0.3, 0.2  # of what the plain loss needs, for the other models
HEADERS = (
    "budget",
    "temp MiB",
    "planner's",
    "extra FLOPs",
    "gradient error",
    "compiles",
    "s",
)


class Built(NamedTuple):
    """A compiled value and gradient: its costs, its gradients, and the seconds it took to compile."""

    report: _memory.Report
    grads: Any
    seconds: float


def build(loss: Callable[..., Any], args: tuple[Any, Any]) -> Built:
    """Compile value and gradient, and run them once."""
    start = time.perf_counter()
    traced = jax.jit(jax.value_and_grad(loss)).trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    return Built(
        _memory.report(compiled, traced.jaxpr), compiled(*args)[1], seconds
    )


def by_hand(model: chains.Model) -> dict[str, chains.Chain]:
    """name -> a way to run the blocks, nothing recomputed first."""
    wrap = remat.recompute_grad
    if model.chain is not chains.plain:
        return {
            "no remat": chains.scanned(),
            "jax.checkpoint on the body": chains.scanned(jax.checkpoint),
            "body": chains.scanned(wrap),
            "two levels": chains.two_level(wrap, chains.scanned()),
            "two levels and body": chains.two_level(wrap, chains.scanned(wrap)),
        }
    return {
        "no remat": chains.plain,
        "jax.checkpoint on blocks": chains.each(jax.checkpoint),
        "blocks": chains.each(wrap),
        "sqrt(n) segments": chains.segments(wrap),
        "segments and blocks": chains.segments(wrap, chains.each(wrap)),
        "binary recursion": chains.halves(wrap),
    }


def rows(name: str) -> Iterator[tuple[Any, ...]]:
    """The ways by hand, then the planner at every budget; see `HEADERS`."""
    model = remat_models.models()[name]()
    args = model.arrays()
    plain = build(model.loss(), args)
    for way, chain in by_hand(model).items():
        built = build(model.loss(chain), args)
        extra = built.report.flops / plain.report.flops - 1
        yield (
            way,
            None,
            *costs(built, None, extra, plain),
            None,
            seconds(built.seconds),
        )
    for budget in BUDGETS.get(name) or [
        f * plain.report.temp / MB for f in FRACTIONS
    ]:
        yield planned(model, args, budget, plain)


def planned(
    model: chains.Model, args: Any, budget: float, plain: Built
) -> tuple[Any, ...]:
    """The planner's row; where it fails, the least it reached stands under "planner's"."""
    loss, start = model.loss(), time.perf_counter()
    try:
        plan = remat.plan(
            loss,
            *args,
            budget_bytes=int(budget * MB),
            wrt="temp",
            max_compiles=MAX_COMPILES,
        )
    except remat.BudgetInfeasible as failure:
        spent = seconds(time.perf_counter() - start)
        least = None if failure.best is None else f"{failure.best / MB:.1f}"
        return (
            "planner: infeasible",
            f"{budget:.1f}",
            None,
            least,
            None,
            None,
            None,
            spent,
        )
    spent = time.perf_counter() - start
    found = costs(build(plan.fn, args), plan.peak, plan.extra_flops, plain)
    return "planner", f"{budget:.1f}", *found, plan.compiles, seconds(spent)


def costs(
    built: Built, peak: int | None, extra: float, plain: Built
) -> tuple[Any, ...]:
    """(compiled here, what the planner said, FLOPs beyond the plain, error of the gradients)."""
    said = None if peak is None else f"{peak / MB:.2f}"
    error = gradient_error(built.grads, plain.grads)
    return (
        f"{built.report.temp / MB:.2f}",
        said,
        f"{100 * extra:+.1f}%",
        f"{error:.1e}",
    )


def gradient_error(grads: Any, plain: Any) -> float:
    """Largest difference in a leaf relative to its largest number, over the leaves."""

    def leaf(a: Any, b: Any) -> float:
        return float(
            jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)
        )

    return max(jax.tree.leaves(jax.tree.map(leaf, grads, plain)))


def seconds(t: float) -> str:
    """Seconds as the tables print them."""
    return f"{t:.1f}"


def heading(command: str) -> str:
    """What was run, on what, and what the columns are."""
    return (
        f"Recomputation by hand and planned: `{command}`\n\n{hardware()}.\n\n"
        "Value and gradient, float32. temp: temporaries of the program compiled here; planner's: what the\n"
        "planner measured itself. Extra FLOPs: to no remat, loop bodies counted as often as they run.\n"
        "Gradient error: to no remat, the largest difference in a leaf relative to its largest number.\n"
        "By hand: remat.recompute_grad, placed as the row says; s: to trace and compile once. Planner: the\n"
        f"plain loss and a budget in MiB, at most {MAX_COMPILES} compiles; s: all of the search."
    )


def arguments(
    names: Sequence[str], description: str | None
) -> argparse.Namespace:
    """The command line: which of these models, and where the tables go."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="write the tables here too, as Markdown",
    )
    return parser.parse_args()


def show(row: Sequence[Any]) -> tuple[Any, ...]:
    """The row, after printing it: a model takes minutes."""
    print("  ".join(map(_table.cell, row)), file=sys.stderr, flush=True)
    return tuple(row)


def main() -> None:
    """Print model after model; `--out FILE` has, as Markdown, what is there so far."""
    given = arguments(list(remat_models.models()), __doc__)
    parts = [
        heading(" ".join(["python -m benchmarks.remat_plan", *sys.argv[1:]]))
    ]
    print(parts[0], flush=True)
    for name in given.models:
        found = _table.make((name, *HEADERS), [show(row) for row in rows(name)])
        print(f"\n{found}", flush=True)
        parts.append(found.markdown())
        if given.out is not None:
            given.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
