"""Calls with integers that are not Python's: NumPy's, and arrays without axes; see test_integers."""

import json

import jax
import jax.numpy as jnp
import jaxtricks as jt
import numpy as np
from flax import nnx
from jaxtricks.reparam import AvgPool, Conv, Identity, Sequential, Sum

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))
NODE = Sum(Conv(KERNEL), Identity(2))
POINTS = Sequential(Conv(KERNEL[:1, :1]))


def _loss(x, w):
    return jnp.sin(jnp.sin(x @ w) @ w).sum()


def _planned(n):
    found = jt.remat.plan(_loss, jnp.ones((64, 8)), jnp.eye(8), budget_bytes=1.0, argnums=n)
    return found.peak, found.baseline


def _scanned(n):
    return jt.remat.scan(lambda c, x: (c * x, c), jnp.float32(2), jnp.ones(12), levels=n)[0]


def _sequential(n):
    run = jt.remat.sequential([jnp.sin] * 6, segments=n)
    return str(jax.make_jaxpr(jax.grad(lambda x: run(x).sum()))(jnp.ones(3)))


def _echoed(n):
    step = jt.echo.echo_step(lambda carry, batch: (carry + batch.sum(), carry), n)
    return step(jnp.zeros(()), jnp.ones(4), 0, jax.random.key(0))


def _echo(n):
    return list(jt.echo.echo([1, 2, 3], n, distance=1))


def _module(kind, **settings):
    def call(n):
        given = {name: n if value is None else value for name, value in settings.items()}
        size = given.pop("kernel_size", (3, 3))
        made = kind(2, 2, size, rngs=nnx.Rngs(0), **given)
        return made(X[:, 0] if np.ndim(size) == 0 else X)

    return call


CALLS = {
    "standardize": lambda n: jt.weightstd.standardize(KERNEL, out_axis=n),
    "standardize axes": lambda n: jt.weightstd.standardize(KERNEL, out_axis=(n, 3)),
    "fuse": lambda n: jt.reparam.fuse(NODE, n + 2).kernel,
    "fuse points": lambda n: jt.reparam.fuse(Sum(POINTS, Identity(2)), n).kernel,
    "strides": lambda n: jt.reparam.apply(NODE, X, strides=n),
    "dilation": lambda n: jt.reparam.apply(NODE, X, dilation=n),
    "padding": lambda n: jt.reparam.apply(NODE, X, padding=n),
    "paddings": lambda n: jt.reparam.apply(NODE, X, padding=(n, (n, 0))),
    "pool": lambda n: jt.reparam.apply(AvgPool(n), X),
    "error_bound": lambda n: jt.reparam.error_bound(NODE, X, strides=n),
    "plan": lambda n: _planned(n - 1),
    "scan": _scanned,
    "sequential": _sequential,
    "echo_step": _echoed,
    "echo": _echo,
    "WSConv": _module(jt.nnx.WSConv, kernel_size=None),
    "WSConv strides": _module(jt.nnx.WSConv, strides=None, padding=(1, (0, 1))),
    "WSConv padding": _module(jt.nnx.WSConv, padding=None, kernel_dilation=None),
    "RepVGGBlock": _module(jt.nnx.RepVGGBlock, strides=None, padding=None),
    "DiverseBranchBlock": _module(jt.nnx.DiverseBranchBlock, kernel_size=None),
    "DilatedReparamBlock": _module(jt.nnx.DilatedReparamBlock, strides=None, kernel_size=(5, 5)),
}


KINDS = {"int64": np.int64, "uint8": np.uint8, "NumPy []": np.asarray, "JAX []": jnp.asarray}


def main():
    """Print {"tried": calls, "failed": {call: what happened}} as JSON."""
    tried, failed = 0, {}
    for name, call in CALLS.items():
        expected = call(2)
        for kind, make in KINDS.items():
            tried += 1
            try:
                jax.tree.map(np.testing.assert_array_equal, call(make(2)), expected)
            except (TypeError, ValueError, AssertionError, IndexError) as error:
                failed[f"{name}, {kind}"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"tried": tried, "failed": failed}))


if __name__ == "__main__":
    main()
