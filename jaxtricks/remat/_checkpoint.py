"""Recompute all but the values that have a name."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import ad_checkpoint
from jax.extend import source_info_util
from jax.extend.core import primitives

from jaxtricks import _compat, _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._partition import Call, refuse_module
from jaxtricks.remat import _recompute
from jaxtricks.remat._recompute import recomputed

source_info_util.register_exclusion(
    __file__
)  # a named value is where the user named it


@checked
def checkpoint_name(x: Any, label: str) -> Any:
    """Name x for `checkpoint` and `saved_residuals`, as jax.ad_checkpoint does.

    Args:
      x: pytree of arrays.
      label: the name; any number of values may share it.

    Returns:
      x.

    Example:
      >>> import jax.numpy as jnp
      >>> print(checkpoint_name({"y": jnp.float32(2.0)}, "up")["y"])
      2.0
    """
    return ad_checkpoint.checkpoint_name(x, label)


@checked
def checkpoint(
    fn: Callable[..., Any],
    *,
    save: str | Iterable[str] = (),
    offload: str | Iterable[str] = (),
    **jax_checkpoint_arguments: Any,
) -> Callable[..., Any]:
    """Run fn again in the backward pass, except for the values of these names.

    Name what is dear and whose own derivative does not read it, as the results of
    products: tanh or exp behind a saved product is cheap to repeat, but a saved tanh
    does not spare the product before it, which its derivative needs again.

    Since jaxlib 0.11.2 this is jax.checkpoint with a policy of jax.checkpoint_policies.
    Before, XLA's CPU backend undoes jax.checkpoint in code that is not in a loop
    (`check_effective` tells); there the second pass waits for the cotangent as in
    `recompute_grad`. With `offload`, an argument of jax.checkpoint, or a name that
    occurs only inside a loop, a branch, a custom rule or another checkpoint, it is
    jax.checkpoint on every version.

    Args:
      fn: a function of pytrees, as for `recompute_grad`.
      save: names of values to keep; one that fn lacks is passed over if another is
        there, so that blocks of several kinds can share a list.
      offload: names of values to keep in the host's memory ("pinned_host").
      **jax_checkpoint_arguments: policy, prevent_cse, static_argnums and the like.

    Returns:
      A function with the signature of fn.

    Raises:
      ValueError: names together with a policy; for a flax.nnx module; when called, if
        fn has values of none of the names.

    Example:
      >>> import jax.numpy as jnp
      >>> block = lambda w, x: jnp.tanh(checkpoint_name(x @ w, "up")) @ w.T
      >>> f = checkpoint(block, save="up")
      >>> w, x = jnp.eye(2), jnp.zeros((1, 2))
      >>> print(jax.grad(lambda x: f(w, x).sum())(x))
      [[1. 1.]]

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174,
      algorithm 1 with the mirror count of a named value 0.
    """
    refuse_module(fn, "checkpoint")
    keep, away = _names(save), _names(offload)
    if (keep or away) and jax_checkpoint_arguments.get("policy") is not None:
        raise ValueError(
            "remat.checkpoint: `policy` and names exclude each other: give `policy`, or `save` and `offload`"
        )
    delegate = functools.partial(
        jax.checkpoint, **(jax_checkpoint_arguments | _policy(keep, away))
    )
    whole = delegate(fn) if away or jax_checkpoint_arguments else None

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = Call(whole or fn, args, kwargs, nnx="checkpoint")
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        _refuse_unknown((*keep, *away), closed.jaxpr)
        if whole:
            return call.assemble(
                _jaxpr.as_fun(closed.jaxpr)(closed.consts, *call.arrays)
            )
        program = _jaxpr.inlined(closed)
        jaxpr = _with_plain_names(program.jaxpr)
        inner = set(keep) & set(_labels(_jaxpr.walk(jaxpr))) - set(_labels(jaxpr.eqns))
        if inner or _recompute.barriers_hold():
            run = delegate(_jaxpr.as_fun(closed.jaxpr))
            return call.assemble(run(closed.consts, *call.arrays))
        saved = [i for i, eqn in enumerate(jaxpr.eqns) if label_of(eqn) in keep]
        return call.assemble(
            recomputed(jaxpr, saved=saved)(*program.consts, *call.arrays)
        )

    return wrapped


def label_of(eqn: Any) -> str | None:
    """The name that an equation gives, if it gives one."""
    return _compat.params(eqn)["name"] if _compat.primitive(eqn) == "name" else None


def _labels(eqns: Iterable[Any]) -> list[str]:
    return [label for label in map(label_of, eqns) if label is not None]


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _policy(keep: Sequence[str], away: Sequence[str]) -> dict[str, Any]:
    policies = jax.checkpoint_policies
    if away:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=keep,
            names_which_can_be_offloaded=away,
            offload_src="device",
            offload_dst="pinned_host",
        )
        return {"policy": policy}
    return {"policy": policies.save_only_these_names(*keep)} if keep else {}


def _refuse_unknown(names: Sequence[str], jaxpr: _jaxpr.Jaxpr) -> None:
    found = sorted(set(_labels(_jaxpr.walk(jaxpr))))
    if names and not set(names) & set(found):
        there = (
            f"those in it are {', '.join(map(repr, found))}" if found else "it has none"
        )
        raise ValueError(
            f"remat.checkpoint: no value in the function has a name of {list(names)}: {there}; "
            "give names with jaxtricks.remat.checkpoint_name"
        )


def _with_plain_names(jaxpr: _jaxpr.Jaxpr) -> _jaxpr.Jaxpr:
    """Names of jax_remat3 as those without it, which vmap knows."""
    eqns = [
        eqn.replace(primitive=primitives.name_p, params={"name": label_of(eqn)})
        if _compat.is_high(eqn) and label_of(eqn) is not None
        else eqn
        for eqn in jaxpr.eqns
    ]
    return _jaxpr.made(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, eqns)


# What the forward pass keeps for the backward pass.


@checked
def saved_residuals(fn: Callable[..., Any], *args: Any) -> _table.Table:
    """What the forward pass of fn(*args) keeps for the backward pass, largest first; nothing is run.

    It is what JAX asks for; a compiler may repeat cheap operations instead of keeping
    their results.

    Args:
      fn: a function of pytrees of arrays. *args: arrays or ShapeDtypeStructs; all of
      them that are floating are differentiated.

    Returns:
      Table of bytes, shape, made by (the primitive, the name that `checkpoint_name` gave,
      "argument", or "constant" for arrays that fn closes over) and where (source line,
      or path in args).

    Example:
      >>> import jax.numpy as jnp
      >>> print(saved_residuals(lambda x: jnp.sin(jnp.exp(x)).sum(), jnp.ones((4, 2))).rows[0][:3])
      ('32 B', 'f32[4,2]', 'exp')
    """

    def forward(*args: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(fn, *args)[1])

    closed, _ = _jaxpr.trace(forward, *args)
    jaxpr = _jaxpr.inlined(closed).jaxpr
    paths = [
        "args" + jax.tree_util.keystr(p)
        for p, _ in jax.tree_util.tree_leaves_with_path(args)
    ]
    origin: dict[Any, tuple[str, str]] = dict.fromkeys(
        jaxpr.constvars, ("constant", "")
    )
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
    found = [
        (_jaxpr.var_bytes(v), v) for v in dict.fromkeys(kept) if _jaxpr.var_bytes(v)
    ]
    found.sort(key=lambda pair: -pair[0])
    rows = [
        (_table.format_bytes(n), v.aval.str_short(short_dtypes=True), *origin[v])
        for n, v in found
    ]
    return _table.make(
        ("bytes", "shape", "made by", "where"), rows, [_total(found, origin)]
    )


def _total(found: Sequence[tuple[int, Any]], origin: dict[Any, tuple[str, str]]) -> str:
    there = sum(n for n, v in found if origin[v][0] in ("argument", "constant"))
    made = sum(n for n, _ in found) - there
    return (
        f"{_table.format_bytes(made)} kept, and {_table.format_bytes(there)} of arguments and constants, "
        "which are there in any case"
    )
