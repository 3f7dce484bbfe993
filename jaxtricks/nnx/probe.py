"""A model run on an example, with an eye on what its layers are given and give."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtricks import _jaxpr, _tree, reparam
from jaxtricks._typing import Array
from jaxtricks.nnx import _compat, _flags, _module_tree, pure, unit
from jaxtricks.nnx.unit import Unit
from jaxtricks.remat import _memory
from jaxtricks.reparam import _dataflow

_DRAWS = 4  # random signs that the layers' bounds are carried to the output with

Watch = Callable[[Any, str, str], Any]


class Probed:
    """A model on an example; its layers pass what they are given and give through a function.

    Args:
      run: run(watch, *example) -> output, where every watched layer does x = watch(x, "in", path) and
        y = watch(y, "out", path).
      example: an input of the model, or a tuple of them; what is not an array is passed as it is.
    """

    def __init__(self, run: Callable[..., Any], example: Any):
        self.run = run
        self.example = as_inputs(example)

    def __call__(self, *example: Any) -> Any:
        """The model's output."""
        return self.run(_unchanged, *example)

    def flow(self) -> _dataflow.Flow:
        """What feeds what."""
        return _dataflow.read(traced(functools.partial(self.run, _dataflow.mark), self.example))

    def values(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """({path: what the layer is given first}, {path: dtype of what it gives}).

        Inside jit or scan no values are seen: an input drawn at random, of the same shape, stands for them.
        """
        inputs: dict[str, Array] = {}
        dtypes: dict[str, Any] = {}

        def keep(x: Any, side: str, path: str) -> Any:
            if side == "out":
                dtypes.setdefault(path, x.dtype)
            elif path not in inputs:
                inputs[path] = unit.random_input(x) if isinstance(x, jax.core.Tracer) else x
            return x

        self.run(keep, *self.example)
        return inputs, dtypes

    def disturbed(self, sizes: dict[str, float], seed: int) -> Any:
        """The output if the outputs of these layers change by +-size, at random."""
        rng = np.random.default_rng(seed)

        def change(y: Any, side: str, path: str) -> Any:
            if side == "in" or path not in sizes:
                return y
            signs = rng.choice([-1.0, 1.0], size=y.shape)
            return y + jnp.asarray(sizes[path] * signs, y.dtype)

        return self.run(change, *self.example)


class Spied:
    """run(watch, *inputs) of a copy of a model in which some layers are watched; see `Probed`.

    Args:
      model: any module.
      watched: the paths of those layers.
      kwargs: keyword arguments of the model's call.

    Attributes:
      modes: {path: whether the layer's statistics are the running ones} of all calls so far, for layers whose
        calls have a `use_running_average`; None where neither a call nor the layer says.
      altered: {path: reason} of layers that are called with another kernel than the model holds, as far as
        calls outside of jit and scan show it.
    """

    def __init__(self, model: nnx.Module, watched: Iterable[str], kwargs: Mapping[str, Any]):
        model, paths = nnx.clone(model), frozenset(watched)
        self.modes: dict[str, set[bool | None]] = {}
        self.altered: dict[str, str] = {}
        self._watch: Watch = _unchanged
        for path, module in _module_tree.modules(model):
            if path in paths:
                self._spy(module, path)
        self._call = pure_call(model, kwargs)

    def __call__(self, watch: Watch, *inputs: Any) -> Any:
        """The model's output."""
        self._watch = watch
        return self._call(*inputs)

    def _spy(self, module: nnx.Module, path: str) -> None:
        # A subclass, so that code that asks for a layer's type or reads its variables goes on to work.
        base: Any = type(module)
        signature = inspect.signature(base.__call__)
        stored = _compat.read(getattr(module, "kernel", None))

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if stored is not None and is_altered(stored, layer.kernel[...]):
                self.altered[path] = altered_reason(path)
            if "use_running_average" in signature.parameters:
                given = signature.bind(layer, *args, **kwargs).arguments.get("use_running_average")
                own = getattr(layer, "use_running_average", None)
                self.modes.setdefault(path, set()).add(own if given is None else given)
            args, kwargs = with_input(lambda x: self._watch(x, "in", path), args, kwargs)
            return self._watch(base.__call__(layer, *args, **kwargs), "out", path)

        object.__setattr__(module, "__class__", type(base.__name__, (base,), {"__call__": call}))


def is_altered(stored: Any, used: Any) -> bool:
    """Whether a layer's kernel is another one than it is stored with; not known of tracers."""
    known = not isinstance(used, jax.core.Tracer)
    return known and used is not stored and not np.array_equal(stored, used)


def altered_reason(path: str) -> str:
    """Why a layer with an altered kernel is kept."""
    return f"{path!r} is called with another kernel than the model holds (WeightNorm, SpectralNorm)"


def with_input(
    change: Callable[[Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer's call with the first, its input, changed; it may be given by name."""
    if args:
        return (change(args[0]), *args[1:]), dict(kwargs)
    (name, x), *others = kwargs.items()
    return (), {name: change(x), **dict(others)}


def pure_call(model: nnx.Module, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The model's call; its variables are made anew in the trace that it runs in, and change nothing."""
    graph, state = nnx.split(model)

    def own(x: Any) -> Any:
        return nnx.clone(x) if isinstance(x, nnx.Rngs) else x

    def call(*inputs: Any) -> Any:
        module = nnx.merge(graph, state, copy=True)
        return module(*map(own, inputs), **{name: own(x) for name, x in kwargs.items()})

    return call


def evaluation_kwargs(
    model: nnx.Module, example: Any, kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`kwargs`, and what the call of the model needs beside them to evaluate on the example."""
    inputs, kwargs = as_inputs(example), dict(kwargs or {})
    kwargs |= _flags.call_flags(type(model), False, inputs, kwargs)
    return kwargs | pure.call_rngs(type(model), inputs, kwargs, None)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """The positional arguments that an example stands for."""
    return example if isinstance(example, tuple) else (example,)


def traced(fn: Callable[..., Any], example: Sequence[Any]) -> _jaxpr.ClosedJaxpr:
    """The trace of fn(*example); flags among the inputs stay what they are."""
    arrays = [i for i, x in enumerate(example) if _is_arrays(x)]

    def run(*given: Any) -> Any:
        inputs = list(example)
        for i, x in zip(arrays, given, strict=True):
            inputs[i] = x
        return fn(*inputs)

    return _jaxpr.trace(run, *(example[i] for i in arrays))[0]


def whole_model(
    probed: Probed,
    fused: Callable[..., Any],
    units: Sequence[Unit],
    rows: Sequence[reparam.FusedLayer],
    params: tuple[int, int],
) -> reparam.FusedLayer:
    """The fused model against the model on the example.

    Args:
      probed: the model.
      fused: the fused model's call.
      units: what was fused.
      rows: their own comparisons.
      params: number of parameters and statistics before and after.

    Raises:
      ValueError: they differ by more than what the layers' bounds come to at the output.
    """
    ends = {one.norm_layer or one.layer: row.bound for one, row in zip(units, rows, strict=True)}
    with jax.default_matmul_precision("highest"):
        y, z = probed(*probed.example), fused(*probed.example)
        others = [probed.disturbed(ends, seed) for seed in range(_DRAWS)]
    carried = max(unit.largest_difference(y, other) for other in others)
    costs = [_memory.flops(traced(fn, probed.example).jaxpr) for fn in (probed, fused)]
    branches, error = sum(row.branches for row in rows), unit.largest_difference(y, z)
    found = reparam.FusedLayer("", branches, error, carried + _rounding(y), *params, *costs)
    return unit.within_bound(found)


def _rounding(y: Any) -> float:
    """What the last operation alone may round."""
    leaves = [x for x in jax.tree.leaves(y) if _tree.is_floating(x) and x.size]
    return max(
        (16 * float(jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x))) for x in leaves), default=0.0
    )


def _is_arrays(x: Any) -> bool:
    return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x))


def _unchanged(x: Any, side: str, path: str) -> Any:
    return x
