"""Lists of image files with their labels, as ImageNet-LT, Places-LT and iNaturalist ship them."""

import functools
import pathlib
import re

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, folders, text
from jaxtricks.lab.data.dataset import SPLITS, Stored
from jaxtricks.lab.data.images import decode

_LINE = re.compile(r"(?P<name>.*[^\s,])[\s,]+(?P<label>-?\d{1,18})")
_WORD = re.compile(r"(?P<stem>.*?)(?P<word>[A-Za-z]*)", re.DOTALL)


def stored(path: pathlib.Path, root: pathlib.Path) -> Stored:
    """The images of a list: on each line the path of an image below `root`, and its label from 0.

    Where the list's name ends in a split, lists beside it that differ in this word alone are the other
    splits: NAME_train.txt, NAME_val.txt, NAME_test.txt.

    Raises:
      UserError: no such folder, a line of another kind, a path that points outside, or labels that are
        not 0 to C-1.
    """
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder: give the one that the paths begin in")
    lists = _of_splits(path)
    entries = [(where, *entry) for where, file in lists.items() for entry in _entries(file)]
    if not entries:
        raise UserError(f"{path} lists no images: write 'PATH LABEL' on each line")
    splits, names, labels = map(list, zip(*entries, strict=True))
    num_classes = arrays.check_classes(np.array(labels, np.int64), str(path))
    read_below_root = functools.partial(folders.read_file, root)

    def read(i: int) -> tuple[np.ndarray, int]:
        raw = read_below_root(names[i])
        return decode(raw, names[i]), len(raw)

    return Stored(
        name=str(path),
        names=[printable(name) for name in names],
        read=read,
        labels=np.array(labels, np.int32),
        where=np.array(splits),
        classes=tuple(map(str, range(num_classes))),
        notes=tuple(f"{where}: the list {printable(file.name)}" for where, file in lists.items()),
    )


def _of_splits(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Split -> its list; a list alone is the train split, whatever it is called."""
    stem, word = _split_word(path)
    if word not in SPLITS:
        return {"train": path}
    lists = {SPLITS[word]: path}
    for other in sorted(path.parent.iterdir()):
        other_stem, other_word = _split_word(other)
        same = other_stem == stem and other.suffix == path.suffix and other.is_file()
        if not same or other_word not in SPLITS or other == path:
            continue
        where = SPLITS[other_word]
        if where in lists:
            raise UserError(
                f"{lists[where].name} and {other.name} in {path.parent} are both {where} lists of one "
                "name: move one of them away"
            )
        lists[where] = other
    return lists if "train" in lists else {"train": path}


def _split_word(path: pathlib.Path) -> tuple[str, str]:
    """("imagenet_lt_", "train") of ImageNet_LT_train.txt."""
    match = _WORD.fullmatch(path.stem.lower())
    return (match["stem"], match["word"]) if match else (path.stem, "")


def _entries(path: pathlib.Path) -> list[tuple[str, int]]:
    """(path of the image, label) of each line."""
    entries = []
    for number, line in enumerate(text.read(path).splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(f"line {number} of {path} is {line[:60]!r}: write 'PATH LABEL'")
        name = match["name"].replace("\\", "/")
        if folders.points_outside(name):
            raise UserError(
                f"line {number} of {path} points outside of --root ({name[:60]!r}): write paths "
                "that begin in it"
            )
        entries.append((name, int(match["label"])))
    return entries
