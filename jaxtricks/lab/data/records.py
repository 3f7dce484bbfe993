"""ArrayRecord files of tf.train.Example records, as TFDS and the scripts for ImageNet write them."""

import pathlib
import re
from typing import Any

import numpy as np

from jaxtricks._table import printable
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, example_proto, text
from jaxtricks.lab.data.dataset import SPLITS, Stored, UnreadableError
from jaxtricks.lab.data.images import decode

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
    if feature == example_proto.LABEL[1] and not given and labels.min() == 1:
        labels, notes = labels - 1, ["labels are from 1 in the records, and from 0 here"]
    num_classes = arrays.check_classes(labels, str(path), len(given) or None)

    def read(i: int) -> tuple[np.ndarray, int]:
        split, j = flat[i]
        try:
            raw = sources[split][j]
            encoded = example_proto.image(raw)
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
        return example_proto.label(raw)
    except ValueError as error:
        raise UserError(
            f"{name} is no tf.train.Example of an image ({error}): write an image file in 'image' and "
            "an integer in 'label'"
        ) from error


def _said(error: Exception) -> str:
    # A file that is cut off gives a RuntimeError without a word.
    return str(error).splitlines()[0] if str(error) else "it is cut off"
