"""Say which dtypes parameters, computation and outputs have, and cast to them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtricks._arguments import checked
from jaxtricks._partition import without_changes

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# The names of jmp. "half" means bfloat16 on every backend.
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
# What products alone can be computed in: the operands are rounded there, from bfloat16.
_OF_PRODUCTS = {
    "f8": jnp.float8_e4m3fn,
    "fp8": jnp.float8_e4m3fn,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "i8": jnp.int8,
    "int8": jnp.int8,
}
_SHORT = {
    "float8_e4m3fn": "f8",
    "int8": "i8",
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
}
_FIELDS = {
    "p": "param",
    "params": "param",
    "param": "param",
    "c": "compute",
    "compute": "compute",
    "o": "output",
    "output": "output",
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """dtypes of parameters, computation and outputs.

    Attributes:
      param: dtype of the parameters.
      compute: dtype that arguments are cast to before a function runs; 8 bits
        (float8_e4m3fn, int8): that of the operands of products, where `autocast` lowers
        the rest to bfloat16.
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
            of_products = dtype in map(np.dtype, _OF_PRODUCTS.values())
            if of_products and field.name != "compute":
                raise ValueError(
                    f"amp.Policy: `{field.name}` is {dtype}, which is for "
                    "`compute` alone; use bfloat16 or float32"
                )
            if not (jnp.issubdtype(dtype, jnp.floating) or of_products):
                raise ValueError(
                    f"amp.Policy: `{field.name}` is {dtype}; use a floating dtype"
                )
            # The dataclass is frozen; any spelling of a dtype becomes a NumPy dtype.
            object.__setattr__(self, field.name, dtype)

    @classmethod
    @checked
    def parse(cls, text: str) -> "Policy":
        """Return the policy that a text in jmp's grammar means.

        Args:
          text: "half", "full" or a dtype name for all three; or "p=f32,c=bf16,o=f32" in
            long or short names, where compute defaults to param and output to compute
            (to bfloat16 with "c=f8" or "c=i8"). "half" is bfloat16.

        Raises:
          ValueError: an unknown field or dtype, or 8 bits for another field than
            compute, naming it.
        """
        if "=" not in text:
            dtype = _dtype(text)
            return cls(dtype, dtype, dtype)
        dtypes: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name.strip() not in _FIELDS:
                raise ValueError(
                    f"amp.Policy: unknown field {name!r} in {text!r}; use p, c and o"
                )
            dtypes[_FIELDS[name.strip()]] = _dtype(value)
        param = dtypes.get("param", jnp.float32)
        compute = dtypes.get("compute", param)
        output = dtypes.get("output", _of_arrays(compute))
        return cls(param, compute, output)

    @property
    def has_8_bits(self) -> bool:
        """Whether it is for `autocast` alone, which rounds the operands of products."""
        return self.arrays != self.compute

    @property
    def arrays(self) -> Any:
        """The dtype of arrays between operations: compute, or bfloat16 where that has 8 bits."""
        return _of_arrays(self.compute)

    def cast_to_param(self, tree: T) -> T:
        """Return the tree with its floating arrays in the dtype of the parameters."""
        return _cast(tree, self.param)

    def cast_to_compute(self, tree: T) -> T:
        """Return the tree with its floating arrays in the dtype of the computation.

        That is bfloat16 where products compute in 8 bits.
        """
        return _cast(tree, self.arrays)

    def cast_to_output(self, tree: T) -> T:
        """Return the tree with its floating arrays in the dtype of outputs."""
        return _cast(tree, self.output)

    def __str__(self) -> str:
        dtypes = self.param, self.compute, self.output
        p, c, o = (_SHORT.get(dtype.name, dtype.name) for dtype in dtypes)
        return f"p={p},c={c},o={o}"


def as_policy(policy: Policy | str) -> Policy:
    """Return a policy, parsed if it is text."""
    return Policy.parse(policy) if isinstance(policy, str) else policy


@checked
def with_policy(
    fn: Callable[P, R],
    policy: Policy | str,
) -> Callable[P, R]:
    """Cast the arguments of fn to `policy.compute` and its results to `policy.output`.

    This is the manual cast: every floating array goes in low, running statistics
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
    if policy.has_8_bits:
        raise ValueError(
            f"amp.with_policy: the policy computes in {policy.compute}, which "
            "needs scales; use amp.autocast"
        )
    run = without_changes(fn, "autocast")

    @functools.wraps(fn)
    def cast(*args: P.args, **kwargs: P.kwargs) -> R:
        args, kwargs = policy.cast_to_compute((args, kwargs))
        return policy.cast_to_output(run(*args, **kwargs))

    return cast


def _of_arrays(compute: Any) -> Any:
    has_8_bits = np.dtype(compute).itemsize == 1
    return np.dtype(jnp.bfloat16) if has_8_bits else compute


def _dtype(name: str) -> Any:
    dtypes = _DTYPES | _OF_PRODUCTS
    if name.strip() not in dtypes:
        raise ValueError(
            f"amp.Policy: unknown dtype {name!r}; use one of {', '.join(dtypes)}"
        )
    return dtypes[name.strip()]


def _cast(tree: T, dtype: Any) -> T:
    def leaf(x: Any) -> Any:
        # Python numbers have no dtype: they adapt to what they meet.
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        # Under jax.eval_shape, say.
        if isinstance(x, jax.ShapeDtypeStruct):
            return x.update(dtype=dtype)
        return x.astype(dtype)

    return jax.tree.map(leaf, tree)
