"""Recomputation, compiled for a TPU v5e that is not attached: `python -m benchmarks.tpu_remat`.

Temporaries, FLOPs and bytes accessed of a decoder's gradient: nothing recomputed, `jax.checkpoint`,
`remat.recompute_grad` and a plan. Needs libtpu, as `tpu` does.
"""

from benchmarks import tpu  # isort: skip  (it sets the environment before jax is imported)

from importlib.metadata import version
from typing import Any

import jax

from benchmarks import common
from benchmarks import remat_chains as chains
from benchmarks import remat_models as models
from jaxtricks import _table, remat

SIZE = {
    "n": 3,
    "width": 512,
    "length": 512,
    "batch": 8,
    "heads": 8,
    "vocabulary": 1024,
}
WRAPS = {
    "jax.checkpoint": jax.checkpoint,
    "recompute_grad": remat.recompute_grad,
}
PLANNED = 0.2  # budget of temporaries
HEADERS = (
    "way",
    "temp MiB",
    "to plain",
    "TFLOP",
    "to plain",
    "GiB accessed",
    "to plain",
)


def ways() -> dict[str, chains.Chain]:
    """name -> how the layers run, nothing recomputed first."""
    found = {"plain": chains.plain}
    found |= {
        f"{name} a layer": chains.each(wrap) for name, wrap in WRAPS.items()
    }
    return found | {
        f"{name} a segment": chains.segments(wrap)
        for name, wrap in WRAPS.items()
    }


def rows(
    size: dict[str, int], names: tuple[str, ...] = ()
) -> list[tuple[Any, ...]]:
    """One row a way (of those named); see `HEADERS`."""
    model = models.transformer(**size)
    args = tpu.place(model.shapes())
    found = [
        (n, *cost(model.loss(w), args))
        for n, w in ways().items()
        if not names or n in names
    ]
    if not names:
        plan = remat.plan(
            model.loss(),
            *model.shapes(),
            budget_bytes=PLANNED,
            wrt="temp",
            max_compiles=3,
            topology=tpu.TOPOLOGY,
        )
        found.append(
            (f"planned for {PLANNED:.0%} of plain", *cost(plan.fn, args))
        )
    base = found[0]
    return [
        (
            name,
            t / 2**20,
            t / base[1],
            f / 1e12,
            f / base[2],
            a / 2**30,
            a / base[3],
        )
        for name, t, f, a in found
    ]


def cost(loss: Any, args: Any) -> tuple[float, float, float]:
    """(bytes of temporaries, FLOPs, bytes accessed) of value and gradient."""
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    counts = compiled.cost_analysis()
    return (
        common.temp_bytes(compiled),
        counts["flops"],
        counts["bytes accessed"],
    )


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.tpu_remat")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu")
    )
    heading = (
        f"Value and gradient of a decoder, compiled for one chip of TPU {tpu.TOPOLOGY}: `{command}`\n\n"
        f"{packages}.\n{', '.join(f'{k} {v}' for k, v in SIZE.items())}; about sqrt(n) segments.\n"
        "Exact counts of the compiler; nothing is run."
    )
    common.publish([_table.make(HEADERS, rows(SIZE))], heading, args.out)


if __name__ == "__main__":
    main()
