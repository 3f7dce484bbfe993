"""Images in, batches out: sources, splits, long tails, and the Grain pipeline."""

import io
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.longtail import data as profiles

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


class Source:
    """Random access to examples {"image": uint8 [H, W, C], "label": int32 []}.

    Attributes:
      labels: int32 [N].
      bytes_read: bytes fetched so far, as stored (compressed where files are).
    """

    def __init__(self, read: Callable[[int], tuple[np.ndarray, int]], labels: np.ndarray):
        self._read = read
        self.labels = labels.astype(np.int32)
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | np.integer) -> dict[str, np.ndarray]:
        image, n = self._read(int(index))
        self.bytes_read += n
        return {"image": image, "label": self.labels[index]}

    def subset(self, indices: np.ndarray) -> "Source":
        """The examples at these indices, in this order, with a counter of its own."""
        read = self._read
        return Source(lambda i: read(int(indices[i])), self.labels[indices])


class Data(NamedTuple):
    """A data set.

    Attributes:
      name: what the user called it.
      train, test: the two splits.
      classes: names in label order.
      shape: (H, W, C) of every image.
      flip: whether a mirrored image keeps its class.
    """

    name: str
    train: Source
    test: Source
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    flip: bool


def load(name: str, *, imbalance: float = 1.0, seed: int = 0) -> Data:
    """The data set called name, its training split made long-tailed.

    Args:
      name: "digits", a folder, or a .zip file.
      imbalance: images of the largest over the smallest class of the training split; class 0 keeps
        the most (exponential profile). 1 keeps the split as it is.
      seed: which images are kept and, where the data has no test split, which are held out.

    Raises:
      UserError: nothing there, no images, or a class without one; it names the thing and the cure.
    """
    data = digits(seed) if name == "digits" else folders(pathlib.Path(name), seed)
    if imbalance == 1:
        return data
    labels, num_classes = data.train.labels, len(data.classes)
    have = np.bincount(labels, minlength=num_classes)
    profile = profiles.exponential_counts(int(have.max()), num_classes, imbalance)
    keep = profiles.longtail_indices(labels, np.minimum(profile, have), seed)
    return data._replace(train=data.train.subset(np.asarray(keep)))


def digits(seed: int = 0) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, one in five held out by class."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(x) for x in load_digits(return_X_y=True))
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    source = Source(lambda i: (images[i], images[i].nbytes), labels)
    train, test = hold_out(labels, seed)
    names = tuple(map(str, range(10)))
    return Data("digits", source.subset(train), source.subset(test), names, (8, 8, 1), flip=False)


def folders(path: pathlib.Path, seed: int = 0) -> Data:
    """Class folders below a directory or inside a zip: [train|test/]CLASS/image."""
    tree = _open(path)
    names, read, empty = tree.images(), tree.read, tree.empty_folders()
    if not names:
        raise UserError(
            f"{path} holds no images: it needs CLASS/NAME.jpg, or train/ and test/ of those"
        )
    if empty:
        raise UserError(f"class {empty[0]!r} of {path} has no image: add some or remove the folder")
    where = [_SPLITS.get(n.split("/")[-3], "") if n.count("/") > 1 else "" for n in names]
    classes = sorted({n.split("/")[-2] for n in names}, key=_natural)
    labels = np.array([classes.index(n.split("/")[-2]) for n in names], np.int32)
    shape = decode(read(names[0]), names[0]).shape

    def example(i: int) -> tuple[np.ndarray, int]:
        raw = read(names[i])
        image = decode(raw, names[i])
        if image.shape != shape:
            raise UserError(
                f"{names[i]} is {image.shape[1]}x{image.shape[0]} but {names[0]} is "
                f"{shape[1]}x{shape[0]}: resize the images to one size"
            )
        return image, len(raw)

    source = Source(example, labels)
    if "test" in where:
        train, test = (np.flatnonzero(np.array(where) == split) for split in ("train", "test"))
    else:
        train, test = hold_out(labels, seed)
    data = Data(
        str(path), source.subset(train), source.subset(test), tuple(classes), shape, flip=True
    )
    for split, part in (("training", data.train), ("test", data.test)):
        missing = np.flatnonzero(np.bincount(part.labels, minlength=len(classes)) == 0)
        if len(missing):
            raise UserError(
                f"class {classes[missing[0]]!r} of {path} has no {split} image: add some"
            )
    return data


def hold_out(labels: np.ndarray, seed: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, test) with the same share of every class held out."""
    rng = np.random.default_rng(seed)
    test = []
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        test.append(members[: max(1, round(share * len(members)))])
    held = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), held), held


def decode(raw: bytes, name: str) -> np.ndarray:
    """Image file -> uint8 [H, W, 3]; JPEG by simplejpeg where it is installed, else Pillow."""
    try:
        import simplejpeg

        if simplejpeg.is_jpeg(raw):
            return simplejpeg.decode_jpeg(raw)
    except (ImportError, ValueError):
        pass  # Pillow reads what simplejpeg refuses (CMYK, say) and says what is wrong with the rest
    import PIL.Image

    try:
        return np.asarray(PIL.Image.open(io.BytesIO(raw)).convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} can't be read as an image: replace or remove it") from error


def pipeline(
    source: Source,
    *,
    batch: int,
    seed: int,
    transform: Callable[[Any], Any],
    to_device: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """Endless batches: shuffle -> read -> transform (echo) -> batch -> device.

    Args:
      source: random access to examples.
      batch: examples a batch.
      seed: of the order.
      transform: IterDataset -> IterDataset, applied to single examples.
      to_device: batch -> batch on its devices, run one batch ahead in a thread; None stays in
        this thread and on the host.
    """
    import grain

    shuffled = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    examples = shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    batches = transform(examples).batch(batch, drop_remainder=True)
    if to_device is not None:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches.map(to_device), prefetch_buffer_size=2
        )
    return iter(batches)


def eval_batches(source: Source, batch: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """All examples once, the last batch padded; "where" (bool [batch]) marks the real ones.

    With a limit, that many examples spread evenly over the source.
    """
    order = np.arange(len(source))
    if limit is not None and limit < len(order):
        order = order[np.linspace(0, len(order) - 1, limit).astype(int)]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        examples = [source[i] for i in chosen]
        fill = [examples[0]] * (batch - len(examples))
        stacked = {key: np.stack([e[key] for e in examples + fill]) for key in ("image", "label")}
        yield {**stacked, "where": np.arange(batch) < len(examples)}


class _Tree(NamedTuple):
    """What a folder or a zip holds: entries relative to it, folders with a final "/"."""

    entries: list[str]
    read: Callable[[str], bytes]

    def images(self) -> list[str]:
        """Sorted names of the images that lie in a folder."""
        kinds = ((n, pathlib.PurePosixPath(n).suffix.lower()) for n in self.entries)
        return sorted(n for n, kind in kinds if kind in IMAGES and "/" in n)

    def empty_folders(self) -> list[str]:
        """Sorted names of the innermost folders without an image."""
        filled = {n.rsplit("/", 1)[0] + "/" for n in self.images()}
        folders = {n[: n.rindex("/") + 1] for n in self.entries if "/" in n}
        innermost = (f for f in folders if not any(g != f and g.startswith(f) for g in folders))
        return sorted(f.rstrip("/").rsplit("/", 1)[-1] for f in innermost if f not in filled)


def _open(path: pathlib.Path) -> _Tree:
    if path.is_dir():
        found = ((p.relative_to(path).as_posix(), p) for p in path.rglob("*"))
        entries = [name + "/" * p.is_dir() for name, p in found]
        return _Tree(list(filter(_visible, entries)), lambda name: (path / name).read_bytes())
    if path.is_file() and zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        return _Tree(list(filter(_visible, archive.namelist())), archive.read)
    problem = "is neither a folder nor a zip" if path.exists() else "is not there"
    raise UserError(f"--data {path} {problem}: give digits, a folder of class folders, or a zip")


def _visible(name: str) -> bool:
    # Finder, notebooks and git leave folders of their own behind.
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _natural(name: str) -> tuple[int, int | str]:
    # Class "10" after class "9": a sorted list of strings would permute numbered classes.
    return (0, int(name)) if name.isdecimal() else (1, name)
