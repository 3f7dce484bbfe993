"""Read ArrayRecord files of tf.train.Example records, as TFDS and the scripts for ImageNet write them."""

import functools
import pathlib
import re
from typing import Any

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import dataset, text
from jaxtricks.lab.data.dataset import SPLITS, Stored, UnreadableError
from jaxtricks.lab.data.images import decode

IMAGE, LABEL = ("image", "image/encoded"), ("label", "image/class/label")
"""Names of the features of an image: in TFDS, and in the record files of ImageNet."""

_NAME = re.compile(
    r"(?P<stem>.+?)(-(?P<i>\d+)-of-(?P<n>\d+))?\.array_?record(-(?P<j>\d+)-of-(?P<m>\d+))?"
)
_AT_ONCE = 256  # records of one call while the labels are read
_MOST = 100  # records per byte: a file can claim any number


def shards(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Return split -> its files in order, of one file or of a folder of such files; {} if it has none.

    NAME-SPLIT.array_record[-00000-of-00004] or SPLIT[-00000-of-00004].array_record;
    also arrayrecord. One file alone is the train split, whatever it is called.

    Raises:
      UserError: a shard is not there, or only some of the names have a split in them.
    """
    if path.is_file():
        return {"train": [path]} if _NAME.fullmatch(path.name) else {}
    named = {}
    for file in sorted(path.glob("*")):  # none in what is not a folder
        match = _NAME.fullmatch(file.name)
        # Regular files: the library would wait for a pipe.
        if match and file.is_file():
            named[file] = match
    _refuse_absent(path, list(named.values()))
    splits: dict[str, list[pathlib.Path]] = {}
    for file, match in named.items():
        word = re.split(r"[-_.]", match["stem"].lower())[-1]
        splits.setdefault(SPLITS.get(word, ""), []).append(file)
    if "" in splits and len(splits) > 1:
        raise UserError(
            f"{splits[''][0].name} in {path} has no split in its name, but "
            "others have: name it NAME-train.array_record, or move it away"
        )
    return {split or "train": files for split, files in splits.items()}


def stored(path: pathlib.Path) -> Stored:
    """Return the images of the records.

    A record is a tf.train.Example with an image file in "image" or "image/encoded" and
    one integer in "label" or "image/class/label", from 0, or in the latter from 1.
    NAME.labels.txt beside the files, NAME the feature, has the names of the classes, as
    TFDS writes it. The labels are inside the records, so all of them are read once.

    Raises:
      UserError: array_record is not installed, or files or records are not like that.
    """
    files = shards(path)
    sources = {split: _open(path, paths) for split, paths in files.items()}
    flat = [
        (split, i)
        for split, source in sources.items()
        for i in range(len(source))
    ]
    names = [f"record {i} of {path} ({split})" for split, i in flat]
    features_and_labels = _labels(names, sources)
    feature, notes = features_and_labels[0][0], []
    labels = np.array([value for _, value in features_and_labels], np.int64)
    file = (
        path if path.is_dir() else path.parent
    ) / f"{feature.replace('/', '_')}.labels.txt"
    class_names: tuple[str, ...] = ()
    if file.is_file():
        class_names = tuple(map(printable, text.read(file).splitlines()))
    if feature == LABEL[1] and not class_names and labels.min() == 1:
        labels, notes = (
            labels - 1,
            ["labels are from 1 in the records, and from 0 here"],
        )
    num_classes = dataset.check_classes(
        labels, str(path), len(class_names) or None
    )

    def read(i: int) -> tuple[np.ndarray, int]:
        split, j = flat[i]
        try:
            raw = sources[split][j]
            encoded = image(raw)
        except Exception as error:  # what the library raises for a broken file is not documented
            raise UnreadableError(names[i], _first_line(error)) from error
        return decode(encoded, names[i]), len(raw)

    return Stored(
        name=str(path),
        names=names,
        read=read,
        labels=labels.astype(np.int32),
        split=np.array([split for split, _ in flat]),
        classes=class_names or tuple(map(str, range(num_classes))),
        notes=(*notes, "all records were read once for their labels"),
    )


def _refuse_absent(path: pathlib.Path, matches: list[re.Match[str]]) -> None:
    sets: dict[tuple[str, int], set[int]] = {}
    for match in matches:
        total = match["n"] or match["m"]
        if total:
            sets.setdefault((match["stem"], int(total)), set()).add(
                int(match["i"] or match["j"])
            )
    for (stem, total), numbers in sets.items():
        absent = next((i for i in range(total) if i not in numbers), None)
        if absent is not None:
            raise UserError(
                f"{path} has {len(numbers)} of the {total} shards of {stem}: "
                f"number {absent} is not there, so fetch it or rename the "
                "others"
            )


def _open(path: pathlib.Path, files: list[pathlib.Path]) -> Any:
    try:
        from array_record.python.array_record_data_source import (
            ArrayRecordDataSource,
        )
    except ImportError as error:
        raise UserError(
            f"{path} holds ArrayRecord files, and array_record is not "
            "installed: pip install array_record"
        ) from error
    try:
        source = ArrayRecordDataSource(files)
    except Exception as error:  # not documented either
        raise UserError(
            f"{path} has a broken ArrayRecord file ({_first_line(error)}): "
            "fetch it again"
        ) from error
    if not len(source):
        raise UserError(
            f"{files[0]} holds no records: add some, or remove the file"
        )
    if len(source) > _MOST * sum(file.stat().st_size for file in files):
        raise UserError(
            f"{path} claims {len(source)} records, too many for its length: "
            "fetch it again"
        )
    return source


def _labels(names: list[str], sources: dict[str, Any]) -> list[tuple[str, int]]:
    labels: list[tuple[str, int]] = []  # (feature, value)
    for source in sources.values():
        for start in range(0, len(source), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(source))
            try:
                raws = source.__getitems__(range(start, stop))
            except Exception as error:
                where = f"{names[len(labels)]} or one of the {stop - start - 1} after it"
                raise UserError(
                    f"{where} can't be read ({_first_line(error)}): fetch or "
                    "write the file again"
                ) from error
            for raw in raws:
                labels.append(_label(names[len(labels)], raw))
    return labels


def _label(name: str, raw: bytes) -> tuple[str, int]:
    try:
        return label(raw)
    except ValueError as error:
        raise UserError(
            f"{name} is not a tf.train.Example of an image ({error}): write an "
            "image file in 'image' and an integer in 'label'"
        ) from error


def _first_line(error: Exception) -> str:
    # A file that is cut off gives a RuntimeError without a word.
    return str(error).splitlines()[0] if str(error) else "it is cut off"


# The message tf.train.Example, decoded by protobuf without TensorFlow.


def image(raw: bytes) -> bytes:
    """Return the image file in a record.

    Raises:
      ValueError: there isn't one.
    """
    key, feature = _one_of(IMAGE, "an image file", features(raw))
    values = strings(feature)
    if len(values) != 1:
        raise ValueError(
            f"it has {len(values)} strings in {key!r}, and needs one, an image file"
        )
    return values[0]


def label(raw: bytes) -> tuple[str, int]:
    """Return (feature, value) of the label in a record that has an image too.

    Raises:
      ValueError: there isn't one, or no image.
    """
    by_name = features(raw)
    _one_of(IMAGE, "an image file", by_name)
    key, feature = _one_of(LABEL, "an integer", by_name)
    values = integers(feature)
    if len(values) != 1:
        raise ValueError(
            f"it has {len(values)} integers in {key!r}, and needs one"
        )
    return key, values[0]


def features(raw: bytes) -> dict[str, Any]:
    """Return name -> its Feature message.

    Raises:
      ValueError: no such message.
    """
    from google.protobuf.message import DecodeError

    try:
        return dict(_example_class().FromString(raw).features.feature)
    except DecodeError as error:
        raise ValueError("it can't be decoded") from error


def strings(feature: Any) -> list[bytes]:
    """Return the values of a BytesList; [] of another list."""
    return list(feature.bytes_list.value)


def integers(feature: Any) -> list[int]:
    """Return the values of an Int64List; [] of another list."""
    return list(feature.int64_list.value)


def _one_of(
    keys: tuple[str, str], what: str, by_name: dict[str, Any]
) -> tuple[str, Any]:
    for key in keys:
        if key in by_name:
            return key, by_name[key]
    names = ", ".join(map(repr, sorted(by_name))) or "no features"
    raise ValueError(
        f"it has {names}, but {what} neither in {keys[0]!r} nor in {keys[1]!r}"
    )


@functools.cache
def _example_class() -> Any:
    """Declare tf.train.Example as TensorFlow's example.proto does."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="jaxtricks/example.proto", package="jaxtricks", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    single, repeated = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED

    def add(
        message: Any,
        name: str,
        number: int,
        label: Any,
        kind: Any,
        of: str = "",
    ) -> None:
        type_name = f".jaxtricks.{of}" if of else None
        message.field.add(
            name=name,
            number=number,
            label=label,
            type=kind,
            type_name=type_name,
        )

    feature = descriptor_pb2.DescriptorProto(name="Feature")
    feature.oneof_decl.add(name="kind")
    numbers = {
        "Bytes": kinds.TYPE_BYTES,
        "Float": kinds.TYPE_FLOAT,
        "Int64": kinds.TYPE_INT64,
    }
    for number, (name, kind) in enumerate(numbers.items(), 1):
        add(
            file.message_type.add(name=f"{name}List"),
            "value",
            1,
            repeated,
            kind,
        )
        field = f"{name.lower()}_list"
        add(feature, field, number, single, kinds.TYPE_MESSAGE, f"{name}List")
        feature.field[-1].oneof_index = 0
    file.message_type.append(feature)
    by_name = file.message_type.add(name="Features")
    add(
        by_name,
        "feature",
        1,
        repeated,
        kinds.TYPE_MESSAGE,
        "Features.FeatureEntry",
    )
    entry = by_name.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, single, kinds.TYPE_STRING)
    add(entry, "value", 2, single, kinds.TYPE_MESSAGE, "Feature")
    example = file.message_type.add(name="Example")
    add(example, "features", 1, single, kinds.TYPE_MESSAGE, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("jaxtricks.Example")
    )
