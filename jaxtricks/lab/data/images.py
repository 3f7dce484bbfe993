"""One image: its header, its pixels as they are meant to be seen, and those pixels at another size."""

import collections
import functools
import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data.dataset import Shape, Size, Stored, UnreadableError

MAX_PIXELS = 64_000_000
"""Images with more are not decoded: a small file can claim any size."""

MAX_SCANS = 100
"""Passes over a JPEG; each takes as long as a whole image and may take 100 bytes, and ten are usual."""

# Extensions lie: GIFs called .jpg are common.
KINDS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_ALONE = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])  # no length follows
_APP1, _EXIF = 0xE1, b"Exif\0\0"
_ORIENTATION, _WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 0x112, 0x100, 0x101, 0x142, 0x143
_WHOLE = {3: "H", 4: "I"}  # kinds of TIFF entries that are whole numbers


class Header(NamedTuple):
    """What the first bytes say.

    Attributes:
      kind: one of KINDS.
      width, height: in pixels, as stored.
      components: channels of a JPEG; 0 for the others.
      orientation: of a JPEG, by EXIF; `_upright` takes it.
    """

    kind: str
    width: int
    height: int
    components: int = 0
    orientation: int = 1


def decode(raw: bytes, name: str) -> np.ndarray:
    """Image file -> uint8 [H, W, C]: C is 1 if it is stored as gray, else 3.

    Transparent parts are laid on white, 16 bits are scaled to 8, animations give their first frame, and
    what EXIF says is turned or mirrored is turned back, as viewers do.

    Raises:
      UnreadableError: no image, a truncated or broken one, one of more than 64 megapixels, one of 32-bit
        or floating-point pixels, or a JPEG of more than 100 scans.
    """
    try:
        header = read_header(raw)
    except (struct.error, IndexError):
        header = None
    if header is None:
        raise UnreadableError(
            name, "it has no JPEG, PNG, BMP, WebP, GIF or TIFF header" if raw else "it is empty"
        )
    if not 0 < header.width * header.height <= MAX_PIXELS:
        raise UnreadableError(name, _oversized(header))
    try:
        return _decode_jpeg(raw, header) if header.kind == "JPEG" else _decode_any(raw, header)
    except Exception as error:  # a decoder that is fed a broken file may raise anything
        raise UnreadableError(name, _reason(error)) from error


def conform(image: np.ndarray, shape: Shape) -> np.ndarray:
    """Image uint8 [h, w, c] -> [H, W, C]: scaled to cover, cut to the middle; gray or colour."""
    if image.shape == shape:
        return image
    from PIL import Image, ImageOps

    height, width, channels = shape
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if image.shape[-1] != channels:
        picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height))
    return np.asarray(picture).reshape(shape)


def read_header(raw: bytes) -> Header | None:
    """The header of an image file, before anything is allocated; None if it is none that we know."""
    if raw.startswith(b"\xff\xd8\xff"):
        return _read_jpeg_header(raw)
    if raw.startswith(b"\x89PNG\r\n\x1a\n") and raw[12:16] == b"IHDR":
        return Header("PNG", *struct.unpack_from(">II", raw, 16))
    if raw.startswith(b"BM"):
        old = struct.unpack_from("<I", raw, 14) == (12,)
        width, height = struct.unpack_from("<HH" if old else "<ii", raw, 18)
        return Header("BMP", abs(width), abs(height))
    if raw.startswith((b"GIF87a", b"GIF89a")):
        return Header("GIF", *struct.unpack_from("<HH", raw, 6))
    if raw.startswith(b"RIFF") and raw[8:12] == b"WEBP":
        return _read_webp_header(raw)
    if raw.startswith((b"II*\0", b"MM\0*")):
        return _read_tiff_header(raw)
    return None


def _read_jpeg_header(raw: bytes) -> Header:
    at, orientation = 2, 0
    while True:
        while raw[at] != 0xFF or raw[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = raw[at + 1]
        if marker in _FRAMES:
            height, width, components = struct.unpack_from(">HHB", raw, at + 5)
            return Header("JPEG", width, height, components, orientation or 1)
        length = 2 if marker in _ALONE else 2 + max(2, raw[at + 2] << 8 | raw[at + 3])
        if marker == _APP1 and not orientation and raw.startswith(_EXIF, at + 4):
            orientation = _orientation(raw[at + 4 : at + length])
        at += length


def _orientation(exif: bytes) -> int:
    """What EXIF says, 1 (upright) to 8; 1 where it says nothing that can be meant."""
    try:
        value = _tiff_numbers(exif.removeprefix(_EXIF)).get(_ORIENTATION, 1)
    except struct.error:
        return 1
    return value if value in range(1, 9) else 1


def _tiff_numbers(raw: bytes) -> dict[int, int]:
    """Tag -> whole number, in the first directory of a TIFF; EXIF is one.

    By hand: Pillow takes 20 times as long, and warns of what it can't read.
    """
    order = "<" if raw.startswith(b"II") else ">"
    (start,) = struct.unpack_from(order + "I", raw, 4)
    (entries,) = struct.unpack_from(order + "H", raw, start)
    numbers = {}
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind, count = struct.unpack_from(order + "HHI", raw, at)
        if count == 1 and kind in _WHOLE:
            (numbers[tag],) = struct.unpack_from(order + _WHOLE[kind], raw, at + 8)
    return numbers


def _read_tiff_header(raw: bytes) -> Header | None:
    numbers = _tiff_numbers(raw)
    sides = numbers.get(_WIDTH, 0), numbers.get(_HEIGHT, 0)
    tile = numbers.get(_TILE_WIDTH, 0), numbers.get(_TILE_HEIGHT, 0)
    # A whole tile is unpacked, however little of it the picture shows.
    return Header("TIFF", *(tile if math.prod(tile) > MAX_PIXELS else sides))


def _pairs(raw: bytes, pair: bytes) -> int:
    """raw.count(pair) in a tenth of the time."""
    values = np.frombuffer(raw, np.uint8)
    return int(np.count_nonzero((values[:-1] == pair[0]) & (values[1:] == pair[1])))


def _scans(raw: bytes) -> int:
    """How many scans a JPEG has; previews inside it and what follows its end don't count."""
    at, found = 2, 0
    while (at := raw.find(b"\xff", at)) >= 0 and raw[at : at + 2] != _END:
        marker = raw[at + 1 : at + 2]
        found += marker == _SCAN[1:]
        if marker == b"\xff":
            at += 1
        else:
            alone = not marker or marker[0] in _ALONE
            at += 2 if alone else 2 + max(2, int.from_bytes(raw[at + 2 : at + 4], "big"))
    return found


def _read_webp_header(raw: bytes) -> Header | None:
    kind = raw[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(raw[i : i + 3], "little") + 1 for i in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", raw, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (x & 0x3FFF for x in struct.unpack_from("<HH", raw, 26))
    else:
        return None
    return Header("WEBP", width, height)


def _decode_jpeg(raw: bytes, header: Header) -> np.ndarray:
    if _pairs(raw, _SCAN) > MAX_SCANS and _scans(raw) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")
    library = _simplejpeg()
    if library is None or header.components not in (1, 3):  # it inverts some CMYK files
        return _decode_any(raw, header)
    try:
        pixels = library.decode_jpeg(raw, "GRAY" if header.components == 1 else "RGB")
        return _upright(pixels, header.orientation)
    except ValueError as error:
        # Pillow fills the rest of a picture that ends early with gray where an end marker follows.
        if "premature end" in str(error).lower():
            raise
    return _decode_any(raw, header)  # stray bytes between two parts, say: nothing is lost


def _decode_any(raw: bytes, header: Header) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=KINDS) as picture:
        stored = {(header.width, header.height)}
        if header.kind == "TIFF":
            stored.add((header.height, header.width))  # Pillow turns it itself
            _silence_tiff()
        if picture.size not in stored:
            raise ValueError("its headers contradict each other")
        picture.load()
        orientation = header.orientation
        if header.kind in ("PNG", "WEBP"):
            orientation = _orientation(picture.info.get("exif") or b"")
        return _upright(_pixels(picture).reshape(*picture.size[::-1], -1), orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[h, w, C] as stored -> as it is meant to be seen, by an EXIF orientation."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _pixels(picture: Any) -> np.ndarray:
    from PIL import Image

    if picture.format == "TIFF" and picture.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit or floating-point: save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        return ((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8)
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    return np.asarray(picture.convert(mode))


@functools.cache
def _silence_tiff() -> None:
    """Leave what is wrong with a file to the one sentence on it."""
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _oversized(header: Header) -> str:
    size = f"{header.width}x{header.height}"
    if not header.width * header.height:
        return f"its header says {size}"
    return f"{size} is over the limit of {MAX_PIXELS // 10**6} megapixels"


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its header is broken"
    if isinstance(error, OSError | ValueError | SyntaxError) and str(error):
        return str(error).splitlines()[0]
    return f"{type(error).__name__}: {error}"


# --------------------------------------------------------------------------------------------------
# A look at the images before training: which can't be read, and how large and gray they are.
# --------------------------------------------------------------------------------------------------


ALL_UP_TO = 10_000
"""Larger sets are looked at in a sample of SAMPLE, spread evenly."""
SAMPLE = 2_000
MAX_SIDE = 128  # of the square that images of many sizes become

_BLOCK = 4096  # images handed to the threads at once


class Look(NamedTuple):
    """What was seen.

    Attributes:
      total: images there are.
      sizes: (height, width) -> images of it.
      gray: images stored with one channel.
      unreadable: index -> why.
    """

    total: int
    sizes: collections.Counter[Size]
    gray: int
    unreadable: dict[int, UnreadableError]

    @property
    def readable(self) -> int:
        """Images that were looked at and could be read."""
        return self.sizes.total()

    @property
    def looked(self) -> str:
        """How many were looked at, as text."""
        n = self.readable + len(self.unreadable)
        return f"{n} images" + f" looked at (of {self.total})" * (n < self.total)


def look(stored: Stored, *, everything: bool = False) -> Look:
    """Decode all images, or a sample of more than 10,000 unless `everything` is to be looked at."""
    total = len(stored.names)
    if stored.shape is not None:
        height, width, channels = stored.shape
        sizes = collections.Counter({(height, width): total})
        return Look(total, sizes, total * (channels == 1), {})
    chosen = np.arange(total)
    if total > ALL_UP_TO and not everything:
        chosen = np.linspace(0, total - 1, SAMPLE).astype(int)
    sizes: collections.Counter[Size] = collections.Counter()
    gray, unreadable = 0, {}
    for i, seen in zip(chosen.tolist(), _see(stored, chosen), strict=True):
        if isinstance(seen, UnreadableError):
            unreadable[i] = seen
        else:
            height, width, channels = seen
            sizes[height, width] += 1
            gray += channels == 1
    return Look(total, sizes, gray, unreadable)


def refuse_unreadable(seen: Look) -> None:
    """Raise UserError that names the first image that can't be read and counts the others."""
    if not seen.unreadable:
        return
    first, *others = seen.unreadable.values()
    if not others:
        raise first
    raise UserError(
        f"{first.name} can't be read ({first.reason}), nor can {len(others)} more of the {seen.looked}: "
        "remove them, or pass --skip-unreadable (--check-data lists all such files)"
    )


def aim(seen: Look, size: int, name: str) -> tuple[Shape, tuple[str, ...]]:
    """The shape that all images get, and sentences on what that changes.

    Args:
      seen: the look.
      size: side of a square; 0 takes the size that at least half of the images have, else the square
        of the median short side, at most 128.
      name: of the data.

    Raises:
      UserError: there is nothing that can be read.
    """
    if not seen.readable:
        raise UserError(f"no image of {name} can be read: --check-data says why")
    channels = 1 if seen.gray == seen.readable else 3
    shape = (*_size(seen.sizes, size), channels)
    notes = []
    if other := {s: n for s, n in seen.sizes.items() if s != shape[:2]}:
        ends = f"{spell(smallest(other))} to {spell(largest(other))}"
        ends = spell(smallest(other)) if len(other) == 1 else f"sizes from {ends}"
        notes.append(
            f"resized to {spell(shape)}, scaled to cover and cut to the middle: {sum(other.values())} "
            f"of the {seen.looked}, {ends}"
        )
    if channels == 3 and seen.gray:
        notes.append(f"gray made colour: {seen.gray} of the {seen.looked}")
    if channels == 1:
        notes.append("all images are gray: 1 channel, and no mirroring")
    return shape, tuple(notes)


def smallest(sizes: dict[Size, int]) -> Size:
    """By area."""
    return min(sizes, key=lambda s: (s[0] * s[1], s))


def largest(sizes: dict[Size, int]) -> Size:
    """By area."""
    return max(sizes, key=lambda s: (s[0] * s[1], s))


def spell(size: Shape) -> str:
    """(height, width) -> "WxH", as image viewers say it."""
    return f"{size[1]}x{size[0]}"


def _size(sizes: collections.Counter[Size], side: int) -> Size:
    if side:
        return side, side
    [(common, n)] = sizes.most_common(1)
    if 2 * n >= sizes.total():
        return common
    short = np.repeat([min(s) for s in sizes], list(sizes.values()))
    side = min(MAX_SIDE, int(np.median(short)))
    return side, side


def _see(stored: Stored, chosen: np.ndarray) -> Iterator[Shape | UnreadableError]:
    def see(i: int) -> Shape | UnreadableError:
        try:
            return stored.read(i)[0].shape
        except UnreadableError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(chosen), _BLOCK):
            yield from pool.map(see, chosen[start : start + _BLOCK].tolist())
