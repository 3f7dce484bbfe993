"""What large models need on a TPU, on paper and by compile: `python -m benchmarks.scale`.

The paper counts parameters, gradients and optimizer state from shapes. The compiler's figures are those of
the whole donated step, for one device of a slice that need not be attached. Needs libtpu, as `tpu` does.
"""

from benchmarks import tpu  # noqa: F401  # isort: skip  (it sets the environment before jax is imported)

import functools
import json
import pathlib
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

import jaxtricks as jt
from benchmarks import common
from benchmarks import scale_model as model
from jaxtricks import _table
from jaxtricks.remat import _memory

GIB = 2**30
TRIED = 2  # programs that a plan may compile
PLANNED = 0.95  # of the HBM: the program's own code needs some
SIZES = {
    "1 B": model.Size(layers=18, width=2048, hidden=5504, heads=16),
    "10 B": model.Size(layers=48, width=4096, hidden=11008, heads=32),
}
BATCH = {("10 B", "v5e-16"): 2}  # texts a device
MOST = 4  # and elsewhere
FLOAT32, AUTOCAST, LOW = "float32", "autocast bf16", "bf16 parameters"
NONE, LAYER, PLAN = "none", "each layer", "plan"
ROUNDED = "adafactor, stochastic_round"


class Slice(NamedTuple):
    """A TPU slice: libtpu's name, and the HBM of a device that its compiler has, GiB."""

    topology: str
    hbm: float


SLICES = {
    "v5e-16": Slice("v5e:4x4", 15.75),
    "v5p-64": Slice("v5p:2x4x4", 95.74),
}


class Row(NamedTuple):
    """A program: names of a size, a slice, an optimizer, a policy and a way to recompute."""

    size: str
    slice: str
    optimizer: str
    policy: str
    recompute: str


ROWS = (
    Row("1 B", "v5e-16", "adamw", FLOAT32, NONE),
    Row("1 B", "v5e-16", "adamw", FLOAT32, LAYER),
    Row("1 B", "v5e-16", "adamw", AUTOCAST, NONE),
    Row("1 B", "v5e-16", "adamw", AUTOCAST, LAYER),
    Row("10 B", "v5e-16", "adamw", AUTOCAST, LAYER),
    Row("10 B", "v5e-16", "adafactor", AUTOCAST, LAYER),
    Row("10 B", "v5e-16", ROUNDED, LOW, LAYER),
    Row("10 B", "v5p-64", "adamw", AUTOCAST, NONE),
    Row("10 B", "v5p-64", "adamw", AUTOCAST, LAYER),
    Row("1 B", "v5e-16", "adamw", AUTOCAST, PLAN),
    Row("1 B", "v5p-64", "adamw", AUTOCAST, NONE),
)
PAPER = (
    "model",
    "slice",
    "optimizer",
    "parameters",
    "gradients",
    "state",
    "sum, GiB a device",
)
COMPILED = (
    *Row._fields,
    "texts",
    "arguments",
    "temporaries",
    "peak, GiB",
    "TFLOP a text",
    "HBM",
    "fits",
)


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The choices; the last one is for parameters in bfloat16."""
    memopt, roles = jt.memopt, model.ROLES
    adafactor = memopt.adafactor(1e-3, roles=roles)
    return {
        "adamw": optax.adamw(1e-3),
        "sm3, momentum": memopt.sm3(1e-3, momentum=0.9, roles=roles),
        "adafactor": adafactor,
        "sm3": memopt.sm3(1e-3, roles=roles),
        ROUNDED: optax.chain(adafactor, memopt.stochastic_round(0)),
    }


@functools.cache
def mesh(name: str) -> Mesh:
    """All devices of a topology along one axis."""
    bounds = (2, 2, 1)  # chips of a host, v5e's and v5p's
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=name, chips_per_host_bounds=bounds
    )
    return Mesh(np.array(found.devices), (model.AXIS,))


def local_bytes(tree: Any, specs: Any, on: Mesh) -> int:
    """Bytes of one device's shares of a tree of shapes."""

    def one(x: Any, spec: Any) -> int:
        shape = NamedSharding(on, spec).shard_shape(x.shape)
        return int(np.prod(shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, tree, specs)))


def paper_bytes(params: Any, tx: Any, on: Mesh) -> tuple[int, int]:
    """(bytes of the parameters, of the optimizer's state) on one device, from shapes alone."""
    specs = model.specs(params)
    state = jax.eval_shape(tx.init, params)
    held = local_bytes(state, jt.memopt.state_specs(tx, params, specs), on)
    return local_bytes(params, specs, on), held


def paper() -> list[tuple[Any, ...]]:
    """One row a model, slice and optimizer; see `PAPER`."""
    found = []
    for size, dims in SIZES.items():
        for name, tpus in SLICES.items():
            for optimizer, tx in optimizers().items():
                params = model.shapes(
                    dims, jnp.bfloat16 if optimizer == ROUNDED else jnp.float32
                )
                p, s = (
                    b / GIB
                    for b in paper_bytes(params, tx, mesh(tpus.topology))
                )
                found.append(
                    (
                        size,
                        name,
                        optimizer,
                        *(round(x, 3) for x in (p, p, s, 2 * p + s)),
                    )
                )
    return found


def compiled(
    size: model.Size,
    topology: str,
    tx: Any,
    policy: str,
    recompute: str,
    texts: int = 1,
    budget: float = 0.0,
) -> jt.remat.Report:
    """The report of one device's step.

    Args:
      size: of the model.
      topology: libtpu's name of the slice.
      tx: the optimizer.
      policy: a name of the three.
      recompute: what is computed again: nothing, each layer, or what a plan says.
      texts: a device.
      budget: GiB of the plan.

    Returns:
      Report; without arguments if the compiler refused the program.
    """
    on = mesh(topology)
    params = model.shapes(size, jnp.bfloat16 if policy == LOW else jnp.float32)
    tokens = jax.ShapeDtypeStruct((texts * on.size, size.length + 1), jnp.int32)
    args = model.arguments(tx, params, tokens, on)
    fn = model.loss(
        size, on, *([jt.remat.recompute_grad] if recompute == LAYER else [])
    )
    if policy != FLOAT32:
        fn = jt.amp.autocast(fn, scan_carry="auto")
    step = model.jitted(tx, params, on)
    if recompute == PLAN:
        return jt.remat.plan(
            fn,
            params,
            tokens,
            budget_bytes=f"{budget}GiB",
            within=lambda loss: (step(loss), args),
            max_compiles=TRIED,
            topology=topology,
        ).report
    traced = step(fn).trace(*args)
    try:
        return _memory.report(traced.lower().compile(), traced.jaxpr)
    except jax.errors.JaxRuntimeError as error:
        refused = _memory.refusal(error, traced.jaxpr)
        if refused is None:
            raise
        return refused


def row(asked: Row) -> tuple[Any, ...]:
    """One program compiled: (*asked, texts a device, GiB of arguments, temporaries and peak, TFLOP a text).

    None stands for what a compiler that refuses does not say.
    """
    topology, hbm = SLICES[asked.slice]
    tx, size = optimizers()[asked.optimizer], SIZES[asked.size]
    texts = BATCH.get((asked.size, asked.slice), MOST)
    how = asked.policy, asked.recompute, texts, round(PLANNED * hbm, 2)
    report = compiled(size, topology, tx, *how)
    args, temp, peak = rounded(
        *(x / GIB for x in (report.args, report.temp, report.peak))
    )
    operations = report.flops / 1e12 / (texts * mesh(topology).size)
    if not report.args:
        return (*asked, texts, None, temp, None, round(operations, 2))
    return (*asked, texts, args, temp, peak, round(operations, 2))


def judged(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row with the HBM and whether the program fits, as `COMPILED` has them."""
    hbm, peak = SLICES[found[1]].hbm, found[-2]
    return (*found, hbm, "yes" if peak is not None and peak <= hbm else "no")


def rounded(*numbers: float) -> tuple[float, ...]:
    """GiB as the tables print them."""
    return tuple(round(x, 2) for x in numbers)


def made() -> str:
    """Versions and sizes that the rows are of."""
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu", "optax")
    )
    return f"{packages}; {SIZES}; {BATCH}, else {MOST}"


def heading(command: str) -> str:
    """What stands above the tables."""
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu", "optax")
    )
    counts = {n: common.count(model.shapes(s)) / 1e9 for n, s in SIZES.items()}
    sizes = "\n".join(
        f"- {n}: {counts[n]:.2f} G parameters, {s}" for n, s in SIZES.items()
    )
    slices = "\n".join(
        f"- {n}: {s.topology}, {mesh(s.topology).size} devices, {s.hbm} GiB of HBM each, "
        f"bytes are of one"
        for n, s in SLICES.items()
    )
    return f"""Large models on slices of TPU v5e and v5p: `{command}`

{packages}. Nothing is run: the paper's bytes come from shapes, the rest from libtpu's compiler.
Parameters, gradients, state and batch are cut over all devices; layers run in a scan that gathers one
layer's weights at a time; attention keeps its scores (a flash kernel would not); the step is donated.
Operations are counted in the traced step; products run in one bf16 pass either way, the default on TPUs.
Rows: for each model and slice, from what one writes first to the first that fits. A program refused
before its memory was laid out has the temporaries that the compiler named, and nothing else; it counts no
arguments then, so a program may compile and still not fit. A plan's budget is {PLANNED:.0%} of the HBM.
Rows come from {len(ROWS)} separate compilations, kept in the .json; remove it to compile them all anew.

{sizes}
{slices}"""


class Kept(NamedTuple):
    """Rows in a file, so that a call goes on where the last one was stopped.

    Attributes:
      path: the file; None keeps nothing.
      made: what the rows are true of; with another they are compiled again.
    """

    path: pathlib.Path | None
    made: str

    def read(self) -> dict[Row, tuple[Any, ...]]:
        """What earlier calls compiled."""
        if self.path is None or not self.path.exists():
            return {}
        saved = json.loads(self.path.read_text())
        rows = map(tuple, saved["rows"] if saved["made"] == self.made else [])
        return {Row(*found[: len(Row._fields)]): found for found in rows}

    def write(self, rows: dict[Row, tuple[Any, ...]]) -> None:
        """All rows so far."""
        if self.path is not None:
            lines = ",\n".join(map(json.dumps, rows.values()))
            self.path.write_text(
                f'{{"made": {json.dumps(self.made)}, "rows": [\n{lines}\n]}}\n'
            )


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown, and keeps the rows in FILE's .json."""
    command, args = common.arguments("benchmarks.scale")
    kept = Kept(args.out and args.out.with_suffix(".json"), made())
    found = kept.read()
    for asked in ROWS:
        if asked not in found:
            start = time.monotonic()
            found[asked] = row(asked)
            print(
                *found[asked],
                f"{time.monotonic() - start:.0f} s",
                sep=", ",
                flush=True,
            )
            kept.write(found)
    rows = [judged(found[asked]) for asked in sorted(ROWS, key=order)]
    tables = _table.make(PAPER, paper()), _table.make(COMPILED, rows)
    common.publish(tables, heading(command), args.out)


def order(asked: Row) -> tuple[int, ...]:
    """Where a row stands in the table."""
    return list(SIZES).index(asked.size), list(SLICES).index(asked.slice)


if __name__ == "__main__":
    main()
