"""The planner beside jax's own policies: `python -m benchmarks.remat_policies`.

Each policy of `jax.checkpoint` is compiled by hand, and the planner gets the bytes of its temporaries
as a budget. Whether the planner then computes less is what the tables say.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from benchmarks import remat_chains as chains
from benchmarks import remat_models, remat_public
from benchmarks.remat_plan import (
    MAX_COMPILES,
    MB,
    Built,
    arguments,
    build,
    gradient_error,
    seconds,
    show,
)
from jaxtricks import _table, remat
from jaxtricks.lab.report import hardware

HEADERS = (
    "policy",
    "temp MiB",
    "extra FLOPs",
    "planner's MiB",
    "planner's FLOPs",
    "difference",
    "gap",
    "gradient error",
    "compiles",
    "s",
)
SHARED = (
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)


class Row(NamedTuple):
    """One policy, or several that compile to the same bytes and operations.

    Attributes:
      policy: its name, or names.
      temp: its temporaries, bytes.
      extra: its operations beyond those of no remat, as a fraction of them.
      found: the planner's temporaries; the least it reached where it met no budget.
      planned: the planner's extra operations; None where it met no budget.
      gap: what the planner says it may be above the optimum.
      error: largest relative error of a gradient, of the policy and of the plan.
      compiles: programs that the planner compiled.
      seconds: of all of the search.
    """

    policy: str
    temp: int
    extra: float
    found: int | None
    planned: float | None
    gap: float | None
    error: float
    compiles: int | None
    seconds: float

    @property
    def is_worse(self) -> bool:
        """Whether the planner computes more than the policy, or cannot meet its bytes."""
        return self.planned is None or self.planned > self.extra

    def cells(self) -> tuple[Any, ...]:
        """The row of the table, see `HEADERS`."""
        found = None if self.found is None else f"{self.found / MB:.2f}"
        planned = difference = gap = None
        if self.planned is None:
            difference = "infeasible"
        else:
            planned = f"{self.planned:+.1%}"
            difference = f"{self.planned - self.extra:+.1%}"
            gap = f"{self.gap:.1%}"
        return (
            self.policy,
            f"{self.temp / MB:.2f}",
            f"{self.extra:+.1%}",
            found,
            planned,
            f"{difference}{', worse' if self.is_worse else ''}",
            gap,
            f"{self.error:.0e}",
            self.compiles,
            seconds(self.seconds),
        )


def models() -> dict[str, Callable[[], chains.Model]]:
    """name -> what makes the model."""
    return remat_models.models() | remat_public.models()


def policies(
    model: chains.Model, names: dict[str, tuple[str, ...]]
) -> dict[str, Callable[..., Any]]:
    """name -> the loss under that policy of `jax.checkpoint`.

    Args:
      model: whose blocks are wrapped.
      names: {policy: marked values that it saves}.
    """
    of_jax = jax.checkpoint_policies
    named = {
        label: of_jax.save_only_these_names(*values)
        for label, values in names.items()
    }
    shared = {label: getattr(of_jax, label) for label in SHARED}
    found: dict[str, Callable[..., Any]] = {}
    for label, policy in (shared | named).items():
        wrap = functools.partial(jax.checkpoint, policy=policy)
        if model.chain is chains.plain:
            each, segments = chains.each(wrap), chains.segments(wrap)
        else:
            each = chains.scanned(wrap)
            segments = chains.two_level(wrap, chains.scanned())
        if label in shared:
            found[f"loss: {label}"] = wrap(model.loss())
            found[f"segments: {label}"] = model.loss(segments)
        found[f"blocks: {label}"] = model.loss(each)
    return found


def rows(
    model: chains.Model, names: dict[str, tuple[str, ...]] | None = None
) -> Iterator[Row]:
    """The policies that need fewer bytes than no remat, and the plans for their bytes."""
    args = model.arrays()
    loss = model.loss()
    plain = build(loss, args)
    # {(temporaries, operations): (names of the policies, the first of them)}
    alike: dict[tuple[int, int], tuple[list[str], Built]] = {}
    for label, by_hand in policies(model, names or {}).items():
        built = build(by_hand, args)
        key = built.report.temp, built.report.flops
        if built.report.temp < plain.report.temp:
            alike.setdefault(key, ([], built))[0].append(label)
    plans: dict[int, tuple[Any, ...]] = {}
    for temp, flops in sorted(alike):
        labels, built = alike[temp, flops]
        if temp not in plans:
            plans[temp] = planned(loss, args, temp, plain)
        found, extra, gap, error, compiles, spent = plans[temp]
        yield Row(
            "; ".join(labels),
            temp,
            flops / plain.report.flops - 1,
            found,
            extra,
            gap,
            max(error, gradient_error(built.grads, plain.grads)),
            compiles,
            spent,
        )


def planned(
    loss: Callable[..., Any], args: Any, temp: int, plain: Built
) -> tuple[Any, ...]:
    """The planner's (bytes, extra FLOPs, gap, gradient error, compiles, seconds) for these temporaries.

    What it says of itself is not believed: the planned loss is compiled and run here.
    """
    start = time.perf_counter()
    try:
        plan = remat.plan(
            loss,
            *args,
            budget_bytes=temp,
            wrt="temp",
            max_compiles=MAX_COMPILES,
        )
    except remat.BudgetInfeasible as failure:
        spent = time.perf_counter() - start
        return failure.best, None, None, 0.0, None, spent
    spent = time.perf_counter() - start
    built = build(plan.fn, args)
    if built.report.temp > temp:
        raise AssertionError(f"{built.report.temp} bytes are above {temp}")
    return (
        built.report.temp,
        built.report.flops / plain.report.flops - 1,
        plan.gap,
        gradient_error(built.grads, plain.grads),
        plan.compiles,
        spent,
    )


def summary(found: dict[str, list[Row]]) -> str:
    """The last line: how often the planner is worse."""
    every = [row for of_model in found.values() for row in of_model]
    worse = [row for row in every if row.is_worse]
    infeasible = sum(row.planned is None for row in worse)
    most = max(
        (row.planned - row.extra for row in worse if row.planned is not None),
        default=0.0,
    )
    error = max((row.error for row in every), default=0.0)
    return (
        f"The planner is worse in {len(worse)} of {len(every)} rows, by at most {most:.1%} of the "
        f"step's FLOPs; {infeasible} of them are budgets that it does not meet. Largest relative error "
        f"of a gradient: {error:.0e}."
    )


def heading(command: str) -> str:
    """What was run, on what, and what the columns are."""
    return (
        f"Recomputation by jax's policies and planned: `{command}`\n\n{hardware()}.\n\n"
        "Value and gradient, float32. Policy: of jax.checkpoint, around the whole loss, around each block\n"
        "(the body of a scan), around sqrt(n) segments; several where the compiled bytes and operations\n"
        "are the same; none that needs as many bytes as no remat. temp: its temporaries, which are the\n"
        "planner's budget. Extra FLOPs: to no remat, loop bodies counted as often as they run. Planner's:\n"
        "of the planned loss, compiled here. Difference: the planner's less the policy's; below zero is\n"
        "better. gap: what the planner may be above the optimum of its model, by its own bound. Gradient\n"
        "error: to no remat, the larger of policy and plan. Rows of the same bytes share one plan: at\n"
        f"most {MAX_COMPILES} compiles; s: all of the search."
    )


def main() -> None:
    """Print model after model; `--out FILE` has, as Markdown, what is there so far."""
    given = arguments(list(models()), __doc__)
    command = " ".join(["python -m benchmarks.remat_policies", *sys.argv[1:]])
    parts = [heading(command)]
    print(parts[0], flush=True)
    found: dict[str, list[Row]] = {}
    for name in given.models:
        found[name] = []
        cells = []
        for row in rows(models()[name](), remat_public.NAMES.get(name)):
            found[name].append(row)
            cells.append(show(row.cells()))
        table = _table.make((name, *HEADERS[1:]), cells)
        print(f"\n{table}", flush=True)
        parts.append(table.markdown())
        if given.out is not None:
            text = "\n\n".join([*parts, summary(found)])
            given.out.write_text(text + "\n")
    print(f"\n{summary(found)}", flush=True)


if __name__ == "__main__":
    main()
