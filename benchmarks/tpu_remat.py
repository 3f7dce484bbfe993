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
from jaxtricks import _table, amp, remat

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
PLANNED = 0.25  # budget of temporaries
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
STACKED = 4, 512, 512  # layers, width, tokens
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


OFFLOAD_HEADERS = (
    "topology",
    "bytes per second",
    "temp MiB",
    "to plain",
    "on the host, MiB",
    "extra FLOPs",
    "compiles",
)
OFFLOADED = 0.3  # budget of temporaries
# To the host: nothing, and a link that is never full. By the library's table this width
# computes too little per byte on each of these chips, and nothing is offloaded.
BANDWIDTHS = {"0": 0.0, "1e13": 1e13}


def stacked(layers: int, width: int, length: int, batch: int = 8) -> Any:
    """A decoder in bfloat16 whose layers are a scan: (loss, shapes of its arguments)."""
    model = models.transformer(
        n=layers,
        width=width,
        length=length,
        batch=batch,
        heads=8,
        vocabulary=1024,
    )
    params, tokens = model.shapes()
    params["blocks"] = jax.tree.map(
        lambda *x: jax.ShapeDtypeStruct((len(x), *x[0].shape), x[0].dtype),
        *params["blocks"],
    )
    loss = amp.autocast(model.loss(chains.scanned()), "p=f32,c=bf16,o=f32")
    return loss, (params, tokens)


def offloaded(topology: str, size: tuple[int, int, int]) -> Any:
    """One row per bandwidth; see `OFFLOAD_HEADERS`."""
    loss, args = stacked(*size)
    for name, bandwidth in BANDWIDTHS.items():
        plan = remat.plan(
            loss,
            *args,
            budget_bytes=OFFLOADED,
            wrt="temp",
            max_compiles=3,
            topology=topology,
            host_bandwidth=bandwidth,
        )
        row = (
            topology,
            name,
            plan.peak / 2**20,
            plan.peak / plan.baseline,
            plan.host / 2**20,
            f"{plan.extra_flops:+.1%}",
            plan.compiles,
        )
        print(*row, flush=True)
        yield row


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
        "Exact counts of the compiler; nothing is run.\n\n"
        f"Last: a decoder of {STACKED[0]} scanned layers, width {STACKED[1]}, {STACKED[2]} tokens, "
        f"batch 8, bfloat16, planned for\n{OFFLOADED:.0%} of its temporaries, by bytes per second to "
        "the memory of the host."
    )
    offload = [row for name in TOPOLOGIES for row in offloaded(name, STACKED)]
    tables = [
        _table.make(HEADERS, rows(SIZE)),
        _table.make(OFFLOAD_HEADERS, offload),
    ]
    common.publish(tables, heading, args.out)


if __name__ == "__main__":
    main()
