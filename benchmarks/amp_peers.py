"""autocast beside the hand cast and its peers: `python -m benchmarks.amp_peers`.

What multiplies in few bits in the traced gradient, its error against float64, what it
keeps and how long it takes to trace. Peers and models of others join where they are
installed; what fails says how.
"""

import contextlib
import functools
import importlib
import inspect
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common, public_models
from benchmarks import language_model as lm
from benchmarks.public_models import Task
from jaxtricks import _compat, _dtypes, _flops, _jaxpr, _table, _tree, amp
from jaxtricks.amp._product8 import multiplied_formats, product8_p

SIZE = lm.Size(layers=2, width=64, heads=2, length=32, batch=4, vocabulary=128)
HEADERS = (
    "way",
    "forward",
    "backward",
    "error",
    "kept MiB",
    "read MiB",
    "of float32's",
    "temp MiB",
    "trace",
    "again",
    "sums low",
    "lines",
)
PRODUCTS = ("dot_general", "conv_general_dilated")
SUMS = ("reduce_sum", "cumsum", "scatter-add", "select_and_scatter_add")
PACKAGES = ("jax", "flax", "jmp", "grampax", "jaxamp", "qwix")
ZOO = ("attnax", "mamba2-jax", "equimo", "equinox", "dm-haiku")
ROUNDS = 3
F8, I8 = "p=f32,c=f8,o=f32", "p=f32,c=i8,o=f32"
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def ways(loss: Fn, hand: Fn) -> dict[str, Fn]:
    """name -> the loss, made low in that way."""
    found = {
        "float32": loss,
        "cast by hand": hand,
        "amp.with_policy": amp.with_policy(loss, "p=f32,c=bf16,o=f32"),
        "amp.autocast": amp.autocast(loss),
    }
    for name, make in _PEERS.items():
        with contextlib.suppress(ImportError):
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


class Way(NamedTuple):
    """A loss made low in one way.

    Attributes:
      fn: (params, batch) -> scalar.
      params: in the form that it takes.
      bits: of the operands that count as low.
      lines: what a user changes.
      timed: whether its tracing is timed too.
    """

    fn: Fn
    params: Any
    bits: int
    lines: int
    timed: bool = True


def every_way(task: Task) -> dict[str, Way]:
    """Those of `ways`, those in 8 bits, and what the model's framework offers."""
    params, loss = task.args[0], task.loss
    lines = {"float32": 0, "cast by hand": _hand_lines(task), "jmp": 3}
    found = {}
    for name, fn in ways(loss, task.hand or loss).items():
        # Models of others: no hand cast, and casting arguments is what jmp does.
        if task.hand or name.startswith(("float32", "amp.autocast", "jmp")):
            found[name] = Way(fn, params, 16, lines.get(name.split(" 0")[0], 1))
    if task.own:
        found["the framework's own"] = Way(task.own[0], params, 16, task.own[1])
    for scaling in ("tensor", "row"):
        for label, rules in (("", None), (", all products", ALL_ROLES)):
            fn = amp.autocast(loss, F8, scaling=scaling, rules=rules)
            found[f"amp.autocast f8 {scaling}{label}"] = Way(
                fn, params, 8, 1, timed=not rules
            )
    found["amp.autocast i8"] = Way(
        amp.autocast(loss, I8), params, 8, 1, timed=False
    )
    return found | dict(_qwix_ways(task))


ALL_ROLES = {"first": "f8", "last": "f8", "attention": "f8"}


def _hand_lines(task: Task) -> int:
    """Lines of the decoder that name a cast; an MLP's arguments are cast in one."""
    if not getattr(task.hand, "__module__", "").endswith("language_model"):
        return 1
    source = inspect.getsource(lm.loss).splitlines()
    return sum("down(" in line or "up(" in line for line in source)


def _qwix_ways(task: Task) -> Iterator[tuple[str, Way]]:
    """qwix's quantized training; it takes modules of Flax.

    By default only the forward pass has 8 bits; the other rows round cotangents to
    float8_e5m2, in convolutions (which take one dtype) to float8_e4m3fn. Scales are
    per channel, as qwix's own, or per tensor. All products are quantized: a rule for
    all modules. Einsums of more than two operands, which it refuses, are left out.
    """
    if task.remade is None:
        return
    with contextlib.suppress(ImportError):
        label, qwix = f"qwix {version('qwix')}", importlib.import_module("qwix")
        kinds = {
            f"{label} forward": {"bwd": False, "tensor": False},
            f"{label} row": {"bwd": True, "tensor": False},
            f"{label} tensor": {"bwd": True, "tensor": True},
        }
        for name, kind in kinds.items():
            for operations in (None, ("dot_general",)):
                change = functools.partial(
                    _quantized, qwix, operations=operations, **kind
                )
                loss, params = task.remade(change)
                jax.clear_caches()
                with contextlib.suppress(ValueError):
                    jax.eval_shape(loss, params, *task.args[1:])
                    timed = kind["bwd"] and not kind["tensor"]
                    without = ", not einsum" if operations else ""
                    yield name + without, Way(loss, params, 8, 4, timed)
                    break
        # Else the plain model meets what qwix left: see `cache_note`.
        jax.clear_caches()


def _quantized(
    qwix: Any,
    model: nnx.Module,
    inputs: Any,
    *,
    bwd: bool,
    tensor: bool,
    operations: tuple[str, ...] | None,
) -> nnx.Module:
    rule = functools.partial(
        qwix.QtRule,
        module_path=".*",
        weight_qtype=E4M3,
        act_qtype=E4M3,
        disable_channelwise_axes=tensor,
    )
    convolutions = rule(
        op_names=("conv_general_dilated",), bwd_qtype=E4M3 if bwd else None
    )
    others = rule(op_names=operations or (), bwd_qtype=E5M2 if bwd else None)
    provider = qwix.QtProvider([convolutions, others])
    # Without a first run: it would set up statistics, which these rules have none of.
    return qwix.quantize_model(model, provider, inputs, skip_nnx_init=True)


def row(name: str, way: Way, task: Task, exact: Any, float32: int) -> list[Any]:
    """One row without its times; see `HEADERS`.

    Args:
      name: of the way.
      way: the way.
      task: the task.
      exact: its gradient.
      float32: bytes that its backward pass reads as it is.
    """
    fn, args = way.fn, (way.params, *task.args[1:])
    try:
        if name.startswith("qwix"):
            # What was traced before must not matter: see `cache_note`.
            jax.clear_caches()
        forward, backward = passes(fn, args)
        compiled = jax.jit(jax.grad(fn)).lower(*args).compile(_QUICK)
        error = distance(compiled(*args), exact)
        kept, read = kept_bytes(fn, args)
        sums = share(_jaxpr.census(jax.grad(fn), *args), SUMS)
    except Exception as e:  # a peer's; whatever it is
        said = f"{type(e).__name__}: {str(e)[:40]}".replace("\n", " ")
        return [name, said, *[""] * (len(HEADERS) - 2)]
    return [
        name,
        f"{100 * low_share(forward, way.bits):.1f} %",
        f"{100 * low_share(backward, way.bits):.1f} %",
        f"{error:.1e}",
        kept / 2**20,
        read / 2**20,
        read / float32,
        common.temp_bytes(compiled) / 2**20,
        None,
        None,
        sums,
        way.lines,
    ]


# The same buffers, without LLVM's passes.
_QUICK = {"xla_backend_optimization_level": 0}


def kept_bytes(fn: Fn, args: Any) -> tuple[int, int]:
    """Bytes that the forward pass leaves for the backward one, and what that reads.

    Arguments are included. One compiled program keeps what is read alone.
    """
    kept = jax.eval_shape(
        lambda *xs: jax.vjp(lambda p: fn(p, *xs[1:]), xs[0])[1], *args
    )
    backward, _ = _jaxpr.trace(lambda run, ct: run(ct), kept, jnp.ones(()))
    jaxpr = _jaxpr.live(backward)
    needed = _read(jaxpr)
    read = sum(_jaxpr.var_bytes(v) for v in jaxpr.invars[:-1] if v in needed)
    return _tree.nbytes(kept), read


def _read(jaxpr: Any) -> set[Any]:
    """Variables that the results depend on.

    A product in 8 bits reads an operand that has been rounded already as it is rounded.
    """
    needed = set(_jaxpr.variables_of(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        if not any(v in needed for v in eqn.outvars):
            continue
        operands = eqn.invars
        if eqn.primitive is product8_p:
            ready = (*eqn.params["ready"], *[False] * len(operands))
            operands = [
                v
                for v, is_ready in zip(operands, ready, strict=False)
                if not is_ready
            ]
        elif _jaxpr.primitive(eqn) in ("scan", "checkpoint"):
            (body,) = _jaxpr.bodies(eqn)
            inner = _read(body.jaxpr)
            carry = range(0)
            if _jaxpr.primitive(eqn) == "scan":
                parts = _jaxpr.scan_parts(eqn)
                carry = range(parts.consts, parts.consts + parts.carry)
            operands = [
                v
                for i, (v, w) in enumerate(
                    zip(operands, body.jaxpr.invars, strict=True)
                )
                if w in inner or i in carry
            ]
        needed.update(_jaxpr.variables_of(operands))
    return needed


def share(found: Counter[tuple[str, str]], names: tuple[str, ...]) -> str:
    """ "n of m": bfloat16 ones among the floating ones."""
    counts = {
        d: sum(found[name, d] for name in names)
        for d in ("bfloat16", "float32")
    }
    return f"{counts['bfloat16']} of {sum(counts.values())}"


# What the products multiply.


def passes(fn: Fn, args: Any) -> tuple[Counter[Any], Counter[Any]]:
    """Operations of products by the dtypes of their operands: forward and backward pass.

    What a checkpoint computes again belongs to the backward pass.
    """
    forward = _operations(_jaxpr.live(_jaxpr.trace(fn, *args)[0]))
    whole = _operations(_jaxpr.live(_jaxpr.trace(jax.grad(fn), *args)[0]))
    whole.subtract(forward)
    return forward, whole


def _operations(jaxpr: Any) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    for eqn in jaxpr.eqns:
        name = _jaxpr.primitive(eqn)
        operands = tuple(str(v.aval.dtype) for v in eqn.invars[:2])
        if name in PRODUCTS:
            counts[operands] += _flops.eqn_flops(eqn)
        elif eqn.primitive is product8_p:
            product, sides = eqn.params["product"], _sides(eqn)
            plain = types.SimpleNamespace(
                primitive=product.primitive,
                params=dict(product.params),
                invars=eqn.invars[:2],
                outvars=eqn.outvars,
            )
            formats = multiplied_formats(product, sides) or operands
            counts[formats] += _flops.eqn_flops(plain)
        rounds = _jaxpr.scan_parts(eqn).length if name == "scan" else 1
        inner = (
            [body.jaxpr for body in _jaxpr.bodies(eqn)]
            if _jaxpr.has_bodies(eqn)
            else _jaxpr.sub_jaxprs(eqn)
        )
        for body in inner:
            for key, n in _operations(body).items():
                counts[key] += rounds * n
    return counts


def _sides(eqn: Any) -> tuple[Any, Any]:
    return eqn.params["sides"]


def low_operations(counts: Counter[Any], bits: int) -> int:
    """Operations of products both of whose operands have so few bits."""
    return sum(
        n
        for dtypes, n in counts.items()
        if all(8 * jnp.dtype(d).itemsize <= bits for d in dtypes)
    )


def low_share(counts: Counter[Any], bits: int) -> float:
    """The same as a share."""
    return low_operations(counts, bits) / max(1, counts.total())


def role_table(found: dict[str, Task]) -> tuple[_table.Table, dict[str, float]]:
    """Shares of the products' operations in float8, by what the rules leave out.

    Returns:
      The table, and {model: the smaller share of both passes, without first and last}.
    """
    rules = {
        "default": None,
        "attention": {"attention": "f8"},
        "ends": {"first": "f8", "last": "f8"},
        "all": ALL_ROLES,
    }
    jax.clear_caches()  # of what qwix left
    rows, least = [], {}
    for name, task in found.items():
        low: dict[str, list[int]] = {}
        total = [0, 0]
        for label, rule in rules.items():
            both = passes(amp.autocast(task.loss, F8, rules=rule), task.args)
            total = [counts.total() for counts in both]
            low[label] = [low_operations(counts, 8) for counts in both]

        def shares(
            label: str, left_out: str, low: Any = low, total: Any = total
        ) -> list[float]:
            """Share of what is low among all that is not left out, by pass."""
            return [
                a / max(1, t - (b - c))
                for a, t, b, c in zip(
                    low[label], total, low["all"], low[left_out], strict=True
                )
            ]

        columns = [
            shares("default", "default"),
            shares("attention", "attention"),
            shares("default", "all"),
            shares("all", "all"),
        ]
        rows.append((name, task.kind, *map(_percents, columns)))
        least[name] = min(columns[1])
    headers = (
        "float8, forward / backward",
        "kind",
        "without what the rules leave out",
        "the same, attention in float8",
        "of all products",
        "of all, all roles in float8",
    )
    return _table.make(headers, rows), least


def _percents(shares: list[float]) -> str:
    return " / ".join(f"{100 * s:.1f} %" for s in shares)


# Errors.


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


# Times.


def trace_ratios(found: dict[str, Way], task: Task) -> dict[str, list[Any]]:
    """name -> [first, again]: CPU time to trace the gradient, in that of float32's.

    Medians of rounds in turn; the first with no cache of JAX filled, as in a new
    process, the other when all has been traced before (without qwix: see `cache_note`).
    """

    def traced(way: Way) -> float:
        args = way.params, *task.args[1:]
        start = time.process_time()
        # A new function: JAX remembers the trace of this one.
        jax.make_jaxpr(jax.grad(lambda *xs: way.fn(*xs)))(*args)
        return time.process_time() - start

    def rounds(
        names: list[str], prepare: Callable[[], None]
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                prepare()
                times[name].append(traced(found[name]))
        medians = {name: float(np.median(ts)) for name, ts in times.items()}
        return {n: round(t / medians["float32"], 2) for n, t in medians.items()}

    first = rounds(list(found), jax.clear_caches)
    jax.clear_caches()
    others = [name for name in found if not name.startswith("qwix")]
    for name in others:
        traced(found[name])
    again = rounds(others, lambda: None)
    return {name: [first[name], again.get(name)] for name in found}


# Tables.


def table(name: str, loss: Fn, hand: Fn, args: Any) -> _table.Table:
    """One row per way; of `tasks`."""
    return task_table(name, Task("", loss, args, hand))


def task_table(name: str, task: Task) -> _table.Table:
    """One row per way."""
    try:
        exact = gradient64(task.loss, task.args)
    except (TypeError, ValueError):  # of a model that names float32
        exact = jax.jit(jax.grad(task.loss))(*task.args)
        exact = jax.tree.map(np.asarray, exact)
        name += " (error against float32)"
    _, float32 = kept_bytes(task.loss, task.args)
    found = every_way(task)
    rows = {n: row(n, way, task, exact, float32) for n, way in found.items()}
    timed = {
        n: way for n, way in found.items() if way.timed and rows[n][-1] != ""
    }
    i = HEADERS.index("trace")
    for n, ratios in trace_ratios(timed, task).items():
        rows[n][i : i + 2] = ratios
    return _table.make((name, *HEADERS[1:]), list(rows.values()))


def cache_note() -> str:
    """Say what qwix makes of a product that ran before, and what it leaves behind."""
    try:
        qwix = importlib.import_module("qwix")
    except ImportError:
        return ""

    class Product(nnx.Module):
        """One product, by jax.numpy."""

        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((8, 8)))

        def __call__(self, x: Any) -> Any:
            return x @ self.kernel[...]

    x = jnp.ones((4, 8))

    def bits(model: nnx.Module) -> int:
        graph, state = nnx.split(model)
        run = lambda state, x: nnx.merge(graph, state)(x)
        counts = _operations(_jaxpr.trace(run, state, x)[0].jaxpr)
        ((dtypes, _),) = counts.items()
        return 8 * max(jnp.dtype(d).itemsize for d in dtypes)

    def quantized() -> nnx.Module:
        return _quantized(
            qwix, Product(), x, bwd=False, tensor=False, operations=None
        )

    jax.clear_caches()
    fresh, after = bits(quantized()), bits(Product())
    jax.clear_caches()
    before, late = bits(Product()), bits(quantized())
    return _CACHE.format(
        version=_version("qwix"),
        fresh=fresh,
        after=after,
        before=before,
        late=late,
    )


_CACHE = """\
qwix {version}, one product by jax.numpy (`x @ kernel`) traced twice in one process, bits of its operands:
quantized {fresh}, then the model that is not quantized {after}; the other way round {before}, then quantized
{late}. JAX remembers the trace of `jnp.matmul` by shapes and dtypes alone: jax.clear_caches() is called here
before each."""


def targets(
    tables: dict[str, _table.Table], least: dict[str, float]
) -> list[str]:
    """What is aimed at, and whether it is met."""
    cells = {
        (name, r[0]): dict(zip(HEADERS, r, strict=True))
        for name, found in tables.items()
        for r in found.rows
        if r[-1] != ""
    }

    def judge(what: str, limit: float, values: dict[str, float]) -> str:
        if not values:
            return f"- {what}: no row"
        at = max(values, key=lambda name: values[name])
        verdict = "met" if values[at] <= limit else "MISSED"
        over = sum(v > limit for v in values.values())
        return (
            f"- {what}: {verdict} ({over} of {len(values)} above; "
            f"worst {values[at]:.2f}, {at})"
        )

    def ours(way: str, column: str) -> dict[str, float]:
        return {
            name: float(row[column])
            for (name, w), row in cells.items()
            if w == way
        }

    ratios = {}
    for scaling in ("tensor", "row"):
        theirs = ours(f"qwix {_version('qwix')} {scaling}", "error")
        mine = ours(f"amp.autocast f8 {scaling}, all products", "error")
        for name, error in theirs.items():
            ratios[f"{name}, {scaling}"] = mine[name] / error
    missing = {name: 1 - share for name, share in least.items()}
    f8 = {
        scaling: f"amp.autocast f8 {scaling}" for scaling in ("tensor", "row")
    }
    lines = [
        judge(
            "of the operations at most 5 % not in float8, in either pass, first and last left out",
            0.05,
            missing,
        ),
        judge(
            "error at most qwix's at equal formats, all products", 1.0, ratios
        ),
    ]
    for column in ("trace", "again"):
        what = f"{column} at most 1.5, bfloat16"
        lines.append(judge(what, 1.5, ours("amp.autocast", column)))
        for scaling, way in f8.items():
            what = f"{column} at most 2, f8 {scaling}"
            lines.append(judge(what, 2.0, ours(way, column)))
    for scaling, way in f8.items():
        what = f"read at most 0.35 of float32's, f8 {scaling}"
        lines.append(judge(what, 0.35, ours(way, "of float32's")))
    return lines


def main() -> None:
    """Trace, run and print; `--out FILE` writes the same as Markdown."""
    command, args = common.arguments("benchmarks.amp_peers")
    there, missing = public_models.installed((*PACKAGES, *ZOO))
    found = {n: Task("", t[0], t[2], t[1]) for n, t in tasks().items()}
    failed = []
    for name, make in public_models.tasks().items():
        try:
            found[name] = make()
        except ImportError as e:
            failed.append(f"{name}: {e}")
    tables = {}
    for name, task in found.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        tables[name] = task_table(name, task)
    kinds = {name: task for name, task in found.items() if task.kind}
    roles, least = role_table(kinds)
    heading = _HEADING.format(
        command=command,
        packages=", ".join(there),
        missing=", ".join([*missing, *failed]) or "nothing",
        cache=cache_note(),
        targets="\n".join(targets(tables, least)),
    )
    common.publish([roles, *tables.values()], heading, args.out)


_HEADING = """\
Gradients in few bits: `{command}`

{packages}. Not installed: {missing}.

forward, backward: share of the operations of matrix products and convolutions whose two operands have
16 bits at most, or 8 in the rows f8, i8 and qwix; what a checkpoint computes again is backward. error:
relative L2 distance of the gradient from float64. kept: what the forward pass leaves for the backward
one when it is called by itself, read: what of that the backward pass reads, which is what one compiled
program holds; arguments included. temp: temporaries of the compiled gradient on this device. trace, again:
CPU time to trace the gradient in that of the function's own, the first time and when all has been traced
before. lines: what a user changes. jmp casts the arguments; "the framework's own" is `dtype=` of Flax's
layers, or Haiku's policies. qwix: QtProvider, every product, float8_e4m3fn, scales per channel ("row") or
per tensor; "forward" is its default, the others set bwd_qtype to float8_e5m2 (float8_e4m3fn for
convolutions).

{cache}

{targets}"""


if __name__ == "__main__":
    main()
