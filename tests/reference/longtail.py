"""NumPy float64 references of the long-tailed losses, written from the equations."""

import numpy as np


def hard_loss(z, y, *, counts, gamma=0.0, tau=0.0, margins=None, s=1.0, w=None, focal=0.0):
    """-w_y (1-p_y)^focal log p_y, p = softmax(s (z - m_y e_y) / Delta + tau log pi), one by one."""
    z, counts = np.asarray(z, np.float64), np.asarray(counts, np.float64)
    out = np.empty(len(z))
    for i, (row, label) in enumerate(zip(z, y, strict=True)):
        row = row.copy()
        if margins is not None:
            row[label] -= margins[label]
        row = s * row / (counts.max() / counts) ** gamma + tau * np.log(counts / counts.sum())
        row -= row.max()
        p = np.exp(row) / np.exp(row).sum()
        weight = 1.0 if w is None else w[label]
        out[i] = -weight * (1 - p[label]) ** focal * (row[label] - np.log(np.exp(row).sum()))
    return out


def soft_loss(z, q, **settings):
    """The expectation of the hard loss under q."""
    num_classes = z.shape[-1]
    columns = [hard_loss(z, np.full(len(z), c), **settings) for c in range(num_classes)]
    return np.sum(q * np.stack(columns, -1), -1)


def effective_number(counts, beta):
    raw = (1 - beta) / (1 - np.power(beta, np.asarray(counts, np.float64)))
    return raw / raw.sum() * len(raw)
