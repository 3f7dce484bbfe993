"""Jaxprs: trace, walk, count. The one place that looks inside equations (amp and remat share it)."""

import contextlib
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from jaxtricks import _compat, _jaxpr

Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
Var = core.Var


def trace(fn: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """Jaxpr of fn(*args) and the structure of its output.

    Tracers that fn closes over become `consts` of the result, whatever their type.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return closed, jax.tree.structure(shapes)


def as_fun(jaxpr: Jaxpr) -> Callable[..., list[Any]]:
    """fn(consts, *flat_args) -> flat outputs, evaluated in the caller's trace."""

    def run(consts: Any, *args: Any) -> list[Any]:
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*args)

    return run


def sub_jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation, those of its derivative rules included."""
    for value in _compat.params(eqn).values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if _compat.is_jaxpr(item):
                yield _compat.closed(item).jaxpr


def walk(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation, inner ones after the one that holds them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in sub_jaxprs(eqn):
            yield from walk(inner)


def census(fn: Callable[..., Any], *args: Any) -> Counter[tuple[str, str]]:
    """How often each (primitive, dtype of its first output) occurs in the trace of fn(*args)."""
    closed, _ = trace(fn, *args)
    return Counter(
        (_compat.primitive(eqn), str(eqn.outvars[0].aval.dtype))
        for eqn in walk(closed.jaxpr)
        if eqn.outvars and hasattr(eqn.outvars[0].aval, "dtype")
    )


def is_literal(v: Any) -> bool:
    """Whether an operand is a constant written into the equation."""
    return isinstance(v, core.Literal)


def bind(eqn: Any, operands: Sequence[Any], **params: Any) -> list[Any]:
    """The results of an equation on other operands (of other dtypes, say), in the caller's trace.

    Args:
      eqn: the equation; its context (mesh, compute type) and its place in the source
        are kept.
      operands: one an operand; a literal's may be a NumPy scalar.
      params: parameters to replace.
    """
    if type(eqn.primitive).get_bind_params is core.Primitive.get_bind_params:
        # No bodies and no rules among its parameters: nothing has to be evaluated
        # around it.
        with place_of(eqn), eqn.ctx.manager:
            results = eqn.primitive.bind(*operands, **{**eqn.params, **params})
        return list(results) if eqn.primitive.multiple_results else [results]
    literal = [
        is_literal(v) and not hasattr(x, "dtype")
        for v, x in zip(eqn.invars, operands, strict=True)
    ]
    invars = [
        v if kept else core.Var(v.aval)
        for v, kept in zip(eqn.invars, literal, strict=True)
    ]
    eqn = eqn.replace(invars=invars, params={**eqn.params, **params})
    given = [v for v, kept in zip(invars, literal, strict=True) if not kept]
    one = made((), given, eqn.outvars, [eqn])
    values = [x for x, kept in zip(operands, literal, strict=True) if not kept]
    return core.jaxpr_as_fun(ClosedJaxpr(one, ()))(*values)


def made(
    consts: Sequence[Any], ins: Sequence[Any], outs: Sequence[Any], eqns: Any
) -> Jaxpr:
    """A jaxpr of these variables and equations."""
    eqns = list(eqns)
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = _anonymous(len(consts) + len(ins), len(outs))
    is_high = any(
        _compat.is_high(eqn) or any(j.is_high for j in sub_jaxprs(eqn)) for eqn in eqns
    )
    return Jaxpr(tuple(consts), list(ins), list(outs), eqns, effects, names, is_high)


@functools.cache
def _anonymous(inputs: int, outputs: int) -> Any:
    """Names that the constructor of a jaxpr asks for; they appear nowhere."""
    info = jax.make_jaxpr(lambda: ())().jaxpr.debug_info
    return info._replace(arg_names=("",) * inputs, result_paths=("",) * outputs)


@contextlib.contextmanager
def place_of(eqn: Any) -> Iterator[Any]:
    """Under it, operations carry the equation's names and source line; yields the bare equation."""
    source = eqn.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    bare = source.replace(name_stack=source_info_util.new_name_stack())
    with source_info_util.user_context(source.traceback, name_stack=names):
        yield eqn.replace(source_info=bare)


def source_line(eqn: Any) -> str:
    """ "file.py:12:4 (function)" of an equation; "" where only libraries were at work."""
    return source_info_util.summarize(eqn.source_info).rpartition("/")[2]


# Jaxprs as flat lists of equations: inline, cut, prune, fingerprint.


CALLS = ("jit", "call")
RULES = ("custom_jvp_call", "custom_vjp_call", "checkpoint")


def inlined(
    closed: ClosedJaxpr,
    calls: Sequence[str] = CALLS,
    also: Callable[[Any], bool] = lambda eqn: False,
) -> ClosedJaxpr:
    """The same program with its calls written out; every variable is its own.

    Args:
      closed: any jaxpr.
      calls: names of primitives; with `RULES` among them the values are right and
        derivatives are lost.
      also: whether to write out an equation of another primitive.
    """
    eqns: list[Any] = []
    consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def write(jaxpr: Jaxpr, env: dict[Any, Any]) -> list[Any]:
        for eqn in jaxpr.eqns:
            operands = [_read(env, v) for v in eqn.invars]
            if _stays(eqn):
                outs = operands
            elif (
                _compat.primitive(eqn) in calls and not _means_shardings(eqn)
            ) or also(eqn):
                (inner,) = _compat.bodies(eqn)
                consts.update(zip(inner.jaxpr.constvars, inner.consts, strict=True))
                outs = write(
                    inner.jaxpr, dict(zip(inner.jaxpr.invars, operands, strict=True))
                )
            else:
                outs = [Var(v.aval) for v in eqn.outvars]
                eqns.append(eqn.replace(invars=operands, outvars=outs))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [_read(env, v) for v in jaxpr.outvars]

    outs = write(closed.jaxpr, {})
    flat = made(tuple(consts), closed.jaxpr.invars, outs, eqns)
    return ClosedJaxpr(flat, list(consts.values()))


def _read(env: dict[Any, Any], v: Any) -> Any:
    return v if is_literal(v) else env.get(v, v)


def _stays(eqn: Any) -> bool:
    """Whether it moves nothing: jax writes it where a mesh is in force, and not elsewhere."""
    if _compat.primitive(eqn) not in ("reshard", "broadcast_in_dim"):
        return False
    return eqn.invars[0].aval.str_short() == eqn.outvars[0].aval.str_short()


def _means_shardings(eqn: Any) -> bool:
    given = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return any(isinstance(s, jax.sharding.Sharding) for s in given)


def straight(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program as the planner cuts it: its calls written out, its inputs' parts where they are read."""
    return _sunk(inlined(closed))


def _sunk(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with parts of its inputs taken where they are first read.

    Code that walks over a sequence or stacked weights slices all of it first; those
    slices would be alive across the whole program.
    """
    program = closed.jaxpr
    inputs = {*program.constvars, *program.invars}
    waiting: dict[Any, Any] = {}
    eqns: list[Any] = []

    def fetch(operands: Sequence[Any]) -> None:
        for v in operands:
            if isinstance(v, Var) and v in waiting:
                eqn = waiting.pop(v)
                fetch(eqn.invars)
                eqns.append(eqn)

    for eqn in program.eqns:
        reads = [v for v in eqn.invars if isinstance(v, Var)]
        if _compat.primitive(eqn) in _PARTS and all(
            v in inputs or v in waiting for v in reads
        ):
            waiting[eqn.outvars[0]] = eqn
        else:
            fetch(reads)
            eqns.append(eqn)
    fetch(program.outvars)
    flat = made(program.constvars, program.invars, program.outvars, eqns)
    return ClosedJaxpr(flat, closed.consts)


_PARTS = (
    "slice",
    "squeeze",
    "reshape",
    "dynamic_slice",
    "convert_element_type",
    "broadcast_in_dim",
)


def read(variables: Sequence[Any], env: Mapping[Any, Any]) -> list[Any]:
    """Values of variables and literals."""
    return [v.val if is_literal(v) else env[v] for v in variables]


def read_by(eqns: Sequence[Any]) -> list[Any]:
    """Variables that the equations read and do not make, in order of use."""
    made = {v for eqn in eqns for v in eqn.outvars}
    read = [
        v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in made
    ]
    return list(dict.fromkeys(read))


def piece(eqns: Sequence[Any], outs: Sequence[Any]) -> Jaxpr:
    """The equations as a jaxpr of what they read."""
    return made((), read_by(eqns), outs, eqns)


def replaced(
    jaxpr: Jaxpr, saved: Collection[int]
) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
    """fn(inputs, values): the results of the saved equations are values, differentiated as if computed.

    Args:
      jaxpr: an inlined one; inputs are its constvars, then its invars.
      saved: indices of equations; values are all of their outputs in order.
    """
    ends = [*sorted(i + 1 for i in saved), len(jaxpr.eqns)]
    parts = [jaxpr.eqns[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    swaps = [list(eqns[-1].outvars) for eqns in parts[:-1]] + [[]]
    runs = []
    for eqns, needed in zip(parts, needed_after(parts, jaxpr.outvars), strict=True):
        runs.append(
            piece(eqns, [v for eqn in eqns for v in eqn.outvars if v in needed])
        )

    def run(inputs: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True)
        )
        given = iter(values)
        for part, swapped in zip(runs, swaps, strict=True):
            results = as_fun(part)((), *[env[v] for v in part.invars])
            env.update(zip(part.outvars, results, strict=True))
            for v, value in zip(swapped, given, strict=False):
                env[v] = _swap(env[v], value) if v in env else value
        return read(jaxpr.outvars, env)

    return run


def needed_after(
    parts: Sequence[Sequence[Any]], outvars: Sequence[Any]
) -> list[set[Any]]:
    """For each run of equations, the variables that later runs or the results read."""
    needed = {v for v in outvars if isinstance(v, Var)}
    after = []
    for eqns in reversed(parts):
        after.append(set(needed))
        needed |= set(read_by(eqns))
    return after[::-1]


@jax.custom_jvp
def _swap(computed: Any, value: Any) -> Any:
    del computed
    return value


@_swap.defjvp
def _swap_jvp(primals: Any, tangents: Any) -> Any:
    # The value of one, the derivative of the other: what computes the first is dead
    # code.
    return primals[1], tangents[0]


def live(closed: ClosedJaxpr) -> Jaxpr:
    """What of a program runs: its calls written out, without dead code."""
    return pruned(inlined(closed).jaxpr)


def pruned(jaxpr: Jaxpr, used: Sequence[bool] | None = None) -> Jaxpr:
    """The jaxpr without equations whose results nobody reads.

    Args:
      jaxpr: any; its inputs stay.
      used: which outputs are read; None is all.
    """
    outs = [v for i, v in enumerate(jaxpr.outvars) if used is None or used[i]]
    needed = {v for v in outs if isinstance(v, Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            kept.append(_pruned_body(eqn, needed))
            needed.update(v for v in eqn.invars if isinstance(v, Var))
    return made(jaxpr.constvars, jaxpr.invars, outs, kept[::-1])


def _pruned_body(eqn: Any, needed: set[Any]) -> Any:
    """A scan without the stacked outputs that nobody reads (counted, never run)."""
    if _compat.primitive(eqn) != "scan":
        return eqn
    carry = _compat.scan_parts(eqn).carry
    used = [i < carry or v in needed for i, v in enumerate(eqn.outvars)]
    (body,) = _compat.bodies(eqn)
    slim = ClosedJaxpr(pruned(body.jaxpr, used), body.consts)
    return _compat.scan_outputs(eqn, used, slim)


def fingerprint(jaxpr: Jaxpr) -> str:
    """Twelve hexadecimal digits: equal for equal operations on equal shapes, wherever they stand."""
    return hashlib.sha256(repr(_written(jaxpr)).encode()).hexdigest()[:12]


def _written(jaxpr: Jaxpr) -> Any:
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    fresh = itertools.count()
    number: dict[Any, int] = {v: next(fresh) for v in inputs}
    shapes = [v.aval.str_short() for v in inputs]
    lines = []
    for eqn in jaxpr.eqns:
        if _stays(eqn) and eqn.invars[0] in number:
            number[eqn.outvars[0]] = number[eqn.invars[0]]
            continue
        number |= {v: next(fresh) for v in eqn.outvars}
        reads = [str(v) if is_literal(v) else number[v] for v in eqn.invars]
        outs = [v.aval.str_short() for v in eqn.outvars]
        params = sorted((k, v) for k, v in _compat.params(eqn).items() if _is_plain(v))
        inner = [_written(j) for j in sub_jaxprs(eqn)]
        lines.append((_compat.primitive(eqn), reads, outs, params, inner))
    return (
        shapes,
        lines,
        [str(v) if is_literal(v) else number[v] for v in jaxpr.outvars],
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # dimension numbers and paddings, too
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def flops(jaxpr: _jaxpr.Jaxpr) -> int:
    """Floating-point operations: 2 per multiply-add of matrix products, 1 per element elsewhere.

    Matrix factorizations and Fourier transforms count the order of magnitude. The body
    of a scan counts as often as it runs, the dearest branch of a cond once, the body of
    a while loop once (its trip count is not in the program).
    """
    return sum(map(eqn_flops, jaxpr.eqns))


def eqn_flops(eqn: Any) -> int:
    """Floating-point operations of one equation; see `flops`. Unknown primitives count none."""
    name, inner = _compat.primitive(eqn), list(_jaxpr.sub_jaxprs(eqn))
    if name == "scan":
        return _compat.scan_parts(eqn).length * flops(inner[0])
    if name == "cond":
        return max(map(flops, inner))
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return sum(
            flops(body.jaxpr) for body in _compat.bodies(eqn)
        )  # the rest are rules
    if inner:
        return sum(map(flops, inner))
    return _COUNT.get(name, _none)(eqn)


def known(eqn: Any) -> bool:
    """Whether the table (or the code for bodies) says what an equation costs."""
    return _compat.primitive(eqn) in _COUNT or _compat.has_bodies(eqn)


def unknown(jaxpr: _jaxpr.Jaxpr) -> Counter[str]:
    """{primitive: count} of the equations that the table lacks; kernels are not looked into."""
    counts: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if _compat.has_bodies(eqn):
            for body in _compat.bodies(eqn):
                counts += unknown(body.jaxpr)
        elif not known(eqn):
            counts[_compat.primitive(eqn)] += 1
    return counts


def _dot(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * _size(eqn.outvars[0]) * math.prod(lhs[i] for i in contract)


def _ragged_dot(eqn: Any) -> int:
    """Each row of the left side meets one group of the right side."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = eqn.invars[:2]
    sides = {*contract, *batch, *numbers.rhs_group_dimensions}
    columns = math.prod(n for i, n in enumerate(rhs.aval.shape) if i not in sides)
    return 2 * _size(lhs) * columns


def _scaled_matmul(eqn: Any) -> int:
    return 2 * _size(eqn.outvars[0]) * eqn.invars[0].aval.shape[-1]


def _convolution(eqn: Any) -> int:
    rhs_spec = eqn.params["dimension_numbers"].rhs_spec
    kernel = eqn.invars[1].aval.shape
    sums = 2 * _size(eqn.outvars[0]) * math.prod(kernel) // max(1, kernel[rhs_spec[0]])
    # The gradient of a strided convolution reads zeros between its inputs: no work.
    return sums // math.prod(eqn.params["lhs_dilation"])


def _factorization(eqn: Any) -> int:
    """Order of magnitude: a product of the matrix with itself."""
    *_, rows, columns = eqn.invars[0].aval.shape
    return 2 * _size(eqn.invars[0]) * min(rows, columns)


def _triangular_solve(eqn: Any) -> int:
    return _size(eqn.outvars[0]) * eqn.invars[0].aval.shape[-1]


def _fft(eqn: Any) -> int:
    points = math.prod(eqn.params["fft_lengths"])
    size = max(map(_size, (*eqn.invars, *eqn.outvars)))
    return round(5 * size * math.log2(max(points, 1)))


def _polynomial(eqn: Any) -> int:
    return 2 * (len(eqn.invars) - 2) * _float_size(eqn.outvars[0])


def _elementwise(eqn: Any) -> int:
    return sum(map(_float_size, eqn.outvars))


def _reduction(eqn: Any) -> int:
    return max(map(_float_size, eqn.invars))


def _none(eqn: Any) -> int:
    return 0


# What counts the operations -> primitives of jax 0.7 to 0.12; tests/test_primitives.py
# says which one is missing. Equations that hold jaxprs (reduce, scatter-add, composite)
# count what these do.
_ROWS = {
    _dot: "dot_general scaled_dot",
    _ragged_dot: "ragged_dot ragged_dot_general",
    _scaled_matmul: "scaled_matmul_wrapper",
    _convolution: "conv_general_dilated",
    _factorization: """
        cholesky cholesky_update lu qr geqrf geqp3 householder_product ormqr eig eigh svd schur hessenberg
        tridiagonal symmetric_product""",
    _triangular_solve: "triangular_solve",
    _fft: "fft",
    _polynomial: "polynomial",
    # One per element of the result.
    _elementwise: """
        add sub mul div rem neg abs sign max min square one_minus_square integer_pow pow sqrt rsqrt cbrt
        add_any floor ceil round exp exp2 expm1 log log1p log2 tanh logistic erf erfc erf_inv
        sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh
        cumsum cumprod cummax cummin cumlogsumexp lgamma digamma polygamma zeta igamma igammac
        igamma_grad_a regularized_incomplete_beta bessel_i0e bessel_i1e random_gamma random_gamma_grad
        Frexp Ldexp tridiagonal_solve""",
    # One per element of the operand.
    _reduction: """
        reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor reduce_precision
        reduce reduce_window reduce_window_sum reduce_window_max reduce_window_min reduce_scatter
        reduce_scatter_start select_and_scatter select_and_scatter_add select_and_gather_add""",
    # Data movement, comparison, conversion, integers, random bits; and what cannot be
    # looked into.
    _none: """
        reshape transpose broadcast_in_dim slice dynamic_slice dynamic_update_slice gather scatter
        scatter-add scatter-sub scatter-mul scatter-max scatter-min concatenate pad rev squeeze expand_dims
        copy tile split stack unstack select_n clamp sort top_k approx_top_k argmax argmin
        eq ne lt le gt ge eq_to lt_to le_to is_finite nextafter Nonzero SearchSorted
        convert_element_type bitcast_convert_type complex real imag conj iota empty empty2
        and or xor not clz population_count mulhi shift_left shift_right_arithmetic shift_right_logical
        lu_pivots_to_permutation rng_uniform rng_bit_generator random_bits random_fold_in random_seed
        random_split random_wrap random_unwrap threefry2x32
        psum pmax pmin ppermute pbroadcast pvary pcast all_gather all_gather_invariant
        all_gather_reduced all_to_all ragged_all_to_all reduce_scatter_done unreduced_psum
        unreduced_reduce_scatter psend precv axis_index platform_index
        name stop_gradient optimization_barrier sharding_constraint reshard mesh_cast layout_constraint
        device_put stage dce_sink after_all create_token get swap
        custom_linear_solve CustomRoot _RootLinearMap linear_call custom_vmap_call custom_lin composite
        remat_opt custom_partitioning custom_partitioning_call
        pallas_call ffi_call tpu_custom_call xla_pmap pure_callback io_callback debug_callback debug_print
        python_callback debug_partitioning""",
}


_COUNT = {name: count for count, names in _ROWS.items() for name in names.split()}


def _size(var: Any) -> int:
    return math.prod(var.aval.shape)


def _float_size(var: Any) -> int:
    dtype = getattr(var.aval, "dtype", None)
    return _size(var) if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) else 0


def var_bytes(var: Any) -> int:
    """Bytes of a variable; 0 for tokens, keys' wrappers and other values without a size."""
    aval = var.aval
    if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize
