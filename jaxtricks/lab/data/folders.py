"""Zips that anyone may have made: what is read of them, and in how much memory."""

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
from jaxtricks.lab.data import arrays, text
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
"""What zipfile raises for broken files."""


def is_zip(path: pathlib.Path) -> bool:
    """Whether the file is a zip, maybe a broken one."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of several disks, it says
        return True


def refuse_method(path: pathlib.Path, entry: zipfile.ZipInfo) -> None:
    """Raise UserError for an entry that is compressed in a way that isn't read."""
    if entry.compress_type not in METHODS:
        raise UserError(
            f"{entry.filename!r} in {path} is compressed by method {entry.compress_type}, which may "
            "unpack to any size: make the zip by deflate, or without compression"
        )


# --------------------------------------------------------------------------------------------------
# The image files below a directory or inside a zip: their names, and their bytes on demand.
# --------------------------------------------------------------------------------------------------


EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
MAX_BYTES = 256 * 2**20
"""Files that are longer, or unpack to more, are not read: no image of 64 megapixels needs as much."""

Parts = tuple[str, ...]

_HEADER = struct.Struct(
    "<4s22xHH"
)  # of an entry: magic, ..., length of the name, of the extra fields
_EXTRA = 64  # bytes of them that are read along; a zip with more costs a second read
_UTF8 = 0x800  # the flag of names in UTF-8
_PLAIN = (
    0x00E | _UTF8
)  # flags that change nothing about stored bytes: how hard to compress, sizes behind

_LEFT_BEHIND = {"thumbs.db", "desktop.ini"}
_TOO_LONG = f"it is over the limit of {MAX_BYTES // 2**20} MiB"


class Tree(NamedTuple):
    """What a folder or a zip holds; paths are tuples of their parts, hidden ones are left out.

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
    """The tree below a directory; links are followed, but not in circles."""
    images, others, folders, seen = {}, [], set(), set()
    for root, children, files in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        children[:] = [] if real in seen else sorted(filter(_visible, children))
        if real in seen:
            continue
        seen.add(real)
        parts = pathlib.Path(root).relative_to(path).parts
        folders |= {(*parts, child) for child in children}
        files = list(filter(_visible, files))
        images |= {(*parts, f): "/".join((*parts, f)) for f in files if _image(f)}
        others += [(*parts, f) for f in files if not _image(f)]
    read = functools.partial(read_file, path)
    return Tree(dict(sorted(images.items())), others, folders, read)


def read_file(folder: pathlib.Path, name: str) -> bytes:
    """The bytes of a regular file: a pipe would be waited for, and a device need not end.

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
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UnreadableError(name, getattr(error, "strerror", None) or str(error)) from error


def open_zip(path: pathlib.Path) -> Tree:
    """The tree inside a zip, which is read in place: nothing is extracted.

    Raises:
      UserError: a broken zip, an encrypted entry, one that points outside, or an image that is neither
        stored nor deflated.
    """
    try:
        archive = zipfile.ZipFile(path)
    except BROKEN as error:
        raise UserError(f"{path} is a broken zip ({error}): make or fetch it again") from error
    entries, images, others, folders = _contents(path, archive)
    lock = threading.Lock()  # zipfile counts its open entries without one
    # `archive` keeps it open; Windows has no pread.
    file = archive.fp.fileno() if archive.fp and hasattr(os, "pread") else None

    def read(name: str) -> bytes:
        entry = entries[name]
        if entry.file_size > MAX_BYTES:
            raise UnreadableError(name, _TOO_LONG)
        try:
            if file is not None and _in_place(entry):
                return _read_in_place(file, entry)
            with lock:
                return _unpack(archive, entry)
        except BROKEN as error:
            raise UnreadableError(name, str(error) or "it ends too early") from error

    return Tree(dict(sorted(images.items())), others, folders, read)


def points_outside(name: str) -> bool:
    """Whether a path with "/" between its parts leaves the folder that it begins in."""
    absolute = name.startswith("/") or re.match("[A-Za-z]:", name)
    return bool(absolute) or ".." in name.split("/")


def _contents(
    path: pathlib.Path, archive: zipfile.ZipFile
) -> tuple[dict[str, zipfile.ZipInfo], dict[Parts, str], list[Parts], set[Parts]]:
    """(name -> entry, path -> name of the images, paths of the other files, folders)."""
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
    """ZipFile.read, which would unpack all that there is before it looks at the length."""
    with archive.open(entry) as file:
        content = file.read(entry.file_size)
        file.read(1)  # the end, where zipfile compares the checksum
    if len(content) < entry.file_size:
        raise EOFError
    return content


def _in_place(entry: zipfile.ZipInfo) -> bool:
    """Whether the bytes of the entry are there as they are."""
    plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & ~_PLAIN
    return plain and entry.compress_size == entry.file_size


def _read_in_place(file: int, entry: zipfile.ZipInfo) -> bytes:
    """ZipFile.read of a stored entry with its checks, in a tenth of the time.

    No lock: pread has no position that threads, or processes that inherit the file, could move.
    """
    size = entry.file_size
    raw = os.pread(
        file, _HEADER.size + len(entry.orig_filename) + _EXTRA + size, entry.header_offset
    )
    if len(raw) < _HEADER.size:
        raise EOFError
    magic, name_length, extra_length = _HEADER.unpack_from(raw)
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile("Bad magic number for file header")
    start = _HEADER.size + name_length
    # Extra fields of the directory and of the header differ, so what they push back is known only here.
    name = raw[_HEADER.size : start].decode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    if name != entry.orig_filename:
        raise zipfile.BadZipFile(f"its name in the directory and in its header, {name!r}, differ")
    start += extra_length
    content = raw[start : start + size]
    if len(content) < size:
        content = os.pread(file, size, entry.header_offset + start)
    if len(content) < size:
        raise EOFError
    if zlib.crc32(content) != entry.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {entry.filename!r}")
    return content


def _refuse(path: pathlib.Path, name: str, entry: zipfile.ZipInfo) -> None:
    if points_outside(name):
        raise UserError(f"{path} holds {entry.filename!r}, which points outside: remove that entry")
    if entry.flag_bits & 1:
        raise UserError(f"{entry.filename} in {path} is encrypted: make the zip without a password")


def _image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _visible(part: str) -> bool:
    # Finder, Explorer, notebooks and git leave files and folders of their own behind.
    return not part.startswith((".", "__MACOSX")) and part.lower() not in _LEFT_BEHIND


# --------------------------------------------------------------------------------------------------
# Class folders of image files, below a directory or inside a zip.
# --------------------------------------------------------------------------------------------------


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
    tree = open_folder(path) if path.is_dir() else open_zip(path)
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


def _around(tree: Tree) -> int:
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


# --------------------------------------------------------------------------------------------------
# Lists of image files with their labels, as ImageNet-LT, Places-LT and iNaturalist ship them.
# --------------------------------------------------------------------------------------------------


_LINE = re.compile(r"(?P<name>.*[^\s,])[\s,]+(?P<label>-?\d{1,18})")
_WORD = re.compile(r"(?P<stem>.*?)(?P<word>[A-Za-z]*)", re.DOTALL)


def stored_list(path: pathlib.Path, root: pathlib.Path) -> Stored:
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
    read_below_root = functools.partial(read_file, root)

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
        if points_outside(name):
            raise UserError(
                f"line {number} of {path} points outside of --root ({name[:60]!r}): write paths "
                "that begin in it"
            )
        entries.append((name, int(match["label"])))
    return entries
