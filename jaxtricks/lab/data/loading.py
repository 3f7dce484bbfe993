"""From the name that the user gives to a data set that can be trained on."""

import os
import pathlib
import re
from collections.abc import Collection, Mapping

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, custom, files, lists, look, records, splits, text, zips
from jaxtricks.lab.data.dataset import Data, Example, Shape, Source, Stored, UnreadableError
from jaxtricks.lab.data.images import conform

KNOWN = (
    "give a folder or a zip of class folders, FILE.npz, FILE.array_record or a folder of them, "
    "FILE.txt, LIST.txt with --root DIR, package.module:function, digits or topics"
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
    """The data set called name, its training split made long-tailed.

    Looks at the images first (all up to 10,000, else 2,000 of them): broken ones must not end a run.

    Args:
      name: a folder or a zip of class folders, FILE.npz, FILE.array_record or a folder of them,
        FILE.txt, package.module:function, "digits" or "topics".
      root: the folder that the paths of FILE.txt begin in, which then is a list of images.
      imbalance: images of the largest over the smallest class of the training split; class 0 keeps
        the most (exponential profile). 1 keeps the split as it is.
      seed: which images are kept and which are held out.
      validation, test: shares of the training images that are held out for a split that the data
        does not have; 0 makes no validation split.
      size: side of the square that images are resized to; 0 takes what most of them have.
      context: characters a window of text.
      skip_unreadable: leave out images that can't be read, after a look at all of them; later on, read
        another one of the class in place of one that breaks.
      left_out: names of the images that are left out, where a run has found them before: one that has
        broken since is skipped, so that the others stay where they are.

    Raises:
      UserError: nothing there, no images, a class without one, or one that can't be read; it names
        the thing and the cure.
    """
    if is_text(name, root):
        if imbalance != 1:
            raise UserError("--imbalance thins out classes of images, and text has none: drop it")
        return text.load(name, context=context, validation=validation, test=test)
    stored = open_images(name, root, skip_unreadable=skip_unreadable)
    shares = {"validation": validation, "test": test, "seed": seed}
    index, split_notes = splits.assign(stored, **shares)  # before the look, which takes longer
    seen = look.look(stored, everything=skip_unreadable)
    broken = seen.unreadable
    if left_out is not None:
        before = set(left_out)
        broken = {i: error for i, error in broken.items() if stored.names[i] in before}
    if skip_unreadable and broken and seen.readable:
        stored = leave_out(stored, broken)
        index, split_notes = splits.assign(stored, **shares)
    look.refuse_unreadable(seen._replace(unreadable={}) if skip_unreadable else seen)
    shape, notes = look.aim(seen, size, name)
    if imbalance != 1:
        train = index["train"]
        kept = splits.long_tail(stored.labels[train], len(stored.classes), imbalance, seed)
        index["train"] = train[kept]
    every = (*stored.notes, *split_notes, *notes)
    data = _data(stored, index, shape, every, skip_unreadable=skip_unreadable)
    return data._replace(left_out=tuple(error.name for error in broken.values()))


def is_text(name: str, root: str = "") -> bool:
    """Whether the name is that of text; with a root it is that of a list of images."""
    # os.path, here and below: pathlib raises for names that are too long or in folders of others.
    return name == "topics" or (name.lower().endswith(".txt") and os.path.isfile(name) and not root)


def open_images(name: str, root: str = "", *, skip_unreadable: bool = False) -> Stored:
    """The images called name, as they are stored.

    Args:
      name, root: as `load` has them.
      skip_unreadable: leave out class folders without an image.

    Raises:
      UserError: nothing there, or nothing that can be used.
    """
    path = pathlib.Path(name)
    if root:
        if not (name.lower().endswith(".txt") and os.path.isfile(name)):
            raise UserError(f"--root is for a list of images, and --data {name} is none: drop it")
        return lists.stored(path, pathlib.Path(root))
    if name == "digits":
        return arrays.digits()
    is_file = os.path.isfile(name)
    if is_file and path.suffix.lower() == ".npz":
        return arrays.npz(path)
    if (is_file or os.path.isdir(name)) and records.shards(path):
        return records.stored(path)
    if os.path.isdir(name) or (is_file and zips.is_zip(path)):
        return files.stored(path, skip_unreadable=skip_unreadable)
    if not os.path.exists(name) and re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        return custom.stored(name)
    problem = (
        "is neither a folder nor a zip, .npz or .txt" if os.path.exists(name) else "is not there"
    )
    raise UserError(f"--data {name} {problem}: {KNOWN}")


def leave_out(stored: Stored, broken: Mapping[int, UnreadableError]) -> Stored:
    """Without the images that can't be read, which a note names."""
    kept = stored.subset(np.setdiff1d(np.arange(len(stored.names)), list(broken)))
    named = files.listed(f"{e.name} ({e.reason})" for e in broken.values())
    notes = *stored.notes, f"left out, as they can't be read: {named}"
    have, left = np.unique(stored.labels), np.unique(kept.labels)
    if len(have) > len(left):
        # Their numbers are given anew; the names stay with those that are left.
        gone = [stored.classes[c] for c in np.setdiff1d(have, left)]
        notes = *notes, f"left out, as no image of these classes can be read: {files.listed(gone)}"
        kept = kept._replace(
            labels=np.searchsorted(left, kept.labels).astype(np.int32),
            classes=tuple(stored.classes[c] for c in left),
        )
    return kept._replace(notes=notes)


def _data(
    stored: Stored,
    index: splits.Indices,
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
        # What is stored as gray is mostly scans and symbols, whose mirror image is something else.
        flip=shape[-1] == 3 if stored.flip is None else stored.flip,
        counts=np.bincount(labels[index["train"]], minlength=len(stored.classes)),
        notes=notes,
    )
