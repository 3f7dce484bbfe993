"""What a jaxpr costs before any compiler saw it: time in floating-point operations, and live bytes.

A compiler fuses elementwise operations into what reads them. The counts here do so in
the simplest way: a cheap result with one reader that can take it in is never written,
and its operands live until then.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from jaxtricks import _compat, _jaxpr
from jaxtricks.remat import _sequential
from jaxtricks.remat._recompute import recomputed

# Operations that a machine does in the time of one byte of memory traffic; fusion
# spares accelerators most of the traffic that an unfused count sees.
FLOPS_PER_BYTE = {"cpu": 1.0, "gpu": 10.0, "tpu": 30.0}

_CHEAP = frozenset(
    " ".join(
        (
            "add sub mul neg abs sign max min square one_minus_square integer_pow add_any and or not xor",
            "select_n clamp",
            "eq ne lt le gt ge convert_element_type broadcast_in_dim reshape squeeze expand_dims iota name",
            "stop_gradient copy is_finite population_count shift_right_logical bitcast_convert_type",
            "reduce_precision pvary",
        )
    ).split()
)
_REDUCTIONS = ("reduce_sum", "reduce_max")
_FUSES = _CHEAP | {
    *_REDUCTIONS,
    "div",
    "sqrt",
    "rsqrt",
    "exp",
    "log",
    "log2",
    "tanh",
    "logistic",
    "erf",
    "pow",
}
_VIEWS = frozenset(
    ("reshape", "squeeze", "expand_dims", "name", "stop_gradient", "copy")
)
_FREE = _VIEWS | {"broadcast_in_dim"}
_FUSED_AGAIN = (
    2  # operations that a compiler repeats backward rather than keep their result
)


def work(jaxpr: _jaxpr.Jaxpr, flops_per_byte: float) -> float:
    """Time of running the jaxpr once, in floating-point operations."""
    return _jaxpr.flops(jaxpr) + flops_per_byte * _bytes_written(jaxpr)


def _bytes_written(jaxpr: _jaxpr.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = list(_jaxpr.sub_jaxprs(eqn))
        name = _compat.primitive(eqn)
        if name == "scan":
            total += _compat.scan_parts(eqn).length * _bytes_written(inner[0])
        elif inner and not name.startswith(("reduce", "scatter", "sort")):
            total += max(map(_bytes_written, inner))
        else:
            total += sum(map(_jaxpr.var_bytes, eqn.outvars))
    return total


def live_bytes(jaxpr: _jaxpr.Jaxpr) -> np.ndarray:
    """Bytes of intermediates alive while each equation runs, inputs apart: float64 [equations]."""
    n = len(jaxpr.eqns)
    readers = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var))
    last: dict[Any, int] = {v: n for v in jaxpr.outvars if isinstance(v, Var)}
    reader: dict[Any, str] = {}
    change, inside = np.zeros(n + 1), np.zeros(n)
    for i in reversed(range(n)):
        eqn = jaxpr.eqns[i]
        name = _compat.primitive(eqn)
        out: Any = eqn.outvars[0] if eqn.outvars else None
        fused = name in _VIEWS and out in last
        if name in _CHEAP and readers[out] == 1 and last[out] < n:
            fused |= reader[out] in _FUSES
        until = last[out] if fused else i
        for v in eqn.invars:
            if isinstance(v, Var):
                last[v] = max(last.get(v, -1), until)
                reader[v] = name
        inside[i] = max(map(peak_live, _jaxpr.sub_jaxprs(eqn)), default=0)
        for v in () if fused else eqn.outvars:
            change[i] += _jaxpr.var_bytes(v)
            change[min(last.get(v, i) + 1, n)] -= _jaxpr.var_bytes(v)
    return np.cumsum(change)[:-1] + inside


def peak_live(jaxpr: Any) -> float:
    """The largest of `live_bytes`."""
    return float(live_bytes(jaxpr).max(initial=0))


def kept_bytes(
    jaxpr: _jaxpr.Jaxpr, residuals: Iterable[Any], known: Iterable[Any]
) -> float:
    """Bytes of residuals that are written out: what few cheap operations make of others is made again.

    Args:
      jaxpr: the program that makes them.
      residuals: some of its variables.
      known: variables that are kept in any case.
    """
    wanted, total = set(residuals), 0.0
    # {variable: how many operations away from something kept}
    away: dict[Any, int] = dict.fromkeys([*known, *jaxpr.invars, *jaxpr.constvars], 0)
    for eqn in jaxpr.eqns:
        operands = [v for v in eqn.invars if isinstance(v, Var)]
        name = _compat.primitive(eqn)
        if name in _CHEAP and all(v in away for v in operands):
            steps = max((away[v] for v in operands), default=0) + (name not in _FREE)
            away |= dict.fromkeys(eqn.outvars, steps) if steps <= _FUSED_AGAIN else {}
        for v in wanted.intersection(eqn.outvars) - away.keys():
            total += _jaxpr.var_bytes(v)
            away[v] = 0
    return total


# A program as a chain of stages, cut where little is alive.


MAX_STAGES = 96
_GROUP = (
    1 / 160
)  # cuts with less than this fraction of the work between them are one cut
_WINDOW = 6  # equations to either side that a cut is compared with
_NEAR, _CHEAPER = (
    0.15,
    1.2,
)  # a cut inside a block has cheaper ones near it on both sides

COLLECTIVES = frozenset(
    " ".join(
        (
            "psum pmax pmin ppermute pbroadcast all_to_all ragged_all_to_all psend precv",
            "all_gather all_gather_invariant all_gather_reduced unreduced_psum unreduced_reduce_scatter",
            "reduce_scatter reduce_scatter_start reduce_scatter_done",
        )
    ).split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """Consecutive equations.

    Attributes:
      jaxpr: the equations as a function of what they read.
      carry: bytes alive at its end, long-lived values apart.
      fixed: it holds a collective operation, which is never run twice.
    """

    jaxpr: _jaxpr.Jaxpr
    carry: int
    fixed: bool


def stages(program: _jaxpr.Jaxpr, ends: Sequence[int]) -> list[Stage]:
    """The stages that end before these equations (the last is the number of equations)."""
    _, last = _lifetimes(program)
    alive, consts, found = _alive(program), set(program.constvars), []
    for a, b in zip([0, *ends], ends, strict=False):
        eqns = program.eqns[a:b]
        outs = [v for eqn in eqns for v in eqn.outvars if last.get(v, -1) >= b]
        ins = [v for v in _jaxpr.read_by(eqns) if v not in consts]
        jaxpr = _jaxpr.made(
            [v for v in _jaxpr.read_by(eqns) if v in consts], ins, outs, eqns
        )
        fixed = any(_compat.primitive(e) in COLLECTIVES for e in _jaxpr.walk(jaxpr))
        found.append(Stage(jaxpr, int(alive[b - 1]), fixed))
    return found


def carries(program: _jaxpr.Jaxpr, ends: Sequence[int]) -> np.ndarray:
    """Bytes that a run of stages adds to what is alive: float64 [stages, stages].

    Entry [s, k] counts what stages s..k make and later stages read, long-lived values
    apart; what only passes through is held already.
    """
    born, last = _lifetimes(program)
    stage_of = np.searchsorted(ends, np.arange(len(program.eqns)), "right")
    made = np.zeros((len(ends), len(ends)))
    for v in born.keys() - _long_lived(program, born, last):
        first = stage_of[born[v]]
        final = int(np.searchsorted(ends, last.get(v, -1), "right"))
        made[first, first:final] += _jaxpr.var_bytes(v)
    return np.cumsum(made[::-1], 0)[::-1]


def cut(program: _jaxpr.Jaxpr, max_stages: int = MAX_STAGES) -> list[int]:
    """Where the stages end: at prominent minima of the live bytes, and around collectives.

    Args:
      program: an inlined jaxpr.
      max_stages: where there are more minima, those nearest to stages of equal cost.

    Returns:
      Increasing indices of equations; the last is their number.
    """
    n = len(program.eqns)
    alive, work = _alive(program), np.cumsum([_work(eqn) for eqn in program.eqns])
    minima = [i for i in range(n - 1) if 0 < alive[i] <= 1.05 * _around(alive, i)]
    cuts = _grouped(minima, alive, work, _GROUP * work[-1])
    cuts = [c for c in cuts if not _inside_a_block(c, cuts, alive, work)]
    if len(cuts) >= max_stages:
        even = work[-1] * np.arange(1, max_stages) / max_stages
        cuts = [cuts[int(np.argmin(np.abs(work[cuts] - w)))] for w in even]
    apart = {
        j
        for i, eqn in enumerate(program.eqns)
        if _compat.primitive(eqn) in COLLECTIVES
        for j in (i - 1, i)
    }
    return [*sorted({c + 1 for c in {*cuts, *apart} if 0 <= c < n - 1}), n]


def _work(eqn: Any) -> float:
    return _jaxpr.eqn_flops(eqn) + 4.0 * sum(map(_jaxpr.var_bytes, eqn.outvars))


def _lifetimes(program: _jaxpr.Jaxpr) -> tuple[dict[Any, int], dict[Any, int]]:
    """({variable: equation that makes it}, {variable: last equation that reads it})."""
    born = {v: i for i, eqn in enumerate(program.eqns) for v in eqn.outvars}
    last = {
        v: i
        for i, eqn in enumerate(program.eqns)
        for v in eqn.invars
        if isinstance(v, Var)
    }
    last |= {v: len(program.eqns) for v in program.outvars if isinstance(v, Var)}
    return born, last


def _long_lived(program: _jaxpr.Jaxpr, born: Any, last: Any) -> set[Any]:
    """Masks and tables: made early, read by most of the program; they block no cut."""
    n = len(program.eqns)
    return {
        v for v, i in born.items() if n // 2 < last.get(v, -1) - i and last.get(v) != n
    }


def _alive(program: _jaxpr.Jaxpr) -> np.ndarray:
    """Bytes alive after each equation: float64 [equations]."""
    born, last = _lifetimes(program)
    long_lived = _long_lived(program, born, last)
    alive = np.zeros(len(program.eqns))
    for v, i in born.items():
        if v not in long_lived and v in last:
            alive[i : last[v]] += _jaxpr.var_bytes(v)
    return alive


def _around(alive: np.ndarray, i: int) -> float:
    return float(alive[max(0, i - _WINDOW) : i + _WINDOW + 1].min())


def _grouped(minima: Sequence[int], alive: Any, work: Any, gap: float) -> list[int]:
    """The best of each run of neighbouring minima: fewest bytes, then latest."""
    groups: list[list[int]] = []
    for i in minima:
        if groups and work[i] - work[groups[-1][-1]] < gap:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [min(g, key=lambda i: (alive[i], -i)) for g in groups]


def _inside_a_block(c: int, cuts: Sequence[int], alive: Any, work: Any) -> bool:
    near = [d for d in cuts if abs(work[d] - work[c]) < _NEAR * work[-1]]
    cheaper = [d for d in near if alive[d] * _CHEAPER < alive[c]]
    return any(d < c for d in cheaper) and any(d > c for d in cheaper)


# What can be kept of a stage, and what each choice costs: traced, not guessed.


KEEP = "keep"  # all that the derivative needs, as without recomputation
_PRODUCTS = ("dot_general", "conv_general_dilated")
_MOST_SAVED = 6  # how many sets of saved products are tried
_MOST_TRIED = 12  # and how many products alone


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a stage runs.

    Attributes:
      saved: equations whose results are kept, of the stage or of its scan's body; None
        keeps all that the derivative needs, () recomputes from the inputs.
      outer: for a stage with a scan: iterations of the outer of two loops; 0 leaves the
        scan alone.
    """

    saved: tuple[int, ...] | None = None
    outer: int = 0

    def __str__(self) -> str:
        kept = (
            KEEP
            if self.saved is None
            else f"save {len(self.saved)}"
            if self.saved
            else "recompute"
        )
        return f"scan in {self.outer}, {kept}" if self.outer else kept


@dataclasses.dataclass(frozen=True)
class Option:
    """A choice and its price.

    Attributes:
      choice: the choice.
      kept: bytes that stay until the backward pass, inputs and outputs of the stage
        apart.
      extra: operations beyond those of keeping everything.
      backward: bytes alive at most during its backward pass, what is kept apart.
    """

    choice: Choice
    kept: float
    extra: float
    backward: float


@dataclasses.dataclass(frozen=True)
class Priced:
    """The options of a stage that no other option beats, and the price of its forward pass."""

    options: tuple[Option, ...]
    forward: float
    forward_bytes: float


def price(stage: Stage, varied: Sequence[bool], flops_per_byte: float) -> Priced:
    """Options of a stage, each priced from the trace of its own derivative.

    Args:
      stage: the stage.
      varied: which of its inputs depend on what is differentiated.
      flops_per_byte: see `cost.FLOPS_PER_BYTE`.
    """
    pricer = functools.cache(
        functools.partial(_price, stage, varied=varied, flops_per_byte=flops_per_byte)
    )
    base = pricer(Choice())
    found = [base]
    if not stage.fixed:
        found += _saving(pricer, _products(stage.jaxpr), 0)
        for outer in _splits(largest_scan(stage.jaxpr)):
            found += [pricer(Choice(None, outer))] if outer > 1 else []
            found += _saving(pricer, _body_products(stage.jaxpr), outer)
    found = [
        dataclasses.replace(o, extra=max(0.0, o.extra - base.extra)) for o in found
    ]
    return Priced(
        tuple(_undominated(found)),
        math.inf if stage.fixed else work(stage.jaxpr, flops_per_byte),
        peak_live(stage.jaxpr),
    )


def _saving(
    pricer: Callable[[Choice], Option], products: Sequence[int], outer: int
) -> list[Option]:
    """Recompute from the inputs, and keep growing sets of products, the most profitable first.

    What one product is worth is measured: the last of a block is often not read by any
      derivative.
    """
    bare = pricer(Choice((), outer))
    worth = {}
    for i in products:
        alone = pricer(Choice((i,), outer))
        if alone.extra < bare.extra and alone.kept > bare.kept:
            worth[i] = (bare.extra - alone.extra) / (alone.kept - bare.kept)
    order = sorted(worth, key=lambda i: -worth[i])
    sizes = range(1, len(order) + 1, max(1, len(order) // _MOST_SAVED))
    return [bare, *(pricer(Choice(tuple(sorted(order[:n])), outer)) for n in sizes)]


def _splits(loop: Any) -> list[int]:
    """Iterations of the outer of two loops; 1 leaves one loop with a recomputed body."""
    if loop is None:
        return []
    length = _compat.scan_parts(loop).length
    divisors = [d for d in range(2, length) if length % d == 0]
    return [
        1,
        *sorted(divisors, key=lambda d: abs(math.log(d / math.sqrt(length))))[:3],
    ]


def _products(jaxpr: _jaxpr.Jaxpr) -> list[int]:
    """The equations with most arithmetic a byte of result."""
    found = [
        i for i, eqn in enumerate(jaxpr.eqns) if _compat.primitive(eqn) in _PRODUCTS
    ]
    return sorted(found, key=lambda i: -_gain(jaxpr.eqns[i]))[:_MOST_TRIED]


def _body_products(jaxpr: _jaxpr.Jaxpr) -> list[int]:
    return _products(_body(largest_scan(jaxpr)).jaxpr)


def _body(loop: Any) -> _jaxpr.ClosedJaxpr:
    """The body of a scan, its calls written out."""
    return _jaxpr.inlined(_compat.bodies(loop)[0])


def largest_scan(jaxpr: _jaxpr.Jaxpr) -> Any:
    """The scan with most arithmetic in a jaxpr; None if there is none to split."""
    scans = [e for e in jaxpr.eqns if _compat.primitive(e) == "scan"]
    scans = [e for e in scans if _compat.scan_parts(e).length > 1]
    return max(scans, key=_jaxpr.eqn_flops, default=None)


def _gain(eqn: Any) -> float:
    return _jaxpr.eqn_flops(eqn) / max(1, sum(map(_jaxpr.var_bytes, eqn.outvars)))


def check(jaxpr: _jaxpr.Jaxpr, choice: Choice) -> None:
    """Raise ValueError for a choice that this stage can't run as; it may come from a text."""
    body = jaxpr
    if choice.outer:
        loop = largest_scan(jaxpr)
        if loop is None or _compat.scan_parts(loop).length % choice.outer:
            raise ValueError(
                f"this plan splits a loop in {choice.outer} that has other steps: plan again"
            )
        body = _body(loop).jaxpr
    if any(i >= len(body.eqns) for i in choice.saved or ()):
        raise ValueError(
            "this plan keeps the result of an operation that is not there: plan again"
        )


def run(jaxpr: _jaxpr.Jaxpr, choice: Choice) -> Callable[..., list[Any]]:
    """The jaxpr, run as chosen: a function of (*constvars, *invars)."""
    if choice.outer:
        return _with_scan(jaxpr, choice)
    if choice.saved is None:
        return _plain(jaxpr)
    return recomputed(jaxpr, saved=choice.saved)


def _plain(jaxpr: _jaxpr.Jaxpr) -> Callable[..., list[Any]]:
    n = len(jaxpr.constvars)
    return lambda *xs: _jaxpr.as_fun(jaxpr)(xs[:n], *xs[n:])


def _with_scan(jaxpr: _jaxpr.Jaxpr, choice: Choice) -> Callable[..., list[Any]]:
    """Everything kept but inside the largest scan."""
    loop = largest_scan(jaxpr)
    at = next(i for i, eqn in enumerate(jaxpr.eqns) if eqn is loop)
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    before = _jaxpr.piece(
        jaxpr.eqns[:at], [v for e in jaxpr.eqns[:at] for v in e.outvars]
    )
    after = _jaxpr.piece(
        jaxpr.eqns[at + 1 :], [v for e in jaxpr.eqns[at + 1 :] for v in e.outvars]
    )

    def go(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(inputs, xs, strict=True))
        parts = (
            (before, _plain(before)),
            (loop, _split(loop, choice)),
            (after, _plain(after)),
        )
        for part, fn in parts:
            env.update(
                zip(part.outvars, fn(*_jaxpr.read(part.invars, env)), strict=True)
            )
        return _jaxpr.read(jaxpr.outvars, env)

    return go


def _split(loop: Any, choice: Choice) -> Callable[..., list[Any]]:
    """The scan as two nested ones; the outer body and the inner one are recomputed."""
    consts, carries, length, reverse = _compat.scan_parts(loop)
    body = _body(loop)
    step = _plain(body.jaxpr)
    if choice.saved is not None:
        step = recomputed(body.jaxpr, saved=choice.saved, ordered=False)

    def go(*xs: Any) -> list[Any]:
        fixed, init, rows = (
            xs[:consts],
            xs[consts : consts + carries],
            xs[consts + carries :],
        )

        def one(carry: Any, row: Any) -> tuple[Any, Any]:
            out = step(*body.consts, *fixed, *carry, *row)
            return out[:carries], out[carries:]

        outer = [choice.outer] if choice.outer > 1 else []
        carry, out = _sequential.nested(
            one, list(init), list(rows), length, outer, reverse=reverse
        )
        return [*carry, *out]

    return go


def _price(
    stage: Stage, choice: Choice, *, varied: Sequence[bool], flops_per_byte: float
) -> Option:
    """Price of a choice; `extra` is still the operations of both passes."""
    jaxpr = stage.jaxpr
    shapes = [_shape(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    wrt = [
        i
        for i, v in enumerate(shapes)
        if varied[i] and jnp.issubdtype(v.dtype, jnp.inexact)
    ]
    fn = run(jaxpr, choice)
    structure: Any = None

    def forward(*xs: Any) -> tuple[Any, Any]:
        nonlocal structure

        def of_varied(*ys: Any) -> Any:
            full = list(xs)
            for i, y in zip(wrt, ys, strict=True):
                full[i] = y
            return fn(*full)

        outs, pullback = jax.vjp(of_varied, *[xs[i] for i in wrt])
        residuals, structure = jax.tree.flatten(pullback)
        return outs, residuals

    there = _jaxpr.live(jax.make_jaxpr(forward)(*shapes))
    outs, residuals = (
        there.outvars[: len(jaxpr.outvars)],
        there.outvars[len(jaxpr.outvars) :],
    )
    variables, known = (
        [v for v in vs if isinstance(v, Var)] for vs in (residuals, outs)
    )
    kept = kept_bytes(there, variables, known)
    pullback = jax.make_jaxpr(lambda rs, cts: jax.tree.unflatten(structure, rs)(cts))
    back = _jaxpr.live(pullback([*map(_shape, residuals)], [*map(_shape, outs)]))
    total = work(there, flops_per_byte) + work(back, flops_per_byte)
    return Option(choice, kept, total, peak_live(back))


def _shape(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _undominated(options: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.kept, o.extra, o.backward)):
        if not any(_beats(p, o) for p in kept):
            kept = [*(p for p in kept if not _beats(o, p)), o]
    return kept


def _beats(a: Option, b: Option) -> bool:
    # The transient counts: splits of a scan differ in nothing else.
    return (
        a.kept <= b.kept
        and a.extra <= b.extra
        and a.kept + a.backward <= b.kept + b.backward
    )
