"""Which example is in which split, and long tails."""

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data.dataset import Stored
from jaxtricks.longtail import data as profiles

_CALLED = {"train": "training", "validation": "validation", "test": "test"}

Indices = dict[str, np.ndarray]


def assign(
    stored: Stored, *, validation: float, test: float, seed: int
) -> tuple[Indices, tuple[str, ...]]:
    """Indices of each split, and sentences on where they come from.

    A split that the data has is used as it is; the others are held out of the training images. A
    validation split without a test split is the test split, as ImageNet's is used.

    Args:
      stored: the images.
      validation, test: shares to hold out; 0 makes no validation split.
      seed: of what is held out.

    Raises:
      UserError: fewer than two classes, one that has no image in a split, or too few to hold some out.
    """
    if len(stored.classes) < 2:
        only = ", ".join(map(repr, stored.classes))
        raise UserError(f"{stored.name} has one class ({only}), nothing to tell apart: add another")
    index = {name: np.flatnonzero(stored.where == name) for name in _CALLED}
    notes = []
    if len(index["validation"]) and not len(index["test"]):
        index["test"], index["validation"] = index["validation"], index["test"]
        notes.append("test: the data's own validation split, as it has no test split")
    if not len(index["train"]):
        raise UserError(f"{stored.name} has no training images: it needs a train split")
    shares = {"test": test, "validation": validation}
    held = {name: share for name, share in shares.items() if share and not len(index[name])}
    own = [name for name in shares if len(index[name])]
    notes += [f"{name}: the data's own split" for name in own if not notes]
    notes += [
        f"{name}: {share:.3g} of every class of the training images, held out by seed {seed}"
        for name, share in held.items()
    ]
    train = index["train"]
    _check_sizes(stored, train, held)
    rest, *out = hold_out(stored.labels[train], seed, *held.values())
    index |= {"train": train[rest]} | {
        name: train[chosen] for name, chosen in zip(held, out, strict=True)
    }
    if not len(index["test"]):
        raise UserError(f"{stored.name} has no test split: hold one out, with --test above 0")
    _check_classes(stored, index)
    return {name: indices for name, indices in index.items() if len(indices)}, tuple(notes)


def hold_out(labels: np.ndarray, seed: int, *shares: float) -> tuple[np.ndarray, ...]:
    """Indices (rest, held out, ...): the same share of every class, and at least one of each.

    What is held out for the first share does not depend on the shares after it.
    """
    rng = np.random.default_rng(seed)
    out: list[list[np.ndarray]] = [[] for _ in shares]
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        sizes = [_held(share, len(members)) for share in shares]
        for chosen, stop, size in zip(out, np.cumsum(sizes), sizes, strict=True):
            chosen.append(members[stop - size : stop])
    held = [np.sort(np.concatenate(chosen)) for chosen in out]
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(held)) if held else None
    return (np.arange(len(labels)) if rest is None else rest, *held)


def long_tail(labels: np.ndarray, num_classes: int, imbalance: float, seed: int) -> np.ndarray:
    """Indices that make a split long-tailed: an exponential profile, class 0 keeps the most."""
    have = np.bincount(labels, minlength=num_classes)
    profile = profiles.exponential_counts(int(have.max()), num_classes, imbalance)
    return np.asarray(profiles.longtail_indices(labels, np.minimum(profile, have), seed))


def _held(share: float, size: int) -> int:
    return max(1, round(share * size))


def _check_sizes(stored: Stored, train: np.ndarray, held: dict[str, float]) -> None:
    counts = np.bincount(stored.labels[train], minlength=len(stored.classes))
    for name, size in zip(stored.classes, counts.tolist(), strict=True):
        taken = {split: _held(share, size) for split, share in held.items()}
        if size and sum(taken.values()) >= size:
            out = " and ".join(f"{n} for {split}" for split, n in taken.items())
            raise UserError(
                f"class {name!r} of {stored.name} has {size} image{'s' * (size > 1)}, and holding out "
                f"{out} leaves none to train on: add some, or remove the class"
            )


def _check_classes(stored: Stored, index: Indices) -> None:
    for split, indices in index.items():
        counts = np.bincount(stored.labels[indices], minlength=len(stored.classes))
        if len(indices) and not counts.all():
            name = stored.classes[int(np.argmin(counts))]
            raise UserError(
                f"class {name!r} of {stored.name} has no {_CALLED[split]} image: add some"
            )
