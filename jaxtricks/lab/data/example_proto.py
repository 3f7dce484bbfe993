"""The wire format of tf.train.Example, read without TensorFlow and without protobuf.

Example {Features 1}, Features {map<string, Feature> 1}, Feature {BytesList 1, FloatList 2, Int64List
3}, a list {values 1}. Fields may come in any order and unknown ones are passed over.
"""

from collections.abc import Iterator

IMAGE, LABEL = ("image", "image/encoded"), ("label", "image/class/label")
"""What the features of an image may be called: by TFDS, and in the record files of ImageNet."""

_VARINT, _FIXED64, _SPAN, _FIXED32 = 0, 1, 2, 5
_MAX_SHIFT = 63


def image(raw: bytes) -> bytes:
    """The image file in a record.

    Raises:
      ValueError: there isn't one.
    """
    key, feature = _one_of(IMAGE, "an image file", raw)
    values = strings(feature)
    if len(values) != 1:
        raise ValueError(f"it has {len(values)} strings in {key!r}, and needs one, an image file")
    return values[0]


def label(raw: bytes) -> tuple[str, int]:
    """(feature, value) of the label in a record that has an image too.

    Raises:
      ValueError: there isn't one, or no image.
    """
    _one_of(IMAGE, "an image file", raw)
    key, feature = _one_of(LABEL, "an integer", raw)
    values = integers(feature)
    if len(values) != 1:
        raise ValueError(f"it has {len(values)} integers in {key!r}, and needs one")
    return key, values[0]


def features(raw: bytes) -> dict[str, memoryview]:
    """Name -> its Feature, not copied; the last of two of one name counts.

    Raises:
      ValueError: no such message.
    """
    found = {}
    for number, body in _spans(memoryview(raw)):
        for entry_number, entry in _spans(body) if number == 1 else ():
            if entry_number == 1:
                pair = dict(_spans(entry))
                found[bytes(pair.get(1, b"")).decode()] = pair.get(2, memoryview(b""))
    return found


def strings(feature: memoryview) -> list[bytes]:
    """The values of a BytesList; [] of another list."""
    return [
        bytes(value)
        for kind, values in _spans(feature)
        if kind == 1
        for number, value in _spans(values)
        if number == 1
    ]


def integers(feature: memoryview) -> list[int]:
    """The values of an Int64List, packed or not; [] of another list."""
    found: list[int] = []
    for kind, values in _spans(feature):
        for number, value in _fields(values) if kind == 3 else ():
            if number == 1 and isinstance(value, int):
                found.append(value)
            elif number == 1 and isinstance(value, memoryview):
                found += _packed(value)
    return [value - 2**64 if value >= 2**63 else value for value in found]


def _one_of(wanted: tuple[str, str], what: str, raw: bytes) -> tuple[str, memoryview]:
    have = features(raw)
    for key in wanted:
        if key in have:
            return key, have[key]
    listed = ", ".join(map(repr, sorted(have))) or "no features"
    raise ValueError(f"it has {listed}, but {what} neither in {wanted[0]!r} nor in {wanted[1]!r}")


def _packed(view: memoryview) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value


def _spans(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that are strings or messages."""
    return ((n, value) for n, value in _fields(view) if isinstance(value, memoryview))


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(view, at)
        elif kind in (_SPAN, _FIXED64, _FIXED32):
            size, at = _varint(view, at) if kind == _SPAN else (8 if kind == _FIXED64 else 4, at)
            value, at = view[at : at + size], at + size
            if at > len(view):
                raise ValueError("it ends too early")
        else:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        yield tag >> 3, value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends)."""
    value = 0
    for shift in range(0, _MAX_SHIFT + 1, 7):
        if at >= len(view):
            raise ValueError("it ends too early")
        value |= (view[at] & 0x7F) << shift
        at += 1
        if view[at - 1] < 0x80:
            return value & 2**64 - 1, at  # protobuf, too, drops what is beyond
    raise ValueError("it has a number of more than 64 bits")
