"""Standardization and the kernel penalty over whole parameter trees."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params, PathRule, Roles, Scalar
from jaxtricks.weightstd.kernel import standardize


@checked
def standardize_params(
    params: Params,
    *,
    where: Callable[[str], bool],
    axes: PathRule | Any = None,
    preset: str = "nfnet",
    eps: float | None = None,
) -> Params:
    """The parameter tree with the chosen kernels standardized: for models that are left as they are.

    Call it inside the loss, in front of apply: gradients then flow to the raw kernels.

    Args:
      params: pytree of arrays; kernels have their output axis last.
      where: where(path) -> True for the kernels to standardize ("block/0/conv/kernel").
      axes: roles as elsewhere (`jt.nnx.roles(model)`): kernels with "batch" or two "out" axes then
        keep those axes apart; None = everything but the last axis is reduced.
      preset: see `standardize`.
      eps: see `standardize`.

    Returns:
      A tree like params.

    Raises:
      ValueError: `where` chooses nothing, or a leaf that cannot be standardized.

    Example:
      >>> tree = {"conv": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}
      >>> out = standardize_params(tree, where=lambda path: path.endswith("kernel"))
      >>> out["conv"]["bias"] is tree["conv"]["bias"]
      True
    """
    roles = dict(zip(_tree.by_path(params), roles_lib.leaf_roles(axes, params), strict=True))
    if not any(map(where, roles)):
        raise ValueError(
            "weightstd.standardize_params: `where` chooses no parameter: check its paths"
        )

    def change(path: str, leaf: Any) -> Any:
        if not where(path):
            return leaf
        out_axis = _out_axes(roles[path])
        return _at(path, standardize, leaf, preset=preset, eps=eps, out_axis=out_axis)

    return _tree.map_with_path(change, params)


@checked
def bake(
    params: Params,
    *,
    where: Callable[[str], bool] | None = None,
    axes: PathRule | Any = None,
    preset: str = "nfnet",
    eps: float | None = None,
) -> Params:
    """Parameters of plain convolutions from those of standardized ones, for inference.

    Every dict that holds a `kernel` and a `gain`, as a `WSConv`'s does, gets standardize(kernel, gain) in
    place of the kernel and loses the gain: the parameters of a plain convolution, the same function.

    Args:
      params: nested dicts (or lists) of arrays.
      where: where(path) -> True for the kernels to bake ("block/0/conv/kernel"), with a gain or without;
        None = those with one.
      axes: roles as in `standardize_params`; None = everything but the last axis is reduced.
      preset: see `standardize`; the one that the model was trained with.
      eps: see `standardize`.

    Returns:
      A tree like params without the gains; kernels keep their dtype.

    Raises:
      ValueError: nothing is chosen, or a kernel that cannot be standardized.

    Example:
      >>> conv = {"kernel": jnp.arange(6.0).reshape(3, 2), "gain": jnp.full(2, 2.0), "bias": jnp.ones(2)}
      >>> baked = bake({"conv": conv})["conv"]
      >>> sorted(baked), bool(jnp.allclose((baked["kernel"] ** 2).sum(0), 4.0))
      (['bias', 'kernel'], True)
    """
    roles = dict(zip(_tree.by_path(params), roles_lib.leaf_roles(axes, params), strict=True))
    found = []

    def change(node: Any, at: str) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(change(child, f"{at}{i}/") for i, child in enumerate(node))
        if not isinstance(node, Mapping):
            return node
        path, new = f"{at}kernel", dict(node)
        chosen = node.get("gain") is not None if where is None else where(path)
        if node.get("kernel") is not None and not isinstance(node["kernel"], Mapping) and chosen:
            found.append(path)
            rule = {"preset": preset, "eps": eps, "out_axis": _out_axes(roles[path])}
            new["kernel"] = _at(path, standardize, node["kernel"], new.pop("gain", None), **rule)
        return {key: change(child, f"{at}{key}/") for key, child in new.items()}

    baked = change(params, "")
    if not found:
        cure = "with a `gain` beside it: choose kernels by `where`"
        raise ValueError(
            f"weightstd.bake: no `kernel` {cure if where is None else 'is chosen by `where`'}"
        )
    return baked


@checked
def l2(
    params: Params, scale: Scalar = 1e-4, *, where: Callable[[str], bool] | None = None
) -> Float[Array, ""]:
    """The penalty scale * sum of w^2 over kernels, to add to a loss.

    Under plain SGD its gradient equals `optax.add_decayed_weights(2 * scale)` with the same mask.

    Args:
      params: pytree of arrays.
      scale: factor of the sum of squares.
      where: where(path) -> True for the leaves to penalize; None = `roles.is_kernel`.

    Returns:
      A scalar, float32 or better; zero if nothing is chosen.

    Example:
      >>> float(l2({"conv": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}}, 0.5))
      18.0
    """
    leaves = _tree.leaves_with_paths(params)
    if any(not hasattr(leaf, "shape") for _, leaf in leaves):
        raise ValueError(
            "weightstd.l2: `params` has a leaf that is not an array: give a tree of arrays"
        )
    chosen = [
        (path, leaf)
        for path, leaf in leaves
        if (roles_lib.is_kernel(path, tuple(leaf.shape)) if where is None else where(path))
    ]
    for path, leaf in chosen:
        _tree.check_floating(f"weightstd.l2: the parameter {path!r}", leaf)
    leaves = [leaf for _, leaf in chosen]
    dtype = _tree.wide_dtype(*leaves)
    total = sum((jnp.sum(jnp.square(jnp.asarray(x, dtype))) for x in leaves), jnp.zeros((), dtype))
    return jnp.asarray(scale, dtype) * total


def _at(path: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs), whose errors say where they arose."""
    try:
        return fn(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{error} [at {path!r}]") from None


def _out_axes(roles: Roles | None) -> int | tuple[int, ...]:
    if roles is None:
        return -1
    return roles_lib.positions(roles, "batch", "out", "none")
