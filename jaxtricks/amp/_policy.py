"""Which dtype parameters, computation and outputs have."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks._arguments import checked
from jaxtricks._partition import without_changes

_DTYPES = {
    "f16": jnp.float16,
    "float16": jnp.float16,
    "bf16": jnp.bfloat16,
    "bfloat16": jnp.bfloat16,
    "half": jnp.bfloat16,
    "f32": jnp.float32,
    "float32": jnp.float32,
    "full": jnp.float32,
    "f64": jnp.float64,
    "float64": jnp.float64,
}
_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
_FIELDS = {
    "p": "param",
    "params": "param",
    "param": "param",
    "c": "compute",
    "compute": "compute",
}
_FIELDS |= {"o": "output", "output": "output"}


@dataclasses.dataclass(frozen=True)
class Policy:
    """dtypes of parameters, computation and outputs.

    Attributes:
      param: dtype the parameters are kept in.
      compute: dtype that arguments are cast to before a function runs.
      output: dtype of what the function returns.

    Example:
      >>> str(Policy.parse("p=f32,c=bf16,o=f32"))
      'p=f32,c=bf16,o=f32'
    """

    param: Any
    compute: Any
    output: Any

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            dtype = np.dtype(getattr(self, field.name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"amp.Policy: `{field.name}` is {dtype}; use a floating dtype"
                )
            object.__setattr__(self, field.name, dtype)

    @classmethod
    @checked
    def parse(cls, text: str) -> "Policy":
        """Policy from jmp's grammar.

        Args:
          text: "half", "full" or a dtype name for all three; or "p=f32,c=bf16,o=f32" in
            long or short names, where compute defaults to param and output to compute.
            "half" is bfloat16.

        Raises:
          ValueError: an unknown field or dtype, naming it.
        """
        if "=" not in text:
            return cls(*[_dtype(text)] * 3)
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name.strip() not in _FIELDS:
                raise ValueError(
                    f"amp.Policy: unknown field {name!r} in {text!r}; use p, c and o"
                )
            given[_FIELDS[name.strip()]] = _dtype(value)
        param = given.get("param", jnp.float32)
        compute = given.get("compute", param)
        return cls(param, compute, given.get("output", compute))

    def cast_to_param(self, tree: Any) -> Any:
        """The tree with its floating arrays in the dtype of the parameters."""
        return _cast(tree, self.param)

    def cast_to_compute(self, tree: Any) -> Any:
        """The tree with its floating arrays in the dtype of the computation."""
        return _cast(tree, self.compute)

    def cast_to_output(self, tree: Any) -> Any:
        """The tree with its floating arrays in the dtype of outputs."""
        return _cast(tree, self.output)

    def __str__(self) -> str:
        names = [
            _SHORT.get(d.name, d.name) for d in (self.param, self.compute, self.output)
        ]
        return "p={},c={},o={}".format(*names)


def as_policy(policy: Policy | str) -> Policy:
    """A policy, parsed if it is text."""
    return Policy.parse(policy) if isinstance(policy, str) else policy


@checked
def with_policy(fn: Callable[..., Any], policy: Policy | str) -> Callable[..., Any]:
    """fn with arguments cast to `policy.compute` and results cast to `policy.output`.

    This is the hand cast: every floating array goes in low, running statistics
    included, so pass only what should (parameters and inputs). Integers, booleans,
    keys, Python numbers and callables pass through.

    Args:
      fn: any function of pytrees.
      policy: a Policy or its text.

    Returns:
      A function with the signature of fn; its gradients have the dtypes of the uncast
      arguments.

    Raises:
      ValueError: when called, if fn changes an argument in place: it has a copy, and
        the change is lost.

    Example:
      >>> with_policy(lambda w, x: x @ w, "p=f32,c=bf16,o=f32")(jnp.ones((3, 2)), jnp.ones((4, 3))).dtype
      dtype('float32')
    """
    policy = as_policy(policy)
    run = without_changes(fn, "autocast")

    @functools.wraps(fn)
    def cast(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = policy.cast_to_compute((args, kwargs))
        return policy.cast_to_output(run(*args, **kwargs))

    return cast


def _dtype(name: str) -> Any:
    if name.strip() not in _DTYPES:
        raise ValueError(
            f"amp.Policy: unknown dtype {name!r}; use one of {', '.join(_DTYPES)}"
        )
    return _DTYPES[name.strip()]


def _cast(tree: Any, dtype: Any) -> Any:
    def leaf(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return (
            x.update(dtype=dtype)
            if isinstance(x, jax.ShapeDtypeStruct)
            else x.astype(dtype)
        )

    return jax.tree.map(leaf, tree)
