"""A decoder in 16 and 8 bits, compiled for TPUs that are not attached: `python -m benchmarks.tpu_amp`.

Temporaries and bytes accessed of autocast, beside float32 and the cast by hand, on a v5e; and on a tpu7x,
which multiplies 8-bit floats, the dtypes of the operands too, read from the compiled program. Needs libtpu,
as `tpu` does.
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
from jaxtricks import _table, amp

SIZE = lm.Size(
    layers=3, width=512, heads=8, length=512, batch=8, vocabulary=1024
)
POLICY_8, WITH_8_BITS = "p=f32,c=f8,o=f32", "tpu7x:2x2x1"
HEADERS_8 = (
    "temp MiB",
    "GiB accessed",
    "products of 8-bit floats",
    "others",
)
HEADERS = ("way", "temp MiB", "to by hand", "GiB accessed", "to by hand")


def ways(form: str) -> dict[str, Callable[..., Any]]:
    """name -> the gradient, the one cast by hand first."""
    loss = lm.loss(SIZE, form)
    found = {
        "cast by hand": jax.grad(lm.loss(SIZE, form, jnp.bfloat16)),
        "float32": jax.grad(loss),
        "grad(autocast)": jax.grad(amp.autocast(loss)),
        "autocast(grad)": amp.autocast(jax.grad(loss)),
    }
    if form != "unrolled":
        found["grad(autocast), auto carry"] = jax.grad(
            amp.autocast(loss, scan_carry="auto")
        )
    return found


def rows(form: str, names: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
    """One row a way (of those named); see `HEADERS`."""
    args = tpu.place(lm.shapes(SIZE, form != "unrolled"))
    found = []
    for name, fn in ways(form).items():
        if not names or name in names:
            compiled = jax.jit(fn).lower(*args).compile()
            temp = common.temp_bytes(compiled)
            accessed = compiled.cost_analysis()["bytes accessed"]
            found.append((name, temp / 2**20, accessed / 2**30))
    _, temp, accessed = found[0]
    return [(n, t, t / temp, a, a / accessed) for n, t, a in found]


def rows_in_8_bits(form: str) -> list[tuple[Any, ...]]:
    """One row a way on a tpu7x; see `HEADERS_8`."""
    tpu.TOPOLOGY = WITH_8_BITS
    tpu.chips.cache_clear()
    loss, args = (
        lm.loss(SIZE, form),
        tpu.place(lm.shapes(SIZE, form != "unrolled")),
    )
    carry = "keep" if form == "unrolled" else "auto"
    low = amp.autocast(loss, scan_carry=carry)
    narrow = amp.autocast(loss, POLICY_8, scan_carry=carry)
    found = {
        "float32": jax.grad(loss),
        "bfloat16, by hand": jax.grad(lm.loss(SIZE, form, jnp.bfloat16)),
        "bfloat16, grad(autocast)": jax.grad(low),
        "float8, grad(autocast)": jax.grad(narrow),
        "float8, autocast(grad)": amp.autocast(
            jax.grad(loss), POLICY_8, scan_carry=carry
        ),
    }
    rows = []
    for name, fn in found.items():
        compiled = jax.jit(fn).lower(*args).compile()
        counts = multiplied(compiled.as_text())
        rows.append(
            (
                name,
                common.temp_bytes(compiled) / 2**20,
                compiled.cost_analysis()["bytes accessed"] / 2**30,
                counts[True],
                counts[False],
            )
        )
    return rows


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
    command, args = common.arguments("benchmarks.tpu_amp")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu")
    )
    heading = (
        f"Gradient of a decoder, compiled for one chip of TPU {tpu.TOPOLOGY}: `{command}`\n\n{packages}.\n"
        f"{SIZE}.\nExact counts of the compiler; nothing is run. The last three tables are for\n"
        f'{WITH_8_BITS}, with scan_carry="auto" where there is a scan; logits and attention stay in '
        "bfloat16 (the default rules)."
    )
    tables = [
        _table.make((form, *HEADERS[1:]), rows(form)) for form in lm.FORMS
    ]
    tables += [
        _table.make(
            (f"{form}, {WITH_8_BITS}", *HEADERS_8), rows_in_8_bits(form)
        )
        for form in lm.FORMS
    ]
    common.publish(tables, heading, args.out)


if __name__ == "__main__":
    main()
