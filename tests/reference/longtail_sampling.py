"""NumPy float64 references of long-tailed sampling and metrics, written from the definitions."""

import numpy as np


def probabilities(counts, power):
    out = np.array([float(n) ** power if n > 0 else 0.0 for n in counts])
    return out / out.sum()


def effective_number(counts, beta):
    """Class probability when example i has weight (1 - beta) / (1 - beta^n), one example at a time."""
    total = [sum((1 - beta) / (1 - beta**n) for _ in range(n)) for n in counts]
    return np.array(total) / sum(total)


def meta_rates(counts, power):
    value = np.array([1 / float(n) ** power for n in counts])
    return value / (value.min() + value.max())


def scores(labels, predictions, confidence, counts, many, few, bins=15):
    """Everything `metrics.summary` says, from the rows themselves."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    right = labels == predictions
    num_classes = len(counts)
    per_class = np.array(
        [right[labels == c].mean() if np.any(labels == c) else np.nan for c in range(num_classes)]
    )
    present = ~np.isnan(per_class)
    group = np.where(counts > many, "many", np.where(counts < few, "few", "medium"))
    out = {
        "accuracy": right.mean(),
        "balanced_accuracy": per_class[present].mean(),
        "balanced_error": 1 - per_class[present].mean(),
        "geometric_mean": np.prod(per_class[present]) ** (1 / present.sum()),
        "harmonic_mean": 0.0
        if np.any(per_class[present] == 0)
        else present.sum() / np.sum(1 / per_class[present]),
        "ece": calibration(right, confidence, bins),
        "per_class": per_class,
    }
    for name in ("many", "medium", "few"):
        member = present & (group == name)
        out[name] = per_class[member].mean() if member.any() else np.nan
        rows = np.isin(labels, np.flatnonzero(group == name))
        out[f"ece_{name}"] = calibration(right[rows], confidence[rows], bins)
    return out


def calibration(right, confidence, bins):
    """Guo et al.: bins ((b - 1) / B, b / B]."""
    error, n = 0.0, 0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            error += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
        n += inside.sum()
    return error / n if n else np.nan
