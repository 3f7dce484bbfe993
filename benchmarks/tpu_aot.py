"""The lab's training steps, compiled for a TPU v5e that is not attached: `python -m benchmarks.tpu_aot`.

Every model, plain and with tricks, on one chip and on four: temporaries, arguments, FLOPs, bytes accessed and
collectives of one chip. Needs libtpu and the lab (`make test-all` makes .venv-tpu), and half an hour.
"""

from benchmarks import tpu  # isort: skip  (it sets the environment before jax is imported)

from importlib.metadata import version
from typing import Any

from benchmarks import common
from jaxtricks import KEYS, _table
from jaxtricks.lab import collectives
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import plan
from jaxtricks.lab.config import IDLE, Parallel, Plan, Text, Tricks
from jaxtricks.lab.distributed import Placement

IMAGES = {"widths": (64, 128, 256), "batch": 256}  # 32 x 32 x 3, 10 classes
TEXT = {
    "text": Text(context=256, features=256, layers=4, heads=4),
    "batch": 64,
}  # 128 characters
BASELINE, ALL = "baseline", "all"
MESHES = {
    "data=4": Parallel("data=4"),
    "data=4 fsdp": Parallel("data=4", fsdp=True),
    "data=2,model=2": Parallel("data=2,model=2"),
}
MODELS = ("resnet", "nfnet", "repvgg", "transformer")
SHARDED = ("resnet", "transformer")
# Echoing changes what is read, never the step; alone it compiles the baseline's.
IN_STEP = tuple(key for key in KEYS if key != "echo")


def tricks(model: str) -> dict[str, Tricks]:
    """name -> those that are on: none, each alone where that tells something new, all that apply."""
    alone = {"resnet": IN_STEP, "transformer": ("amp", "memopt", "remat")}.get(
        model, ()
    )
    every = [key for key in KEYS if model not in IDLE.get(key, {})]
    found = {BASELINE: Tricks(), **{key: Tricks.of(key) for key in alone}}
    return found | {ALL: Tricks.of(*every)}


def settings(model: str, on: Tricks, parallel: Parallel | None = None) -> Plan:
    """Of a run; `Plan`, because the plan command's data sets have no examples."""
    size: Any = TEXT if model == "transformer" else IMAGES
    return Plan(model=model, tricks=on, parallel=parallel or Parallel(), **size)


def cost(cfg: Plan) -> common.StepCost:
    """What the step of a run needs, compiled as a run compiles it."""
    data = plan.described(cfg)
    program = step_lib.TrainStep(
        cfg, data, placement=Placement.of(cfg.parallel, tpu.chips())
    )
    batch = program.batch_shapes()
    compiled = program.jitted().lower(program.shapes, batch).compile()
    counts = compiled.cost_analysis()
    return common.StepCost(
        temp=common.temp_bytes(compiled),
        args=compiled.memory_analysis().argument_size_in_bytes,
        accessed=counts["bytes accessed"],
        flops=counts["flops"],
        params=4 * common.count(program.shapes.params),
        sent=[list(one) for one in collectives.census(compiled)],
    )


def one_chip(
    model: str, names: tuple[str, ...] = ()
) -> dict[str, common.StepCost]:
    """Name of `tricks` -> its cost (of those named)."""
    found = tricks(model)
    return {name: cost(settings(model, found[name])) for name in names or found}


def four_chips(
    model: str, names: tuple[str, ...] = ()
) -> dict[str, common.StepCost]:
    """Name of `MESHES` -> the baseline's cost there (on those named)."""
    return {
        n: cost(settings(model, Tricks(), MESHES[n])) for n in names or MESHES
    }


def table(model: str, costs: dict[str, common.StepCost]) -> _table.Table:
    """One row an entry, with ratios to the first."""
    fields = {"temp": 2**20, "args": 2**20, "accessed": 2**30, "flops": 1e9}
    base = next(iter(costs.values()))
    rows = []
    for name, found in costs.items():
        values = [getattr(found, field) for field in fields]
        bases = [getattr(base, field) for field in fields]
        pairs = [
            (v / u, v / b)
            for v, u, b in zip(values, fields.values(), bases, strict=True)
        ]
        rows.append((name, *(x for pair in pairs for x in pair)))
    headers = [
        (h, "to first")
        for h in ("temp MiB", "args MiB", "GiB accessed", "GFLOP")
    ]
    return _table.make((model, *(h for pair in headers for h in pair)), rows)


def sent_table(model: str, costs: dict[str, common.StepCost]) -> _table.Table:
    """The collectives of every program, by kind."""
    rows = []
    for name, found in costs.items():
        for kind in dict.fromkeys(kind for kind, *_ in found.sent):
            sizes = [size for k, size, _ in found.sent if k == kind]
            rows.append(
                (
                    name,
                    kind,
                    len(sizes),
                    sum(sizes) / 2**20,
                    sum(sizes) / found.params,
                )
            )
    return _table.make(
        (model, "collective", "how many", "MiB", "to parameters"), rows
    )


def tables(
    single: dict[str, dict[str, common.StepCost]],
    four: dict[str, dict[str, common.StepCost]],
) -> list[_table.Table]:
    """By model, what `one_chip` and `four_chips` found."""
    found = []
    for model, costs in single.items():
        found.append(table(f"{model}, one chip", costs))
        if model in four:
            beside = {"one chip": costs[BASELINE], **four[model]}
            found += [
                table(f"{model}, a chip", beside),
                sent_table(f"{model}, a chip", four[model]),
            ]
    return found


def heading(command: str) -> str:
    """What was compiled, with which versions."""
    packages = ", ".join(
        f"{n} {version(n)}" for n in ("jax", "libtpu", "flax", "optax")
    )
    return (
        f"Training steps of the lab, compiled for TPU {tpu.TOPOLOGY}: `{command}`\n\n{packages}.\n"
        "resnet, nfnet, repvgg: widths 64 128 256, batches of 256 images of 32 x 32 x 3. transformer: 4\n"
        "layers of width 256, batches of 64 windows of 256 characters. Tricks alone, and all that apply;\n"
        "echo has no row: it changes what is read, not the step. On four chips the batch is the same, and\n"
        "all figures are of one chip; a collective's bytes are those of its result. Exact counts of the\n"
        "compiler; nothing is run."
    )


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.tpu_aot")
    single = {model: one_chip(model) for model in MODELS}
    four = {model: four_chips(model) for model in SHARDED}
    common.publish(tables(single, four), heading(command), args.out)


if __name__ == "__main__":
    main()
