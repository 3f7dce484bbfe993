"""One kernel, standardized: the four conventions in circulation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _dtypes, _integers, _tree
from jaxtricks import roles as roles_lib
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Params, PathRule, Roles, Scalar


class Preset(NamedTuple):
    """One convention: how epsilon enters, whether fan-in does, and how variance is counted.

    Attributes:
      mode: "clamp" = rsqrt(max(var * fan_in, eps)), "var" = 1 / sqrt(var + eps), "std"
        = 1 / (std + eps).
      eps: the convention's own epsilon.
      by_fan_in: whether the result is also divided by sqrt(fan_in).
      ddof: 1 divides the variance by fan_in - 1 instead of fan_in.
    """

    mode: Literal["clamp", "var", "std"]
    eps: float
    by_fan_in: bool
    ddof: int = 0


PRESETS = {
    "nfnet": Preset("clamp", 1e-4, by_fan_in=True),
    "timm": Preset("var", 1e-6, by_fan_in=True),
    "bit": Preset("std", 1e-5, by_fan_in=False),
    "qiao": Preset("std", 1e-5, by_fan_in=False, ddof=1),
}


@checked
def standardize(
    kernel: Float[Array, "..."],
    gain: Scalar | Float[Array, "..."] | None = None,
    *,
    preset: str = "nfnet",
    eps: float | None = None,
    out_axis: int | Sequence[int] = -1,
) -> Float[Array, "..."]:
    """Kernel with zero mean and fixed variance per output channel.

    w_hat = (w - mean) * s * gain, mean and var over everything but the output axis, N =
    fan_in:

        nfnet   s = 1 / sqrt(max(var * N, eps))       eps 1e-4, a clamp
        timm    s = 1 / (sqrt(var + eps) * sqrt(N))   eps 1e-6 (ScaledStdConv2d)
        bit     s = 1 / (sqrt(var) + eps)             eps 1e-5
        qiao    s = 1 / (sqrt(var) + eps)             eps 1e-5, var divided by N - 1

    Args:
      kernel: [..., out]; for grouped convolutions the input axis already holds
        in_features / groups.
      gain: one factor per output channel [out], or a scalar; None = 1.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the preset's epsilon, in the same place of the formula.
      out_axis: the axis (or axes: a Keras depthwise kernel (kh, kw, C, M) has two) that
        is not reduced.

    Returns:
      An array like the kernel. A channel whose weights are all equal gives zeros, with
      finite gradients.

    Raises:
      ValueError: unknown preset, a gain of the wrong shape, or a fan-in of one
        (depthwise 1x1).

    Example:
      >>> w = standardize(jnp.arange(12.0).reshape(2, 2, 1, 3))
      >>> bool(jnp.allclose(w.sum((0, 1, 2)), 0, atol=1e-6)), bool(jnp.allclose((w**2).sum((0, 1, 2)), 1))
      (True, True)

    References:
      Brock, De, Smith, arXiv 2101.08692; Qiao et al., arXiv 1903.10520.
    """
    rule = checked_preset(preset, eps)
    kernel = jnp.asarray(kernel)
    _dtypes.check_floating("weightstd.standardize: `kernel`", kernel)
    kept = _kept_axes(kernel, out_axis)
    reduced = tuple(i for i in range(kernel.ndim) if i not in kept)
    fan_in = math.prod(kernel.shape[i] for i in reduced)
    if fan_in < 2:
        raise ValueError(
            f"weightstd.standardize: a kernel of shape {tuple(kernel.shape)} has fan-in {fan_in}, which "
            "standardizing would turn to zero; leave it out (a depthwise 1x1 convolution?)"
        )
    w = jnp.asarray(kernel, _dtypes.wide_dtype(kernel))
    # Relative to one of its own weights a constant channel is exactly zero, and a large
    # mean costs nothing. The result does not depend on that weight, so no gradient
    # needs to flow through it.
    one = tuple(slice(None) if i in kept else slice(1) for i in range(w.ndim))
    w = w - jax.lax.stop_gradient(w[one])
    w = w - jnp.mean(w, axis=reduced, keepdims=True)
    factor = _factor(jnp.sum(w * w, axis=reduced, keepdims=True), fan_in, rule)
    if gain is not None:
        factor = factor * _gain_like(gain, kernel, kept, w.dtype)
    return (w * factor).astype(kernel.dtype)


def checked_preset(name: str, eps: float | None) -> Preset:
    """The preset with this name and its epsilon, or an error that lists the names."""
    if name not in PRESETS:
        raise ValueError(
            f"weightstd: `preset` is {name!r}; use one of {', '.join(PRESETS)}"
        )
    return PRESETS[name] if eps is None else PRESETS[name]._replace(eps=eps)


def _kept_axes(kernel: Array, out_axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = _integers.listed(out_axis)
    if any(not -kernel.ndim <= i < kernel.ndim for i in axes):
        raise ValueError(
            f"weightstd.standardize: `out_axis` {out_axis} is no axis of a kernel of shape "
            f"{tuple(kernel.shape)}"
        )
    return tuple(sorted(i % kernel.ndim for i in axes))


def _factor(squares: Array, fan_in: int, rule: Preset) -> Array:
    """Scale per output channel from the sum of squared deviations (= var * fan_in)."""
    if rule.mode == "clamp":
        return jax.lax.rsqrt(jnp.maximum(squares, rule.eps))
    var = squares / (fan_in - rule.ddof)
    if rule.mode == "var":
        factor = jax.lax.rsqrt(var + rule.eps)
    else:
        # sqrt has no derivative at 0: a constant channel takes the branch without one.
        positive = var > 0
        std = jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1.0)), 0.0)
        factor = 1 / (std + rule.eps)
    return factor / math.sqrt(fan_in) if rule.by_fan_in else factor


def _gain_like(gain: Any, kernel: Array, kept: tuple[int, ...], dtype: Any) -> Array:
    gain = jnp.asarray(gain, dtype)
    expected = tuple(kernel.shape[i] for i in kept)
    if gain.shape not in ((), expected):
        raise ValueError(
            f"weightstd.standardize: `gain` has shape {gain.shape}; give one factor per output "
            f"channel, {expected}, or a scalar"
        )
    if gain.ndim == 0:
        return gain
    return gain.reshape([n if i in kept else 1 for i, n in enumerate(kernel.shape)])


# The hook that standardizes the kernels of flax's own convolutions.


@dataclasses.dataclass(frozen=True)
class Hook:
    """A convolution that standardizes its kernel; equal settings are equal, so jit caches hit.

    Attributes:
      gain: see `standardized`.
      preset: see `standardized`.
      eps: see `standardized`.
    """

    gain: float | None
    preset: str
    eps: float | None

    def __call__(
        self,
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: Any,
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        **kwargs: Any,
    ) -> Array:
        """`lax.conv_general_dilated` of the standardized kernel."""
        numbers = jax.lax.conv_dimension_numbers(
            lhs.shape, rhs.shape, dimension_numbers
        )
        out_axis = numbers.rhs_spec[0]
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(self.kernel(rhs, out_axis))
        return jax.lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            numbers,
            **kwargs,
        )

    def kernel(self, kernel: Array, out_axis: int = -1) -> Array:
        """What the convolution uses in place of `kernel`."""
        return standardize(
            kernel, self.gain, preset=self.preset, eps=self.eps, out_axis=out_axis
        )


@checked
def standardized(
    *, gain: float | None = None, preset: str = "nfnet", eps: float | None = None
) -> Hook:
    """A `conv_general_dilated=` argument for flax convolutions that standardizes their kernels.

    Args:
      gain: one fixed factor (an activation's gain, say); for learnable gains use
        `jt.nnx.WSConv`.
      preset: see `standardize`.
      eps: see `standardize`.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`; it finds the
      output axis from the dimension numbers.

    Raises:
      ValueError: unknown preset.

    Example:
      >>> numbers = ("NHWC", "HWIO", "NHWC")
      >>> conv, x, w = standardized(), jnp.ones((1, 4, 4, 2)), jnp.arange(54.0).reshape(3, 3, 2, 3)
      >>> conv(x, w, (1, 1), "VALID", dimension_numbers=numbers).shape
      (1, 2, 2, 3)
    """
    checked_preset(preset, eps)
    return Hook(gain, preset, eps)


# Standardization and the kernel penalty over whole parameter trees.


@checked
def standardize_params(
    params: Params,
    *,
    path_filter: Callable[[str], bool],
    roles: PathRule | Any = None,
    preset: str = "nfnet",
    eps: float | None = None,
) -> Params:
    """The parameter tree with the chosen kernels standardized: for models that are left as they are.

    Call it inside the loss, in front of apply: gradients then flow to the raw kernels.

    Args:
      params: pytree of arrays; kernels have their output axis last.
      path_filter: path_filter(path) -> True for the kernels to standardize
        ("block/0/conv/kernel").
      roles: roles as elsewhere (`jt.nnx.roles(model)`): kernels with "batch" or two
        "out" axes then keep those axes apart; None = everything but the last axis is
        reduced.
      preset: see `standardize`.
      eps: see `standardize`.

    Returns:
      A tree like params.

    Raises:
      ValueError: `path_filter` chooses nothing, or a leaf that cannot be standardized.

    Example:
      >>> tree = {"conv": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}}
      >>> out = standardize_params(tree, path_filter=lambda path: path.endswith("kernel"))
      >>> out["conv"]["bias"] is tree["conv"]["bias"]
      True
    """
    leaf_roles = dict(
        zip(_tree.by_path(params), roles_lib.leaf_roles(roles, params), strict=True)
    )
    if not any(map(path_filter, leaf_roles)):
        raise ValueError(
            "weightstd.standardize_params: `path_filter` chooses no parameter: check its paths"
        )

    def change(path: str, leaf: Any) -> Any:
        if not path_filter(path):
            return leaf
        out_axis = _out_axes(leaf_roles[path])
        return _at(path, standardize, leaf, preset=preset, eps=eps, out_axis=out_axis)

    return _tree.map_with_path(change, params)


@checked
def fold_params(
    params: Params,
    *,
    path_filter: Callable[[str], bool] | None = None,
    roles: PathRule | Any = None,
    preset: str = "nfnet",
    eps: float | None = None,
) -> Params:
    """Parameters of plain convolutions from those of standardized ones, for inference.

    Every dict that holds a `kernel` and a `gain`, as a `WSConv`'s does, gets
    standardize(kernel, gain) in place of the kernel and loses the gain: the parameters
    of a plain convolution, the same function.

    Args:
      params: nested dicts (or lists) of arrays.
      path_filter: path_filter(path) -> True for the kernels to fold
        ("block/0/conv/kernel"), with a gain or without; None = those with one.
      roles: roles as in `standardize_params`; None = everything but the last axis is
        reduced.
      preset: see `standardize`; the one that the model was trained with.
      eps: see `standardize`.

    Returns:
      A tree like params without the gains; kernels keep their dtype.

    Raises:
      ValueError: nothing is chosen, or a kernel that cannot be standardized.

    Example:
      >>> conv = {"kernel": jnp.arange(6.0).reshape(3, 2), "gain": jnp.full(2, 2.0), "bias": jnp.ones(2)}
      >>> baked = fold_params({"conv": conv})["conv"]
      >>> sorted(baked), bool(jnp.allclose((baked["kernel"] ** 2).sum(0), 4.0))
      (['bias', 'kernel'], True)
    """
    leaf_roles = dict(
        zip(_tree.by_path(params), roles_lib.leaf_roles(roles, params), strict=True)
    )
    found = []

    def change(node: Any, at: str) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(
                change(child, f"{at}{i}/") for i, child in enumerate(node)
            )
        if not isinstance(node, Mapping):
            return node
        path, new = f"{at}kernel", dict(node)
        chosen = (
            node.get("gain") is not None if path_filter is None else path_filter(path)
        )
        if (
            node.get("kernel") is not None
            and not isinstance(node["kernel"], Mapping)
            and chosen
        ):
            found.append(path)
            rule = {
                "preset": preset,
                "eps": eps,
                "out_axis": _out_axes(leaf_roles[path]),
            }
            new["kernel"] = _at(
                path, standardize, node["kernel"], new.pop("gain", None), **rule
            )
        return {key: change(child, f"{at}{key}/") for key, child in new.items()}

    baked = change(params, "")
    if not found:
        cure = "is chosen by `path_filter`"
        if path_filter is None:
            cure = "with a `gain` beside it: choose kernels by `path_filter`"
        raise ValueError(f"weightstd.fold_params: no `kernel` {cure}")
    return baked


@checked
def l2(
    params: Params,
    scale: Scalar = 1e-4,
    *,
    path_filter: Callable[[str], bool] | None = None,
) -> Float[Array, ""]:
    """The penalty scale * sum of w^2 over kernels, to add to a loss.

    Under plain SGD its gradient equals `optax.add_decayed_weights(2 * scale)` with the
    same mask.

    Args:
      params: pytree of arrays.
      scale: factor of the sum of squares.
      path_filter: path_filter(path) -> True for the leaves to penalize; None =
        `roles.is_kernel`.

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
        if (
            roles_lib.is_kernel(path, tuple(leaf.shape))
            if path_filter is None
            else path_filter(path)
        )
    ]
    for path, leaf in chosen:
        _dtypes.check_floating(f"weightstd.l2: the parameter {path!r}", leaf)
    leaves = [leaf for _, leaf in chosen]
    dtype = _dtypes.wide_dtype(*leaves)
    total = sum(
        (jnp.sum(jnp.square(jnp.asarray(x, dtype))) for x in leaves),
        jnp.zeros((), dtype),
    )
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
