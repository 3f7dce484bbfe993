"""NumPy float64 references of what is fitted after training, written from the equations."""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def balanced_cross_entropy(z, y, counts, tau, temperature):
    """mean over the classes of the mean of -log softmax(z / T - tau log pi)_y."""
    pi = np.asarray(counts, np.float64) / np.sum(counts)
    p = softmax(z / temperature - tau * np.log(pi))
    losses = -np.log(p[np.arange(len(y)), y])
    return np.mean([losses[y == c].mean() for c in np.unique(y)])


def balanced_accuracy(z, y, counts, tau):
    pi = np.asarray(counts, np.float64) / np.sum(counts)
    right = np.argmax(z - tau * np.log(pi), -1) == y
    return np.mean([right[y == c].mean() for c in np.unique(y)])


def expectation_maximisation(z, source, steps):
    """q_c <- mean of q_c / pi_c p_ic, normalised over c, one example at a time."""
    pi = np.asarray(source, np.float64) / np.sum(source)
    p, q = softmax(np.asarray(z, np.float64)), pi.copy()
    for _ in range(steps):
        members = [row * q / pi / np.sum(row * q / pi) for row in p]
        q = np.mean(members, axis=0)
    return q


def ball(w, radius):
    """Every column longer than the radius, shortened to it."""
    return np.stack([c * radius / max(radius, np.linalg.norm(c)) for c in w.T], -1)
