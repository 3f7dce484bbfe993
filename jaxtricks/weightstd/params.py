"""Standardization and the kernel penalty over whole parameter trees."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _tree
from jaxtricks import axes as axes_
from jaxtricks._types import Array, Params, PathRule, Roles, Scalar
from jaxtricks.weightstd.kernel import standardize


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
    roles = dict(zip(_tree.by_path(params), axes_.leaf_roles(axes, params), strict=True))
    if not any(map(where, roles)):
        raise ValueError(
            "weightstd.standardize_params: `where` chooses no parameter: check its paths"
        )

    def change(path: str, leaf: Any) -> Any:
        if not where(path):
            return leaf
        try:
            return standardize(leaf, preset=preset, eps=eps, out_axis=_out_axes(roles[path]))
        except ValueError as error:
            raise ValueError(f"{error} [at {path!r}]") from None

    return _tree.map_with_path(change, params)


def l2(
    params: Params, scale: Scalar = 1e-4, *, where: Callable[[str], bool] | None = None
) -> Float[Array, ""]:
    """The penalty scale * sum of w^2 over kernels, to add to a loss.

    Under plain SGD its gradient equals `optax.add_decayed_weights(2 * scale)` with the same mask.

    Args:
      params: pytree of arrays.
      scale: factor of the sum of squares.
      where: where(path) -> True for the leaves to penalize; None = `axes.is_kernel`.

    Returns:
      A scalar, float32 or better; zero if nothing is chosen.

    Example:
      >>> float(l2({"conv": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}}, 0.5))
      18.0
    """
    leaves = [
        leaf
        for path, leaf in _tree.leaves_with_paths(params)
        if (axes_.is_kernel(path, tuple(leaf.shape)) if where is None else where(path))
    ]
    dtype = _tree.wide_dtype(*leaves)
    total = sum((jnp.sum(jnp.square(jnp.asarray(x, dtype))) for x in leaves), jnp.zeros((), dtype))
    return jnp.asarray(scale, dtype) * total


def _out_axes(roles: Roles | None) -> int | tuple[int, ...]:
    if roles is None:
        return -1
    return axes_.positions(roles, "batch", "out", "none")
