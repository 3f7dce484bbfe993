"""What the forward pass keeps for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtricks import _compat, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks.remat import _recompute, flat
from jaxtricks.remat._checkpoint import label_of


@checked
def residuals(fn: Callable[..., Any], *args: Any) -> _table.Table:
    """What the forward pass of fn(*args) keeps for the backward pass, largest first; nothing is run.

    It is what JAX asks for; a compiler may repeat cheap operations instead of keeping their results.

    Args:
      fn: a function of pytrees of arrays.
      *args: arrays or ShapeDtypeStructs; all of them that are floating are differentiated.

    Returns:
      Table of bytes, shape, made by (the primitive, the name that `name` gave, "argument", or "constant"
      for arrays that fn closes over) and where (source line, or path in args).

    Example:
      >>> import jax.numpy as jnp
      >>> print(residuals(lambda x: jnp.sin(jnp.exp(x)).sum(), jnp.ones((4, 2))).rows[0][:3])
      ('32 B', 'f32[4,2]', 'exp')
    """

    def forward(*args: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(fn, *args)[1])

    closed, _ = _jaxpr.trace(forward, *args)
    jaxpr = flat.inlined(closed).jaxpr
    paths = ["args" + jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(args)]
    origin: dict[Any, tuple[str, str]] = dict.fromkeys(jaxpr.constvars, ("constant", ""))
    origin |= {v: ("argument", p) for v, p in zip(jaxpr.invars, paths, strict=True)}
    same: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        place = (label_of(eqn) or _compat.primitive(eqn), _jaxpr.source_line(eqn))
        origin |= dict.fromkeys(eqn.outvars, place)
        # JAX rounds what a policy saves; a name is no value of its own.
        if label_of(eqn) or _compat.primitive(eqn) == "reduce_precision":
            (x,), (y,) = eqn.invars, eqn.outvars
            same[y] = same.get(x, x) if not _jaxpr.is_literal(x) else y
            if label_of(eqn) and same[y] not in jaxpr.invars:
                origin[same[y]] = place
    kept = [same.get(v, v) for v in jaxpr.outvars if not _jaxpr.is_literal(v)]
    found = [(_recompute.var_bytes(v), v) for v in dict.fromkeys(kept) if _recompute.var_bytes(v)]
    found.sort(key=lambda pair: -pair[0])
    rows = [
        (_table.format_bytes(n), v.aval.str_short(short_dtypes=True), *origin[v]) for n, v in found
    ]
    return _table.make(("bytes", "shape", "made by", "where"), rows, [_total(found, origin)])


def _total(found: Sequence[tuple[int, Any]], origin: dict[Any, tuple[str, str]]) -> str:
    there = sum(n for n, v in found if origin[v][0] in ("argument", "constant"))
    made = sum(n for n, _ in found) - there
    return (
        f"{_table.format_bytes(made)} kept, and {_table.format_bytes(there)} of arguments and constants, "
        "which are there in any case"
    )
