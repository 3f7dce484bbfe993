"""The image files below a directory or inside a zip: their names, and their bytes on demand."""

import functools
import os
import pathlib
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import zips
from jaxtricks.lab.data.dataset import UnreadableError

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
    except zips.BROKEN as error:
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
        except zips.BROKEN as error:
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
            zips.refuse_method(path, entry)
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
