"""Weight standardization: convolution kernels with zero mean and fixed variance per output channel.

What. Before every use, each output channel of a kernel loses its mean and is divided by its standard
deviation (times sqrt(fan_in) in the scaled forms, so that variance survives the layer). Nothing is stored:
training and evaluation compute the same thing, and there are no batch statistics.

Use.

    import jax.numpy as jnp
    from flax import nnx
    import jaxtricks as jt
    # a layer with a learnable gain
    conv = jt.nnx.WSConv(3, 16, (3, 3), rngs=nnx.Rngs(0))
    # a hook for any flax convolution, no new class
    conv = nnx.Conv(3, 16, (3, 3), conv_general_dilated=jt.weightstd.standardized(), rngs=nnx.Rngs(0))
    # or the function itself
    kernel = jt.weightstd.standardize(jnp.ones((3, 3, 8, 16)).at[0].set(2.0))

Settings to start from. preset "nfnet" with a gain (NFNets, no normalization layers), or preset "qiao" without
one in front of group normalization. Leave gains and biases out of weight decay (`axes.is_kernel` does).
Weight decay on a standardized kernel changes its effective learning rate, not the function.

When it helps and when not. Where batch statistics are unavailable or bad: batches of one to a few images,
group normalization, networks without normalization (there together with `agc`). In front of batch
normalization the mean and scale of a channel are removed anyway. Depthwise 3x3 kernels give nine numbers to
take statistics of; a depthwise 1x1 kernel gives one, which would vanish, so it raises.

Cost. A few elementwise passes over the kernel (not the activations), and no parameters but the gains. The
result does not depend on the batch: standardize once outside a loop over microbatches.

Composes with. Any function of a parameter tree (`standardize_params`), vmap over stacked kernels, remat,
`reparam` (branches of `ACBlock(conv=WSConv)` fuse), `agc` and `memopt` (they see the raw kernel). Statistics
are float32 or better whatever the parameter's dtype; the hook sees the kernel after Flax has cast it to the
layer's dtype, `WSConv` standardizes the parameter itself.

Differences from the paper and from optax/flax. Four conventions are in circulation and differ in epsilon: see
`standardize`; weights trained under one are not weights for another. We compute (w - mean) * scale, which
keeps digits that w * scale - mean * scale loses when the mean is large. A channel that is constant gives
exact zeros and finite gradients under every preset. Flax has no weight standardization (its WeightNorm is
another method). `l2` is the penalty scale * sum w^2; its equivalent under plain SGD is
`optax.add_decayed_weights(2 * scale)`.

References. Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization", arXiv 1903.10520. Brock, De, Smith, "Characterizing signal propagation to close the
performance gap in unnormalized ResNets", arXiv 2101.08692. Reference code: deepmind-research/nfnets/base.py,
timm/layers/std_conv.py.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxtricks import _tree
from jaxtricks import axes as axes_
from jaxtricks._types import Array, Params, PathRule, Roles, Scalar

__all__ = ["PRESETS", "Hook", "l2", "standardize", "standardize_params", "standardized"]


class Preset(NamedTuple):
    """One convention: how epsilon enters, whether fan-in does, and how variance is counted.

    Attributes:
      mode: "clamp" = rsqrt(max(var * fan_in, eps)), "var" = 1 / sqrt(var + eps), "std" = 1 / (std + eps).
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


def standardize(
    kernel: Float[Array, "..."],
    gain: Scalar | None = None,
    *,
    preset: str = "nfnet",
    eps: float | None = None,
    out_axis: int | Sequence[int] = -1,
) -> Float[Array, "..."]:
    """Kernel with zero mean and fixed variance per output channel.

    w_hat = (w - mean) * s * gain, mean and var over everything but the output axis, N = fan_in:

        nfnet   s = 1 / sqrt(max(var * N, eps))       eps 1e-4, a clamp
        timm    s = 1 / (sqrt(var + eps) * sqrt(N))   eps 1e-6 (ScaledStdConv2d)
        bit     s = 1 / (sqrt(var) + eps)             eps 1e-5
        qiao    s = 1 / (sqrt(var) + eps)             eps 1e-5, var divided by N - 1

    Args:
      kernel: [..., out]; for grouped convolutions the input axis already holds in_features / groups.
      gain: one factor per output channel [out], or a scalar; None = 1.
      preset: "nfnet", "timm", "bit" or "qiao".
      eps: replaces the preset's epsilon, in the same place of the formula.
      out_axis: the axis (or axes: a Keras depthwise kernel (kh, kw, C, M) has two) that is not reduced.

    Returns:
      An array like the kernel. A channel whose weights are all equal gives zeros, with finite gradients.

    Raises:
      ValueError: unknown preset, a gain of the wrong shape, or a fan-in of one (depthwise 1x1).

    Example:
      >>> w = standardize(jnp.arange(12.0).reshape(2, 2, 1, 3))
      >>> bool(jnp.allclose(w.sum((0, 1, 2)), 0, atol=1e-6)), bool(jnp.allclose((w**2).sum((0, 1, 2)), 1))
      (True, True)

    References:
      Brock, De, Smith, arXiv 2101.08692; Qiao et al., arXiv 1903.10520.
    """
    rule = _preset(preset, eps)
    kernel = jnp.asarray(kernel)
    kept = _kept_axes(kernel, out_axis)
    reduced = tuple(i for i in range(kernel.ndim) if i not in kept)
    fan_in = math.prod(kernel.shape[i] for i in reduced)
    if fan_in < 2:
        raise ValueError(
            f"weightstd.standardize: a kernel of shape {tuple(kernel.shape)} has fan-in {fan_in}, which "
            "standardizing would turn to zero; leave it out (a depthwise 1x1 convolution?)"
        )
    w = jnp.asarray(kernel, _tree.wide_dtype(kernel))
    # Relative to one of its own weights a constant channel is exactly zero, and a large mean costs nothing.
    # The result does not depend on that weight, so no gradient needs to flow through it.
    one = tuple(slice(None) if i in kept else slice(1) for i in range(w.ndim))
    w = w - jax.lax.stop_gradient(w[one])
    w = w - jnp.mean(w, axis=reduced, keepdims=True)
    factor = _factor(jnp.sum(w * w, axis=reduced, keepdims=True), fan_in, rule)
    if gain is not None:
        factor = factor * _gain_like(gain, kernel, kept, w.dtype)
    return (w * factor).astype(kernel.dtype)


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
        numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        out_axis = numbers.rhs_spec[0]
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(self.kernel(rhs, out_axis))
        return jax.lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, numbers, **kwargs
        )

    def kernel(self, kernel: Array, out_axis: int = -1) -> Array:
        """What the convolution uses in place of `kernel`."""
        return standardize(kernel, self.gain, preset=self.preset, eps=self.eps, out_axis=out_axis)


def standardized(
    *, gain: float | None = None, preset: str = "nfnet", eps: float | None = None
) -> Hook:
    """A `conv_general_dilated=` argument for flax convolutions that standardizes their kernels.

    Args:
      gain: one fixed factor (an activation's gain, say); for learnable gains use `jt.nnx.WSConv`.
      preset: see `standardize`.
      eps: see `standardize`.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`; it finds the output axis from the
      dimension numbers.

    Raises:
      ValueError: unknown preset.

    Example:
      >>> numbers = ("NHWC", "HWIO", "NHWC")
      >>> conv, x, w = standardized(), jnp.ones((1, 4, 4, 2)), jnp.arange(54.0).reshape(3, 3, 2, 3)
      >>> conv(x, w, (1, 1), "VALID", dimension_numbers=numbers).shape
      (1, 2, 2, 3)
    """
    _preset(preset, eps)
    return Hook(gain, preset, eps)


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


def _preset(name: str, eps: float | None) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"weightstd: `preset` is {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name] if eps is None else PRESETS[name]._replace(eps=eps)


def _kept_axes(kernel: Array, out_axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = (out_axis,) if isinstance(out_axis, int) else tuple(out_axis)
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


def _out_axes(roles: Roles | None) -> int | tuple[int, ...]:
    if roles is None:
        return -1
    return axes_.positions(roles, "batch", "out", "none")
