"""Zips that anyone may have made: what is read of them, and in how much memory."""

import pathlib
import struct
import zipfile
import zlib

from jaxtricks.lab.config import UserError

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
