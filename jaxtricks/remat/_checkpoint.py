"""Recompute everything but the values that have a name, and list what is saved."""

import functools
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax import ad_checkpoint
from jax.extend import source_info_util

from jaxtricks import _jaxpr, _table
from jaxtricks._arguments import checked
from jaxtricks._jaxpr import label_of
from jaxtricks._partition import Call, refuse_module
from jaxtricks.remat import _recompute
from jaxtricks.remat._recompute import recomputed

P = ParamSpec("P")
R = TypeVar("R")

# A named value is where the user named it, not here.
source_info_util.register_exclusion(__file__)


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
    fn: Callable[P, R],
    *,
    save: str | Iterable[str] = (),
    offload: str | Iterable[str] = (),
    **jax_checkpoint_arguments: Any,
) -> Callable[P, R]:
    """Run fn again in the backward pass, except for the values of these names.

    Name what is expensive and whose own derivative does not read it, such as the
    results of products: tanh or exp behind a saved product is cheap to repeat, but a
    saved tanh does not spare the product before it, which its derivative needs again.

    Since jaxlib 0.11.2 this is jax.checkpoint with a policy of jax.checkpoint_policies.
    Before, XLA's CPU backend undoes jax.checkpoint in code that is not in a loop
    (`check_effective` tells); there the second pass waits for the cotangent as in
    `recompute_grad`. With `offload`, an argument of jax.checkpoint, or a name that
    occurs only inside a loop, a branch, a custom rule or another checkpoint, it is
    jax.checkpoint on every version.

    Args:
      fn: a function of pytrees, as for `recompute_grad`.
      save: names of values to save; one that fn lacks is passed over if another is
        there, so that blocks of several kinds can share a list.
      offload: names of values to save in the host's memory ("pinned_host"), as a rule
        in the body of a loop: in straight code libtpu 0.0.50 needs more of the device's
        memory with them.
      **jax_checkpoint_arguments: policy, prevent_cse, static_argnums and the like.

    Returns:
      A function with the signature of fn.

    Raises:
      ValueError: names together with a policy; a flax.nnx module; when called, if fn
        has values of none of the names, or of none of those to offload.

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
    saved_names = _as_names(save)
    offloaded_names = _as_names(offload)
    names = (*saved_names, *offloaded_names)
    if names and jax_checkpoint_arguments.get("policy") is not None:
        raise ValueError(
            "remat.checkpoint: `policy` and names exclude each other: give "
            "`policy`, or `save` and `offload`"
        )
    settings = jax_checkpoint_arguments | _policy(saved_names, offloaded_names)
    jax_checkpoint = functools.partial(jax.checkpoint, **settings)
    # jax.checkpoint around fn itself: its arguments are about those of fn.
    whole = None
    if offloaded_names or jax_checkpoint_arguments:
        whole = jax_checkpoint(fn)

    @functools.wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        call = Call(
            whole or fn,
            args,
            kwargs,
            nnx="checkpoint",
        )
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        _refuse_unknown(names, closed.jaxpr)
        # Without its name nothing is offloaded, and nothing else would say so.
        _refuse_unknown(offloaded_names, closed.jaxpr)
        run = _jaxpr.as_fun(closed.jaxpr)
        if whole:
            outs = run(closed.consts, *call.arrays)
            return call.assemble(outs)
        program = _jaxpr.inline(closed)
        # A name of jax_remat3 does not survive vmap once its equation is bound again.
        jaxpr = _jaxpr.with_plain_names(program.jaxpr)
        only_inside = _labels(_jaxpr.walk(jaxpr)) - _labels(jaxpr.eqns)
        if only_inside & set(saved_names) or _recompute.barriers_hold():
            outs = jax_checkpoint(run)(closed.consts, *call.arrays)
            return call.assemble(outs)
        labels = map(label_of, jaxpr.eqns)
        saved = [i for i, label in enumerate(labels) if label in saved_names]
        rerun = recomputed(jaxpr, saved=saved)
        outs = rerun(*program.consts, *call.arrays)
        return call.assemble(outs)

    return wrapped


def _labels(eqns: Iterable[Any]) -> set[str]:
    return {label for label in map(label_of, eqns) if label is not None}


def _as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _policy(
    saved: Sequence[str],
    offloaded: Sequence[str],
) -> dict[str, Any]:
    policies = jax.checkpoint_policies
    if offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
        return {"policy": policy}
    return {"policy": policies.save_only_these_names(*saved)} if saved else {}


def with_labels(
    jaxpr: _jaxpr.Jaxpr,
    saved: Collection[int],
    offload: Collection[int],
) -> Callable[..., list[Any]]:
    """Return the body of a loop, (*constvars, *invars) -> outputs, for `repeat_in_loop`.

    Args:
      jaxpr: what to run.
      saved: indices of equations whose results are not computed again.
      offload: those of them whose results wait in the memory of the host.
    """
    variables = (*jaxpr.constvars, *jaxpr.invars)

    def run(*xs: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(variables, xs, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            operands = _jaxpr.read_values(eqn.invars, env)
            results = _jaxpr.bind(eqn, operands)
            if i in saved:
                label = _OFFLOADED if i in offload else _SAVED
                results = [checkpoint_name(y, label) for y in results]
            env.update(zip(eqn.outvars, results, strict=True))
        return _jaxpr.read_values(jaxpr.outvars, env)

    return run


def repeat_in_loop(
    fn: Callable[..., Any],
    *,
    offload: bool,
) -> Callable[..., Any]:
    """Return what a loop repeats, run again but for what `with_labels` saves.

    The loops of the two passes are different computations: no order is needed.
    """
    policy = _policy((_SAVED,), (_OFFLOADED,) if offload else ())
    return jax.checkpoint(fn, prevent_cse=False, **policy)


_SAVED, _OFFLOADED = "jaxtricks_saved", "jaxtricks_offloaded"


def _refuse_unknown(
    names: Sequence[str],
    jaxpr: _jaxpr.Jaxpr,
) -> None:
    labels = sorted(_labels(_jaxpr.walk(jaxpr)))
    if not names or set(names) & set(labels):
        return
    present = "it has none"
    if labels:
        present = f"those in it are {', '.join(map(repr, labels))}"
    raise ValueError(
        "remat.checkpoint: no value in the function has a name of "
        f"{list(names)}: {present}; give names with "
        "jaxtricks.remat.checkpoint_name"
    )


# What the forward pass saves for the backward pass.


class _Origin(NamedTuple):
    """Where a residual comes from: a primitive or a name, and a line or a path."""

    kind: str
    place: str


@checked
def saved_residuals(
    fn: Callable[..., Any],
    *args: Any,
) -> _table.Table:
    """List what the forward pass of fn(*args) saves for the backward pass.

    It is what JAX asks for; a compiler may repeat cheap operations instead of saving
    their results. Nothing is run.

    Args:
      fn: a function of pytrees of arrays.
      *args: arrays or ShapeDtypeStructs; all of them that are floating are
        differentiated.

    Returns:
      Table, largest first, of bytes, shape, made by (the primitive, the name that
      `checkpoint_name` attached, "argument", or "constant" for arrays that fn closes
      over) and where (source line, or path in args).

    Example:
      >>> import jax.numpy as jnp
      >>> print(saved_residuals(lambda x: jnp.sin(jnp.exp(x)).sum(), jnp.ones((4, 2))).rows[0][:3])
      ('32 B', 'f32[4,2]', 'exp')
    """

    def forward(*args: Any) -> list[Any]:
        _, pullback = jax.vjp(fn, *args)
        return jax.tree.leaves(pullback)

    closed, _ = _jaxpr.trace(forward, *args)
    jaxpr = _jaxpr.inline(closed).jaxpr
    origins, sources = _trace_origins(jaxpr, args)
    residuals = [
        sources.get(v, v) for v in jaxpr.outvars if not _jaxpr.is_literal(v)
    ]
    sizes = {v: _jaxpr.var_bytes(v) for v in residuals}
    # Without a size they are keys' wrappers and the like.
    largest_first = sorted(filter(sizes.get, sizes), key=lambda v: -sizes[v])
    rows = [
        (
            _table.format_bytes(sizes[v]),
            v.aval.str_short(short_dtypes=True),
            *origins[v],
        )
        for v in largest_first
    ]
    note = _total([(sizes[v], origins[v]) for v in largest_first])
    return _table.make(("bytes", "shape", "made by", "where"), rows, [note])


def _trace_origins(
    jaxpr: _jaxpr.Jaxpr,
    args: Any,
) -> tuple[Mapping[Any, _Origin], Mapping[Any, Any]]:
    """Return {variable: origin} and {variable: the variable that it is a copy of}."""
    origins = dict.fromkeys(jaxpr.constvars, _Origin("constant", ""))
    leaves = jax.tree_util.tree_leaves_with_path(args)
    for v, (path, _) in zip(jaxpr.invars, leaves, strict=True):
        origins[v] = _Origin("argument", f"args{jax.tree_util.keystr(path)}")
    sources: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        label = label_of(eqn)
        primitive = _jaxpr.primitive(eqn)
        origin = _Origin(label or primitive, _jaxpr.source_line(eqn))
        origins |= dict.fromkeys(eqn.outvars, origin)
        is_copy = label or primitive == "reduce_precision"
        # JAX rounds what a policy saves; a name does not make a new value.
        if is_copy:
            (x,) = eqn.invars
            (y,) = eqn.outvars
            source = y if _jaxpr.is_literal(x) else sources.get(x, x)
            sources[y] = source
            # The label says more than the primitive that it is attached to.
            if label and source not in jaxpr.invars:
                origins[source] = origin
    return origins, sources


def _total(residuals: Sequence[tuple[int, _Origin]]) -> str:
    existing = sum(
        nbytes
        for nbytes, origin in residuals
        if origin.kind in ("argument", "constant")
    )
    added = sum(nbytes for nbytes, _ in residuals) - existing
    return (
        f"{_table.format_bytes(added)} saved, and "
        f"{_table.format_bytes(existing)} of arguments and constants, which "
        "are there in any case"
    )
