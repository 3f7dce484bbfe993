"""Muon in NumPy float64, one matrix at a time."""

import itertools

import numpy as np


def newton_schulz(x, steps=5, coefficients=(3.4445, -4.7750, 2.0315), eps=1e-8):
    """What Muon takes for U V^T of x = U S V^T; the singular values end near 1."""
    a, b, c = coefficients
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(steps):
        square = x.T @ x
        x = a * x + x @ (b * square + c * square @ square)
    return x


def step(g, slots, count, roles, *, rate, beta=0.95):
    """The update of one leaf, with Nesterov's momentum; slots is a dict that keeps the average."""
    t = count + 1
    m = slots["m"] = beta * slots.get("m", 0.0) + (1 - beta) * g
    direction = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    rest = [i for i, role in enumerate(roles) if role in ("batch", "none")]
    out = np.empty_like(g)
    for index in itertools.product(*(range(g.shape[i]) for i in rest)):
        at = [slice(None)] * g.ndim
        for axis, i in zip(rest, index, strict=True):
            at[axis] = i
        inner = [role for role in roles if role in ("in", "out")]
        out[tuple(at)] = -rate * _orthogonal(direction[tuple(at)], inner)
    return out


def _orthogonal(x, roles):
    # argsort is stable: the axes of each side stay in their order.
    order = np.argsort([role == "out" for role in roles], kind="stable")
    rows = int(np.prod([n for n, role in zip(x.shape, roles, strict=True) if role == "in"]))
    matrix = np.transpose(x, order).reshape(rows, -1)
    scale = np.sqrt(max(1, matrix.shape[1] / rows))
    shape = [x.shape[i] for i in order]
    return np.transpose(scale * newton_schulz(matrix).reshape(shape), np.argsort(order))
