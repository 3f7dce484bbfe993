"""autocast beside the hand cast and its peers: `python -m benchmarks.amp_peers`.

Exact counts of the traced gradient, and its error against float64. jmp, grampax
and jaxamp join where they are installed; a peer that fails on a model says how.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks import language_model as lm
from jaxtricks import _compat, _dtypes, _jaxpr, _table, _tree, amp

SIZE = lm.Size(layers=2, width=64, heads=2, length=32, batch=4, vocabulary=128)
HEADERS = (
    "way",
    "error",
    "products low",
    "sums low",
    "exp, log, rsqrt low",
    "casts",
    "kept MiB",
)
PRODUCTS = ("dot_general", "conv_general_dilated")
SUMS = ("reduce_sum", "cumsum", "scatter-add", "select_and_scatter_add")
SENSITIVE = ("exp", "log", "log1p", "rsqrt", "pow")
Fn = Callable[..., Any]


def mlp(params: Any, batch: Any) -> Any:
    """Three layers and a softmax; params is a list of (kernel, bias), batch (x, labels)."""
    x, labels = batch
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    logits = x @ params[-1][0] + params[-1][1]
    return -jnp.mean(
        jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)
    )


def tasks() -> dict[str, tuple[Fn, Fn, tuple[Any, Any]]]:
    """name -> (loss, the same cast by hand, its arguments)."""
    keys = jax.random.split(jax.random.key(0), 5)
    layers = [
        (jax.random.normal(k, (64, 64)) / 8, jnp.zeros(64)) for k in keys[:3]
    ]
    batch = (
        jax.random.normal(keys[3], (128, 64)),
        jax.random.randint(keys[4], (128,), 0, 64),
    )
    found: dict[str, Any] = {
        "MLP, 3 layers": (
            mlp,
            amp.with_policy(mlp, "p=f32,c=bf16,o=f32"),
            (layers, batch),
        )
    }
    for form in lm.FORMS:
        losses = lm.loss(SIZE, form), lm.loss(SIZE, form, jnp.bfloat16)
        found[f"transformer, {form}"] = (
            *losses,
            lm.draw(SIZE, form != "unrolled"),
        )
    return found


def ways(loss: Fn, hand: Fn) -> dict[str, Fn]:
    """name -> the loss, made low in that way."""
    found = {
        "float32": loss,
        "cast by hand": hand,
        "amp.with_policy": amp.with_policy(loss, "p=f32,c=bf16,o=f32"),
        "amp.autocast": amp.autocast(loss),
    }
    for name, make in _PEERS.items():
        with contextlib.suppress(PackageNotFoundError):
            found[f"{name} {version(name)}"] = make(
                importlib.import_module(name), loss
            )
    return found


def _jmp(module: Any, fn: Fn) -> Fn:
    policy = module.get_policy("params=float32,compute=bfloat16,output=float32")
    return lambda *args: policy.cast_to_output(
        fn(*policy.cast_to_compute(args))
    )


_PEERS: dict[str, Callable[[Any, Fn], Fn]] = {
    "jmp": _jmp,
    "grampax": lambda module, fn: module.autocast(fn, dtype=jnp.bfloat16),
    "jaxamp": lambda module, fn: module.amp(fn, compute_dtype=jnp.bfloat16),
}


def row(name: str, fn: Fn, args: Any, exact: Any) -> tuple[Any, ...]:
    """One row; see `HEADERS`."""
    grad = jax.grad(fn)
    try:
        found = _jaxpr.census(grad, *args)
        error = distance(jax.jit(grad)(*args), exact)
        kept = jax.eval_shape(
            lambda *xs: jax.vjp(lambda p: fn(p, *xs[1:]), xs[0])[1], *args
        )
    except Exception as e:  # a peer's; whatever it is
        return (
            name,
            f"{type(e).__name__}: {str(e)[:40]}",
            *[""] * (len(HEADERS) - 2),
        )
    casts = sum(
        n
        for (primitive, _), n in found.items()
        if primitive == "convert_element_type"
    )
    shares = [share(found, names) for names in (PRODUCTS, SUMS, SENSITIVE)]
    return name, f"{error:.1e}", *shares, casts, _tree.nbytes(kept) / 2**20


def share(found: Counter[tuple[str, str]], names: tuple[str, ...]) -> str:
    """ "n of m": bfloat16 ones among the floating ones."""
    counts = {
        d: sum(found[name, d] for name in names)
        for d in ("bfloat16", "float32")
    }
    return f"{counts['bfloat16']} of {sum(counts.values())}"


def gradient64(loss: Fn, args: Any) -> Any:
    """The gradient in float64."""
    with _compat.enable_x64():
        wide = [
            jax.tree.map(
                lambda x: x.astype(np.float64) if _dtypes.is_floating(x) else x,
                a,
            )
            for a in args
        ]
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(*wide))


def distance(found: Any, exact: Any) -> float:
    """Relative L2 distance of trees."""
    pairs = list(
        zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    )
    off = sum(np.sum((np.asarray(a, np.float64) - b) ** 2) for a, b in pairs)
    return float(np.sqrt(off / sum(np.sum(b**2) for _, b in pairs)))


def table(name: str, loss: Fn, hand: Fn, args: Any) -> _table.Table:
    """One row a way."""
    exact = gradient64(loss, args)
    return _table.make(
        (name, *HEADERS[1:]),
        [row(n, f, args, exact) for n, f in ways(loss, hand).items()],
    )


def main() -> None:
    """Trace, run and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.amp_peers")
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "optax"))
    heading = (
        f"Gradients in bfloat16: `{command}`\n\n{packages}.\n\n"
        "error: relative L2 distance from float64. kept: what the forward pass leaves for the backward one,\n"
        "arguments included."
    )
    common.publish(
        [table(name, *task) for name, task in tasks().items()],
        heading,
        args.out,
    )


if __name__ == "__main__":
    main()
