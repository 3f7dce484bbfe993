"""NumPy float64 references of the stateful and many-headed losses, written from the equations."""

import numpy as np


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def equalization_v2(batches, num_classes, gamma, mu, alpha, background=False):
    """[(losses, positive, negative)] of a sequence of (z, y) batches, one logit at a time."""
    positive, negative, out = np.zeros(num_classes), np.zeros(num_classes), []
    for z, y in batches:
        d = np.ones(num_classes + background)
        for c in range(num_classes):
            if positive[c] + negative[c] > 0:
                d[c] = sigmoid(gamma * (positive[c] / (negative[c] + 1e-10) - mu))
        u, losses = 1 + alpha * (1 - d), np.zeros(len(z))
        for i, row in enumerate(z):
            for c, x in enumerate(row):
                p = sigmoid(x)
                if c == y[i]:
                    losses[i] -= u[c] * np.log(p)
                    gain = (u[c] * (1 - p), 0.0)
                else:
                    losses[i] -= d[c] * np.log(1 - p)
                    gain = (0.0, d[c] * p)
                if c < num_classes:
                    positive[c] += gain[0]
                    negative[c] += gain[1]
        out.append((losses, positive.copy(), negative.copy()))
    return out


def online_seesaw(batches, num_classes, p, q):
    """[(losses, counts)] of a sequence of (z, y) batches."""
    counts, out = np.zeros(num_classes), []
    for z, y in batches:
        np.add.at(counts, y, 1)
        n, losses = np.maximum(counts, 1), []
        for row, label in zip(z, y, strict=True):
            s = softmax(row)
            factor = np.minimum(1, n / n[label]) ** p
            factor = factor * np.maximum(1, s / max(s[label], 0.01)) ** q
            factor[label] = 1
            losses.append(-np.log(np.exp(row[label]) / np.sum(factor * np.exp(row))))
        out.append((np.array(losses), counts.copy()))
    return out


def class_means(batches, num_classes, mu):
    """The means after each batch of (x, y), and the undivided running sum m <- mu m + mean(x)."""
    history = [[] for _ in range(num_classes)]
    total, out = 0.0, []
    for x, y in batches:
        total = mu * total + x.mean(0)
        for c in range(num_classes):
            if np.any(y == c):
                history[c].append(x[y == c].mean(0))
        means = np.zeros((num_classes, x.shape[1]))
        for c, past in enumerate(history):
            if past:
                w = mu ** np.arange(len(past))[::-1]
                means[c] = w @ np.array(past) / w.sum()
        out.append((means, total))
    return out


def divergence(z, temperature):
    """[E, N, C] -> [N]."""
    t = np.broadcast_to(np.asarray(temperature, np.float64), z.shape[-1:])
    out = np.zeros(z.shape[1])
    for i in range(z.shape[1]):
        p = softmax(z[:, i].mean(0) / t)
        for expert in z[:, i]:
            out[i] += t.mean() ** 2 * np.sum(p * np.log(p / softmax(expert / t)))
    return out


def sade(z, y, counts, tau):
    """Equal counts share; written by walking over the sorted classes."""
    pi = counts / counts.sum()
    rising = sorted(pi)
    inverse = np.zeros(len(pi))
    for c, share in enumerate(pi):
        places = [k for k, other in enumerate(rising) if other == share]
        inverse[c] = np.mean([rising[len(pi) - 1 - k] for k in places])
    offsets = [np.zeros(len(pi)), np.log(pi), np.log(pi) - tau * np.log(inverse)]
    out = np.zeros(len(y))
    for expert, offset in zip(z, offsets, strict=True):
        for i, label in enumerate(y):
            out[i] -= np.log(softmax(expert[i] + offset)[label])
    return out


def paco(z, y, f, k, queue, queue_y, counts, alpha, beta, gamma, t, centre_t):
    """One anchor and one comparison at a time; a queue label of -1 is an empty place."""
    pi, others, theirs = counts / counts.sum(), [*f, *k, *queue], [*y, *y, *queue_y]
    out = []
    for i, label in enumerate(y):
        centres = np.exp((z[i] + np.log(pi)) / centre_t)
        denominator, top, weight = centres.sum(), beta * np.log(centres[label]), beta
        for j, (other, its) in enumerate(zip(others, theirs, strict=True)):
            if j == i or its == -1:
                continue
            denominator += gamma * np.exp(f[i] @ other / t)
            if its == label:
                top, weight = top + alpha * f[i] @ other / t, weight + alpha
        out.append(np.log(denominator) - top / weight)
    return np.array(out)


def kd(z, teacher, t, power):
    out = []
    for student, other in zip(z, teacher, strict=True):
        target = softmax(other / t) ** power
        target /= target.sum()
        out.append(t**2 * np.sum(target * np.log(target / softmax(student / t))))
    return np.array(out)
