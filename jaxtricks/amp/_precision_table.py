"""Say in a table what each primitive may do in the compute dtype: sums stay in float32.

`classify` makes the exceptions that an equation's parameters ask for;
`_precision_analysis` decides by the classes.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtricks import _jaxpr

MATMUL, DENY, LOCAL, WIDE = "matmul", "deny", "local", "wide"
FOLLOW, LAYOUT, EXACT, OPAQUE = "follow", "layout", "exact", "opaque"

# Class -> primitives, of jax 0.7 to 0.12; tests/ground/test_primitives.py says which one is
# missing.
TABLE = {
    # Operands in the compute dtype, and so is the result; the hardware accumulates in
    # float32.
    MATMUL: "dot_general conv_general_dilated ragged_dot ragged_dot_general",
    # Operands in float32; the result stays in float32 and draws its partners up to it.
    # (Between the two halves of a collective is a future, which nothing can cast. The
    # result of scatter-max is compared with its operands, see CHOICES: rounded, it
    # would equal none in float32.)
    DENY: """
        exp exp2 expm1 log log1p log2 pow rsqrt tan asin acos atan sinh cosh asinh
        acosh atanh erf_inv reduce reduce_sum reduce_prod cumsum cumprod cumlogsumexp
        reduce_window scatter-add scatter-sub scatter-mul scatter-max scatter-min
        reduce_scatter_start reduce_scatter_done lgamma digamma polygamma zeta igamma
        igammac igamma_grad_a regularized_incomplete_beta bessel_i0e bessel_i1e
        random_gamma random_gamma_grad cholesky cholesky_update lu
        lu_pivots_to_permutation qr geqrf geqp3 householder_product ormqr eig eigh svd
        schur hessenberg tridiagonal tridiagonal_solve triangular_solve
        symmetric_product fft complex real imag conj""",
    # Computed in float32; the result goes back to the compute dtype if an operand was
    # in it. (A polynomial is a sum; the objects Frexp and Ldexp were built for operands
    # in float32.)
    LOCAL: """
        sin cos sqrt cbrt atan2 rem polynomial Frexp Ldexp reduce_precision
        reduce_window_sum select_and_scatter_add select_and_gather_add
        select_and_scatter psum reduce_scatter unreduced_psum unreduced_reduce_scatter""",
    # Exact in any dtype, but the derivative sums: computed as LOCAL, so that it sums in
    # float32.
    WIDE: """
        gather reduce_max reduce_min reduce_window_max reduce_window_min sort top_k
        approx_top_k tile pvary pbroadcast pcast all_gather all_gather_invariant
        all_gather_reduced""",
    # Elementwise: computed where the operands are, in float32 if every consumer needs
    # that. (In the derivative of tanh, one_minus_square is (1 + y)(1 - y), and 1 - y is
    # exact for y from 1/2 to 1. The digits that it lacks near 1 were lost when y was
    # rounded: float32 would not bring them back. y is at most 1, so float16 does not
    # overflow.)
    FOLLOW: """
        add sub mul div neg tanh logistic erf erfc integer_pow square one_minus_square
        max min abs sign floor ceil round clamp select_n add_any""",
    # Data movement: the dtype passes through.
    LAYOUT: """
        reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice
        scatter concatenate pad rev squeeze expand_dims copy stop_gradient cummax
        cummin split stack unstack name sharding_constraint reshard mesh_cast
        layout_constraint all_to_all ragged_all_to_all ppermute pmax pmin
        optimization_barrier device_put argmax argmin empty empty2 dce_sink stage""",
    # Operands as they were without autocast, since the result is not a number or must
    # be exact.
    EXACT: """
        eq ne lt le gt ge eq_to lt_to le_to is_finite bitcast_convert_type nextafter
        iota Nonzero SearchSorted and or xor not clz population_count mulhi shift_left
        shift_right_arithmetic shift_right_logical reduce_and reduce_or reduce_xor
        axis_index platform_index after_all create_token rng_uniform rng_bit_generator
        random_bits random_fold_in random_seed random_split random_wrap random_unwrap
        threefry2x32""",
    # Not looked into: operands as they were, the result stays in float32.
    OPAQUE: """
        product8 pallas_call ffi_call tpu_custom_call custom_linear_solve CustomRoot
        _RootLinearMap linear_call custom_partitioning_call custom_partitioning
        custom_lin custom_vmap_call composite remat_opt scaled_dot
        scaled_matmul_wrapper psend precv get swap xla_pmap pure_callback io_callback
        debug_callback debug_print python_callback debug_partitioning""",
}
# float16 overflows at 65504, the square of 256.
FLOAT16_DENY = frozenset({"integer_pow", "square"})
CONVERT = "convert_element_type"

# The derivative asks which operand the result equals.
CHOICES = frozenset(
    {"max", "min", "reduce_max", "reduce_min", "scatter-max", "scatter-min"}
)

# What asks for the lowest precision that there is, as a product without `precision=`
# does.
_LOWEST = (None, lax.Precision.DEFAULT, lax.DotAlgorithmPreset.DEFAULT)

PRODUCTS = frozenset(TABLE[MATMUL].split())
ROUNDED = frozenset({"dot_general", "conv_general_dilated"})
"""Products that can run in 8 bits."""
_CLASS = {name: kind for kind, names in TABLE.items() for name in names.split()}


def is_classified(eqn: Any) -> bool:
    """Return whether the table (or the code for bodies) says what to do with it."""
    name = _jaxpr.primitive(eqn)
    return name in _CLASS or _jaxpr.has_bodies(eqn) or name == CONVERT


def kind_of(name: str) -> str:
    """Return the class of a primitive in the table."""
    return CONVERT if name == CONVERT else _CLASS.get(name, OPAQUE)


def check_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """Return the caller's rows of the table, primitive -> class.

    Raises:
      ValueError: an unknown class, or a primitive with a body or without a class.
    """
    rules = dict(rules or {})
    for primitive, kind in rules.items():
        if kind not in TABLE:
            raise ValueError(
                f"amp.autocast: `rules` gives {primitive!r} the class "
                f"{kind!r}; use one of {', '.join(TABLE)}"
            )
        if primitive in _jaxpr.WITH_BODIES or primitive == CONVERT:
            raise ValueError(
                f"amp.autocast: `rules` cannot reclass {primitive!r}; name the "
                "primitives inside it, or wrap a part in amp.full_precision"
            )
    return rules


def classify(
    eqn: Any,
    low: np.dtype,
    rules: Mapping[str, str],
) -> tuple[str, str]:
    """Return the class of an equation, and the reason for an exception ("" if none).

    Args:
      eqn: an equation without bodies.
      low: the compute dtype.
      rules: the caller's rows of the table.
    """
    name = _jaxpr.primitive(eqn)
    kind = rules.get(name) or _CLASS.get(name, OPAQUE)
    passes_through = kind in (LAYOUT, FOLLOW)
    if passes_through and any(True for _ in _jaxpr.sub_jaxprs(eqn)):
        return DENY, "its function is for operands in float32"
    if name in rules:
        return kind, "rules="
    if kind == MATMUL and _jaxpr.sums_nothing(eqn):
        return LOCAL, ""
    if kind == MATMUL:
        why = _why_not_low(eqn, low)
        return (DENY, why) if why else (kind, "")
    if name == "broadcast_in_dim" and _grows(eqn):
        return WIDE, ""
    if passes_through and _jaxpr.is_high(eqn):
        return WIDE, ""  # the object was built for operands in float32
    if low == np.float16 and (name in FLOAT16_DENY or _is_square(eqn)):
        return DENY, "float16 squares overflow at 256"
    return kind, "" if name in _CLASS else "unknown primitive"


def _why_not_low(eqn: Any, low: np.dtype) -> str:
    """Return why a product stays in float32; "" if it need not."""
    precisions = _jaxpr.precisions(eqn)
    if any(p not in _LOWEST for p in precisions):
        return f"precision={'/'.join(dict.fromkeys(map(str, precisions)))}"
    if _jaxpr.is_inner_product(eqn):
        return "an inner product: a reduction"
    for v in eqn.invars:
        dtype = v.aval.dtype
        if dtype not in (np.float32, low) and jnp.issubdtype(
            dtype, jnp.inexact
        ):
            return f"an operand is {dtype}"
    return ""


def _grows(eqn: Any) -> bool:
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def _is_square(eqn: Any) -> bool:
    return _jaxpr.primitive(eqn) == "mul" and eqn.invars[0] is eqn.invars[1]
