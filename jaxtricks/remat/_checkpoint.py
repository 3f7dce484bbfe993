"""Recompute all but the values that have a name."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import source_info_util
from jax.extend.core import primitives

from jaxtricks import _compat, _jaxpr
from jaxtricks._arguments import checked
from jaxtricks._partition import Call, refuse_module
from jaxtricks.remat import _recompute, flat
from jaxtricks.remat.recompute import recomputed

source_info_util.register_exclusion(__file__)  # a named value is where the user named it


@checked
def name(x: Any, label: str) -> Any:
    """x under a name that `checkpoint` can keep and `residuals` prints: jax.ad_checkpoint.checkpoint_name.

    Args:
      x: pytree of arrays.
      label: the name; any number of values may share it.

    Returns:
      x.

    Example:
      >>> import jax.numpy as jnp
      >>> print(name({"y": jnp.float32(2.0)}, "up")["y"])
      2.0
    """
    return checkpoint_name(x, label)


@checked
def checkpoint(
    fn: Callable[..., Any],
    *,
    save: str | Iterable[str] = (),
    offload: str | Iterable[str] = (),
    **jax_checkpoint_arguments: Any,
) -> Callable[..., Any]:
    """fn that runs again in the backward pass, except for the values that `name` gave one of these names.

    Name what is dear and whose own derivative does not read it, as the results of products: tanh or exp
    behind a saved product is cheap to repeat, but a saved tanh does not spare the product before it, which
    its derivative needs again.

    Since jaxlib 0.11.2 this is jax.checkpoint with a policy of jax.checkpoint_policies. Before, XLA's CPU
    backend undoes jax.checkpoint in code that is not in a loop (`check_effective` tells); there the second
    pass waits for the cotangent as in `recompute_grad`. With `offload`, an argument of jax.checkpoint, or a
    name that occurs only inside a loop, a branch, a custom rule or another checkpoint, it is jax.checkpoint
    on every version.

    Args:
      fn: a function of pytrees, as for `recompute_grad`.
      save: names of values to keep; one that fn lacks is passed over if another is there, so that blocks
        of several kinds can share a list.
      offload: names of values to keep in the host's memory ("pinned_host").
      **jax_checkpoint_arguments: policy, prevent_cse, static_argnums and the like.

    Returns:
      A function with the signature of fn.

    Raises:
      ValueError: names together with a policy; for a flax.nnx module; when called, if fn has values of
        none of the names.

    Example:
      >>> import jax.numpy as jnp
      >>> block = lambda w, x: jnp.tanh(name(x @ w, "up")) @ w.T
      >>> f = checkpoint(block, save="up")
      >>> w, x = jnp.eye(2), jnp.zeros((1, 2))
      >>> print(jax.grad(lambda x: f(w, x).sum())(x))
      [[1. 1.]]

    References:
      Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, algorithm 1 with the
      mirror count of a named value 0.
    """
    refuse_module(fn, "checkpoint")
    keep, away = _names(save), _names(offload)
    if (keep or away) and jax_checkpoint_arguments.get("policy") is not None:
        raise ValueError(
            "remat.checkpoint: `policy` and names exclude each other: give `policy`, or `save` and `offload`"
        )
    delegate = functools.partial(jax.checkpoint, **(jax_checkpoint_arguments | _policy(keep, away)))
    whole = delegate(fn) if away or jax_checkpoint_arguments else None

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = Call(whole or fn, args, kwargs, nnx="checkpoint")
        closed, _ = _jaxpr.trace(call.run, *call.arrays)
        _refuse_unknown((*keep, *away), closed.jaxpr)
        if whole:
            return call.assemble(_jaxpr.as_fun(closed.jaxpr)(closed.consts, *call.arrays))
        program = flat.inlined(closed)
        jaxpr = _with_plain_names(program.jaxpr)
        inner = set(keep) & set(_labels(_jaxpr.walk(jaxpr))) - set(_labels(jaxpr.eqns))
        if inner or _recompute.barriers_hold():
            run = delegate(_jaxpr.as_fun(closed.jaxpr))
            return call.assemble(run(closed.consts, *call.arrays))
        saved = [i for i, eqn in enumerate(jaxpr.eqns) if label_of(eqn) in keep]
        return call.assemble(recomputed(jaxpr, saved=saved)(*program.consts, *call.arrays))

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
        there = f"those in it are {', '.join(map(repr, found))}" if found else "it has none"
        raise ValueError(
            f"remat.checkpoint: no value in the function has a name of {list(names)}: {there}; "
            "give names with jaxtricks.remat.name"
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
