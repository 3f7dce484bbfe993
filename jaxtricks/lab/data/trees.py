"""The image files below a directory or inside a zip: their names, and their bytes on demand."""

import os
import pathlib
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data.source import UnreadableError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MAX_BYTES = 256 * 2**20
"""Files that are longer are not read: no image of 64 megapixels needs as much."""

Parts = tuple[str, ...]

_TOO_LONG = f"it is over the limit of {MAX_BYTES // 2**20} MiB"
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    NotImplementedError,
    ValueError,
)


class Tree(NamedTuple):
    """What a folder or a zip holds; paths are tuples of their parts, hidden ones are left out.

    Attributes:
      images: path -> name for `read`, sorted.
      folders: all, with and without images.
      read: name -> bytes; raises UnreadableError.
    """

    images: dict[Parts, str]
    folders: set[Parts]
    read: Callable[[str], bytes]


def open_folder(path: pathlib.Path) -> Tree:
    """The tree below a directory; links are followed, but not in circles."""
    images, folders, seen = {}, set(), set()
    for root, children, files in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        children[:] = [] if real in seen else sorted(filter(_visible, children))
        if real in seen:
            continue
        seen.add(real)
        parts = pathlib.Path(root).relative_to(path).parts
        folders |= {(*parts, child) for child in children}
        images |= {(*parts, f): "/".join((*parts, f)) for f in files if _visible(f) and _image(f)}

    def read(name: str) -> bytes:
        try:
            if (path / name).stat().st_size > MAX_BYTES:
                raise UnreadableError(name, _TOO_LONG)
            return (path / name).read_bytes()
        except OSError as error:
            raise UnreadableError(name, error.strerror or str(error)) from error

    return Tree(dict(sorted(images.items())), folders, read)


def open_zip(path: pathlib.Path) -> Tree:
    """The tree inside a zip, which is read in place: nothing is extracted.

    Raises:
      UserError: a broken zip, an encrypted entry, or one that points outside.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise UserError(f"{path} is a broken zip ({error}): make or fetch it again") from error
    entries, images, folders = _contents(path, archive)
    lock = threading.Lock()  # zipfile counts its open entries without one

    def read(name: str) -> bytes:
        if entries[name].file_size > MAX_BYTES:
            raise UnreadableError(name, _TOO_LONG)
        try:
            with lock:
                return archive.read(entries[name])
        except _BROKEN as error:
            raise UnreadableError(name, str(error) or "it ends too early") from error

    return Tree(dict(sorted(images.items())), folders, read)


def _contents(
    path: pathlib.Path, archive: zipfile.ZipFile
) -> tuple[dict[str, zipfile.ZipInfo], dict[Parts, str], set[Parts]]:
    """(name -> entry, path -> name of the images, folders)."""
    entries, images, folders = {}, {}, set()
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/")
        _refuse(path, name, entry)
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if not all(map(_visible, parts)):
            continue
        inside = len(parts) - (not name.endswith("/"))
        folders |= {parts[: i + 1] for i in range(inside)}
        if inside < len(parts) and _image(name):
            images[parts], entries[name] = name, entry
    return entries, images, folders


def _refuse(path: pathlib.Path, name: str, entry: zipfile.ZipInfo) -> None:
    if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
        raise UserError(f"{path} holds {entry.filename!r}, which points outside: remove that entry")
    if entry.flag_bits & 1:
        raise UserError(f"{entry.filename} in {path} is encrypted: make the zip without a password")


def _image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _visible(part: str) -> bool:
    # Finder, notebooks and git leave folders of their own behind.
    return not part.startswith((".", "__MACOSX"))
