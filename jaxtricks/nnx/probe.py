"""A model run on an example, with an eye on what its layers are given and give."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtricks import _jaxpr, _tree, reparam
from jaxtricks._types import Array
from jaxtricks.nnx import surgery, unit
from jaxtricks.nnx.unit import Unit
from jaxtricks.remat import measure
from jaxtricks.reparam import dataflow

_DRAWS = 4  # random signs that the layers' bounds are carried to the output with

Watch = Callable[[Any, str, str], Any]


class Probed:
    """A model on an example; its layers pass what they are given and give through a function.

    Args:
      run: run(watch, *example) -> output, where every watched layer does x = watch(x, "in", path) and
        y = watch(y, "out", path).
      example: an input of the model, or a tuple of them; what is no array is passed as it is.
    """

    def __init__(self, run: Callable[..., Any], example: Any):
        self.run = run
        self.example = example if isinstance(example, tuple) else (example,)

    def __call__(self, *example: Any) -> Any:
        """The model's output."""
        return self.run(_unchanged, *example)

    def flow(self) -> dataflow.Flow:
        """What feeds what."""
        return dataflow.read(traced(functools.partial(self.run, dataflow.mark), self.example))

    def inputs(self) -> dict[str, Array]:
        """{path: what the layer is given first}; layers inside jit or scan are not seen."""
        found: dict[str, Array] = {}

        def keep(x: Any, side: str, path: str) -> Any:
            if side == "in" and not isinstance(x, jax.core.Tracer):
                found.setdefault(path, x)
            return x

        self.run(keep, *self.example)
        return found

    def disturbed(self, sizes: dict[str, float], seed: int) -> Any:
        """The output if the outputs of these layers change by +-size, at random."""
        rng = np.random.default_rng(seed)

        def change(y: Any, side: str, path: str) -> Any:
            if side == "in" or path not in sizes:
                return y
            signs = rng.choice([-1.0, 1.0], size=y.shape)
            return y + jnp.asarray(sizes[path] * signs, y.dtype)

        return self.run(change, *self.example)


def spied(model: nnx.Module, watched: Iterable[str]) -> Callable[..., Any]:
    """run(watch, *inputs) of a copy of the model in which these layers are watched; see `Probed`."""
    model, paths = nnx.clone(model), frozenset(watched)
    holder: list[Watch] = [_unchanged]
    for path, module in surgery.modules(model):
        if path in paths:
            _spy(module, path, holder)
    call = pure_call(model)

    def run(watch: Watch, *inputs: Any) -> Any:
        holder[0] = watch
        return call(*inputs)

    return run


def pure_call(model: nnx.Module) -> Callable[..., Any]:
    """The model's call; its variables are made anew in the trace that it runs in, and change nothing."""
    graph, state = nnx.split(model)
    return lambda *inputs: nnx.merge(graph, state, copy=True)(*inputs)


def _spy(module: nnx.Module, path: str, holder: list[Watch]) -> None:
    # A subclass, so that code that asks for a layer's type or reads its variables goes on to work.
    base: Any = type(module)

    def call(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = base.__call__(layer, holder[0](x, "in", path), *args, **kwargs)
        return holder[0](y, "out", path)

    object.__setattr__(module, "__class__", type(base.__name__, (base,), {"__call__": call}))


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
    costs = [measure.flops(traced(fn, probed.example).jaxpr) for fn in (probed, fused)]
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
