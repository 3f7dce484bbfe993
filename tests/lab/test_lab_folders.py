"""Folders as people have them: turned photos, other extensions, split names, lists, files that are none."""

import io
import os
import pathlib

import numpy as np
import pytest
from hypothesis import strategies as st
from jaxtricks.lab import data
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import dataset, folders, images
from PIL import Image, ImageOps

from tests.lab import mangle
from tests.lab.test_lab_data import classes, encode, pack, pixels, refused, write

ORIENTATION = 0x112


def exif(orientation, order=">"):
    """EXIF with a turned camera, in either order of bytes."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    number = lambda value, size: value.to_bytes(size, "little" if order == "<" else "big")
    entry = number(ORIENTATION, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + bytes(2)
    return b"Exif\0\0" + mark + number(8, 4) + number(1, 2) + entry + number(0, 4)


# Orientation.

KINDS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
}


def saved(array, kind, orientation, order):
    if kind != "TIFF":
        return encode(array, kind, exif=exif(orientation, order), **KINDS[kind])
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return encode(array, kind, exif=tags, **KINDS[kind])


@pytest.mark.parametrize("library", [True, False], ids=["simplejpeg", "pillow"])
def test_photos_are_upright_whatever_the_camera_did(library, monkeypatch):
    """Against Pillow's own turning: every kind, size, channel count, orientation and byte order."""
    if not library:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)

    def check(kind, height, width, channels, orientation, order, seed):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (1 + height // 4, 1 + width // 4, 3), np.uint8)
        array = np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width]
        raw = saved(array if channels == 3 else array[..., 0], kind, orientation, order)
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
        wanted = np.asarray(wanted.convert("RGB" if channels == 3 or kind == "WEBP" else "L"))
        out = images.decode(raw, "x")
        assert out.flags.c_contiguous and out.shape[:2] == wanted.shape[:2]
        difference = np.abs(out.reshape(wanted.shape).astype(int) - wanted)
        assert difference.max() <= (6 if kind == "JPEG" else 0)

    mangle.search(
        check,
        150,
        kind=st.sampled_from(list(KINDS)),
        height=st.integers(1, 21),
        width=st.integers(1, 21),
        channels=st.sampled_from([1, 3]),
        orientation=st.integers(1, 8),
        order=st.sampled_from("<>"),
        seed=st.integers(0, 9),
    )


def test_damaged_exif_leaves_the_picture_as_it_is():
    array = pixels(8, 12, 3)
    plain = images.decode(encode(array, "JPEG"), "x")

    def check(damage):
        raw = encode(array, "JPEG", exif=damage or b"Exif\0\0")
        out = images.decode(raw, "x")
        assert out.size == plain.size

    # All but the bytes of the orientation itself.
    mangle.search(check, 100, damage=mangle.damaged(exif(6)[:60]))
    for strange in (0, 9, 255, 65535):
        out = images.decode(encode(array, "JPEG", exif=exif(strange)), "x")
        np.testing.assert_array_equal(out, plain)


def test_turned_photos_in_folders_zips_and_lists(tmp_path):
    turned = {f"{c}/{i}.jpg": encode(pixels(8, 12, 3), "JPEG", exif=exif(6)) for c in "ab"
              for i in range(5)}  # fmt: skip
    lines = "\n".join(f"{name} {'ab'.index(name[0])}" for name in turned)
    (tmp_path / "list.txt").write_text(lines)
    root = write(tmp_path / "x", turned)
    shapes = [
        data.load(root).shape,
        data.load(pack(tmp_path / "x.zip", turned)).shape,
        data.load(str(tmp_path / "list.txt"), root=root).shape,
    ]
    assert shapes == [(12, 8, 3)] * 3


# Kinds.


@pytest.mark.parametrize("extension", [".tif", ".TIFF", ".gif", ".jfif", ".jpe", ".JPEG"])
def test_images_of_all_common_extensions_count(tmp_path, extension):
    kind = {".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"}.get(extension.lower(), "JPEG")
    other = {f"a/{i}x{extension}": encode(pixels(8, 8, 3), kind) for i in range(7)}
    for root in (write(tmp_path / "x", classes(names="ab") | other),
                 pack(tmp_path / "x.zip", classes(names="ab") | other)):  # fmt: skip
        report = data.check(root)
        assert report.files == 17 and not report.unreadable
        assert sum(n[0] for n in report.splits.values()) == 12


def test_tiffs_of_32_bits_are_refused_and_of_16_are_scaled():
    deep = encode(Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), "TIFF")
    assert images.decode(deep, "x").ravel().tolist() == [0, 1, 255]
    for dtype in (np.float32, np.int32):
        with pytest.raises(data.UnreadableError, match="32-bit or floating-point"):
            images.decode(encode(Image.fromarray(np.ones((2, 2), dtype)), "TIFF"), "x")


def test_a_tiff_of_one_huge_tile_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(images, "_load", None)
    entries = [(0x100, 8), (0x101, 8), (0x102, 8), (0x103, 1), (0x106, 1), (0x115, 1),
               (0x142, 60_000), (0x143, 60_000), (0x144, 8), (0x145, 9)]  # fmt: skip
    body = b"".join(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
                    for tag, value in entries)  # fmt: skip
    with pytest.raises(data.UnreadableError, match="limit of 64 megapixels"):
        images.decode(b"II*\0\x08\0\0\0\x0a\0" + body + bytes(4), "x")


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_files_that_are_not_read_are_counted(tmp_path, packed):
    more = {f"cat/{i}.jp2": b"x" for i in range(40)} | {"dog/notes.TXT": b"x", "README": b"x"}
    more |= {"cat/Thumbs.db": b"x", "cat/.DS_Store": b"x"}
    root = (pack if packed else write)(tmp_path / "x", classes() | more)
    for notes in (data.load(root).notes, data.check(root).notes):
        [note] = [n for n in notes if "extensions" in n]
        assert note.endswith(": 40 .jp2, 1 .txt, 1 without one"), note


# Class folders.


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_class_folders_without_images_are_named_all_and_left_out_on_request(tmp_path, packed):
    more = {f"bird/{i}.jp2": b"x" for i in range(6)} | {"docs/a.txt": b"x"}
    root = (pack if packed else write)(tmp_path / "x", classes(names=("a", "b")) | more)
    text = refused(root, "'bird', 'docs'", "6 .jp2", "1 .txt", "remove the folders")
    assert text.endswith("or pass --skip-unreadable")
    d = data.load(root, skip_unreadable=True)
    assert d.classes == ("a", "b") and any("bird, docs" in note for note in d.notes)


def test_a_class_whose_files_are_all_broken_is_left_out_by_name_on_request(tmp_path):
    broken = {"ant/0.png": b"", "ant/1.png": b"", "ant/2.png": b"x", "cat/9.png": b""}
    root = write(tmp_path, classes() | broken)
    refused(root, "ant/0.png can't be read", "3 more", "--skip-unreadable")
    d = data.load(root, skip_unreadable=True)
    assert d.classes == ("cat", "dog") and np.unique(d.train.labels).tolist() == [0, 1]
    assert any("no image of these classes can be read: ant" in note for note in d.notes)
    names = {e["image"].tobytes(): e["label"] for part in (d.train, d.test) for e in part}
    for name, raw in classes_of(root).items():
        assert names[raw] == ["cat", "dog"].index(name.split("/")[0])


def classes_of(root):
    """{path: pixels} of the images that can be read."""
    paths = [os.path.join(folder, f) for folder, _, fs in os.walk(root) for f in fs]
    paths = [p for p in paths if os.path.getsize(p) > 10]
    return {os.path.relpath(p, root): np.asarray(Image.open(p)).tobytes() for p in paths}


def test_nothing_readable_is_one_sentence(tmp_path):
    root = pack(tmp_path / "junk.zip", {"a/readme.txt": b"x", "b/x.jpg": b"broken"})
    refused(root, "'a'", "1 .txt", "--skip-unreadable")
    refused(root, "one class ('b')", skip_unreadable=True)


def test_one_class_is_refused(tmp_path):
    refused(write(tmp_path, classes(names=("one",))), "one class ('one')", "add another")


# Splits.


@pytest.mark.parametrize("names", [("training", "testing"), ("Training", "Testing")])
def test_training_and_testing_are_splits(tmp_path, names):
    files = classes(n=6, under=f"{names[0]}/") | classes(n=2, under=f"{names[1]}/")
    d = data.load(write(tmp_path, files))
    assert d.classes == ("cat", "dog") and (len(d.train), len(d.test)) == (12, 4)


@pytest.mark.parametrize(
    ("tops", "subs", "noted"),
    [
        (("part1", "part2"), ("cat", "dog"), True),
        (("seen", "unseen", "new"), ("1", "2", "3"), True),
        (("cat", "dog"), ("images",), False),  # as in Tiny ImageNet
        (("cat", "dog"), (), False),
    ],
)
def test_top_folders_that_hold_the_same_sub_folders_are_warned_of(tmp_path, tops, subs, noted):
    files = {f"{top}/{sub}/{i}.png": encode(pixels(8, 8, 3)) for top in tops for i in range(3)
             for sub in subs or ("",)}  # fmt: skip
    for root in (write(tmp_path / "x", files), pack(tmp_path / "x.zip", files)):
        notes = [n for n in data.load(root).notes if "same sub-folders" in n]
        assert len(notes) == noted
        assert all(x in note for note in notes for x in (*tops, *subs))


# Files that are none.


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("strange", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, strange):
    root = write(tmp_path, classes())
    path = tmp_path / "cat/pipe.png"
    {"pipe": lambda: os.mkfifo(path), "device": lambda: os.symlink("/dev/zero", path),
     "folder": lambda: os.symlink(tmp_path / "dog/0.png", path)}[strange]()  # fmt: skip
    if strange == "folder":  # a link to a file is one
        assert data.check(root).files == 11
        return
    refused(root, "cat/pipe.png", "not a regular file")
    assert data.check(root).unreadable == (("cat/pipe.png", "it is not a regular file"),)
    assert len(data.load(root, skip_unreadable=True).train) == 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_that_are_called_records_or_text_are_no_data(tmp_path):
    for name in ("x.array_record", "y.txt", "z.npz", "w.zip"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is neither a folder nor")
    write(tmp_path, classes())
    assert data.load(str(tmp_path)).classes == ("cat", "dog")


# Lists.


def listed(folder, files, name, separator=" "):
    """A list of those files; the label is the class's place in the alphabet."""
    lines = [f"{path}{separator}{sorted(('cat', 'dog')).index(path.split('/')[-2])}\n"
             for path in files]  # fmt: skip
    (folder / name).write_text("".join(lines))
    return str(folder / name)


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", "])
def test_a_list_and_its_splits(tmp_path, separator):
    parts = {where: classes(n=n, under=f"{where}/a b/") for where, n in
             (("train", 6), ("val", 2), ("test", 3))}  # fmt: skip
    root = write(tmp_path / "images", {k: v for part in parts.values() for k, v in part.items()})
    for where, part in parts.items():
        path = listed(tmp_path, part, f"ImageNet_LT_{where}.txt", separator)
        assert folders._split_word(tmp_path / f"ImageNet_LT_{where}.txt")[1] == where
        if where == "train":
            only = data.load(path, root=root)
            assert (len(only.train), only.validation, len(only.test)) == (10, None, 2)
    (tmp_path / "Other_train.txt").write_text("not 1 of these")
    for where in parts:
        d = data.load(str(tmp_path / f"ImageNet_LT_{where}.txt"), root=root)
        assert (len(d.train), len(d.validation), len(d.test)) == (12, 4, 6)
        assert any("train: the list ImageNet_LT_train.txt" in note for note in d.notes)
    for part, split in ((parts["train"], d.train), (parts["test"], d.test)):
        for (name, raw), example in zip(part.items(), split, strict=True):
            assert example["label"] == ("dog" in name)
            np.testing.assert_array_equal(example["image"], images.decode(raw, name))
    assert data.check(path, root=root).files == 22


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat/0.png", ("line 1 of", "'cat/0.png'", "PATH LABEL")),
        ("cat/0.png 0\n\ncat/1.png one", ("line 3 of", "'cat/1.png one'")),
        ("cat/0.png 1.5", ("line 1 of",)),
        ("../cat/0.png 0", ("line 1 of", "outside of --root")),
        ("/etc/0.png 0", ("outside of --root",)),
        ("C:\\cat\\0.png 0", ("outside of --root",)),
        ("cat\\..\\..\\0.png 0", ("outside of --root",)),
        ("", ("lists no images",)),
        ("cat/0.png 0\ndog/0.png 2", ("2 occurs", "1 does not")),
        ("cat/0.png 0\ndog/0.png -1", ("-1 occurs",)),
        ("cat/0.png " + "9" * 30, ("line 1 of",)),
        ("cat/0.png 0\nno.png 1\n" * 3, ("no.png can't be read", "No such file")),
        ("cat/0.png 0\n" * 3 + ("x" * 300 + ".png 1\n") * 3, ("File name too long",)),
        ("cat/0.png 0\nnul\0.png 1\n" * 3, ("can't be read", "null")),
    ],
)
def test_lists_that_cannot_be_meant(tmp_path, text, words):
    root = write(tmp_path / "images", classes())
    (tmp_path / "list.txt").write_text(text)
    refused(tmp_path / "list.txt", *words, root=root)


def test_roots_that_cannot_be_meant(tmp_path):
    root = write(tmp_path / "images", classes())
    path = listed(tmp_path, classes(), "list.txt")
    refused(path, "--root", "not a folder", root=str(tmp_path / "nowhere"))
    refused(root, "--root is for a list", root=root)
    listed(tmp_path, classes(), "x_train.txt")
    listed(tmp_path, classes(), "x_training.txt")
    refused(tmp_path / "x_train.txt", "both train lists", root=root)


def test_whatever_a_list_says_it_is_data_or_one_sentence():
    def check(raw):
        with mangle.watched() as folder:
            write(pathlib.Path(folder), classes(n=2))
            path = pathlib.Path(folder, "list.txt")
            path.write_bytes(raw)
            try:
                data.load(str(path), root=folder, skip_unreadable=True)
            except UserError as error:
                assert str(error).isprintable()

    lines = [f"{c}/{i}.png {k}\n" for k, c in enumerate(("cat", "dog")) for i in range(2)]
    names = st.lists(st.sampled_from([*lines, *(f"{n} 1\n" for n in mangle.NAMES)]), max_size=6)
    mangle.search(
        check,
        60,
        raw=names.map(lambda x: "".join(lines + x).encode()).flatmap(mangle.damaged),
    )


# Records that break while they are read.


def breaking(n=24, num_classes=3, *, skips=True):
    """A source of images filled with their index, and the set of those that can't be read."""
    broken = set()

    def read(i):
        if i in broken:
            raise data.UnreadableError(f"{i}.png", "it is empty")
        return {"image": np.full((2, 2, 1), i, np.uint8), "label": np.int32(i % num_classes)}, 4

    labels = np.arange(n, dtype=np.int32) % num_classes
    return dataset.Source(read, n, labels, skips=skips), broken


@pytest.mark.parametrize("readers", [0, 2])
def test_a_record_that_breaks_shifts_no_other(readers):
    """The stream is that of whole records; in place of a broken one stands one of its class."""
    rng = np.random.default_rng(readers)
    for _ in range(30):
        seed, batch = int(rng.integers(6)), int(rng.choice([1, 4, 8]))
        # One record of each class stays whole.
        chosen = set(rng.choice(np.arange(3, 24), rng.integers(21), replace=False).tolist())
        whole, _ = breaking()
        part, broken = breaking()
        broken |= chosen
        streams = [
            data.pipeline(s, batch=batch, seed=seed, transform=lambda ds: ds, readers=readers)
            for s in (whole, part)
        ]
        for _ in range(24):
            wanted, have = map(next, streams)
            np.testing.assert_array_equal(wanted["label"], have["label"])
            there = ~np.isin(wanted["image"][:, 0, 0, 0], list(chosen))
            np.testing.assert_array_equal(wanted["image"][there], have["image"][there])
            assert not np.isin(have["image"], list(chosen)).any()
        assert set(part.skipped) == {f"{i}.png" for i in chosen}


def test_a_stream_with_skips_goes_on_exactly():
    for k in range(8):
        part, broken = breaking()
        broken |= {3, 5, 11}
        start = lambda part=part: data.pipeline(part, batch=5, seed=1, transform=lambda ds: ds)
        straight, state = start(), None
        for _ in range(k):
            next(straight)
        state = straight.get_state()
        resumed = start()
        resumed.set_state(state)
        for _ in range(9):
            np.testing.assert_array_equal(next(straight)["image"], next(resumed)["image"])


def test_an_evaluation_leaves_broken_records_out():
    part, broken = breaking()
    broken |= {0, 7, 8, 9, 10}
    for batch, rows in ((5, None), (3, None), (6, np.array([2, 3])), (1, None)):
        seen = []
        for x in data.eval_batches(part, batch, rows=rows):
            assert len(x["where"]) == len(x["image"]) == (batch if rows is None else len(rows))
            seen += x["image"][x["where"]][:, 0, 0, 0].tolist()
        order = (
            np.arange(24)
            if rows is None
            else np.concatenate([np.arange(24).reshape(-1, 6)[:, rows].ravel()])
        )
        assert seen == [i for i in order if i not in broken]


def test_without_the_option_and_without_a_whole_class_it_is_an_error():
    part, broken = breaking(skips=False)
    broken |= {3}
    with pytest.raises(data.UnreadableError, match=r"3\.png"):
        part[3]
    part, broken = breaking()
    broken |= set(range(0, 24, 3))
    with pytest.raises(UserError, match="nor can the 8 images of its class after it"):
        part[0]
    assert folders.extensions([("a", "x")]) == "1 without one"
