"""What can be kept of a stage, and what each choice costs: traced, not guessed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from jaxtricks import _compat, _jaxpr
from jaxtricks.remat import _memory, _recompute, _sequential, chain, cost, flat
from jaxtricks.remat.recompute import recomputed

KEEP = "keep"  # all that the derivative needs, as without recomputation
_PRODUCTS = ("dot_general", "conv_general_dilated")
_MOST_SAVED = 6  # how many sets of saved products are tried
_MOST_TRIED = 12  # and how many products alone


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a stage runs.

    Attributes:
      saved: equations whose results are kept, of the stage or of its scan's body; None keeps all that
        the derivative needs, () recomputes from the inputs.
      outer: for a stage with a scan: iterations of the outer of two loops; 0 leaves the scan alone.
    """

    saved: tuple[int, ...] | None = None
    outer: int = 0

    def __str__(self) -> str:
        kept = (
            KEEP if self.saved is None else f"save {len(self.saved)}" if self.saved else "recompute"
        )
        return f"scan in {self.outer}, {kept}" if self.outer else kept


@dataclasses.dataclass(frozen=True)
class Option:
    """A choice and its price.

    Attributes:
      choice: the choice.
      kept: bytes that stay until the backward pass, inputs and outputs of the stage apart.
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


def price(stage: chain.Stage, varied: Sequence[bool], flops_per_byte: float) -> Priced:
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
    found = [dataclasses.replace(o, extra=max(0.0, o.extra - base.extra)) for o in found]
    return Priced(
        tuple(_undominated(found)),
        math.inf if stage.fixed else cost.work(stage.jaxpr, flops_per_byte),
        cost.peak_live(stage.jaxpr),
    )


def _saving(
    pricer: Callable[[Choice], Option], products: Sequence[int], outer: int
) -> list[Option]:
    """Recompute from the inputs, and keep growing sets of products, the most profitable first.

    What one product is worth is measured: the last of a block is often not read by any derivative.
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
    return [1, *sorted(divisors, key=lambda d: abs(math.log(d / math.sqrt(length))))[:3]]


def _products(jaxpr: _jaxpr.Jaxpr) -> list[int]:
    """The equations with most arithmetic a byte of result."""
    found = [i for i, eqn in enumerate(jaxpr.eqns) if _compat.primitive(eqn) in _PRODUCTS]
    return sorted(found, key=lambda i: -_gain(jaxpr.eqns[i]))[:_MOST_TRIED]


def _body_products(jaxpr: _jaxpr.Jaxpr) -> list[int]:
    return _products(_body(largest_scan(jaxpr)).jaxpr)


def _body(loop: Any) -> _jaxpr.ClosedJaxpr:
    """The body of a scan, its calls written out."""
    return flat.inlined(_compat.bodies(loop)[0])


def largest_scan(jaxpr: _jaxpr.Jaxpr) -> Any:
    """The scan with most arithmetic in a jaxpr; None if there is none to split."""
    scans = [e for e in jaxpr.eqns if _compat.primitive(e) == "scan"]
    scans = [e for e in scans if _compat.scan_parts(e).length > 1]
    return max(scans, key=_memory.eqn_flops, default=None)


def _gain(eqn: Any) -> float:
    return _memory.eqn_flops(eqn) / max(1, sum(map(_recompute.var_bytes, eqn.outvars)))


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
        raise ValueError("this plan keeps the result of an operation that is not there: plan again")


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
    before = flat.piece(jaxpr.eqns[:at], [v for e in jaxpr.eqns[:at] for v in e.outvars])
    after = flat.piece(jaxpr.eqns[at + 1 :], [v for e in jaxpr.eqns[at + 1 :] for v in e.outvars])

    def go(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(inputs, xs, strict=True))
        parts = (before, _plain(before)), (loop, _split(loop, choice)), (after, _plain(after))
        for part, fn in parts:
            env.update(zip(part.outvars, fn(*flat.read(part.invars, env)), strict=True))
        return flat.read(jaxpr.outvars, env)

    return go


def _split(loop: Any, choice: Choice) -> Callable[..., list[Any]]:
    """The scan as two nested ones; the outer body and the inner one are recomputed."""
    consts, carries, length, reverse = _compat.scan_parts(loop)
    body = _body(loop)
    step = _plain(body.jaxpr)
    if choice.saved is not None:
        step = recomputed(body.jaxpr, saved=choice.saved, ordered=False)

    def go(*xs: Any) -> list[Any]:
        fixed, init, rows = xs[:consts], xs[consts : consts + carries], xs[consts + carries :]

        def one(carry: Any, row: Any) -> tuple[Any, Any]:
            out = step(*body.consts, *fixed, *carry, *row)
            return out[:carries], out[carries:]

        outer = [choice.outer] if choice.outer > 1 else []
        carry, out = _sequential.nested(one, list(init), list(rows), length, outer, reverse=reverse)
        return [*carry, *out]

    return go


def _price(
    stage: chain.Stage, choice: Choice, *, varied: Sequence[bool], flops_per_byte: float
) -> Option:
    """Price of a choice; `extra` is still the operations of both passes."""
    jaxpr = stage.jaxpr
    shapes = [_shape(v) for v in (*jaxpr.constvars, *jaxpr.invars)]
    wrt = [i for i, v in enumerate(shapes) if varied[i] and jnp.issubdtype(v.dtype, jnp.inexact)]
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

    there = flat.live(jax.make_jaxpr(forward)(*shapes))
    outs, residuals = there.outvars[: len(jaxpr.outvars)], there.outvars[len(jaxpr.outvars) :]
    variables, known = ([v for v in vs if isinstance(v, Var)] for vs in (residuals, outs))
    kept = cost.kept_bytes(there, variables, known)
    pullback = jax.make_jaxpr(lambda rs, cts: jax.tree.unflatten(structure, rs)(cts))
    back = flat.live(pullback([*map(_shape, residuals)], [*map(_shape, outs)]))
    total = cost.work(there, flops_per_byte) + cost.work(back, flops_per_byte)
    return Option(choice, kept, total, cost.peak_live(back))


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
    return a.kept <= b.kept and a.extra <= b.extra and a.kept + a.backward <= b.kept + b.backward
