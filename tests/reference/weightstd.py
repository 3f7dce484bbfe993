"""Weight standardization in NumPy float64, written from the formulas of the four conventions."""

import numpy as np


def standardize(w, gain, preset):
    axes = tuple(range(w.ndim - 1))
    n = w[..., 0].size
    centred = w - w.mean(axes)
    var = (centred**2).mean(axes)
    if preset == "nfnet":
        divisor = np.sqrt(np.maximum(var * n, 1e-4))
    elif preset == "timm":
        divisor = np.sqrt(var + 1e-6) * np.sqrt(n)
    elif preset == "bit":
        divisor = np.sqrt(var) + 1e-5
    elif preset == "qiao":
        divisor = np.sqrt(var * n / (n - 1)) + 1e-5
    return centred / divisor * gain
