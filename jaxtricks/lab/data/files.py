"""Class folders of image files, below a directory or inside a zip."""

import pathlib
from collections.abc import Iterable

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import trees
from jaxtricks.lab.data.image import decode
from jaxtricks.lab.data.source import SPLITS, Stored
from jaxtricks.lab.data.trees import Parts


def stored(path: pathlib.Path) -> Stored:
    """The images of [train|val|test/]CLASS/NAME below a directory or inside a zip.

    Everything below a class folder belongs to the class. A folder around all of it is ignored.

    Raises:
      UserError: no images, a folder without any, images outside the class folders of a split, or a zip
        that is broken, encrypted or points outside.
    """
    tree = trees.open_folder(path) if path.is_dir() else trees.open_zip(path)
    depth = _around(tree)
    found = {parts[depth:]: name for parts, name in tree.images.items()}
    folders = {parts[depth:] for parts in tree.folders if len(parts) > depth}
    split = any(len(parts) > 2 and parts[0].lower() in SPLITS for parts in found)
    images = {parts: name for parts, name in found.items() if len(parts) > 1}
    if not images:
        raise UserError(f"{path} holds no images: it needs [train|val|test/]CLASS/NAME.jpg")
    if split:
        _refuse_stray(path, images)
    _refuse_empty(path, images, folders, split)
    loose = [printable(name) for parts, name in found.items() if len(parts) == 1]
    classes = sorted({parts[split] for parts in images}, key=_natural)
    label = {name: i for i, name in enumerate(classes)}
    names = list(images.values())

    def read(i: int) -> tuple[np.ndarray, int]:
        raw = tree.read(names[i])
        return decode(raw, names[i]), len(raw)

    return Stored(
        name=str(path),
        names=[printable(name) for name in names],
        read=read,
        labels=np.array([label[parts[split]] for parts in images], np.int32),
        where=np.array([SPLITS[parts[0].lower()] if split else "train" for parts in images]),
        classes=tuple(map(printable, classes)),
        notes=(f"left out, as they are in no class folder: {listed(loose)}",) if loose else (),
    )


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names, and after `most` of them how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _around(tree: trees.Tree) -> int:
    """How many folders stand around everything, as in a zip of one folder."""
    depth, paths = 0, [*tree.images, *tree.folders]
    while tree.images and all(len(parts) > depth + 2 for parts in tree.images):
        here = {parts[depth] for parts in paths if len(parts) > depth}
        if len(here) > 1 or next(iter(here)).lower() in SPLITS:
            break
        depth += 1
    return depth


def _refuse_stray(path: pathlib.Path, images: Iterable[Parts]) -> None:
    """Images that lie beside the split folders, or in them but in no class."""
    for parts in images:
        if parts[0].lower() not in SPLITS:
            raise UserError(
                f"{path} has {parts[0]}/ beside its split folders: move its images into train/, or "
                "remove it"
            )
        if len(parts) == 2:
            raise UserError(
                f"{'/'.join(parts)} in {path} lies in no class folder: the images of a split must be "
                "in CLASS/NAME.jpg"
            )


def _refuse_empty(
    path: pathlib.Path, images: Iterable[Parts], folders: Iterable[Parts], split: bool
) -> None:
    """Folders of a split or of a class that have no image in them."""
    tops = {parts[0] for parts in images}
    classes = {parts[split] for parts in images}
    for parts in sorted(folders):
        if parts[0] not in tops and parts[0].lower() in SPLITS:
            raise UserError(
                f"the {SPLITS[parts[0].lower()]} split of {path} ({parts[0]}/) holds no images: add "
                "some, or remove the folder"
            )
        if len(parts) == 1 + split and parts[split] not in classes:
            raise UserError(
                f"class {parts[split]!r} of {path} has no image: add some or remove the folder"
            )


def _natural(name: str) -> tuple[int, int, str]:
    # Class "10" after class "9": a sorted list of strings would permute numbered classes.
    return (0, int(name), name) if name.isdecimal() and len(name) < 20 else (1, 0, name)
