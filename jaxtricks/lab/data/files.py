"""Class folders of image files, below a directory or inside a zip."""

import collections
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import folders
from jaxtricks.lab.data.dataset import SPLITS, Stored
from jaxtricks.lab.data.folders import Parts
from jaxtricks.lab.data.images import decode


def stored(path: pathlib.Path, *, skip_unreadable: bool = False) -> Stored:
    """The images of [train|val|test/]CLASS/NAME below a directory or inside a zip.

    Everything below a class folder belongs to the class. A folder around all of it is ignored.

    Args:
      path: of the directory or the zip.
      skip_unreadable: leave out class folders without an image.

    Raises:
      UserError: no images, a folder without any, images outside the class folders of a split, or a zip
        that is broken, encrypted or points outside.
    """
    tree = folders.open_folder(path) if path.is_dir() else folders.open_zip(path)
    depth = _around(tree)
    found = {parts[depth:]: name for parts, name in tree.images.items()}
    directories = {parts[depth:] for parts in tree.folders if len(parts) > depth}
    others = [parts[depth:] for parts in tree.others]
    split = any(len(parts) > 2 and parts[0].lower() in SPLITS for parts in found)
    images = {parts: name for parts, name in found.items() if len(parts) > 1}
    if not images and found:
        raise UserError(
            f"{path} holds images ({len(found)}) but no class folders: give the folder that they are in, "
            "with [train|val|test/]CLASS/NAME.jpg"
        )
    if not images:
        has = f" (it has {extensions(others)})" if others else ""
        raise UserError(f"{path} holds no images{has}: it needs [train|val|test/]CLASS/NAME.jpg")
    if split:
        _refuse_stray(path, images)
    empty = _empty_classes(path, images, directories, split)
    if empty and not skip_unreadable:
        raise UserError(_said_of_empty(path, empty, others, split))
    loose = [printable(name) for parts, name in found.items() if len(parts) == 1]
    classes = sorted({parts[split] for parts in images}, key=_natural)
    label = {name: i for i, name in enumerate(classes)}
    names = list(images.values())
    notes = {
        "left out, as they are in no class folder: ": listed(loose),
        "left out, as files of these extensions are not read: ": extensions(others),
        "left out, as these class folders hold no image: ": listed(map(printable, empty)),
        "": "" if split else _looks_split(images),
    }

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
        notes=tuple(front + what for front, what in notes.items() if what),
    )


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names, and after `most` of them how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extensions(paths: Iterable[Parts]) -> str:
    """How many files there are of each extension, as "40 .jp2, 1 .txt"."""
    ends = (os.path.splitext(parts[-1])[1].lower() for parts in paths)
    counts = collections.Counter(end or "without one" for end in ends)
    by_number = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return listed(f"{n} {printable(end)}" for end, n in by_number)


def _around(tree: folders.Tree) -> int:
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


def _empty_classes(
    path: pathlib.Path, images: Iterable[Parts], folders: Iterable[Parts], split: bool
) -> list[str]:
    """Names of the class folders that have no image in them; refuses a split that has none."""
    tops = {parts[0] for parts in images}
    classes = {parts[split] for parts in images}
    empty = []
    for parts in sorted(folders):
        if parts[0] not in tops and parts[0].lower() in SPLITS:
            raise UserError(
                f"the {SPLITS[parts[0].lower()]} split of {path} ({parts[0]}/) holds no images: add "
                "some, or remove the folder"
            )
        if len(parts) == 1 + split and parts[split] not in classes:
            empty.append(parts[split])
    return sorted(set(empty))


def _said_of_empty(
    path: pathlib.Path, empty: list[str], others: Iterable[Parts], split: bool
) -> str:
    inside = [parts for parts in others if len(parts) > 1 + split and parts[split] in empty]
    has = f" (but {extensions(inside)})" if inside else ""
    if len(empty) == 1:
        what, cure = f"class {empty[0]!r} of {path} has", "the folder"
    else:
        what, cure = f"the classes {listed(map(repr, empty))} of {path} have", "the folders"
    return f"{what} no image{has}: add some, remove {cure}, or pass --skip-unreadable"


def _looks_split(images: Iterable[Parts]) -> str:
    """A sentence if all top folders hold the same sub-folders: these may be the classes."""
    inside: dict[str, set[str]] = {}
    for parts in images:
        inside.setdefault(parts[0], set()).update(parts[1:2] if len(parts) > 2 else ())
    first, *others = inside.values()
    if not others or len(first) < 2 or any(names != first for names in others):
        return ""
    tops, names = (listed(sorted(map(printable, x)), 5) for x in (inside, first))
    return (
        f"the classes are the top folders ({tops}), and all of them hold the same sub-folders ({names}): "
        "if those are the classes, call the top folders train, val and test"
    )


def _natural(name: str) -> tuple[int, int, str]:
    # Class "10" after class "9": a sorted list of strings would permute numbered classes.
    return (0, int(name), name) if name.isdecimal() and len(name) < 20 else (1, 0, name)
