"""Decode images, bring them to one size, and look at them before training.

Pillow reads the headers, and all pixels but those of most JPEGs, which simplejpeg
decodes in half the time.
"""

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

KINDS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""Told apart by their first bytes: extensions lie, and GIFs called .jpg are common."""

_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_WITHOUT_LENGTH = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])  # JPEG markers
# Tags of TIFF, which EXIF is.
_ORIENTATION, _TILE_WIDTH, _TILE_HEIGHT = 0x112, 0x142, 0x143
_WHOLE_NUMBERS = {3: "H", 4: "I"}  # types of TIFF entries


def decode(raw: bytes, name: str) -> np.ndarray:
    """Decode an image file to uint8 [H, W, C]: C is 1 if it is stored as gray, else 3.

    Transparent parts are laid on white, 16 bits are scaled to 8, animations give their
    first frame, and what EXIF says is turned or mirrored is turned back, as viewers do.

    Raises:
      UnreadableError: not an image, a truncated or broken one, one of more than 64
        megapixels, one of 32-bit or floating-point pixels, or a JPEG of more than 100
        scans.
    """
    try:
        return _decode(raw)
    except Exception as error:  # a decoder may raise anything for a broken file
        raise UnreadableError(name, _reason(error)) from error


def conform(image: np.ndarray, shape: Shape) -> np.ndarray:
    """Scale an image uint8 [h, w, c] to cover [H, W, C], and cut it to the middle; gray or colour."""
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


def _decode(raw: bytes) -> np.ndarray:
    if not raw:
        raise ValueError("it is empty")
    with _opened(raw) as picture:
        _check_size(*picture.size)
        if picture.format == "TIFF":
            # A whole tile is unpacked, however little of it the picture shows.
            sides = [
                picture.tag_v2.get(tag, 0)
                for tag in (_TILE_WIDTH, _TILE_HEIGHT)
            ]
            if math.prod(sides) > MAX_PIXELS:
                _check_size(*sides)
        pixels = None
        if picture.format == "JPEG":
            _check_scans(raw)
            pixels = _decode_jpeg(raw)
        if pixels is None:
            pixels = _load(picture)
        if picture.format == "TIFF":  # Pillow turns it itself
            return pixels
        return _upright(pixels, _orientation(picture.info.get("exif") or b""))


def _opened(raw: bytes) -> Any:
    """Open an image with Pillow, which reads its header; nothing of the size of the image is allocated."""
    from PIL import Image, JpegImagePlugin

    Image.init()
    for kind in KINDS:
        # Not Image.open: its limit on pixels, a warning, is one for the process.
        factory, accept = Image.OPEN[kind]
        if accept is not None and accept(raw[:16]) is True:
            if kind in ("JPEG", "TIFF"):
                _silence_tags()
            # The registered factory would look for further pictures inside.
            if kind == "JPEG":
                factory = JpegImagePlugin.JpegImageFile
            try:
                return factory(io.BytesIO(raw), "")
            except Exception as error:
                raise ValueError("its header is broken") from error
    raise ValueError("it has no JPEG, PNG, BMP, WebP, GIF or TIFF header")


def _check_size(width: int, height: int) -> None:
    if not width * height:
        raise ValueError(f"its header says {width}x{height}")
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 10**6
        raise ValueError(
            f"{width}x{height} is over the limit of {limit} megapixels"
        )


def _check_scans(raw: bytes) -> None:
    if _count_pairs(raw, _SCAN) > MAX_SCANS and _count_scans(raw) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")


def _decode_jpeg(raw: bytes) -> np.ndarray | None:
    """Decode with simplejpeg; None where Pillow has to."""
    library = _simplejpeg()
    if library is None:
        return None
    try:
        height, width, colours, _ = library.decode_jpeg_header(raw)
        _check_size(width, height)
        # simplejpeg inverts some CMYK files.
        if colours not in ("Gray", "YCbCr", "RGB"):
            return None
        return library.decode_jpeg(raw, "GRAY" if colours == "Gray" else "RGB")
    except ValueError as error:
        # Pillow fills the rest of a picture that ends early with gray where an end
        # marker follows.
        if "premature end" in str(error).lower() or "limit" in str(error):
            raise
        return None  # stray bytes between two parts, say: nothing is lost


def _count_pairs(raw: bytes, pair: bytes) -> int:
    """Return raw.count(pair) in a tenth of the time."""
    values = np.frombuffer(raw, np.uint8)
    return int(
        np.count_nonzero((values[:-1] == pair[0]) & (values[1:] == pair[1]))
    )


def _count_scans(raw: bytes) -> int:
    """Count the scans of a JPEG; previews inside it and what follows its end don't count."""
    count, at = 0, raw.find(b"\xff", 2)
    while at >= 0 and raw[at : at + 2] != _END:
        marker = raw[at + 1 : at + 2]
        count += marker == _SCAN[1:]
        if marker == b"\xff":
            at += 1
        elif not marker or marker[0] in _WITHOUT_LENGTH:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(raw[at + 2 : at + 4], "big"))
        at = raw.find(b"\xff", at)
    return count


def _orientation(exif: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 where it says nothing that can be meant.

    Pillow would take 20 times as long, and warn of what it can't read.
    """
    raw = exif.removeprefix(b"Exif\0\0")
    order = "<" if raw.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(order + "I", raw, 4)
        (entries,) = struct.unpack_from(order + "H", raw, start)
        for at in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", raw, at)
            if tag == _ORIENTATION and count == 1 and kind in _WHOLE_NUMBERS:
                (value,) = struct.unpack_from(
                    order + _WHOLE_NUMBERS[kind], raw, at + 8
                )
                return value if value in range(1, 9) else 1
    except struct.error:  # it ends too early
        pass
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [h, w, C] as stored to how viewers show it, by an EXIF orientation."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _load(picture: Any) -> np.ndarray:
    """Decode with Pillow: uint8 [H, W, C]."""
    from PIL import Image

    picture.load()
    shape = *picture.size[::-1], -1
    if picture.format == "TIFF" and picture.mode in ("I", "F"):
        raise ValueError(
            "its pixels are 32-bit or floating-point: save it with 8 or 16 bits"
        )
    # 16 bits, which Pillow's conversion would clip.
    if picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.uint32)
        return ((deep + 128) // 257).astype(np.uint8).reshape(shape)
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    return np.asarray(picture.convert(mode)).reshape(shape)


def _silence_tags() -> None:
    """Let Pillow not warn of TIFF and EXIF tags that it can't read: the picture is what counts.

    A filter for one module of Pillow; filters for the duration of a call are not safe
    in threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _reason(error: Exception) -> str:
    if isinstance(error, OSError | ValueError | SyntaxError) and str(error):
        return str(error).splitlines()[0]
    return f"{type(error).__name__}: {error}"


# A scan of the images before training: which can't be read, and how large and gray they
# are.


ALL_UP_TO = 10_000
"""Larger sets are scanned in a sample of SAMPLE, spread evenly."""
SAMPLE = 2_000
MAX_SIDE = 128  # of the square that images of many sizes become

_BLOCK = 4096  # images handed to the threads at once


class Scan(NamedTuple):
    """Statistics of a scan of images.

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
        """Scanned images that could be read."""
        return self.sizes.total()

    @property
    def extent(self) -> str:
        """How many were scanned, as text."""
        n = self.readable + len(self.unreadable)
        return (
            f"{n} images"
            if n == self.total
            else f"{n} images looked at (of {self.total})"
        )


def scan(stored: Stored, *, everything: bool = False) -> Scan:
    """Decode all images, or a sample of more than 10,000 unless `everything` is asked for."""
    total = len(stored.names)
    if stored.shape is not None:
        height, width, channels = stored.shape
        sizes = collections.Counter({(height, width): total})
        return Scan(total, sizes, total * (channels == 1), {})
    indices = np.arange(total)
    if total > ALL_UP_TO and not everything:
        indices = np.linspace(0, total - 1, SAMPLE).astype(int)
    sizes: collections.Counter[Size] = collections.Counter()
    gray, unreadable = 0, {}
    for i, outcome in zip(
        indices.tolist(), _shapes(stored, indices), strict=True
    ):
        if isinstance(outcome, UnreadableError):
            unreadable[i] = outcome
        else:
            height, width, channels = outcome
            sizes[height, width] += 1
            gray += channels == 1
    return Scan(total, sizes, gray, unreadable)


def refuse_unreadable(scan: Scan) -> None:
    """Raise UserError that names the first image that can't be read and counts the others."""
    if not scan.unreadable:
        return
    first, *others = scan.unreadable.values()
    if not others:
        raise first
    raise UserError(
        f"{first.name} can't be read ({first.reason}), nor can {len(others)} "
        f"more of the {scan.extent}: remove them, or pass --skip-unreadable "
        "(--check-data lists all such files)"
    )


def common_shape(
    scan: Scan, size: int, name: str
) -> tuple[Shape, tuple[str, ...]]:
    """Return the shape that all images get, and sentences on what that changes.

    Args:
      scan: of the images.
      size: side of a square; 0 takes the size that at least half of the images have,
        else the square of the median short side, at most 128.
      name: of the data.

    Raises:
      UserError: there is nothing that can be read.
    """
    if not scan.readable:
        raise UserError(
            f"no image of {name} can be read: --check-data says why"
        )
    channels = 1 if scan.gray == scan.readable else 3
    shape = (*_size(scan.sizes, size), channels)
    notes = []
    other = {s: n for s, n in scan.sizes.items() if s != shape[:2]}
    if other:
        ends = f"{spell(smallest(other))} to {spell(largest(other))}"
        ends = (
            spell(smallest(other)) if len(other) == 1 else f"sizes from {ends}"
        )
        notes.append(
            f"resized to {spell(shape)}, scaled to cover and cut to the "
            f"middle: {sum(other.values())} of the {scan.extent}, {ends}"
        )
    if channels == 3 and scan.gray:
        notes.append(f"gray turned to colour: {scan.gray} of the {scan.extent}")
    if channels == 1:
        notes.append("all images are gray: 1 channel, and no mirroring")
    return shape, tuple(notes)


def smallest(sizes: dict[Size, int]) -> Size:
    """Return the size of the least area."""
    return min(sizes, key=lambda s: (s[0] * s[1], s))


def largest(sizes: dict[Size, int]) -> Size:
    """Return the size of the largest area."""
    return max(sizes, key=lambda s: (s[0] * s[1], s))


def spell(size: Shape) -> str:
    """Write (height, width) as "WxH", as image viewers do."""
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


def _shapes(
    stored: Stored, indices: np.ndarray
) -> Iterator[Shape | UnreadableError]:
    def shape_of(i: int) -> Shape | UnreadableError:
        try:
            return stored.read(i)[0].shape
        except UnreadableError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(indices), _BLOCK):
            yield from pool.map(
                shape_of, indices[start : start + _BLOCK].tolist()
            )
