"""Standardize kernels: one, those of a Flax layer, or those of a parameter tree."""

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
    """One of the conventions in circulation for epsilon, fan-in and variance.

    Attributes:
      mode: "clamp" = rsqrt(max(var * fan_in, eps)), "var" = 1 / sqrt(var + eps), "std"
        = 1 / (std + eps).
      eps: the convention's epsilon.
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
    """Standardize a kernel to zero mean and fixed variance per output channel.

    w_hat = (w - mean) * s * gain, with mean and var over all axes but the output axis
    and N = fan_in:

        nfnet   s = 1 / sqrt(max(var * N, eps))       eps 1e-4, a clamp
        timm    s = 1 / (sqrt(var + eps) * sqrt(N))   eps 1e-6 (ScaledStdConv2d)
        bit     s = 1 / (sqrt(var) + eps)             eps 1e-5
        qiao    s = 1 / (sqrt(var) + eps)             eps 1e-5, var divided by N - 1

    Args:
      kernel: [..., out]; for grouped convolutions the input axis already holds
        in_features / groups.
      gain: one factor per output channel [out], or a scalar; None = 1.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the preset's epsilon.
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
    out_axes = _positive_axes(kernel, out_axis)
    reduced = tuple(i for i in range(kernel.ndim) if i not in out_axes)
    fan_in = math.prod(kernel.shape[i] for i in reduced)
    if fan_in < 2:
        raise ValueError(
            f"weightstd.standardize: a kernel of shape {tuple(kernel.shape)} "
            f"has fan-in {fan_in}, which standardizing would turn to zero; "
            "leave it out (a depthwise 1x1 convolution?)"
        )
    w = jnp.asarray(kernel, _dtypes.wide_dtype(kernel))
    # Relative to its first weight a constant channel is exactly zero, and a large mean
    # costs no digits. The result does not depend on that weight, so no gradient needs
    # to flow through it.
    first = tuple(
        slice(None) if i in out_axes else slice(1) for i in range(w.ndim)
    )
    w = w - jax.lax.stop_gradient(w[first])
    w = w - jnp.mean(w, axis=reduced, keepdims=True)
    factor = _factor(jnp.sum(w * w, axis=reduced, keepdims=True), fan_in, rule)
    if gain is not None:
        factor = factor * _gain_like(gain, kernel, out_axes, w.dtype)
    return (w * factor).astype(kernel.dtype)


def checked_preset(name: str, eps: float | None) -> Preset:
    """Return the preset of this name; raise with the names if there is none."""
    if name not in PRESETS:
        raise ValueError(
            f"weightstd: `preset` is {name!r}; use one of {', '.join(PRESETS)}"
        )
    return PRESETS[name] if eps is None else PRESETS[name]._replace(eps=eps)


def _positive_axes(
    kernel: Array, out_axis: int | Sequence[int]
) -> tuple[int, ...]:
    axes = _integers.listed(out_axis)
    if any(not -kernel.ndim <= i < kernel.ndim for i in axes):
        raise ValueError(
            f"weightstd.standardize: `out_axis` {out_axis} is not an axis of a "
            f"kernel of shape {tuple(kernel.shape)}"
        )
    return tuple(sorted(i % kernel.ndim for i in axes))


def _factor(squares: Array, fan_in: int, rule: Preset) -> Array:
    """Compute the factor per channel from the sum of squared deviations."""
    if rule.mode == "clamp":
        return jax.lax.rsqrt(jnp.maximum(squares, rule.eps))
    var = squares / (fan_in - rule.ddof)
    if rule.mode == "var":
        factor = jax.lax.rsqrt(var + rule.eps)
    else:
        # sqrt has no derivative at 0, so a constant channel avoids it twice: by the
        # inner where for the gradient, by the outer one for the value.
        positive = var > 0
        std = jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1.0)), 0.0)
        factor = 1 / (std + rule.eps)
    return factor / math.sqrt(fan_in) if rule.by_fan_in else factor


def _gain_like(
    gain: Any, kernel: Array, out_axes: tuple[int, ...], dtype: Any
) -> Array:
    gain = jnp.asarray(gain, dtype)
    expected = tuple(kernel.shape[i] for i in out_axes)
    if gain.shape not in ((), expected):
        raise ValueError(
            f"weightstd.standardize: `gain` has shape {gain.shape}; give one "
            f"factor per output channel, {expected}, or a scalar"
        )
    if gain.ndim == 0:
        return gain
    shape = [n if i in out_axes else 1 for i, n in enumerate(kernel.shape)]
    return gain.reshape(shape)


# A hook for the convolutions of Flax.


@dataclasses.dataclass(frozen=True)
class Hook:
    """Convolve with a standardized kernel; hashable, so that jit caches hit.

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
        """Call `lax.conv_general_dilated` with the standardized kernel."""
        numbers = jax.lax.conv_dimension_numbers(
            lhs.shape, rhs.shape, dimension_numbers
        )
        out_axis = numbers.rhs_spec[0]
        lhs = jnp.asarray(lhs)
        rhs = jnp.asarray(self.kernel(rhs, out_axis))
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
        """Return what the convolution uses in place of `kernel`."""
        return standardize(
            kernel,
            self.gain,
            preset=self.preset,
            eps=self.eps,
            out_axis=out_axis,
        )


@checked
def standardized(
    *,
    gain: float | None = None,
    preset: str = "nfnet",
    eps: float | None = None,
) -> Hook:
    """Build a `conv_general_dilated=` for Flax layers that standardizes their kernels.

    Args:
      gain: one fixed factor, such as an activation's gain; `jt.nnx.WSConv` has
        learnable ones.
      preset: see `standardize`.
      eps: see `standardize`.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`; it takes the
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


# Functions of whole parameter trees.


@checked
def standardize_params(
    params: Params,
    *,
    path_filter: Callable[[str], bool],
    roles: PathRule | Any = None,
    preset: str = "nfnet",
    eps: float | None = None,
) -> Params:
    """Standardize the chosen kernels of a parameter tree.

    It serves models that stay as they are: call it inside the loss, before apply, so
    that gradients flow to the raw kernels.

    Args:
      params: pytree of arrays; kernels have their output axis last.
      path_filter: path_filter(path) -> True for the kernels to standardize
        ("block/0/conv/kernel").
      roles: roles as elsewhere (`jt.nnx.roles(model)`): kernels with "batch" or two
        "out" axes keep those axes apart; None = reduce all axes but the last.
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
    leaf_roles = _roles_by_path(roles, params)
    if not any(map(path_filter, leaf_roles)):
        raise ValueError(
            "weightstd.standardize_params: `path_filter` chooses no parameter: "
            "check its paths"
        )

    def change(path: str, leaf: Any) -> Any:
        if not path_filter(path):
            return leaf
        out_axis = _out_axes(leaf_roles[path])
        return _at(
            path, standardize, leaf, preset=preset, eps=eps, out_axis=out_axis
        )

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
    """Fold standardized kernels and gains into plain kernels, for inference.

    In every dict with a `kernel` and a `gain`, such as that of a `WSConv`, the kernel
    becomes standardize(kernel, gain) and the gain is dropped: these are the parameters
    of a plain convolution that computes the same function.

    Args:
      params: nested dicts (or lists) of arrays.
      path_filter: path_filter(path) -> True for the kernels to fold
        ("block/0/conv/kernel"), with a gain or without; None = those with one.
      roles: roles as in `standardize_params`; None = reduce all axes but the last.
      preset: see `standardize`; the one that the model was trained with.
      eps: see `standardize`.

    Returns:
      A tree like params without the gains; kernels keep their dtype.

    Raises:
      ValueError: nothing is chosen, or a kernel that cannot be standardized.

    Example:
      >>> conv = {"kernel": jnp.arange(6.0).reshape(3, 2), "gain": jnp.full(2, 2.0), "bias": jnp.ones(2)}
      >>> plain = fold_params({"conv": conv})["conv"]
      >>> sorted(plain), bool(jnp.allclose((plain["kernel"] ** 2).sum(0), 4.0))
      (['bias', 'kernel'], True)
    """
    leaf_roles = _roles_by_path(roles, params)
    folded_paths = []

    def is_chosen(path: str, node: Mapping[str, Any]) -> bool:
        kernel = node.get("kernel")
        if kernel is None or isinstance(kernel, Mapping):
            return False
        if path_filter is None:
            return node.get("gain") is not None
        return path_filter(path)

    def fold(node: Any, prefix: str) -> Any:
        if isinstance(node, list | tuple):
            items = [
                fold(child, f"{prefix}{i}/") for i, child in enumerate(node)
            ]
            return type(node)(items)
        if not isinstance(node, Mapping):
            return node
        path = f"{prefix}kernel"
        new = dict(node)
        if is_chosen(path, node):
            folded_paths.append(path)
            new["kernel"] = _at(
                path,
                standardize,
                node["kernel"],
                new.pop("gain", None),
                preset=preset,
                eps=eps,
                out_axis=_out_axes(leaf_roles[path]),
            )
        return {
            key: fold(child, f"{prefix}{key}/") for key, child in new.items()
        }

    folded = fold(params, "")
    if not folded_paths:
        cure = "is chosen by `path_filter`"
        if path_filter is None:
            cure = "with a `gain` beside it: choose kernels by `path_filter`"
        raise ValueError(f"weightstd.fold_params: no `kernel` {cure}")
    return folded


@checked
def l2(
    params: Params,
    scale: Scalar = 1e-4,
    *,
    path_filter: Callable[[str], bool] | None = None,
) -> Float[Array, ""]:
    """Compute the penalty scale * sum of w^2 over kernels, to add to a loss.

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
            "weightstd.l2: `params` has a leaf that is not an array: give a "
            "tree of arrays"
        )
    penalized = []
    for path, leaf in leaves:
        if path_filter is None:
            is_chosen = roles_lib.is_kernel(path, tuple(leaf.shape))
        else:
            is_chosen = path_filter(path)
        if is_chosen:
            _dtypes.check_floating(
                f"weightstd.l2: the parameter {path!r}", leaf
            )
            penalized.append(leaf)
    dtype = _dtypes.wide_dtype(*penalized)
    total = jnp.zeros((), dtype)
    for leaf in penalized:
        total += jnp.sum(jnp.square(jnp.asarray(leaf, dtype)))
    return jnp.asarray(scale, dtype) * total


def _roles_by_path(
    roles: PathRule | Any, params: Params
) -> dict[str, Roles | None]:
    per_leaf = roles_lib.leaf_roles(roles, params)
    return dict(zip(_tree.by_path(params), per_leaf, strict=True))


def _at(path: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call fn and name the path in its errors."""
    try:
        return fn(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{error} [at {path!r}]") from None


def _out_axes(roles: Roles | None) -> int | tuple[int, ...]:
    if roles is None:
        return -1
    return roles_lib.positions(roles, "batch", "out", "none")
