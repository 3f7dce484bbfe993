"""A decoder in bfloat16, compiled for a TPU v5e that is not attached: `python -m benchmarks.tpu_amp`.

Temporaries and bytes accessed of autocast, beside float32 and the cast by hand. Needs libtpu, as `tpu` does.
"""

from benchmarks import tpu  # isort: skip  (it sets the environment before jax is imported)

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
        found["grad(autocast), float32 carry"] = jax.grad(
            amp.autocast(loss, scan_carry="keep")
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


def main() -> None:
    """Compile and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.tpu_amp")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "libtpu")
    )
    heading = (
        f"Gradient of a decoder, compiled for one chip of TPU {tpu.TOPOLOGY}: `{command}`\n\n{packages}.\n"
        f"{SIZE}.\nExact counts of the compiler; nothing is run."
    )
    tables = [
        _table.make((form, *HEADERS[1:]), rows(form)) for form in lm.FORMS
    ]
    common.publish(tables, heading, args.out)


if __name__ == "__main__":
    main()
