"""Train the classifier in a second stage: params -> params, and optax masks.

Each function takes the parameters of the model you have, nested dicts
(`variables["params"]` of linen, `params` of `jt.nnx.functional`), and the path of its
head. Those that start a second stage also return a mask, True for what it trains. optax
does the rest:

    params, mask = decoupling.crt(params, head="head", key=key)
    tx = optax.partition({True: optax.sgd(0.1), False: optax.set_to_zero()}, mask)

(`optax.masked(tx, mask)` alone would add the raw gradients to everything else.) Draw
the batches of this stage balanced: `sampling.class_probabilities(counts, 0)`.

`head` is a regular expression for the path of the head's layer ("head", "Dense_0",
".*/classifier") or of its kernel ("head/kernel"), matched in full as in `agc.exclude`.

References:
  Kang et al., Decoupling representation and classifier for long-tailed recognition,
  arXiv 1910.09217.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtricks import _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Array, Key, Params, Scalar
from jaxtricks.longtail import heads
from jaxtricks.longtail._counts import floating

__all__ = [
    "crt",
    "disalign",
    "disalign_start",
    "fold_lws",
    "head_mask",
    "lws",
    "ncm",
    "tau_norm",
]

Keys = tuple[Any, ...]

Mask = Any
"""A tree like the parameters, of Python bools: what optax.partition and optax.masked take."""


class Head(NamedTuple):
    """Where a head is: the key paths of its layer, kernel, bias and everything that trains with it."""

    layer: Keys
    kernel: Keys
    bias: Keys | None
    all: frozenset[Keys]
    value: Any

    @property
    def classes(self) -> int:
        """Return C."""
        return self.value.shape[1]


def find(name: str, params: Params, head: str) -> Head:
    """Return the one kernel [D, C] that `head` names; raise with the paths there are."""
    leaves = _named_leaves(name, params)
    inside = [keys for keys in leaves if _matches(head, keys)]
    kernels = [
        keys
        for keys in inside
        if keys[-1] == "kernel" or re.fullmatch(head, path_of(keys))
    ]
    if len(kernels) > 1:  # "head/.*" matches the bias in full, too
        kernels = [keys for keys in kernels if keys[-1] == "kernel"] or kernels
    if len(kernels) != 1:
        some = (
            kernels
            or [keys for keys in leaves if keys[-1] == "kernel"]
            or list(leaves)
        )
        raise ValueError(
            f"longtail.decoupling.{name}: `head` {head!r} matches "
            f"{len(kernels) or 'no'} kernel{'s' * (len(kernels) != 1)}, and "
            f"must match one of {_listed(some)}"
        )
    kernel = kernels[0]
    if len(leaves[kernel].shape) != 2:
        raise ValueError(
            f"longtail.decoupling.{name}: the kernel {path_of(kernel)!r} has "
            f"shape {leaves[kernel].shape}, not [D, C]: pass the path of the "
            "classifier as `head`"
        )
    bias = (*kernel[:-1], "bias")
    bias = bias if bias in leaves else None
    everything = frozenset(inside) | {kernel} | ({bias} if bias else set())
    return Head(kernel[:-1], kernel, bias, everything, leaves[kernel])


def _named_leaves(name: str, params: Params) -> dict[Keys, Any]:
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
            raise ValueError(
                f"longtail.decoupling.{name}: `params` is not a nested dict at "
                f"{_tree.path_str(path)!r}: "
                'pass variables["params"] of linen or the params of jt.nnx.functional'
            )
        if not path or not hasattr(leaf, "shape"):
            raise ValueError(
                f"longtail.decoupling.{name}: `params` is a "
                f"{type(params).__name__} with a leaf that is not an array: "
                "give a nested dict of arrays"
            )
        leaves[tuple(key.key for key in path)] = leaf
    return leaves


def _matches(pattern: str, keys: Keys) -> bool:
    return any(
        re.fullmatch(pattern, path_of(keys[:n]))
        for n in range(1, len(keys) + 1)
    )


def path_of(keys: Keys) -> str:
    """Return the keys joined by "/"."""
    return "/".join(map(str, keys))


def _listed(paths: list[Keys], most: int = 12) -> str:
    names = [repr(path_of(keys)) for keys in paths]
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (
        len(names) > most
    )


def get(tree: Any, keys: Keys) -> Any:
    """Return the subtree at a key path."""
    for key in keys:
        tree = tree[key]
    return tree


def replaced(tree: Any, new: Mapping[Keys, Any]) -> Any:
    """Return the tree with other subtrees at some key paths."""
    if () in new:
        return new[()]
    out = dict(tree)
    for first in dict.fromkeys(keys[0] for keys in new):
        below = {
            keys[1:]: value for keys, value in new.items() if keys[0] == first
        }
        out[first] = below[()] if () in below else replaced(tree[first], below)
    return out


def beside(
    name: str, params: Params, classifier: Head, new: dict[str, Array]
) -> tuple[Params, Mask]:
    """Add leaves to the head's layer and return them with their mask."""
    for key in new:
        if key in get(params, classifier.layer):
            raise ValueError(
                f"longtail.decoupling.{name}: there is a {key!r} beside "
                f"{path_of(classifier.kernel)!r} already: pass the params of "
                "the first stage"
            )
    paths = {(*classifier.layer, key): value for key, value in new.items()}
    out = replaced(params, paths)
    return out, mask(out, frozenset(paths))


def mask(params: Params, train: frozenset[Keys]) -> Mask:
    """Return a tree of bools that is True at some key paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: tuple(key.key for key in path) in train, params
    )


# The second stages.


Compat = Literal["reference"] | None


@checked
def crt(
    params: Params,
    *,
    head: str,
    key: Key,
    init: Callable[..., Any] | None = None,
) -> tuple[Params, Mask]:
    """Re-initialize the classifier and train the head alone (cRT).

    Args:
      params: nested dict of the trained model.
      head: path of the head, see the module.
      key: for the new kernel.
      init: initializer init(key, shape, dtype) of the kernel; None = normal with
        variance 1 / D, as in Flax. The bias becomes 0.

    Returns:
      (params, mask); the mask is True for the kernel, the bias, and whatever else
      `head` matches.

    Raises:
      ValueError: if `head` finds no kernel or several, or one that is not [D, C].

    >>> params = {"trunk": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 3))}}
    >>> fresh, mask = crt(params, head="head", key=jax.random.key(0), init=jax.nn.initializers.zeros)
    >>> float(fresh["head"]["kernel"].sum()), mask
    (0.0, {'head': {'kernel': True}, 'trunk': {'kernel': False}})

    References:
      Kang et al., arXiv 1910.09217, section 4.2.
    """
    classifier = find("crt", params, head)
    draw = init or jax.nn.initializers.lecun_normal()
    new = {
        classifier.kernel: draw(
            key, classifier.value.shape, classifier.value.dtype
        )
    }
    if classifier.bias is not None:
        new[classifier.bias] = jnp.zeros_like(get(params, classifier.bias))
    return replaced(params, new), mask(params, classifier.all)


@checked
def lws(params: Params, *, head: str) -> tuple[Params, Mask]:
    """Add a factor per class, initially 1, which trains alone (LWS).

    The result fits a model whose head is `jt.nnx.LWSHead` or `jt.linen.LWSHead`. To
    train the model as it is, put `fold_lws` in front of it: apply(fold_lws(params,
    head="head"), ...).

    Args:
      params: nested dict of the trained model.
      head: path of the head, see the module.

    Returns:
      (params with "scale" [C] beside the kernel, mask); the mask is True for that
      scale.

    Raises:
      ValueError: as `crt`, or if the head has a scale already.

    >>> scaled, mask = lws({"head": {"kernel": jnp.ones((2, 3))}}, head="head")
    >>> scaled["head"]["scale"], mask
    (Array([1., 1., 1.], dtype=float32), {'head': {'kernel': False, 'scale': True}})

    References:
      Kang et al., arXiv 1910.09217, section 4.2.
    """
    classifier = find("lws", params, head)
    return beside(
        "lws",
        params,
        classifier,
        {"scale": jnp.ones(classifier.classes, classifier.value.dtype)},
    )


@checked
def fold_lws(params: Params, *, head: str) -> Params:
    """Fold the factors of `lws` into the kernel and bias: f_c w_c, f_c b_c.

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
    classifier = find("fold_lws", params, head)
    layer = get(params, classifier.layer)
    if not isinstance(layer.get("scale"), Array):
        raise ValueError(
            "longtail.decoupling.fold_lws: there is no scale beside "
            f"{path_of(classifier.kernel)!r}: pass the params that "
            "decoupling.lws returned"
        )
    paths = (
        [classifier.kernel]
        if classifier.bias is None
        else [classifier.kernel, classifier.bias]
    )
    folded: dict[Keys, Any] = {}
    for path in paths:
        leaf = jnp.asarray(get(params, path))
        wide = heads.lws(jnp.atleast_2d(leaf), layer["scale"]).reshape(
            leaf.shape
        )
        folded[path] = wide.astype(leaf.dtype)
    whole = replaced(params, folded)
    rest = {
        k: v for k, v in get(whole, classifier.layer).items() if k != "scale"
    }
    return replaced(whole, {classifier.layer: rest})


@checked
def disalign(
    params: Params, *, head: str, compat: Compat = None
) -> tuple[Params, Mask]:
    """Add calibration parameters to the head, which train alone (DisAlign).

    The result fits a model whose head is `jt.nnx.DisAlignHead` or
    `jt.linen.DisAlignHead`. Train with class weights:
    `weights.inverse_frequency(counts, rho)`.

    Args:
      params: nested dict of the trained model.
      head: path of the head, see the module.
      compat: None starts from the function of the trained model (all zeros);
        "reference" from logit_scale 1 and confidence weights 0.1, which is another one.

    Returns:
      (params with logit_scale [C], logit_bias [C], confidence_kernel [D, 1] and
      confidence_bias [1] beside the kernel, mask); the mask is True for these four.

    Raises:
      ValueError: as `crt`, if the head has such parameters already, or for another
        compat.

    References:
      Zhang et al., Distribution alignment, arXiv 2103.16370, section 3.3.
    """
    classifier = find("disalign", params, head)
    start = disalign_start(
        classifier.value.shape, classifier.value.dtype, compat
    )
    return beside("disalign", params, classifier, start)


@checked
def tau_norm(
    params: Params, tau: Scalar, *, head: str, compat: Compat = None
) -> Params:
    """Divide each class's weights by a power of their norm: w_c / ||w_c||^tau. Trains nothing.

    Choose tau in [0, 2] by balanced accuracy on held-out data. The bias stays as it is,
    so that tau = 0 is the trained model.

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
    classifier = find("tau_norm", params, head)
    new = {
        classifier.kernel: heads.tau_normalize(classifier.value, tau).astype(
            classifier.value.dtype
        )
    }
    if compat == "reference" and classifier.bias is not None:
        new[classifier.bias] = jnp.zeros_like(get(params, classifier.bias))
    return replaced(params, new)


@checked
def ncm(params: Params, centroids: heads.Centroids, *, head: str) -> Params:
    """Make a linear head of class means; nothing trains.

    w_c = 2 mu_c, b_c = -||mu_c||^2

    x . w_c + b_c = -||x - mu_c||^2 + ||x||^2: the classes' order and probabilities are
    those of `heads.ncm`, for features that are not normalised. Others are not a linear
    head: use `heads.ncm`.

    Args:
      params: nested dict of the trained model, whose head has a bias.
      centroids: of `heads.centroids(features, labels, C, "un")`, [C, D].
      head: path of the head, see the module.

    Returns:
      Params, in the dtypes they had; the bias of a class without examples is -inf.

    Raises:
      ValueError: as `crt`, for a head without bias, and for centroids that do not fit
        it.

    References:
      Kang et al., arXiv 1910.09217, section 4.1.
    """
    classifier = find("ncm", params, head)
    if classifier.bias is None:
        raise ValueError(
            "longtail.decoupling.ncm: there is no bias beside "
            f"{path_of(classifier.kernel)!r}: give the head one, or use "
            "heads.ncm on the features"
        )
    if (
        centroids.kind != "un"
        or centroids.means.shape != classifier.value.shape[::-1]
    ):
        raise ValueError(
            f"longtail.decoupling.ncm: `centroids` of kind {centroids.kind!r} "
            "and shape "
            f"{centroids.means.shape} do not fit the kernel "
            f"{classifier.value.shape}: pass those of kind "
            '"un", [C, D], or use heads.ncm on the features'
        )
    means = floating(jnp.asarray(centroids.means))
    bias = jnp.where(centroids.present, -jnp.sum(means**2, axis=-1), -jnp.inf)
    new = {classifier.kernel: 2 * means.T, classifier.bias: bias}
    return replaced(
        params,
        {path: x.astype(get(params, path).dtype) for path, x in new.items()},
    )


@checked
def head_mask(params: Params, *, head: str) -> Mask:
    """Return a mask that is True for the leaves that `head` matches.

    Args:
      params: nested dict; shapes suffice.
      head: path of the head, see the module.

    Returns:
      A tree of Python bools, for optax.partition.

    Raises:
      ValueError: as `crt`.
    """
    return mask(params, find("head_mask", params, head).all)


@checked
def disalign_start(
    shape: tuple[int, ...], dtype: Any, compat: Compat
) -> dict[str, Array]:
    """Return DisAlign's initial parameters for a head of shape [D, C]."""
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
    """Raise for anything but None and "reference"."""
    if compat not in (None, "reference"):
        raise ValueError(
            f'longtail.decoupling.{name}: `compat` is {compat!r}: pass None or "reference"'
        )
