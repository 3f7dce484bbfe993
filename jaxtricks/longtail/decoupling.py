"""The second stage of decoupled training: a new classifier on a trained model's features.

Each function takes the parameters of the model you have, nested dicts (`variables["params"]` of
linen, `params` of `jt.nnx.functional`), and the path of its head. Those that start a second stage
also return a mask, True for what it trains. optax does the rest:

    params, mask = decoupling.crt(params, head="head", key=key)
    tx = optax.partition({True: optax.sgd(0.1), False: optax.set_to_zero()}, mask)

(`optax.masked(tx, mask)` alone would add the raw gradients to everything else.) Draw the batches of
this stage balanced: `sampling.class_probabilities(counts, 0)`.

`head` is a regular expression for the path of the head's layer ("head", "Dense_0", ".*/classifier")
or of its kernel ("head/kernel"), matched in full as in `agc.exclude`.

References.
  Kang et al., Decoupling representation and classifier for long-tailed recognition, arXiv 1910.09217.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Key, Params, Scalar
from jaxtricks.longtail import heads, place
from jaxtricks.longtail._counts import floating

Mask = place.Mask
Compat = Literal["reference"] | None


@checked
def crt(
    params: Params, *, head: str, key: Key, init: Callable[..., Any] | None = None
) -> tuple[Params, Mask]:
    """Classifier re-training: the head drawn anew, everything else kept; only the head trains.

    Args:
      params: nested dict of the trained model.
      head: path of the head, see the module.
      key: for the new kernel.
      init: initializer init(key, shape, dtype) of the kernel; None = normal with variance 1 / D, as
        flax's own. The bias becomes 0.

    Returns:
      (params, mask); the mask is True for the kernel, the bias, and whatever else `head` matches.

    Raises:
      ValueError: if `head` finds no kernel or several, or one that is not [D, C].

    >>> params = {"trunk": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 3))}}
    >>> fresh, mask = crt(params, head="head", key=jax.random.key(0), init=jax.nn.initializers.zeros)
    >>> float(fresh["head"]["kernel"].sum()), mask
    (0.0, {'head': {'kernel': True}, 'trunk': {'kernel': False}})

    References:
      Kang et al., arXiv 1910.09217, section 4.2.
    """
    found = place.find("crt", params, head)
    draw = init or jax.nn.initializers.lecun_normal()
    new = {found.kernel: draw(key, found.value.shape, found.value.dtype)}
    if found.bias is not None:
        new[found.bias] = jnp.zeros_like(place.get(params, found.bias))
    return place.replaced(params, new), place.mask(params, found.all)


@checked
def lws(params: Params, *, head: str) -> tuple[Params, Mask]:
    """Learnable weight scaling: a factor per class, initially 1, beside the head's kernel; it trains alone.

    The result fits a model whose head is `jt.nnx.LWSHead` or `jt.linen.LWSHead`. To train the model as
    it is, put `fold_lws` in front of it: apply(fold_lws(params, head="head"), ...).

    Args:
      params: nested dict of the trained model.
      head: path of the head, see the module.

    Returns:
      (params with "scale" [C] beside the kernel, mask); the mask is True for that scale.

    Raises:
      ValueError: as `crt`, or if the head has a scale already.

    >>> scaled, mask = lws({"head": {"kernel": jnp.ones((2, 3))}}, head="head")
    >>> scaled["head"]["scale"], mask
    (Array([1., 1., 1.], dtype=float32), {'head': {'kernel': False, 'scale': True}})

    References:
      Kang et al., arXiv 1910.09217, section 4.2.
    """
    found = place.find("lws", params, head)
    return place.beside("lws", params, found, {"scale": jnp.ones(found.classes, found.value.dtype)})


@checked
def fold_lws(params: Params, *, head: str) -> Params:
    """The parameters of the plain model that computes what `lws` has trained: f_c w_c, f_c b_c.

    Differentiable in the scale.

    Args:
      params: as `lws` returned them, trained.
      head: path of the head, see the module.

    Returns:
      Params without the scale, in the dtypes they had.

    Raises:
      ValueError: as `crt`, or if the head has no scale.

    References:
      Kang et al., arXiv 1910.09217, equation 6.
    """
    found = place.find("fold_lws", params, head)
    own = place.get(params, found.layer)
    if not isinstance(own.get("scale"), Array):
        raise ValueError(
            f"longtail.decoupling.fold_lws: there is no scale beside {place.path_of(found.kernel)!r}: pass "
            "the params that decoupling.lws returned"
        )
    paths = [found.kernel] if found.bias is None else [found.kernel, found.bias]
    folded: dict[place.Keys, Any] = {}
    for path in paths:
        leaf = jnp.asarray(place.get(params, path))
        wide = heads.lws(jnp.atleast_2d(leaf), own["scale"]).reshape(leaf.shape)
        folded[path] = wide.astype(leaf.dtype)
    whole = place.replaced(params, folded)
    rest = {k: v for k, v in place.get(whole, found.layer).items() if k != "scale"}
    return place.replaced(whole, {found.layer: rest})


@checked
def disalign(params: Params, *, head: str, compat: Compat = None) -> tuple[Params, Mask]:
    """Distribution alignment: calibration parameters beside the head's kernel; they train alone.

    The result fits a model whose head is `jt.nnx.DisAlignHead` or `jt.linen.DisAlignHead`. Train with
    class weights: `weights.inverse_frequency(counts, rho)`.

    Args:
      params: nested dict of the trained model.
      head: path of the head, see the module.
      compat: None starts from the function of the trained model (all zeros); "reference" from
        logit_scale 1 and confidence weights 0.1, which is another one.

    Returns:
      (params with logit_scale [C], logit_bias [C], confidence_kernel [D, 1] and confidence_bias [1]
      beside the kernel, mask); the mask is True for these four.

    Raises:
      ValueError: as `crt`, if the head has such parameters already, or for another compat.

    References:
      Zhang et al., Distribution alignment, arXiv 2103.16370, section 3.3.
    """
    found = place.find("disalign", params, head)
    start = disalign_start(found.value.shape, found.value.dtype, compat)
    return place.beside("disalign", params, found, start)


@checked
def tau_norm(params: Params, tau: Scalar, *, head: str, compat: Compat = None) -> Params:
    """Divide each class's weights by a power of their norm: w_c / ||w_c||^tau. Trains nothing.

    Choose tau in [0, 2] by balanced accuracy on held-out data. The bias stays as it is, so that tau = 0
    is the trained model.

    Args:
      params: nested dict of the trained model.
      tau: strength. May be traced, differentiated and vmapped.
      head: path of the head, see the module.
      compat: "reference" sets the bias to 0, as the authors' code evaluates.

    Returns:
      Params, in the dtypes they had.

    Raises:
      ValueError: as `crt`, or for another compat.

    >>> tau_norm({"head": {"kernel": jnp.array([[4.0, 1.0]])}}, 0.5, head="head")["head"]["kernel"]
    Array([[2., 1.]], dtype=float32)

    References:
      Kang et al., arXiv 1910.09217, equation 4.
    """
    check_compat("tau_norm", compat)
    found = place.find("tau_norm", params, head)
    new = {found.kernel: heads.tau_normalize(found.value, tau).astype(found.value.dtype)}
    if compat == "reference" and found.bias is not None:
        new[found.bias] = jnp.zeros_like(place.get(params, found.bias))
    return place.replaced(params, new)


@checked
def ncm(params: Params, centroids: heads.Centroids, *, head: str) -> Params:
    """Nearest class mean as a linear head: w_c = 2 mu_c, b_c = -||mu_c||^2. Trains nothing.

    x . w_c + b_c = -||x - mu_c||^2 + ||x||^2: the classes' order and probabilities are those of
    `heads.ncm`, for features that are not normalised. Others are no linear head: use `heads.ncm`.

    Args:
      params: nested dict of the trained model, whose head has a bias.
      centroids: of `heads.centroids(features, labels, C, "un")`, [C, D].
      head: path of the head, see the module.

    Returns:
      Params, in the dtypes they had; the bias of a class without examples is -inf.

    Raises:
      ValueError: as `crt`, for a head without bias, and for centroids that do not fit it.

    References:
      Kang et al., arXiv 1910.09217, section 4.1.
    """
    found = place.find("ncm", params, head)
    if found.bias is None:
        raise ValueError(
            f"longtail.decoupling.ncm: there is no bias beside {place.path_of(found.kernel)!r}: give the "
            "head one, or use heads.ncm on the features"
        )
    if centroids.kind != "un" or centroids.means.shape != found.value.shape[::-1]:
        raise ValueError(
            f"longtail.decoupling.ncm: `centroids` of kind {centroids.kind!r} and shape "
            f"{centroids.means.shape} do not fit the kernel {found.value.shape}: pass those of kind "
            '"un", [C, D], or use heads.ncm on the features'
        )
    means = floating(jnp.asarray(centroids.means))
    bias = jnp.where(centroids.seen, -jnp.sum(means**2, axis=-1), -jnp.inf)
    new = {found.kernel: 2 * means.T, found.bias: bias}
    return place.replaced(
        params, {path: x.astype(place.get(params, path).dtype) for path, x in new.items()}
    )


@checked
def head_mask(params: Params, *, head: str) -> Mask:
    """True for the head's kernel, its bias, and whatever else `head` matches; False elsewhere.

    Args:
      params: nested dict; shapes suffice.
      head: path of the head, see the module.

    Returns:
      A tree of Python bools, for optax.partition.

    Raises:
      ValueError: as `crt`.
    """
    return place.mask(params, place.find("head_mask", params, head).all)


@checked
def disalign_start(shape: tuple[int, ...], dtype: Any, compat: Compat) -> dict[str, Array]:
    """{parameter: initial value} of DisAlign's calibration of a head of shape [D, C]."""
    features, classes = shape
    check_compat("disalign", compat)
    scale, confidence = (1.0, 0.1) if compat == "reference" else (0.0, 0.0)
    return {
        "logit_scale": jnp.full(classes, scale, dtype),
        "logit_bias": jnp.zeros(classes, dtype),
        "confidence_kernel": jnp.full((features, 1), confidence, dtype),
        "confidence_bias": jnp.zeros(1, dtype),
    }


@checked
def check_compat(name: str, compat: Any) -> None:
    """An error for anything but None and "reference"."""
    if compat not in (None, "reference"):
        raise ValueError(
            f'longtail.decoupling.{name}: `compat` is {compat!r}: pass None or "reference"'
        )
