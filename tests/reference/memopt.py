"""Adafactor and SM3 in NumPy float64, one leaf at a time and written slice by slice."""

import itertools

import numpy as np


def big_vision(g, slots, step, *, min_dim=32, rate=0.8, cap=0.999, momentum=0.9, eps=1e-30):
    """Direction of descent; slots is a dict that keeps the moments between calls."""
    beta2 = min(cap, 1 - (step + 1.0) ** -rate)
    squared = np.square(g) + eps
    order = np.argsort(np.shape(g), kind="stable")
    if np.ndim(g) >= 2 and g.shape[order[-2]] >= min_dim:
        d1, d0 = int(order[-2]), int(order[-1])
        row, column = np.mean(squared, axis=d0), np.mean(squared, axis=d1)
        row = slots["row"] = beta2 * slots.get("row", 0) + (1 - beta2) * row
        column = slots["column"] = beta2 * slots.get("column", 0) + (1 - beta2) * column
        row, column = np.expand_dims(row, d0), np.expand_dims(column, d1)
        v = row * column / np.mean(row, axis=d1, keepdims=True)
    else:
        v = slots["v"] = beta2 * slots.get("v", 0) + (1 - beta2) * squared
    slots["m"] = momentum * slots.get("m", 0) + (1 - momentum) * g / np.sqrt(v)
    return slots["m"]


def adafactor(g, p, slots, step, roles, *, rate, min_dim=2, clip=1.0, eps=(1e-30, 1e-3), power=0.8):
    """New parameter; V of every ("batch", "none") index is rebuilt as a whole matrix."""
    beta2 = 1 - (step + 1.0) ** -power
    batch = [i for i, r in enumerate(roles) if r == "batch"]
    new = np.empty_like(p)
    for index in _indices(g.shape, batch):
        # Inside a slice of the batch: once more slice by slice over the "none" axes.
        inner = [r for r in roles if r != "batch"]
        none = [i for i, r in enumerate(inner) if r == "none"]
        u = np.empty(g[index].shape)
        for sub in _indices(u.shape, none):
            key = (str(index), str(sub))
            u[sub] = _unclipped(
                g[index][sub], [r for r in inner if r != "none"], slots, key, beta2, eps[0], min_dim
            )
        root = np.sqrt(np.mean(np.square(u)))
        scale = max(eps[1], np.sqrt(np.mean(np.square(p[index]))))
        new[index] = p[index] - rate * scale * u / max(1.0, root / clip)
    return new


def _unclipped(g, roles, slots, key, beta2, eps, min_dim):
    order = [i for i, r in enumerate(roles) if r == "in"] + [
        i for i, r in enumerate(roles) if r == "out"
    ]
    rows = int(np.prod([g.shape[i] for i, r in enumerate(roles) if r == "in"]))
    matrix = np.transpose(g, order).reshape(rows, -1) if roles else g
    squared = np.square(matrix) + eps
    if set(roles) == {"in", "out"} and min(matrix.shape) >= min_dim:
        row, column = slots.get(key, (0, 0))
        row = beta2 * row + (1 - beta2) * squared.mean(1)
        column = beta2 * column + (1 - beta2) * squared.mean(0)
        slots[key] = row, column
        v = np.outer(row, column) / row.mean()
    else:
        v = slots[key] = beta2 * slots.get(key, 0) + (1 - beta2) * squared
    result = matrix / np.sqrt(v)
    if not roles:
        return result
    back = [g.shape[i] for i in order]
    return np.transpose(result.reshape(back), np.argsort(order))


def sm3(g, slots, roles, *, eps=1e-30):
    """g / sqrt(nu); one accumulator per axis of every slice of the batch."""
    batch = [i for i, r in enumerate(roles) if r == "batch"]
    out = np.empty_like(g)
    for index in _indices(g.shape, batch):
        x = g[index]
        key = str(index)
        if x.ndim <= 1:
            nu = slots[key] = slots.get(key, 0) + np.square(x)
        else:
            covers = slots.get(key, [np.zeros(n) for n in x.shape])
            nu = np.square(x) + np.min(
                [_along(a, i, x.shape) for i, a in enumerate(covers)], axis=0
            )
            others = [tuple(j for j in range(x.ndim) if j != i) for i in range(x.ndim)]
            slots[key] = [nu.max(axis) for axis in others]
        out[index] = x / np.sqrt(nu + eps)
    return out


def _along(a, axis, shape):
    return np.broadcast_to(a.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def _indices(shape, axes):
    """Index tuples that fix the given axes and leave the others whole."""
    for values in itertools.product(*(range(shape[i]) for i in axes)):
        fixed = dict(zip(axes, values, strict=True))
        yield tuple(fixed.get(i, slice(None)) for i in range(len(shape)))
