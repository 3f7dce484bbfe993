"""A decoder in 8-bit floats, compiled for a TPU that multiplies them: `python -m benchmarks.tpu_amp8`.

Temporaries, bytes accessed, and the dtypes of the operands of all products, read from the compiled
program. Nothing is run, and the TPU is not attached. Needs libtpu, as `tpu` does.
"""

from benchmarks import tpu  # isort: skip  (it sets the environment before jax is imported)

import re
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks import language_model as lm
from benchmarks.tpu_amp import SIZE
from jaxtricks import _table, amp

TOPOLOGY, POLICY = "tpu7x:2x2x1", "p=f32,c=f8,o=f32"
HEADERS = (
    "temp MiB",
    "to by hand",
    "GiB accessed",
    "to by hand",
    "products of 8-bit floats",
    "others",
)


def ways(form: str) -> dict[str, Callable[..., Any]]:
    """name -> the gradient, the one cast by hand first."""
    loss = lm.loss(SIZE, form)
    return {
        "bfloat16, by hand": jax.grad(lm.loss(SIZE, form, jnp.bfloat16)),
        "bfloat16, grad(autocast)": jax.grad(amp.autocast(loss)),
        "float8, grad(autocast)": jax.grad(amp.autocast(loss, POLICY)),
        "float8, autocast(grad)": amp.autocast(jax.grad(loss), POLICY),
    }


def rows(form: str, names: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
    """One row a way (of those named); see `HEADERS`."""
    tpu.TOPOLOGY = TOPOLOGY
    tpu.chips.cache_clear()
    args = tpu.place(lm.shapes(SIZE, form != "unrolled"))
    found = []
    for name, fn in ways(form).items():
        if not names or name in names:
            compiled = jax.jit(fn).lower(*args).compile()
            counts = multiplied(compiled.as_text())
            found.append(
                (
                    name,
                    common.temp_bytes(compiled) / 2**20,
                    compiled.cost_analysis()["bytes accessed"] / 2**30,
                    counts[True],
                    counts[False],
                )
            )
    _, temp, accessed, _, _ = found[0]
    return [(n, t, t / temp, a, a / accessed, *c) for n, t, a, *c in found]


def multiplied(text: str) -> Counter[bool]:
    """Products of an HLO text: {whether both operands have 8 bits: how many}."""
    # Every instruction, also those within a fusion, begins with its name and type.
    kinds = dict(re.findall(r"%?([\w.-]+) = (\w+)\[", text))
    operands = re.findall(r" convolution\(%?([\w.-]+), %?([\w.-]+)\)", text)
    return Counter(
        all(kinds.get(name, "").startswith("f8") for name in pair)
        for pair in operands
    )


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.tpu_amp8")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu")
    )
    heading = (
        f"Gradient of a decoder, compiled for one chip of TPU {TOPOLOGY}: `{command}`\n\n{packages}.\n"
        f"{SIZE}.\nExact counts of the compiler; nothing is run. Logits and attention stay in bfloat16\n"
        "(the default rules)."
    )
    tables = [_table.make((form, *HEADERS), rows(form)) for form in lm.FORMS]
    common.publish(tables, heading, args.out)


if __name__ == "__main__":
    main()
