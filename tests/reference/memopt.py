"""Big Vision's Adafactor in NumPy float64, one leaf at a time."""

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
