"""Read image files in folders, in zips from anywhere, and in lists with labels."""

import collections
import functools
import os
import pathlib
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import dataset, text
from jaxtricks.lab.data.dataset import SPLITS, Stored, UnreadableError
from jaxtricks.lab.data.images import decode

METHODS = frozenset([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
"""Of compression. Of the others, which no tool takes by default, zipfile unpacks a few kilobytes into any
number of gigabytes, whatever length the zip says."""

BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,  # names that are not Unicode
    RuntimeError,  # and NotImplementedError
    MemoryError,
    OverflowError,  # offsets beyond any file
)
"""Errors that zipfile raises for broken files."""


def is_zip(path: pathlib.Path) -> bool:
    """Return whether the file is a zip, maybe a broken one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of several disks, it says
        return True


def refuse_method(path: pathlib.Path, entry: zipfile.ZipInfo) -> None:
    """Raise UserError for an entry that is compressed in a way that isn't read."""
    if entry.compress_type not in METHODS:
        raise UserError(
            f"{entry.filename!r} in {path} is compressed by method "
            f"{entry.compress_type}, which may unpack to any size: make the "
            "zip by deflate, or without compression"
        )


# Trees of image files, in a directory or inside a zip, which is read in place: nothing
# is extracted.


EXTENSIONS = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".gif",
    ".tif",
    ".tiff",
}
MAX_BYTES = 256 * 2**20
"""Files that are longer, or unpack to more, are not read: no image of 64 megapixels needs as much."""

Parts = tuple[str, ...]

_LEFT_BEHIND = {"thumbs.db", "desktop.ini"}
_TOO_LONG = f"it is over the limit of {MAX_BYTES // 2**20} MiB"


class Tree(NamedTuple):
    """Contents of a folder or a zip; paths are tuples of their parts, hidden ones are left out.

    Attributes:
      images: path -> name for `read`, sorted.
      others: paths of the files that are not called images.
      folders: all, with and without images.
      read: name -> bytes; raises UnreadableError.
    """

    images: dict[Parts, str]
    others: list[Parts]
    folders: set[Parts]
    read: Callable[[str], bytes]


def open_folder(path: pathlib.Path) -> Tree:
    """Return the tree below a directory; links are followed, but not in circles."""
    images, others, folders, visited = {}, [], set(), set()
    for root, children, files in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        children[:] = (
            [] if real in visited else sorted(filter(_visible, children))
        )
        if real in visited:
            continue
        visited.add(real)
        parts = pathlib.Path(root).relative_to(path).parts
        folders |= {(*parts, child) for child in children}
        files = list(filter(_visible, files))
        images |= {
            (*parts, f): "/".join((*parts, f)) for f in files if _image(f)
        }
        others += [(*parts, f) for f in files if not _image(f)]
    read = functools.partial(read_file, path)
    return Tree(dict(sorted(images.items())), others, folders, read)


def read_file(folder: pathlib.Path, name: str) -> bytes:
    """Return the bytes of a regular file: a pipe would be waited for, and a device need not end.

    Raises:
      UnreadableError: it isn't one, is longer than MAX_BYTES, or can't be read.
    """
    try:
        status = (folder / name).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError(name, "it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise UnreadableError(name, _TOO_LONG)
        return (folder / name).read_bytes()
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: a name that no file can have
        raise UnreadableError(
            name, getattr(error, "strerror", None) or str(error)
        ) from error


def open_zip(path: pathlib.Path) -> Tree:
    """Return the tree inside a zip.

    Raises:
      UserError: a broken zip, an encrypted entry, one that points outside, or an image
        that is neither stored nor deflated.
    """
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise UserError(
            f"{path} is a broken zip ({error}): make or fetch it again"
        ) from error
    entries, images, others, folders = _contents(path, archive)
    lock = threading.Lock()  # the archive has one position in its file

    def read(name: str) -> bytes:
        entry = entries[name]
        if entry.file_size > MAX_BYTES:
            raise UnreadableError(name, _TOO_LONG)
        try:
            with lock:
                return _unpack(archive, entry)
        except BROKEN as error:
            raise UnreadableError(
                name, str(error) or "it ends too early"
            ) from error

    return Tree(dict(sorted(images.items())), others, folders, read)


def points_outside(name: str) -> bool:
    """Return whether a path with "/" between its parts leaves the folder that it begins in."""
    absolute = name.startswith("/") or re.match("[A-Za-z]:", name)
    return bool(absolute) or ".." in name.split("/")


def _contents(
    path: pathlib.Path, archive: zipfile.ZipFile
) -> tuple[
    dict[str, zipfile.ZipInfo], dict[Parts, str], list[Parts], set[Parts]
]:
    """Return name -> entry, path -> name of the images, paths of the other files, folders."""
    entries, images, others, folders = {}, {}, [], set()
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/")
        _refuse(path, name, entry)
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if not all(map(_visible, parts)):
            continue
        inside = len(parts) - (not name.endswith("/"))
        folders |= {parts[: i + 1] for i in range(inside)}
        if inside < len(parts) and _image(name):
            refuse_method(path, entry)
            images[parts], entries[name] = name, entry
        elif inside < len(parts):
            others.append(parts)
    return entries, images, others, folders


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Read an entry up to its length; ZipFile.read would unpack all before it looks at the length."""
    with archive.open(entry) as file:
        content = file.read(entry.file_size)
        file.read(1)  # the end, where zipfile compares the checksum
    if len(content) < entry.file_size:
        raise EOFError
    return content


def _refuse(path: pathlib.Path, name: str, entry: zipfile.ZipInfo) -> None:
    if points_outside(name):
        raise UserError(
            f"{path} holds {entry.filename!r}, which points outside: remove that entry"
        )
    if entry.flag_bits & 1:
        raise UserError(
            f"{entry.filename} in {path} is encrypted: make the zip without a password"
        )


def _image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _visible(part: str) -> bool:
    # Finder, Explorer, notebooks and git leave their files and folders behind.
    return (
        not part.startswith((".", "__MACOSX"))
        and part.lower() not in _LEFT_BEHIND
    )


# Class folders of image files, below a directory or inside a zip.


def stored(path: pathlib.Path, *, skip_unreadable: bool = False) -> Stored:
    """Return the images of [train|val|test/]CLASS/NAME below a directory or inside a zip.

    Everything below a class folder belongs to the class. A folder around all of it is
    ignored.

    Args:
      path: of the directory or the zip.
      skip_unreadable: leave out class folders without an image.

    Raises:
      UserError: no images, a folder without any, images outside the class folders of a
        split, or a zip that is broken, encrypted or points outside.
    """
    tree = open_folder(path) if path.is_dir() else open_zip(path)
    depth = _around(tree)
    all_images = {parts[depth:]: name for parts, name in tree.images.items()}
    directories = {
        parts[depth:] for parts in tree.folders if len(parts) > depth
    }
    others = [parts[depth:] for parts in tree.others]
    split = any(
        len(parts) > 2 and parts[0].lower() in SPLITS for parts in all_images
    )
    images = {
        parts: name for parts, name in all_images.items() if len(parts) > 1
    }
    if not images and all_images:
        raise UserError(
            f"{path} holds images ({len(all_images)}) but no class folders: "
            "give the folder that holds them, with "
            "[train|val|test/]CLASS/NAME.jpg"
        )
    if not images:
        has = f" (it has {extensions(others)})" if others else ""
        raise UserError(
            f"{path} holds no images{has}: it needs [train|val|test/]CLASS/NAME.jpg"
        )
    if split:
        _refuse_stray(path, images)
    empty = _empty_classes(path, images, directories, split)
    if empty and not skip_unreadable:
        raise UserError(_sentence_on_empty(path, empty, others, split))
    loose = [
        printable(name) for parts, name in all_images.items() if len(parts) == 1
    ]
    classes = sorted({parts[split] for parts in images}, key=_natural)
    label = {name: i for i, name in enumerate(classes)}
    names = list(images.values())
    notes = {
        "left out, as they are in no class folder: ": listed(loose),
        "left out, as files of these extensions are not read: ": extensions(
            others
        ),
        "left out, as these class folders hold no image: ": listed(
            map(printable, empty)
        ),
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
        split=np.array(
            [SPLITS[parts[0].lower()] if split else "train" for parts in images]
        ),
        classes=tuple(map(printable, classes)),
        notes=tuple(front + what for front, what in notes.items() if what),
    )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Join the names, and after `most` of them say how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extensions(paths: Iterable[Parts]) -> str:
    """Count the files of each extension, as "40 .jp2, 1 .txt"."""
    ends = (os.path.splitext(parts[-1])[1].lower() for parts in paths)
    counts = collections.Counter(end or "without one" for end in ends)
    by_number = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return listed(f"{n} {printable(end)}" for end, n in by_number)


def _around(tree: Tree) -> int:
    """Return how many folders stand around everything, as in a zip of one folder."""
    depth, paths = 0, [*tree.images, *tree.folders]
    while tree.images and all(len(parts) > depth + 2 for parts in tree.images):
        here = {parts[depth] for parts in paths if len(parts) > depth}
        if len(here) > 1 or next(iter(here)).lower() in SPLITS:
            break
        depth += 1
    return depth


def _refuse_stray(path: pathlib.Path, images: Iterable[Parts]) -> None:
    """Raise UserError for images beside the split folders, or in them but in no class."""
    for parts in images:
        if parts[0].lower() not in SPLITS:
            raise UserError(
                f"{path} has {parts[0]}/ beside its split folders: move its "
                "images into train/, or remove it"
            )
        if len(parts) == 2:
            raise UserError(
                f"{'/'.join(parts)} in {path} lies in no class folder: the "
                "images of a split must be in CLASS/NAME.jpg"
            )


def _empty_classes(
    path: pathlib.Path,
    images: Iterable[Parts],
    folders: Iterable[Parts],
    split: bool,
) -> list[str]:
    """Return the class folders without an image; raise UserError for a split without one."""
    tops = {parts[0] for parts in images}
    classes = {parts[split] for parts in images}
    empty = []
    for parts in sorted(folders):
        if parts[0] not in tops and parts[0].lower() in SPLITS:
            raise UserError(
                f"the {SPLITS[parts[0].lower()]} split of {path} ({parts[0]}/) "
                "holds no images: add some, or remove the folder"
            )
        if len(parts) == 1 + split and parts[split] not in classes:
            empty.append(parts[split])
    return sorted(set(empty))


def _sentence_on_empty(
    path: pathlib.Path, empty: list[str], others: Iterable[Parts], split: bool
) -> str:
    inside = [
        parts
        for parts in others
        if len(parts) > 1 + split and parts[split] in empty
    ]
    has = f" (but {extensions(inside)})" if inside else ""
    if len(empty) == 1:
        what, cure = f"class {empty[0]!r} of {path} has", "the folder"
    else:
        what, cure = (
            f"the classes {listed(map(repr, empty))} of {path} have",
            "the folders",
        )
    return f"{what} no image{has}: add some, remove {cure}, or pass --skip-unreadable"


def _looks_split(images: Iterable[Parts]) -> str:
    """Return a sentence if all top folders hold the same sub-folders: these may be the classes."""
    inside: dict[str, set[str]] = {}
    for parts in images:
        inside.setdefault(parts[0], set()).update(
            parts[1:2] if len(parts) > 2 else ()
        )
    first, *others = inside.values()
    if not others or len(first) < 2 or any(names != first for names in others):
        return ""
    tops, names = (
        listed(sorted(map(printable, x)), 5) for x in (inside, first)
    )
    return (
        f"the classes are the top folders ({tops}), and all of them hold the "
        f"same sub-folders ({names}): if those are the classes, call the top "
        "folders train, val and test"
    )


def _natural(name: str) -> tuple[int, int, str]:
    # Class "10" after class "9": a sorted list of strings would permute numbered
    # classes.
    return (
        (0, int(name), name)
        if name.isdecimal() and len(name) < 20
        else (1, 0, name)
    )


# Lists of image files with their labels, as ImageNet-LT, Places-LT and iNaturalist ship
# them.


_LINE = re.compile(r"(?P<name>.*[^\s,])[\s,]+(?P<label>-?\d{1,18})")
_WORD = re.compile(r"(?P<stem>.*?)(?P<word>[A-Za-z]*)", re.DOTALL)


def stored_list(path: pathlib.Path, root: pathlib.Path) -> Stored:
    """Return the images of a list: on each line the path of an image below `root`, and its label from 0.

    Where the list's name ends in a split, lists beside it that differ in this word
    alone are the other splits: NAME_train.txt, NAME_val.txt, NAME_test.txt.

    Raises:
      UserError: no such folder, a line of another kind, a path that points outside, or
        labels that are not 0 to C-1.
    """
    if not root.is_dir():
        raise UserError(
            f"--root {root} is not a folder: give the one that the paths begin in"
        )
    lists = _of_splits(path)
    entries = [
        (split, *entry)
        for split, file in lists.items()
        for entry in _entries(file)
    ]
    if not entries:
        raise UserError(
            f"{path} lists no images: write 'PATH LABEL' on each line"
        )
    splits, names, labels = map(list, zip(*entries, strict=True))
    num_classes = dataset.check_classes(np.array(labels, np.int64), str(path))
    read_below_root = functools.partial(read_file, root)

    def read(i: int) -> tuple[np.ndarray, int]:
        raw = read_below_root(names[i])
        return decode(raw, names[i]), len(raw)

    return Stored(
        name=str(path),
        names=[printable(name) for name in names],
        read=read,
        labels=np.array(labels, np.int32),
        split=np.array(splits),
        classes=tuple(map(str, range(num_classes))),
        notes=tuple(
            f"{split}: the list {printable(file.name)}"
            for split, file in lists.items()
        ),
    )


def _of_splits(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return split -> its list; a list alone is the train split, whatever it is called."""
    stem, word = _split_word(path)
    if word not in SPLITS:
        return {"train": path}
    lists = {SPLITS[word]: path}
    for other in sorted(path.parent.iterdir()):
        other_stem, other_word = _split_word(other)
        same = (
            other_stem == stem
            and other.suffix == path.suffix
            and other.is_file()
        )
        if not same or other_word not in SPLITS or other == path:
            continue
        split = SPLITS[other_word]
        if split in lists:
            raise UserError(
                f"{lists[split].name} and {other.name} in {path.parent} are "
                f"both {split} lists of one name: move one of them away"
            )
        lists[split] = other
    return lists if "train" in lists else {"train": path}


def _split_word(path: pathlib.Path) -> tuple[str, str]:
    """Split ImageNet_LT_train.txt into ("imagenet_lt_", "train")."""
    match = _WORD.fullmatch(path.stem.lower())
    return (match["stem"], match["word"]) if match else (path.stem, "")


def _entries(path: pathlib.Path) -> list[tuple[str, int]]:
    """Return (path of the image, label) of each line."""
    entries = []
    for number, line in enumerate(text.read(path).splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise UserError(
                f"line {number} of {path} is {line[:60]!r}: write 'PATH LABEL'"
            )
        name = match["name"].replace("\\", "/")
        if points_outside(name):
            raise UserError(
                f"line {number} of {path} points outside of --root "
                f"({name[:60]!r}): write paths that begin in it"
            )
        entries.append((name, int(match["label"])))
    return entries
