"""Load the data set that the user names: open it, split it, make it long-tailed; or check every file."""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from jaxtricks import _table
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, custom, folders, images, records, text
from jaxtricks.lab.data.dataset import (
    Data,
    Example,
    Shape,
    Size,
    Source,
    Stored,
    UnreadableError,
)
from jaxtricks.lab.data.images import conform
from jaxtricks.longtail import data as profiles

_ADJECTIVES = {"train": "training", "validation": "validation", "test": "test"}

Indices = dict[str, np.ndarray]


KNOWN = (
    "give a folder or a zip of class folders, FILE.npz, FILE.array_record or a "
    "folder of them, FILE.txt, LIST.txt with --root DIR, "
    "package.module:function, digits or topics"
)


def load(
    name: str,
    *,
    root: str = "",
    imbalance: float = 1.0,
    seed: int = 0,
    validation: float = 0.0,
    test: float = 0.2,
    size: int = 0,
    context: int = 128,
    skip_unreadable: bool = False,
    left_out: Collection[str] | None = None,
) -> Data:
    """Return the data set called name, with a long-tailed training split.

    Scans the images first (all up to 10,000, else 2,000 of them): broken ones must not
    end a run.

    Args:
      name: a folder or a zip of class folders, FILE.npz, FILE.array_record or a folder
        of them, FILE.txt, package.module:function, "digits" or "topics".
      root: the folder that the paths of FILE.txt begin in, which then is a list of
        images.
      imbalance: images of the largest over the smallest class of the training split,
        whose profile is exponential, class 0 the largest. 1 leaves the split as it is.
      seed: of the images that stay and those that are held out.
      validation, test: shares of the training images that are held out for a split that
        the data does not have; 0 makes no validation split.
      size: side of the square that images are resized to; 0 takes what most of them
        have.
      context: characters per window of text.
      skip_unreadable: leave out images that can't be read, after a scan of all of them;
        later on, read another one of the class in place of one that breaks.
      left_out: names of the images that are left out, by the run that goes on: one that
        has broken since is skipped, so that the others stay where they are.

    Raises:
      UserError: nothing there, no images, a class without one, or one that can't be
        read; it names the thing and the cure.
    """
    if is_text(name, root):
        if imbalance != 1:
            raise UserError(
                "--imbalance thins out classes of images, and text has none: drop it"
            )
        return text.load(
            name, context=context, validation=validation, test=test
        )
    stored = open_images(name, root, skip_unreadable=skip_unreadable)
    shares = {"validation": validation, "test": test, "seed": seed}
    # Before the scan, which takes longer.
    index, split_notes = assign(stored, **shares)
    scan = images.scan(stored, everything=skip_unreadable)
    broken = scan.unreadable
    if left_out is not None:
        before = set(left_out)
        broken = {
            i: error for i, error in broken.items() if stored.names[i] in before
        }
    if skip_unreadable and broken and scan.readable:
        stored = leave_out(stored, broken)
        index, split_notes = assign(stored, **shares)
    if not skip_unreadable:
        images.refuse_unreadable(scan)
    shape, notes = images.common_shape(scan, size, name)
    if imbalance != 1:
        train = index["train"]
        tail = long_tail(
            stored.labels[train], len(stored.classes), imbalance, seed
        )
        index["train"] = train[tail]
    all_notes = (*stored.notes, *split_notes, *notes)
    data = _data(
        stored, index, shape, all_notes, skip_unreadable=skip_unreadable
    )
    return data._replace(
        left_out=tuple(error.name for error in broken.values())
    )


def is_text(name: str, root: str = "") -> bool:
    """Return whether the name is that of text; with a root it is that of a list of images."""
    # os.path, here and below: pathlib raises for names that are too long or in folders
    # of others.
    return name == "topics" or (
        name.lower().endswith(".txt") and os.path.isfile(name) and not root
    )


def open_images(
    name: str, root: str = "", *, skip_unreadable: bool = False
) -> Stored:
    """Return the images called name, as they are stored.

    Args:
      name, root: as in `load`.
      skip_unreadable: leave out class folders without an image.

    Raises:
      UserError: nothing there, or nothing that can be used.
    """
    path = pathlib.Path(name)
    if root:
        if not (name.lower().endswith(".txt") and os.path.isfile(name)):
            raise UserError(
                f"--root is for a list of images, and --data {name} is not one: drop it"
            )
        return folders.stored_list(path, pathlib.Path(root))
    if name == "digits":
        return arrays.digits()
    is_file = os.path.isfile(name)
    if is_file and path.suffix.lower() == ".npz":
        return arrays.npz(path)
    if (is_file or os.path.isdir(name)) and records.shards(path):
        return records.stored(path)
    if os.path.isdir(name) or (is_file and folders.is_zip(path)):
        return folders.stored(path, skip_unreadable=skip_unreadable)
    if not os.path.exists(name) and re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        return custom.stored(name)
    problem = (
        "is neither a folder nor a zip, .npz or .txt"
        if os.path.exists(name)
        else "is not there"
    )
    raise UserError(f"--data {name} {problem}: {KNOWN}")


def leave_out(stored: Stored, broken: Mapping[int, UnreadableError]) -> Stored:
    """Leave out the images that can't be read; a note names them."""
    readable = stored.subset(
        np.setdiff1d(np.arange(len(stored.names)), list(broken))
    )
    named = folders.listed(f"{e.name} ({e.reason})" for e in broken.values())
    notes = *stored.notes, f"left out, as they can't be read: {named}"
    have, left = np.unique(stored.labels), np.unique(readable.labels)
    if len(have) > len(left):
        # The classes that are left are numbered anew, and keep their names.
        gone = [stored.classes[c] for c in np.setdiff1d(have, left)]
        notes = (
            *notes,
            "left out, as no image of these classes can be read: "
            f"{folders.listed(gone)}",
        )
        readable = readable._replace(
            labels=np.searchsorted(left, readable.labels).astype(np.int32),
            classes=tuple(stored.classes[c] for c in left),
        )
    return readable._replace(notes=notes)


def _data(
    stored: Stored,
    index: Indices,
    shape: Shape,
    notes: tuple[str, ...],
    *,
    skip_unreadable: bool,
) -> Data:
    labels = stored.labels

    def example(i: int) -> tuple[Example, int]:
        image, nbytes = stored.read(i)
        return {"image": conform(image, shape), "label": labels[i]}, nbytes

    source = Source(example, len(labels), labels, skips=skip_unreadable)
    parts = {split: source.subset(indices) for split, indices in index.items()}
    return Data(
        name=stored.name,
        kind="image",
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        classes=stored.classes,
        shape=shape,
        # What is stored as gray is mostly scans and symbols, whose mirror image is
        # something else.
        flip=shape[-1] == 3 if stored.flip is None else stored.flip,
        counts=np.bincount(
            labels[index["train"]], minlength=len(stored.classes)
        ),
        notes=notes,
    )


# Splits and long tails.


def assign(
    stored: Stored, *, validation: float, test: float, seed: int
) -> tuple[Indices, tuple[str, ...]]:
    """Return the indices of each split, and sentences on where they come from.

    A split that the data has is used as it is; the others are held out of the training
    images. A validation split without a test split is the test split, as ImageNet's is
    used.

    Args:
      stored: the images.
      validation, test: shares to hold out; 0 makes no validation split.
      seed: of what is held out.

    Raises:
      UserError: fewer than two classes, one that has no image in a split, or too few to
        hold some out.
    """
    if len(stored.classes) < 2:
        only = ", ".join(map(repr, stored.classes))
        raise UserError(
            f"{stored.name} has one class ({only}), nothing to tell apart: add another"
        )
    index = {name: np.flatnonzero(stored.split == name) for name in _ADJECTIVES}
    notes = []
    if len(index["validation"]) and not len(index["test"]):
        index["test"], index["validation"] = index["validation"], index["test"]
        notes.append(
            "test: the data's own validation split, as it has no test split"
        )
    if not len(index["train"]):
        raise UserError(
            f"{stored.name} has no training images: it needs a train split"
        )
    shares = {"test": test, "validation": validation}
    held = {
        name: share
        for name, share in shares.items()
        if share and not len(index[name])
    }
    if not notes:
        notes += [
            f"{name}: the data's own split"
            for name in shares
            if len(index[name])
        ]
    notes += [
        f"{name}: {share:.3g} of every class of the training images, held out "
        f"by seed {seed}"
        for name, share in held.items()
    ]
    train = index["train"]
    _check_sizes(stored, train, held)
    rest, *out = hold_out(stored.labels[train], seed, *held.values())
    index["train"] = train[rest]
    for name, members in zip(held, out, strict=True):
        index[name] = train[members]
    if not len(index["test"]):
        raise UserError(
            f"{stored.name} has no test split: hold one out, with --test above 0"
        )
    _check_classes(stored, index)
    return {
        name: indices for name, indices in index.items() if len(indices)
    }, tuple(notes)


def hold_out(
    labels: np.ndarray, seed: int, *shares: float
) -> tuple[np.ndarray, ...]:
    """Return indices (rest, held out, ...): the same share of every class, and at least one of each.

    What is held out for the first share does not depend on the shares after it.
    """
    # Class by class, so that one class's images don't decide on those of another.
    rng = np.random.default_rng(seed)
    out: list[list[np.ndarray]] = [[] for _ in shares]
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        sizes = [_held(share, len(members)) for share in shares]
        for part, stop, size in zip(out, np.cumsum(sizes), sizes, strict=True):
            part.append(members[stop - size : stop])
    held = [np.sort(np.concatenate(part)) for part in out]
    rest = np.arange(len(labels))
    if held:
        rest = np.setdiff1d(rest, np.concatenate(held))
    return rest, *held


def long_tail(
    labels: np.ndarray, num_classes: int, imbalance: float, seed: int
) -> np.ndarray:
    """Return indices that make a split long-tailed: an exponential profile, class 0 the largest."""
    # A class can't have more than it has: the profile is cut there.
    have = np.bincount(labels, minlength=num_classes)
    profile = profiles.exponential_counts(
        int(have.max()), num_classes, imbalance
    )
    return np.asarray(
        profiles.longtail_indices(labels, np.minimum(profile, have), seed)
    )


def _held(share: float, size: int) -> int:
    return max(1, round(share * size))


def _check_sizes(
    stored: Stored, train: np.ndarray, held: dict[str, float]
) -> None:
    counts = np.bincount(stored.labels[train], minlength=len(stored.classes))
    for name, size in zip(stored.classes, counts.tolist(), strict=True):
        taken = {split: _held(share, size) for split, share in held.items()}
        if size and sum(taken.values()) >= size:
            out = " and ".join(f"{n} for {split}" for split, n in taken.items())
            raise UserError(
                f"class {name!r} of {stored.name} has {size} "
                f"image{'s' * (size > 1)}, and holding out {out} leaves none "
                "to train on: add some, or remove the class"
            )


def _check_classes(stored: Stored, index: Indices) -> None:
    for split, indices in index.items():
        counts = np.bincount(
            stored.labels[indices], minlength=len(stored.classes)
        )
        if len(indices) and not counts.all():
            name = stored.classes[int(np.argmin(counts))]
            raise UserError(
                f"class {name!r} of {stored.name} has no {_ADJECTIVES[split]} "
                "image: add some"
            )


# The answer to --check-data.


@dataclasses.dataclass(frozen=True)
class Report:
    """Contents of a data set; str() is the report.

    Attributes:
      name: what the user called it.
      kind: "image" or "text".
      files: images, or windows of text.
      splits: split -> int [C] images of each class, those that can't be read included;
        windows of text are one class.
      classes: names in label order.
      sizes: (height, width) -> images that have it.
      gray: images stored with one channel.
      unreadable: (name, reason) of every image that can't be read.
      notes: sentences on what training would do.
    """

    name: str
    kind: str
    files: int
    splits: dict[str, np.ndarray]
    classes: tuple[str, ...]
    sizes: collections.Counter[Size]
    gray: int
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            (name, *(int(n[c]) for n in self.splits.values()))
            for c, name in enumerate(self.classes)
        ]
        if len(rows) > 1:
            rows.append(("all", *(int(n.sum()) for n in self.splits.values())))
        what = "images" if self.kind == "image" else "windows of text"
        lines = [f"{self.name}: {self.files} {what}", *self._lines()]
        lines += [
            "",
            str(_table.make(("class", *self.splits), rows)),
            "",
            *self.notes,
        ]
        lines += [
            f"can't be read: {name} ({reason})"
            for name, reason in self.unreadable
        ]
        return "\n".join(lines)

    def _lines(self) -> Sequence[str]:
        if not self.sizes:
            return []
        [(common, n)] = self.sizes.most_common(1)
        smallest, largest = (
            images.smallest(self.sizes),
            images.largest(self.sizes),
        )
        total = self.sizes.total()
        return (
            f"sizes: {images.spell(smallest)} to {images.spell(largest)}, most "
            f"often {images.spell(common)} ({n} of {total})",
            f"colour: {total - self.gray}, gray: {self.gray}, unreadable: "
            f"{len(self.unreadable)}",
        )


def check(
    name: str,
    *,
    root: str = "",
    seed: int = 0,
    validation: float = 0.0,
    test: float = 0.2,
    size: int = 0,
    context: int = 128,
    skip_unreadable: bool = False,
) -> Report:
    """Decode every file of the data set called name, and report what there is.

    Args:
      name, root, seed, validation, test, size, context, skip_unreadable: as in `load`.

    Raises:
      UserError: as `load`, but not for images that can't be read.
    """
    if is_text(name, root):
        return _of_text(
            text.load(name, context=context, validation=validation, test=test)
        )
    stored = open_images(name, root, skip_unreadable=skip_unreadable)
    index, notes = assign(stored, validation=validation, test=test, seed=seed)
    scan = images.scan(stored, everything=True)
    if scan.readable:
        notes += images.common_shape(scan, size, name)[1]
    num_classes = len(stored.classes)
    return Report(
        name=name,
        kind="image",
        files=len(stored.names),
        splits={
            s: np.bincount(stored.labels[i], minlength=num_classes)
            for s, i in index.items()
        },
        classes=stored.classes,
        sizes=scan.sizes,
        gray=scan.gray,
        unreadable=tuple((e.name, e.reason) for e in scan.unreadable.values()),
        notes=(*stored.notes, *notes),
    )


def _of_text(data: Data) -> Report:
    counts = {split: np.array([len(source)]) for split, source in data.splits()}
    return Report(
        name=data.name,
        kind="text",
        files=int(sum(n.sum() for n in counts.values())),
        splits=counts,
        classes=("windows",),
        sizes=collections.Counter(),
        gray=0,
        unreadable=(),
        notes=(*data.notes, f"{len(data.classes)} different characters"),
    )
