"""The lab's data: what is read, how it is split, what is refused, and pipelines that go on exactly."""

import io
import itertools
import json
import os
import pathlib
import struct
import sys
import threading
import warnings
import zipfile
import zlib

import jaxtricks as jt
import numpy as np
import pytest
from jaxtricks.lab import data
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import dataset, folders, images, loading
from jaxtricks.lab.data.dataset import Source, UnreadableError
from PIL import Image

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def encode(picture, kind="PNG", **options):
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def write(root, files):
    """{"train/cat/0.png": bytes, "train/dog/": None}."""
    for name, raw in files.items():
        path = root / name
        (path if raw is None else path.parent).mkdir(parents=True, exist_ok=True)
        if raw is not None:
            path.write_bytes(raw)
    return str(root)


def pack(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw or b"")
    return str(path)


def classes(*, n=5, size=(8, 8), names=("cat", "dog"), under=""):
    """n colour PNGs of each class."""
    return {f"{under}{c}/{i}.png": encode(pixels(*size, 3)) for c in names for i in range(n)}


def refused(name, *words, **options):
    with pytest.raises(UserError) as error:
        data.load(str(name), **options)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


# One image.


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_is_decoded(kind, channels):
    smooth = np.add.outer(np.arange(20), np.arange(30)).astype(np.uint8)
    array = smooth if channels == 1 else np.stack([smooth, smooth[::-1], smooth[:, ::-1]], -1)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    raw = encode(array, kind, **options)
    out = images.decode(raw, "x")
    expected = 3 if kind in ("WEBP", "GIF") else channels  # they have no gray
    assert out.shape == (20, 30, expected) and out.dtype == np.uint8
    if kind not in ("GIF", "JPEG") or channels == 1:
        assert np.abs(out.astype(int) - array.reshape(20, 30, -1)).max() <= 6 * (kind == "JPEG")


@pytest.mark.parametrize(
    "options", [{"lossless": False}, {"lossless": False, "exif": b"Exif\0\0MM"}]
)
def test_lossy_and_extended_webp_headers(options):
    out = images.decode(encode(pixels(33, 47, 3), "WEBP", **options), "x")
    assert out.shape == (33, 47, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 257, 40000, 65535]], np.uint16)
    out = images.decode(encode(deep), "x")
    assert out.shape == (1, 4, 1) and out.ravel().tolist() == [0, 1, 156, 255]


def test_palette_alpha_and_one_bit():
    red = Image.new("P", (2, 2), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    assert images.decode(encode(red), "x")[0, 0].tolist() == [255, 0, 0]
    assert images.decode(encode(red, transparency=1), "x")[0, 0].tolist() == [255, 255, 255]
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert images.decode(encode(half), "x")[0, 0].tolist() == [255, 255, 255]
    gray = images.decode(encode(Image.new("LA", (2, 2), (7, 255))), "x")
    assert gray.shape == (2, 2, 1) and gray[0, 0, 0] == 7
    bit = images.decode(encode(Image.new("1", (2, 2), 1)), "x")
    assert bit.shape == (2, 2, 1) and bit[0, 0, 0] == 255


def test_cmyk_is_what_pillow_says():
    raw = encode(Image.new("CMYK", (8, 8), (10, 200, 30, 40)), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    np.testing.assert_array_equal(images.decode(raw, "x"), expected)


@pytest.mark.parametrize("library", [True, False], ids=["simplejpeg", "pillow"])
@pytest.mark.parametrize("cut", [2, 300, 1200, 1])
def test_truncated_jpegs_are_unreadable(cut, library, monkeypatch):
    if not library:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    raw = encode(pixels(40, 50, 3), "JPEG")
    images.decode(raw, "x")
    with pytest.raises(UnreadableError, match="photo.jpg can't be read"):
        images.decode(raw[:-cut] if cut > 1 else raw[:30], "photo.jpg")


def test_a_jpeg_that_ends_early_but_politely_is_unreadable():
    raw = encode(pixels(40, 50, 3), "JPEG")
    with pytest.raises(UnreadableError, match="premature end"):
        images.decode(raw[: len(raw) // 2] + b"\xff\xd9", "x")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_other_truncated_files_are_unreadable(kind):
    raw = encode(pixels(40, 50, 3), kind)
    for keep in (0.9, 0.5, 0.01, 0):
        with pytest.raises(UnreadableError):
            images.decode(raw[: int(keep * len(raw))], "x")


def test_garbage_is_unreadable():
    for raw in (b"", b"no image", b"\xff\xd8\xff", b"RIFF1234WEBPVP9 ", bytes(RNG.bytes(500))):
        with pytest.raises(UnreadableError):
            images.decode(raw, "x")


def bomb(kind, side=20_000):
    """A small file whose header claims side x side."""
    if kind == "PNG":
        chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        crc = struct.pack(">I", zlib.crc32(chunk))
        data = struct.pack(">I", 8) + b"IDAT" + bytes(12)
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + data
    raw = bytearray(encode(pixels(8, 8, 3), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "JPEG":
        struct.pack_into(">HH", raw, raw.index(b"\xff\xc0") + 5, side, side)
    elif kind == "BMP":
        struct.pack_into("<ii", raw, 18, side, -side)
    elif kind == "GIF":
        struct.pack_into("<HH", raw, 6, side, side)
    else:
        struct.pack_into("<I", raw, 21, 0x3FFF | 0x3FFF << 14)
    return bytes(raw)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_bombs_are_refused_by_their_header(kind, monkeypatch):
    monkeypatch.setattr(images, "_load", None)  # nothing may be decoded
    monkeypatch.setattr(images, "_decode_jpeg", None)
    with pytest.raises(UnreadableError, match="limit of 64 megapixels|header is broken"):
        images.decode(bomb(kind), "x")


def test_conform_covers_cuts_and_converts():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    out = images.conform(wide, (10, 10, 3))
    np.testing.assert_array_equal(out, np.full((10, 10, 3), 200))
    assert images.conform(wide, (5, 4, 1)).shape == (5, 4, 1)
    assert images.conform(wide[..., :1], (10, 30, 3)).shape == (10, 30, 3)
    assert images.conform(wide, wide.shape) is wide


# Folders and zips.


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path, packed, val):
    files = classes(n=4, under="set/train/") | classes(n=2, under=f"set/{val}/")
    files |= classes(n=1, under="set/test/") | {"set/README.txt": b"hello", "__MACOSX/x": b""}
    make = pack(tmp_path / "s.zip", files) if packed else write(tmp_path / "s", files)
    d = data.load(make, validation=0.5)
    assert (len(d.train), len(d.validation), len(d.test)) == (8, 4, 2)
    assert d.classes == ("cat", "dog") and d.counts.tolist() == [4, 4]
    assert d.kind == "image" and d.shape == (8, 8, 3) and d.flip
    first = images.decode(files["set/train/cat/0.png"], "x")
    np.testing.assert_array_equal(d.train[0]["image"], first)
    assert d.train[0]["label"].dtype == np.int32 and d.train.bytes_read == 2 * len(
        files["set/train/cat/0.png"]
    )


def test_splits_are_held_out_by_class_and_seed(tmp_path):
    root = write(tmp_path, classes(n=20))
    d = data.load(root, validation=0.1, test=0.2)
    assert (len(d.train), len(d.validation), len(d.test)) == (28, 4, 8)
    for part in (d.train, d.validation, d.test):
        assert len(set(np.bincount(part.labels).tolist())) == 1
    parts = (d.train, d.validation, d.test)
    seen = {s[i]["image"].tobytes() for s in parts for i in range(len(s))}
    assert len(seen) == 40
    without = data.load(root, test=0.2)
    assert without.validation is None and len(without.train) == 32
    # The test split is the same whether or not there is a validation split.
    assert [x["image"].tobytes() for x in without.test] == [x["image"].tobytes() for x in d.test]
    other = data.load(root, test=0.2, seed=1)
    assert any((a["image"] != b["image"]).any() for a, b in zip(other.test, d.test, strict=True))
    assert any("0.1 of every class" in note for note in d.notes)


def test_a_lone_validation_folder_is_the_test_split(tmp_path):
    root = write(tmp_path, classes(n=10, under="train/") | classes(n=3, under="val/"))
    d = data.load(root, validation=0.2)
    assert (len(d.train), len(d.validation), len(d.test)) == (16, 4, 6)
    assert any("test: the data's own validation split" in note for note in d.notes)


def test_a_class_may_have_subfolders(tmp_path):
    files = {f"train/cat/images/{i}.png": encode(pixels(8, 8, 3)) for i in range(3)}
    d = data.load(write(tmp_path, files | classes(n=3, under="train/", names=("dog",))), test=0.3)
    assert d.classes == ("cat", "dog")


def test_linked_class_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "far", classes(n=5, names=("cat",)))
    write(tmp_path / "set", classes(n=5, names=("dog",)))
    os.symlink(tmp_path / "far/cat", tmp_path / "set/cat")
    os.symlink(tmp_path / "set", tmp_path / "set/dog/again")
    d = data.load(str(tmp_path / "set"))
    assert d.classes == ("cat", "dog") and len(d.train) + len(d.test) == 10


def test_numbered_classes_are_in_the_order_of_numbers(tmp_path):
    d = data.load(write(tmp_path, classes(n=2, names=("10", "9", "2", "02"))))
    assert d.classes == ("02", "2", "9", "10")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"a.png": encode(pixels(4, 4, 3))},
            ("holds images (1) but no class folders", "CLASS/NAME.jpg"),
        ),
        ({"a.txt": b"", "cat/": None}, ("holds no images", "1 .txt", "CLASS/NAME.jpg")),
        (classes() | {"bird/": None}, ("class 'bird'", "no image")),
        (classes(under="train/") | {"val/": None}, ("validation split", "val/", "holds no images")),
        (classes(under="train/") | {"test/cat/": None}, ("test split", "holds no images")),
        (classes(under="test/") | {"train/cat/": None}, ("train split", "holds no images")),
        (classes(under="test/"), ("no training images",)),
        (
            classes(under="train/") | {"test/7.png": encode(pixels(8, 8, 3))},
            ("test/7.png", "no class"),
        ),
        (classes(under="train/") | classes(under="more/"), ("more/", "beside")),
        (classes(under="train/") | {"test/cat/0.png": encode(pixels(8, 8, 3))}, ("'dog'", "test")),
        (classes(under="test/") | classes(under="train/", names=("cat",)), ("'dog'", "training")),
        (classes() | classes(n=1, names=("ant",)), ("'ant'", "1 image,", "leaves none")),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path, files, words):
    refused(write(tmp_path, files), *words)


def test_a_class_too_small_for_two_held_out_splits(tmp_path):
    root = write(tmp_path, classes(n=10) | classes(n=2, names=("ant",)))
    assert data.load(root).counts.tolist() == [1, 8, 8]
    refused(root, "'ant'", "1 for test and 1 for validation", validation=0.1)


def test_loose_files_are_named(tmp_path):
    d = data.load(write(tmp_path, classes() | {"sample.png": encode(pixels(8, 8, 3))}))
    assert any("sample.png" in note for note in d.notes) and len(d.train) + len(d.test) == 10


@pytest.mark.parametrize(
    "name", ["/etc/0.png", "C:\\cat\\0.png", "../0.png", "cat/../../0.png", "..\\0.png"]
)
def test_zip_entries_that_point_outside_are_refused(tmp_path, name):
    refused(pack(tmp_path / "x.zip", classes() | {name: b"x"}), "points outside", repr(name))


def test_encrypted_and_broken_zips_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    raw = bytearray(pathlib.Path(pack(path, classes())).read_bytes())
    central = raw.index(b"PK\x01\x02")
    raw[central + 8] |= 1
    path.write_bytes(raw)
    refused(path, "cat/0.png", "encrypted")
    path.write_bytes(b"PK no zip")
    refused(path, "neither a folder nor a zip")
    raw[central : central + 4] = b"nope"
    path.write_bytes(raw)
    refused(path, "broken zip")


def test_a_corrupt_zip_entry_is_unreadable(tmp_path):
    files = classes()
    path = tmp_path / "x.zip"
    raw = bytearray(pathlib.Path(pack(path, files, zipfile.ZIP_DEFLATED)).read_bytes())
    raw[raw.index(b"cat/3.png") + 60] ^= 0xFF
    path.write_bytes(raw)
    refused(path, "cat/3.png can't be read")
    d = data.load(str(path), skip_unreadable=True)
    assert len(d.train) + len(d.test) == 9 and any("cat/3.png" in note for note in d.notes)


def test_backslashes_in_a_zip_are_folders(tmp_path):
    files = {name.replace("/", "\\"): raw for name, raw in classes().items()}
    assert data.load(pack(tmp_path / "x.zip", files)).classes == ("cat", "dog")


def test_long_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_BYTES", 300)
    files = classes() | {"cat/9.png": encode(pixels(30, 30, 3))}
    for root in (write(tmp_path / "x", files), pack(tmp_path / "x.zip", files)):
        refused(root, "cat/9.png", "MiB")


def test_many_threads_read_one_zip(tmp_path):
    files = classes(n=20)
    d = data.load(pack(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED))
    expected = [x["image"].tobytes() for x in d.train]
    before, wrong = d.train.bytes_read, []

    def read():
        for i in range(len(d.train)):
            if d.train[i]["image"].tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and d.train.bytes_read == 9 * before


# Sizes, gray and colour, unreadable files.


def test_most_images_set_the_size_and_the_others_are_resized(tmp_path):
    root = write(tmp_path, classes(n=8, size=(6, 8)) | {"cat/x.png": encode(pixels(20, 9, 3))})
    d = data.load(root)
    assert d.shape == (6, 8, 3)
    assert all(x["image"].shape == (6, 8, 3) for x in d.train)
    [note] = [n for n in d.notes if "resized" in n]
    assert "8x6" in note and "9x20" in note and "1 of the 17 images" in note
    assert data.load(root, size=5).shape == (5, 5, 3)


def test_many_sizes_become_the_square_of_the_median_short_side(tmp_path):
    files = {f"{c}/{i}.png": encode(pixels(10 + i, 40, 3)) for c in "ab" for i in range(5)}
    assert data.load(write(tmp_path / "x", files)).shape == (12, 12, 3)
    big = {f"{c}/{i}.jpg": encode(pixels(150 + i, 200, 3), "JPEG") for c in "ab" for i in range(5)}
    assert data.load(write(tmp_path / "y", big)).shape == (128, 128, 3)


def test_gray_stays_gray_unless_there_is_colour(tmp_path):
    gray = {f"{c}/{i}.png": encode(pixels(8, 8)) for c in "ab" for i in range(4)}
    root = write(tmp_path, gray)
    d = data.load(root)
    assert d.shape == (8, 8, 1) and not d.flip and any("gray" in n for n in d.notes)
    write(tmp_path, {"a/9.png": encode(pixels(8, 8, 3))})
    d = data.load(root)
    assert d.shape == (8, 8, 3) and d.flip and any("8 of the 9 images" in n for n in d.notes)
    assert all(x["image"].shape == (8, 8, 3) for x in d.train)


def damaged(root):
    raw = encode(pixels(40, 40, 3), "JPEG")
    return write(
        root,
        classes(n=10)
        | {"cat/half.jpg": raw[:-200], "dog/none.png": b"", "dog/text.png": b"hello, world"},
    )


def test_unreadable_files_are_refused_with_cures(tmp_path):
    text = refused(damaged(tmp_path), "cat/half.jpg can't be read", "2 more of the 23 images")
    assert "--skip-unreadable" in text and "--check-data" in text


def test_unreadable_files_are_left_out_by_name(tmp_path):
    d = data.load(damaged(tmp_path), skip_unreadable=True)
    assert len(d.train) + len(d.test) == 20
    [note] = [n for n in d.notes if "left out" in n]
    assert all(name in note for name in ("cat/half.jpg", "dog/none.png", "dog/text.png"))


def test_only_twenty_are_named(tmp_path):
    files = classes(n=3) | {f"cat/bad{i:02}.png": b"" for i in range(25)}
    d = data.load(write(tmp_path, files), skip_unreadable=True)
    [note] = [n for n in d.notes if "left out" in n]
    assert note.count("bad") == 20 and note.endswith("and 5 more")


def test_large_sets_are_sampled_unless_files_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ALL_UP_TO", 10)
    monkeypatch.setattr(images, "SAMPLE", 4)
    root = damaged(tmp_path)
    write(tmp_path, {"dog/zebra.png": encode(pixels(8, 8, 3))})  # the last one is in the sample
    d = data.load(root)
    parts = (d.train, d.test)
    assert sum(not readable(part, i) for part in parts for i in range(len(part))) == 3
    d = data.load(root, skip_unreadable=True)
    assert len(d.train) + len(d.test) == 21


def readable(source, i):
    try:
        source[i]
    except UserError:
        return False
    return True


def test_check_lists_what_is_there(tmp_path):
    root = damaged(tmp_path)
    write(
        tmp_path, {"cat/big.png": encode(pixels(30, 20, 3)), "cat/gray.png": encode(pixels(8, 8))}
    )
    report = data.check(root, validation=0.1, test=0.2)
    assert [name for name, _ in report.unreadable] == [
        "cat/half.jpg",
        "dog/none.png",
        "dog/text.png",
    ]
    assert report.files == 25 and report.gray == 1
    assert report.sizes == {(8, 8): 21, (30, 20): 1}
    assert {split: n.tolist() for split, n in report.splits.items()} == {
        "train": [9, 9],
        "validation": [1, 1],
        "test": [3, 2],
    }
    text = str(report)
    for words in (
        "dog/none.png (it is empty)",
        "8x8 to 20x30",
        "cat",
        "validation",
        "resized to 8x8",
    ):
        assert words in text, text


# .npz files.


def save(path, **parts):
    np.savez(path, **parts)
    return str(path)


def labelled(n=12, shape=(5, 6)):
    return pixels(n, *shape), np.arange(n) % 3


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3)])
def test_npz_of_images_and_labels(tmp_path, shape):
    x, y = labelled(12, shape)
    d = data.load(save(tmp_path / "a.npz", images=x, labels=y[:, None].astype(np.uint8)), test=0.25)
    channels = 3 if shape[-1] == 3 else 1
    assert d.shape == (5, 6, channels) and d.classes == ("0", "1", "2")
    assert (len(d.train), len(d.test)) == (9, 3) and d.counts.tolist() == [3, 3, 3]
    rows = {x[i].tobytes(): y[i] for i in range(12)}
    assert all(rows[e["image"].tobytes()] == e["label"] for e in d.train)
    assert d.train.bytes_read == 9 * 30 * channels


def test_npz_splits_by_both_conventions(tmp_path):
    (x, y), (u, v) = labelled(12), labelled(6)
    named = save(tmp_path / "a.npz", train_images=x, train_labels=y, val_images=u, val_labels=v,
                 test_images=u, test_labels=v)  # fmt: skip
    keras = save(tmp_path / "b.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    d = data.load(named)
    assert (len(d.train), len(d.validation), len(d.test)) == (12, 6, 6)
    np.testing.assert_array_equal(d.test[3]["image"][..., 0], u[3])
    d = data.load(keras, validation=0.25)
    assert (len(d.train), len(d.validation), len(d.test)) == (9, 3, 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, ("images", "no labels")),
        ({"images": None}, ("labels", "no images")),
        ({"images": None, "labels": None, "data": np.zeros(3)}, ("data", "it needs images")),
        ({"labels": np.arange(11) % 3}, ("labels", "[11]", "12 images")),
        ({"labels": np.arange(12) % 3 * 1.0}, ("labels", "float64", "integers")),
        ({"labels": np.arange(12) % 3 - 1}, ("-1 occurs", "2 does not")),
        ({"labels": np.arange(12) % 3 * 2}, ("4 occurs", "1 does not", "return_inverse")),
        ({"labels": np.arange(12) % 3 * 10**12}, ("occur",)),
        ({"images": np.zeros((12, 5, 6), np.float32)}, ("float32", "255 * x")),
        ({"images": np.zeros((12, 5, 6), np.int64)}, ("int64", "astype(np.uint8)")),
        ({"images": np.zeros((12, 3, 5, 6), np.uint8)}, ("[12, 3, 5, 6]", "moveaxis")),
        ({"images": np.zeros((12, 5), np.uint8)}, ("[12, 5]",)),
        ({"images": np.array([None] * 12)}, ("Python objects", "never unpickled")),
        (
            {"images": np.zeros((0, 5, 6), np.uint8), "labels": np.zeros(0, int)},
            ("images", "empty"),
        ),
        ({"x_train": np.zeros((3, 5, 6), np.uint8), "y_train": np.arange(3)}, ("keep one",)),
    ],
)
def test_npz_that_cannot_be_meant(tmp_path, change, words):
    x, y = labelled()
    parts = {k: v for k, v in ({"images": x, "labels": y} | change).items() if v is not None}
    refused(save(tmp_path / "a.npz", **parts), *words)


def test_objects_in_an_npz_are_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    refused(save(tmp_path / "a.npz", images=np.array([Evil()]), labels=np.array([0])), "unpickled")
    assert not (tmp_path / "owned").exists()


def test_headers_that_claim_too_much_are_refused(tmp_path):
    header = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**3, 10**3)}
    np.lib.format.write_array_header_1_0(header, fields)
    files = {"images.npy": header.getvalue(), "labels.npy": b""}
    refused(pack(tmp_path / "a.npz", files), "images", "over the limit of 16 GiB")
    fields["shape"] = (10**6,)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, fields)
    refused(pack(tmp_path / "a.npz", files | {"images.npy": header.getvalue()}), "images", "broken")
    refused(
        pack(tmp_path / "a.npz", files | {"images.npy": b"\x93NUMPY\x01\x00\x05\x00{(((("}),
        "broken",
    )


def test_truncated_and_corrupt_npz_files_are_refused(tmp_path):
    x, y = labelled()
    path = tmp_path / "a.npz"
    raw = pathlib.Path(save(path, images=x, labels=y)).read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    refused(path, "broken .npz")
    path.write_bytes(pixels(100).tobytes())
    refused(path, "broken .npz")
    flipped = bytearray(raw)
    flipped[raw.index(x[3].tobytes())] ^= 1
    path.write_bytes(flipped)
    refused(path, "images", "broken", "CRC")


def test_npz_splits_of_two_shapes_are_resized(tmp_path):
    x, y = labelled(12)
    path = save(tmp_path / "a.npz", x_train=x, y_train=y, x_test=pixels(6, 9, 9, 3), y_test=y[:6])
    d = data.load(path)
    assert d.shape == (5, 6, 3) and d.test[0]["image"].shape == (5, 6, 3)


# The user's own function.


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Writes a module into the current directory; returns the name of its function `make`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, number = set(sys.modules), itertools.count()

    def write_module(body):
        name = f"own{next(number)}_{abs(hash(str(tmp_path)))}"
        (tmp_path / f"{name}.py").write_text("import numpy as np\n" + body)
        return f"{name}:make"

    yield write_module
    for name in set(sys.modules) - before:
        if name.startswith("own"):
            del sys.modules[name]


SOURCE = """
class Own:
    def __init__(self, n):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return {"image": np.full((4, 4, 3), i, np.uint8), "label": i % 2}
"""


def test_a_source_of_ones_own(custom):
    d = data.load(custom(SOURCE + "def make():\n    return Own(20)"), validation=0.1)
    assert (len(d.train), len(d.validation), len(d.test)) == (14, 2, 4)
    assert d.shape == (4, 4, 3) and d.classes == ("0", "1")
    assert all(e["image"][0, 0, 0] % 2 == e["label"] for e in d.train)
    assert any("once through" in note for note in d.notes)


def test_a_mapping_of_sources_with_labels_and_classes(custom):
    body = """
class Labelled(Own):
    classes = ["even", "odd"]
    @property
    def labels(self):
        return [i % 2 for i in range(self.n)]
def make():
    return {"train": Labelled(10), "val": Labelled(4), "test": Labelled(2)}
"""
    d = data.load(custom(SOURCE + body))
    assert (len(d.train), len(d.validation), len(d.test)) == (10, 4, 2)
    assert d.classes == ("even", "odd") and not any("once through" in note for note in d.notes)
    assert d.validation[3]["image"][0, 0, 0] == 3


def test_a_list_of_gray_pairs(custom):
    d = data.load(
        custom("def make():\n    return [(np.zeros((3, 5), np.uint8), i % 2) for i in range(9)]")
    )
    assert d.shape == (3, 5, 1)


PAIRS = "def make():\n    return [({image}, {label}) for i in range(8)]"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("make = 3", ("no function 'make'",)),
        ("other = 3", ("no function 'make'",)),
        ("1 / 0", ("importing own", "ZeroDivisionError", "division by zero")),
        ("def make(:", ("importing own", "SyntaxError")),
        ("raise SystemExit(3)", ("importing own", "SystemExit")),
        ("def make(n):\n    pass", ("without arguments", "TypeError", "'n'")),
        ("def make():\n    raise KeyError('x')", ("calling own", "KeyError")),
        ("def make():\n    return None", ("NoneType", "len() and []")),
        ("def make():\n    return (x for x in [])", ("generator", "len() and []")),
        ("def make():\n    return []", ("train split", "is empty")),
        ("def make():\n    return {'train': [], 'test': []}", ("train split", "is empty")),
        ("def make():\n    return {'train': [1], 'dev': [1]}", ("'dev'", "use 'train'")),
        ("def make():\n    return {'test': [1]}", ("no 'train' split",)),
        ("def make():\n    return [1, 2]", ("example 0", "int", "(image, label)")),
        ("def make():\n    return [{'x': 1}]", ("example 0", "dict", "(image, label)")),
        (PAIRS.format(image="np.zeros((3, 3))", label="i % 2"), ("float64", "uint8")),
        (PAIRS.format(image="np.zeros((3, 8, 8), np.uint8)", label="i % 2"), ("[3, 8, 8]",)),
        (PAIRS.format(image="np.zeros((3, 3), np.uint8)", label="'a'"), ("labels", "integers")),
        (
            PAIRS.format(image="np.zeros((3, 3), np.uint8)", label="1 + i % 2"),
            ("2 occurs", "0 does not"),
        ),
        (PAIRS.format(image="np.zeros((3 + i, 3, 1 / i), np.uint8)", label="i % 2"), ("Zero",)),
        (
            "class L(list):\n    labels = [0, 1]\ndef make():\n    return L(range(3))",
            ("[2]", "3 images"),
        ),
        (
            "class L(list):\n    labels, classes = [0, 1, 1], 'abc'\ndef make():\n    return L(range(3))",
            ("class 'a'", "leaves none"),
        ),
    ],
)
def test_functions_that_cannot_be_meant(custom, body, words):
    refused(custom(body), *words)


def test_no_such_module_or_function(custom):
    refused(
        "no_such_package.module:make", "importing no_such_package.module", "ModuleNotFoundError"
    )
    refused("no such thing", "is not there", "package.module:function")


def test_an_element_that_raises_is_unreadable(custom):
    body = SOURCE + (
        "class Bad(Own):\n    labels = np.arange(10) % 2\n    def __getitem__(self, i):\n"
        "        if i == 7:\n            raise OSError('disk on fire')\n"
        "        return super().__getitem__(i)\ndef make():\n    return Bad(10)"
    )
    name = custom(body)
    refused(name, "example 7", "disk on fire", "--skip-unreadable")
    d = data.load(name, skip_unreadable=True)
    assert len(d.train) + len(d.test) == 9


# Text.


def test_text_is_split_by_stretches(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(chr(97 + i % 26) for i in range(1000)) + "é"
    path.write_text(text, encoding="utf-8")
    d = data.load(str(path), validation=0.1, test=0.2, context=10)
    assert d.kind == "text" and d.shape == (11,) and not d.flip
    assert d.classes == (*map(chr, range(97, 123)), "é")
    assert (len(d.train), len(d.validation), len(d.test)) == (70, 9, 19)
    spell = lambda e: "".join(d.classes[c] for c in e["text"])
    assert spell(d.train[0]) == text[:11] and spell(d.train[1]) == text[10:21]
    assert spell(d.validation[0]) == text[701:712] and spell(d.test[0]) == text[801:812]
    assert d.train[0]["text"].dtype == np.int32 and d.train.bytes_read > 0
    assert d.counts.sum() == 700 and d.counts.shape == (27,)
    assert data.load(str(path), context=10).validation is None
    with pytest.raises(AttributeError):
        _ = d.train.labels


def test_topics_are_embedded():
    d = data.load("topics", context=128)
    assert len(d.train) > 500 and len(d.test) > 100 and {"a", " ", "\n"} <= set(d.classes)
    assert d.train[0]["text"].shape == (129,)
    [batch] = itertools.islice(data.eval_batches(d.test, 8), 1)
    assert batch["text"].shape == (8, 129) and batch["where"].all()


def test_text_that_cannot_be_meant(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("caf\xe9".encode("latin1") * 1000)
    refused(path, "not UTF-8", "0xe9", "at 3")
    path.write_text("too short")
    refused(path, "too short", "--context")
    path.write_text("")
    refused(path, "too short")
    refused("topics", "--imbalance", imbalance=2.0)
    refused(tmp_path / "b.txt", "is not there")


def test_check_of_text(tmp_path):
    report = data.check("topics", context=64, validation=0.1)
    assert report.unreadable == () and set(report.splits) == {"train", "validation", "test"}
    assert "windows" in str(report) and "different characters" in str(report)


# Splits and long tails.


def test_hold_out_takes_at_least_one_of_each_class():
    labels = np.array([0] * 10 + [1] * 3)
    rest, test, val = loading.hold_out(labels, 0, 0.2, 0.1)
    assert np.bincount(labels[test]).tolist() == [2, 1]
    assert np.bincount(labels[val]).tolist() == [1, 1]
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, test, val])), np.arange(13))
    np.testing.assert_array_equal(loading.hold_out(labels, 0, 0.2)[1], test)


def test_counts_are_those_after_thinning(tmp_path):
    d = data.load(write(tmp_path, classes(n=20, names=("a", "b", "c"))), imbalance=4, test=0.2)
    assert d.counts.tolist() == [16, 8, 4] == np.bincount(d.train.labels).tolist()
    assert len(d.test) == 12


def test_digits_have_all_splits():
    d = data.load("digits", validation=0.1)
    assert len(d.train) + len(d.validation) + len(d.test) == 1797 and not d.flip
    assert d.shape == (8, 8, 1) and d.counts.min() > 100
    assert data.load("digits", size=16).train[0]["image"].shape == (16, 16, 1)
    assert data.check("digits").files == 1797


def test_check_classes_names_the_strange():
    assert dataset.check_classes(np.array([2, 0, 1, 1]), "x") == 3
    with pytest.raises(UserError, match="7, 9 occur and 1, 2 do not"):
        dataset.check_classes(np.array([0, 9, 7, 3]), "x")


# Pipelines.


def numbered(n=23):
    def read(i):
        return {"image": np.full((2, 2, 1), i, np.uint8), "label": np.int32(i)}, 4

    return Source(read, n, np.arange(n, dtype=np.int32))


ECHO = {
    "plain": lambda ds: ds,
    "echo2": lambda ds: jt.echo.echo(ds, 2, batch_size=5),
    "echo1.5": lambda ds: jt.echo.echo(ds, 1.5, batch_size=5),
}


@pytest.mark.parametrize("readers", [0, 4])
@pytest.mark.parametrize(
    "to_device", [None, lambda b: {k: v + 0 for k, v in b.items()}], ids=["host", "thread"]
)
@pytest.mark.parametrize("transform", list(ECHO.values()), ids=list(ECHO))
def test_a_state_goes_on_with_identical_batches(transform, to_device, readers):
    def start():
        return data.pipeline(
            numbered(), batch=5, seed=3, transform=transform, to_device=to_device, readers=readers
        )

    straight = start()
    states, batches = [json.dumps(straight.get_state())], []
    for _ in range(24):
        batches.append(next(straight)["label"].tolist())
        states.append(json.dumps(straight.get_state()))
    assert len({tuple(b) for b in batches}) > 12
    for k in (0, 1, 7, 13):
        resumed = start()
        resumed.set_state(json.loads(states[k]))
        # A state asked for before the first batch is the same state.
        assert json.dumps(resumed.get_state()) == states[k]
        rest = [next(resumed)["label"].tolist() for _ in range(10)]
        assert rest == batches[k : k + 10]
        again = [json.dumps(resumed.get_state())]
        assert again == [states[k + 10]]
    # Back in the same pipeline, too.
    straight.set_state(json.loads(states[2]))
    assert [next(straight)["label"].tolist() for _ in range(5)] == batches[2:7]


def test_readers_and_the_device_thread_change_no_batch():
    def first(**options):
        batches = data.pipeline(numbered(), batch=5, seed=3, transform=ECHO["plain"], **options)
        return [next(batches)["label"].tolist() for _ in range(12)]

    expected = first()
    assert first(readers=4) == expected == first(readers=3, to_device=lambda b: b)


@pytest.mark.parametrize("readers", [0, 4])
@pytest.mark.parametrize("to_device", [None, lambda b: b], ids=["host", "thread"])
@pytest.mark.parametrize("transform", list(ECHO.values()), ids=list(ECHO))
def test_a_file_that_breaks_during_a_run_is_a_users_mistake(
    tmp_path, transform, to_device, readers
):
    d = data.load(write(tmp_path, classes(n=12)))
    batches = data.pipeline(
        d.train, batch=5, seed=0, transform=transform, to_device=to_device, readers=readers
    )
    for name in ("cat", "dog"):
        for i in range(12):
            (tmp_path / name / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="can't be read .it is empty.*--skip-unreadable"):
        for _ in range(40):
            next(batches)


def test_without_readers_only_what_is_used_is_read():
    source = numbered()
    batches = data.pipeline(source, batch=5, seed=0, transform=ECHO["plain"])
    for _ in range(3):
        next(batches)
    assert source.bytes_read == 3 * 5 * 4


def test_one_example_is_enough():
    batches = data.pipeline(numbered(1), batch=3, seed=0, transform=ECHO["plain"])
    assert next(batches)["label"].tolist() == [0, 0, 0]


def test_sources_count_and_index():
    source = numbered(10)
    part = source.subset(np.array([4, 2, 7]))
    assert [int(e["label"]) for e in part] == [4, 2, 7] and int(part[-1]["label"]) == 7
    assert part.labels.tolist() == [4, 2, 7]
    assert part.bytes_read == 16 and source.bytes_read == 0
    with pytest.raises(IndexError):
        part[3]


def test_nothing_warns_about_large_images(tmp_path):
    side = 7_900  # 62 megapixels, under our limit
    assert side * side < images.MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(write(tmp_path, classes() | {"cat/x.png": bomb("PNG", 12_000)}), "12000x12000")
