"""Scale the loss, and skip the steps whose gradients overflow.

Loss scales as pytrees, scaled differentiation, and the optax transformations that
unscale, skip and count.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from jaxtricks import _compat, _dtypes, _jaxpr, _tree
from jaxtricks._arguments import checked, known_number
from jaxtricks._partition import without_changes
from jaxtricks._typing import Array, Params, Scalar
from jaxtricks.amp._autocast import autocast
from jaxtricks.amp._policy import Policy, as_policy

P = ParamSpec("P")
T = TypeVar("T")
AxisName = str | tuple[str, ...] | None


@_tree.node
class NoOpLossScale:
    """No scaling; same methods as the others, so code need not ask."""

    @property
    def value(self) -> Array:
        """1, float32 []."""
        return jnp.float32(1)

    def scale(self, tree: T) -> T:
        """Return the tree unchanged."""
        return tree

    def unscale(self, tree: T) -> T:
        """Return the tree unchanged."""
        return tree

    def adjust(self, grads_finite: Array) -> "NoOpLossScale":
        """Return itself."""
        return self


@_tree.node
class StaticLossScale:
    """A fixed scale.

    Attributes:
      value: the scale; float32 [] when an array.
    """

    value: Scalar

    def scale(self, tree: T) -> T:
        """Multiply floating and complex leaves by the scale, in float32 or better."""
        return _multiply(tree, jnp.float32(self.value))

    def unscale(self, tree: T) -> T:
        """Divide floating and complex leaves by the scale, in float32 or better."""
        return _multiply(tree, 1 / jnp.float32(self.value))

    def adjust(self, grads_finite: Array) -> "StaticLossScale":
        """Return itself."""
        return self


@_tree.node
class DynamicLossScale:
    """A scale that grows while gradients are finite and backs off when they are not.

    finite:     clean += 1; at growth_interval: value *= growth, clean = 0
    non-finite: value = max(value * backoff, min_scale), clean = 0

    Attributes:
      value: the scale, float32 [].
      clean: finite steps since the last change, int32 [].
      growth_interval, growth, backoff, min_scale: see `amp.dynamic_loss_scale`.
    """

    value: Scalar = 2.0**15
    clean: Scalar = 0
    growth_interval: int = _tree.static(default=2000)
    growth: float = _tree.static(default=2.0)
    backoff: float = _tree.static(default=0.5)
    min_scale: float = _tree.static(default=1.0)

    def __post_init__(self) -> None:
        """Refuse settings under which training stands still."""
        rules = self.growth_interval, self.growth, self.backoff, self.min_scale
        check_settings("DynamicLossScale", ("value", self.value), *rules)

    def scale(self, tree: T) -> T:
        """Multiply floating and complex leaves by the scale, in float32 or better."""
        return StaticLossScale(self.value).scale(tree)

    def unscale(self, tree: T) -> T:
        """Divide floating and complex leaves by the scale, in float32 or better."""
        return StaticLossScale(self.value).unscale(tree)

    def adjust(self, grads_finite: Array) -> "DynamicLossScale":
        """Return the scale for the next step.

        Args:
          grads_finite: bool [], `all_finite` of this step's gradients.
        """
        rules = self.growth_interval, self.growth, self.backoff, self.min_scale
        value, clean = next_scale(self.value, self.clean, grads_finite, *rules)
        # Not by the constructor, whose check would wait for the value in every step.
        return jax.tree.unflatten(jax.tree.structure(self), [value, clean])


def check_settings(
    name: str,
    init: tuple[str, Scalar],
    growth_interval: Scalar,
    growth: Scalar,
    backoff: Scalar,
    min_scale: Scalar,
) -> None:
    """Raise ValueError for numbers with which the scale runs away or stands still.

    Traced arrays are not checked.
    """
    rules = [
        (*init, "a finite number > 0", lambda x: 0 < x < math.inf),
        (
            "growth_interval",
            growth_interval,
            "a whole number >= 1",
            lambda x: x >= 1 and x % 1 == 0,
        ),
        ("growth", growth, "a finite number >= 1", lambda x: 1 <= x < math.inf),
        ("backoff", backoff, "a number between 0 and 1", lambda x: 0 < x < 1),
        (
            "min_scale",
            min_scale,
            "a finite number > 0",
            lambda x: 0 < x < math.inf,
        ),
    ]
    for argument, value, requirement, holds in rules:
        number = known_number(value)
        if number is not None and not holds(number):
            raise ValueError(
                f"amp.{name}: `{argument}` is {value}: give {requirement}"
            )
    argument, first = init
    low, high = known_number(min_scale), known_number(first)
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"amp.{name}: `min_scale` is {min_scale}, above `{argument}`, "
            f"{first}: give a smaller one"
        )


def check_max_consecutive(
    name: str,
    max_consecutive: Scalar,
) -> None:
    """Raise ValueError for a limit that is not a positive whole number."""
    limit = known_number(max_consecutive)
    if limit is not None and not (limit >= 1 and limit % 1 == 0):
        raise ValueError(
            f"amp.{name}: `max_consecutive` is {max_consecutive}: give a whole "
            "number >= 1"
        )


def next_scale(
    value: Scalar,
    clean: Scalar,
    finite: Array,
    growth_interval: Scalar,
    growth: Scalar,
    backoff: Scalar,
    min_scale: Scalar,
) -> tuple[Array, Array]:
    """Return the scale and the clean steps after a step; see `DynamicLossScale`.

    float32 [] and int32 [].
    """
    value = jnp.float32(value)
    clean = jnp.int32(clean) + 1
    grows = clean >= jnp.asarray(growth_interval)
    larger = jnp.where(grows, value * jnp.float32(growth), value)
    # The scale itself must not overflow.
    larger = jnp.where(jnp.isfinite(larger), larger, value)
    smaller = jnp.maximum(value * jnp.float32(backoff), jnp.float32(min_scale))
    new_value = jnp.where(finite, larger, smaller)
    new_clean = jnp.where(finite & ~grows, clean, 0)
    return new_value, new_clean


@checked
def all_finite(
    tree: Any,
    axis_name: AxisName = None,
) -> Array:
    """Return whether no floating or complex leaf has an inf or NaN.

    bool [], True for an empty tree.

    Args:
      tree: gradients, say.
      axis_name: mapped axes (of shard_map or pmap) along which the leaves differ; the
        answer is for all of them together. Under jit, arrays are whole and none is
        needed.
    """
    checks = [
        jnp.isfinite(x).all()
        for x in jax.tree.leaves(tree)
        if _dtypes.is_inexact(x)
    ]
    finite = jnp.stack(checks).all() if checks else jnp.bool_(True)
    if axis_name is None:
        return finite
    return jax.lax.pmin(finite.astype(jnp.int32), axis_name) > 0


@checked
def select_tree(
    pred: Array,
    on_true: T,
    on_false: T,
) -> T:
    """Return `where(pred, on_true, on_false)` leaf by leaf, keys and integers included.

    pred is bool [].
    """
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), on_true, on_false)


def _multiply(tree: T, factor: Array) -> T:
    def leaf(x: Any) -> Any:
        if not _dtypes.is_inexact(x):
            return x
        x = jnp.asarray(x)
        x = x.astype(_dtypes.wide_dtype(x))
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            # Part by part: as a complex number the factor would make NaN of an infinite
            # part.
            real, imag = (
                part * factor.astype(part.dtype) for part in (x.real, x.imag)
            )
            return jax.lax.complex(real, imag)
        return x * factor.astype(x.dtype)

    return jax.tree.map(leaf, tree)


# Scaled differentiation, and the transformations that unscale, skip and count.


LossScale = NoOpLossScale | StaticLossScale | DynamicLossScale


class DynamicLossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: the scale that the next gradients are expected to carry, float32 [].
      clean: finite steps since the scale last changed, int32 [].
      skipped: steps skipped so far, int32 [].
      consecutive: skipped steps since the last finite one, int32 [].
      max_consecutive: what `check_skipped` allows, int32 [].
      inner_state: state of the wrapped transformation.
    """

    scale: Any
    clean: Any
    skipped: Any
    consecutive: Any
    max_consecutive: Any
    inner_state: Any

    def metrics(self) -> dict[str, Any]:
        """Return what `jt.metrics` reports."""
        return {"amp/loss_scale": self.scale, "amp/skipped_steps": self.skipped}


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      consecutive: skipped steps since the last finite one, int32 [].
      skipped: steps skipped so far, int32 [].
      max_consecutive: what `check_skipped` allows, int32 [].
      inner_state: state of the wrapped transformation.
    """

    consecutive: Any
    skipped: Any
    max_consecutive: Any
    inner_state: Any

    def metrics(self) -> dict[str, Any]:
        """Return what `jt.metrics` reports."""
        return {"amp/skipped_steps": self.skipped}


@checked
def value_and_grad(
    loss_fn: Callable[P, Any],
    policy: Policy | str | None = None,
    *,
    scale: Scalar | LossScale | None = None,
    has_aux: bool = False,
    argnums: int | tuple[int, ...] = 0,
) -> Callable[P, tuple[Any, Any]]:
    """Return a function of the unscaled loss and the gradients of scale * loss.

    Args:
      loss_fn: (params, *args) -> loss [] (or (loss, aux)).
      policy: `autocast` loss_fn with it; gradients come in the dtype of the arguments.
        None leaves loss_fn as it is. float16 without a scale warns.
      scale: float32 [] (`amp.loss_scale(opt_state)`), or any of the loss scales; None
        is 1.
      has_aux: loss_fn returns (loss, aux).
      argnums: as in jax.value_and_grad.

    Returns:
      A function with the arguments of loss_fn that returns (loss, grads) or ((loss,
      aux), grads). The loss is float32 or better; the gradients still carry the scale,
      which `dynamic_loss_scale` (or `scale.unscale`) divides out.

    Raises:
      ValueError: when called, if loss_fn changes an argument in place: the change would
        be lost.

    Example:
      >>> value_and_grad(lambda w: w**2, scale=8.0)(jnp.float32(3.0))
      (Array(9., dtype=float32), Array(48., dtype=float32))
    """
    fn = without_changes(loss_fn, "autocast inside flax.nnx.value_and_grad")
    if policy is not None:
        policy = as_policy(policy)
        if policy.compute == jnp.float16 and scale is None:
            warnings.warn(
                "amp.value_and_grad: float16 gradients below 6e-8 become zero "
                "without loss scaling; pass scale=amp.loss_scale(opt_state) "
                "and wrap the optimizer in amp.dynamic_loss_scale",
                stacklevel=2,
            )
        fn = autocast(loss_fn, policy)
    factor = jnp.float32(1 if scale is None else getattr(scale, "value", scale))

    def scaled(*args: P.args, **kwargs: P.kwargs) -> Any:
        out = fn(*args, **kwargs)
        loss, aux = out if has_aux else (out, None)
        # A float16 loss times 2**15 would overflow: scale in float32 at least.
        loss = loss.astype(_dtypes.wide_dtype(loss))
        return loss * factor.astype(loss.dtype), (loss, aux)

    differentiated = jax.value_and_grad(scaled, argnums, has_aux=True)

    def run(*args: P.args, **kwargs: P.kwargs) -> tuple[Any, Any]:
        (_, (loss, aux)), grads = differentiated(*args, **kwargs)
        return ((loss, aux) if has_aux else loss), grads

    return run


@checked
def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    init: Scalar = 2.0**15,
    growth_interval: Scalar = 2000,
    growth: Scalar = 2.0,
    backoff: Scalar = 0.5,
    min_scale: Scalar = 1.0,
    max_consecutive: Scalar = 50,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide gradients by the loss scale, skip non-finite steps, adapt the scale.

    Outermost in a chain (around `optax.MultiSteps` too), so that clipping and moments
    see unscaled gradients. A skipped step returns zero updates and leaves the inner
    state as it was.

    Args:
      inner: the transformation to protect.
      init: first scale.
      growth_interval: finite steps before the scale is multiplied by `growth`.
      growth, backoff: factors after growth_interval finite steps and after a non-finite
        one.
      min_scale: the scale never falls below it.
      max_consecutive: more skipped steps in a row than this make `check_skipped` raise.
        A scale that is too large is halved once a step, from 2**15 to 1 in 15: more are
        not the scale's fault.
      axis_name: see `all_finite`: devices that hold different gradients skip together.

    Returns:
      A GradientTransformation; read the scale with `loss_scale(opt_state)`.

    Raises:
      ValueError: a number with which the scale runs away or stands still: `init` that
        is not finite and positive, growth or growth_interval below 1, backoff outside
        (0, 1), min_scale not in (0, init], max_consecutive below 1; (from init) another
        loss scale inside.

    References:
      Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2.
    """
    name = "dynamic_loss_scale"
    check_settings(
        name, ("init", init), growth_interval, growth, backoff, min_scale
    )
    check_max_consecutive(name, max_consecutive)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> DynamicLossScaleState:
        # Two scales would divide twice.
        inner_state = inner.init(params)
        if _states(inner_state, DynamicLossScaleState):
            raise ValueError(
                "amp.dynamic_loss_scale: `inner` has a loss scale too, which "
                "would divide again; keep the outermost one"
            )
        counters = (
            jnp.int32(0),
            jnp.int32(0),
            jnp.int32(0),
            jnp.int32(max_consecutive),
        )
        return DynamicLossScaleState(jnp.float32(init), *counters, inner_state)

    def update_fn(
        updates: Any,
        state: DynamicLossScaleState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Any, DynamicLossScaleState]:
        unscale = StaticLossScale(state.scale).unscale
        finite = all_finite(unscale(updates), axis_name)

        def step(grads: Any, inner_state: Any) -> Any:
            updates, new_state = inner.update(
                unscale(grads), inner_state, params, **extra
            )
            # Moments of 16 bits stay so: the gradients that they take in are wider now.
            return updates, jax.tree.map(_as_before, new_state, inner_state)

        updates, inner_state = _guarded(
            step, finite, updates, state.inner_state
        )
        scale, clean = next_scale(
            state.scale,
            state.clean,
            finite,
            growth_interval,
            growth,
            backoff,
            min_scale,
        )
        skipped, consecutive = _counted(finite, state)
        counters = clean, skipped, consecutive, state.max_consecutive
        return updates, DynamicLossScaleState(scale, *counters, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyrefly: ignore


@checked
def skip_nonfinite(
    inner: optax.GradientTransformation,
    max_consecutive: Scalar = 5,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skip steps whose gradients are not finite; never apply them.

    Args:
      inner: the transformation to protect.
      max_consecutive: more skipped steps in a row than this make `check_skipped` raise.
      axis_name: see `all_finite`.

    Returns:
      A GradientTransformation: `dynamic_loss_scale` without the scale.

    Raises:
      ValueError: max_consecutive below 1.
    """
    check_max_consecutive("skip_nonfinite", max_consecutive)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> SkipNonfiniteState:
        # Three arrays, not one thrice: a donated state may not hold a buffer twice.
        counters = jnp.int32(0), jnp.int32(0), jnp.int32(max_consecutive)
        return SkipNonfiniteState(*counters, inner.init(params))

    def update_fn(
        updates: Any,
        state: SkipNonfiniteState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Any, SkipNonfiniteState]:
        finite = all_finite(updates, axis_name)

        def step(grads: Any, inner_state: Any) -> Any:
            return inner.update(grads, inner_state, params, **extra)

        updates, inner_state = _guarded(
            step, finite, updates, state.inner_state
        )
        skipped, consecutive = _counted(finite, state)
        return updates, SkipNonfiniteState(
            consecutive, skipped, state.max_consecutive, inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyrefly: ignore


@checked
def loss_scale(opt_state: Any) -> Array:
    """Return the scale of the one `dynamic_loss_scale` in an optimizer state.

    float32 [].

    Raises:
      ValueError: no or several loss scales.
    """
    states = _states(opt_state, DynamicLossScaleState)
    if len(states) != 1:
        raise ValueError(
            f"amp.loss_scale: `opt_state` has {len(states)} loss scales; wrap "
            "the whole chain in amp.dynamic_loss_scale once"
        )
    return jnp.asarray(states[0].scale)  # an nnx.Optimizer holds Variables


@checked
def check_skipped(opt_state: Any) -> None:
    """Raise if more steps in a row were skipped than max_consecutive allows.

    Reads from the device.

    Args:
      opt_state: with a `dynamic_loss_scale` or `skip_nonfinite` in it; without, nothing
        is checked.

    Raises:
      FloatingPointError: with the number of skipped steps.
    """
    for state in _states(opt_state, _SKIPPING):
        if state.consecutive > state.max_consecutive:
            raise FloatingPointError(
                "amp.check_skipped: gradients were not finite for "
                f"{int(state.consecutive)} steps in a row; lower the learning "
                "rate or look for the first NaN with jax_debug_nans"
            )


@checked
def step_applied(before: Any, after: Any) -> Array:
    """Return whether the step between two optimizer states was applied: bool [].

    What a step changes besides parameters, such as the statistics of a batch
    normalization, must stay as it was when the step is skipped:

        applied = amp.step_applied(opt_state, new_opt_state)
        model_state = amp.select_tree(applied, new_model_state, model_state)

    Args:
      before, after: optimizer states around one `update`.

    Raises:
      ValueError: nothing in them skips steps.

    Example:
      >>> tx = dynamic_loss_scale(optax.sgd(1.0))
      >>> state = tx.init(jnp.ones(2))
      >>> bool(step_applied(state, tx.update(jnp.full(2, jnp.nan), state)[1]))
      False
    """
    old_states, new_states = (
        _states(before, _SKIPPING),
        _states(after, _SKIPPING),
    )
    if not old_states or not new_states:
        raise ValueError(
            "amp.step_applied: `before` has neither dynamic_loss_scale nor "
            "skip_nonfinite: wrap the optimizer in one of them"
        )
    are_applied = [
        jnp.asarray(new.skipped) == jnp.asarray(old.skipped)
        for old, new in zip(old_states, new_states, strict=False)
    ]
    return jnp.stack(are_applied).all()


_SKIPPING = (DynamicLossScaleState, SkipNonfiniteState)


def _counted(
    finite: Array,
    state: Any,
) -> tuple[Array, Array]:
    """Return (skipped, consecutive) after a step."""
    skipped = state.skipped + (~finite).astype(jnp.int32)
    consecutive = jnp.where(finite, 0, state.consecutive + 1)
    return skipped, consecutive


def _as_before(new: Any, old: Any) -> Any:
    """Return a leaf of a new state in the dtype of the old one."""
    for is_kind in (_dtypes.is_floating, _is_complex):
        if is_kind(new) and is_kind(old):
            return new.astype(old.dtype)
    return new


def _is_complex(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.complexfloating)


def _guarded(
    step: Callable[[Any, Any], Any],
    finite: Array,
    grads: Any,
    state: Any,
) -> tuple[Any, Any]:
    """Return step(grads, state), or zeros and the old state where not finite."""
    if _may_branch(finite):
        return _branched(step, finite, grads, state)
    # Zeros instead of NaN go in, so that nothing inside trips over them (jax_debug_nans
    # included).
    safe = jax.tree.map(
        lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads
    )
    updates, new_state = step(safe, state)
    updates = jax.tree.map(
        lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates
    )
    return updates, select_tree(finite, new_state, state)


def _may_branch(finite: Array) -> bool:
    """Return whether the step may be a branch.

    It is not where nothing is compiled, where one device could skip what others wait
    for (in shard_map), and where both branches would have to say how their results are
    sharded (Explicit axes).
    """
    kinds = set(jax.typeof(finite).sharding.mesh.axis_types)
    return isinstance(finite, jax.core.Tracer) and kinds <= {AxisType.Auto}


def _branched(
    step: Callable[[Any, Any], Any],
    finite: Array,
    grads: Any,
    state: Any,
) -> tuple[Any, Any]:
    """Guard the step by a branch, inside which it compiles as without a guard.

    With `where` around it XLA computes new moments twice, for the updates and for the
    state.
    """
    closed, (updates, new_state) = jax.make_jaxpr(step, return_shape=True)(
        grads, state
    )
    structure = jax.tree.structure((updates, new_state))

    def apply(grads: Any, state: Any) -> list[Any]:
        leaves = jax.tree.leaves((grads, state))
        return _jaxpr.as_fun(closed.jaxpr)(closed.consts, *leaves)

    def skip(grads: Any, state: Any) -> list[Any]:
        zeros = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), updates)
        return jax.tree.leaves((zeros, jax.tree.map(_copied, state, new_state)))

    def _copied(old: Any, new: Any) -> Any:
        # What a branch hands on as it is, XLA copies before it branches: every step
        # would pay for it.
        # In the memory of the host (memopt.host_offload) there is nothing to compute
        # with.
        if _dtypes.is_key(new) or _compat.in_host_memory(jax.typeof(old)):
            return old
        if not _dtypes.is_inexact(old):
            return jnp.asarray(old).astype(new.dtype)
        return jnp.where(finite, jnp.zeros_like(old), old).astype(new.dtype)

    leaves = jax.lax.cond(finite, apply, skip, grads, state)
    return jax.tree.unflatten(structure, leaves)


def _states(
    opt_state: Any,
    kind: type | tuple[type, ...],
) -> list[Any]:
    # The states of optax.chain, masked and nnx.Optimizer are pytrees all the way down.
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in nodes if isinstance(x, kind)]
