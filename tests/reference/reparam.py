"""Convolution, pooling and frozen normalization in NumPy float64, by their definitions."""

import itertools

import numpy as np


def conv(x, kernel, *, strides, pads, dilation, groups=1, bias=None):
    """x [N, *spatial, I], kernel [*size, I / groups, O]; one output at a time per tap."""
    x = pad(x, pads)
    size, (fan_in, out) = kernel.shape[:-2], kernel.shape[-2:]
    shape = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:-1], size, strides, dilation, strict=True)
    ]
    y = np.zeros((x.shape[0], *shape, out))
    for tap in itertools.product(*map(range, size)):
        window = tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s)
            for t, d, s, n in zip(tap, dilation, strides, shape, strict=True)
        )
        part = x[(slice(None), *window)]
        for g in range(groups):
            ins = slice(g * fan_in, (g + 1) * fan_in)
            outs = slice(g * out // groups, (g + 1) * out // groups)
            y[..., outs] += part[..., ins] @ kernel[tap][:, outs]
    return y if bias is None else y + bias


def pad(x, pads):
    for axis, (low, high) in enumerate(pads, 1):
        x = np.take(x, range(max(-low, 0), x.shape[axis] - max(-high, 0)), axis)
        width = [(0, 0)] * x.ndim
        width[axis] = (max(low, 0), max(high, 0))
        x = np.pad(x, width)
    return x


def norm(x, mean, var, scale, bias, epsilon):
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias
