"""Every primitive that public functions of jax trace to has a row in the tables of amp and of remat.

The functions are traced forward and in both modes of differentiation; nothing is compiled or run. What a new
release of jax brings fails here by name: a primitive needs a row, a function a call or a reason.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import types
import warnings
from typing import Any, NamedTuple, get_origin

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import io_callback
from jax.extend.core import Primitive, primitives
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtricks import _compat, _flops, _jaxpr, amp, remat
from jaxtricks.amp import _precision_table
from jaxtricks.remat import _stages

from tests import flags

MODULES = (
    "jax.numpy",
    "jax.numpy.linalg",
    "jax.numpy.fft",
    "jax.lax",
    "jax.lax.linalg",
    "jax.nn",
    "jax.scipy.special",
    "jax.ops",
    "jax.random",
    "jax.image",
)


def draw(*shape):
    return np.linspace(0.2, 0.8, int(np.prod(shape)), dtype=np.float32).reshape(shape)


KEY, VECTOR, MATRIX = jax.random.key(0), draw(4), draw(4, 4)
COMPLEX_VECTOR, COMPLEX = (VECTOR + 1j).astype(np.complex64), (MATRIX + 1j).astype(np.complex64)
INDEX, BYTES, MASK = np.arange(4, dtype=np.int32), np.arange(4, dtype=np.uint8), VECTOR > 0.5
NHWC, KERNEL = draw(1, 4, 4, 2), draw(2, 2, 2, 2)
NCHW, LAYOUT = draw(1, 2, 4, 4), ("NHWC", "HWIO", "NHWC")
ROWS = lax.GatherDimensionNumbers((1,), (0,), (0,))
TO_ROWS = lax.ScatterDimensionNumbers((1,), (0,), (0,))

# The first arguments that a function takes (and makes an equation of) are traced.
PATTERNS = [
    (MATRIX,),
    (VECTOR,),
    ([MATRIX, MATRIX],),
    (MATRIX, MATRIX),
    (VECTOR, VECTOR),
    (MATRIX, VECTOR),
    (MATRIX, 1),
    (MATRIX, INDEX),
    (MATRIX, (1, 0)),
    (MATRIX, (4, 4)),
    (MATRIX, (4, 4, 4)),
    (INDEX, VECTOR),
    (2, VECTOR),
    (KEY, VECTOR),
    ([MATRIX, MATRIX], 0),
    (VECTOR, VECTOR, VECTOR),
    (MASK, VECTOR, VECTOR),
    (MATRIX, 0, 1),
    (MATRIX, 5, 10),
    (VECTOR, VECTOR, 2),
    (MATRIX, INDEX, VECTOR),
    (KEY, VECTOR, VECTOR),
    (KEY, VECTOR, VECTOR, VECTOR),
    (VECTOR, VECTOR, VECTOR, VECTOR),
    (COMPLEX,),
    (COMPLEX_VECTOR,),
    (COMPLEX, COMPLEX),
    (COMPLEX_VECTOR, COMPLEX_VECTOR),
    (COMPLEX, 1),
    (COMPLEX_VECTOR, COMPLEX_VECTOR, COMPLEX_VECTOR),
    (INDEX,),
    (MASK,),
    (BYTES,),
    (KEY,),
    (4,),
    ((4,),),
    (),
    (INDEX, INDEX),
    (MASK, (0,)),
    (4, 2),
    (KEY, 2),
    (KEY, (2, 2)),
    (INDEX, (4, 4)),
    (KEY, INDEX, INDEX),
]


class Call(NamedTuple):
    """Arguments of a function, or of a program that stands for it (`of`)."""

    args: tuple[Any, ...]
    settings: dict[str, Any]
    of: Any


def call(*args, of=None, **settings):
    return Call(args, settings, of)


def newton(square):
    """The square root, differentiated implicitly."""
    return lax.custom_root(
        lambda x: x * x - square,
        jnp.ones_like(square),
        lambda f, x: lax.fori_loop(0, 3, lambda _, x: x - f(x) / (2 * x), x),
        lambda tangent, y: y / tangent(jnp.ones_like(y)),
    )


def solve(a, b):
    return lax.custom_linear_solve(lambda x: a * x, b, lambda _, b: b / a, symmetric=True)


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,), optimize_remat=True)


@custom_vmap
def thrice(x):
    return 3 * x


@thrice.def_vmap
def _(size, batched, x):
    return thrice(x), True


def shard(x):
    """x, sharded over a mesh of one device."""
    return lax.with_sharding_constraint(x, NamedSharding(mesh_of_one(), P("i")))


def mesh_of_one():
    return jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))


def send_and_receive(x):
    return lax.precv(lax.psend(x, "i", [(0, 0)]), jax.typeof(x), "i", [(0, 0)])


# Functions that the lists above do not reach, or only in part; the last are in none of MODULES.
CALLS = {
    "jax.numpy.abs": [call(MATRIX), call(COMPLEX)],
    "jax.numpy.apply_along_axis": call(jnp.sum, 0, MATRIX),
    "jax.numpy.apply_over_axes": call(jnp.sum, MATRIX, [0]),
    "jax.numpy.argwhere": call(VECTOR, size=2),
    "jax.numpy.astype": call(VECTOR, jnp.bfloat16),
    "jax.numpy.bincount": call(INDEX, VECTOR, length=4),
    "jax.numpy.choose": call(INDEX, [VECTOR, VECTOR], mode="clip"),
    "jax.numpy.clip": call(VECTOR, 0.3, 0.5),
    "jax.numpy.compress": call(MASK, VECTOR, size=2),
    "jax.numpy.cross": call(VECTOR[:3], VECTOR[:3]),
    "jax.numpy.dsplit": call(draw(2, 2, 2), 2),
    "jax.numpy.einsum": call("ij,jk->ik", MATRIX, MATRIX),
    "jax.numpy.extract": call(MASK, VECTOR, size=2),
    "jax.numpy.fill_diagonal": call(MATRIX, 2.0, inplace=False),
    "jax.numpy.flatnonzero": call(VECTOR, size=2),
    "jax.numpy.fromfunction": call(lambda i: i * i, (4,), dtype=np.float32),
    "jax.numpy.frompyfunc": call(VECTOR, of=lambda x: jnp.frompyfunc(jnp.add, 2, 1)(x, x)),
    "jax.numpy.full": call((2, 4), VECTOR),
    "jax.numpy.intersect1d": call(VECTOR, VECTOR, size=2),
    "jax.numpy.ldexp": call(VECTOR, INDEX),
    "jax.numpy.mask_indices": call(3, jnp.triu, size=6),
    "jax.numpy.nonzero": call(VECTOR, size=2),
    "jax.numpy.pad": [
        call(MATRIX, 1, mode=mode)
        for mode in ("constant", "linear_ramp", "maximum", "mean", "median", "reflect", "wrap")
    ],
    "jax.numpy.percentile": call(VECTOR, 50.0),
    "jax.numpy.piecewise": call(VECTOR, [MASK], [jnp.sin, jnp.cos]),
    "jax.numpy.place": call(VECTOR, MASK, VECTOR, inplace=False),
    "jax.numpy.put": call(VECTOR, INDEX, VECTOR, inplace=False),
    "jax.numpy.put_along_axis": call(VECTOR, INDEX, VECTOR, 0, inplace=False),
    "jax.numpy.ravel_multi_index": call((INDEX, INDEX), (4, 4), mode="wrap"),
    "jax.numpy.reshape": call(MATRIX, (2, 8)),
    "jax.numpy.select": call([MASK, MASK], [VECTOR, VECTOR]),
    "jax.numpy.setdiff1d": call(VECTOR, VECTOR, size=2),
    "jax.numpy.setxor1d": call(VECTOR, VECTOR, size=2),
    "jax.numpy.squeeze": call(draw(1, 4)),
    "jax.numpy.union1d": call(VECTOR, VECTOR, size=2),
    "jax.numpy.unique": call(VECTOR, size=2),
    "jax.numpy.unique_all": call(VECTOR, size=2),
    "jax.numpy.unique_counts": call(VECTOR, size=2),
    "jax.numpy.unique_inverse": call(VECTOR, size=2),
    "jax.numpy.unique_values": call(VECTOR, size=2),
    "jax.numpy.vectorize": call(MATRIX, MATRIX, of=jnp.vectorize(jnp.dot, signature="(n),(n)->()")),
    "jax.numpy.where": call(MASK, VECTOR, VECTOR),
    "jax.numpy.linalg.cross": call(VECTOR[:3], VECTOR[:3]),
    "jax.numpy.linalg.norm": [call(MATRIX, order) for order in (None, 1, 2, "nuc")],
    "jax.numpy.linalg.qr": [call(MATRIX, mode) for mode in ("reduced", "complete", "raw")],
    "jax.numpy.linalg.tensorinv": call(MATRIX, 1),
    "jax.lax.argmax": call(VECTOR, 0, np.int32),
    "jax.lax.argmin": call(VECTOR, 0, np.int32),
    "jax.lax.associative_scan": call(lax.mul, VECTOR),
    "jax.lax.bitcast_convert_type": call(VECTOR, np.int32),
    "jax.lax.broadcast_in_dim": call(VECTOR, (2, 4), (1,)),
    "jax.lax.broadcasted_iota": call(np.float32, (2, 4), 1),
    "jax.lax.clamp": call(0.3, VECTOR, 0.5),
    "jax.lax.composite": call(VECTOR, of=lax.composite(lambda x: 2 * x, "example.twice")),
    "jax.lax.cond": call(MASK[0], jnp.sin, jnp.cos, VECTOR),
    "jax.lax.conv": call(NCHW, KERNEL, (1, 1), "SAME"),
    "jax.lax.conv_general_dilated": call(NHWC, KERNEL, (2, 2), "SAME", dimension_numbers=LAYOUT),
    "jax.lax.conv_general_dilated_local": call(NCHW, draw(3, 8, 3, 3), (1, 1), "VALID", (2, 2)),
    "jax.lax.conv_general_dilated_patches": call(NCHW, (2, 2), (1, 1), "SAME"),
    "jax.lax.conv_transpose": call(NHWC, KERNEL, (2, 2), "SAME"),
    "jax.lax.conv_with_general_padding": call(NCHW, KERNEL, (1, 1), [(0, 1)] * 2, None, None),
    "jax.lax.convert_element_type": call(VECTOR, jnp.bfloat16),
    "jax.lax.custom_linear_solve": call(VECTOR, VECTOR, of=solve),
    "jax.lax.custom_root": call(np.float32(2), of=newton),
    "jax.lax.dot_general": call(MATRIX, MATRIX, (((1,), (0,)), ((), ()))),
    "jax.lax.dynamic_slice": call(VECTOR, (INDEX[0],), (2,)),
    "jax.lax.dynamic_update_index_in_dim": call(MATRIX, VECTOR, INDEX[0], 0),
    "jax.lax.dynamic_update_slice": call(VECTOR, VECTOR[:2], (INDEX[0],)),
    "jax.lax.dynamic_update_slice_in_dim": call(VECTOR, VECTOR[:2], INDEX[0], 0),
    "jax.lax.empty": call((4,), np.float32),
    "jax.lax.fft": [call(VECTOR, "rfft", (4,)), call(COMPLEX_VECTOR, "fft", (4,))],
    "jax.lax.fori_loop": [
        call(0, 3, lambda i, x: x * x, VECTOR),
        call(0, INDEX[3], lambda i, x: x * x, VECTOR),
    ],
    "jax.lax.full": call((2,), VECTOR[0]),
    "jax.lax.gather": call(MATRIX, INDEX[:, None], ROWS, (1, 4)),
    "jax.lax.index_take": call(MATRIX, (INDEX,), (0,)),
    "jax.lax.iota": call(np.float32, 4),
    "jax.lax.map": call(jnp.sin, MATRIX),
    "jax.lax.pad": call(VECTOR, VECTOR[0], [(1, 1, 1)]),
    "jax.lax.platform_dependent": call(VECTOR, cpu=jnp.sin, default=jnp.cos),
    "jax.lax.polynomial": call(VECTOR, [VECTOR[0], VECTOR[1], VECTOR[2]]),
    "jax.lax.ragged_dot": call(MATRIX, draw(2, 4, 3), INDEX[1:3]),
    "jax.lax.ragged_dot_general": call(
        MATRIX,
        MATRIX,
        INDEX[1:3],
        lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], []),
    ),
    "jax.lax.reduce": [
        call(VECTOR, 0.0, lax.add, (0,)),
        call(VECTOR, 1.0, lambda a, b: jnp.sin(a) * b, (0,)),
    ],
    "jax.lax.reduce_window": [
        call(VECTOR, start, combine, (2,), (1,), "VALID")
        for start, combine in (
            (0.0, lax.add),
            (-np.inf, lax.max),
            (np.inf, lax.min),
            (1.0, lax.mul),
        )
    ],
    "jax.lax.reshape": call(MATRIX, (2, 8)),
    "jax.lax.rng_uniform": call(VECTOR[0], VECTOR[1], (2,)),
    "jax.lax.scaled_dot": call(
        draw(4, 32).astype(jnp.bfloat16),
        draw(32, 4).astype(jnp.bfloat16),
        lhs_scale=draw(4, 1).astype(jnp.bfloat16),
        preferred_element_type=np.float32,
    ),
    "jax.lax.scan": [
        call(lambda carry, x: (carry * x, carry), VECTOR, MATRIX),
        call(lambda carry, x: (carry * x, carry), VECTOR, MATRIX, reverse=True, unroll=2),
    ],
    "jax.lax.scatter": call(MATRIX, INDEX[:, None], MATRIX, TO_ROWS),
    "jax.lax.scatter_add": call(MATRIX, INDEX[:, None], MATRIX, TO_ROWS),
    "jax.lax.scatter_apply": call(MATRIX, INDEX[:, None], jnp.sin, TO_ROWS, update_shape=(4, 4)),
    "jax.lax.scatter_max": call(MATRIX, INDEX[:, None], MATRIX, TO_ROWS),
    "jax.lax.scatter_min": call(MATRIX, INDEX[:, None], MATRIX, TO_ROWS),
    "jax.lax.scatter_mul": call(MATRIX, INDEX[:, None], MATRIX, TO_ROWS),
    "jax.lax.scatter_sub": call(MATRIX, INDEX[:, None], MATRIX, TO_ROWS),
    "jax.lax.select_n": call(MASK, VECTOR, VECTOR),
    "jax.lax.slice": call(MATRIX, (0, 1), (2, 4), (1, 2)),
    "jax.lax.split": call(VECTOR, (1, 3)),
    "jax.lax.squeeze": call(draw(1, 4), (0,)),
    "jax.lax.stage": call(VECTOR, of=lambda x: x * lax.stage(np.float32(2))),
    "jax.lax.switch": call(INDEX[1], [jnp.sin, jnp.cos, jnp.tan], VECTOR),
    "jax.lax.while_loop": call(lambda x: x[0] < 9, lambda x: x * 2, VECTOR),
    "jax.lax.with_sharding_constraint": call(VECTOR, of=shard),
    "jax.lax.linalg.eigh": [call(MATRIX), call(COMPLEX)],
    "jax.lax.linalg.lu_pivots_to_permutation": call(INDEX, 4),
    "jax.lax.linalg.ormqr": call(MATRIX, VECTOR, MATRIX),
    "jax.lax.linalg.tridiagonal_solve": call(VECTOR, VECTOR, VECTOR, VECTOR[:, None]),
    "jax.nn.dot_product_attention": call(NHWC, NHWC, NHWC),
    "jax.nn.gelu": [call(VECTOR), call(VECTOR, approximate=False)],
    "jax.nn.scaled_dot_general": call(draw(4, 32), draw(4, 32), (((1,), (1,)), ((), ()))),
    "jax.nn.scaled_matmul": call(
        *[draw(1, 4, 32).astype(jnp.float8_e4m3fn)] * 2,
        *[draw(1, 4, 1).astype(jnp.float8_e8m0fnu)] * 2,
    ),
    "jax.scipy.special.bessel_jn": call(VECTOR, v=2),
    "jax.scipy.special.sph_harm_y": call(INDEX, INDEX, VECTOR, VECTOR, n_max=3),
    "jax.ops.segment_max": call(VECTOR, INDEX, 4),
    "jax.ops.segment_min": call(VECTOR, INDEX, 4),
    "jax.ops.segment_prod": call(VECTOR, INDEX, 4),
    "jax.ops.segment_sum": call(VECTOR, INDEX, 4),
    "jax.random.multinomial": call(KEY, VECTOR[0], VECTOR),
    "jax.random.multivariate_normal": call(KEY, VECTOR, MATRIX),
    "jax.random.randint": call(KEY, (4,), 0, 9),
    "jax.random.triangular": call(KEY, 0.0, VECTOR, 1.0),
    "jax.random.wrap_key_data": call(np.arange(2, dtype=np.uint32)),
    "jax.image.resize": [call(NHWC, (1, 8, 2, 2), how) for how in ("nearest", "linear", "cubic")],
    "jax.image.scale_and_translate": call(MATRIX, (8, 8), (0, 1), VECTOR[:2], VECTOR[:2], "linear"),
    "jax.ad_checkpoint.checkpoint_name": call(VECTOR, of=lambda x: checkpoint_name(x, "x")),
    "jax.checkpoint": call(VECTOR, of=jax.checkpoint(jnp.sin)),
    "jax.custom_batching.custom_vmap": call(VECTOR, of=thrice),
    "jax.custom_derivatives.linear_call": call(
        VECTOR,
        of=lambda x: linear_call(lambda _, x: 2 * x, lambda _, y: 2 * y, (), x),
    ),
    "jax.custom_vjp": call(VECTOR, of=twice),
    "jax.debug.print": call(VECTOR, of=lambda x: jax.debug.print("{}", x)),
    "jax.device_put": call(VECTOR, of=jax.device_put),
    "jax.experimental.io_callback": call(VECTOR, of=lambda x: io_callback(lambda x: x, x, x)),
    "jax.pure_callback": call(VECTOR, of=lambda x: jax.pure_callback(lambda x: x, x, x)),
}
# Traced under shard_map, along its axis "i", with and without its checks of what varies.
SHARDED = {
    "jax.lax.all_gather": call(VECTOR, "i"),
    "jax.lax.all_gather_invariant": call(VECTOR, "i"),
    "jax.lax.all_to_all": call(MATRIX, "i", 0, 1, tiled=True),
    "jax.lax.axis_index": call(VECTOR, of=lambda x: x + lax.axis_index("i")),
    "jax.lax.pbroadcast": call(VECTOR, "i", 0),
    "jax.lax.pcast": call(VECTOR, of=lambda x: lax.pcast(lax.psum(x, "i"), "i", to="varying")),
    "jax.lax.pmax": call(VECTOR, "i"),
    "jax.lax.pmean": call(VECTOR, "i"),
    "jax.lax.pmin": call(VECTOR, "i"),
    "jax.lax.ppermute": call(VECTOR, "i", [(0, 0)]),
    "jax.lax.precv": call(VECTOR, of=send_and_receive),
    "jax.lax.psend": call(VECTOR, of=send_and_receive),
    "jax.lax.pshuffle": call(VECTOR, "i", [0]),
    "jax.lax.psum": call(VECTOR, "i"),
    "jax.lax.psum_scatter": call(VECTOR, "i", tiled=True),
    "jax.lax.psum_scatter_start": call(
        VECTOR, of=lambda x: lax.psum_scatter_start(x, "i", tiled=True).done()
    ),
    "jax.lax.pswapaxes": call(draw(1, 4), "i", 0),
    "jax.lax.pvary": call(VECTOR, of=lambda x: lax.pvary(lax.psum(x, "i"), "i")),
    "jax.lax.ragged_all_to_all": call(VECTOR, VECTOR, *[INDEX[:1]] * 4, axis_name="i"),
}
# Reason -> public functions that are not traced.
EXEMPT = {
    "reads memory or a file": """
        jax.numpy.from_dlpack jax.numpy.frombuffer jax.numpy.fromfile jax.numpy.fromiter
        jax.numpy.fromstring jax.numpy.load jax.numpy.save jax.numpy.savez""",
    "returns text": "jax.numpy.array_repr jax.numpy.array_str",
    "returns a type, a shape, a size or a setting": """
        jax.lax.axis_size jax.lax.broadcast_shapes jax.lax.conv_dimension_numbers
        jax.lax.conv_general_permutations jax.lax.conv_general_shape_tuple jax.lax.conv_shape_tuple
        jax.lax.conv_transpose_shape_tuple jax.lax.padtype_to_pads jax.lax.reduce_window_shape_tuple
        jax.nn.get_scaled_dot_general_config jax.numpy.broadcast_shapes jax.numpy.get_printoptions
        jax.numpy.set_printoptions jax.random.Key jax.random.key_dtype jax.random.key_impl""",
    "returns its argument": "jax.numpy.positive",
    "the size of its result depends on values": "jax.numpy.trim_zeros",
}
UNTRACED = frozenset(" ".join(EXEMPT.values()).split())


def functions():
    """{name: a public function}; what has several names is listed once."""
    by_id = {}
    for module in map(importlib.import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            is_type = isinstance(value, type) or get_origin(value) is not None
            if callable(value) and not is_type and not name.startswith("_"):
                by_id.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(by_id.values())


def equations_of(name, fn):
    """Equations that a function is traced to; none if it cannot be traced."""
    calls = (CALLS | SHARDED).get(name)
    if calls is None:
        least = arity(fn)
        calls = (call(*args) for args in PATTERNS if len(args) >= least)
        return next(filter(None, (equations(name, fn, one) for one in calls)), [])
    each = [equations(name, fn, one) for one in (calls if isinstance(calls, list) else [calls])]
    return [*itertools.chain(*each)] if all(each) else []


def arity(fn):
    """Number of arguments that have no default."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters)


def equations(name, fn, one):
    """Those of every program of a call; none if it cannot be traced."""
    fn = functools.partial(one.of or fn, **one.settings)
    wrappers = [on_mesh(True), on_mesh(False)] if name in SHARDED else [lambda run: run]
    with contextlib.suppress(Exception):
        jaxprs = [jaxpr for wrap in wrappers for jaxpr in programs(fn, one.args, wrap)]
        return [eqn for jaxpr in jaxprs for eqn in _jaxpr.walk(jaxpr.jaxpr)]
    return []


def on_mesh(check):
    """A wrapper: the function under shard_map, along the axis "i"."""
    return functools.partial(
        jax.shard_map, mesh=mesh_of_one(), in_specs=P("i"), out_specs=P("i"), check_vma=check
    )


def programs(fn, args, wrap):
    """Jaxprs of fn(*args) and of its derivatives in both modes, with respect to all inexact arrays."""
    leaves, structure = jax.tree.flatten(args)
    is_array = lambda x: isinstance(x, np.ndarray | np.generic | jax.Array)
    arrays = {i: x for i, x in enumerate(leaves) if is_array(x)}
    inexact = {i: x for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    exact = {i: x for i, x in arrays.items() if i not in inexact}

    @wrap
    def run(inexact, exact):
        tracers = inexact | exact
        full = [tracers.get(i, x) for i, x in enumerate(leaves)]
        outs = fn(*jax.tree.unflatten(structure, full))
        return [x for x in jax.tree.leaves(outs) if isinstance(x, jax.Array)]

    def forward(inexact, exact):
        return jax.jvp(lambda xs: run(xs, exact), (inexact,), (inexact,))

    def reverse(inexact, exact):
        outs, pull = jax.vjp(lambda xs: run(xs, exact), inexact)
        return pull([cotangent(x) for x in outs])

    yield jax.make_jaxpr(run)(inexact, exact)
    for derivative in (forward, reverse) if inexact else ():
        with contextlib.suppress(Exception):  # not every function has both
            yield jax.make_jaxpr(derivative)(inexact, exact)


def cotangent(x):
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)


@pytest.fixture(scope="module")
def census():
    """{function: {primitive: an equation that the function is traced to}}."""
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # it takes half of the time
    try:
        with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
            warnings.simplefilter("ignore")
            elsewhere = {name: None for name in CALLS if not name.startswith(MODULES)}
            every = (functions() | elsewhere).items()
            traces = {name: equations_of(name, fn) for name, fn in every if name not in UNTRACED}
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    return {name: {_compat.primitive(e): e for e in eqns} for name, eqns in traces.items()}


TABLES = {"amp": _precision_table.is_classified, "remat": _flops.is_counted}


@pytest.mark.parametrize("has_row", TABLES.values(), ids=TABLES)
def test_every_primitive_has_a_row(census, has_row):
    missing = {}
    for function, eqns in census.items():
        unknown = [name for name, eqn in eqns.items() if not has_row(eqn)]
        missing |= dict.fromkeys(unknown, function)
    assert not missing, "\n".join(f"{name}, of {missing[name]}" for name in sorted(missing))


@pytest.mark.parametrize("has_row", TABLES.values(), ids=TABLES)
def test_every_primitive_that_jax_exports_has_a_row(has_row):
    public = [p for p in vars(primitives).values() if isinstance(p, Primitive)]
    eqns = [types.SimpleNamespace(primitive=p, params={}) for p in public]
    eqns = [eqn for eqn in eqns if not _compat.is_high(eqn)]
    assert len(eqns) > 100
    assert {_compat.primitive(eqn) for eqn in eqns if not has_row(eqn)} == set()


def test_every_equation_can_be_counted(census):
    for eqns in census.values():
        for name, eqn in eqns.items():
            assert _flops.eqn_flops(eqn) >= 0, name


def test_every_public_function_is_traced(census):
    assert sorted(name for name, eqns in census.items() if not eqns) == []


def test_collectives_are_those_that_remat_runs_once(census):
    for name in SHARDED.keys() & census.keys() - {"jax.lax.axis_index"}:
        assert _stages.COLLECTIVES & census[name].keys(), name


def stranger():
    """A function that triples, by a primitive that no table has."""
    triple = Primitive("triple")
    triple.def_impl(lambda x: 3 * x)
    triple.def_abstract_eval(lambda x: x)
    ad.deflinear2(triple, lambda cotangent, x: [triple.bind(cotangent)])
    batching.defvectorized(triple)
    mlir.register_lowering(triple, mlir.lower_fun(lambda x: 3 * x, multiple_results=False))
    return triple.bind


def test_amp_leaves_an_unknown_primitive_in_float32_and_says_so():
    triple = stranger()

    def fn(w, x):
        return triple(triple(x @ w)) @ w

    def dtypes(**settings):
        jaxpr = jax.make_jaxpr(amp.autocast(fn, **settings))(MATRIX, MATRIX).jaxpr
        eqns = [eqn for eqn in _jaxpr.walk(jaxpr) if eqn.primitive.name == "triple"]
        return {v.aval.dtype.name for eqn in eqns for v in (*eqn.invars, *eqn.outvars)}

    assert dtypes() == {"float32"}
    result = amp.autocast(fn)(MATRIX, MATRIX)
    np.testing.assert_allclose(result, 9 * MATRIX @ MATRIX @ MATRIX, rtol=0.02)
    gradient = jax.grad(lambda w: amp.autocast(fn)(w, MATRIX).sum())(MATRIX)
    np.testing.assert_allclose(gradient, jax.grad(lambda w: fn(w, MATRIX).sum())(MATRIX), rtol=0.03)
    explanation = amp.explain(fn, MATRIX, MATRIX)
    assert explanation.unknown == {"triple": 2} and explanation.low == 2
    (note,) = explanation.notes
    assert note == "amp does not know triple (2): it stays in float32; `rules=` can say otherwise."
    assert note in str(explanation)
    settings = {"rules": {"triple": "follow"}}
    assert dtypes(**settings) == {"bfloat16"}
    assert amp.explain(fn, MATRIX, MATRIX, **settings).notes == ()


def test_remat_prices_an_unknown_primitive_by_its_bytes_and_says_so():
    triple = stranger()

    def loss(w, x, fn):
        for _ in range(2):
            x = jnp.tanh(fn(x @ w))
        return x.sum()

    def plan(fn):
        return remat.plan(functools.partial(loss, fn=fn), MATRIX, MATRIX, budget_bytes="1GiB")

    priced = plan(triple)
    assert priced.unknown == {"triple": 4}  # two in each pass
    sentence = "unknown to the cost model, counted by bytes: triple (4)"
    assert sentence in priced.describe().notes and sentence in str(priced)
    again = remat.plan_from_json(priced.to_json(), functools.partial(loss, fn=triple))
    assert again.unknown == priced.unknown and str(again) == str(priced)
    counted = plan(lambda x: 3 * x)
    assert counted.unknown == {} and len(counted.describe().notes) == 1
    assert '"unknown"' not in counted.to_json()
    assert counted.unplanned.flops - priced.unplanned.flops == 4 * MATRIX.size
    for damage in ('{"triple": "four"}', '{"triple": 0}', "[4]"):
        with pytest.raises(ValueError, match="no plan"):
            remat.plan_from_json(priced.to_json().replace('{"triple": 4}', damage), loss)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.ldexp(x, 2),
        lambda x: jnp.frexp(x)[0],
        lambda x: jnp.searchsorted(x, x),
        lambda x: jnp.nonzero(x > 1, size=2)[0],
        lambda x: jnp.polyval(x[:3], x),
        lambda x: newton(x.sum()),
        lambda x: jnp.log2(x) + jnp.tanh(x),
    ],
)
def test_low_operands(fn):
    """What jax writes as an object (ldexp, a root) is made for operands of one dtype."""
    program = lambda x: fn(x @ (2 * np.eye(4, dtype=np.float32)))
    np.testing.assert_allclose(amp.autocast(program)(VECTOR), program(VECTOR), rtol=0.02, atol=0.02)


def lowered(eqn, which):
    """A function that binds an equation on operands of which some come out of a product."""

    def product(x):
        return (x.reshape(-1, 1) @ np.ones((1, 1), np.float32)).reshape(x.shape)

    def fn(*operands):
        full = [x.dtype == np.float32 for x in operands]
        places = [i for i, is_full in enumerate(full) if is_full]
        low = {"all": places, "the first": places[:1], "all but the first": places[1:]}[which]
        mixed = [product(x) if i in low else x for i, x in enumerate(operands)]
        return _jaxpr.bind(eqn, mixed)

    return fn


def ways(eqn):
    """Which of the float32 operands to lower: every choice that differs. Of one, only for a function."""
    count = sum(getattr(v.aval, "dtype", None) == np.float32 for v in eqn.invars)
    holds = any(True for _ in _jaxpr.sub_jaxprs(eqn))
    return ("all", "the first", "all but the first")[: 3 if count > 1 else count * holds]


def test_what_ties_the_dtypes_of_its_operands_compiles_under_autocast(census):
    """What holds a function, or has several operands, is rewritten as a whole or not at all."""
    kinds = {}
    for eqns in census.values():
        for name, eqn in eqns.items():
            functions = sum(1 for _ in _jaxpr.sub_jaxprs(eqn))
            kinds.setdefault((name, len(eqn.invars), functions), eqn)
    broken, tried = {}, 0
    for (name, *_), eqn in kinds.items():
        for which in ways(eqn):
            fn, shapes = lowered(eqn, which), [v.aval for v in eqn.invars]
            try:
                jax.jit(fn).lower(*shapes)
            except Exception:  # a collective outside of its mesh, a callback that is gone
                continue
            tried += 1
            try:
                jax.jit(amp.autocast(fn)).lower(*shapes)
            except Exception as error:
                broken[f"{name}, {which}"] = str(error).splitlines()[0]
    assert not broken
    assert tried > 150


@pytest.mark.parametrize("on", [False, True])
def test_a_name_has_one_dtype(on):
    def fn(x):
        return checkpoint_name(x @ MATRIX, "h") @ MATRIX

    with flags.remat3(on):
        eqns = _jaxpr.walk(jax.make_jaxpr(amp.autocast(fn))(MATRIX).jaxpr)
        (eqn,) = [eqn for eqn in eqns if _compat.primitive(eqn) == "name"]
    # With jax_remat3 a name is an object that was made for float32.
    dtype = "float32" if on else "bfloat16"
    assert {v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)} == {dtype}


def loops(x):
    x = lax.while_loop(lambda x: x[0] < 9, lambda x: 2 * x, lax.map(jnp.sin, x))
    return lax.cond(x[0] > 9, jax.jit(jnp.sin), jnp.cos, on_mesh(True)(jnp.tan)(x))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("scan", _compat.scan_parts),
        ("scan", _compat.bodies),
        ("scan", _flops.eqn_flops),
        ("while", _compat.while_consts),
        ("while", _compat.bodies),
        ("cond", _compat.bodies),
        ("jit", _compat.bodies),
        ("shard_map", _compat.bodies),
        ("shard_map", _compat.shard_map_arguments),
    ],
)
def test_an_equation_of_another_layout_is_refused_in_one_sentence(name, read):
    eqns = _jaxpr.walk(jax.make_jaxpr(loops)(VECTOR).jaxpr)
    eqn = next(eqn for eqn in eqns if _compat.primitive(eqn) == name)
    read(eqn)
    with pytest.raises(NotImplementedError, match=f"'{name}' equation") as caught:
        read(eqn.replace(params={}))
    assert jax.__version__ in str(caught.value) and _compat.NEWEST_TESTED in str(caught.value)
