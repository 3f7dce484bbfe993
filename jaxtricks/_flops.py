"""Count the floating-point operations of a jaxpr, by a table of all primitives."""

import math
from collections import Counter
from typing import Any

import jax.numpy as jnp

from jaxtricks import _jaxpr


def flops(jaxpr: _jaxpr.Jaxpr) -> int:
    """Return floating-point operations: 2 per multiply-add of matrix products, else 1.

    Elementwise operations count 1 per element; matrix factorizations and Fourier
    transforms their order of magnitude. The body of a scan counts as often as it runs,
    the most expensive branch of a cond once, the body of a while loop once (its trip
    count is not in the program).
    """
    return sum(map(eqn_flops, jaxpr.eqns))


def eqn_flops(eqn: Any) -> int:
    """Return the operations of one equation, 0 for unknown ones; see `flops`."""
    name = _jaxpr.primitive(eqn)
    inner = list(_jaxpr.sub_jaxprs(eqn))
    if name == "scan":
        return _jaxpr.scan_parts(eqn).length * flops(inner[0])
    if name == "cond":
        return max(map(flops, inner))
    if name in ("custom_jvp_call", "custom_vjp_call"):
        # The other jaxprs are rules, which do not run with it.
        return sum(flops(body.jaxpr) for body in _jaxpr.bodies(eqn))
    if inner:
        return sum(map(flops, inner))
    return _COUNT.get(name, _none)(eqn)


def is_counted(eqn: Any) -> bool:
    """Return whether the table (or the code for bodies) says what an equation costs."""
    return _jaxpr.primitive(eqn) in _COUNT or _jaxpr.has_bodies(eqn)


def uncounted(jaxpr: _jaxpr.Jaxpr) -> Counter[str]:
    """Return {primitive: count} of the equations that the table lacks.

    Kernels are not looked into.
    """
    counts: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if _jaxpr.has_bodies(eqn):
            for body in _jaxpr.bodies(eqn):
                counts += uncounted(body.jaxpr)
        elif not is_counted(eqn):
            counts[_jaxpr.primitive(eqn)] += 1
    return counts


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)


def _float_size(v: Any) -> int:
    dtype = getattr(v.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return 0
    return _size(v)


def _dot(eqn: Any) -> int:
    (contracting, _), _ = _jaxpr.params(eqn)["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(lhs[i] for i in contracting)


def _ragged_dot(eqn: Any) -> int:
    """Each row of the left side meets one group of the right side."""
    numbers = _jaxpr.params(eqn)["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = eqn.invars[:2]
    shared = {*contracting, *batch, *numbers.rhs_group_dimensions}
    columns = math.prod(
        n for i, n in enumerate(rhs.aval.shape) if i not in shared
    )
    return 2 * _size(lhs) * columns


def _scaled_matmul(eqn: Any) -> int:
    return 2 * _size(eqn.outvars[0]) * eqn.invars[0].aval.shape[-1]


def _convolution(eqn: Any) -> int:
    parameters = _jaxpr.params(eqn)
    features_axis = parameters["dimension_numbers"].rhs_spec[0]
    kernel = eqn.invars[1].aval.shape
    per_output = math.prod(kernel)
    sums = (
        2 * _size(eqn.outvars[0]) * per_output // max(1, kernel[features_axis])
    )
    # The gradient of a strided convolution reads zeros between its inputs: no work.
    return sums // math.prod(parameters["lhs_dilation"])


def _factorization(eqn: Any) -> int:
    """Order of magnitude: a product of the matrix with itself."""
    *_, rows, columns = eqn.invars[0].aval.shape
    return 2 * _size(eqn.invars[0]) * min(rows, columns)


def _triangular_solve(eqn: Any) -> int:
    return _size(eqn.outvars[0]) * eqn.invars[0].aval.shape[-1]


def _fft(eqn: Any) -> int:
    points = math.prod(_jaxpr.params(eqn)["fft_lengths"])
    size = max(map(_size, (*eqn.invars, *eqn.outvars)))
    return round(5 * size * math.log2(max(points, 1)))


def _polynomial(eqn: Any) -> int:
    coefficients = len(eqn.invars) - 2
    return 2 * coefficients * _float_size(eqn.outvars[0])


def _elementwise(eqn: Any) -> int:
    return sum(map(_float_size, eqn.outvars))


def _reduction(eqn: Any) -> int:
    return max(map(_float_size, eqn.invars))


def _none(eqn: Any) -> int:
    return 0


# What counts the operations -> primitives of jax 0.7 to 0.12; tests/ground/test_primitives.py
# says which one is missing. Equations that hold jaxprs (reduce, scatter-add, composite)
# count what these do.
_ROWS = {
    _dot: "dot_general scaled_dot",
    _ragged_dot: "ragged_dot ragged_dot_general",
    _scaled_matmul: "scaled_matmul_wrapper",
    _convolution: "conv_general_dilated",
    _factorization: """
        cholesky cholesky_update lu qr geqrf geqp3 householder_product ormqr eig eigh
        svd schur hessenberg tridiagonal symmetric_product""",
    _triangular_solve: "triangular_solve",
    _fft: "fft",
    _polynomial: "polynomial",
    # One per element of the result.
    _elementwise: """
        add sub mul div rem neg abs sign max min square one_minus_square integer_pow
        pow sqrt rsqrt cbrt add_any floor ceil round exp exp2 expm1 log log1p log2
        tanh logistic erf erfc erf_inv sin cos tan asin acos atan atan2 sinh cosh
        asinh acosh atanh cumsum cumprod cummax cummin cumlogsumexp lgamma digamma
        polygamma zeta igamma igammac igamma_grad_a regularized_incomplete_beta
        bessel_i0e bessel_i1e random_gamma random_gamma_grad Frexp Ldexp
        tridiagonal_solve""",
    # One per element of the operand.
    _reduction: """
        reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor
        reduce_precision reduce reduce_window reduce_window_sum reduce_window_max
        reduce_window_min reduce_scatter reduce_scatter_start select_and_scatter
        select_and_scatter_add select_and_gather_add""",
    # Data movement, comparison, conversion, integers, random bits; and what cannot be
    # looked into.
    _none: """
        reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice
        gather scatter scatter-add scatter-sub scatter-mul scatter-max scatter-min
        concatenate pad rev squeeze expand_dims copy tile split stack unstack select_n
        clamp sort top_k approx_top_k argmax argmin eq ne lt le gt ge eq_to lt_to
        le_to is_finite nextafter Nonzero SearchSorted convert_element_type
        bitcast_convert_type complex real imag conj iota empty empty2 and or xor not
        clz population_count mulhi shift_left shift_right_arithmetic
        shift_right_logical lu_pivots_to_permutation rng_uniform rng_bit_generator
        random_bits random_fold_in random_seed random_split random_wrap random_unwrap
        threefry2x32 psum pmax pmin ppermute pbroadcast pvary pcast all_gather
        all_gather_invariant all_gather_reduced all_to_all ragged_all_to_all
        reduce_scatter_done unreduced_psum unreduced_reduce_scatter psend precv
        axis_index platform_index name stop_gradient optimization_barrier
        sharding_constraint reshard mesh_cast layout_constraint device_put stage
        dce_sink after_all create_token get swap custom_linear_solve CustomRoot
        _RootLinearMap linear_call custom_vmap_call custom_lin composite remat_opt
        custom_partitioning custom_partitioning_call pallas_call ffi_call
        tpu_custom_call xla_pmap pure_callback io_callback debug_callback debug_print
        python_callback debug_partitioning""",
}


_COUNT = {
    name: count for count, names in _ROWS.items() for name in names.split()
}
