"""The wire format of tf.train.Example, read without TensorFlow and without protobuf.

Example {Features 1}, Features {map<string, Feature> 1}, Feature {BytesList 1, FloatList 2, Int64List
3}, a list {values 1}. Fields may come in any order and unknown ones are passed over.
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, text
from jaxtricks.lab.data.dataset import SPLITS, Stored, UnreadableError
from jaxtricks.lab.data.images import decode

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


# --------------------------------------------------------------------------------------------------
# ArrayRecord files of tf.train.Example records, as TFDS and the scripts for ImageNet write them.
# --------------------------------------------------------------------------------------------------


_NAME = re.compile(
    r"(?P<stem>.+?)(-(?P<i>\d+)-of-(?P<n>\d+))?\.array_?record(-(?P<j>\d+)-of-(?P<m>\d+))?"
)
_AT_ONCE = 256  # records of one call while the labels are read
_MOST = 100  # records a byte: a file can claim any number


def shards(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Split -> its files in order; of one file, or of a folder with such files in it; {} if it has none.

    NAME-SPLIT.array_record[-00000-of-00004] or SPLIT[-00000-of-00004].array_record; also arrayrecord.
    One file alone is the train split, whatever it is called.

    Raises:
      UserError: a shard is not there, or only some of the names have a split in them.
    """
    if path.is_file():
        return {"train": [path]} if _NAME.fullmatch(path.name) else {}
    files = sorted(path.glob("*"))  # none in what is no folder
    # Regular files: the library would wait for what a pipe has to say.
    matches = {file: _NAME.fullmatch(file.name) for file in files}
    found = {file: match for file, match in matches.items() if match and file.is_file()}
    _refuse_absent(path, list(found.values()))
    splits: dict[str, list[pathlib.Path]] = {}
    for file, match in found.items():
        word = re.split(r"[-_.]", match["stem"].lower())[-1]
        splits.setdefault(SPLITS.get(word, ""), []).append(file)
    if "" in splits and len(splits) > 1:
        raise UserError(
            f"{splits[''][0].name} in {path} has no split in its name, but others have: name it "
            "NAME-train.array_record, or move it away"
        )
    return {split or "train": files for split, files in splits.items()}


def stored(path: pathlib.Path) -> Stored:
    """The images of the records.

    A record is a tf.train.Example with an image file in "image" or "image/encoded" and one integer in
    "label" or "image/class/label", from 0, or in the latter from 1. NAME.labels.txt beside the files,
    NAME the feature, has the names of the classes, as TFDS writes it. The labels are inside the
    records, so all of them are read once.

    Raises:
      UserError: array_record is not installed, or files or records are not like that.
    """
    files = shards(path)
    sources = {split: _open(path, paths) for split, paths in files.items()}
    flat = [(split, i) for split, source in sources.items() for i in range(len(source))]
    names = [f"record {i} of {path} ({split})" for split, i in flat]
    found = _labels(names, sources)
    feature, notes = found[0][0], []
    labels = np.array([label for _, label in found], np.int64)
    file = (path if path.is_dir() else path.parent) / f"{feature.replace('/', '_')}.labels.txt"
    given = _class_names(file) if file.is_file() else ()
    if feature == LABEL[1] and not given and labels.min() == 1:
        labels, notes = labels - 1, ["labels are from 1 in the records, and from 0 here"]
    num_classes = arrays.check_classes(labels, str(path), len(given) or None)

    def read(i: int) -> tuple[np.ndarray, int]:
        split, j = flat[i]
        try:
            raw = sources[split][j]
            encoded = image(raw)
        except Exception as error:  # what the library raises for a broken file is not documented
            raise UnreadableError(names[i], _said(error)) from error
        return decode(encoded, names[i]), len(raw)

    return Stored(
        name=str(path),
        names=names,
        read=read,
        labels=labels.astype(np.int32),
        where=np.array([split for split, _ in flat]),
        classes=given or tuple(map(str, range(num_classes))),
        notes=(*notes, "all records were read once for their labels"),
    )


def _class_names(file: pathlib.Path) -> tuple[str, ...]:
    return tuple(map(printable, text.read(file).splitlines()))


def _refuse_absent(path: pathlib.Path, matches: list[re.Match[str]]) -> None:
    sets: dict[tuple[str, int], set[int]] = {}
    for match in matches:
        if total := match["n"] or match["m"]:
            sets.setdefault((match["stem"], int(total)), set()).add(int(match["i"] or match["j"]))
    for (stem, total), numbers in sets.items():
        absent = next((i for i in range(total) if i not in numbers), None)
        if absent is not None:
            raise UserError(
                f"{path} has {len(numbers)} of the {total} shards of {stem}: number {absent} is not "
                "there, so fetch it or rename the others"
            )


def _open(path: pathlib.Path, files: list[pathlib.Path]) -> Any:
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError as error:
        raise UserError(
            f"{path} holds ArrayRecord files, and array_record is not installed: pip install array_record"
        ) from error
    try:
        source = ArrayRecordDataSource(files)
    except Exception as error:  # not documented either
        raise UserError(
            f"{path} has a broken ArrayRecord file ({_said(error)}): fetch it again"
        ) from error
    if not len(source):
        raise UserError(f"{files[0]} holds no records: add some, or remove the file")
    if len(source) > _MOST * sum(file.stat().st_size for file in files):
        raise UserError(
            f"{path} claims {len(source)} records, too many for its length: fetch it again"
        )
    return source


def _labels(names: list[str], sources: dict[str, Any]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []  # (feature, value)
    for source in sources.values():
        for start in range(0, len(source), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(source))
            try:
                raws = source.__getitems__(range(start, stop))
            except Exception as error:
                where = f"{names[len(found)]} or one of the {stop - start - 1} after it"
                raise UserError(
                    f"{where} can't be read ({_said(error)}): fetch or write the file again"
                ) from error
            for raw in raws:
                found.append(_label(names[len(found)], raw))
    return found


def _label(name: str, raw: bytes) -> tuple[str, int]:
    try:
        return label(raw)
    except ValueError as error:
        raise UserError(
            f"{name} is no tf.train.Example of an image ({error}): write an image file in 'image' and "
            "an integer in 'label'"
        ) from error


def _said(error: Exception) -> str:
    # A file that is cut off gives a RuntimeError without a word.
    return str(error).splitlines()[0] if str(error) else "it is cut off"
