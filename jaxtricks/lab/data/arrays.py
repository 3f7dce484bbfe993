"""Read images that are arrays: scikit-learn's digits, and .npz files."""

import io
import math
import pathlib
import zipfile
from typing import Any

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import dataset, folders
from jaxtricks.lab.data.dataset import SPLITS, Stored

MAX_BYTES = 16 * 2**30
"""Arrays that are larger are not loaded: a small file can claim any size."""
MAX_PACKED, MAX_RATIO = 2**30, 100
"""Nor are arrays that are larger than the first and more than the second times as long as in the file."""

_HEADER = 16_384  # bytes; NumPy reads no header of more than 10,000

_KEYS = {f"{split}_{{}}": where for split, where in SPLITS.items()} | {
    "{}": "train"
}
_XY = {"x_train": "train", "x_val": "validation", "x_test": "test"}
_NEEDS = "it needs images and labels, or train_images, train_labels, test_images, test_labels"


def digits() -> Stored:
    """Return scikit-learn's 1,797 handwritten digits, gray, 8 x 8."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(x) for x in load_digits(return_X_y=True))
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return _stored("digits", {"train": (images, labels)}, flip=False)


def npz(path: pathlib.Path) -> Stored:
    """Read [SPLIT_]images and [SPLIT_]labels, or x_train, y_train and so on, of an .npz file.

    Raises:
      UserError: no such keys, lengths that differ, images that aren't uint8, labels
        that aren't 0 to C-1, Python objects, arrays over 16 GiB, arrays over 1 GiB that
        are 100 times shorter in the file, or a broken file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                name for name in archive.namelist() if name.endswith(".npy")
            ]
            pairs = _pairs(path, {name.removesuffix(".npy") for name in names})
            parts = {}
            for split, (x, y) in pairs.items():
                parts[split] = _load(path, archive, x), _load(path, archive, y)
    except UserError:
        raise
    except Exception as error:  # a broken file may raise anything
        raise UserError(
            f"{path} is a broken .npz file ({error}): save it again"
        ) from error
    checked = {}
    for split, (images, labels) in parts.items():
        x, y = pairs[split]
        images = check_images(images, f"{x} in {path}")
        labels = check_labels(labels, len(images), f"{y} in {path}")
        if not len(labels):
            raise UserError(
                f"{x} in {path} is empty: add images, or leave it out"
            )
        checked[split] = images, labels
    return _stored(str(path), checked)


def check_images(images: np.ndarray, name: str, ndim: int = 4) -> np.ndarray:
    """Return uint8 [..., H, W] or [..., H, W, C] as [..., H, W, C] of ndim axes, or raise UserError."""
    if images.dtype != np.uint8:
        how = "(255 * x).round().astype(np.uint8) if x is in [0, 1]"
        if images.dtype.kind in "iub":
            how = "x.astype(np.uint8) if x is in [0, 255]"
        raise UserError(
            f"{name} is {images.dtype}, not uint8: convert it, by {how}"
        )
    if images.ndim == ndim - 1:
        images = images[..., None]
    if (
        images.ndim != ndim
        or images.shape[-1] not in (1, 3)
        or 0 in images.shape[-3:]
    ):
        axes = "[N, H, W, C]" if ndim == 4 else "[H, W, C]"
        raise UserError(
            f"{name} has the shape {list(images.shape)}: it must be {axes} "
            "with C 1 or 3, or have no C; np.moveaxis moves channels to the end"
        )
    return images


def check_labels(labels: np.ndarray, length: int, name: str) -> np.ndarray:
    """Return integers [N] or [N, 1] as [N], or raise UserError."""
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"{name} is {labels.dtype}: labels must be integers, 0 to C-1"
        )
    if labels.shape not in ((length,), (length, 1)):
        raise UserError(
            f"{name} has the shape {list(labels.shape)} for {length} images: "
            "there must be one label per image"
        )
    return labels.reshape(-1)


def _stored(
    name: str,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    flip: bool | None = None,
) -> Stored:
    labels = np.concatenate(
        [labels.astype(np.int64) for _, labels in parts.values()]
    )
    num_classes = dataset.check_classes(labels, name)
    arrays = [images for images, _ in parts.values()]
    ends = np.cumsum([len(images) for images in arrays])
    shapes = {images.shape[1:] for images in arrays}

    def read(i: int) -> tuple[np.ndarray, int]:
        part = int(np.searchsorted(ends, i, side="right"))
        image = arrays[part][i - ends[part]]
        return image, image.nbytes

    names = []
    for split, (images, _) in parts.items():
        names += [f"image {i} of {split}" for i in range(len(images))]
    return Stored(
        name=name,
        names=names,
        read=read,
        labels=labels.astype(np.int32),
        split=np.repeat(list(parts), [len(images) for images in arrays]),
        classes=tuple(map(str, range(num_classes))),
        shape=shapes.pop() if len(shapes) == 1 else None,
        flip=flip,
    )


def _pairs(path: pathlib.Path, keys: set[str]) -> dict[str, tuple[str, str]]:
    """Return split -> (key of its images, key of its labels)."""
    names = {}  # of images -> (of labels, split)
    for key, split in _KEYS.items():
        names[key.format("images")] = key.format("labels"), split
    for x, split in _XY.items():
        names[x] = x.replace("x", "y", 1), split
    pairs = {}
    for images, (labels, split) in names.items():
        if (images in keys) != (labels in keys):
            here, absent = (
                (images, labels) if images in keys else (labels, images)
            )
            raise UserError(f"{path} has {here} but no {absent}: {_NEEDS}")
        if images in keys and split in pairs:
            raise UserError(
                f"{path} has {images} and {pairs[split][0]}: keep one of them"
            )
        if images in keys:
            pairs[split] = images, labels
    if not pairs:
        raise UserError(
            f"{path} has the arrays {', '.join(sorted(keys)) or 'none'}: {_NEEDS}"
        )
    return pairs


def _load(path: pathlib.Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    entry = archive.getinfo(key + ".npy")
    folders.refuse_method(path, entry)
    try:
        with archive.open(entry) as file:
            # At most so much: the length of the header itself may be claimed.
            header = io.BytesIO(file.read(_HEADER))
        _refuse(path, key, header, entry)
        with archive.open(entry) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # the end, where zipfile compares the checksum
    except UserError:
        raise
    except Exception as error:  # a broken file may raise anything
        reason = (
            str(error).splitlines()[0] if str(error) else "it ends too early"
        )
        raise UserError(
            f"{key} in {path} is broken ({reason}): save it again"
        ) from error
    return array


def _refuse(
    path: pathlib.Path, key: str, file: Any, entry: zipfile.ZipInfo
) -> None:
    """Refuse arrays by their header, before anything is allocated."""
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise UserError(
            f"{key} in {path} holds Python objects, which are never unpickled: "
            "save it as an array of numbers, by np.stack"
        )
    nbytes, size = math.prod(shape) * dtype.itemsize, entry.file_size
    if nbytes > MAX_BYTES or size > MAX_BYTES:
        raise UserError(
            f"{key} in {path} claims {max(nbytes, size) / 2**30:.0f} GiB, over "
            f"the limit of {MAX_BYTES // 2**30} GiB: save a folder of images "
            "instead"
        )
    packed = min(entry.compress_size, path.stat().st_size)
    if size > max(MAX_PACKED, MAX_RATIO * packed):
        raise UserError(
            f"{key} in {path} unpacks from {packed / 2**20:.1f} MiB to "
            f"{size / 2**30:.1f} GiB, over the limit of {MAX_RATIO} times: "
            "save it by np.savez, without compression"
        )
    if min(shape, default=0) < 0 or nbytes + file.tell() != size:
        raise ValueError("its header does not fit its length")
